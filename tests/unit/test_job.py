"""The lifecycle and the fold: lives of jobs written by hand, and what anybody would see of them.

Nothing here reads TRANSITIONS to decide what is right: a table cannot test itself.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamjobs import events as ev
from streamjobs.cursor import Cursor
from streamjobs.errors import Invalid
from streamjobs.events import ErrorInfo, Event, Usage
from streamjobs.job import TRANSITIONS, Caps, Fold, InvalidTransition, JobView, Status

ERROR = ErrorInfo("provider_error", "503", True)
QUEUED = ev.JobQueued(ts=1, kind="chat", owner="anna", input=msgspec.Raw(b'{"prompt":"Hi"}'))
DELAYED = ev.JobQueued(ts=1, kind="chat", owner="anna", delay_ms=5000)
HELD = ev.JobQueued(ts=1, kind="chat", owner="anna", held="owner_limit")
STARTED = ev.JobStarted(ts=10, attempt=1, worker="w1")
STARTED_AGAIN = ev.JobStarted(ts=50, attempt=2, worker="w2")
RETRYING = ev.JobRetrying(ts=20, attempt=1, error=ERROR, delay_ms=1000)
LOST = ev.JobLost(ts=20, worker="w1", crashes=1)
LOST_AGAIN = ev.JobLost(ts=20, worker="w1", crashes=2, delay_ms=1000)
REQUEUED = ev.JobRequeued(ts=30, why="timer")
WAITING = ev.JobWaiting(ts=20, waits_for="approval")
SLEEPING = ev.JobWaiting(ts=20, waits_for="timer", until=99)
PAUSED = ev.JobPaused(ts=25, by="anna")
RESUMED = ev.JobResumed(ts=26, by="anna")
CANCEL_REQUESTED = ev.JobCancelRequested(ts=27, by="anna")
COMPLETED = ev.JobCompleted(ts=90, result=msgspec.Raw(b'{"text":"Hello"}'))
FAILED = ev.JobFailed(ts=91, error=ErrorInfo("boom", "it broke"))
CANCELLED = ev.JobCancelled(ts=92, by="anna")
MINE = ev.Unknown(ts=15)


STORIES: dict[str, tuple[list[Event], dict[str, Any]]] = {
    "submitted": (
        [QUEUED],
        {
            "status": "queued",
            "kind": "chat",
            "owner": "anna",
            "queue": "default",
            "created_ms": 1,
            "attempt": 1,
            "input": {"prompt": "Hi"},
            "started_ms": None,
            "ended_ms": None,
            "cursor": "1-7",
        },
    ),
    "submitted for later": ([DELAYED], {"status": "scheduled", "input": None}),
    "submitted over the limit": ([HELD], {"status": "queued", "held": "owner_limit"}),
    "held, released": ([HELD, ev.JobRequeued(ts=2, why="released")], {"status": "queued", "held": ""}),
    "its time came": ([DELAYED, REQUEUED], {"status": "queued"}),
    "set aside by a take": (
        [QUEUED, ev.JobRequeued(ts=2, why="held", held="concurrency_key")],
        {"status": "queued", "held": "concurrency_key"},
    ),
    "taken": ([HELD, STARTED], {"status": "running", "worker": "w1", "started_ms": 10, "held": ""}),
    "an ordinary life": (
        [QUEUED, STARTED, COMPLETED],
        {"status": "completed", "result": {"text": "Hello"}, "ended_ms": 90, "error": None, "cursor": "3-7"},
    ),
    "it failed": (
        [QUEUED, STARTED, FAILED],
        {"status": "failed", "ended_ms": 91, "error": FAILED.error, "result": None},
    ),
    "one attempt failed": (
        [QUEUED, STARTED, RETRYING],
        {"status": "scheduled", "error": ERROR, "worker": ""},
    ),
    "the second went well": (
        [QUEUED, STARTED, RETRYING, REQUEUED, STARTED_AGAIN, COMPLETED],
        {"status": "completed", "attempt": 2, "error": None, "started_ms": 10, "worker": "w2"},
    ),
    "its worker died": ([QUEUED, STARTED, LOST], {"status": "queued", "crashes": 1, "worker": ""}),
    "its worker died again": ([QUEUED, STARTED, LOST_AGAIN], {"status": "scheduled", "crashes": 2}),
    "its worker died once too often": (
        [QUEUED, STARTED, LOST_AGAIN, FAILED],
        {"status": "failed", "crashes": 2, "ended_ms": 91},
    ),
    "another worker went on": ([QUEUED, STARTED, LOST, STARTED_AGAIN], {"status": "running", "worker": "w2"}),
    "its worker drained": (
        [QUEUED, STARTED, ev.JobRequeued(ts=20, why="yield")],
        {"status": "queued", "worker": ""},
    ),
    "it waits for somebody": (
        [QUEUED, STARTED, WAITING],
        {"status": "waiting", "waiting_for": "approval", "worker": ""},
    ),
    "somebody answered": (
        [
            QUEUED,
            STARTED,
            WAITING,
            ev.SignalReceived(ts=21, name="approval"),
            ev.JobRequeued(ts=21, why="signal"),
        ],
        {"status": "queued", "waiting_for": None},
    ),
    "it sleeps": ([QUEUED, STARTED, SLEEPING], {"status": "scheduled", "waiting_for": "timer"}),
    "it woke": (
        [QUEUED, STARTED, SLEEPING, ev.TimerFired(ts=99, key="s"), REQUEUED],
        {"status": "queued", "waiting_for": None},
    ),
    "paused before it ran": ([HELD, PAUSED], {"status": "paused", "held": ""}),
    "paused at work": ([QUEUED, STARTED, PAUSED], {"status": "paused", "worker": ""}),
    "paused while it waited": ([QUEUED, STARTED, WAITING, PAUSED], {"status": "paused", "waiting_for": None}),
    "paused while it slept": ([QUEUED, STARTED, SLEEPING, PAUSED], {"status": "paused", "waiting_for": None}),
    "resumed": ([QUEUED, STARTED, PAUSED, RESUMED, STARTED_AGAIN], {"status": "running"}),
    "cancelled before it ran": (
        [QUEUED, CANCEL_REQUESTED, CANCELLED],
        {"status": "cancelled", "cancel_requested": True, "ended_ms": 92},
    ),
    "cancelled at work": ([QUEUED, STARTED, CANCEL_REQUESTED, CANCELLED], {"status": "cancelled"}),
    "cancelled while it waited": (
        [QUEUED, STARTED, WAITING, CANCEL_REQUESTED, CANCELLED],
        {"status": "cancelled", "waiting_for": None},
    ),
    "cancelled while it slept": ([DELAYED, CANCEL_REQUESTED, CANCELLED], {"status": "cancelled"}),
    "cancelled while paused": ([QUEUED, PAUSED, CANCEL_REQUESTED, CANCELLED], {"status": "cancelled"}),
    "nobody took it in time": ([QUEUED, FAILED], {"status": "failed"}),
    "it waited too long": ([QUEUED, STARTED, WAITING, FAILED], {"status": "failed"}),
    "paused for too long": ([QUEUED, PAUSED, FAILED], {"status": "failed"}),
    "events of others change only the position": (
        [
            QUEUED,
            STARTED,
            MINE,
            ev.ChildSpawned(ts=16, job="j"),
            ev.ChildEnded(ts=17, job="j", status="failed"),
        ],
        {"status": "running", "cursor": "5-7"},
    ),
}


CAPS = Caps()


def folded(events: list[Event], caps: Caps = CAPS) -> Fold:
    fold = Fold("j0-x", caps)
    for seq, event in enumerate(events, 1):
        fold.apply(Cursor(seq, 7), event)
    return fold


def refuse(fold: Fold, event: Event) -> None:
    """The event is refused, and nothing of the view has changed."""
    before, at = msgspec.to_builtins(fold.view()), fold.cursor
    with pytest.raises(InvalidTransition):
        fold.apply(Cursor(at.seq + 1, 7), event)
    assert (msgspec.to_builtins(fold.view()), fold.cursor) == (before, at)


@pytest.mark.parametrize("story", STORIES)
def test_a_life_ends_where_it_should(story: str):
    """The status that a person, a list or a dashboard sees would be another one than what happened."""
    events, expected = STORIES[story]
    view = folded(events).view()
    assert {name: getattr(view, name) for name in expected} == expected


# --- what may follow what

BEFORE: dict[str, list[Event]] = {
    "queued": [QUEUED],
    "running": [QUEUED, STARTED],
    "scheduled": [DELAYED],
    "waiting": [QUEUED, STARTED, WAITING],
    "paused": [QUEUED, PAUSED],
    "completed": [QUEUED, STARTED, COMPLETED],
    "failed": [QUEUED, STARTED, FAILED],
    "cancelled": [QUEUED, CANCELLED],
}

# by hand: what the scripts and workers may write of a job in that state
POSSIBLE: dict[str, list[Event]] = {
    "queued": [STARTED, REQUEUED, PAUSED, FAILED, CANCELLED],
    "running": [RETRYING, WAITING, LOST, REQUEUED, PAUSED, COMPLETED, FAILED, CANCELLED],
    "scheduled": [REQUEUED, PAUSED, FAILED, CANCELLED],
    "waiting": [REQUEUED, PAUSED, FAILED, CANCELLED],
    "paused": [RESUMED, FAILED, CANCELLED],
    "completed": [],
    "failed": [],
    "cancelled": [],
}

MOVES: list[Event] = [
    QUEUED, STARTED, RETRYING, LOST, REQUEUED, WAITING, PAUSED, RESUMED, COMPLETED, FAILED, CANCELLED,
]  # fmt: skip

NO_MOVES: list[Event] = [
    MINE,
    CANCEL_REQUESTED,
    ev.JobProgress(percent=1.0),
    ev.JobLog(message="x"),
    ev.SignalReceived(name="x"),
    ev.TimerSet(key="k", delay_ms=1),
    ev.TimerFired(key="k"),
    ev.TurnStarted(turn=1),
    ev.TextDelta(turn=1, text="x"),
    ev.TurnCompleted(turn=1),
    ev.ToolCalled(call_id="c", tool="t"),
    ev.StepStarted(key="s"),
    ev.ChildSpawned(job="j"),
    ev.ArtifactCreated(name="n", media_type="m", size=1, where="w"),
]

PAIRS = [(status, move) for status, move in itertools.product(BEFORE, MOVES)]


@pytest.mark.parametrize(
    ("status", "move"), PAIRS, ids=lambda value: value if isinstance(value, str) else value.type
)
def test_what_may_follow_follows_and_nothing_else(status: str, move: Event):
    """A damaged log would be shown as if it were whole; or a whole one refused."""
    fold = folded(BEFORE[status])
    assert fold.status == status
    if move in POSSIBLE[status]:
        fold.apply(Cursor(fold.cursor.seq + 1, 7), move)
    else:
        refuse(fold, move)


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
@pytest.mark.parametrize("event", NO_MOVES, ids=lambda event: event.type)
def test_nothing_follows_the_end(status: str, event: Event):
    """Viewers stop reading at the end: what came after it would be seen by some and not by others."""
    refuse(folded(BEFORE[status]), event)


@pytest.mark.parametrize("status", ["queued", "running", "scheduled", "waiting", "paused"])
@pytest.mark.parametrize("event", NO_MOVES, ids=lambda event: event.type)
def test_other_events_do_not_move_a_job(status: str, event: Event):
    """A log line or a late signal would wake, or stop, a job in everybody's eyes."""
    fold = folded([*BEFORE[status], event])
    assert fold.status == status


