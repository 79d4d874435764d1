"""Look at one job: its view, its result, its log for people, its effects, what it made; and the owner's jobs.

Rule 1: everything here is folded from the log and never older than what the store holds, but for the list of
jobs, which a projection keeps: it may be a moment behind.
Rule 2: waiting is watching: no polling, and a drain ends it early.
Rule 3: what a job made is foreign content: it is given away as a download, in a sandbox.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from streamjobs.config import Settings
from streamjobs.cursor import START, Cursor, parse_cursor
from streamjobs.effects import Ledger
from streamjobs.errors import JobNotFound, Shredded
from streamjobs.events import JobLog, decode_event
from streamjobs.gateway.answers import Headers, answer, etag, viewed
from streamjobs.gateway.archived import HEADERS as ARCHIVED
from streamjobs.gateway.archived import Archived
from streamjobs.gateway.hub import Hub
from streamjobs.gateway.requests import (
    Instant,
    Label,
    is_known,
    ms_of,
    owner_of,
    parameters_of,
    seconds_of,
    seq_of,
)
from streamjobs.job import Status
from streamjobs.store import JobFilter, JobRecord, Page, Store

_LEVELS = {"debug": 0, "info": 1, "warning": 2, "error": 3, "critical": 4}
_MAX_LINES = 10_000


class LogQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What of a job's log for people: from which level up, and how many of the newest lines."""

    level: Literal["debug", "info", "warning", "error", "critical"] = "debug"
    limit: Annotated[int, msgspec.Meta(ge=1, le=_MAX_LINES)] = 1000


class JobsQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which of the owner's jobs."""

    status: Status | None = None
    kind: Label = ""
    queue: Label = ""
    thread: Label = ""
    message: Label = ""
    since: Instant | None = None
    until: Instant | None = None
    limit: Annotated[int, msgspec.Meta(ge=1, le=500)] = 50
    cursor: Label = ""
    counts: Literal[0, 1] = 0

    def where(self) -> JobFilter:
        """The filter as the store takes it."""
        return JobFilter(
            status=self.status or "",
            kind=self.kind,
            queue=self.queue,
            thread_id=self.thread,
            message_id=self.message,
            since_ms=ms_of(self.since),
            until_ms=ms_of(self.until),
        )


