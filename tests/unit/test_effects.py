"""The effect ledger: logs written by hand, and what somebody who must know what was done would read."""

from __future__ import annotations

from typing import Any

import pytest

from streamjobs import events as ev
from streamjobs.effects import Effect, Ledger
from streamjobs.events import EVENTS, ErrorInfo, Event

ERROR = ErrorInfo("exception", "boom", True)
CALLED = ev.ToolCalled(ts=10, call_id="c1", tool="send", turn=1)
STARTED = ev.ToolStarted(ts=12, call_id="c1", idempotency_key="ik", effect="once")
COMPLETED = ev.ToolCompleted(ts=20, call_id="c1", ms=8)
STEP = ev.StepStarted(ts=12, key="pay:0f", name="pay", effect="idempotent", idempotency_key="ik")
STEP_DONE = ev.StepCompleted(ts=20, key="pay:0f", ms=8)
LOST = ev.JobLost(ts=30, worker="w1", crashes=1)
ASKED = ev.ApprovalRequested(ts=11, key="c1", subject="tool", message="send it?")


def on(worker: str) -> ev.JobStarted:
    return ev.JobStarted(attempt=1, worker=worker)


def decided(decision: str, key: str = "") -> ev.SignalReceived:
    return ev.SignalReceived(ts=15, name="approval", payload={"decision": decision, "key": key}, by="anna")


def ledger(*events: Event) -> list[Effect]:
    made = Ledger()
    for event in (on("w1"), *events):
        made.apply(event)
    return made.effects()


def only(*events: Event) -> Effect:
    (row,) = ledger(*events)
    return row


@pytest.mark.parametrize(
    ("events", "state"),
    [
        ([CALLED], "intent"),
        ([CALLED, STARTED], "started"),
        ([CALLED, STARTED, COMPLETED], "confirmed"),
        ([CALLED, STARTED, ev.ToolFailed(call_id="c1", error=ERROR)], "failed"),
        ([CALLED, ev.ToolFailed(call_id="c1", error=ERROR)], "failed"),
        ([CALLED, STARTED, ev.ToolUnknown(call_id="c1")], "unknown"),
        ([STEP], "started"),
        ([STEP, STEP_DONE], "confirmed"),
        ([STEP, ev.StepFailed(key="pay:0f", error=ERROR)], "failed"),
        ([STEP, ev.StepFailed(key="pay:0f", error=ERROR, will_retry=True)], "started"),
        ([STEP, ev.StepUnknown(key="pay:0f")], "unknown"),
    ],
)
def test_each_event_says_how_far_an_effect_is(events: list[Event], state: str):
    """Somebody looks whether the mail was sent, and reads that it was only meant to be."""
    assert only(*events).state == state


@pytest.mark.parametrize(
    "leaving",
    [
        LOST,
        ev.JobRequeued(why="yield"),
        ev.JobRetrying(attempt=1, error=ERROR),
        ev.JobCancelled(by="anna"),
        ev.JobFailed(error=ERROR),
        ev.JobPaused(by="anna"),
        ev.JobWaiting(waits_for="timer"),
    ],
)
@pytest.mark.parametrize("started", [[CALLED, STARTED], [STEP]])
def test_what_lost_its_worker_is_unknown(leaving: Event, started: list[Event]):
    """The worker died in the middle of a payment, and the ledger says that it is still under way."""
    assert only(*started, leaving).state == "unknown"


def test_only_what_was_under_way_becomes_unknown():
    """A crash would put in doubt what had been confirmed, and what had never begun."""
    other = ev.ToolCalled(ts=10, call_id="c2", tool="send", turn=1)
    rows = ledger(CALLED, STARTED, COMPLETED, other, LOST)
    assert [row.state for row in rows] == ["confirmed", "intent"]


def test_a_step_that_waits_for_its_next_attempt_is_not_unknown():
    """A retry with a long delay hands the job back: its failure is known, and would read as a crash."""
    failed = ev.StepFailed(key="pay:0f", error=ERROR, will_retry=True, delay_ms=60_000)
    row = only(STEP, failed, ev.JobWaiting(waits_for="timer"))
    assert (row.state, row.error) == ("started", ERROR)