@pytest.mark.parametrize("event", [*MOVES[1:], *NO_MOVES], ids=lambda event: event.type)
def test_a_log_begins_with_its_submission(event: Event):
    """A log that lost its beginning would be shown as a job without kind, owner and input."""
    refuse(Fold("j0-x"), event)


@pytest.mark.parametrize("seq", [0, 1, 2, 4, 100])
def test_a_hole_and_a_repetition_are_refused(seq: int):
    """A page read twice would double a sentence; one not read would lose it; nobody would know."""
    fold = folded([QUEUED, STARTED])
    before = msgspec.to_builtins(fold.view())
    with pytest.raises(InvalidTransition):
        fold.apply(Cursor(seq, 7), ev.TurnStarted(turn=1))
    assert msgspec.to_builtins(fold.view()) == before


@pytest.mark.parametrize("damage", [b"1e999", b'"\xff"', b"[" * 5000])
def test_content_that_cannot_be_read_changes_nothing(damage: bytes):
    """A result that no reader can decode would leave a view that says completed, at the position before."""
    fold = folded([QUEUED, STARTED])
    before = msgspec.to_builtins(fold.view())
    with pytest.raises(Invalid):
        fold.apply(Cursor(3, 7), ev.JobCompleted(ts=9, result=msgspec.Raw(damage)))
    assert msgspec.to_builtins(fold.view()) == before
    empty = Fold("j0-x")
    with pytest.raises(Invalid):
        empty.apply(Cursor(1, 7), ev.JobQueued(kind="k", owner="o", input=msgspec.Raw(damage)))
    assert msgspec.to_builtins(empty.view()) == msgspec.to_builtins(Fold("j0-x").view())


