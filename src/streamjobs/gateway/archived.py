"""Jobs that are gone from Redis and have a file in the archive: the same answers, made from the file.

Rule 1: Redis is asked first; the archive only about what is not there.
Rule 2: an answer from here says so in a header. Memory is bounded by a page, as for any log; only views are
folded, and those are bounded.
Rule 3: an event stream is never answered with 503: while the archive is away it is a `handover`, and the
client comes back.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from streamjobs import metrics
from streamjobs.archive import Archive, Header, Reading, line_of
from streamjobs.config import Settings
from streamjobs.cursor import START, Cursor
from streamjobs.errors import ArchiveUnavailable, CursorNotFound, Invalid, JobNotFound
from streamjobs.gateway import sse
from streamjobs.gateway.coding import PLAIN
from streamjobs.gateway.follower import Beginning, Lost
from streamjobs.gateway.ring import Chunk
from streamjobs.gateway.snapshots import Snapshot, snapshot_of
from streamjobs.job import Caps, Fold
from streamjobs.store import Page

HEADERS = {"X-Streamjobs-Archived": "true"}
_RAW_HEADERS = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]


class Archived:
    """Answers from the archive; without one there is nothing in it."""

    def __init__(self, archive: Archive | None, settings: Settings, caps: Caps) -> None:
        self._archive = archive
        self._settings = settings
        self._caps = caps

    @contextlib.asynccontextmanager
    async def _reading(self, job_id: str) -> AsyncGenerator[Reading]:
        if self._archive is None:
            raise JobNotFound("no such job")
        async with self._archive.reading(job_id) as reading:
            yield reading

    async def header(self, job_id: str) -> Header:
        """What there is. Raises `JobNotFound`, `ArchiveUnavailable`, as all here."""
        async with self._reading(job_id) as reading:
            return reading.header

    async def remove(self, job_id: str) -> bool:
        """Forget a job; False where it is not here."""
        return self._archive is not None and await self._archive.remove(job_id)

    async def snapshot(self, job_id: str, seq: int | None = None) -> Snapshot:
        """The job's view at its end, or as it stood at event `seq`. Raises `Invalid` beyond the end."""
        fold = Fold(job_id, self._caps)
        async with self._reading(job_id) as reading:
            end = reading.header.events
            if seq is not None and seq > end:
                raise Invalid(f"at: the log ends at {end}")
            while fold.cursor.seq < (seq or end):
                entries = await reading.page(limit=min(500, (seq or end) - fold.cursor.seq))
                fold.apply_all(entries)
        return snapshot_of(fold)

    async def page(self, job_id: str, after: Cursor, limit: int) -> Page:
        """A page of the log. Raises `CursorNotFound`."""
        async with self._reading(job_id) as reading:
            await _seek(reading, after)
            return await self._page(reading, limit)

    async def pages(self, job_id: str) -> AsyncGenerator[Page]:
        """The whole log."""
        async with self._reading(job_id) as reading:
            while True:
                page = await self._page(reading, self._settings.page_events)
                yield page
                if page.is_up_to_date:
                    return

    async def _page(self, reading: Reading, limit: int) -> Page:
        entries = await reading.page(limit, self._settings.page_bytes)
        return Page(True, reading.header.status, reading.header.cursor, entries)

    # --- at once

    async def ndjson(self, job_id: str, after: Cursor, send: Send) -> None:
        """The log, a line an event. Raises `CursorNotFound`."""
        async with self._reading(job_id) as reading:
            await _seek(reading, after)
            headers = [(b"content-type", b"application/x-ndjson"), (b"cache-control", b"no-store")]
            await send({"type": "http.response.start", "status": 200, "headers": [*headers, *_RAW_HEADERS]})
            while entries := (await self._page(reading, self._settings.page_events)).entries:
                await self._send(send, b"".join(map(line_of, entries)))
        await send({"type": "http.response.body"})

    # --- as a stream

    async def stream(
        self, job_id: str, cursor: Cursor | None, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """What a viewer who came after the end would have seen, and then the end."""
        try:
            header = await self.header(job_id)
        except ArchiveUnavailable:
            header = None
        if header is not None and header.cursor == cursor:
            await Response(status_code=204, headers=HEADERS)(scope, receive, send)
            return
        headers = [*sse.HEADERS, *_RAW_HEADERS]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if scope["method"] != "HEAD":
            metrics.STREAMS_OPENED.labels("archived").inc()
            why = "gone"
            try:
                why = await self._stream(job_id, cursor, send)
            finally:
                metrics.STREAMS_CLOSED.labels(why).inc()
        await send({"type": "http.response.body"})

    async def hand_over(self, scope: Scope, send: Send) -> None:
        """A stream of nothing, for whom it is not known yet whether the job is his: come back."""
        await send({"type": "http.response.start", "status": 200, "headers": [*sse.HEADERS]})
        frame = b"" if scope["method"] == "HEAD" else sse.handover_frame("archive_unavailable")
        await send({"type": "http.response.body", "body": frame})

    async def _stream(self, job_id: str, cursor: Cursor | None, send: Send) -> str:
        """Why it ended."""
        try:
            async with contextlib.aclosing(self._frames(job_id, cursor)) as bodies:
                start = sse.retry_line()
                async for body in bodies:
                    await self._send(send, start + body)
                    start = b""
        except ArchiveUnavailable:
            await self._send(send, sse.handover_frame("archive_unavailable"))
            return "error"
        return "ended"

    async def _frames(self, job_id: str, cursor: Cursor | None) -> AsyncGenerator[bytes]:
        async with contextlib.aclosing(self.pieces(job_id, cursor, self._settings.page_bytes)) as pieces:
            async for piece in pieces:
                if isinstance(piece, Chunk):
                    yield piece.plain.body
                else:
                    lost = b"" if piece.lost is None else sse.reset_frame(*piece.lost)
                    yield lost + piece.snapshot.frame.plain

    async def pieces(
        self, job_id: str, cursor: Cursor | None, max_bytes: int
    ) -> AsyncGenerator[Chunk | Beginning]:
        """What a follower would have handed out who came after the end; events about `max_bytes` at once."""
        async with self._reading(job_id) as reading:
            if cursor is not None and await reading.seek(cursor):
                while entries := await reading.page(self._settings.page_events, max_bytes):
                    yield Chunk([sse.event_frame(entry) for entry in entries], entries[-1].cursor)
                return
        lost = None if cursor is None else Lost("unknown_cursor", cursor)
        yield Beginning(await self.snapshot(job_id), lost)

    async def _send(self, send: Send, body: bytes) -> None:
        """A client that takes nothing is let go: its file stays open as long as it is read."""
        for portion in PLAIN.portions([body]):
            async with asyncio.timeout(self._settings.send_timeout):
                await send({"type": "http.response.body", "body": portion, "more_body": True})
        metrics.STREAM_BYTES.inc(len(body))


async def _seek(reading: Reading, after: Cursor) -> None:
    if after != START and not await reading.seek(after):
        raise CursorNotFound(f"{after} is not in this job's log; read it again without a cursor")