class LookRoutes:
    """The routes that only read, of jobs."""

    def __init__(self, store: Store, hub: Hub, archived: Archived, settings: Settings) -> None:
        self._store = store
        self._archived = archived
        self._hub = hub
        self._settings = settings

    def routes(self) -> list[Route]:
        """What a router needs."""
        job = "/v1/jobs/{id}"
        return [
            Route("/v1/jobs", self.jobs, methods=["GET"]),
            Route(job, self.view, methods=["GET"]),
            Route(f"{job}/result", self.result, methods=["GET"]),
            Route(f"{job}/log", self.log, methods=["GET"]),
            Route(f"{job}/effects", self.effects, methods=["GET"]),
            Route(f"{job}/artifacts/{{name}}", self.artifact, methods=["GET"]),
        ]

    async def jobs(self, request: Request) -> Response:
        """The owner's jobs, newest first. A page may be short; the last has no cursor."""
        asked, owner = parameters_of(request, JobsQuery), owner_of(request)
        jobs, cursor = await self._store.index.page(
            owner, asked.where(), limit=asked.limit, before=asked.cursor
        )
        counts = {"counts": await self._store.index.counts(owner)} if asked.counts else {}
        return answer({"jobs": jobs, "cursor": cursor} | counts)

    async def view(self, request: Request) -> Response:
        """Show a job: as it stands, `?at=<seq>` as it stood, `?wait=N` at its end, `&after=` at news."""
        job_id: str = request.path_params["id"]
        query = request.query_params
        at = seq_of("at", query["at"]) if "at" in query else None
        _wait_of(request)  # refused also where it is not waited
        try:
            record = await self._store.jobs.get(job_id)
        except JobNotFound:
            return await self._archived_view(request, job_id, at)
        if at is not None:
            return viewed(await self._hub.snapshots.at(job_id, at))
        record = await self._waited(request, record)
        if is_known(request.headers.get("if-none-match", ""), record.last):
            return Response(status_code=304, headers={"ETag": etag(record.last)})
        return viewed(await self._hub.snapshots.latest(job_id, at_least=record.last))

    async def _archived_view(self, request: Request, job_id: str, at: int | None) -> Response:
        cursor = (await self._archived.header(job_id)).cursor
        if at is None and is_known(request.headers.get("if-none-match", ""), cursor):
            return Response(status_code=304, headers={**ARCHIVED, "ETag": etag(cursor)})
        return viewed(await self._archived.snapshot(job_id, at), ARCHIVED)

    async def result(self, request: Request) -> Response:
        """Show what came of a job; `?wait=N` waits for its end. Until then `status` says where it is."""
        job_id: str = request.path_params["id"]
        headers: Headers = {}
        try:
            record = await self._waited(request, await self._store.jobs.get(job_id))
            snapshot = await self._hub.snapshots.latest(job_id, at_least=record.last)
        except Shredded:
            raise
        except JobNotFound:
            snapshot, headers = await self._archived.snapshot(job_id), ARCHIVED
        result = _result_of(msgspec.json.decode(snapshot.view))
        return answer(result, {**headers, "ETag": etag(snapshot.cursor)})

    async def log(self, request: Request) -> Response:
        """The job's lines for people, oldest first: the newest `?limit=` of those from `?level=` up."""
        job_id: str = request.path_params["id"]
        asked = parameters_of(request, LogQuery)
        least, lines, cursor = _LEVELS[asked.level], list[dict[str, Any]](), START
        pages, headers = await self._pages(job_id)
        async for page in pages:
            for entry in page.entries:
                cursor = entry.cursor
                if entry.type != JobLog.type:
                    continue
                line = decode_event(entry.type, entry.data)
                if isinstance(line, JobLog) and _LEVELS.get(line.level, 1) >= least:
                    lines.append(_line(cursor, line))
            del lines[: -asked.limit]
        return answer({"job": job_id, "lines": lines, "cursor": str(cursor)}, headers)

    async def effects(self, request: Request) -> Response:
        """The effect ledger: every tool call and step, and how far it is known to be."""
        job_id: str = request.path_params["id"]
        ledger, cursor = Ledger(), START
        pages, headers = await self._pages(job_id)
        async for page in pages:
            for entry in page.entries:
                cursor = entry.cursor
                if Ledger.reads(entry.type):
                    ledger.apply(decode_event(entry.type, entry.data))
        return answer({"job": job_id, "effects": ledger.effects(), "cursor": str(cursor)}, headers)

    async def _pages(self, job_id: str) -> tuple[AsyncIterator[Page], Headers]:
        """The job's log, and what an answer made from it says."""
        try:
            await self._store.jobs.get(job_id)
        except JobNotFound:
            await self._archived.header(job_id)
            return self._archived.pages(job_id), ARCHIVED
        return self._store.log.pages(job_id), {}

    async def artifact(self, request: Request) -> Response:
        """Give something away that the job made, as it is."""
        name: str = request.path_params["name"]
        media_type, content = await self._store.artifacts.get(request.path_params["id"], name)
        headers = {
            "Content-Type": media_type,
            "Content-Disposition": f'attachment; filename="{name}"',
            "Content-Security-Policy": "sandbox; default-src 'none'",
            "Cache-Control": "no-cache",
        }
        return Response(content, headers=headers)

    async def _waited(self, request: Request, record: JobRecord) -> JobRecord:
        """The job's head after `?wait=N` for its end, or with `&after=` until that is not the last event."""
        seconds, after = _wait_of(request)
        if seconds is None:
            return record
        seconds = min(seconds, self._settings.max_wait)
        if record.is_ended or (after is not None and after != record.last):
            return record
        await self._hub.wait_for(record.job_id, seconds, after)
        return await self._store.jobs.get(record.job_id)


def _wait_of(request: Request) -> tuple[float | None, Cursor | None]:
    """What `?wait=` and `&after=` say. Raises `Invalid`, `InvalidCursor`."""
    query = request.query_params
    seconds = seconds_of("wait", query["wait"]) if "wait" in query else None
    return seconds, parse_cursor(query["after"]) if query.get("after") else None


def _line(cursor: Cursor, line: JobLog) -> dict[str, Any]:
    return {
        "cursor": str(cursor),
        "ts": line.ts,
        "level": line.level,
        "message": line.message,
        "data": line.data,
    }


def _result_of(view: dict[str, Any]) -> dict[str, Any]:
    """What is of interest once a job is over; an output too large for the log is an artifact."""
    names = ("id", "kind", "status", "summary", "artifacts", "metrics", "error")
    said = {name: view[name] for name in names}
    return said | {"output": view["result"], "output_artifact": view["result_artifact"]}
