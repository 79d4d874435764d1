"""One job that a WebSocket is subscribed to: where it comes from, in what form, how often.

Rule 1: it is looked up before it is followed: what has ended needs no pub/sub, what is not there is an error,
and what is archived is read from its file. While Redis is away the subscription stands, and waits.
Rule 2: it is over after `ended` or an error, and then holds nothing.
Rule 3: it marks itself with its owner when it may have something; only `take` hands anything out.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Protocol

import structlog

from streamjobs import metrics
from streamjobs.cursor import Cursor
from streamjobs.errors import JobNotFound, StreamjobsError
from streamjobs.gateway import messages
from streamjobs.gateway.archived import Archived
from streamjobs.gateway.events import look_up
from streamjobs.gateway.follower import Beginning, Due, Follower
from streamjobs.gateway.hub import Hub
from streamjobs.gateway.pacing import Pacer
from streamjobs.gateway.ring import CHUNK_BYTES
from streamjobs.gateway.viewer import Manner
from streamjobs.gateway.websocket import Parts
from streamjobs.store import JobRecord

log = structlog.get_logger(__name__)


class Owner(Protocol):
    """Who has subscriptions. Calls must not block."""

    hub: Hub
    archived: Archived
    unpacking: asyncio.Lock
    """Held while a file of the archive is open: one at a time for each connection."""

    @property
    def sees_all(self) -> bool:
        """Whether every job may be shown."""
        ...

    def mark(self, subscription: Subscription, /) -> None:
        """It may have something to be taken."""

    async def require_own(self, job: str, /) -> None:
        """Raise `JobNotFound` unless this job may be shown; waits while Redis is away."""


class Source(Protocol):
    """Where what is due comes from: a follower of a live job, or of an archived one."""

    cursor: Cursor | None
    is_over: bool

    def take(self) -> Due | None:
        """What is due now."""
        ...

    def close(self) -> None:
        """Free everything."""


class Subscription:
    """Follows `job` for its owner. `events` counts those handed out; `is_over`: nothing more comes."""

    __slots__ = (
        "_cursor",
        "_error",
        "_form",
        "_has_begun",
        "_has_taken",
        "_head",
        "_opening",
        "_owner",
        "_pacer",
        "_source",
        "events",
        "is_over",
        "job",
    )  # fmt: skip

    def __init__(self, job: str, cursor: Cursor | None, manner: Manner, owner: Owner) -> None:
        self.job = job
        self.events = 0
        self.is_over = False
        self._cursor = cursor
        self._form = manner.form
        self._owner = owner
        self._head = messages.events_head(job)
        self._has_begun = False
        self._error: StreamjobsError | None = None
        self._source: Source | None = None
        self._pacer = Pacer(manner.pace, self._mark) if manner.pace else None
        self._has_taken = False
        self._opening: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Begin; its owner must know it by now."""
        channel = self._owner.hub.find(self.job)
        if channel is not None and channel.is_ready and self._owner.sees_all:
            self._follow(None)
        else:
            self._opening = asyncio.create_task(self._open(), name="subscription")

    def close(self) -> None:
        """Free everything."""
        if self._opening is not None:
            self._owner.hub.cancel([self._opening])
        if self._pacer is not None:
            self._pacer.cancel()
        if self._source is not None:
            self._source.close()
            self._source = None

    # --- where it comes from

    async def _open(self) -> None:
        try:
            await self._owner.require_own(self.job)
            await self._find()
        except StreamjobsError as error:
            self._fail(error)
        except Exception as error:
            log.exception("subscription.failed", error=type(error).__name__)
            self._fail(_broken())

    async def _find(self) -> None:
        try:
            record, _ = await look_up(self._owner.hub, self.job)
            self._follow(record)
        except JobNotFound:
            self._unpack()

    def _follow(self, record: JobRecord | None) -> None:
        hub = self._owner.hub
        self._source = Follower(hub.channel(self.job, record), self._cursor, self)
        self._owner.mark(self)

    def _unpack(self) -> None:
        metrics.STREAMS_OPENED.labels("archived").inc()
        self._source = Unpacking(self._owner, self.job, self._cursor, self)

    def _fail(self, error: StreamjobsError) -> None:
        self._error = error
        self._owner.mark(self)

    # --- when

    def wake_for(self, follower: Follower) -> None:
        """See `Follows`; an end is not held back."""
        if self._pacer is None or follower.channel.end is not None:
            self._mark()
        else:
            self._pacer.ask()

    def _mark(self) -> None:
        self._owner.mark(self)

    def nudge_for(self, _follower: object) -> None:
        """See `Follows`."""
        self._owner.mark(self)

    # --- what

    @property
    def is_behind(self) -> bool:
        """Whether there may be more at once; else it is marked when there is."""
        source = self._source
        if not isinstance(source, Follower) or source.cursor is None:
            return True
        return source.cursor.seq < source.channel.ring.top.seq

    def take(self) -> list[Parts]:
        """What is due now, one piece of events at most."""
        source = self._source
        due: Due | None = self._error if source is None else source.take()
        if isinstance(due, JobNotFound) and isinstance(source, Follower) and not self._has_taken:
            source.close()  # it was opened while Redis was away
            self._unpack()
            return []
        if isinstance(due, StreamjobsError):
            self.is_over = True
            return [messages.error(due, self.job)]
        if source is None:
            return []
        return [*self._begin(), *self._messages(due), *self._end(source)]

    def _begin(self) -> list[Parts]:
        if self._has_begun:
            return []
        self._has_begun = True
        return [messages.told("subscribed", job=self.job)]

    def _messages(self, due: Due | None) -> list[Parts]:
        if due is None or isinstance(due, StreamjobsError):
            return []
        self._has_taken = True
        if isinstance(due, Beginning):
            self.events += 1
            view = messages.snapshot(self.job, due.snapshot)
            return [view] if due.lost is None else [messages.reset(self.job, *due.lost), view]
        rendered = due.rendered(self._form)
        self.events += rendered.events
        return [(self._head, rendered.body, messages.EVENTS_END)]

    def _end(self, source: Source) -> list[Parts]:
        if not source.is_over:
            return []
        self.is_over = True
        return [messages.told("ended", job=self.job, id=str(source.cursor))]