@pytest.mark.parametrize(
    ("again", "state"),
    [
        ([ev.StepStarted(ts=40, key="pay:0f", attempt=2)], "started"),
        ([ev.StepStarted(ts=40, key="pay:0f", attempt=2), STEP_DONE], "confirmed"),
        ([STEP_DONE], "confirmed"),
    ],
)
def test_unknown_until_a_later_event(again: list[Event], state: str):
    """A lookup found that it had taken effect, and the ledger would stay in doubt for ever."""
    row = only(STEP, LOST, on("w2"), *again)
    assert (row.state, row.error) == (state, None)


def test_every_attempt_and_who_ran_it():
    """The evidence of which machine did what would be gone after the first crash."""
    row = only(STEP, LOST, on("w2"), ev.StepStarted(ts=40, key="pay:0f", attempt=2), STEP_DONE)
    assert (row.attempts, row.workers) == (2, ["w1", "w2"])
    assert (row.name, row.effect, row.idempotency_key) == ("pay", "idempotent", "ik")


def test_when_it_was_meant_begun_and_over():
    """What happened cannot be put in order with the logs of the other side."""
    tool, step = only(CALLED, STARTED, COMPLETED), only(STEP, STEP_DONE)
    assert (tool.intended_ms, tool.started_ms, tool.ended_ms, tool.ms) == (10, 12, 20, 8)
    assert (step.intended_ms, step.started_ms, step.ended_ms, step.ms) == (12, 12, 20, 8)


def test_what_is_tried_again_has_not_ended():
    """A step that runs now would show the end and the error of the attempt before."""
    row = only(STEP, ev.StepFailed(ts=20, key="pay:0f", error=ERROR), ev.StepStarted(ts=30, key="pay:0f"))
    assert (row.state, row.error, row.ended_ms) == ("started", None, None)


def test_an_id_that_a_model_uses_again_is_another_call():
    """Two payments in two turns would be one row."""
    again = ev.ToolCalled(ts=50, call_id="c1", tool="send", turn=2)
    rows = ledger(CALLED, STARTED, COMPLETED, again)
    assert [(row.turn, row.state) for row in rows] == [(1, "confirmed"), (2, "intent")]


def test_calls_of_a_superseded_turn_are_left_out():
    """Calls that the model took back would be waited for."""
    restarted = ev.TurnRestarted(turn=1, attempt=2, supersedes_from=3)
    assert ledger(CALLED, restarted) == []
    rows = ledger(STEP, CALLED, restarted, ev.ToolCalled(ts=50, call_id="c1", tool="look", turn=1))
    assert [(row.kind, row.name) for row in rows] == [("step", "pay"), ("tool", "look")]
    assert ledger(CALLED, ev.TurnRestarted(turn=2, attempt=2, supersedes_from=3))[0].key == "c1"


# --- approvals


def asked(*events: Event, subject: str = "tool") -> tuple[str, str]:
    row = only(CALLED, ev.ApprovalRequested(ts=11, key="c1", subject=subject), *events)
    return row.state, row.approval


@pytest.mark.parametrize(
    ("events", "approval"),
    [
        ([], "pending"),
        ([decided("approve")], "approved"),
        ([decided("approve", "c1")], "approved"),
        ([decided("deny")], "denied"),
        ([decided("approve", "other")], "pending"),
        ([decided("deny"), decided("approve")], "denied"),
        ([ev.SignalReceived(name="approval", payload={"decision": "maybe"})], "pending"),
        ([ev.SignalReceived(name="ready")], "pending"),
    ],
)
def test_an_approval_is_part_of_its_call(events: list[Event], approval: str):
    """Who waits for whom is not to be seen, or a no reads as a yes."""
    assert asked(*events) == ("intent", approval)