def test_the_terminal_states_are_these():
    """A state that is taken for the end by mistake leaves its job to nobody; the doctor and scripts know
    the same three."""
    assert {status.value for status in Status if status.is_terminal} == {"completed", "failed", "cancelled"}
    assert len(Status) == 8


# --- the diagram

DIAGRAM = Path(__file__).parents[2] / "docs" / "lifecycle.md"


def diagram() -> str:
    """The table as a Mermaid diagram, one arrow for all events that lead from one state to another."""
    lines = [
        "stateDiagram-v2",
        "    [*] --> queued: job.queued",
        "    [*] --> scheduled: job.queued, delayed",
    ]
    for status, row in TRANSITIONS.items():
        arrows: dict[str, list[str]] = {}
        for event, after in row.items():
            arrows.setdefault(after, []).append(event.type)
            if event is ev.JobLost:
                arrows.setdefault("scheduled", []).append("job.lost, again")
            if event is ev.JobWaiting:
                arrows.setdefault("scheduled", []).append("job.waiting for a timer")
        lines += [f"    {status} --> {after}: {' · '.join(types)}" for after, types in arrows.items()]
        lines += [f"    {status} --> [*]"] if status.is_terminal else []
    return "\n".join(lines)


def test_the_committed_diagram_is_the_table():
    """The picture people build alerts and integrations on would show another machine.

    After a change that is meant, put what the failure shows between the fences of docs/lifecycle.md.
    """
    assert f"```mermaid\n{diagram()}\n```" in DIAGRAM.read_text()


