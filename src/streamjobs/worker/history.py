"""What a job's log already holds, arranged for replay. Deltas are not in it; nothing here reads a clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import msgspec

from streamjobs import events as ev
from streamjobs.errors import Invalid
from streamjobs.store import Entry


class OpenTurn(msgspec.Struct, frozen=True):
    """A turn that was started and not completed: seq of its start, and its last attempt."""

    seq: int
    attempt: int


class ToolRecord(msgspec.Struct):
    """One tool call as recorded: how often it was started, and its outcome once there is one."""

    call_id: str
    starts: int = 0
    effect: str = ""
    outcome: ev.ToolCompleted | ev.ToolFailed | ev.ToolUnknown | None = None


class History:
    """The recorded past of one job."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.queued: ev.JobQueued | None = None
        self.turns: dict[int, ev.TurnCompleted] = {}
        self.open_turns: dict[int, OpenTurn] = {}
        self.tools: dict[str, ToolRecord] = {}
        self.emitted: Counter[str] = Counter()
        for entry in entries:
            self._add(entry)

    @property
    def submission(self) -> ev.JobQueued:
        """The first event. Raises `Invalid` for a log without one."""
        if self.queued is None:
            raise Invalid("the log does not begin with job.queued")
        return self.queued

    def tool(self, call_id: str) -> ToolRecord:
        """What is recorded of a call."""
        return self.tools.setdefault(call_id, ToolRecord(call_id))

    def _add(self, entry: Entry) -> None:
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
            case ev.ToolStarted():
                record = self.tool(event.call_id)
                record.starts, record.effect = event.attempt, event.effect
            case ev.ToolCompleted() | ev.ToolFailed() | ev.ToolUnknown():
                self.tool(event.call_id).outcome = event
            case _:
                self.emitted[entry.type] += 1
