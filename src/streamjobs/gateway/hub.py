"""The jobs and the owners' feeds that this process watches, one channel each.

Rule 1: the last watcher of a job or feed leaving frees everything about it; `channels` and `feeds` tell.
Rule 2: pub/sub can lose without a word, so every few seconds all positions are compared with the logs' ends.
Rule 3: a drain ends streams one by one, at random moments of the grace, never all at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

import structlog

from streamjobs import metrics
from streamjobs.config import Settings
from streamjobs.cursor import Cursor
from streamjobs.errors import StreamjobsError
from streamjobs.gateway.channel import Channel
from streamjobs.gateway.health import LOOK_INTERVAL, Health
from streamjobs.gateway.limits import OpenStreams
from streamjobs.gateway.owner_feed import OwnerFeed
from streamjobs.gateway.snapshots import Snapshots
from streamjobs.gateway.stream import Stream
from streamjobs.gateway.viewer import AS_THEY_COME, Manner, Viewer
from streamjobs.store import JobRecord, Store, jitter

log = structlog.get_logger(__name__)

_BATCH = 1000
"""Positions compared in one round trip."""
_READS = 4
"""Pages of logs that are read at once."""
_LAST_SEND = 1.0
"""Seconds that a stream told to leave has for it."""


class Hub:
    """Channels by job, and the loop that checks them."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self.store = store
        self.settings = settings
        self.snapshots = Snapshots(store)
        self.health = Health(store)
        self.open_streams = OpenStreams(settings.owner_streams)
        self.reading = asyncio.Semaphore(_READS)
        """For who reads a page of a log: the events of a page take several times the memory of its frames."""
        self._channels: dict[str, Channel] = {}
        self._feeds: dict[str, OwnerFeed] = {}
        self._streams: set[Stream] = set()
        self._waiting: set[_Waiting] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._heads: dict[str, asyncio.Task[JobRecord]] = {}
        self._loops: list[asyncio.Task[None]] = []
        self._drain_until: float | None = None
        self._stream_left = asyncio.Event()
        metrics.VIEWERS.set_function(lambda: self.viewers)
        metrics.CHANNELS.set_function(lambda: self.channels)

    # --- life

    def start(self) -> None:
        """Start comparing positions, and looking whether Redis is there."""
        self._loops.append(asyncio.create_task(self._run_checks(), name="positions"))
        self._loops.append(asyncio.create_task(self._run_looks(), name="health"))

    async def drain(self, grace: float) -> None:
        """End every stream at a random moment within `grace` seconds; returns when all have ended."""
        loop = asyncio.get_running_loop()
        self._drain_until = loop.time() + grace
        for stream in self._streams:
            self._end_within(stream, grace)
        for channel in tuple(self._channels.values()):
            channel.wake()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace + _LAST_SEND):
                while self._streams:
                    self._stream_left.clear()
                    await self._stream_left.wait()

    async def aclose(self) -> None:
        """Stop checking and free every channel."""
        for loop in self._loops:
            loop.cancel()
        for stream in tuple(self._streams):
            stream.leave("drain")
        for channel in tuple(self._channels.values()):
            self.drop(channel)
        for feed in tuple(self._feeds.values()):
            self.drop_feed(feed)
        self.cancel([*self._heads.values(), *self.snapshots.folding])
        await asyncio.gather(*self._tasks, *self._loops, return_exceptions=True)

    @property
    def is_draining(self) -> bool:
        """Whether streams are being ended."""
        return self._drain_until is not None

    @property
    def channels(self) -> int:
        """How many jobs are watched."""
        return len(self._channels)

    @property
    def viewers(self) -> int:
        """How many streams and waiting requests there are."""
        return len(self._streams) + len(self._waiting)

    @property
    def feeds(self) -> int:
        """How many owners' feeds are watched."""
        return len(self._feeds)

    # --- channels and viewers

    async def head(self, job_id: str) -> JobRecord:
        """A job's head, read once for all who ask while it is being read.

        Raises `JobNotFound`, `StoreUnavailable`.
        """
        task = self._heads.get(job_id)
        if task is None:
            task = self._heads[job_id] = asyncio.create_task(self.store.jobs.get(job_id), name="head")
            task.add_done_callback(lambda done: self._forget_head(job_id, done))
        return await asyncio.shield(task)

    def _forget_head(self, job_id: str, task: asyncio.Task[JobRecord]) -> None:
        del self._heads[job_id]
        if not task.cancelled():
            task.exception()  # so that one that failed after its last reader left is no warning

    def find(self, job_id: str) -> Channel | None:
        """The channel of a job that is watched now and can be."""
        channel = self._channels.get(job_id)
        return None if channel is None or channel.error is not None else channel

    def channel(self, job_id: str, record: JobRecord | None = None) -> Channel:
        """The channel of a job; a new one lives until its last watcher goes, so add one at once."""
        channel = self.find(job_id)
        if channel is None:
            channel = self._channels[job_id] = Channel(self, job_id)
            channel.start(record)
        return channel

    def drop(self, channel: Channel) -> None:
        """Free a channel that nobody watches."""
        if self._channels.get(channel.job_id) is channel:
            del self._channels[channel.job_id]
            self.snapshots.forget(channel.job_id)
        channel.close()

    def feed(self, owner: str) -> OwnerFeed:
        """An owner's feed; a new one lives until its last watcher goes, so add one at once."""
        feed = self._feeds.get(owner)
        if feed is None:
            feed = self._feeds[owner] = OwnerFeed(self, owner)
        return feed

    def drop_feed(self, feed: OwnerFeed) -> None:
        """Free an owner's feed that nobody watches."""
        if self._feeds.get(feed.owner) is feed:
            del self._feeds[feed.owner]
        feed.close()

    def open(
        self,
        job_id: str,
        cursor: Cursor | None,
        record: JobRecord | None,
        abort: Callable[[], None],
        manner: Manner = AS_THEY_COME,
    ) -> Viewer:
        """A new stream of one job, to be given to `attach`."""
        return Viewer(self.channel(job_id, record), cursor, self.settings, abort, manner)

    def attach(self, stream: Stream) -> None:
        """A stream begins, and is later given to `close`; while draining it will end soon."""
        self._streams.add(stream)
        if self._drain_until is not None:
            self._end_within(stream, self._drain_until - asyncio.get_running_loop().time())

    def close(self, stream: Stream) -> None:
        """A stream is over."""
        self._streams.discard(stream)
        self._stream_left.set()
        stream.close()

    def _end_within(self, stream: Stream, seconds: float) -> None:
        delay = random.uniform(0, max(0.0, seconds))
        asyncio.get_running_loop().call_later(delay, stream.leave, "drain")

    # --- waiting without a stream

    async def wait_for(
        self, job_id: str, seconds: float, after: Cursor | None = None, record: JobRecord | None = None
    ) -> bool:
        """Wait for a job's end, or with `after` for any event behind it; False when `seconds` have passed.

        Raises `JobNotFound`.
        """
        waiting = _Waiting(self.channel(job_id, record), after, lambda: self.is_draining)
        self._waiting.add(waiting)
        try:
            async with asyncio.timeout(seconds):
                return await waiting.result()
        except TimeoutError:
            return False
        finally:
            self._waiting.discard(waiting)
            waiting.close()

    # --- positions

    async def check_positions(self) -> None:
        """Compare every watched job's position with its log's end. Raises `StoreUnavailable`."""
        self.snapshots.sweep()
        followed = [channel for channel in self._channels.values() if channel.is_followed]
        for start in range(0, len(followed), _BATCH):
            await self._check(followed[start : start + _BATCH])
        await self._check_feeds()

    async def _check_feeds(self) -> None:
        owners = list(self._feeds)
        for start in range(0, len(owners), _BATCH):
            ends = await self.store.owners.ends(owners[start : start + _BATCH])
            for owner, end in ends.items():
                if owner in self._feeds:
                    self._feeds[owner].compare(end)

    async def _check(self, channels: list[Channel]) -> None:
        before = [channel.tail for channel in channels]
        tops = await self.store.log.tops(channel.job_id for channel in channels)
        for channel, position in zip(channels, before, strict=True):
            if channel.is_followed and channel.watchers:
                channel.compare(position, tops[channel.job_id])

    async def _run_checks(self) -> None:
        while True:
            try:
                await self.health.read_clock()
                await asyncio.sleep(jitter(self.settings.position_interval))
                await self.check_positions()
                self.health.is_unread = False
            except StreamjobsError as error:
                self.health.is_unread = True
                log.warning("positions.unchecked", error=error.code)
                await asyncio.sleep(jitter(min(1.0, self.settings.position_interval)))

    async def _run_looks(self) -> None:
        while True:
            await asyncio.sleep(LOOK_INTERVAL)
            if self.health.look(time.monotonic()):
                self._remind()

    def _remind(self) -> None:
        """Have every stream say soon, not all at once, that Redis is away."""
        loop = asyncio.get_running_loop()
        for stream in self._streams:
            loop.call_later(random.uniform(0, self.settings.heartbeat_interval / 3), stream.remind)

    def cancel(self, tasks: Iterable[asyncio.Task[Any]]) -> None:
        """End tasks that read Redis; the hub's own end waits for theirs, since then the store may close."""
        for task in tuple(tasks):
            task.cancel()
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[None]:
        """Run something that must not be cut off in the middle; errors on purpose are logged."""
        task = asyncio.create_task(_quietly(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


class _Waiting:
    """A watcher without a stream: for a job's end, or for anything behind a cursor."""

    def __init__(self, channel: Channel, after: Cursor | None, is_enough: Callable[[], bool]) -> None:
        self._channel = channel
        self._after = after
        self._is_enough = is_enough
        self._woken = asyncio.Event()
        channel.add(self)

    def wake(self) -> None:
        self._woken.set()

    def close(self) -> None:
        self._channel.remove(self)

    async def result(self) -> bool:
        while not self._is_met():
            if self._is_enough():
                return False
            self._woken.clear()
            await self._woken.wait()
        return True

    def _is_met(self) -> bool:
        channel = self._channel
        if channel.error is not None:
            raise channel.error
        if channel.end is not None:
            return True
        return self._after is not None and channel.is_ready and channel.ring.top.seq > self._after.seq


async def _quietly(work: Coroutine[Any, Any, Any]) -> None:
    try:
        await work
    except StreamjobsError as error:
        log.debug("hub.task", error=error.code)
