"""The SSE parser: what a provider sends is what the decoders see, however the network cuts it."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamjobs.errors import ProviderError
from streamjobs.llm.sse import EventParser, ServerSentEvent


def parse(*chunks: bytes, close: bool = False, max_bytes: int = 10_000) -> list[tuple[str, bytes]]:
    parser = EventParser(max_bytes)
    events = [event for chunk in chunks for event in parser.feed(chunk)]
    events += parser.close() if close else []
    return [(event.event, event.data) for event in events]


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
def test_every_line_end_of_the_standard_ends_a_line(end: bytes) -> None:
    """Without it, answers of a server behind a proxy that writes CRLF would never come."""
    stream = end.join([b"event: a", b"data: 1", b"data: 2", b"", b"data: 3", b"", b""])
    assert parse(stream) == [("a", b"1\n2"), ("", b"3")]


STREAM = (
    b"\xef\xbb\xbfdata: first\r\n\r\n"
    b": comment\r\rdata:tight\n\nevent: ping\r\ndata: {}\r\n\r\n"
    b"id: 7\nretry: 10\ndata\ndata:  two spaces\n\n" + "data: a\u2028b\x85c\x0bd \U0001f600\r\r".encode()
)
EVENTS = [
    ("", b"first"),
    ("", b"tight"),
    ("ping", b"{}"),
    ("", b"\n two spaces"),
    ("", "a\u2028b\x85c\x0bd \U0001f600".encode()),
]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 1000])
def test_chunks_of_any_size_give_the_same_events(size: int) -> None:
    """Without it, an answer would change with the weather on the network."""
    chunks = [STREAM[start : start + size] for start in range(0, len(STREAM), size)]
    assert parse(*chunks) == EVENTS


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_no_cut_changes_the_events(cuts: list[int]) -> None:
    """A cut between CR and LF, inside the BOM or inside a character must not show."""
    places = [0, *sorted(cuts), len(STREAM)]
    assert parse(*[STREAM[a:b] for a, b in pairwise(places)]) == EVENTS


def reference(stream: bytes) -> list[tuple[str, bytes]]:
    """The standard's algorithm over a whole stream, one line after the other."""
    events: list[tuple[str, bytes]] = []
    name, data = "", []
    lines = stream.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    for line in lines[:-1]:
        field, _, value = line.partition(b":")
        value = value[1:] if value[:1] == b" " else value
        if not line:
            events += [(name, b"\n".join(data))] if data else []
            name, data = "", []
        elif field == b"data":
            data.append(value)
        elif field == b"event":
            name = value.decode()
    return events


TOKENS = [b"data", b"event", b":", b" ", b"x", b"\n", b"\r", b"\r\n", b"id: 1", b": ping", b"data: y\n\n"]


@given(st.lists(st.sampled_from(TOKENS), max_size=40), st.integers(1, 5))
def test_any_bytes_are_read_as_the_standard_says(tokens: list[bytes], size: int) -> None:
    """Servers that write SSE by hand write it oddly; a reader of its own invention would misread some."""
    stream = b"".join(tokens)
    assert parse(*[stream[i : i + size] for i in range(0, len(stream), size)]) == reference(stream)


def test_a_carriage_return_ends_the_event_at_once() -> None:
    """A parser that waits for the LF behind a CR would show every token one token late."""
    assert parse(b"data: now\r\r") == [("", b"now")]


def test_comments_make_no_event_and_empty_data_makes_one_without_progress() -> None:
    """If keep-alives counted as progress, a provider that hangs would hang its job for ever."""
    parser = EventParser()
    assert parser.feed(b": OPENROUTER PROCESSING\n\n: ping\n\n\n\n") == []
    (empty,) = parser.feed(b"data:\n\n")
    assert empty == ServerSentEvent("", b"") and not empty.is_progress
    assert not ServerSentEvent("ping", b"{}").is_progress
    assert ServerSentEvent("", b"x").is_progress


def test_the_last_event_needs_no_blank_line() -> None:
    """Servers end with `data: [DONE]` and no line end; dropping it would make the answer look truncated."""
    assert parse(b"data: 1\n\ndata: [DONE]", close=True) == [("", b"1"), ("", b"[DONE]")]
    assert parse(b"data: 1\n", close=True) == [("", b"1")]
    assert parse(b"data: 1\n\n", close=True) == [("", b"1")]


def test_a_line_without_end_is_refused_before_it_fills_the_memory() -> None:
    """A broken proxy that sends gigabytes without a line end would take the worker down with all its jobs."""
    parser = EventParser(max_bytes=100)
    parser.feed(b"data: " + b"x" * 90)
    with pytest.raises(ProviderError, match="over 100 bytes"):
        parser.feed(b"x" * 20)


def test_an_event_of_many_lines_is_bounded_too() -> None:
    """The same, by way of endless small `data` lines."""
    with pytest.raises(ProviderError, match="over 100 bytes"):
        parse(*[b"data: xxxxxxxx\n"] * 20, max_bytes=100)


def test_what_an_event_used_is_free_again_for_the_next() -> None:
    """A bound that never came back would end every long answer."""
    assert len(parse(*[b"data: " + b"x" * 90 + b"\n\n"] * 50, max_bytes=100)) == 50


def test_id_and_retry_come_with_their_event() -> None:
    """Our own client resumes by the one, and waits by the other; a hostile number must not raise."""
    parser = EventParser()
    (first,) = parser.feed(b"id: 7-1\nretry: 500\ndata: a\n\nretry: " + b"9" * 5000 + b"\nid: a\x00b\n")
    assert (first.id, first.retry) == ("7-1", 500)
    (second,) = parser.feed(b"data: b\n\n")
    assert (second.id, second.retry) == ("7-1", None)
