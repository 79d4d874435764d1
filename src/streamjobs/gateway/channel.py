"""One watched job in this process: its subscription, the ring of its newest frames, and who watches.

Rule 1: what pub/sub brings is taken only where it continues what is here, seq by seq. Everything else (a
hole, a reconnection, a position behind the log's) is answered by one task that reads the log.
Rule 2: subscribe, then read the position; what comes meanwhile is held and merged by seq.
Rule 3: viewers never wait for Redis. They ask for a page or a view, which is read once for all who ask,
and are woken when it is there; while Redis is away those reads are repeated, with back-off.
Rule 4: nothing is dropped. Whatever the ring does not hold is in the log.

New events become visible at most every `flush_interval`, all at once, the first one after a pause at
once: many tokens, few writes. A finished job has a channel too, without a subscription.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import structlog

from streamjobs import metrics
from streamjobs.cursor import START, Cursor
from streamjobs.errors import StoreUnavailable, StreamjobsError
from streamjobs.events import TERMINAL
from streamjobs.gateway.patience import patiently
from streamjobs.gateway.ring import CHUNK_BYTES, Chunk, Ring
from streamjobs.gateway.snapshots import Snapshot
from streamjobs.gateway.sse import event_frame
from streamjobs.store import Entry, JobRecord

if TYPE_CHECKING:
    from streamjobs.gateway.hub import Hub

log = structlog.get_logger(__name__)

Result = TypeVar("Result")

PAGE_KEPT = 0.25
"""Seconds for which a page that was read is there for others who replay the same log."""
_PAGES = 16
"""Pages that are there at most; the oldest leaves first, and only those who wait for it still get it."""
POSITION_GRACE = 0.25
"""Seconds for which pub/sub may be behind the log before it counts as a loss."""
_AHEAD = 5000
"""Events held while the log is being read; beyond that they are read from the log too."""


class Watcher(Protocol):
    """Who watches a channel."""

    def wake(self) -> None:
        """Something is new: look again. Must not block."""


class LogPage(NamedTuple):
    """Frames of the log behind a cursor; `found`: the cursor is in the log."""

    found: bool
    chunk: Chunk | None


class Channel:
    """A watched job. `end` is its terminal event once that may be sent; `error`: it cannot be watched."""

    def __init__(self, hub: Hub, job_id: str) -> None:
        self.job_id = job_id
        self.ring = Ring(hub.settings.ring_bytes)
        self.generation = 0
        self.is_ready = False
        self.end: Cursor | None = None
        self.error: StreamjobsError | None = None
        self.watchers: set[Watcher] = set()
        self._hub = hub
        self._loop = asyncio.get_running_loop()
        self._subscribed = self._is_closed = False
        self._tail = START
        self._ended_at: Cursor | None = None
        self._pending: list[Entry] = []
        self._ahead: list[Entry] = []
        self._reader: asyncio.Task[None] | None = None
        self._is_stale = False
        self._next_flush = 0.0
        self._flush_timer: asyncio.TimerHandle | None = None
        self._position_timer: asyncio.TimerHandle | None = None
        self._pages: dict[Cursor, asyncio.Task[LogPage | StreamjobsError]] = {}
        self._snapshot: asyncio.Task[Snapshot | StreamjobsError] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    # --- life

    def start(self, record: JobRecord | None) -> None:
        """Begin: at once where `record` says that the job has ended, else by subscribing."""
        if record is not None and record.is_ended:
            self._adopt(record)
        else:
            self._read_log()

    def add(self, watcher: Watcher) -> None:
        """A watcher comes."""
        self.watchers.add(watcher)

    def remove(self, watcher: Watcher) -> None:
        """A watcher goes; with the last one goes the channel."""
        self.watchers.discard(watcher)
        if not self.watchers:
            self._hub.drop(self)

    def close(self) -> None:
        """Free everything."""
        if self._is_closed:
            return
        self._is_closed = True
        for timer in (self._flush_timer, self._position_timer):
            if timer is not None:
                timer.cancel()
        self._hub.cancel(self._tasks)
        if self._subscribed:
            self._hub.spawn(self._hub.store.live.unsubscribe(self.job_id, self))

    @property
    def tail(self) -> Cursor:
        """The last event known here, shown or about to be."""
        return self._tail

    @property
    def is_degraded(self) -> bool:
        """Whether the gateway does not hear or read Redis."""
        return self._hub.health.is_degraded

    @property
    def is_followed(self) -> bool:
        """Whether its position is worth comparing with the log's."""
        return self.is_ready and self._reader is None and self._ended_at is None

    # --- what pub/sub says

    def on_entries(self, entries: list[Entry]) -> None:
        """Take published events; see `Listener`."""
        if self._reader is not None or not self.is_ready:
            self._hold(entries)
        elif not self._extend(entries):
            self._hold(entries)
            metrics.GAP_FILLS.labels("hole").inc()
            self._read_log()

    def on_gap(self) -> None:
        """Read what a new connection may have missed; see `Listener`."""
        metrics.GAP_FILLS.labels("reconnected").inc()
        self._read_log()

    def compare(self, before: Cursor, top: Cursor | None) -> None:
        """Compare with the log: its end was `top` at some instant after our tail was `before`."""
        if top is None or top.seq < before.seq or (top.seq == before.seq and top != before):
            self._read_log()
        elif top.seq > self._tail.seq and self._position_timer is None:
            self._position_timer = self._loop.call_later(POSITION_GRACE, self._correct, top)

    def _correct(self, top: Cursor) -> None:
        self._position_timer = None
        if top.seq > self._tail.seq and self._reader is None:
            metrics.GAP_FILLS.labels("position").inc()
            self._read_log()

    def _hold(self, entries: list[Entry]) -> None:
        if len(self._ahead) + len(entries) > _AHEAD:
            self._ahead.clear()
            self._is_stale = True
        else:
            self._ahead.extend(entries)

    def _extend(self, entries: list[Entry]) -> bool:
        """Take those that follow the tail, seq by seq; False at a hole, or where ids contradict ours."""
        for entry in entries:
            cursor = entry.cursor
            if cursor.seq == self._tail.seq + 1:
                self._pending.append(entry)
                self._tail = cursor
                if entry.type in TERMINAL:
                    self._ended_at = cursor
            elif cursor.seq > self._tail.seq or (cursor.seq == self._tail.seq and cursor != self._tail):
                self._schedule_flush()
                return False
        self._schedule_flush()
        return True

    # --- what the log says

    def _read_log(self) -> None:
        """Bring the channel level with the log, in a task."""
        self._is_stale = True
        if self._reader is None:
            self._reader = self._spawn(self._level(), "channel")

    async def _level(self) -> None:
        try:
            if not self.is_ready:
                await self._begin()
            while self._is_stale:
                self._is_stale = False
                await self._read_rest()
        except StreamjobsError as error:
            self._fail(error)
        except Exception as error:
            log.exception("channel.failed", error=type(error).__name__)
            self._fail(StreamjobsError("the stream broke; it can be resumed"))
        finally:
            self._reader = None

    async def _begin(self) -> None:
        self._is_stale = False
        self._subscribed = True
        with contextlib.suppress(StoreUnavailable):  # `on_gap` comes when the connection stands
            await self._hub.store.live.subscribe(self.job_id, self)
        self._adopt(await patiently(lambda: self._hub.store.jobs.get(self.job_id)))
        self._merge()

    async def _read_rest(self) -> None:
        """Read from the tail to the log's end, then merge what pub/sub brought meanwhile."""
        while True:
            page = await patiently(lambda: self._hub.store.log.page(self.job_id, self._tail))
            if not page.found:
                await self._restart()
            self._extend(page.entries)
            if page.is_up_to_date:
                break
        self._merge()

    def _merge(self) -> None:
        ahead, self._ahead = self._ahead, []
        if not self._extend(ahead):
            self._is_stale = True

    async def _restart(self) -> None:
        """The log is another one than we have shown: begin again at its end."""
        metrics.CHANNEL_RESETS.inc()
        record = await patiently(lambda: self._hub.store.jobs.get(self.job_id))
        self.generation += 1
        self._pending.clear()
        self._pages.clear()
        self.end = self._ended_at = None
        self._adopt(record)

    def _adopt(self, record: JobRecord) -> None:
        self.ring.reset(record.last)
        self._tail = record.last
        if record.is_ended:
            self.end = self._ended_at = record.last
        self.is_ready = True
        self.wake()

    def _fail(self, error: StreamjobsError) -> None:
        self.error = error
        self.wake()

    # --- what viewers see

    def _schedule_flush(self) -> None:
        if not self._pending or self._flush_timer is not None:
            return
        if self._loop.time() >= self._next_flush:
            self._flush()
        else:
            self._flush_timer = self._loop.call_at(self._next_flush, self._flush)

    def _flush(self) -> None:
        self._flush_timer = None
        self._next_flush = self._loop.time() + self._hub.settings.flush_interval
        for entry in self._pending:
            self.ring.push(entry.cursor, event_frame(entry))
        news, self._pending = self._pending, []
        self.ring.settle()
        self.end = self._ended_at
        self.wake()
        if news:
            self._hub.health.observe(news[0].data)

    def wake(self) -> None:
        """Let every watcher look again."""
        for watcher in tuple(self.watchers):
            watcher.wake()

    # --- reads that viewers share

    def page_after(self, cursor: Cursor) -> asyncio.Task[LogPage | StreamjobsError]:
        """The frames of the log behind `cursor`, as a task that never raises."""
        task = self._pages.get(cursor)
        if task is None:
            if len(self._pages) >= _PAGES:
                del self._pages[next(iter(self._pages))]
            task = self._pages[cursor] = self._spawn(self._page(cursor), "page")
        return task

    async def _page(self, cursor: Cursor) -> LogPage | StreamjobsError:
        pages, generation = self._pages, self.generation
        try:
            async with self._hub.reading:
                page = await patiently(
                    lambda: self._hub.store.log.page(self.job_id, cursor, max_bytes=CHUNK_BYTES)
                )
                frames = [event_frame(entry) for entry in page.entries]
                if generation == self.generation:
                    self._keep(cursor, [entry.cursor for entry in page.entries], frames)
                return LogPage(page.found, Chunk(frames, page.entries[-1].cursor) if frames else None)
        except StreamjobsError as error:
            return error
        finally:
            self._loop.call_later(PAGE_KEPT, pages.pop, cursor, None)

    def _keep(self, after: Cursor, cursors: list[Cursor], frames: list[bytes]) -> None:
        """Have the ring hold what was read right before it: the next viewer from there needs no read."""
        count = self.ring.base.seq - after.seq
        if 0 < count <= len(cursors) and cursors[count - 1] == self.ring.base:
            self.ring.precede(after, cursors[:count], frames[:count])

    def snapshot(self) -> asyncio.Task[Snapshot | StreamjobsError]:
        """The view as it stands, as a task that never raises."""
        if self._snapshot is None or self._snapshot.done():
            self._snapshot = self._spawn(self._fold(), "snapshot")
        return self._snapshot

    async def _fold(self) -> Snapshot | StreamjobsError:
        try:
            return await patiently(lambda: self._hub.snapshots.latest(self.job_id))
        except StreamjobsError as error:
            return error

    def _spawn(self, work: Coroutine[Any, Any, Result], name: str) -> asyncio.Task[Result]:
        task = self._loop.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
