"""One job under one lease: load, run, record, and end, park or hand back.

Rule 1: the lease lost (`fenced`) stops the job at once and quietly; the next holder goes on from the log.
Rule 2: whatever the workflow's code does, the job gets exactly one outcome, or none where the lease is lost.
Rule 3: a cancel closes what the job has open (the provider's connection, its tools) before it is recorded.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal, NamedTuple

import msgspec
import structlog

from streamjobs import metrics
from streamjobs.app import CHAT, App
from streamjobs.config import Settings
from streamjobs.cursor import Cursor
from streamjobs.errors import Fenced, JobNotFound, ProviderError, StoreUnavailable, StreamjobsError
from streamjobs.events import (
    UNENCODABLE,
    ErrorInfo,
    Event,
    JobCompleted,
    JobFailed,
    JobRetrying,
    clean_text,
    encode_json,
)
from streamjobs.faults import fault
from streamjobs.llm import Providers
from streamjobs.retry import Backoff
from streamjobs.store import Entry, Lease, Outcome, Store
from streamjobs.worker.chat import chat
from streamjobs.worker.context import Clock, Context, HandBack
from streamjobs.worker.history import History
from streamjobs.worker.recorder import Committer, Journal

log = structlog.get_logger(__name__)

_MAX_MESSAGE = 2000
Stop = Literal["cancel", "fenced", "timeout", "yield"]


class Services(NamedTuple):
    """What every execution of a worker shares."""

    store: Store
    app: App
    settings: Settings
    providers: Providers
    clock: Clock
    committers: dict[int, Committer]
    is_draining: Callable[[], bool]


class _Ending(NamedTuple):
    """What becomes of the job."""

    outcome: Outcome
    event: Event | None = None
    delay_ms: int = 0


class Execution:
    """Runs one leased job in a task of its own."""

    def __init__(self, lease: Lease, services: Services, committer: Committer) -> None:
        self.lease = lease
        self.journal = Journal(lease, committer, self._on_change)
        self._services = services
        self._stopped: Stop | None = None
        self.is_ending = False
        self._max_attempts = services.settings.max_attempts
        self._task: asyncio.Task[Any] | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def run(self) -> None:
        """Advance the job until it has an outcome or the lease is lost. Never raises for the job's own faults."""
        started = time.monotonic()
        self._task = asyncio.current_task()
        fault("after_take")
        if self.lease.ms_left >= 0:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self.lease.ms_left / 1000, self.stop, "timeout")
        try:
            ending = await self._advance()
            outcome = await self._end(ending) if ending is not None else "fenced"
        except Fenced:
            outcome = "fenced"
        finally:
            if self._timer is not None:
                self._timer.cancel()
        metrics.JOBS_DONE.labels(outcome).inc()
        metrics.JOB_SECONDS.observe(time.monotonic() - started)

    def stop(self, why: Stop) -> None:
        """Interrupt the workflow; what becomes of the job follows from `why`."""
        if self._stopped is None and not self.is_ending and self._task is not None:
            self._stopped = why
            self._task.cancel()

    def _on_change(self, journal: Journal) -> None:
        if journal.closed is not None:
            self.stop("fenced")
        elif journal.asked == "cancel":
            self.stop("cancel")

    async def _advance(self) -> _Ending | None:
        """Run the workflow; None where the lease was lost meanwhile."""
        try:
            history = History(await self._load())
            fault("after_load")
            self._max_attempts = history.submission.max_attempts or self._max_attempts
            return _completed(await self._run(history), self._services)
        except asyncio.CancelledError:
            if self._stopped is None:
                raise
            assert self._task is not None
            self._task.uncancel()
            return self._stopped_ending()
        except HandBack:
            return _Ending("yield")
        except Fenced:
            return None
        except Exception as error:  # noqa: BLE001 - anything that users' code raises ends or retries the job
            return self._failed_ending(error)

    async def _load(self) -> list[Entry]:
        """The log without deltas; for a fresh job it came along with the lease."""
        lease = self.lease
        if lease.queued:
            return [Entry(Cursor(1, 0), "job.queued", lease.queued)]
        delay = 0.05
        while True:
            try:
                return await self._services.store.log.load(lease.job_id)
            except StoreUnavailable:
                await asyncio.sleep(delay * random.uniform(0.5, 1.0))
                delay = min(1.0, delay * 2)
            except JobNotFound as error:
                raise Fenced("the job is gone") from error

    async def _run(self, history: History) -> Any:
        services = self._services
        context = Context(
            self.lease,
            history,
            self.journal,
            app=services.app,
            settings=services.settings,
            providers=services.providers,
            clock=services.clock,
            should_stop=services.is_draining,
        )
        if self.lease.kind == CHAT:
            return await chat(context)
        workflow = services.app.find_workflow(self.lease.kind)
        self._max_attempts = history.submission.max_attempts or workflow.max_attempts or self._max_attempts
        return await workflow.function(context, *workflow.arguments(history.submission.input))

    def _stopped_ending(self) -> _Ending | None:
        now = self._services.clock.now_ms()
        match self._stopped:
            case "cancel":
                self.journal.drop_deltas()
                return _Ending("cancelled")
            case "timeout":
                error = ErrorInfo("timeout", "the job did not end within its timeout")
                return _Ending("failed", JobFailed(ts=now, error=error))
            case "yield":
                return _Ending("yield")
            case _:
                return None

    def _failed_ending(self, error: Exception) -> _Ending:
        info = _describe(error)
        now, settings = self._services.clock.now_ms(), self._services.settings
        log.info("job.attempt_failed", job_id=self.lease.job_id, attempt=self.lease.attempt, code=info.code,
                 exc_info=error if info.code == "exception" else None)  # fmt: skip
        if not info.retryable or self.lease.attempt >= self._max_attempts:
            return _Ending("failed", JobFailed(ts=now, error=info))
        wish = error.retry_after if isinstance(error, ProviderError) else None
        delay = Backoff(settings.retry_base, settings.retry_cap).delay(self.lease.attempt, at_least=wish)
        delay_ms = round(delay * 1000)
        event = JobRetrying(ts=now, attempt=self.lease.attempt, error=info, delay_ms=delay_ms)
        return _Ending("retry", event, delay_ms)

    async def _end(self, ending: _Ending) -> str:
        """Record what becomes of the job; decide again where something came in first."""
        self.is_ending = True
        await self._absorb_late_stop()
        fault("before_finish")
        while True:
            answer = await self.journal.finish(ending.outcome, ending.event, delay_ms=ending.delay_ms)
            if answer.verdict != "inbox":
                fault("after_finish")
                return ending.outcome
            if answer.asked == "cancel":
                self.journal.drop_deltas()
                ending = _Ending("cancelled")

    async def _absorb_late_stop(self) -> None:
        """A stop that came when the workflow had just returned must not hit the commit."""
        assert self._task is not None
        if self._task.cancelling():
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(0)
            self._task.uncancel()


def _completed(result: Any, services: Services) -> _Ending:
    now = services.clock.now_ms()
    try:
        encoded = encode_json(result)
    except UNENCODABLE as error:
        info = ErrorInfo(
            "invalid_result", clean_text(f"the result cannot be written as JSON: {error}")[:_MAX_MESSAGE]
        )
        return _Ending("failed", JobFailed(ts=now, error=info))
    if len(encoded) > services.settings.max_event_bytes:
        info = ErrorInfo(
            "result_too_large", f"the result has {len(encoded)} bytes; max_event_bytes allows fewer"
        )
        return _Ending("failed", JobFailed(ts=now, error=info))
    return _Ending("completed", JobCompleted(ts=now, result=msgspec.Raw(encoded)))


def _describe(error: Exception) -> ErrorInfo:
    if isinstance(error, StreamjobsError):
        retryable = error.is_retryable if isinstance(error, ProviderError) else error.retryable
        return ErrorInfo(error.code, clean_text(str(error))[:_MAX_MESSAGE], retryable)
    return ErrorInfo(
        "exception", clean_text(f"{type(error).__name__}: {error}")[:_MAX_MESSAGE], retryable=True
    )
