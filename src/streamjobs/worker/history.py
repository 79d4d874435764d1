"""What a job's log already holds, arranged for replay. Deltas are not decoded; nothing here reads a clock.

Rule 1: an operation (step, timer, turn, tool, child, approval) is known by `(kind, key)`; where it began is
in `begun`, what came of it, and what came from outside, is in `occurrences`, in the order of the log.
Rule 2: a new attempt of the job starts over: what completed stays, what failed is done again, and nothing
must come again in the order of the attempt before (`begun` is empty then).
Rule 3: what belongs to a step or a tool alone (its approval, the pauses between its tries) is forgotten once
that has an outcome: nobody asks for it again, and its answer must not answer another question. In a new
attempt an answer stands for its own question.

It is filled entry by entry, so that a long log does not hold up the event loop.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import msgspec

from streamjobs import events as ev
from streamjobs.approvals import Decision
from streamjobs.cursor import START, Cursor
from streamjobs.errors import Invalid
from streamjobs.events import Event
from streamjobs.store import Entry
from streamjobs.worker.questions import TIMEOUT, Questions

OpKey = tuple[str, str]
"""What names an operation of a workflow: its kind and its key."""

_DONE_AGAIN = (
    ev.StepFailed | ev.ToolFailed | ev.TurnFailed | ev.ArtifactCreated | ev.TimerSet | ev.ApprovalRequested
)
"""What a new attempt of the job does again."""

_QUESTIONS = ("signal:", TIMEOUT)
"""How the names of timers begin that belong to a wait for an answer: see `waits`, rule 3."""

RETRY = "retry:"
"""How the names of pauses between tries begin."""

_INTERRUPTIONS = {
    "job.lost": "the worker before was lost",
    "job.retrying": "the attempt before failed",
    "job.resumed": "the job was paused",
}


class Occurrence(NamedTuple):
    """Something that a workflow may be told of: an operation's outcome, or news from outside."""

    seq: int
    op: OpKey
    event: Event


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


class StepRecord(msgspec.Struct):
    """One step as recorded, without its outcome: the last attempt that began, and the last that failed."""

    attempt: int = 0
    failed_attempt: int = 0
    effect: str = ""


