"""Folds that are put away and taken up again, and views that stay bounded."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamjobs import events as ev
from streamjobs.bounded import Spoken, cut_items
from streamjobs.cursor import Cursor
from streamjobs.events import Event
from streamjobs.job import STATE_SCHEMA, Caps, Fold, UnknownState
from tests.logs import random_log

SMALL = Caps(text=60, log_lines=4, steps=3, output=30)
"""Small enough that logs of a few dozen events meet every bound."""

START: list[Event] = [ev.JobQueued(ts=1, kind="k", owner="o"), ev.JobStarted(ts=2, attempt=1, worker="w")]


def fold_on(fold: Fold, events: list[Event]) -> Fold:
    for event in events:
        fold.apply(Cursor(fold.cursor.seq + 1, 7), event)
    return fold


def folded(events: list[Event], caps: Caps = SMALL) -> Fold:
    return fold_on(Fold("j0-x", caps), events)


@given(st.integers(), st.integers(1, 90), st.sampled_from([SMALL, Caps()]))
def test_a_fold_taken_up_anywhere_gives_what_the_whole_log_gives(seed: int, length: int, caps: Caps):
    """A viewer who joins from a snapshot would see another job than one who saw it from its beginning."""
    events = random_log(seed, length)
    whole = Fold("j0-x", caps)
    for k, event in enumerate(events, 1):
        whole.apply(Cursor(k, 7), event)
        taken_up = Fold.restore(whole.state(), caps)
        assert taken_up.view() == whole.view()
        assert taken_up.state() == whole.state()
        if k % 7 == 0:
            rest = fold_on(taken_up, events[k:])
            assert rest.view() == folded(events, caps).view()
            assert rest.state() == folded(events, caps).state()


@given(st.integers())
def test_what_a_view_shows_is_bounded(seed: int):
    """One runaway job would make everybody's view of it grow until the gateway dies."""
    view = folded(random_log(seed, 300)).view()
    assert len(view.text) <= 60
    assert len(view.reasoning) <= 60
    assert len(view.log_lines) <= 4
    for shown in (view.turns, view.tool_calls, view.steps, view.artifacts, view.approvals, view.children):
        assert len(shown) <= 3
    for call in view.tool_calls:
        assert len(msgspec.json.encode(call.output)) <= 64
        assert len(msgspec.json.encode(call.arguments)) <= 64


def test_the_newest_text_stands_and_the_rest_is_counted():
    """A browser appends what comes to what it has: cut at its end, an answer would have a gap inside."""
    words = [f"w{n:02} " for n in range(40)]
    said = [ev.TurnStarted(turn=1), *[ev.TextDelta(turn=1, text=word) for word in words[:20]],
            ev.TurnStarted(turn=2), *[ev.TextDelta(turn=2, text=word) for word in words[20:]]]  # fmt: skip
    view = folded([*START, *said]).view()
    assert "".join(words).endswith(view.text)
    assert len(view.text) + view.truncated["text"] == 4 * len(words)
    assert 45 <= len(view.text) <= 60
    assert "".join(turn.text for turn in view.turns) == view.text


def test_superseded_text_is_no_longer_counted():
    """Text that nobody sees any more would push out what everybody sees."""
    lost = [ev.TurnStarted(turn=1), ev.TextDelta(turn=1, text="x" * 50)]
    again = [ev.TurnRestarted(turn=1, attempt=2, supersedes_from=3)]
    view = folded([*START, *lost, *again, ev.TextDelta(turn=1, attempt=2, text="y" * 50)]).view()
    assert (view.text, view.truncated) == ("y" * 50, {})


def test_the_newest_lines_steps_and_calls_stand_and_the_rest_is_counted():
    """A long job's page would show its first minutes for ever, or would not say that it shows a part only."""
    events: list[Event] = [*START, ev.TurnStarted(turn=1)]
    for n in range(10):
        events += [ev.JobLog(message=f"m{n}"), ev.StepStarted(key=f"s{n}")]
        events += [ev.ToolCalled(call_id=f"c{n}", tool="t", turn=1), ev.ArtifactCreated(
            name=f"a{n}", media_type="t", size=1, where="w")]  # fmt: skip
    view = folded(events).view()
    assert [line.message for line in view.log_lines][-1] == "m9"
    assert [step.key for step in view.steps][-1] == "s9"
    assert [call.call_id for call in view.tool_calls][-1] == "c9"
    for name in ("log_lines", "steps", "tool_calls", "artifacts"):
        assert len(getattr(view, name)) + view.truncated[name] == 10
    assert (view.metrics.tool_calls, view.metrics.steps) == (10, 10)


def test_an_output_that_is_too_large_shows_its_beginning_and_its_size():
    """A tool that answered a megabyte would be in every view of its job, for every viewer."""
    big = {"rows": ["x" * 100]}
    events: list[Event] = [
        *START, ev.ToolCalled(call_id="c", tool="t"), ev.ToolCompleted(call_id="c", output=big),
        ev.StepCompleted(key="s", output="z" * 100), ev.StepCompleted(key="t", output="short"),
    ]  # fmt: skip
    view = folded(events).view()
    (call,) = view.tool_calls
    assert (call.output, call.output_bytes) == ('{"rows":["xxxxxxxxxxxxxxxxxxxx', 113)
    assert [(step.output, step.output_bytes) for step in view.steps] == [("z" * 30, 102), ("short", 0)]
    assert view.truncated == {"outputs": 2}


def test_the_outcome_of_a_call_that_is_not_shown_any_more_changes_no_other_one():
    """The outcome of an old call would be written into a new one of the same place."""
    calls = [ev.ToolCalled(call_id=f"c{n}", tool="t") for n in range(4)]
    view = folded([*START, *calls, ev.ToolCompleted(call_id="c0", output=1)]).view()
    assert [call.call_id for call in view.tool_calls] == ["c1", "c2", "c3"]
    assert {call.state for call in view.tool_calls} == {"called"}


@pytest.mark.parametrize(
    "damage", [b"", b"{}", b"\xff", b'{"schema":1,"view":{"id":"j","cursor":"?"},"reasoning":[]}']
)
def test_what_is_no_state_is_refused(damage: bytes):
    """A snapshot that cannot be read would pass for a job without events."""
    with pytest.raises(UnknownState):
        Fold.restore(damage)


def test_the_state_of_another_release_is_refused():
    """Two releases run side by side: one would go on from what the other meant otherwise."""
    state = folded(START).state()
    other = state.replace(b'"schema":%d' % STATE_SCHEMA, b'"schema":%d' % (STATE_SCHEMA + 1), 1)
    assert other != state
    with pytest.raises(UnknownState):
        Fold.restore(other)


def test_folding_past_the_bounds_costs_n(monkeypatch: pytest.MonkeyPatch):
    """A long answer would be copied once for each of its words after the view is full."""
    copied: list[int] = []
    drop = Spoken.drop
    monkeypatch.setattr(Spoken, "drop", lambda said, n: (copied.append(said.size), drop(said, n)))
    caps = Caps(text=1000)
    words = [ev.TextDelta(turn=1, text="a" * 10)] * 20_000
    view = folded([*START, ev.TurnStarted(turn=1), *words], caps).view()
    assert view.truncated["text"] + len(view.text) == 200_000
    assert sum(copied) < 5 * 200_000


def test_a_quarter_leaves_at_once():
    """A job of many steps would have them all copied for each new one."""
    items = {n: str(n) for n in range(9)}
    assert cut_items(items, 9) == (items, [])
    kept, left = cut_items(items, 8)
    assert list(kept) == [3, 4, 5, 6, 7, 8]
    assert left == ["0", "1", "2"]
