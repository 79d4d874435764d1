"""One owner's feed as this process watches it: when there is more, and pages of it, read once for all.

Rule 1: what pub/sub brings says only that there is more. What it is is read from the feed, behind the
position of who asks, so a lost or late message costs time and never an event.
Rule 2: streams are woken at most every `flush_interval`, the first time after a pause at once. Those that
stand at the same position share one read.
Rule 3: the last stream of an owner leaving frees everything about it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from streamjobs.errors import StoreUnavailable, StreamjobsError
from streamjobs.gateway.patience import patiently
from streamjobs.store import Entry, FeedPage, Position
from streamjobs.store.owners import START

if TYPE_CHECKING:
    from streamjobs.gateway.hub import Hub

Result = TypeVar("Result")

_PAGES = 16
"""Pages that are kept at most until there is more."""


class FeedWatcher(Protocol):
    """Who watches an owner's feed."""

    def on_feed(self) -> None:
        """There is more, or may be: look again. Must not block."""


class OwnerFeed:
    """A watched feed. `version` grows whenever there may be more than was read before."""

    def __init__(self, hub: Hub, owner: str) -> None:
        self.owner = owner
        self.version = 0
        self.watchers: set[FeedWatcher] = set()
        self._hub = hub
        self._loop = asyncio.get_running_loop()
        self._known = START
        self._next_flush = 0.0
        self._flush_timer: asyncio.TimerHandle | None = None
        self._pages: dict[Position, asyncio.Task[FeedPage | StreamjobsError]] = {}
        self._end: asyncio.Task[Position | StreamjobsError] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stands = self._spawn(self._subscribe())

    def add(self, watcher: FeedWatcher) -> None:
        """A stream comes."""
        self.watchers.add(watcher)

    def remove(self, watcher: FeedWatcher) -> None:
        """A stream goes; with the last one goes the feed."""
        self.watchers.discard(watcher)
        if not self.watchers:
            self._hub.drop_feed(self)

    def close(self) -> None:
        """Free everything."""
        if self._flush_timer is not None:
            self._flush_timer.cancel()
        for task in tuple(self._tasks):
            task.cancel()
        self._hub.spawn(self._hub.store.live.unsubscribe_owner(self.owner, self))

    async def _subscribe(self) -> None:
        with contextlib.suppress(StoreUnavailable):  # `on_gap` comes when the connection stands
            await self._hub.store.live.subscribe_owner(self.owner, self)

    # --- when there is more

    def on_entries(self, entries: list[Entry]) -> None:
        """See `Listener`."""
        if self._flush_timer is not None:
            return
        if self._loop.time() >= self._next_flush:
            self._flush()
        else:
            self._flush_timer = self._loop.call_at(self._next_flush, self._flush)

    def on_gap(self) -> None:
        """See `Listener`."""
        self.on_entries([])

    def compare(self, end: Position) -> None:
        """Compare with the feed's end as it is now."""
        if end > self._known:
            self._known = end
            self.on_entries([])

    def _flush(self) -> None:
        self._flush_timer = None
        self._next_flush = self._loop.time() + self._hub.settings.flush_interval
        self.version += 1
        self._pages.clear()
        for watcher in tuple(self.watchers):
            watcher.on_feed()

    # --- reads that streams share

    def end(self) -> asyncio.Task[Position | StreamjobsError]:
        """Where the feed ends, as a task that never raises; what comes after it is heard of."""
        if self._end is None or self._end.done():
            self._end = self._spawn(self._read_end())
        return self._end

    async def _read_end(self) -> Position | StreamjobsError:
        await asyncio.wait([self._stands])
        return await _answer(lambda: self._hub.store.owners.end(self.owner))

    def page_after(self, position: Position) -> asyncio.Task[FeedPage | StreamjobsError]:
        """The events behind `position`, as a task that never raises."""
        task = self._pages.get(position)
        if task is None:
            if len(self._pages) >= _PAGES:
                del self._pages[next(iter(self._pages))]
            task = self._pages[position] = self._spawn(self._page(position))
        return task

    async def _page(self, position: Position) -> FeedPage | StreamjobsError:
        await asyncio.wait([self._stands])  # else what comes between the read and the subscription is missed
        async with self._hub.reading:
            page = await _answer(lambda: self._hub.store.owners.page(self.owner, position))
        if isinstance(page, FeedPage) and page.events:
            self._known = max(self._known, page.events[-1].position)
        return page

    def _spawn(self, work: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
        task = self._loop.create_task(work, name="owner feed")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _answer(read: Callable[[], Awaitable[Result]]) -> Result | StreamjobsError:
    try:
        return await patiently(read)
    except StreamjobsError as error:
        return error
