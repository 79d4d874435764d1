"""The forms in which a piece of a log is given to its viewers. Pure.

A form takes the frames of consecutive events, one after another, and renders them otherwise; see
`Chunk.rendered`, which does so once for all who want that form of the same piece.

    plain     as they are
    merged    as frames, but consecutive deltas of one text are one event, whose id is the last one's
    members   `{"id","type","data"}` of each event, with commas between: the inside of a JSON array
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any, NamedTuple

import msgspec

from streamjobs.events import encode_json

DELTAS = frozenset({b"text.delta", b"reasoning.delta"})
"""What is merged."""


class Rendered(NamedTuple):
    """Bytes, and how many events they are."""

    body: bytes
    events: int


Form = Callable[[Rendered], Rendered]


class Parts(NamedTuple):
    """A frame taken apart: the cursor's text, the event's name, its JSON."""

    id: bytes
    name: bytes
    data: bytes


def parts_of(frames: bytes) -> Iterator[Parts]:
    """Take frames of `sse.event_frame` apart: each is three lines and an empty one."""
    lines = iter(frames.split(b"\n"))
    for cursor, name, data, _ in zip(lines, lines, lines, lines, strict=False):
        yield Parts(cursor[4:], name[7:], data[6:])


def plain(frames: Rendered) -> Rendered:
    """The frames as they are."""
    return frames


def merged(frames: Rendered) -> Rendered:
    """The frames with consecutive deltas of one text as one event."""
    runs = groupby(parts_of(frames.body), key=lambda parts: parts.name)
    bodies = [body for _, run in runs for body in _merge(list(run))]
    return Rendered(b"".join(bodies), len(bodies))


def members(frames: Rendered) -> Rendered:
    """The inside of a JSON array with an object for each event."""
    body = b",".join(b'{"id":"%b","type":"%b","data":%b}' % parts for parts in parts_of(frames.body))
    return Rendered(body, frames.events)


def merged_members(frames: Rendered) -> Rendered:
    """As `members`, of what `merged` makes of the frames."""
    return members(merged(frames))


def _merge(run: list[Parts]) -> Iterator[bytes]:
    """The frames of a run, which of deltas are as few as their other fields allow."""
    if len(run) == 1 or run[0].name not in DELTAS:
        yield from map(_frame, run)
        return
    deltas = [(parts, msgspec.json.decode(parts.data)) for parts in run]
    for _, same in groupby(deltas, key=lambda delta: _other_fields(delta[1])):
        yield _joined(list(same))


def _other_fields(delta: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in delta.items() if name not in {"ts", "text"}}


def _joined(same: list[tuple[Parts, dict[str, Any]]]) -> bytes:
    last, delta = same[-1]
    if len(same) == 1:
        return _frame(last)
    text = "".join(delta["text"] for _, delta in same)
    return _frame(Parts(last.id, last.name, encode_json(delta | {"text": text})))


def _frame(parts: Parts) -> bytes:
    return b"id: %b\nevent: %b\ndata: %b\n\n" % parts