class Unpacking:
    """Hands an archived job's log out, a piece each time, as a `Follower` does with one in Redis."""

    def __init__(self, owner: Owner, job: str, cursor: Cursor | None, reader: Subscription) -> None:
        self.cursor = cursor
        self.is_over = False
        self._reader = reader
        self._owner = owner
        self._due: Due | None = None
        self._is_exhausted = False
        self._taken = asyncio.Event()
        pieces = owner.archived.pieces(job, cursor, CHUNK_BYTES)
        self._task = asyncio.create_task(self._run(pieces), name="unpacking")

    def close(self) -> None:
        """Free everything."""
        self._task.cancel()

    def take(self) -> Due | None:
        """What is due now."""
        due, self._due = self._due, None
        if due is not None:
            self._taken.set()
            self.cursor = self._cursor_of(due)
        elif self._is_exhausted:
            self.is_over = True
        return due

    async def _run(self, pieces: AsyncGenerator[Due]) -> None:
        try:
            async with self._owner.unpacking, contextlib.aclosing(pieces):
                async for piece in pieces:
                    await self._hand_out(piece)
        except StreamjobsError as error:
            await self._hand_out(error)
        except Exception as error:
            log.exception("unpacking.failed", error=type(error).__name__)
            await self._hand_out(_broken())
        self._is_exhausted = True
        self._reader.nudge_for(self)

    async def _hand_out(self, due: Due) -> None:
        self._due = due
        self._reader.nudge_for(self)
        self._taken.clear()
        await self._taken.wait()

    def _cursor_of(self, due: Due) -> Cursor | None:
        if isinstance(due, StreamjobsError):
            return self.cursor
        return due.snapshot.cursor if isinstance(due, Beginning) else due.cursor


def _broken() -> StreamjobsError:
    return StreamjobsError("the subscription broke; the job can be subscribed to again")
