"""Delivers to webhooks and mailboxes what the notify projection filed. Any number of processes may.

Rule 1: at least once: a try is settled after it, and one that nobody settled is made again; the receiver
knows a repeat by its `webhook-id` (in mail, the Message-ID).
Rule 2: 2xx is a delivery, 410 disables the webhook, an address that may not be reached is given up at once,
everything else is tried again, with the delays of `DELAYS`, about a day in all.
Rule 3: no error says more than a status and a class: URLs carry secrets.
"""

from __future__ import annotations

import asyncio
import random
from typing import NamedTuple

import httpx
import structlog

from streamjobs import metrics
from streamjobs.errors import RefusedTarget, StreamjobsError
from streamjobs.faults import fault
from streamjobs.outgoing import Outgoing, Policy
from streamjobs.projections.mail import Mail, MailError
from streamjobs.retry import Backoff
from streamjobs.store import Claimed, Store
from streamjobs.store.deliveries import Verdict
from streamjobs.webhook import signed_headers

log = structlog.get_logger(__name__)

DELAYS = (5.0, 60.0, 300.0, 1800.0, 7200.0, 21600.0, 50400.0)
"""Seconds between the tries; each is changed by up to a fifth."""

_PATIENCE = Backoff(base=0.5, cap=10.0)
_GONE = 410


class Attempt(NamedTuple):
    """How one try went."""

    verdict: Verdict
    why: str = ""


class Deliverer:
    """Tries what is due, as many at once as `webhook_connections` says."""

    def __init__(self, store: Store, *, outgoing: Outgoing | None = None, mail: Mail | None = None) -> None:
        settings = store.settings
        policy = Policy.of(settings.webhook_allow, http=settings.webhook_http)
        self._store = store
        self._outgoing = outgoing or Outgoing(policy, settings.webhook_timeout)
        self._mail = mail or Mail(settings.smtp_url, settings.notify_from, settings.webhook_timeout)
        self._limit = settings.webhook_connections
        self._interval = settings.sweep_interval
        self._running: set[asyncio.Task[None]] = set()

    async def tick(self) -> float:
        """Try what is due and wait for the answers; the seconds until something may be due again.

        Raises `StoreUnavailable`.
        """
        delay = await self._start_due()
        await asyncio.gather(*self._running)
        return delay

    async def run(self) -> None:
        """Deliver until cancelled. What is under way then is tried again by somebody else."""
        failures = 0
        try:
            while True:
                try:
                    delay = await self._start_due()
                    failures = 0
                except StreamjobsError as error:
                    failures += 1
                    delay = _PATIENCE.delay(failures)
                    log.warning("delivery.failed", error=error.code, failures=failures)
                await self._pause(delay)
        finally:
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)

    async def _pause(self, delay: float) -> None:
        """Sleep; with no place free, until there is one."""
        if len(self._running) >= self._limit:
            await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
        else:
            await asyncio.sleep(delay)

    async def _start_due(self) -> float:
        waits = [self._interval]
        for partition in self._store.partitions:
            free = self._limit - len(self._running)
            if free <= 0:
                break
            claims = await self._store.deliveries.claim(partition, free)
            for one in claims.claimed:
                task = asyncio.create_task(self._deliver(one), name="delivery")
                self._running.add(task)
                task.add_done_callback(self._running.discard)
            if claims.next_due is not None:
                waits.append(max(claims.next_due, 0.01))
        return min(waits)

    async def _deliver(self, one: Claimed) -> None:
        attempt = await self._attempt(one)
        fault("after_delivery")
        try:
            is_settled = await self._store.deliveries.settle(
                one, attempt.verdict, delay=delay_after(one.number), why=attempt.why
            )
        except StreamjobsError as error:
            log.warning("delivery.not_settled", delivery=one.id, error=error.code)
            return
        metrics.DELIVERIES.labels(attempt.verdict if is_settled else "late").inc()
        if attempt.verdict != "done":
            log.info("delivery.not_taken", delivery=one.id, verdict=attempt.verdict, why=attempt.why)

    async def _attempt(self, one: Claimed) -> Attempt:
        try:
            if one.webhook.is_mail:
                await self._mail.send(one)
                return Attempt("done")
            timestamp = one.now_ms // 1000
            headers = signed_headers(one.secrets, one.id, timestamp, one.content)
            headers |= {"content-type": "application/json", "user-agent": "streamjobs"}
            answer = await self._outgoing.post(one.webhook.url, headers, one.content)
        except RefusedTarget as error:
            return Attempt("dead", str(error))
        except MailError as error:
            return Attempt("dead" if error.is_final else "retry", str(error))
        except (OSError, httpx.HTTPError) as error:
            return Attempt("retry", f"no answer: {type(error).__name__}")
        return judged(answer.status)


def judged(status: int) -> Attempt:
    """What an answer's status means."""
    if 200 <= status < 300:
        return Attempt("done")
    return Attempt("gone" if status == _GONE else "retry", f"answered {status}")


def delay_after(number: int) -> float:
    """Seconds from a try to the next one; tries after a rerun begin with the first delay again."""
    return DELAYS[(number - 1) % (len(DELAYS) + 1) % len(DELAYS)] * random.uniform(0.8, 1.2)
