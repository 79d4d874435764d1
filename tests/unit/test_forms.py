"""Forms of a piece of a log: fewer events where that is asked for, and never other content."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from streamjobs.cursor import Cursor
from streamjobs.events import JobProgress, ReasoningDelta, TextDelta, encode_event
from streamjobs.gateway.forms import Rendered, members, merged, merged_members, parts_of, plain
from streamjobs.gateway.ring import Chunk
from streamjobs.gateway.sse import event_frame
from streamjobs.store import Entry

INSTANTS = st.integers(0, 9)
WRITTEN = st.one_of(
    st.builds(
        TextDelta, ts=st.integers(0, 9), turn=st.integers(1, 2), attempt=st.integers(1, 2), text=st.text()
    ),
    st.builds(ReasoningDelta, ts=st.integers(0, 9), turn=st.just(1), text=st.text()),
    st.builds(JobProgress, ts=st.integers(0, 9), message=st.text()),
)


def chunk(*events: Any) -> Chunk:
    frames = [
        event_frame(Entry(Cursor(seq, 7), event.type, encode_event(event)))
        for seq, event in enumerate(events, 1)
    ]
    return Chunk(frames, Cursor(len(frames), 7))


def text(turn: int, text: str, **more: Any) -> TextDelta:
    return TextDelta(ts=1, turn=turn, text=text, **more)


def shown(rendered: Rendered) -> list[tuple[str, str, Any]]:
    """The events of a rendering as (id, type, data)."""
    found = [(p.id.decode(), p.name.decode(), json.loads(p.data)) for p in parts_of(rendered.body)]
    assert len(found) == rendered.events
    return found


def test_deltas_of_one_text_become_one_event():
    """A browser would handle a hundred events a second where ten say the same."""
    events = shown(chunk(text(1, "a"), text(1, "b"), TextDelta(ts=3, turn=1, text="c")).rendered(merged))
    assert events == [("3-7", "text.delta", {"ts": 3, "turn": 1, "text": "abc"})]


def test_what_is_not_one_text_stays_apart():
    """Two generations of a turn, or reasoning and answer, would be spliced."""
    piece = chunk(
        text(1, "a"),
        ReasoningDelta(ts=1, turn=1, text="b"),
        text(1, "c"),
        text(1, "d", attempt=2),
        text(2, "e"),
        JobProgress(ts=1, percent=5),
        text(2, "f"),
    )
    assert shown(piece.rendered(merged)) == shown(piece.rendered(plain))


def test_viewers_share_what_is_rendered():
    """A thousand viewers must cost one merge."""
    piece = chunk(text(1, "a"), text(1, "b"))
    assert piece.rendered(merged) is piece.rendered(merged)


@given(st.lists(WRITTEN, min_size=1, max_size=12))
def test_merging_changes_no_text_and_no_order(events: list[Any]):
    """Whatever is merged, a fold of it must come to the same view at the same cursor."""
    piece = chunk(*events)
    whole, less = shown(piece.rendered(plain)), shown(piece.rendered(merged))
    assert less[-1][0] == whole[-1][0]
    assert joined(less) == joined(whole)
    assert {event[0] for event in less} <= {event[0] for event in whole}
    assert all(_same_text(a, b) is False for a, b in pairwise(less))


def joined(events: list[tuple[str, str, Any]]) -> list[tuple[str, Any, str]]:
    """(type, all but ts and text, text), neighbours of one text as one."""
    runs: list[tuple[str, Any, str]] = []
    for _, kind, data in events:
        rest = {name: value for name, value in data.items() if name not in {"ts", "text"}}
        if runs and "text" in data and runs[-1][:2] == (kind, rest):
            runs[-1] = (kind, rest, runs[-1][2] + data["text"])
        else:
            runs.append((kind, rest, data.get("text", "")))
    return runs


def _same_text(a: tuple[str, str, Any], b: tuple[str, str, Any]) -> bool:
    return "text" in a[2] and "text" in b[2] and joined([a])[0][:2] == joined([b])[0][:2]


@given(st.lists(WRITTEN, min_size=1, max_size=12))
def test_members_are_the_events_of_an_array(events: list[Any]):
    """What a WebSocket carries would not be JSON, or not say what the stream says."""
    piece = chunk(*events)
    for frames, array in ((plain, members), (merged, merged_members)):
        inside = piece.rendered(array)
        found = json.loads(b"[%b]" % inside.body)
        assert [(e["id"], e["type"], e["data"]) for e in found] == shown(piece.rendered(frames))
        assert len(found) == inside.events
