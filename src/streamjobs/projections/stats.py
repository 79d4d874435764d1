"""Statistics: what happened to jobs, how often and how long, for each kind and queue.

Rule 1: what a job adds is the fold of its events behind the position that was counted last; position and
amounts are written in one step, so races, replays and kills count nothing twice and lose nothing.
Rule 2: an event counts for the five minutes in which it happened, so a rebuild gives the same history.
Rule 3: `now:<status>` is the sum of all moves into a status, less those out of it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable

import msgspec

from streamjobs import events as ev
from streamjobs.cursor import START, Cursor, parse_cursor
from streamjobs.errors import JobNotFound, StreamjobsError
from streamjobs.events import Event, decode_event
from streamjobs.job import Status, status_after
from streamjobs.store import Entry, Store
from streamjobs.store.stats import BOUNDS_MS, Counted

_SLOT = 300_000
_TRIES = 20
"""Times that a position is read again because another projector was first."""

_LETTERS = dict(zip(Status, "qrswpcfx", strict=True))
_STATUSES = {letter: status for status, letter in _LETTERS.items()}


class Position(msgspec.Struct):
    """How far a job is counted, and what the events to come are measured from.

    `since_ms` is when it began to run (0: it does not), `ran_ms` how long it had run before that, `turn_ms`
    when a turn began that has not spoken yet.
    """

    cursor: Cursor = START
    status: Status | None = None
    since_ms: int = 0
    ran_ms: int = 0
    turn_ms: int = 0

    def __str__(self) -> str:
        """As it is stored: short enough for the job's hash to stay compact."""
        if self.status is None or self.status.is_terminal:
            return f"{self.cursor} {_LETTERS[self.status] if self.status else '-'}"
        return f"{self.cursor} {_LETTERS[self.status]} {self.since_ms:x} {self.ran_ms:x} {self.turn_ms:x}"

    @classmethod
    def parse(cls, stored: str) -> Position:
        """Read what `str` gave; nothing is the beginning."""
        if not stored:
            return cls()
        cursor, letter, *numbers = stored.split(" ")
        return cls(parse_cursor(cursor), _STATUSES.get(letter), *(int(number, 16) for number in numbers))


class Tally:
    """Folds a job's events into what they add to the statistics."""

    def __init__(self, position: Position) -> None:
        self.position = position
        self.amounts: Counter[tuple[int, str]] = Counter()
        self._slot = 0

    def add_all(self, entries: list[Entry]) -> None:
        """Count what a page holds. Raises `Invalid` and `InvalidTransition` for what is no log."""
        for entry in entries:
            if entry.type not in ev.DELTAS:
                if entry.type in _COUNTED:
                    self._add(decode_event(entry.type, entry.data))
            elif self.position.turn_ms:
                self._first_token(decode_event(entry.type, entry.data).ts)
            self.position.cursor = entry.cursor

    def keep_moves(self, before: dict[tuple[int, str], int]) -> None:
        """Take back what was counted since then, but for moves between statuses."""
        for slot, what in list(self.amounts):
            if slot:
                self.amounts[slot, what] = before.get((slot, what), 0)

    def _add(self, event: Event) -> None:
        self._slot = event.ts - event.ts % _SLOT
        self._move(event)
        count = _COUNTS.get(type(event))
        if count is not None:
            count(self, event)

    def _move(self, event: Event) -> None:
        before = self.position.status
        if isinstance(event, ev.JobQueued):
            after = Status.SCHEDULED if event.delay_ms else Status.QUEUED
        elif before is not None:
            after = status_after(before, event)
        else:
            return
        if after is before:
            return
        if before is Status.RUNNING:
            self.position.ran_ms += max(0, event.ts - self.position.since_ms)
        self.position.since_ms = event.ts if after is Status.RUNNING else 0
        self.position.status = after
        if before is not None:
            self.amounts[0, f"now:{before}"] -= 1
        if after.is_terminal:
            self._count(after)
            if self.position.ran_ms or before is Status.RUNNING:
                self._measure("run", self.position.ran_ms)
        else:
            self.amounts[0, f"now:{after}"] += 1

    # --- what is counted

    def _count(self, what: str, by: int = 1) -> None:
        if by:
            self.amounts[self._slot, what] += by

    def _measure(self, what: str, duration_ms: int) -> None:
        self._count(f"{what}:{bisect_left(BOUNDS_MS, duration_ms)}")
        self._count(f"{what}_ms", duration_ms)

    def _queued(self, _event: ev.JobQueued) -> None:
        self._count("submitted")

    def _started(self, event: ev.JobStarted) -> None:
        self._count("started")
        self._measure("wait", max(0, event.waited_ms))

    def _retrying(self, _event: ev.JobRetrying) -> None:
        self._count("retries")

    def _lost(self, _event: ev.JobLost) -> None:
        self._count("crashes")

    def _turn_began(self, event: ev.TurnStarted | ev.TurnRestarted) -> None:
        self.position.turn_ms = event.ts

    def _first_token(self, ts: int) -> None:
        self._slot = ts - ts % _SLOT
        self._measure("first_token", max(0, ts - self.position.turn_ms))
        self.position.turn_ms = 0

    def _turn_completed(self, event: ev.TurnCompleted) -> None:
        self.position.turn_ms = 0
        self._count("turns")
        for name in event.usage.__struct_fields__:
            self._count(name, getattr(event.usage, name))