def test_a_step_that_needs_an_approval_is_an_intent():
    """A step has no event of its own before it starts: the ledger would not show what waits for a yes."""
    row = only(ev.ApprovalRequested(ts=9, key="pay:0f", subject="step"), LOST)
    assert (row.kind, row.key, row.state, row.approval, row.intended_ms) == (
        "step",
        "pay:0f",
        "intent",
        "pending",
        9,
    )
    row = only(ev.ApprovalRequested(ts=9, key="pay:0f", subject="step"), decided("approve"), STEP, STEP_DONE)
    assert (row.state, row.approval, row.name, row.intended_ms) == ("confirmed", "approved", "pay", 9)


def test_a_decision_without_a_key_is_for_the_oldest_request():
    """The ledger would say that another payment was approved than the one that was made."""
    other = ev.ToolCalled(ts=10, call_id="c2", tool="send", turn=1)
    second = ev.ApprovalRequested(ts=12, key="c2", subject="tool")
    rows = ledger(CALLED, other, ASKED, second, decided("approve"))
    assert [row.approval for row in rows] == ["approved", "pending"]
    rows = ledger(CALLED, other, ASKED, second, decided("approve"), decided("deny"))
    assert [row.approval for row in rows] == ["approved", "denied"]


def test_a_decision_may_come_before_its_request():
    """A person is quick, the job goes on, and the ledger says that it still waits."""
    assert only(CALLED, decided("approve", "c1"), ASKED).approval == "approved"


def test_a_request_that_is_about_no_effect_takes_its_decision():
    """A workflow's own question comes first; its answer would approve the payment behind it."""
    question = ev.ApprovalRequested(ts=9, key="gate", message="go on?")
    row = only(question, CALLED, ASKED, decided("approve"))
    assert row.approval == "pending"


def test_nobody_answered_in_time():
    """A request that is over would wait in the ledger for ever, and take the answer to the next one."""
    other = ev.ToolCalled(ts=13, call_id="c2", tool="send", turn=1)
    second = ev.ApprovalRequested(ts=14, key="c2", subject="tool")
    expired = ev.TimerFired(key="approval:c1")
    rows = ledger(CALLED, ASKED, other, second, ev.TimerFired(key="sleep:1"), expired, decided("approve"))
    assert [row.approval for row in rows] == ["expired", "approved"]


@pytest.mark.parametrize(("begun", "key"), [([CALLED, STARTED], "c1:again"), ([STEP], "pay:0f:again")])
def test_whether_to_run_an_unknown_one_again_is_asked_about_its_row(begun: list[Event], key: str):
    """A payment of unknown outcome waits for a person, and the ledger does not say so."""
    question = ev.ApprovalRequested(key=key, subject="recovery", message="again?")
    row = only(*begun, LOST, on("w2"), question)
    assert (row.state, row.approval) == ("unknown", "pending")
    row = only(*begun, LOST, on("w2"), question, decided("deny", key))
    assert (row.state, row.approval) == ("unknown", "denied")


def test_what_ended_is_not_asked_about_any_more():
    """A request ran out of time; the next yes, meant for something else, would be booked on it."""
    expired = ev.ToolFailed(ts=12, call_id="c1", error=ErrorInfo("denied", "nobody answered"))
    other = ev.ToolCalled(ts=13, call_id="c2", tool="send", turn=1)
    second = ev.ApprovalRequested(ts=14, key="c2", subject="tool")
    rows = ledger(CALLED, ASKED, expired, other, second, decided("approve"))
    assert [row.approval for row in rows] == ["pending", "approved"]


# --- what may be skipped


def test_deltas_need_not_be_decoded():
    """The ledger of a chat would cost as much as its whole text."""
    unread = {name for name in EVENTS if not Ledger.reads(name)}
    assert {"text.delta", "reasoning.delta", "job.log", "job.progress", "tool.progress"} <= unread
    read: set[str] = {"job.started", "job.lost", "tool.called", "step.unknown", "signal.received"}
    assert not read & unread


def test_events_of_another_release_change_nothing():
    """One new event type would end every ledger in an error."""
    rows: list[Any] = ledger(CALLED, ev.Unknown(ts=11), STARTED)
    assert [row.state for row in rows] == ["started"]
