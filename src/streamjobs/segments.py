"""Sealed pieces of a log: many events in one compressed blob. Pure.

Rule 1: a segment says everything the stream said: decoding gives the same entries, byte for byte.
Rule 2: a segment never changes; its first seq and its last id name what is in it.
Rule 3: seqs within one are dense, so only the first is written down.

A blob is zstd over msgpack, in columns: epochs as runs, types as a table, `ts` as differences, what all
contents of a type begin and end with once for each type, and what is left of them, the words, in one piece.
So an answer takes little more than its text alone would, and about a tenth of what it takes in a stream.

Rejected: rows. zstd finds what is between the words again and again, but pays for it each time.
"""

from __future__ import annotations

import re
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
_LEVEL = 6
_LONG = 3
"""Columns with a value for each event, at the end: stamps, sizes, middles."""
_STAMP = re.compile(rb'{"ts":(0|[1-9][0-9]{0,17}),')


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
    types: list[tuple[str, bytes, bytes]]
    """A type, and what all its contents begin and end with, behind the `ts`."""
    kinds: bytes | list[int]
    """Of each event, its type's place in the table."""
    stamps: list[int | None]
    """Of each event, the difference of its `ts` to the last one known; None: its content begins otherwise."""
    sizes: list[int]
    """Of each event, how many bytes of `middles` are its own."""
    middles: bytes


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
    stamps, rests = _split_stamps(entries)
    of_types: list[list[bytes]] = [[] for _ in places]
    for kind, rest in zip(kinds, rests, strict=True):
        of_types[kind].append(rest)
    shapes = [_common_ends(contents) for contents in of_types]
    middles = [
        rest[len(shapes[kind][0]) : len(rest) - len(shapes[kind][1])]
        for kind, rest in zip(kinds, rests, strict=True)
    ]
    columns = _Columns(
        FORMAT,
        entries[0].cursor.seq,
        list(_runs(entries)),
        [(name, *ends) for name, ends in zip(places, shapes, strict=True)],
        bytes(kinds) if len(places) <= 256 else kinds,
        stamps,
        [len(middle) for middle in middles],
        b"".join(middles),
    )
    return _compress_columns(columns)


def _compress_columns(columns: _Columns) -> bytes:
    """One frame; each long column has blocks of its own, since letters and numbers share no statistics."""
    fields = [msgspec.msgpack.encode(getattr(columns, name)) for name in _Columns.__struct_fields__]
    parts = [_array_of(len(fields)) + b"".join(fields[:-_LONG]), *fields[-_LONG:]]
    frame = zstandard.ZstdCompressor(level=_LEVEL).compressobj(size=sum(map(len, parts)))
    pieces = [frame.compress(part) + frame.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK) for part in parts]
    return b"".join(pieces) + frame.flush()


def _array_of(count: int) -> bytes:
    """What msgpack writes before an array of up to 15 values."""
    return bytes([0x90 | count])


def _split_stamps(entries: Sequence[Entry]) -> tuple[list[int | None], list[bytes]]:
    """The differences of the contents' `ts`, and the contents without them."""
    stamps: list[int | None] = []
    rests: list[bytes] = []
    last = 0
    for entry in entries:
        stamp = _STAMP.match(entry.data)
        if stamp is None:
            stamps.append(None)
            rests.append(entry.data)
            continue
        now = int(stamp[1])
        stamps.append(now - last)
        rests.append(entry.data[stamp.end() :])
        last = now
    return stamps, rests


def _common_ends(contents: list[bytes]) -> tuple[bytes, bytes]:
    """What all of these begin with, and what all of them end with, without overlap.

    Of many only up to a quote, never into a value: a space that all tokens begin with is a part of the text,
    and the text is found once more where the log has it whole.
    """
    if len(contents) == 1:
        return contents[0], b""
    shortest = min(map(len, contents))
    start = _common_start(contents)
    start = start[: start.rfind(b'"') + 1]
    ends = [content[len(content) - (shortest - len(start)) :][::-1] for content in contents]
    end = _common_start(ends)[::-1]
    quote = end.find(b'"')
    return start, end[quote:] if quote >= 0 else b""


def _common_start(contents: list[bytes]) -> bytes:
    """What all of these begin with: what the first and the last of them in order do."""
    low, high = min(contents), max(contents)
    shorter = min(len(low), len(high))
    return low[: next((at for at in range(shorter) if low[at] != high[at]), shorter)]


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
        rows = zip(epochs, columns.kinds, _contents(columns), strict=True)
        return [
            Entry(Cursor(seq, epoch), columns.types[kind][0], content)
            for seq, (epoch, kind, content) in enumerate(rows, columns.first)
        ]
    except (msgspec.MsgspecError, ValueError, IndexError) as error:
        raise DamagedSegment(f"a segment cannot be read: {error}") from error


def _contents(columns: _Columns) -> Iterator[bytes]:
    now = at = 0
    for kind, stamp, size in zip(columns.kinds, columns.stamps, columns.sizes, strict=True):
        _, start, end = columns.types[kind]
        head = b""
        if stamp is not None:
            now += stamp
            head = b'{"ts":%d,' % now
        yield head + start + columns.middles[at : at + size] + end
        at += size
    if at != len(columns.middles):
        raise DamagedSegment(f"a segment has {len(columns.middles)} bytes of contents, not {at}")


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
    return zstandard.ZstdCompressor(level=_LEVEL).compress(content)


def decompress(blob: bytes) -> bytes:
    """What `compress` was given. Raises `DamagedSegment`."""
    try:
        return zstandard.ZstdDecompressor().decompress(blob, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise DamagedSegment(f"a sealed blob cannot be read: {error}") from error
