"""Makes the jobs of schedules whose tick has come. Every role does it, with the sweep.

Rule 1: exactly one job a tick: the script that makes it compares the tick with what the schedule waits for,
and moves the schedule on, in one. Whoever comes second finds it moved, so nobody needs to be elected.
Rule 2: a schedule that goes wrong says so in its own record and goes on with its next tick; others go on.
Rule 3: the next tick is computed here, from ticks and Redis's clock, never from this machine's.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import structlog

from streamjobs.errors import (
    Overlapping,
    ScheduleNotFound,
    StoreFull,
    StoreUnavailable,
    StreamjobsError,
    TickTaken,
    UnreadableSchedule,
)
from streamjobs.store.jobs import Jobs, Tick
from streamjobs.store.schedules import ScheduleRecord, Schedules, Waiting

log = structlog.get_logger(__name__)

_LIMIT = 1000
"""Schedules in one sweep."""


class Ticked(NamedTuple):
    """What was done. `next_due_ms` is Redis time, -1 for never.

    A change is a schedule's id and what became of a tick: ticked, overlap, skipped, failed.
    """

    next_due_ms: int
    changes: list[tuple[str, str]]


class Ticks:
    """Makes what is due, and says when that will be so again."""

    def __init__(self, schedules: Schedules, jobs: Jobs) -> None:
        self._schedules = schedules
        self._jobs = jobs

    async def run_due(self, partition: int, now_ms: int) -> Ticked:
        """Make the jobs of a partition's ticks up to `now_ms`.

        Raises `StoreFull`, `StoreUnavailable`; what is left then stays due.
        """
        next_due_ms = await self._schedules.next_due(partition)
        if next_due_ms < 0 or next_due_ms > now_ms:
            return Ticked(next_due_ms, [])
        due = await self._schedules.due(partition, now_ms, _LIMIT)
        changes: list[tuple[str, str]] = []
        for waiting in due:
            changes += [(waiting.schedule_id, what) for what in await self._run(waiting, now_ms)]
        if len(due) == _LIMIT:
            return Ticked(now_ms, changes)
        return Ticked(await self._schedules.next_due(partition, now_ms), changes)

    async def _run(self, waiting: Waiting, now_ms: int) -> list[str]:
        """Make one schedule's jobs. One that this release cannot read waits for another that can."""
        try:
            record = await self._schedules.get(waiting.schedule_id)
        except ScheduleNotFound:
            await self._schedules.advance(waiting, 0)
            return []
        except UnreadableSchedule as error:
            log.error("schedule.unreadable", schedule=waiting.schedule_id, error=str(error))
            return []
        plan = record.schedule.plan(waiting.due_ms, now_ms)
        turns = [*plan.ticks, plan.next_ms]
        done: list[str] = []
        if turns[0] != waiting.due_ms:
            if not await self._schedules.advance(waiting, turns[0], skipped=plan.skipped):
                return []
            done += ["skipped"] * plan.skipped
        for due_ms, next_ms in itertools.pairwise(turns):
            what = await self._take(record, Tick(record.id, due_ms, next_ms))
            if what is None:
                break
            done.append(what)
        return done

    async def _take(self, record: ScheduleRecord, tick: Tick) -> str | None:
        """Make one tick's job; None where somebody else had the tick."""
        waiting = Waiting(record.id, tick.due_ms)
        try:
            receipt = await self._jobs.submit(self._schedules.submission(record.schedule, tick))
        except (TickTaken, ScheduleNotFound):
            return None
        except Overlapping:
            return "overlap"
        except (StoreFull, StoreUnavailable):
            raise
        except StreamjobsError as error:
            log.error("schedule.failed", schedule=record.id, error=str(error))
            is_ours = await self._schedules.advance(waiting, tick.next_ms, skipped=1, error=str(error)[:500])
            return "failed" if is_ours else None
        # Somebody made it before. If its schedule still waits, Redis's clock stepped back over the tick.
        if receipt.repeated and not await self._schedules.advance(waiting, tick.next_ms):
            return None
        return "ticked"
