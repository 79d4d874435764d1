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
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from streamjobs.errors import StoreUnavailable, StreamjobsError
from streamjobs.gateway.patience import patiently
from streamjobs.gateway.reading import Reader
from streamjobs.store import Entry, FeedEvent, FeedPage, Position
from streamjobs.store.owners import START

if TYPE_CHECKING:
    from streamjobs.gateway.hub import Hub

Result = TypeVar("Result")

_PAGES = 16
"""Pages that are kept at most until there is more."""


class Nudged(Protocol):
    """Who follows a feed."""

    def nudge(self) -> None:
        """There is something to be taken, or may be. Must not block."""


class OwnerFeed:
    """A watched feed. `version` grows whenever there may be more than was read before."""

    def __init__(self, hub: Hub, owner: str) -> None:
        self.owner = owner
        self.version = 0
        self.followers: set[FeedFollower] = set()
        self._hub = hub
        self._loop = asyncio.get_running_loop()
        self._known = START
        self._next_flush = 0.0
        self._flush_timer: asyncio.TimerHandle | None = None
        self._pages: dict[Position, asyncio.Task[FeedPage | StreamjobsError]] = {}
        self._end: asyncio.Task[Position | StreamjobsError] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stands = self._spawn(self._subscribe())

    def add(self, follower: FeedFollower) -> None:
        """A stream comes."""
        self.followers.add(follower)

    def remove(self, follower: FeedFollower) -> None:
        """A stream goes; with the last one goes the feed."""
        self.followers.discard(follower)
        if not self.followers:
            self._hub.drop_feed(self)

    def close(self) -> None:
        """Free everything."""
        if self._flush_timer is not None:
            self._flush_timer.cancel()
        self._hub.cancel(self._tasks)
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
        for follower in tuple(self.followers):
            follower.wake()

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


class Ready(NamedTuple):
    """The follower stands at the feed's end; `lost`: because its place is not in the feed any more."""

    lost: Position | None


class FeedFollower(Reader):
    """A position in a feed, None until the feed's end is known, and what is due behind it."""

    __slots__ = ("_feed", "_lost", "_stream", "_version", "_version_asked", "position")

    def __init__(self, feed: OwnerFeed, position: Position | None, stream: Nudged) -> None:
        super().__init__()
        self.position = position
        self._feed = feed
        self._lost: Position | None = None
        self._stream = stream
        self._version = self._version_asked = -1
        feed.add(self)

    def close(self) -> None:
        """Follow no more."""
        self._feed.remove(self)

    def wake(self) -> None:
        """There may be more."""
        self._stream.nudge()

    def on_read(self) -> None:
        """See `Reader`."""
        self._stream.nudge()

    def take(self) -> list[FeedEvent] | Ready | StreamjobsError | None:
        """What is due now: events, of which the taker says by `position` how far it has come."""
        if self.position is None:
            return self._from_the_end()
        if self._version == self._feed.version:
            return None
        if self._reading is None:
            self._version_asked = self._feed.version
        page: FeedPage | StreamjobsError | None = self._read(self._feed.page_after, self.position)
        if page is None or isinstance(page, StreamjobsError):
            return page
        if not page.found:
            self._lost, self.position = self.position, None
            return self._from_the_end()
        if page.is_last:
            self._version = self._version_asked
        return page.events

    def _from_the_end(self) -> Ready | StreamjobsError | None:
        end: Position | StreamjobsError | None = self._read(self._feed.end)
        if end is None or isinstance(end, StreamjobsError):
            return end
        self.position = end
        lost, self._lost = self._lost, None
        return Ready(lost)


async def _answer(read: Callable[[], Awaitable[Result]]) -> Result | StreamjobsError:
    try:
        return await patiently(read)
    except StreamjobsError as error:
        return error