_COUNTS: dict[type[Event], Callable[..., None]] = {
    ev.JobQueued: Tally._queued,  # pyright: ignore[reportPrivateUsage]
    ev.JobStarted: Tally._started,  # pyright: ignore[reportPrivateUsage]
    ev.JobRetrying: Tally._retrying,  # pyright: ignore[reportPrivateUsage]
    ev.JobLost: Tally._lost,  # pyright: ignore[reportPrivateUsage]
    ev.TurnStarted: Tally._turn_began,  # pyright: ignore[reportPrivateUsage]
    ev.TurnRestarted: Tally._turn_began,  # pyright: ignore[reportPrivateUsage]
    ev.TurnCompleted: Tally._turn_completed,  # pyright: ignore[reportPrivateUsage]
}
_COUNTED = {kind.type for kind in _COUNTS} | {
    kind.type
    for kind in (
        ev.JobRequeued, ev.JobWaiting, ev.JobPaused, ev.JobResumed, ev.JobCompleted, ev.JobFailed,
        ev.JobCancelled,
    )
}  # fmt: skip


class StatsProjection:
    """Counts the events of jobs that have something new."""

    name = "stats"

    def __init__(self, store: Store) -> None:
        self._store = store

    async def advance(self, job_id: str) -> None:
        """Count a job's events up to the end of its log."""
        for _ in range(_TRIES):
            counted = await self._store.stats.counted(job_id)
            if counted is None or await self._count(job_id, counted):
                return
        raise StreamjobsError(f"others were first {_TRIES} times")

    async def reset(self, partition: int) -> None:
        """Begin from nothing: jobs that are gone are then no longer counted."""
        await self._store.stats.reset(partition)

    async def _count(self, job_id: str, counted: Counted) -> bool:
        """Count, page by page; False where another projector was first."""
        is_current = counted.position.startswith(f"{counted.generation} ")
        position = Position.parse(counted.position.partition(" ")[2] if is_current else "")
        while True:
            try:
                page = await self._store.log.page(job_id, position.cursor)
            except JobNotFound:
                return True
            if not page.found:
                return await self._count_replaced(job_id, counted, position)
            tally = Tally(position)
            tally.add_all(page.entries)
            if page.entries and not await self._store.stats.add(
                job_id, counted, str(tally.position), tally.amounts
            ):
                return False
            if page.is_up_to_date:
                return True
            position = tally.position
            counted = counted._replace(position=f"{counted.generation} {position}")

    async def _count_replaced(self, job_id: str, counted: Counted, known: Position) -> bool:
        """Redis lost a tail that was counted: go through the new log, and count what is behind that seq."""
        tally = Tally(Position())
        if known.status is not None and not known.status.is_terminal:
            tally.amounts[0, f"now:{known.status}"] -= 1
        async for page in self._store.log.pages(job_id):
            for entry in page.entries:
                before = dict(tally.amounts)
                tally.add_all([entry])
                if entry.cursor.seq <= known.cursor.seq:
                    tally.keep_moves(before)
        return await self._store.stats.add(job_id, counted, str(tally.position), tally.amounts)
