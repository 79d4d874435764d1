"""The sweep loop that every role runs: what is due is done also when all workers are away.

The wake script is bounded and works on what is due at that instant, and a tick of a schedule gives one job
whoever makes it, so any number of processes may sweep.
"""

from __future__ import annotations

import asyncio

import structlog

from streamjobs import metrics
from streamjobs.errors import StoreFull, StreamjobsError
from streamjobs.retry import Backoff
from streamjobs.store import Store, jitter
from streamjobs.store.ticks import Ticked

log = structlog.get_logger(__name__)

_PATIENCE = Backoff(base=0.5, cap=10.0)


class Sweeper:
    """Sweeps every partition of a store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._interval = store.settings.sweep_interval

    async def tick(self) -> float:
        """Do what is due now; returns the seconds until something may be due again, 0 if more is due already.

        Raises `StoreUnavailable`.
        """
        return min([await self._sweep(partition) for partition in self._store.partitions])

    async def run(self) -> None:
        """Sweep until cancelled."""
        failures = 0
        while True:
            try:
                delay = jitter(await self.tick())
                failures = 0
            except StreamjobsError as error:
                failures += 1
                delay = _PATIENCE.delay(failures)
                log.warning("sweep.failed", error=error.code, failures=failures)
            await asyncio.sleep(delay)

    async def _sweep(self, partition: int) -> float:
        sweep = await self._store.work.wake(partition)
        next_tick_ms, ticked = await self._tick_schedules(partition, sweep.now_ms)
        for _, what in (*sweep.changes, *ticked):
            metrics.SWEPT.labels(what.partition(":")[0]).inc()
        if sweep.more:
            return 0.0
        due = [ms for ms in (sweep.next_due_ms, next_tick_ms) if ms >= 0]
        if not due:
            return self._interval
        return min(self._interval, max(0.01, (min(due) - sweep.now_ms) / 1000))

    async def _tick_schedules(self, partition: int, now_ms: int) -> Ticked:
        """A full store takes no jobs: their ticks stay due, everything else goes on."""
        try:
            return await self._store.ticks.run_due(partition, now_ms)
        except StoreFull as error:
            log.warning("sweep.ticks_failed", error=error.code)
            return Ticked(-1, [])
