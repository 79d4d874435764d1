"""One open stream: a cursor, and what is due to be sent next. Nothing here waits for Redis or a socket.

Rule 1: `take` answers at once: what is due, or nothing; then the stream's task sleeps in `wait`.
Rule 2: a cursor is believed only once it was found in the ring or the log, and again after a channel
began anew. One that is not there gets `reset` and a snapshot in one piece: never a silent jump.
Rule 3: a stream ends after its job's terminal event (or a snapshot that covers it), or with a handover
or error frame. One timer a viewer looks after heartbeats, slow sockets and age.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from typing import Any

from streamjobs import metrics
from streamjobs.config import Settings
from streamjobs.cursor import START, Cursor
from streamjobs.errors import StreamjobsError
from streamjobs.gateway import sse
from streamjobs.gateway.channel import Channel, LogPage
from streamjobs.gateway.coding import Piece
from streamjobs.gateway.ring import Chunk
from streamjobs.gateway.snapshots import Snapshot


class Viewer:
    """A stream of one job's events, from behind `cursor`, or from a snapshot where there is none.

    `abort` breaks the connection at once. `ended` says why it is over, and is empty until then: ended, error,
    slow, gone, or what `leave` was told. `frames` counts those that `take` has handed out.
    """

    __slots__ = (
        "_abort", "_born", "_channel", "_cursor", "_generation", "_has_begun", "_is_first", "_is_known",
        "_leaving", "_lost", "_max_age", "_period", "_reading", "_sending_since", "_sent_at", "_settings",
        "_timer", "_waiter", "ended", "frames",
    )  # fmt: skip

    def __init__(
        self, channel: Channel, cursor: Cursor | None, settings: Settings, abort: Callable[[], None]
    ) -> None:
        self.ended = ""
        self.frames = 0
        self._channel = channel
        self._cursor = cursor
        self._lost: bytes = b""
        self._settings = settings
        self._abort = abort
        self._generation = channel.generation
        self._is_known = self._has_begun = False
        self._is_first = True
        self._leaving = ""
        self._reading: asyncio.Task[Any] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._born = time.monotonic()
        self._sent_at = 0.0
        self._sending_since = 0.0
        self._max_age = settings.max_connection_age * random.uniform(0.75, 1.25)
        self._period = min(settings.heartbeat_interval, settings.send_timeout, self._max_age)
        self._timer = asyncio.get_running_loop().call_later(self._period * random.uniform(0.5, 1), self._tick)
        channel.add(self)

    def close(self) -> None:
        """Free everything about it."""
        self._timer.cancel()
        self._channel.remove(self)
        metrics.STREAMS_CLOSED.labels(self.ended or "gone").inc()

    # --- waiting

    def wake(self) -> None:
        """Look again; see `Watcher`."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self) -> None:
        """Sleep until something may be due."""
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def leave(self, why: str) -> None:
        """End with a handover frame when what is being sent is out."""
        self._leaving = self._leaving or why
        self.wake()

    def lose(self) -> None:
        """The client is gone."""
        self.ended = self.ended or "gone"
        self.wake()

    # --- time

    def begin_send(self) -> None:
        """Bytes are being handed to the connection."""
        self._sending_since = time.monotonic()

    def end_send(self) -> None:
        """The connection took them."""
        self._sent_at, self._sending_since = time.monotonic(), 0.0

    def _tick(self) -> None:
        now = time.monotonic()
        if self._sending_since and now - self._sending_since >= self._settings.send_timeout:
            self.ended = "slow"
            self._abort()
            self.wake()
            return
        if now - self._born >= self._max_age:
            self.leave("age")
        elif self._is_heartbeat_due(now):
            self.wake()
        self._timer = asyncio.get_running_loop().call_later(self._until_next(now), self._tick)

    def _is_heartbeat_due(self, now: float) -> bool:
        return now - self._sent_at >= self._settings.heartbeat_interval

    def _until_next(self, now: float) -> float:
        """Seconds to the earliest thing that the timer is for, at most a period."""
        if self._sending_since:
            due = self._sending_since + self._settings.send_timeout
        else:
            due = min(self._sent_at + self._settings.heartbeat_interval, self._born + self._max_age)
        return min(due - now, self._period) if due > now else self._period

    # --- what is due

    def take(self) -> tuple[Piece, ...]:
        """What is due now, in pieces; none where nothing is. `ended` is set once nothing comes after them."""
        due = self._due()
        if not due:
            is_due = not self.ended and self._is_heartbeat_due(time.monotonic())
            return (sse.HEARTBEAT,) if is_due else ()
        if self._is_first:
            self._is_first = False
            return sse.retry_line(), *due
        return due

    def _due(self) -> tuple[Piece, ...]:
        channel = self._channel
        if self._leaving:
            self.ended, self._is_first = self._leaving, False
            return (sse.handover_frame(self._leaving),)
        if channel.error is not None:
            return self._fail(channel.error)
        if not channel.is_ready:
            return ()
        if self._generation != channel.generation:
            self._generation, self._is_known = channel.generation, False
        if self._cursor is None:
            return self._from_snapshot()
        return self._from_cursor(self._cursor)

    def _from_cursor(self, cursor: Cursor) -> tuple[Piece, ...]:
        ring = self._channel.ring
        if self._reading is not None or not (self._is_known or ring.holds(cursor)):
            return self._from_log(cursor)
        self._know("replay" if cursor == START else "resumed")
        if cursor.seq < ring.base.seq:
            metrics.RING_MISSES.inc()
            return self._from_log(cursor)
        if cursor.seq < ring.top.seq:
            return self._advance_by(ring.after(cursor.seq))
        self._end_if_done(cursor)
        return ()

    def _from_log(self, cursor: Cursor) -> tuple[Piece, ...]:
        page: LogPage | StreamjobsError | None = self._read(self._channel.page_after, cursor)
        if page is None:
            return ()
        if isinstance(page, StreamjobsError):
            return self._fail(page)
        if not page.found:
            reason = "history_replaced" if self._has_begun else "unknown_cursor"
            self._lost, self._cursor = sse.reset_frame(reason, cursor), None
            return self._from_snapshot()
        self._know("replay" if cursor == START else "resumed")
        if page.chunk is not None:
            return self._advance_by(page.chunk)
        self._end_if_done(cursor)
        return ()

    def _from_snapshot(self) -> tuple[Piece, ...]:
        snapshot: Snapshot | StreamjobsError | None = self._read(self._channel.snapshot)
        if snapshot is None:
            return ()
        if isinstance(snapshot, StreamjobsError):
            return self._fail(snapshot)
        self._know("reset" if self._lost else "snapshot")
        reset, self._lost = self._lost, b""
        self._advance(snapshot.cursor, 1)
        return (reset, snapshot.frame) if reset else (snapshot.frame,)

    def _read(self, begin: Callable[..., asyncio.Task[Any]], *arguments: Any) -> Any:
        """The answer of a read that viewers share, None until it is there."""
        if self._reading is None:
            self._reading = begin(*arguments)
            if not self._reading.done():
                self._reading.add_done_callback(lambda _: self.wake())
        if not self._reading.done() or self._reading.cancelled():
            return None
        task, self._reading = self._reading, None
        return task.result()

    def _advance_by(self, chunk: Chunk) -> tuple[Piece, ...]:
        self._advance(chunk.cursor, chunk.frames)
        return (chunk.body,)

    def _advance(self, cursor: Cursor, frames: int) -> None:
        self._cursor = cursor
        self.frames += frames
        self._end_if_done(cursor)

    def _end_if_done(self, cursor: Cursor) -> None:
        end = self._channel.end
        if end is not None and cursor.seq >= end.seq:
            self.ended = self.ended or "ended"

    def _fail(self, error: StreamjobsError) -> tuple[Piece, ...]:
        self.ended = "error"
        return (sse.error_frame(error),)

    def _know(self, began: str) -> None:
        self._is_known = True
        if not self._has_begun:
            self._has_begun = True
            metrics.STREAMS_OPENED.labels(began).inc()
