"""What a job's log already holds, arranged for replay. Deltas are not decoded; nothing here reads a clock.

It is filled entry by entry, so that a long log does not hold up the event loop.
"""

from __future__ import annotations

from collections import Counter

import msgspec

from streamjobs import events as ev
from streamjobs.cursor import START, Cursor
from streamjobs.errors import Invalid
from streamjobs.store import Entry

_INTERRUPTIONS = {
    "job.lost": "the worker before was lost",
    "job.retrying": "the attempt before failed",
    "job.resumed": "the job was paused",
}


class OpenTurn(msgspec.Struct):
    """A turn that was not completed: seq of its start, its last attempt, whether that said anything."""

    seq: int
    attempt: int
    has_text: bool = False


class ToolRecord(msgspec.Struct):
    """One tool call as recorded: whether it was, how often it was started, and its outcome, if any."""

    call_id: str
    is_called: bool = False
    starts: int = 0
    effect: str = ""
    outcome: ev.ToolCompleted | ev.ToolFailed | ev.ToolUnknown | None = None


class History:
    """The recorded past of one job; `cursor` is where it ends.

    `interruption` says in words why the run before did not end the job; `was_lost`, that its worker was.
    """

    def __init__(self) -> None:
        self.cursor: Cursor = START
        self.queued: ev.JobQueued | None = None
        self.turns: dict[int, ev.TurnCompleted] = {}
        self.open_turns: dict[int, OpenTurn] = {}
        self.tools: dict[str, ToolRecord] = {}
        self.emitted: Counter[str] = Counter()
        self.interruption = ""
        self.was_lost = False

    @property
    def submission(self) -> ev.JobQueued:
        """The first event. Raises `Invalid` for a log without one."""
        if self.queued is None:
            raise Invalid("the log does not begin with job.queued")
        return self.queued

    def tool(self, call_id: str) -> ToolRecord:
        """What is recorded of a call."""
        return self.tools.setdefault(call_id, ToolRecord(call_id))

    def add(self, entry: Entry) -> None:
        """Take in the next event. Raises `Invalid` for one that does not decode."""
        if entry.type in ev.DELTAS:
            # one chat of a job runs at a time: what is said belongs to the turn that is open
            for turn in self.open_turns.values():
                turn.has_text = True
        else:
            self._take_in(entry)
        self.cursor = entry.cursor

    def _take_in(self, entry: Entry) -> None:
        event = ev.decode_event(entry.type, entry.data)
        match event:
            case ev.JobQueued():
                self.queued = event
            case ev.TurnStarted():
                self.open_turns[event.turn] = OpenTurn(entry.cursor.seq, event.attempt)
            case ev.TurnRestarted():
                self.open_turns[event.turn] = OpenTurn(event.supersedes_from, event.attempt)
            case ev.TurnCompleted():
                self.open_turns.pop(event.turn, None)
                self.turns[event.turn] = event
            case ev.ToolCalled():
                self.tool(event.call_id).is_called = True
            case ev.ToolStarted():
                record = self.tool(event.call_id)
                record.starts, record.effect = event.attempt, event.effect
            case ev.ToolCompleted() | ev.ToolFailed() | ev.ToolUnknown():
                self.tool(event.call_id).outcome = event
            case ev.JobRequeued(why="yield"):
                self.interruption = "the worker before handed the job back"
                self.was_lost = False
            case _:
                self.emitted[entry.type] += 1
                if entry.type in _INTERRUPTIONS:
                    self.interruption = _INTERRUPTIONS[entry.type]
                    self.was_lost = entry.type == ev.JobLost.type