# --- text and tool calls

TURN = [QUEUED, STARTED, ev.TurnStarted(turn=1, model="m")]


def delta(text: str, attempt: int = 1, turn: int = 1) -> ev.TextDelta:
    return ev.TextDelta(turn=turn, text=text, attempt=attempt)


def restarted(attempt: int, turn: int = 1) -> ev.TurnRestarted:
    return ev.TurnRestarted(turn=turn, attempt=attempt, supersedes_from=3, model="m2")


def test_a_superseded_turn_leaves_nothing_behind():
    """After a crash the reader would see two half answers spliced, and a tool call that nobody made."""
    lost = [
        delta("Half a sen"),
        ev.ReasoningDelta(turn=1, text="Hm"),
        ev.ToolCalled(call_id="c1", tool="rm", turn=1),
    ]
    again = [delta("A whole "), delta("sentence.")]
    view = folded([*TURN, *lost, LOST, STARTED_AGAIN, ev.TurnRestarted(turn=1, attempt=2, supersedes_from=4),
                   *[msgspec.structs.replace(d, attempt=2) for d in again]]).view()  # fmt: skip
    assert view.text == "A whole sentence."
    assert view.reasoning == ""
    assert view.tool_calls == []
    assert [(turn.turn, turn.attempt, turn.text) for turn in view.turns] == [(1, 2, "A whole sentence.")]


