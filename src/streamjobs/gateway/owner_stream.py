"""`GET /v1/events`: everything of an owner on one connection.

Lifecycle and progress of all their jobs come from the owner's feed; of the jobs named in `?watch=a,b` all
events come from their own logs, beginning with a snapshot. A frame's data is `{"job","id","type","data"}`.

Rule 1: every frame carries the cursor that is right after it: see `owner_cursor`. A cut at any place loses
nothing and repeats nothing. What the feed says of a watched job is passed over, its log says it.
Rule 2: a position that the feed does not hold any more is `reset`: load your lists again. A watched job's
cursor that is not in its log is `reset` for that job, with a snapshot behind it.
Rule 3: a job that is not there, or not the owner's, is an `error` frame; the stream goes on.
Rule 4: as for one job: never 503, 429 only over `owner_streams`, and while Redis is away the stream stands.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import structlog
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from streamjobs import metrics
from streamjobs.cursor import Cursor
from streamjobs.errors import Invalid, JobNotFound, StreamjobsError
from streamjobs.events import encode_json
from streamjobs.gateway import sse
from streamjobs.gateway.access import Access
from streamjobs.gateway.coding import PLAIN, Piece
from streamjobs.gateway.edge import abort_of
from streamjobs.gateway.events import manner_of
from streamjobs.gateway.follower import Beginning, Due, Follower
from streamjobs.gateway.forms import merged, parts_of, plain
from streamjobs.gateway.hub import Hub
from streamjobs.gateway.owner_cursor import OwnerCursor, parse_owner_cursor, tag_of
from streamjobs.gateway.owner_feed import FeedFollower, Ready
from streamjobs.gateway.patience import patiently
from streamjobs.gateway.problems import problem_of
from streamjobs.gateway.requests import owner_of
from streamjobs.gateway.sending import run
from streamjobs.gateway.stream import EventStream
from streamjobs.gateway.viewer import Manner
from streamjobs.store import FeedEvent, JobRecord

log = structlog.get_logger(__name__)


class Asked(NamedTuple):
    """What a request is for: whose events, which jobs in full, from where, how."""

    owner: str
    watch: tuple[str, ...]
    cursor: OwnerCursor | None
    manner: Manner


class OwnerEvents:
    """The route, as an ASGI app."""

    def __init__(self, hub: Hub, access: Access) -> None:
        self._hub = hub
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream until the client goes."""
        try:
            asked = self._asked(Request(scope))
            self._hub.open_streams.enter(asked.owner)
        except StreamjobsError:
            metrics.STREAMS_OPENED.labels("refused").inc()
            raise
        try:
            await self._stream(asked, scope, receive, send)
        finally:
            self._hub.open_streams.leave(asked.owner)

    async def _stream(self, asked: Asked, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [*sse.HEADERS]})
        if scope["method"] == "HEAD":
            await send({"type": "http.response.body"})
            return
        stream = OwnerStream(self._hub, asked, abort_of(scope))
        await run(self._hub, stream, PLAIN, scope, receive, send, self._access)

    def _asked(self, request: Request) -> Asked:
        query, settings = QueryParams(request.scope["query_string"]), self._hub.settings
        text = request.headers.get("last-event-id") or query.get("after")
        return Asked(
            owner_of(request),
            watched(query.get("watch", ""), settings.watch_limit),
            parse_owner_cursor(text) if text else None,
            manner_of(query, settings, plain, merged),
        )


def watched(text: str, limit: int) -> tuple[str, ...]:
    """The jobs of a `watch` parameter, each once. Raises `Invalid`."""
    jobs = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if len(jobs) > limit:
        raise Invalid(f"watch: at most {limit} jobs")
    if len({tag_of(job) for job in jobs}) < len(jobs):
        raise Invalid("watch: two of these ids cannot be told apart in a cursor; watch one elsewhere")
    return jobs


