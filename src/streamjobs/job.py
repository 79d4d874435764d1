"""A job's lifecycle, and the view that its events fold into. Pure.

Rule 1: what may follow what is the table TRANSITIONS; code asks it.
Rule 2: `Fold` is the only fold: of the gateway, of snapshots, of workers and tests.
Rule 3: folding is total. Events of other releases and users' own change nothing but the position;
an event that cannot follow raises, it never bends the view.
Rule 4: superseded text and tool calls are not in the view.
Rule 5: a view is bounded (`Caps`): of what grows without end the newest is shown, and `truncated` says how
much is not. The log has all of it.
Rule 6: a fold can be put away and taken up again: `restore(state())` and what follows give what the whole
log gives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from typing import Any, ClassVar, TypeVar

import msgspec
from msgspec.structs import replace

from streamjobs import events as ev
from streamjobs.approvals import decision_of
from streamjobs.bounded import Spoken, cut_items, kept_of
from streamjobs.cursor import START, Cursor, parse_cursor
from streamjobs.errors import InvalidCursor, StreamjobsError
from streamjobs.events import ErrorInfo, Event, Json, Usage

K = TypeVar("K")
V = TypeVar("V")


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


class InvalidTransition(StreamjobsError):  # noqa: N818 - named after what happened, as all of ours
    """An event that cannot follow what the log holds: the log is damaged."""

    code = "invalid_transition"


class UnknownState(StreamjobsError):  # noqa: N818 - named after what happened, as all of ours
    """A stored fold that this release cannot take up: fold the log instead."""

    code = "unknown_state"


STATE_SCHEMA = 1
"""Raised with every change after which the same events give another state."""


class Caps(msgspec.Struct, frozen=True):
    """How much of each a view shows at most.

    Characters of text and of reasoning; log lines; steps, and as many tool calls, turns, artifacts, approvals
    and children; bytes of one output.
    """

    text: int = 1024 * 1024
    log_lines: int = 1000
    steps: int = 1000
    output: int = 64 * 1024


class TurnView(msgspec.Struct, frozen=True):
    """One call of the model, as it stands."""

    turn: int
    attempt: int
    model: str = ""
    text: str = ""
    finish_reason: str = ""
    usage: Usage | None = None


class ToolCallView(msgspec.Struct, frozen=True):
    """One tool call. state: called, started, completed, failed, unknown.

    Where `output_bytes` is not 0 the output is that large, and `output` is its beginning, as text.
    """

    call_id: str
    turn: int
    tool: str
    arguments: Json = None
    state: str = "called"
    output: Json = None
    error: ErrorInfo | None = None
    ms: int | None = None
    output_bytes: int = 0


class StepView(msgspec.Struct, frozen=True):
    """One step of a workflow. state: started, retrying, completed, failed, unknown.

    An output too large for an event is the artifact of that name; `output_bytes` as for a tool call.
    """

    key: str
    state: str = "started"
    attempt: int = 1
    output: Json = None
    error: ErrorInfo | None = None
    name: str = ""
    ms: int | None = None
    artifact: str = ""
    output_bytes: int = 0


class ApprovalView(msgspec.Struct, frozen=True):
    """Something that a person is asked. state: pending, approved, denied, expired."""

    key: str
    subject: str
    message: str
    detail: Json = None
    state: str = "pending"
    comment: str = ""
    by: str = ""


class ChildView(msgspec.Struct, frozen=True):
    """A job that this one submitted; its status is `submitted` until it has ended."""

    job: str
    kind: str = ""
    status: str = "submitted"
    error: ErrorInfo | None = None


class Metrics(msgspec.Struct, frozen=True):
    """What the job has cost.

    Tokens, calls of a model (each attempt), of tools, steps, seconds from first start.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    requests: int = 0
    tool_calls: int = 0
    steps: int = 0
    seconds: float | None = None


class ProgressView(msgspec.Struct, frozen=True):
    """How far the job says it is."""

    percent: float | None = None
    step: int | None = None
    steps: int | None = None
    message: str = ""


class LogLine(msgspec.Struct, frozen=True):
    """A line for people."""

    ts: int
    level: str
    message: str
    data: Json = None


class ArtifactView(msgspec.Struct, frozen=True):
    """Something the job made."""

    name: str
    media_type: str
    size: int
    where: str