class History:
    """The recorded past of one job; `cursor` is where it ends.

    `interruption` says in words why the run before did not end the job; `was_lost`, that its worker was.
    """

    def __init__(self) -> None:
        self.cursor: Cursor = START
        self.queued: ev.JobQueued | None = None
        self.begun: dict[OpKey, int] = {}
        self.occurrences: list[Occurrence] = []
        self.outcomes: set[OpKey] = set()
        self.turns: dict[int, ev.TurnCompleted] = {}
        self.chats: dict[int, str] = {}
        self.open_turns: dict[int, OpenTurn] = {}
        self.tools: dict[str, ToolRecord] = {}
        self.steps: dict[str, StepRecord] = {}
        self.timers: dict[str, ev.TimerSet] = {}
        self.decisions: dict[str, Decision] = {}
        self.fired: defaultdict[str, int] = defaultdict(int)
        self.emitted: defaultdict[str, int] = defaultdict(int)
        self.artifacts: defaultdict[str, int] = defaultdict(int)
        self.interruption = ""
        self.was_lost = False
        self._questions = Questions()
        self._pauses: dict[str, list[str]] = {}

    @property
    def submission(self) -> ev.JobQueued:
        """The first event. Raises `Invalid` for a log without one."""
        if self.queued is None:
            raise Invalid("the log does not begin with job.queued")
        return self.queued

    def tool(self, call_id: str) -> ToolRecord:
        """What is recorded of a call."""
        return self.tools.setdefault(call_id, ToolRecord(call_id))

    def step(self, key: str) -> StepRecord:
        """What is recorded of a step."""
        return self.steps.setdefault(key, StepRecord())

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
        seq = entry.cursor.seq
        match event:
            case ev.JobQueued():
                self.queued = event
            case ev.TurnStarted() | ev.TurnRestarted() | ev.TurnCompleted() | ev.TurnFailed():
                self._take_turn(seq, event)
            case ev.ToolCalled() | ev.ToolStarted() | ev.ToolCompleted() | ev.ToolFailed() | ev.ToolUnknown():
                self._take_tool(seq, event)
            case ev.StepStarted() | ev.StepCompleted() | ev.StepFailed() | ev.StepUnknown():
                self._take_step(seq, event)
            case ev.TimerSet():
                self._begin(("timer", event.key), seq)
                self.timers[event.key] = event
                if event.key.startswith(_QUESTIONS):
                    self._occur(seq, ("asked", event.key), event)
                if event.key.startswith(RETRY):
                    self._pauses.setdefault(step_of_pause(event.key), []).append(event.key)
            case ev.ChildSpawned():
                self._begin(("child", event.job), seq)
                self._occur(seq, ("spawn", event.job), event)
            case ev.ArtifactCreated(within=""):
                self.artifacts[event.name] += 1
                self._occur(seq, artifact_op(event.name, self.artifacts[event.name]), event)
            case ev.ApprovalRequested():
                self._begin(("approval", event.key), seq)
                self._occur(seq, ("asked", f"request:{event.key}"), event)
                self._questions.ask(event.key)
            case ev.JobRequeued(why="yield"):
                self.interruption = "the worker before handed the job back"
                self.was_lost = False
            case _:
                self._take_other(seq, entry.type, event)

    def _take_other(self, seq: int, kind: str, event: Event) -> None:
        news = occurrence_of(seq, event)
        if news is not None:
            self._occur(*news)
            if isinstance(event, ev.TimerFired):
                self.fired[event.key] += 1
                self._questions.expire(event.key)
            elif isinstance(event, ev.SignalReceived):
                self._questions.answer(seq, event)
            return
        if not getattr(event, "within", ""):  # a step that is done says nothing again
            self.emitted[kind] += 1
        if kind in _INTERRUPTIONS:
            self.interruption = _INTERRUPTIONS[kind]
            self.was_lost = kind == ev.JobLost.type
        if isinstance(event, ev.JobRetrying):
            self._start_over()

    # --- operations

    def _begin(self, op: OpKey, seq: int) -> None:
        self.begun.setdefault(op, seq)

    def _occur(self, seq: int, op: OpKey, event: Event) -> None:
        self.occurrences.append(Occurrence(seq, op, event))
        self.outcomes.add(op)

    def _start_over(self) -> None:
        """An attempt failed: the next one does again what failed, and may take another way."""
        self.begun.clear()
        self.artifacts.clear()  # what it makes this time may be another thing
        failed = {one.op for one in self.occurrences if isinstance(one.event, _DONE_AGAIN)}
        again = failed - self._chat_calls()
        answers = self._questions.start_over()
        self.decisions |= {key: answer.decision for key, answer in answers.items()}
        read = {answer.seq for answer in answers.values()}
        self.occurrences = [one for one in self.occurrences if one.op not in again and one.seq not in read]
        self.outcomes -= again
        for kind, key in again:
            if kind == "step":
                self.steps.pop(key, None)
            elif kind == "tool":
                self.tools.pop(key, None)

    def _settle(self, key: str) -> None:
        """A step or a tool has its outcome: forget what only it had asked for."""
        inner: set[OpKey] = {("timer", pause) for pause in self._pauses.pop(key, ())}
        answers: set[int] = set()
        for question in (key, f"{key}:again"):
            inner.add(("approval", question))
            answer = self._questions.settle(question)
            if answer is not None:
                answers.add(answer)
        for op in inner:
            self.begun.pop(op, None)
        if answers or len(inner) > 2:
            self.outcomes -= inner
            self.occurrences = [
                one for one in self.occurrences if one.op not in inner and one.seq not in answers
            ]

    def _chat_calls(self) -> set[OpKey]:
        """Calls that a model asked for: what it was told of them stands."""
        return {("tool", call.call_id) for turn in self.turns.values() for call in turn.calls}

    def _take_turn(
        self, seq: int, event: ev.TurnStarted | ev.TurnRestarted | ev.TurnCompleted | ev.TurnFailed
    ) -> None:
        op = ("turn", str(event.turn))
        match event:
            case ev.TurnStarted():
                self._begin(op, seq)
                self.open_turns[event.turn] = OpenTurn(seq, event.attempt)
                self.chats[event.turn] = event.chat
            case ev.TurnRestarted():
                self.open_turns[event.turn] = OpenTurn(event.supersedes_from, event.attempt)
            case ev.TurnCompleted():
                self.open_turns.pop(event.turn, None)
                self.turns[event.turn] = event
                self._occur(seq, op, event)
            case ev.TurnFailed():  # it stays open: a new attempt says that it begins again
                self._occur(seq, op, event)

    def _take_tool(
        self,
        seq: int,
        event: ev.ToolCalled | ev.ToolStarted | ev.ToolCompleted | ev.ToolFailed | ev.ToolUnknown,
    ) -> None:
        op = ("tool", event.call_id)
        record = self.tool(event.call_id)
        match event:
            case ev.ToolCalled():
                record.is_called = True
                if event.turn == 0:  # the workflow's own; a chat's belong to its turn
                    self._begin(op, seq)
            case ev.ToolStarted():
                record.starts, record.effect = event.attempt, event.effect
            case ev.ToolCompleted() | ev.ToolFailed() | ev.ToolUnknown():
                record.outcome = event
                self._settle(event.call_id)
                self._occur(seq, op, event)

    def _take_step(
        self, seq: int, event: ev.StepStarted | ev.StepCompleted | ev.StepFailed | ev.StepUnknown
    ) -> None:
        op, record = ("step", event.key), self.step(event.key)
        match event:
            case ev.StepStarted():
                self._begin(op, seq)
                record.attempt, record.effect = event.attempt, event.effect
            case ev.StepFailed(will_retry=True):
                record.failed_attempt = event.attempt
            case _:
                self._settle(event.key)
                self._occur(seq, op, event)


def pause_key(step: str, failed_attempt: int, job_attempt: int) -> str:
    """What the pause behind a step's failed attempt is called.

    A new attempt of the job begins to count again, and waits again.
    """
    again = f"@{job_attempt}" if job_attempt > 1 else ""
    return f"{RETRY}{step}:{failed_attempt}{again}"


def step_of_pause(key: str) -> str:
    """The step whose pause it is."""
    return key.removeprefix(RETRY).rpartition(":")[0]


def artifact_op(name: str, number: int) -> OpKey:
    """What names an artifact: the same name, and which one of that name."""
    return "artifact", f"{number}:{name}"


def occurrence_of(seq: int, event: Event) -> Occurrence | None:
    """What an event that others write tells a workflow; None for all else."""
    match event:
        case ev.SignalReceived():
            return Occurrence(seq, ("signal", event.name), event)
        case ev.TimerFired():
            return Occurrence(seq, ("timer", event.key), event)
        case ev.ChildEnded():
            return Occurrence(seq, ("child", event.job), event)
        case _:
            return None
