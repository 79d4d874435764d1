"""The effect ledger: what a job did to the world, call by call, as its log tells it. Pure.

Rule 1: one row for each tool call and each step, in the order in which they were intended.
Rule 2: what was started, and lost its worker before an outcome was recorded, is `unknown` until a later
event says more: it may have taken effect.
Rule 3: a step or call that failed and will be tried again stays `started`.
Rule 4: calls of a superseded turn are left out: none of them ran, tools start after their turn is complete.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import msgspec

from streamjobs import events as ev
from streamjobs.approvals import Decision, decision_of
from streamjobs.events import ErrorInfo, Event


class Effect(msgspec.Struct, kw_only=True):
    """One tool call or step.

    kind: tool, step. effect: pure, idempotent, once, or empty before it was started. state: intent, started,
    confirmed, failed, unknown. approval: pending, approved, denied, expired, or empty where nobody is asked.
    `started_ms` is the first attempt's start, `ms` the last one's duration, `workers` who ran each attempt.
    """

    kind: str
    key: str
    name: str = ""
    effect: str = ""
    idempotency_key: str = ""
    state: str = "intent"
    approval: str = ""
    attempts: int = 0
    turn: int = 0
    intended_ms: int = 0
    started_ms: int | None = None
    ended_ms: int | None = None
    ms: int | None = None
    error: ErrorInfo | None = None
    workers: list[str] = []


class Ledger:
    """Folds a job's events, in order, into its effects."""

    def __init__(self) -> None:
        self._rows: list[Effect] = []
        self._latest: dict[tuple[str, str], Effect] = {}
        self._in_flight: list[Effect] = []
        self._pending: dict[str, Effect | None] = {}
        self._unread: list[Decision] = []
        self._worker = ""

    @classmethod
    def reads(cls, event_type: str) -> bool:
        """Whether events of that type can change a ledger: the others need not be decoded."""
        return event_type in _READ

    def apply(self, event: Event) -> None:
        """Fold the next event; those that tell of no effect change nothing."""
        fold = self._FOLDS.get(type(event))
        if fold is not None:
            fold(self, event)

    def effects(self) -> list[Effect]:
        """Every row; later events change them."""
        return list(self._rows)

    # --- rows

    def _row(self, kind: str, key: str, ts: int) -> Effect:
        """The latest row of that key, or a new one: a step's first event is its start."""
        return self._latest.get((kind, key)) or self._add(Effect(kind=kind, key=key, intended_ms=ts))

    def _add(self, row: Effect) -> Effect:
        self._rows.append(row)
        self._latest[row.kind, row.key] = row
        return row

    def _start(self, row: Effect, event: ev.ToolStarted | ev.StepStarted) -> None:
        row.state, row.error, row.ended_ms = "started", None, None
        row.effect = event.effect or row.effect
        row.idempotency_key = event.idempotency_key or row.idempotency_key
        row.started_ms = event.ts if row.started_ms is None else row.started_ms
        row.workers = [*row.workers, self._worker]
        row.attempts = len(row.workers)
        self._in_flight.append(row)

    def _end(self, row: Effect, state: str, ts: int) -> None:
        row.state, row.ended_ms = state, ts
        self._land(row)
        if self._pending.get(row.key) is row:  # what ended is not asked about any more
            del self._pending[row.key]

    def _land(self, row: Effect) -> None:
        self._in_flight = [other for other in self._in_flight if other is not row]

    # --- tools

    def _called(self, event: ev.ToolCalled) -> None:
        """A call of its own each time: models use an id again in a later turn."""
        row = Effect(kind="tool", key=event.call_id, name=event.tool, turn=event.turn, intended_ms=event.ts)
        self._add(row)

    def _tool_started(self, event: ev.ToolStarted) -> None:
        self._start(self._row("tool", event.call_id, event.ts), event)

    def _tool_completed(self, event: ev.ToolCompleted) -> None:
        row = self._row("tool", event.call_id, event.ts)
        row.ms, row.error = event.ms, None
        self._end(row, "confirmed", event.ts)

    def _tool_failed(self, event: ev.ToolFailed) -> None:
        row = self._row("tool", event.call_id, event.ts)
        row.ms, row.error = event.ms, event.error
        self._end(row, "failed", event.ts)

    def _tool_unknown(self, event: ev.ToolUnknown) -> None:
        self._is_unknown(self._row("tool", event.call_id, event.ts), event)

    def _superseded(self, event: ev.TurnRestarted) -> None:
        self._rows = [row for row in self._rows if row.kind != "tool" or row.turn != event.turn]
        self._in_flight = [row for row in self._in_flight if row.kind != "tool" or row.turn != event.turn]
        self._latest = {(row.kind, row.key): row for row in self._rows}

    # --- steps

    def _step_started(self, event: ev.StepStarted) -> None:
        row = self._row("step", event.key, event.ts)
        row.name = event.name or row.name
        self._start(row, event)

    def _step_completed(self, event: ev.StepCompleted) -> None:
        row = self._row("step", event.key, event.ts)
        row.ms, row.error = event.ms, None
        self._end(row, "confirmed", event.ts)

    def _step_failed(self, event: ev.StepFailed) -> None:
        row = self._row("step", event.key, event.ts)
        row.ms, row.error = event.ms, event.error
        if event.will_retry:
            self._land(row)
        else:
            self._end(row, "failed", event.ts)

    def _step_unknown(self, event: ev.StepUnknown) -> None:
        self._is_unknown(self._row("step", event.key, event.ts), event)

    # --- workers

    def _taken(self, event: ev.JobStarted) -> None:
        self._worker = event.worker

    def _left(self, _event: Event) -> None:
        """Nobody runs the job any more; what was under way has no outcome."""
        for row in self._in_flight:
            row.state = "unknown"
        self._in_flight = []
        self._worker = ""

    def _is_unknown(self, row: Effect, event: ev.ToolUnknown | ev.StepUnknown) -> None:
        row.error = ErrorInfo("unknown_outcome", event.message)
        self._end(row, "unknown", event.ts)

    # --- approvals

    def _asked(self, event: ev.ApprovalRequested) -> None:
        """Somebody is asked: before a call or step, whether to run one of unknown outcome again, or else."""
        row = self._subject(event)
        if row is not None:
            row.approval = "pending"
        self._pending[event.key] = row
        for decision in list(self._unread):
            if event.key in self._pending and self._decide(decision):
                self._unread.remove(decision)

    def _subject(self, event: ev.ApprovalRequested) -> Effect | None:
        if event.subject in {"tool", "step"}:
            return self._row(event.subject, event.key, event.ts)
        if event.subject == "recovery":
            key = event.key.removesuffix(":again")
            return self._latest.get(("tool", key)) or self._latest.get(("step", key))
        return None

    def _signalled(self, event: ev.SignalReceived) -> None:
        decision = decision_of(event)
        if decision is not None and not self._decide(decision):
            self._unread.append(decision)

    def _decide(self, decision: Decision) -> bool:
        """Whether a decision answers a pending request: the one it names, or the oldest."""
        key = decision.key or next(iter(self._pending), "")
        if key not in self._pending:
            return False
        row = self._pending.pop(key)
        if row is not None:
            row.approval = "approved" if decision.approved else "denied"
        return True

    def _fired(self, event: ev.TimerFired) -> None:
        kind, _, key = event.key.partition(":")
        row = self._pending.pop(key, None) if kind == "approval" else None
        if row is not None:
            row.approval = "expired"

    _FOLDS: ClassVar[dict[type[Event], Callable[[Ledger, Any], None]]] = {
        ev.JobStarted: _taken,
        ev.JobRetrying: _left,
        ev.JobLost: _left,
        ev.JobRequeued: _left,
        ev.JobWaiting: _left,
        ev.JobPaused: _left,
        ev.JobCompleted: _left,
        ev.JobFailed: _left,
        ev.JobCancelled: _left,
        ev.TurnRestarted: _superseded,
        ev.ToolCalled: _called,
        ev.ToolStarted: _tool_started,
        ev.ToolCompleted: _tool_completed,
        ev.ToolFailed: _tool_failed,
        ev.ToolUnknown: _tool_unknown,
        ev.StepStarted: _step_started,
        ev.StepCompleted: _step_completed,
        ev.StepFailed: _step_failed,
        ev.StepUnknown: _step_unknown,
        ev.ApprovalRequested: _asked,
        ev.SignalReceived: _signalled,
        ev.TimerFired: _fired,
    }


_READ = frozenset(kind.type for kind in Ledger._FOLDS)  # pyright: ignore[reportPrivateUsage]