class JobView(msgspec.Struct):
    """A job as it stands at `cursor`: what `GET /v1/jobs/{id}` and the `snapshot` event show.

    Instants are ms since the epoch, by Redis's clock. `text` is what stands now, over all turns. `truncated`
    says what is not shown for its size: name -> how many, of text and reasoning how many characters.
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
    summary: str = ""
    result_artifact: str = ""
    approvals: list[ApprovalView] = []
    children: list[ChildView] = []
    metrics: Metrics = Metrics()
    parent: str = ""
    rerun_of: str = ""
    schedule: str = ""
    truncated: dict[str, int] = {}


class _State(msgspec.Struct, frozen=True):
    """A fold, put away: its view, and what that does not tell apart."""

    schema: int
    view: JobView
    reasoning: list[str]
    """Of each turn."""


_states = msgspec.json.Decoder(_State)


def _waits_for_a_timer(event: Event) -> bool:
    """Whether an event that moves the job leaves it to a timer, not to a worker or somebody outside."""
    match event:
        case ev.JobLost():
            return event.delay_ms > 0
        case ev.JobWaiting():
            return event.waits_for == "timer"
        case _:
            return False


def status_after(status: Status, event: Event) -> Status:
    """Where a job is after an event that is not its first. Raises `InvalidTransition`."""
    kind = type(event)
    if kind not in _MOVES:
        return status
    after = TRANSITIONS[status].get(kind)
    if after is None:
        raise InvalidTransition(f"{kind.type} while {status}")
    return Status.SCHEDULED if _waits_for_a_timer(event) else after


class _Turn:
    """A turn as it is folded: what is known, and what it says."""

    def __init__(self, known: TurnView, reasoning: str = "") -> None:
        self.known = replace(known, text="")
        self.text = Spoken(known.text)
        self.reasoning = Spoken(reasoning)

    def view(self) -> TurnView:
        return replace(self.known, text=self.text.text())


class Fold:
    """Folds a job's events, in order, into its view.

    Text is gathered in pieces, calls and steps are found by their keys: folding n events is O(n).
    """

    def __init__(self, job_id: str, caps: Caps = Caps()) -> None:  # noqa: B008 - frozen
        self.cursor = START
        self._caps = caps
        self._view = JobView(id=job_id)
        self._turns: dict[int, _Turn] = {}
        self._calls: dict[int, ToolCallView] = {}
        self._latest_call: dict[str, int] = {}
        self._next_call = 0
        self._steps: dict[str, StepView] = {}
        self._approvals: dict[str, ApprovalView] = {}
        self._children: dict[str, ChildView] = {}
        self._artifacts: dict[str, ArtifactView] = {}
        self._log_lines: list[LogLine] = []
        self._requests = 0
        self._spoken: Counter[str] = Counter()
        """Characters that stand, of text and of reasoning."""
        self._cut: Counter[str] = Counter()

    @classmethod
    def restore(cls, state: bytes, caps: Caps = Caps()) -> Fold:  # noqa: B008 - frozen
        """Take up a fold where `state` was made. Raises `UnknownState` for one of another release."""
        try:
            stored = _states.decode(state)
            cursor = parse_cursor(stored.view.cursor)
        except (msgspec.MsgspecError, InvalidCursor, UnicodeDecodeError) as error:
            raise UnknownState(f"not the state of a fold: {error}") from error
        if stored.schema != STATE_SCHEMA or len(stored.view.turns) != len(stored.reasoning):
            raise UnknownState(f"the state of a fold has schema {stored.schema}, not {STATE_SCHEMA}")
        fold = cls(stored.view.id, caps)
        fold.cursor = cursor
        fold._take_up(stored.view, stored.reasoning)
        return fold

    def _take_up(self, view: JobView, reasoning: list[str]) -> None:
        self._view = replace(view, truncated={})
        self._turns = {turn.turn: _Turn(turn, said) for turn, said in zip(view.turns, reasoning, strict=True)}
        self._calls = dict(enumerate(view.tool_calls))
        self._next_call = len(self._calls)
        self._latest_call = {call.call_id: at for at, call in self._calls.items()}
        self._steps = {step.key: step for step in view.steps}
        self._approvals = {approval.key: approval for approval in view.approvals}
        self._children = {child.job: child for child in view.children}
        self._artifacts = {artifact.name: artifact for artifact in view.artifacts}
        self._log_lines = list(view.log_lines)
        self._requests = view.metrics.requests
        self._spoken = Counter(
            text=sum(turn.text.size for turn in self._turns.values()),
            reasoning=sum(turn.reasoning.size for turn in self._turns.values()),
        )
        self._cut = Counter(view.truncated)

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
        status = self._status_after(event)
        fold = self._FOLDS.get(type(event))
        if fold is not None:
            fold(self, event)
        self._view.status = status
        self.cursor = cursor

    def apply_all(self, entries: Iterable[tuple[Cursor, str, bytes]]) -> None:
        """Decode and fold what a page holds."""
        for cursor, kind, data in entries:
            self.apply(cursor, ev.decode_event(kind, data))

    def view(self) -> JobView:
        """The view at this point; later events do not change it."""
        view = self._view
        turns = [turn.view() for turn in self._turns.values()]
        return replace(
            view,
            cursor=str(self.cursor),
            turns=turns,
            text="".join(turn.text for turn in turns),
            reasoning="".join(turn.reasoning.text() for turn in self._turns.values()),
            tool_calls=list(self._calls.values()),
            steps=list(self._steps.values()),
            artifacts=list(self._artifacts.values()),
            log_lines=list(self._log_lines),
            approvals=list(self._approvals.values()),
            children=list(self._children.values()),
            metrics=self._metrics(),
            truncated=dict(sorted(self._cut.items())),
        )

    def state(self) -> bytes:
        """All that `restore` needs, as JSON; bounded as the view is."""
        view = replace(self.view(), text="", reasoning="")
        return ev.encode_json(
            _State(STATE_SCHEMA, view, [turn.reasoning.text() for turn in self._turns.values()])
        )

    def _metrics(self) -> Metrics:
        view = self._view
        seconds = None
        if view.started_ms is not None and view.ended_ms is not None:
            seconds = (view.ended_ms - view.started_ms) / 1000
        return Metrics(
            input_tokens=view.usage.input_tokens,
            output_tokens=view.usage.output_tokens,
            requests=self._requests,
            tool_calls=len(self._calls) + self._cut["tool_calls"],
            steps=len(self._steps) + self._cut["steps"],
            seconds=seconds,
        )

    def _status_after(self, event: Event) -> Status:
        kind, status = type(event), self._view.status
        if self.cursor == START:
            if not isinstance(event, ev.JobQueued):
                raise InvalidTransition(f"a log begins with job.queued, not {kind.type}")
            return Status.SCHEDULED if event.delay_ms else Status.QUEUED
        if status.is_terminal:
            raise InvalidTransition(f"{kind.type} after the job {status}")
        if kind is ev.JobQueued:
            raise InvalidTransition("job.queued twice")
        return status_after(status, event)

    # --- lifecycle

    def _queued(self, event: ev.JobQueued) -> None:
        self._view = JobView(
            id=self._view.id,
            kind=event.kind,
            owner=event.owner,
            queue=event.queue,
            priority=event.priority,
            held=event.held,
            thread_id=event.thread_id,
            message_id=event.message_id,
            metadata=event.metadata,
            created_ms=event.ts,
            input=ev.decode_raw(event.input),
            parent=event.parent,
            rerun_of=event.rerun_of,
            schedule=event.schedule,
        )

    def _started(self, event: ev.JobStarted) -> None:
        view = self._view
        view.attempt, view.worker, view.held, view.waiting_for = event.attempt, event.worker, "", None
        if view.started_ms is None:
            view.started_ms = event.ts

    def _retrying(self, event: ev.JobRetrying) -> None:
        self._view.error, self._view.worker = event.error, ""

    def _lost(self, event: ev.JobLost) -> None:
        self._view.crashes, self._view.worker = event.crashes, ""

    def _requeued(self, event: ev.JobRequeued) -> None:
        self._view.held, self._view.waiting_for, self._view.worker = event.held, None, ""

    def _waiting(self, event: ev.JobWaiting) -> None:
        self._view.waiting_for, self._view.worker = event.waits_for, ""

    def _paused(self, _event: ev.JobPaused) -> None:
        self._view.held, self._view.waiting_for, self._view.worker = "", None, ""

    def _cancel_requested(self, _event: ev.JobCancelRequested) -> None:
        self._view.cancel_requested = True

    def _ended(self, event: Event) -> None:
        self._view.ended_ms, self._view.waiting_for, self._view.held = event.ts, None, ""

    def _completed(self, event: ev.JobCompleted) -> None:
        self._view.result, self._view.error = ev.decode_raw(event.result), None
        self._view.summary, self._view.result_artifact = event.summary, event.artifact
        self._ended(event)

    def _failed(self, event: ev.JobFailed) -> None:
        self._ended(event)
        self._view.error = event.error

    def _progress(self, event: ev.JobProgress) -> None:
        self._view.progress = ProgressView(event.percent, event.step, event.steps, event.message)

    def _log(self, event: ev.JobLog) -> None:
        message, data = self._bounded(event.message)[0], self._bounded(event.data)[0]
        self._log_lines.append(LogLine(event.ts, event.level, str(message), data))
        if len(self._log_lines) > self._caps.log_lines:
            leaving = len(self._log_lines) - kept_of(self._caps.log_lines)
            del self._log_lines[:leaving]
            self._cut["log_lines"] += leaving

    # --- bounds

    def _bounded(self, value: Json) -> tuple[Json, int]:
        """A value, or its beginning as text and its whole size where it is too large for a view."""
        if value is None or isinstance(value, bool | int | float):
            return value, 0
        encoded = ev.encode_json(value)
        if len(encoded) <= self._caps.output:
            return value, 0
        self._cut["outputs"] += 1
        beginning = value if isinstance(value, str) else encoded[: self._caps.output].decode(errors="ignore")
        return beginning[: self._caps.output], len(encoded)

    def _newest(self, name: str, items: dict[K, V]) -> dict[K, V]:
        """What of these a view shows; the rest is counted."""
        items, left = cut_items(items, self._caps.steps)
        if left:
            self._cut[name] += len(left)
        return items

    def _say(self, name: str, turn: _Turn, text: str) -> None:
        said: Spoken = getattr(turn, name)
        said.add(text)
        self._spoken[name] += len(text)
        if self._spoken[name] > self._caps.text:
            self._cut_spoken(name)

    def _cut_spoken(self, name: str) -> None:
        leaving = self._spoken[name] - kept_of(self._caps.text)
        self._spoken[name] -= leaving
        self._cut[name] += leaving
        for turn in self._turns.values():
            said: Spoken = getattr(turn, name)
            part = min(leaving, said.size)
            if part:
                said.drop(part)
                leaving -= part
            if not leaving:
                return

    # --- turns

    def _turn_started(self, event: ev.TurnStarted) -> None:
        self._begin_turn(TurnView(event.turn, event.attempt, event.model))

    def _turn_restarted(self, event: ev.TurnRestarted) -> None:
        self._begin_turn(TurnView(event.turn, event.attempt, event.model))
        self._calls = {at: call for at, call in self._calls.items() if call.turn != event.turn}
        self._latest_call = {call.call_id: at for at, call in self._calls.items()}

    def _begin_turn(self, turn: TurnView) -> None:
        self._requests += 1
        superseded = self._turns.pop(turn.turn, None)
        if superseded is not None:
            self._spoken["text"] -= superseded.text.size
            self._spoken["reasoning"] -= superseded.reasoning.size
        self._turns[turn.turn] = _Turn(turn)
        self._turns, left = cut_items(self._turns, self._caps.steps)
        if left:
            self._cut["turns"] += len(left)
            self._leave_unsaid("text", sum(turn.text.size for turn in left))
            self._leave_unsaid("reasoning", sum(turn.reasoning.size for turn in left))

    def _leave_unsaid(self, name: str, characters: int) -> None:
        if characters:
            self._spoken[name] -= characters
            self._cut[name] += characters

    def _turn_completed(self, event: ev.TurnCompleted) -> None:
        turn = self._turns.get(event.turn)
        if turn is not None:
            turn.known = replace(turn.known, finish_reason=event.finish_reason, usage=event.usage)
        self._view.usage = self._view.usage + event.usage

    def _delta(self, event: ev.TextDelta) -> None:
        turn = self._turns.get(event.turn)
        if turn is not None and turn.known.attempt == event.attempt:
            self._say("text", turn, event.text)

    def _reasoning_delta(self, event: ev.ReasoningDelta) -> None:
        turn = self._turns.get(event.turn)
        if turn is not None and turn.known.attempt == event.attempt:
            self._say("reasoning", turn, event.text)

    # --- tools, steps, artifacts

    def _tool_called(self, event: ev.ToolCalled) -> None:
        arguments, _ = self._bounded(event.arguments)
        self._latest_call[event.call_id] = self._next_call
        self._calls[self._next_call] = ToolCallView(event.call_id, event.turn, event.tool, arguments)
        self._next_call += 1
        if len(self._calls) > self._caps.steps:
            self._calls = self._newest("tool_calls", self._calls)
            self._latest_call = {call.call_id: at for at, call in self._calls.items()}

    def _change_call(self, call_id: str, **changes: Any) -> None:
        at = self._latest_call.get(call_id)
        if at is not None:
            self._calls[at] = replace(self._calls[at], **changes)

    def _tool_started(self, event: ev.ToolStarted) -> None:
        self._change_call(event.call_id, state="started")

    def _tool_completed(self, event: ev.ToolCompleted) -> None:
        output, size = self._bounded(event.output)
        self._change_call(
            event.call_id, state="completed", output=output, output_bytes=size, ms=event.ms, error=None
        )

    def _tool_failed(self, event: ev.ToolFailed) -> None:
        self._change_call(event.call_id, state="failed", error=event.error, ms=event.ms)

    def _tool_unknown(self, event: ev.ToolUnknown) -> None:
        error = ErrorInfo("unknown_outcome", event.message)
        self._change_call(event.call_id, state="unknown", error=error)

    def _change_step(self, key: str, **changes: Any) -> None:
        self._steps[key] = replace(self._steps.get(key) or StepView(key), **changes)
        self._steps = self._newest("steps", self._steps)

    def _step_started(self, event: ev.StepStarted) -> None:
        self._change_step(event.key, state="started", attempt=event.attempt, name=event.name)

    def _step_completed(self, event: ev.StepCompleted) -> None:
        output, size = self._bounded(event.output)
        self._change_step(
            event.key,
            state="completed",
            output=output,
            output_bytes=size,
            error=None,
            ms=event.ms,
            artifact=event.artifact,
        )

    def _step_failed(self, event: ev.StepFailed) -> None:
        state = "retrying" if event.will_retry else "failed"
        self._change_step(event.key, state=state, error=event.error, ms=event.ms)

    def _step_unknown(self, event: ev.StepUnknown) -> None:
        error = ErrorInfo("unknown_outcome", event.message)
        self._change_step(event.key, state="unknown", error=error)

    def _artifact(self, event: ev.ArtifactCreated) -> None:
        self._artifacts[event.name] = ArtifactView(event.name, event.media_type, event.size, event.where)
        self._artifacts = self._newest("artifacts", self._artifacts)

    # --- people and children

    def _approval_requested(self, event: ev.ApprovalRequested) -> None:
        detail, _ = self._bounded(event.detail)
        self._approvals[event.key] = ApprovalView(event.key, event.subject, event.message, detail)
        self._approvals = self._newest("approvals", self._approvals)

    def _signal(self, event: ev.SignalReceived) -> None:
        decision = decision_of(event)
        pending = [key for key, one in self._approvals.items() if one.state == "pending"]
        if decision is None or not pending:
            return
        key = decision.key or pending[0]
        if key in pending:
            state = "approved" if decision.approved else "denied"
            self._approvals[key] = replace(
                self._approvals[key], state=state, comment=decision.comment, by=decision.by
            )

    def _timer_fired(self, event: ev.TimerFired) -> None:
        kind, _, key = event.key.partition(":")
        approval = self._approvals.get(key)
        if kind == "approval" and approval is not None and approval.state == "pending":
            self._approvals[key] = replace(approval, state="expired")

    def _child_spawned(self, event: ev.ChildSpawned) -> None:
        known = self._children.get(event.job) or ChildView(event.job)
        self._children[event.job] = replace(known, kind=event.kind)
        self._children = self._newest("children", self._children)

    def _child_ended(self, event: ev.ChildEnded) -> None:
        known = self._children.get(event.job) or ChildView(event.job)
        self._children[event.job] = replace(known, status=event.status, error=event.error)
        self._children = self._newest("children", self._children)

    _FOLDS: ClassVar[dict[type[Event], Callable[[Fold, Any], None]]] = {
        ev.JobQueued: _queued,
        ev.JobStarted: _started,
        ev.JobRetrying: _retrying,
        ev.JobLost: _lost,
        ev.JobRequeued: _requeued,
        ev.JobWaiting: _waiting,
        ev.JobPaused: _paused,
        ev.JobCancelRequested: _cancel_requested,
        ev.JobCompleted: _completed,
        ev.JobFailed: _failed,
        ev.JobCancelled: _ended,
        ev.JobProgress: _progress,
        ev.JobLog: _log,
        ev.TurnStarted: _turn_started,
        ev.TurnRestarted: _turn_restarted,
        ev.TurnCompleted: _turn_completed,
        ev.TextDelta: _delta,
        ev.ReasoningDelta: _reasoning_delta,
        ev.ToolCalled: _tool_called,
        ev.ToolStarted: _tool_started,
        ev.ToolCompleted: _tool_completed,
        ev.ToolFailed: _tool_failed,
        ev.ToolUnknown: _tool_unknown,
        ev.StepStarted: _step_started,
        ev.StepCompleted: _step_completed,
        ev.StepFailed: _step_failed,
        ev.StepUnknown: _step_unknown,
        ev.ArtifactCreated: _artifact,
        ev.ApprovalRequested: _approval_requested,
        ev.SignalReceived: _signal,
        ev.TimerFired: _timer_fired,
        ev.ChildSpawned: _child_spawned,
        ev.ChildEnded: _child_ended,
    }
