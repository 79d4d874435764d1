"""The newest frames of one job, encoded once, for all its viewers. Pure.

Rule 1: it holds the events behind `base` up to `top`, without a hole; the oldest leave when the bytes
exceed the limit, and `base` moves on.
Rule 2: a viewer is a cursor. What follows it is one join, shared by all who stand at the same place.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate

from streamjobs.cursor import START, Cursor
from streamjobs.gateway.forms import Form, Rendered, plain

CHUNK_BYTES = 16 * 1024
"""About the most that is handed to a connection at once: what each slow viewer may hold, and once more as it
waits for the socket. At twice that, 100 viewers who replay one job hold over 4 MB."""

_JOINS = 8
"""Joins that are kept until the next event; more than this many viewers at different places share nothing."""


class Chunk:
    """Frames to be sent in one piece, the last one being event `cursor`."""

    __slots__ = ("_others", "cursor", "plain")

    def __init__(self, frames: Sequence[bytes], cursor: Cursor) -> None:
        self.cursor = cursor
        self.plain = Rendered(b"".join(frames), len(frames))
        self._others: dict[Form, Rendered] = {}

    def rendered(self, form: Form) -> Rendered:
        """These frames in a form; made when the first one asks, then shared."""
        if form is plain:
            return self.plain
        rendered = self._others.get(form)
        if rendered is None:
            rendered = self._others[form] = form(self.plain)
        return rendered


class Ring:
    """A bounded piece of a log's end."""

    __slots__ = ("_bytes", "_cursors", "_ends", "_frames", "_joined", "_limit", "base", "top")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.reset(START)

    def reset(self, at: Cursor) -> None:
        """Forget everything; the next event follows `at`."""
        self.base = self.top = at
        self._cursors: list[Cursor] = []
        self._frames: list[bytes] = []
        self._ends: list[int] = []
        self._bytes = 0
        self._joined: dict[int, Chunk] = {}

    def push(self, cursor: Cursor, frame: bytes) -> None:
        """Add the next event."""
        self._cursors.append(cursor)
        self._frames.append(frame)
        self._bytes += len(frame)
        self._ends.append(self._bytes)
        self.top = cursor

    def precede(self, base: Cursor, cursors: Sequence[Cursor], frames: Sequence[bytes]) -> None:
        """Add the events from behind `base` to what is held; nothing where that would exceed the limit."""
        size = sum(map(len, frames))
        if self.size + size > self._limit:
            return
        first = self._before - size
        self._ends[:0] = [first + end for end in accumulate(map(len, frames))]
        self._cursors[:0], self._frames[:0] = cursors, frames
        self.base = base

    def settle(self) -> None:
        """After pushing: drop what is over the limit, and the joins that are out of date."""
        self._joined.clear()
        excess = self._bytes - self._limit - self._before
        if excess <= 0:
            return
        drop = min(bisect_left(self._ends, self._before + excess) + 1, len(self._frames) - 1)
        if drop > 0:
            self.base = self._cursors[drop - 1]
            del self._cursors[:drop], self._frames[:drop], self._ends[:drop]

    @property
    def size(self) -> int:
        """Bytes of the frames held."""
        return self._bytes - self._before

    @property
    def _before(self) -> int:
        return self._ends[0] - len(self._frames[0]) if self._frames else self._bytes

    def covers(self, seq: int) -> bool:
        """Whether what follows event `seq` is here (or, at the top, still to come)."""
        return self.base.seq <= seq <= self.top.seq

    def holds(self, cursor: Cursor) -> bool:
        """Whether this very event, not only its seq, is the base or held."""
        if not self.covers(cursor.seq):
            return False
        index = cursor.seq - self.base.seq
        return (self._cursors[index - 1] if index else self.base) == cursor

    def after(self, seq: int) -> Chunk:
        """What follows event `seq`, which must be covered and below the top; at most about `CHUNK_BYTES`."""
        chunk = self._joined.get(seq)
        if chunk is None:
            chunk = self._join(seq - self.base.seq)
            if len(self._joined) < _JOINS:
                self._joined[seq] = chunk
        return chunk

    def _join(self, start: int) -> Chunk:
        begins = self._ends[start] - len(self._frames[start])
        stop = max(bisect_right(self._ends, begins + CHUNK_BYTES), start + 1)
        return Chunk(self._frames[start:stop], self._cursors[stop - 1])
