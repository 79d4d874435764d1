"""A cursor in one watched job's log, and what is due behind it. Nothing here waits for Redis or a socket.

Rule 1: `take` answers at once: what is due, or nothing. Its stream is told when to ask again: `wake_for`
when something is new, `nudge_for` when what was asked for has been read.
Rule 2: a cursor is believed only once it was found in the ring or the log, and again after a channel
began anew. One that is not there gets `reset` and a snapshot in one piece: never a silent jump.
Rule 3: it is over after the job's terminal event (or a snapshot that covers it), or after an error.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from streamjobs import metrics
from streamjobs.cursor import START, Cursor
from streamjobs.errors import StreamjobsError
from streamjobs.gateway.channel import Channel, LogPage
from streamjobs.gateway.reading import Reader
from streamjobs.gateway.ring import Chunk
from streamjobs.gateway.snapshots import Snapshot


class Lost(NamedTuple):
    """A cursor that is not in the log: the client's, or one of a history that was replaced."""

    reason: str
    cursor: Cursor


class Beginning(NamedTuple):
    """The view from which the stream goes on; `lost` where that is because of a cursor."""

    snapshot: Snapshot
    lost: Lost | None


Due = Chunk | Beginning | StreamjobsError
"""What a follower hands out: events, a view to begin from, or why there is nothing more."""


class Follows(Protocol):
    """Who follows jobs. Calls must not block."""

    def wake_for(self, follower: Follower, /) -> None:
        """Something is new in the job."""

    def nudge_for(self, follower: Follower, /) -> None:
        """What the follower was waiting for is there."""


class Follower(Reader):
    """Follows one job from behind `cursor`, or from a snapshot where there is none.

    `is_over`: nothing comes after what was taken.
    """

    __slots__ = (
        "_generation", "_has_begun", "_is_known", "_lost", "_stream", "channel", "cursor",
        "is_over",
    )  # fmt: skip

    def __init__(self, channel: Channel, cursor: Cursor | None, stream: Follows) -> None:
        super().__init__()
        self.channel = channel
        self.cursor = cursor
        self.is_over = False
        self._stream = stream
        self._generation = channel.generation
        self._is_known = self._has_begun = False
        self._lost: Lost | None = None
        channel.add(self)

    def close(self) -> None:
        """Stop following."""
        self.channel.remove(self)

    def wake(self) -> None:
        """Have the stream look again; see `Watcher`."""
        self._stream.wake_for(self)

    def on_read(self) -> None:
        """Have the stream look again; see `Reader`."""
        self._stream.nudge_for(self)

    def take(self) -> Due | None:
        """What is due now."""
        channel = self.channel
        if channel.error is not None:
            return self._fail(channel.error)
        if not channel.is_ready or self.is_over:
            return None
        if self._generation != channel.generation:
            self._generation, self._is_known = channel.generation, False
        return self._from_snapshot() if self.cursor is None else self._from_cursor(self.cursor)

    def _from_cursor(self, cursor: Cursor) -> Due | None:
        ring = self.channel.ring
        if self._reading is not None or not (self._is_known or ring.holds(cursor)):
            return self._from_log(cursor)
        self._know("replay" if cursor == START else "resumed")
        if cursor.seq < ring.base.seq:
            metrics.RING_MISSES.inc()
            return self._from_log(cursor)
        if cursor.seq < ring.top.seq:
            return self._advance_by(ring.after(cursor.seq))
        self._end_if_done(cursor)
        return None

    def _from_log(self, cursor: Cursor) -> Due | None:
        page: LogPage | StreamjobsError | None = self._read(self.channel.page_after, cursor)
        if page is None:
            return None
        if isinstance(page, StreamjobsError):
            return self._fail(page)
        if not page.found:
            self._lost = Lost("history_replaced" if self._has_begun else "unknown_cursor", cursor)
            self.cursor = None
            return self._from_snapshot()
        self._know("replay" if cursor == START else "resumed")
        if page.chunk is not None:
            return self._advance_by(page.chunk)
        self._end_if_done(cursor)
        return None

    def _from_snapshot(self) -> Due | None:
        snapshot: Snapshot | StreamjobsError | None = self._read(self.channel.snapshot)
        if snapshot is None:
            return None
        if isinstance(snapshot, StreamjobsError):
            return self._fail(snapshot)
        self._know("reset" if self._lost else "snapshot")
        lost, self._lost = self._lost, None
        self._advance(snapshot.cursor)
        return Beginning(snapshot, lost)

    def _advance_by(self, chunk: Chunk) -> Chunk:
        self._advance(chunk.cursor)
        return chunk

    def _advance(self, cursor: Cursor) -> None:
        self.cursor = cursor
        self._end_if_done(cursor)

    def _end_if_done(self, cursor: Cursor) -> None:
        end = self.channel.end
        if end is not None and cursor.seq >= end.seq:
            self.is_over = True

    def _fail(self, error: StreamjobsError) -> StreamjobsError:
        self.is_over = True
        return error

    def _know(self, began: str) -> None:
        self._is_known = True
        if not self._has_begun:
            self._has_begun = True
            metrics.STREAMS_OPENED.labels(began).inc()