class OwnerStream(EventStream):
    """A stream of an owner's feed and of the logs of some jobs."""

    __slots__ = (
        "_admitting", "_dirty", "_feed", "_followers", "_form", "_has_begun", "_hub", "_is_first", "_owner",
        "_places", "_problems",
    )  # fmt: skip

    def __init__(self, hub: Hub, asked: Asked, abort: Callable[[], None]) -> None:
        super().__init__(hub.settings, abort, asked.manner.pace)
        self._hub = hub
        self._owner = asked.owner
        self._form = asked.manner.form
        self._is_first = True
        self._has_begun = False
        known: Mapping[str, Cursor] = asked.cursor.jobs if asked.cursor else {}
        self._places = {job: known[tag_of(job)] for job in asked.watch if tag_of(job) in known}
        """Where the jobs stand whose place is known."""
        self._followers: dict[str, Follower | None] = dict.fromkeys(asked.watch)
        self._dirty: dict[Follower, None] = {}
        self._problems: list[tuple[str, StreamjobsError]] = []
        self._feed = FeedFollower(hub.feed(asked.owner), asked.cursor.feed if asked.cursor else None, self)
        self._admitting = [asyncio.create_task(self._admit(job), name="watch") for job in asked.watch]

    def close(self) -> None:
        """Free everything about it."""
        super().close()
        self._hub.cancel(self._admitting)
        for follower in self._followers.values():
            if follower is not None:
                follower.close()
                metrics.STREAMS_CLOSED.labels(self.ended or "gone").inc()
        self._feed.close()

    # --- what wakes it

    def wake_for(self, follower: Follower) -> None:
        """See `Follows`; an end is not held back."""
        self._dirty[follower] = None
        if follower.channel.end is None:
            self.wake()
        else:
            self.nudge()

    def nudge_for(self, follower: Follower) -> None:
        """See `Follows`."""
        self._dirty[follower] = None
        self.nudge()

    async def _admit(self, job_id: str) -> None:
        """Follow a job once it is known to be the owner's."""
        try:
            record = await patiently(lambda: self._hub.head(job_id))
            self._follow(record)
        except StreamjobsError as error:
            self._give_up(job_id, error)
        except Exception as error:
            log.exception("watch.failed", error=type(error).__name__)
            self._give_up(job_id, StreamjobsError("this job cannot be watched now; connect again"))
        self.nudge()

    def _give_up(self, job_id: str, error: StreamjobsError) -> None:
        del self._followers[job_id]
        self._problems.append((job_id, error))

    def _follow(self, record: JobRecord) -> None:
        if record.owner != self._owner:
            raise JobNotFound("no such job")
        channel = self._hub.channel(record.job_id, record)
        follower = Follower(channel, self._places.get(record.job_id), self)
        self._followers[record.job_id] = follower
        self._dirty[follower] = None

    # --- what is due

    def take(self) -> tuple[Piece, ...]:
        """What is due now; see `EventStream`."""
        frames = self._due()
        if not frames:
            return self.heartbeat(self._hub.health.is_degraded)
        self.events += len(frames)
        if self._is_first and not self.ended:
            self._is_first = False
            return (sse.retry_line() + b"".join(frames),)
        return (b"".join(frames),)

    def _due(self) -> list[bytes]:
        if self._leaving:
            self.ended = self._leaving
            return [sse.handover_frame(self._leaving)]
        frames = self._from_feed()
        if self._feed.position is None or self.ended:
            return frames
        problems, self._problems = self._problems, []
        frames += [_error_frame(job_id, error) for job_id, error in problems]
        for follower in list(self._dirty):
            frames += self._from_job(follower)
        return frames

    def _from_feed(self) -> list[bytes]:
        due = self._feed.take()
        if due is None:
            return []
        if isinstance(due, StreamjobsError):
            self.ended = "error"
            return [sse.error_frame(due)]
        if isinstance(due, Ready):
            self._begin("snapshot" if due.lost is None else "reset")
            ready = self._frame("ready", encode_json({"watch": list(self._followers)}))
            return [ready] if due.lost is None else [sse.reset_frame("unknown_cursor", due.lost), ready]
        self._begin("resumed")
        return [frame for event in due for frame in self._told(event)]

    def _begin(self, how: str) -> None:
        if not self._has_begun:
            self._has_begun = True
            metrics.STREAMS_OPENED.labels(how).inc()

    def _told(self, event: FeedEvent) -> Iterator[bytes]:
        """A frame of an event of the feed, unless it is of a watched job."""
        self._feed.position = event.position
        if event.job_id not in self._followers:
            cursor, kind, data = event.entry
            yield self._frame(kind, _member(event.job_id, str(cursor), kind, data or b"null"))

    def _from_job(self, follower: Follower) -> list[bytes]:
        due = follower.take()
        if due is None:
            self._dirty.pop(follower, None)
            return []
        job_id = follower.channel.job_id
        if isinstance(due, StreamjobsError):
            self._dirty.pop(follower, None)
            return [_error_frame(job_id, due)]
        return list(self._frames(job_id, due))

    def _frames(self, job_id: str, due: Due) -> Iterator[bytes]:
        if isinstance(due, Beginning):
            yield from self._beginning(job_id, due)
            return
        assert not isinstance(due, StreamjobsError)
        for cursor, name, data in parts_of(due.rendered(self._form).body):
            seq, _, epoch = cursor.partition(b"-")
            self._places[job_id] = Cursor(int(seq), int(epoch))
            kind = name.decode()
            yield self._frame(kind, _member(job_id, cursor.decode(), kind, data))

    def _beginning(self, job_id: str, beginning: Beginning) -> Iterator[bytes]:
        snapshot, lost = beginning
        if lost is not None:
            yield _reset_frame(job_id, lost.reason, lost.cursor)
        self._places[job_id] = snapshot.cursor
        yield self._frame("snapshot", _member(job_id, str(snapshot.cursor), "snapshot", snapshot.view))

    def _frame(self, kind: str, data: bytes) -> bytes:
        assert self._feed.position is not None
        places = {tag_of(job): cursor for job, cursor in self._places.items()}
        return sse.frame(str(OwnerCursor(self._feed.position, places)), kind, data)


def _member(job_id: str, cursor: str, kind: str, data: bytes) -> bytes:
    return b'{"job":"%b","id":"%b","type":"%b","data":%b}' % (
        job_id.encode(),
        cursor.encode(),
        kind.encode(),
        data,
    )


def _error_frame(job_id: str, error: StreamjobsError) -> bytes:
    return sse.frame("", "error", encode_json(problem_of(error) | {"job": job_id}))


def _reset_frame(job_id: str, reason: str, cursor: Cursor) -> bytes:
    return sse.frame("", "reset", encode_json({"job": job_id, "reason": reason, "cursor": str(cursor)}))