def test_other_turns_stay():
    """Restarting the second turn would take the first one's text and calls away with it."""
    first = [
        delta("One. "),
        ev.ToolCalled(call_id="c1", tool="t", turn=1),
        ev.TurnCompleted(turn=1, usage=Usage(1, 2)),
    ]
    second = [ev.TurnStarted(turn=2), delta("Tw", turn=2), ev.ToolCalled(call_id="c2", tool="t", turn=2)]
    view = folded([*TURN, *first, *second, restarted(2, turn=2), delta("Two.", attempt=2, turn=2)]).view()
    assert view.text == "One. Two."
    assert [call.call_id for call in view.tool_calls] == ["c1"]
    assert [turn.turn for turn in view.turns] == [1, 2]
    assert view.usage == Usage(1, 2)


@given(st.lists(st.tuples(st.integers(1, 3), st.text(max_size=3)), max_size=20))
def test_only_the_standing_attempts_words_count(pieces: list[tuple[int, str]]):
    """A delta of an attempt that was given up, or of a turn that never began, would turn up in the answer."""
    events = [delta(text, attempt) for attempt, text in pieces]
    view = folded([*TURN, restarted(2), *events, delta("x", turn=9)]).view()
    assert view.text == "".join(text for attempt, text in pieces if attempt == 2)


def test_a_tool_call_is_followed_to_its_outcome():
    """The view would show a call as running for ever, or without what it gave."""
    calls = [ev.ToolCalled(call_id=f"c{n}", tool="t", arguments={"n": n}, turn=1) for n in range(5)]
    view = folded([
        *TURN, *calls,
        ev.ToolStarted(call_id="c1", idempotency_key="k", effect="pure"),
        ev.ToolCompleted(call_id="c2", output=[1], ms=5),
        ev.ToolFailed(call_id="c3", error=ERROR, ms=6),
        ev.ToolUnknown(call_id="c4", message="started once"),
        ev.ToolCompleted(call_id="nobody", output=1),
    ]).view()  # fmt: skip
    assert [(call.state, call.output, call.ms) for call in view.tool_calls] == [
        ("called", None, None), ("started", None, None), ("completed", [1], 5), ("failed", None, 6),
        ("unknown", None, None),
    ]  # fmt: skip
    assert view.tool_calls[3].error == ERROR
    assert view.tool_calls[4].error == ErrorInfo("unknown_outcome", "started once")


def test_calls_of_two_turns_that_share_an_id_are_two():
    """Some models number their calls anew in each turn: the second one's outcome would be written into
    the first."""
    call = ev.ToolCalled(call_id="call_0", tool="t", turn=1)
    again = ev.ToolCalled(call_id="call_0", tool="t", turn=2)
    done = [ev.ToolCompleted(call_id="call_0", output=n) for n in (1, 2)]
    view = folded([*TURN, call, done[0], ev.TurnStarted(turn=2), again, done[1]]).view()
    assert [call.output for call in view.tool_calls] == [1, 2]


def test_the_rest_of_the_view_is_folded():
    """Steps, progress, usage, artifacts and log lines are what a workflow's page consists of."""
    view = folded(
        [
            *TURN,
            ev.JobProgress(percent=10.0),
            ev.JobProgress(percent=20.0, step=1, steps=5, message="scan"),
            ev.StepStarted(key="a"),
            ev.StepCompleted(key="a", output=1),
            ev.StepStarted(key="b", attempt=2),
            ev.StepFailed(key="b", error=ERROR),
            ev.StepCompleted(key="unheard", output=3),
            ev.JobLog(ts=5, level="info", message="m", data=1),
            ev.ArtifactCreated(name="n", media_type="t", size=3, where="w"),
            ev.TurnCompleted(turn=1, finish_reason="stop", usage=Usage(1, 2)),
            ev.TurnCompleted(turn=2, usage=Usage(10, 20)),
        ]
    ).view()
    assert (view.progress.percent, view.progress.steps) == (20.0, 5) if view.progress else False
    assert [(s.key, s.state, s.attempt, s.output, s.error) for s in view.steps] == [
        ("a", "completed", 1, 1, None), ("b", "failed", 2, None, ERROR), ("unheard", "completed", 1, 3, None),
    ]  # fmt: skip
    assert [(line.ts, line.message, line.data) for line in view.log_lines] == [(5, "m", 1)]
    assert [artifact.where for artifact in view.artifacts] == ["w"]
    assert view.usage == Usage(11, 22)
    assert (view.turns[0].finish_reason, view.turns[0].usage) == ("stop", Usage(1, 2))


