"""A job's lifecycle, and the view that its events fold into. Pure.

Rule 1: what may follow what is the table TRANSITIONS; code asks it.
Rule 2: `Fold` is the only fold: of the gateway, of snapshots, of workers and tests.
Rule 3: folding is total. Events of other releases and users' own change nothing but the position;
an event that cannot follow raises, it never bends the view.
Rule 4: superseded text and tool calls are not in the view.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from typing import Any

import msgspec

from streamjobs import events as ev
from streamjobs.cursor import START, Cursor
from streamjobs.errors import StreamjobsError
from streamjobs.events import ErrorInfo, Event, Json, Usage


class Status(StrEnum):
    """Where a job is."""

    QUEUED = "queued"
    RUNNING = "running"
    SCHEDULED = "scheduled"
    WAITING = "waiting"
    PAUSED = "paused"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        """Whether nothing follows."""
        return not TRANSITIONS[self]


_ENDS = {ev.JobFailed: Status.FAILED, ev.JobCancelled: Status.CANCELLED}

TRANSITIONS: Mapping[Status, Mapping[type[Event], Status]] = {
    Status.QUEUED: {
        ev.JobStarted: Status.RUNNING,
        ev.JobRequeued: Status.QUEUED,
        ev.JobPaused: Status.PAUSED,
        **_ENDS,
    },
    Status.RUNNING: {
        ev.JobRetrying: Status.SCHEDULED,
        ev.JobWaiting: Status.WAITING,
        ev.JobLost: Status.QUEUED,
        ev.JobRequeued: Status.QUEUED,
        ev.JobPaused: Status.PAUSED,
        ev.JobCompleted: Status.COMPLETED,
        **_ENDS,
    },
    Status.SCHEDULED: {ev.JobRequeued: Status.QUEUED, ev.JobPaused: Status.PAUSED, **_ENDS},
    Status.WAITING: {ev.JobRequeued: Status.QUEUED, ev.JobPaused: Status.PAUSED, **_ENDS},
    Status.PAUSED: {ev.JobResumed: Status.QUEUED, **_ENDS},
    Status.COMPLETED: {},
    Status.FAILED: {},
    Status.CANCELLED: {},
}
"""From where, by which event, to where. Events that no row names leave the status as it is."""

_MOVES = frozenset(event for row in TRANSITIONS.values() for event in row)


class InvalidTransition(StreamjobsError):
    """An event that cannot follow what the log holds: the log is damaged."""

    code = "invalid_transition"


class TurnView(msgspec.Struct):
    """One call of the model, as it stands."""

    turn: int
    attempt: int
    model: str = ""
    text: str = ""
    finish_reason: str = ""
    usage: Usage | None = None


class ToolCallView(msgspec.Struct):
    """One tool call. state: called, started, completed, failed, unknown."""

    call_id: str
    turn: int
    tool: str
    arguments: Json = None
    state: str = "called"
    output: Json = None
    error: ErrorInfo | None = None
    ms: int | None = None


class StepView(msgspec.Struct):
    """One step of a workflow. state: started, completed, failed."""

    key: str
    state: str = "started"
    attempt: int = 1
    output: Json = None
    error: ErrorInfo | None = None


class ProgressView(msgspec.Struct):
    """How far the job says it is."""

    percent: float | None = None
    step: int | None = None
    steps: int | None = None
    message: str = ""


class LogLine(msgspec.Struct):
    """A line for people."""

    ts: int
    level: str
    message: str
    data: Json = None


class ArtifactView(msgspec.Struct):
    """Something the job made."""

    name: str
    media_type: str
    size: int
    where: str


class JobView(msgspec.Struct):
    """A job as it stands at `cursor`: what `GET /v1/jobs/{id}` and the `snapshot` event show.

    Instants are ms since the epoch, by Redis's clock. `text` is what stands now, over all turns.
    """

    id: str
    kind: str = ""
    status: Status = Status.QUEUED
    cursor: str = str(START)
    owner: str = ""
    queue: str = ""
    priority: str = ""
    held: str = ""
    thread_id: str = ""
    message_id: str = ""
    metadata: dict[str, Json] = {}
    attempt: int = 1
    worker: str = ""
    crashes: int = 0
    cancel_requested: bool = False
    created_ms: int = 0
    started_ms: int | None = None
    ended_ms: int | None = None
    input: Json = None
    text: str = ""
    reasoning: str = ""
    turns: list[TurnView] = []
    tool_calls: list[ToolCallView] = []
    steps: list[StepView] = []
    progress: ProgressView | None = None
    waiting_for: str | None = None
    usage: Usage = Usage()
    result: Json = None
    error: ErrorInfo | None = None
    artifacts: list[ArtifactView] = []
    log_lines: list[LogLine] = []


class Fold:
    """Folds a job's events, in order, into its view.

    Text is gathered in pieces, so that folding n events is O(n).
    """

    def __init__(self, job_id: str) -> None:
        self.cursor = START
        self._view = JobView(id=job_id)
        self._text: dict[int, list[str]] = {}
        self._reasoning: dict[int, list[str]] = {}

    @property
    def status(self) -> Status:
        """Where the job is at this point."""
        return self._view.status

    def apply(self, cursor: Cursor, event: Event) -> None:
        """Fold the next event.

        Raises `InvalidTransition` for a hole, a repetition, or an event that cannot follow.
        """
        if cursor.seq != self.cursor.seq + 1:
            raise InvalidTransition(f"event {cursor.seq} cannot follow {self.cursor.seq}")
        self._move(event)
        fold = _FOLDS.get(type(event))
        if fold is not None:
            fold(self, event)
        self.cursor = cursor

    def apply_all(self, entries: Iterable[tuple[Cursor, str, bytes]]) -> None:
        """Decode and fold what a page holds."""
        for cursor, kind, data in entries:
            self.apply(cursor, ev.decode_event(kind, data))

    def view(self) -> JobView:
        """The view at this point. Later events do not change the struct returned, but share its lists."""
        view = self._view
        for turn in view.turns:
            turn.text = "".join(self._text.get(turn.turn, ()))
        view.text = "".join(turn.text for turn in view.turns)
        view.reasoning = "".join(piece for turn in view.turns for piece in self._reasoning.get(turn.turn, ()))
        view.cursor = str(self.cursor)
        return msgspec.structs.replace(view)

    def _move(self, event: Event) -> None:
        kind, view = type(event), self._view
        if self.cursor == START:
            if kind is not ev.JobQueued:
                raise InvalidTransition(f"a log begins with job.queued, not {kind.type}")
            return
        if view.status.is_terminal:
            raise InvalidTransition(f"{kind.type} after the job {view.status}")
        if kind not in _MOVES:
            if kind is ev.JobQueued:
                raise InvalidTransition("job.queued twice")
            return
        after = TRANSITIONS[view.status].get(kind)
        if after is None:
            raise InvalidTransition(f"{kind.type} while {view.status}")
        view.status = after

    # --- lifecycle

    def _queued(self, event: ev.JobQueued) -> None:
        view = self._view
        view.kind, view.owner, view.queue, view.priority = (
            event.kind,
            event.owner,
            event.queue,
            event.priority,
        )
        view.thread_id, view.message_id, view.metadata = event.thread_id, event.message_id, event.metadata
        view.held = event.held
        view.created_ms = event.ts
        view.input = msgspec.json.decode(event.input)
        view.status = Status.SCHEDULED if event.delay_ms else Status.QUEUED

    def _started(self, event: ev.JobStarted) -> None:
        view = self._view
        view.attempt, view.worker, view.held, view.waiting_for = event.attempt, event.worker, "", None
        if view.started_ms is None:
            view.started_ms = event.ts

    def _retrying(self, event: ev.JobRetrying) -> None:
        self._view.error, self._view.worker = event.error, ""

    def _lost(self, event: ev.JobLost) -> None:
        self._view.crashes, self._view.worker = event.crashes, ""
        if event.delay_ms:
            self._view.status = Status.SCHEDULED

    def _requeued(self, event: ev.JobRequeued) -> None:
        self._view.held, self._view.waiting_for, self._view.worker = event.held, None, ""

    def _waiting(self, event: ev.JobWaiting) -> None:
        self._view.waiting_for, self._view.worker = event.waits_for, ""
        if event.waits_for == "timer":
            self._view.status = Status.SCHEDULED

    def _cancel_requested(self, event: ev.JobCancelRequested) -> None:
        self._view.cancel_requested = True

    def _ended(self, event: Event) -> None:
        self._view.ended_ms, self._view.waiting_for, self._view.held = event.ts, None, ""

    def _completed(self, event: ev.JobCompleted) -> None:
        self._ended(event)
        self._view.error = None
        self._view.result = msgspec.json.decode(event.result)

    def _failed(self, event: ev.JobFailed) -> None:
        self._ended(event)
        self._view.error = event.error

    def _progress(self, event: ev.JobProgress) -> None:
        self._view.progress = ProgressView(event.percent, event.step, event.steps, event.message)

    def _log(self, event: ev.JobLog) -> None:
        self._view.log_lines.append(LogLine(event.ts, event.level, event.message, event.data))

    # --- turns

    def _turn_started(self, event: ev.TurnStarted) -> None:
        self._view.turns.append(TurnView(event.turn, event.attempt, event.model))
        self._text[event.turn], self._reasoning[event.turn] = [], []

    def _turn_restarted(self, event: ev.TurnRestarted) -> None:
        view = self._view
        view.turns = [turn for turn in view.turns if turn.turn != event.turn]
        view.tool_calls = [call for call in view.tool_calls if call.turn != event.turn]
        view.turns.append(TurnView(event.turn, event.attempt, event.model))
        self._text[event.turn], self._reasoning[event.turn] = [], []

    def _turn_completed(self, event: ev.TurnCompleted) -> None:
        for turn in self._view.turns:
            if turn.turn == event.turn:
                turn.finish_reason, turn.usage = event.finish_reason, event.usage
        self._view.usage = self._view.usage + event.usage

    def _current(self, turn: int, attempt: int) -> bool:
        return any(known.turn == turn and known.attempt == attempt for known in reversed(self._view.turns))

    def _delta(self, event: ev.TextDelta) -> None:
        if self._current(event.turn, event.attempt):
            self._text[event.turn].append(event.text)

    def _reasoning_delta(self, event: ev.ReasoningDelta) -> None:
        if self._current(event.turn, event.attempt):
            self._reasoning[event.turn].append(event.text)

    # --- tools, steps, children, artifacts

    def _call(self, call_id: str) -> ToolCallView | None:
        return next((call for call in reversed(self._view.tool_calls) if call.call_id == call_id), None)

    def _tool_called(self, event: ev.ToolCalled) -> None:
        self._view.tool_calls.append(ToolCallView(event.call_id, event.turn, event.tool, event.arguments))

    def _tool_started(self, event: ev.ToolStarted) -> None:
        if call := self._call(event.call_id):
            call.state = "started"

    def _tool_completed(self, event: ev.ToolCompleted) -> None:
        if call := self._call(event.call_id):
            call.state, call.output, call.ms, call.error = "completed", event.output, event.ms, None

    def _tool_failed(self, event: ev.ToolFailed) -> None:
        if call := self._call(event.call_id):
            call.state, call.error, call.ms = "failed", event.error, event.ms

    def _tool_unknown(self, event: ev.ToolUnknown) -> None:
        if call := self._call(event.call_id):
            call.state, call.error = "unknown", ErrorInfo("unknown_outcome", event.message)

    def _step(self, key: str) -> StepView:
        for step in self._view.steps:
            if step.key == key:
                return step
        step = StepView(key)
        self._view.steps.append(step)
        return step

    def _step_started(self, event: ev.StepStarted) -> None:
        step = self._step(event.key)
        step.state, step.attempt = "started", event.attempt

    def _step_completed(self, event: ev.StepCompleted) -> None:
        step = self._step(event.key)
        step.state, step.output, step.error = "completed", event.output, None

    def _step_failed(self, event: ev.StepFailed) -> None:
        step = self._step(event.key)
        step.state, step.error = "failed", event.error

    def _artifact(self, event: ev.ArtifactCreated) -> None:
        self._view.artifacts.append(ArtifactView(event.name, event.media_type, event.size, event.where))


_FOLDS: dict[type[Event], Callable[[Fold, Any], None]] = {
    ev.JobQueued: Fold._queued,
    ev.JobStarted: Fold._started,
    ev.JobRetrying: Fold._retrying,
    ev.JobLost: Fold._lost,
    ev.JobRequeued: Fold._requeued,
    ev.JobWaiting: Fold._waiting,
    ev.JobCancelRequested: Fold._cancel_requested,
    ev.JobCompleted: Fold._completed,
    ev.JobFailed: Fold._failed,
    ev.JobCancelled: Fold._ended,
    ev.JobProgress: Fold._progress,
    ev.JobLog: Fold._log,
    ev.TurnStarted: Fold._turn_started,
    ev.TurnRestarted: Fold._turn_restarted,
    ev.TurnCompleted: Fold._turn_completed,
    ev.TextDelta: Fold._delta,
    ev.ReasoningDelta: Fold._reasoning_delta,
    ev.ToolCalled: Fold._tool_called,
    ev.ToolStarted: Fold._tool_started,
    ev.ToolCompleted: Fold._tool_completed,
    ev.ToolFailed: Fold._tool_failed,
    ev.ToolUnknown: Fold._tool_unknown,
    ev.StepStarted: Fold._step_started,
    ev.StepCompleted: Fold._step_completed,
    ev.StepFailed: Fold._step_failed,
    ev.ArtifactCreated: Fold._artifact,
}  # pyright: ignore[reportPrivateUsage]
