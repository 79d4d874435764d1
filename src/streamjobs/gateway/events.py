"""`GET /v1/jobs/{id}/events`: a job's log as a live stream, one page of JSON, or all of it as NDJSON.

`?merge=1` makes the consecutive deltas of one write one event, whose id is the last one's; `?flush=` asks for
more milliseconds between writes than `flush_interval`, up to `flush_max`.

`Accept` chooses: `application/json` and `application/x-ndjson` name theirs, anything else streams.
The cursor comes as `Last-Event-ID`, which wins since a browser's URL is stale on a reconnect, or `?after=`.

    no cursor               snapshot, then what follows (JSON and NDJSON: from the first event)
    0                       from the first event
    one in the log          exactly what follows it
    one that is not         `reset` and snapshot, then what follows (JSON and NDJSON: 409 cursor_not_found)
    no cursor at all        400 invalid_cursor
    the terminal event's    204: there is nothing more, a browser stops

Rule 1: a stream is over for its client once it has seen a terminal event, or a snapshot whose status is one.
Rule 2: never 503 on the stream, and 429 only over `owner_streams`: browsers give up for good. When Redis is
away the stream opens, heartbeats, and goes on when it is back; that a job does not exist is then said in an
`error` frame.
Rule 3: a stream that begins with the view of a long job is zstd where the client accepts that; see `coding`.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Mapping
from typing import Any, NamedTuple

import msgspec
from starlette.datastructures import Headers, QueryParams
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from streamjobs import metrics
from streamjobs.archive import line_of
from streamjobs.config import Settings
from streamjobs.cursor import START, Cursor, parse_cursor
from streamjobs.errors import (
    ArchiveUnavailable,
    CursorNotFound,
    DamagedCiphertext,
    EncryptionKeyMissing,
    Invalid,
    JobNotFound,
    Shredded,
    StoreUnavailable,
    StreamjobsError,
)
from streamjobs.events import encode_json
from streamjobs.gateway import sse
from streamjobs.gateway.access import PROOF, Access
from streamjobs.gateway.archived import HEADERS as ARCHIVED
from streamjobs.gateway.archived import Archived
from streamjobs.gateway.coding import HEADERS, PLAIN, Coding, Zstd
from streamjobs.gateway.edge import abort_of
from streamjobs.gateway.forms import Form, merged, plain
from streamjobs.gateway.hub import Hub
from streamjobs.gateway.requests import owner_of
from streamjobs.gateway.sending import run
from streamjobs.gateway.unproven import UnprovenViewer
from streamjobs.gateway.viewer import Manner, Viewer
from streamjobs.store import Entry, JobRecord, Page

FORMS = ("text/event-stream", "application/x-ndjson", "application/json")
"""What `Accept` may name; where it names several, the first of these."""

LOOKUP_TIMEOUT = 1.0
"""Seconds that a new stream waits for Redis to say that the job exists; then it opens without."""

_ZSTD = re.compile(r"(?:^|[\s,])zstd\s*(?:,|$|;\s*q=(?!0(?:\.0*)?\s*(?:,|$)))", re.IGNORECASE)
_FLUSH = re.compile(r"[0-9]{1,6}", re.ASCII)
_LIMIT = re.compile(r"[1-9][0-9]{0,5}", re.ASCII)


class _Asked(NamedTuple):
    """What a request is for."""

    job_id: str
    form: str
    cursor: Cursor | None
    limit: str | None
    takes_zstd: bool
    manner: Manner


class Events:
    """The route, as an ASGI app."""

    def __init__(self, hub: Hub, archived: Archived, access: Access) -> None:
        self._hub = hub
        self._access = access
        self._archived = archived

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer in the form that `Accept` asks for."""
        owner = owner_of(Request(scope))
        try:
            asked = _asked(scope, self._hub.settings)
            self._hub.open_streams.enter(owner)
        except StreamjobsError:
            metrics.STREAMS_OPENED.labels("refused").inc()
            raise
        try:
            await self._answer(asked, scope, receive, send)
        finally:
            self._hub.open_streams.leave(owner)

    def _answer(self, asked: _Asked, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        # no coroutine of its own: each is half a kilobyte for as long as a stream lives
        if PROOF in scope and asked.form != FORMS[0]:
            raise StoreUnavailable("Redis cannot be reached now")
        if asked.form == "application/x-ndjson":
            return self._ndjson(asked, send)
        if asked.form == "application/json":
            return self._page(asked, scope, receive, send)
        return self._stream(asked, scope, receive, send)

    # --- the stream

    async def _stream(self, asked: _Asked, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            record, end = await look_up(self._hub, asked.job_id)
        except JobNotFound:
            await self._from_archive(asked, scope, receive, send)
            return
        is_proven = PROOF not in scope
        if is_proven and end is not None and asked.cursor == end:
            await Response(status_code=204)(scope, receive, send)
            return
        if is_proven and end is not None:
            await self._require_readable(asked.job_id)
        coding = self._coding(asked, record)
        headers = [*sse.HEADERS, *(HEADERS if isinstance(coding, Zstd) else ())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if scope["method"] == "HEAD":
            await send({"type": "http.response.body"})
            return
        viewer = self._viewer(asked, record, scope)
        await run(self._hub, viewer, coding, scope, receive, send, self._access)

    def _viewer(self, asked: _Asked, record: JobRecord | None, scope: Scope) -> Viewer:
        prove = scope.get(PROOF)
        if prove is None:
            return self._hub.open(asked.job_id, asked.cursor, record, abort_of(scope), asked.manner)
        channel, settings = self._hub.channel(asked.job_id, record), self._hub.settings
        return UnprovenViewer(channel, asked.cursor, settings, abort_of(scope), asked.manner, prove)

    async def _require_readable(self, job_id: str) -> None:
        """Raise `Shredded` of an ended job; a stream that says so would be opened again and again."""
        vault = self._hub.store.vault
        if vault is None:
            return
        try:
            with contextlib.suppress(StoreUnavailable, EncryptionKeyMissing, DamagedCiphertext):
                await vault.current(job_id)
        except Shredded:
            metrics.STREAMS_OPENED.labels("refused").inc()
            raise

    async def _from_archive(self, asked: _Asked, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if await _is_proven(scope):
                await self._archived.stream(asked.job_id, asked.cursor, scope, receive, send)
            else:
                await self._archived.hand_over(scope, send)
        except JobNotFound:
            metrics.STREAMS_OPENED.labels("refused").inc()
            raise

    def _coding(self, asked: _Asked, record: JobRecord | None) -> Coding:
        """zstd where the client takes it and the stream begins with a view that is worth it."""
        if asked.cursor is not None or not asked.takes_zstd:
            return PLAIN
        channel = self._hub.find(asked.job_id)
        events = record.last.seq if record is not None else channel.tail.seq if channel is not None else 0
        return Zstd() if events > self._hub.settings.snapshot_min_events else PLAIN

    # --- the log at once

    async def _page(self, asked: _Asked, scope: Scope, receive: Receive, send: Send) -> None:
        cursor = asked.cursor or START
        limit = _limit(asked.limit, self._hub.settings.page_events)
        headers = {"Cache-Control": "no-store"}
        try:
            page = await self._read(asked.job_id, cursor, limit)
        except Shredded:
            raise
        except JobNotFound:
            page = await self._archived.page(asked.job_id, cursor, limit)
            headers |= ARCHIVED
        last = page.entries[-1].cursor if page.entries else cursor
        body = {
            "events": [_event(entry) for entry in page.entries],
            "cursor": str(last),
            "last": str(page.last),
            "status": page.status,
            "more": not page.is_up_to_date,
        }
        await Response(encode_json(body), 200, headers, "application/json")(scope, receive, send)

    async def _ndjson(self, asked: _Asked, send: Send) -> None:
        cursor = asked.cursor or START
        try:
            page = await self._read(asked.job_id, cursor, self._hub.settings.page_events)
        except Shredded:
            raise
        except JobNotFound:
            await self._archived.ndjson(asked.job_id, cursor, send)
            return
        headers = [(b"content-type", b"application/x-ndjson"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        more = True
        while more:
            more = not page.is_up_to_date
            body = b"".join(map(line_of, page.entries))
            async with asyncio.timeout(self._hub.settings.send_timeout):
                await send({"type": "http.response.body", "body": body, "more_body": more})
            if more:
                page = await self._read(asked.job_id, page.entries[-1].cursor, self._hub.settings.page_events)

    async def _read(self, job_id: str, cursor: Cursor, limit: int) -> Page:
        max_bytes = self._hub.settings.page_bytes
        page = await self._hub.store.log.page(job_id, cursor, limit=limit, max_bytes=max_bytes)
        if not page.found:
            raise CursorNotFound(f"{cursor} is not in this job's log; read it again without a cursor")
        return page


async def _is_proven(scope: Scope) -> bool:
    """Whether the job is the client's, if that can be said now. Raises `JobNotFound` where it is not."""
    prove = scope.get(PROOF)
    if prove is not None:
        try:
            await prove()
        except (ArchiveUnavailable, StoreUnavailable):
            return False
    return True


async def look_up(hub: Hub, job_id: str) -> tuple[JobRecord | None, Cursor | None]:
    """The job's head, where it takes asking, and its terminal event if it has ended.

    Raises `JobNotFound`; nothing when Redis is away.
    """
    channel = hub.find(job_id)
    if channel is not None and channel.is_ready:
        return None, channel.end
    try:
        async with asyncio.timeout(LOOKUP_TIMEOUT):
            record = await hub.head(job_id)
    except (StoreUnavailable, TimeoutError):
        return None, None
    return record, record.last if record.is_ended else None


def _asked(scope: Scope, settings: Settings) -> _Asked:
    """Read a request. Raises `InvalidCursor`, `Invalid`."""
    headers, query = Headers(scope=scope), QueryParams(scope["query_string"])
    text = headers.get("last-event-id") or query.get("after")
    accept = headers.get("accept", "")
    return _Asked(
        job_id=scope["path_params"]["id"],
        form=next((form for form in FORMS if form in accept), FORMS[0]),
        cursor=parse_cursor(text) if text else None,
        limit=query.get("limit"),
        takes_zstd=takes_zstd(headers.get("accept-encoding", "")),
        manner=manner_of(query, settings, plain, merged),
    )


def manner_of(query: Mapping[str, str], settings: Settings, plain: Form, merged: Form) -> Manner:
    """What `merge` and `flush` ask for: which of the forms, how far apart. Raises `Invalid`."""
    merge, flush = query.get("merge", "0"), query.get("flush")
    if merge not in {"0", "1"}:
        raise Invalid("merge: 0 or 1")
    return Manner(merged if merge == "1" else plain, 0.0 if flush is None else _pace(flush, settings))


def _pace(flush: str, settings: Settings) -> float:
    """Seconds between writes; 0 where that is how often events become visible anyway. Raises `Invalid`."""
    least, most = round(1000 * settings.flush_interval), round(1000 * settings.flush_max)
    if not _FLUSH.fullmatch(flush) or not least <= int(flush) <= most:
        raise Invalid(f"flush: milliseconds, from {least} to {most}")
    return 0.0 if int(flush) == least else int(flush) / 1000


def takes_zstd(accepts: str) -> bool:
    """Whether an `Accept-Encoding` names zstd, and not with a weight of 0."""
    return _ZSTD.search(accepts) is not None


def _event(entry: Entry) -> dict[str, Any]:
    return {"id": str(entry.cursor), "type": entry.type, "data": msgspec.Raw(entry.data)}


def _limit(text: str | None, most: int) -> int:
    if text is None:
        return most
    if not _LIMIT.fullmatch(text):
        raise Invalid("limit: a number of events, at least 1")
    return min(int(text), most)
