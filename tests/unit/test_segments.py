"""Sealed pieces of a log: what goes in comes out, and what is damaged says so."""

from __future__ import annotations

from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamjobs import events as ev
from streamjobs import segments
from streamjobs.cursor import Cursor
from streamjobs.segments import DamagedSegment, Entry, Segment
from tests.logs import random_log, stored


def entries_of(contents: list[tuple[int, str, bytes]], first: int = 1) -> list[Entry]:
    return [Entry(Cursor(seq, epoch), kind, data) for seq, (epoch, kind, data) in enumerate(contents, first)]


CONTENTS = st.one_of(
    st.binary(),
    st.sampled_from(
        [b"", b"{}", b'{"ts":5}', b'{"ts":05,"a":1}', b'{"ts":5,', b'{"ts":-5,"a":1}', b"aba", b"ab"]
    ),
    st.builds(lambda ts, rest: b'{"ts":%d,%s}' % (ts, rest), st.integers(0, 10**20), st.binary(max_size=9)),
    st.builds(
        lambda ts, n: b'{"ts":%d,"turn":1,"text":"%d"}' % (ts, n), st.integers(0, 99), st.integers(0, 999)
    ),
)
ROWS = st.tuples(st.sampled_from([5, 5, 5, 10**15]), st.sampled_from(["text.delta", "x.\u00fc"]), CONTENTS)


@given(st.lists(ROWS, min_size=1, max_size=30), st.integers(1, 10**9))
def test_what_is_sealed_is_read_back_byte_for_byte(contents: list[tuple[int, str, bytes]], first: int):
    """A viewer that replays an old answer would get other words than those who saw it live."""
    entries = entries_of(contents, first)
    assert segments.decode(segments.encode(entries)) == entries


def test_an_answer_takes_little_more_than_its_text_alone():
    """Ten thousand finished chats would take twice the memory: their text is in the log three times."""
    random = Random(1)
    words = [f" {''.join(random.choices('etaoinshrdlu', k=random.randint(2, 9)))}" for _ in range(1000)]
    text, stamps = "".join(words), [1_700_000_000_000 + 22 * n + random.randint(0, 7) for n in range(1000)]
    said = [ev.TextDelta(ts=ts, turn=1, text=word) for ts, word in zip(stamps, words, strict=True)]
    usage = ev.Usage(12, 1000)
    log = [ev.TurnStarted(turn=1), *said, ev.TurnCompleted(turn=1, text=text, usage=usage)]
    log.append(ev.JobCompleted(result=msgspec.Raw(ev.encode_json({"text": text}))))
    entries = [Entry(Cursor(seq, 5), event.type, ev.encode_event(event)) for seq, event in enumerate(log, 1)]
    blob = segments.encode(entries)
    assert segments.decode(blob) == entries
    alone = len(segments.compress(text.encode()))
    assert len(blob) < alone + 1400, "a byte for each token says when it came and where it ends"


def test_any_number_of_types_is_kept():
    """A job that emits hundreds of kinds of its own events could not be sealed."""
    entries = entries_of([(1, f"x.kind{n}", b"{}") for n in range(600)])
    assert segments.decode(segments.encode(entries)) == entries


def test_a_hole_cannot_be_sealed():
    """Events on its far side would be read under the seqs of others."""
    first, _, third = entries_of([(1, "x.a", b"{}")] * 3)
    with pytest.raises(ValueError, match="cannot follow"):
        segments.encode([first, third])


@given(st.lists(st.integers(0, 300_000), min_size=1, max_size=12))
def test_segments_are_bounded_and_leave_nothing_out(sizes: list[int]):
    """One huge segment would have to be read for a single event; a lost entry is a hole in the log."""
    entries = entries_of([(1, "x.a", b"x" * size) for size in sizes])
    parts = [list(part) for part in segments.split(entries)]
    assert [entry for part in parts for entry in part] == entries
    assert all(len(part) == 1 or segments.describe(part).size <= segments.SEGMENT_BYTES for part in parts)


def test_a_segment_has_at_most_2000_events():
    """Decoding one page of tiny events would take the gateway's loop for long."""
    entries = entries_of([(1, "x.a", b"1")] * 4001)
    assert [len(part) for part in segments.split(entries)] == [2000, 2000, 1]
    assert list(segments.split([])) == []


def test_the_index_is_read_as_it_is_written():
    """Nobody would find the segment that holds a cursor."""
    entries = entries_of([(7, "x.a", b"123"), (9, "x.a", b"4")], first=5)
    segment = segments.describe(entries)
    assert segment == Segment(5, Cursor(6, 9), 4)
    assert segments.parse_index(f"{segment}\n{segment}\n") == [segment, segment]


@pytest.mark.parametrize("damage", [b"", b"nonsense", segments.compress(b"nonsense"),
                                    segments.encode(entries_of([(1, "x.a", b"1")] * 50))[:-9]])  # fmt: skip
def test_damage_is_reported(damage: bytes):
    """A broken blob would pass for a log without events."""
    with pytest.raises(DamagedSegment):
        segments.decode(damage)


@pytest.mark.parametrize("line", ["1 2-3", "a 2-3 4", "1 2 3"])
def test_a_damaged_index_is_reported(line: str):
    """A line that is passed over is a segment that nobody reads."""
    with pytest.raises(DamagedSegment):
        segments.parse_index(line)


def test_a_log_of_words_takes_a_fraction():
    """Sealing would cost a projector's time and save nothing."""
    entries = stored(random_log("size", 2000))
    plain = sum(len(entry.data) for entry in entries)
    assert len(segments.encode(entries)) < plain / 5


def test_an_answer_takes_little_more_than_its_text():
    """Ten thousand finished chats would take several times what people said in them."""
    random = Random(1)
    words = ["".join(random.choices("etaoinshrdlu", k=random.randint(2, 9))) for _ in range(400)]
    texts = [" ".join(random.choices(words, k=6)) + " " for _ in range(200)]
    said = [ev.TextDelta(ts=1_700_000_000_000 + 131 * n, turn=1, text=text) for n, text in enumerate(texts)]
    blob = segments.encode(entries_of([(7, event.type, ev.encode_event(event)) for event in said]))
    assert len(blob) < 1.15 * len(segments.compress("".join(texts).encode()))
