"""Gives a job's slot up while all it does is wait: for a timer, a signal, children, or to be handed back.

Rule 1: a job is parked only while nothing of it runs, and not before it has waited `park_after` seconds.
Rule 2: the store decides: where something came in that the workflow was not told of, it refuses, and the
workflow goes on as if nothing had been asked.
Rule 3: the code is stopped only once the job is parked; until then it waits, and nothing new begins.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from streamjobs.errors import Fenced, LimitExceeded
from streamjobs.events import JobWaiting
from streamjobs.faults import fault
from streamjobs.store import Answer, Outcome
from streamjobs.worker.recorder import Journal
from streamjobs.worker.replay import Replay, Wait

if TYPE_CHECKING:
    from streamjobs.worker.execution import Stop

_AT_ONCE = 0.01
"""Seconds that a job that is wanted back must have been idle: what was just told may ask for more."""
_TURNS = 10
"""Turns of the event loop that nothing may move in before a job is parked: time alone proves nothing where
the loop stood still, and who was told something wakes up a few turns later."""


class Parking:
    """Watches one run, and parks its job."""

    def __init__(
        self,
        journal: Journal,
        park_after: float,
        *,
        is_wanted_back: Callable[[], bool],
        on_decided: Callable[[Stop], None],
        now_ms: Callable[[], int] = lambda: 0,
    ) -> None:
        self.replay: Replay | None = None
        self.is_deciding = False
        self._journal = journal
        self._park_after = park_after
        self._is_wanted_back = is_wanted_back
        self._on_decided = on_decided
        self._now_ms = now_ms
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        self._task: asyncio.Task[None] | None = None
        self._parked = ""
        self._postponed: Stop | None = None

    def consider(self) -> None:
        """The run only waits now: look again when it has waited long enough."""
        replay = self.replay
        if replay is None or self.is_deciding or self._parked:
            return
        at_once = replay.resting or self._is_wanted_back()
        due = self._loop.time() + (_AT_ONCE if at_once else self._park_after)
        if self._timer is not None:
            if self._due <= due:
                return
            self._timer.cancel()
        self._due = due
        self._timer = self._loop.call_at(due, self._look, replay, replay.activity)

    def postpone(self, why: Stop) -> None:
        """A stop that comes while the store decides: it counts if the job was not parked."""
        self._postponed = self._postponed or why

    async def outcome(self) -> str:
        """How the job was parked; empty if it was not."""
        if self._task is not None and not self._task.done():
            await asyncio.wait({self._task})
        return self._parked

    def close(self) -> None:
        """Watch no longer."""
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()

    def _look(self, replay: Replay, activity: int, turns: int = _TURNS) -> None:
        if turns == _TURNS:
            self._timer = None
        if not replay.is_idle or self.is_deciding or self._parked:
            return
        if replay.activity != activity or replay.is_replaying:
            self.consider()
            return
        if turns:
            self._loop.call_soon(self._look, replay, activity, turns - 1)
            return
        self.is_deciding = True
        self._task = self._loop.create_task(self._park(replay, activity), name="park")

    async def _park(self, replay: Replay, activity: int) -> None:
        replay.hold()
        try:
            # what is told, or read, from here on is behind what the store is asked
            if replay.is_idle and replay.activity == activity and not replay.is_replaying:
                fault("before_park")
                answer = await self._ask(replay)
                if answer.verdict != "inbox":
                    fault("after_park")
                    self._parked = self._outcome_of(replay)
        except (Fenced, LimitExceeded):
            pass  # the journal has told the execution, or will fail what is handed in next
        finally:
            self.is_deciding = False
            replay.release()
        self._go_on(replay)

    def _go_on(self, replay: Replay) -> None:
        if self._parked:
            self._on_decided("parked")
        elif self._journal.closed is not None:
            self._on_decided("fenced")
        elif self._postponed is not None:
            self._on_decided(self._postponed)
        elif self._journal.asked == "cancel":
            self._on_decided("cancel")
        elif self._journal.refused is not None:
            self._on_decided("refused")
        else:
            replay.nudge()

    async def _ask(self, replay: Replay) -> Answer:
        """Hand in how the job is parked, based on what its workflow was told."""
        outcome = self._outcome_of(replay)
        if outcome == "yield":
            return await self._journal.finish(outcome)
        waits = list(replay.waits.values())
        timers = {wait.reason: wait.delay_ms for wait in waits if wait.delay_ms}
        event = JobWaiting(ts=self._now_ms(), waits_for=_reason(waits), until=_until(waits))
        return await self._journal.finish(outcome, event, timers=timers, seen=self._journal.read)

    def _outcome_of(self, replay: Replay) -> Outcome:
        if replay.resting or self._journal.asked == "pause":
            return "yield"
        return "sleep" if all(wait.is_timer or wait.delay_ms for wait in replay.waits.values()) else "wait"


def _reason(waits: list[Wait]) -> str:
    """The first that is no timer; a job that waits for time alone waits for `timer`."""
    return next((wait.reason for wait in waits if not (wait.is_timer or wait.delay_ms)), "timer")


def _until(waits: list[Wait]) -> int:
    return min((wait.until for wait in waits if wait.until), default=0)