# --- views and cost

EVERYTHING: list[Event] = [
    *TURN,
    delta("a"),
    ev.ToolCalled(call_id="c", tool="t", turn=1),
    ev.StepStarted(key="s"),
    ev.JobLog(message="m"),
    ev.ArtifactCreated(name="n", media_type="t", size=1, where="w"),
    ev.ReasoningDelta(turn=1, text="r"),
    delta("b"),
    ev.ToolCompleted(call_id="c", output=1),
    ev.StepCompleted(key="s", output=1),
    ev.JobLog(message="m2"),
    ev.ArtifactCreated(name="n2", media_type="t", size=1, where="w"),
    ev.TurnCompleted(turn=1, finish_reason="stop"),
    ev.TurnStarted(turn=2),
    delta("c", turn=2),
    restarted(2),
    delta("d", attempt=2),
    COMPLETED,
]


def test_a_view_is_not_changed_by_what_comes_later():
    """A snapshot kept for one viewer would change under it when another one reads on."""
    fold = Fold("j0-x")
    views: list[tuple[JobView, Any]] = []
    for seq, event in enumerate(EVERYTHING, 1):
        fold.apply(Cursor(seq, 7), event)
        view = fold.view()
        views.append((view, msgspec.to_builtins(view)))
    assert all(msgspec.to_builtins(view) == as_it_was for view, as_it_was in views)


def test_looking_does_not_change_what_follows():
    """A job that was watched would end with another text than one that was not."""
    watched = Fold("j0-x")
    for seq, event in enumerate(EVERYTHING, 1):
        watched.apply(Cursor(seq, 7), event)
        watched.view()
    assert watched.view() == folded(EVERYTHING).view()


def test_a_view_goes_through_json_unchanged():
    """The gateway sends JSON; the client's view would differ from the gateway's."""
    view = folded(EVERYTHING).view()
    assert msgspec.json.decode(msgspec.json.encode(view), type=JobView) == view


class Counted(str):
    """A string that counts being joined one by one, and being compared."""

    sums = 0
    comparisons = 0
    __hash__ = str.__hash__

    def __add__(self, other: str) -> str:
        Counted.sums += 1
        return str(self) + other

    def __radd__(self, other: str) -> str:
        Counted.sums += 1
        return other + str(self)

    def __eq__(self, other: object) -> bool:
        Counted.comparisons += 1
        return str.__eq__(self, other)


def test_folding_n_events_costs_n():
    """An answer of 100,000 tokens would be copied 100,000 times, and a job of many steps searched for
    each one."""
    n = 2000
    Counted.sums = Counted.comparisons = 0
    deltas = [delta(Counted("ab")) for _ in range(n)]
    steps = [event for i in range(n) for event in (
        ev.StepStarted(key=Counted(f"s{i}")), ev.StepCompleted(key=Counted(f"s{i}")),
    )]  # fmt: skip
    calls = [event for i in range(n) for event in (
        ev.ToolCalled(call_id=Counted(f"c{i}"), tool="t", turn=1), ev.ToolCompleted(call_id=Counted(f"c{i}")),
    )]  # fmt: skip
    view = folded([*TURN, *deltas, *steps, *calls], Caps(steps=2 * n)).view()
    assert len(view.text) == 2 * n
    assert (len(view.steps), len(view.tool_calls)) == (n, n)
    assert Counted.sums == 0
    assert Counted.comparisons <= 8 * n
