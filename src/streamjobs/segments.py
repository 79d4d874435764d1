"""Sealed pieces of a log: many events in one compressed blob. Pure.

Rule 1: a segment says everything the stream said: decoding gives the same entries, byte for byte.
Rule 2: a segment never changes; its first seq and its last id name what is in it.
Rule 3: seqs within one are dense, so only the first is written down.

A blob is zstd over msgpack: contents beside contents, epochs as runs, types as a table. Events of one job
say much the same over and over; together they take about a tenth of what they take in a stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import NamedTuple

import msgspec
import zstandard

from streamjobs.cursor import Cursor
from streamjobs.errors import StreamjobsError

SEGMENT_EVENTS = 2000
SEGMENT_BYTES = 256 * 1024
FORMAT = 1


class DamagedSegment(StreamjobsError):  # noqa: N818 - named after what happened, as all of ours
    """A segment that cannot be read: the store's content is damaged."""

    code = "damaged_segment"


class Entry(NamedTuple):
    """One event as it is stored: `data` is one line of JSON."""

    cursor: Cursor
    type: str
    data: bytes


class Segment(NamedTuple):
    """A sealed piece of a log: the seq of its first event, the id of its last, bytes of contents."""

    first: int
    last: Cursor
    size: int

    def __str__(self) -> str:
        return f"{self.first} {self.last} {self.size}"


class _Columns(msgspec.Struct, array_like=True, frozen=True):
    format: int
    first: int
    epochs: list[tuple[int, int]]
    """Runs: an epoch, and how many events in a row have it."""
    types: list[str]
    kinds: bytes | list[int]
    """Of each event, its type's place in the table."""
    contents: list[bytes]


_decoder = msgspec.msgpack.Decoder(_Columns)


def split(entries: Sequence[Entry]) -> Iterator[Sequence[Entry]]:
    """Cut entries into segments of at most 2,000 events and about 256 KB; a larger event has its own."""
    start, size = 0, 0
    for at, entry in enumerate(entries):
        if at > start and (at - start >= SEGMENT_EVENTS or size + len(entry.data) > SEGMENT_BYTES):
            yield entries[start:at]
            start, size = at, 0
        size += len(entry.data)
    if start < len(entries):
        yield entries[start:]


def describe(entries: Sequence[Entry]) -> Segment:
    """What the index says of these entries."""
    return Segment(entries[0].cursor.seq, entries[-1].cursor, sum(len(entry.data) for entry in entries))


def encode(entries: Sequence[Entry]) -> bytes:
    """Make a segment of entries that follow one another without a hole."""
    places: dict[str, int] = {}
    kinds = [places.setdefault(entry.type, len(places)) for entry in entries]
    columns = _Columns(
        FORMAT,
        entries[0].cursor.seq,
        list(_runs(entries)),
        list(places),
        bytes(kinds) if len(places) <= 256 else kinds,
        [entry.data for entry in entries],
    )
    return compress(msgspec.msgpack.encode(columns))


def _runs(entries: Sequence[Entry]) -> Iterator[tuple[int, int]]:
    epoch, count, seq = entries[0].cursor.epoch, 0, entries[0].cursor.seq
    for cursor, _, _ in entries:
        if cursor.seq != seq:
            raise ValueError(f"event {cursor.seq} cannot follow {seq - 1}")
        if cursor.epoch != epoch:
            yield epoch, count
            epoch, count = cursor.epoch, 0
        count, seq = count + 1, seq + 1
    yield epoch, count


def decode(blob: bytes) -> list[Entry]:
    """The entries of a segment. Raises `DamagedSegment`."""
    try:
        columns = _decoder.decode(decompress(blob))
        if columns.format != FORMAT:
            raise DamagedSegment(f"a segment of format {columns.format}, not {FORMAT}")
        epochs = [epoch for epoch, count in columns.epochs for epoch in repeat(epoch, count)]
        rows = zip(epochs, columns.kinds, columns.contents, strict=True)
        return [
            Entry(Cursor(seq, epoch), columns.types[kind], content)
            for seq, (epoch, kind, content) in enumerate(rows, columns.first)
        ]
    except (msgspec.MsgspecError, ValueError, IndexError) as error:
        raise DamagedSegment(f"a segment cannot be read: {error}") from error


def parse_index(text: str) -> list[Segment]:
    """Read an index, a line for each segment. Raises `DamagedSegment`."""
    segments: list[Segment] = []
    for line in text.splitlines():
        try:
            first, last, size = line.split(" ")
            seq, _, epoch = last.partition("-")
            segments.append(Segment(int(first), Cursor(int(seq), int(epoch)), int(size)))
        except ValueError as error:
            raise DamagedSegment(f"an index of segments cannot be read: {line!r}") from error
    return segments


def compress(content: bytes) -> bytes:
    """Content as a zstd frame that says how large it is."""
    return zstandard.ZstdCompressor(level=6).compress(content)


def decompress(blob: bytes) -> bytes:
    """What `compress` was given. Raises `DamagedSegment`."""
    try:
        return zstandard.ZstdDecompressor().decompress(blob, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise DamagedSegment(f"a sealed blob cannot be read: {error}") from error
