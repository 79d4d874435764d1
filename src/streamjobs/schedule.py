"""What a schedule is, and what becomes of its ticks. Pure; the time is an argument.

Rule 1: a tick gives at most one job.
Rule 2: ticks are late when nobody swept (all roles down, Redis away); `missed` decides what then runs.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import msgspec

from streamjobs.cron import Timing
from streamjobs.errors import Invalid
from streamjobs.events import Json

Missed = Literal["skip", "once", "all"]
"""skip: a tick older than `GRACE_MS` gives no job · once: one job, for the newest, however many were missed ·
all: each gives its job, the newest `MAX_CATCH_UP` of them"""
Overlap = Literal["allow", "skip"]
"""skip: no job for a tick while the job of the one before is live"""

Priority = Literal["high", "default", "low"]

_CHOICES = {"missed": get_args(Missed), "overlap": get_args(Overlap), "priority": get_args(Priority)}

GRACE_MS = 60_000
MAX_CATCH_UP = 100


_MAX_COUNTED = 1000


class Plan(NamedTuple):
    """The ticks that give a job now, oldest first, and the one that the schedule waits for after them.

    `skipped` are the ticks before them that give none, counted up to a thousand.
    """

    ticks: list[int]
    next_ms: int
    skipped: int


class Schedule(msgspec.Struct, frozen=True, kw_only=True):
    """A job that recurs: what to submit, and when. `input` is JSON; durations in seconds.

    An empty `queue` is the default one; None in `timeout` is the setting `job_timeout`.
    """

    name: str
    kind: str
    timing: Timing
    owner: str = "system"
    input: msgspec.Raw = msgspec.Raw(b"null")
    queue: str = ""
    priority: Priority = "default"
    metadata: dict[str, Json] = {}
    thread_id: str = ""
    timeout: float | None = None
    max_attempts: int = 0
    concurrency_key: str = ""
    missed: Missed = "skip"
    overlap: Overlap = "allow"

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise Invalid("name: must not be empty")
        for field, allowed in _CHOICES.items():
            if getattr(self, field) not in allowed:
                raise Invalid(f"{field}: one of {', '.join(allowed)}")

    def plan(self, due_ms: int, now_ms: int) -> Plan:
        """What to do at `now_ms` about the ticks from `due_ms` on."""
        first, limit = due_ms, MAX_CATCH_UP
        if self.missed == "skip":
            first = max(due_ms, now_ms - GRACE_MS)
        elif self.missed == "once":
            limit = 1
        ticks = self.timing.between(first, now_ms, limit)
        skipped = 0
        if ticks[:1] != [due_ms]:
            skipped = len(self.timing.between(due_ms, now_ms, _MAX_COUNTED)) - len(ticks)
        return Plan(ticks, self.timing.next_after(now_ms), max(0, skipped))
