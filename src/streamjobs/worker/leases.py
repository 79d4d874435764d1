"""Keeps leases, from a thread: a tool that blocks the event loop must not lose every lease silently.

Rule 1: all leases are renewed every third of their length, in one call for each partition.
Rule 2: when the event loop has not ticked for two leases the thread stops renewing: a worker that cannot
work must not hold on to jobs.
Rule 3: what a renewal says is handed to the event loop; nothing here touches a journal.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

import structlog

from streamjobs.config import Settings
from streamjobs.errors import StreamjobsError
from streamjobs.store import Renewal
from streamjobs.store.keys import partition_of_job
from streamjobs.store.renewer import Renewer

log = structlog.get_logger(__name__)

LeaseKey = tuple[str, int]
OnRenewal = Callable[[int, list[tuple[LeaseKey, Renewal]]], None]


class LeaseKeeper:
    """A thread that renews what `held` names. Give it leases by `add`, take them back by `remove`."""

    def __init__(self, settings: Settings, on_renewal: OnRenewal, *, plain: bool = False) -> None:
        self._renewer = Renewer(settings, plain=plain)
        self._lease = settings.lease
        self._interval = settings.lease / 3
        self._on_renewal = on_renewal
        self._held: dict[LeaseKey, None] = {}
        self._loop = asyncio.get_running_loop()
        self._ticked = time.monotonic()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="leases", daemon=True)
        self._ticker: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin to renew."""
        self._tick()
        self._thread.start()

    async def aclose(self) -> None:
        """Stop renewing and close the connection."""
        if self._ticker is not None:
            self._ticker.cancel()
        self._stopping.set()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)
        self._renewer.close()

    def add(self, job_id: str, epoch: int) -> None:
        """Renew this lease from now on."""
        self._held[job_id, epoch] = None

    def remove(self, job_id: str, epoch: int) -> None:
        """Renew it no longer."""
        self._held.pop((job_id, epoch), None)

    def _tick(self) -> None:
        self._ticked = time.monotonic()
        self._ticker = self._loop.call_later(self._interval / 2, self._tick)

    def _run(self) -> None:
        while not self._stopping.wait(self._interval):
            stalled = time.monotonic() - self._ticked
            if stalled > 2 * self._lease:
                log.error("leases.event_loop_stalled", seconds=round(stalled, 1))
            else:
                self._renew_all()

    def _renew_all(self) -> None:
        try:
            self._renew()
        except Exception:  # a thread that dies here would lose every lease without a word
            log.exception("leases.not_renewed")

    def _renew(self) -> None:
        by_partition: dict[int, list[LeaseKey]] = {}
        for key in list(self._held):
            by_partition.setdefault(partition_of_job(key[0]), []).append(key)
        for partition, keys in by_partition.items():
            try:
                now_ms, renewals = self._renewer.renew(partition, keys)
            except StreamjobsError as error:
                log.warning("leases.not_renewed", error=str(error), jobs=len(keys))
                continue
            if not self._stopping.is_set():
                self._loop.call_soon_threadsafe(
                    self._on_renewal, now_ms, list(zip(keys, renewals, strict=True))
                )
