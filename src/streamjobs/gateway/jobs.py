"""Submit a job, look at it, wait for it, cancel it, send it a signal.

Rule 1: a submission is answered once it is in the log. With an `Idempotency-Key` it may be sent again:
the same body gets the same job and `Idempotent-Replayed: true`, another body 422.
Rule 2: a job's view is folded from its log and never older than what the store holds; its ETag is its cursor.
Rule 3: waiting is watching: no polling, and a drain ends it early.

Whose job it is comes from `X-Streamjobs-Owner`, believed as it stands: a placeholder until there is
authentication, for networks where nobody but a trusted proxy sets it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Literal, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from streamjobs.config import Settings
from streamjobs.cursor import Cursor, parse_cursor
from streamjobs.errors import BadRequest, Invalid
from streamjobs.events import Json, encode_json
from streamjobs.gateway.body import decode_body, fields_of, read_body
from streamjobs.gateway.hub import Hub
from streamjobs.gateway.snapshots import Snapshot
from streamjobs.store import JobRecord, Store, Submission
from streamjobs.workflow import Workflow

ANONYMOUS = "anonymous"
OWNER_HEADER = "x-streamjobs-owner"
MAX_METADATA = 64
"""Members of `metadata`."""

_KEY = re.compile(r"[\x20-\x7e]{1,255}", re.ASCII)
_WAIT = re.compile(r"\d{1,6}(\.\d{1,3})?", re.ASCII)
_SEQ = re.compile(r"[1-9][0-9]{0,15}", re.ASCII)
_NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")
_PREFER_WAIT = re.compile(r"(?:^|[,;])\s*wait\s*=\s*\"?(\d{1,6})\"?\s*(?=$|[,;])", re.IGNORECASE | re.ASCII)

Seconds = Annotated[float, msgspec.Meta(ge=0, le=10 * 365 * 86400)]
Label = Annotated[str, msgspec.Meta(max_length=200, pattern=r"\A[^\x00-\x1f\x7f]*\Z")]


class JobRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A submission's body. `delay` in seconds; `run_at` is RFC 3339 with an offset; not both."""

    kind: Label
    input: Json = None
    queue: Label | None = None
    priority: Literal["high", "default", "low"] = "default"
    thread_id: Label = ""
    message_id: Label = ""
    metadata: Annotated[dict[Label, Json], msgspec.Meta(max_length=MAX_METADATA)] = {}
    delay: Seconds | None = None
    run_at: Annotated[datetime, msgspec.Meta(tz=True)] | None = None
    timeout: Seconds | None = None
    max_attempts: Annotated[int, msgspec.Meta(ge=1, le=100)] | None = None
    concurrency_key: Label = ""

    def delay_from(self, now: float) -> float:
        """Seconds until it may start, by this machine's clock where an instant was given."""
        if self.run_at is None:
            return self.delay or 0.0
        return max(0.0, self.run_at.timestamp() - now)


class CancelRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A cancellation's body, which may be absent."""

    reason: Annotated[str, msgspec.Meta(max_length=1000)] = ""


class SignalRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A signal's body; a `key` makes it safe to send again."""

    name: Annotated[Label, msgspec.Meta(min_length=1)]
    payload: Json = None
    key: Label = ""


class Registry(Protocol):
    """What may be submitted; `App` is one."""

    def check_submission(self, kind: str, raw_input: bytes | msgspec.Raw) -> None:
        """Refuse what could not run, as `App.check_submission`."""
        ...

    @property
    def workflows(self) -> Mapping[str, Workflow]:
        """The program's own workflows by kind."""
        ...


class JobRoutes:
    """The routes of single jobs."""

    def __init__(self, store: Store, hub: Hub, registry: Registry, settings: Settings) -> None:
        self._store = store
        self._hub = hub
        self._registry = registry
        self._settings = settings

    def routes(self) -> list[Route]:
        """What a router needs."""
        return [
            Route("/v1/jobs", self.submit, methods=["POST"]),
            Route("/v1/jobs/{id}", self.view, methods=["GET"]),
            Route("/v1/jobs/{id}/cancel", self.cancel, methods=["POST"]),
            Route("/v1/jobs/{id}/signal", self.signal, methods=["POST"]),
        ]

    # --- submit

    async def submit(self, request: Request) -> Response:
        """Take a job: 202, or with `Prefer: wait=N` 200 and the view if it ends in time."""
        key = _idempotency_key(request)
        body = await self._body(request)
        submission = self._submission(fields_of(decode_body(body), JobRequest), _owner(request), key, body)
        receipt = await self._store.jobs.submit(submission)
        headers = {"Location": f"/v1/jobs/{receipt.job_id}"}
        if key and receipt.repeated:
            headers["Idempotent-Replayed"] = "true"
        wait = _preferred_wait(request)
        if wait is None and not receipt.repeated:
            status = "scheduled" if submission.delay > 0 else "queued"
            return _accepted(receipt.job_id, submission.kind, status, receipt.cursor, headers)
        if wait is not None:
            seconds = min(wait, self._settings.max_wait)
            headers["Preference-Applied"] = f"wait={seconds:.0f}"
            if await self._hub.wait_for(receipt.job_id, seconds):
                return _viewed(await self._hub.snapshots.latest(receipt.job_id), headers)
        record = await self._store.jobs.get(receipt.job_id)
        return _accepted(record.job_id, record.kind, record.status, record.last, headers)

    def _submission(self, asked: JobRequest, owner: str, key: str, body: bytes) -> Submission:
        if asked.delay is not None and asked.run_at is not None:
            raise Invalid("run_at: not together with delay")
        raw_input = _without_nul("input", asked.input)
        _without_nul("metadata", asked.metadata)
        self._registry.check_submission(asked.kind, raw_input)
        workflow = self._registry.workflows.get(asked.kind)
        return Submission(
            kind=asked.kind,
            owner=owner,
            input=raw_input,
            queue=asked.queue or (workflow and workflow.queue) or self._default_queue(),
            priority=asked.priority,
            thread_id=asked.thread_id,
            message_id=asked.message_id,
            metadata=asked.metadata,
            delay=asked.delay_from(time.time()),
            timeout=asked.timeout if asked.timeout is not None else workflow and workflow.timeout,
            max_attempts=asked.max_attempts or (workflow and workflow.max_attempts) or 0,
            concurrency_key=asked.concurrency_key,
            idempotency_key=key,
            body=body,
        )

    def _default_queue(self) -> str:
        queues = self._settings.queues
        return "default" if "default" in queues else queues[0]

    # --- look

    async def view(self, request: Request) -> Response:
        """Show a job: as it stands, `?at=<seq>` as it stood, `?wait=N` at its end, `&after=` at news."""
        job_id: str = request.path_params["id"]
        query = request.query_params
        record = await self._store.jobs.get(job_id)
        if "at" in query:
            return _viewed(await self._hub.snapshots.at(job_id, _seq("at", query["at"])))
        if "wait" in query:
            after = parse_cursor(query["after"]) if query.get("after") else None
            record = await self._wait(
                record, min(_seconds("wait", query["wait"]), self._settings.max_wait), after
            )
        if _is_known(request.headers.get("if-none-match", ""), record.last):
            return Response(status_code=304, headers={"ETag": _etag(record.last)})
        return _viewed(await self._hub.snapshots.latest(job_id, at_least=record.last))

    async def _wait(self, record: JobRecord, seconds: float, after: Cursor | None) -> JobRecord:
        """The job's head after waiting for its end, or with `after` until that is not the last event."""
        if record.is_ended or (after is not None and after != record.last):
            return record
        await self._hub.wait_for(record.job_id, seconds, after)
        return await self._store.jobs.get(record.job_id)

    # --- act

    async def cancel(self, request: Request) -> Response:
        """Ask for a job's end. The answer is the same however often that is asked; the log says the rest."""
        job_id: str = request.path_params["id"]
        body = await self._body(request)
        asked = fields_of(decode_body(body), CancelRequest) if body else CancelRequest()
        await self._store.jobs.cancel(job_id, by=_owner(request), reason=asked.reason)
        return _json(encode_json({"id": job_id, "cancel_requested": True, "links": _links(job_id)}))

    async def signal(self, request: Request) -> Response:
        """Send a live job a value; `repeated` where its key had come before, and nothing was done."""
        job_id: str = request.path_params["id"]
        asked = fields_of(decode_body(await self._body(request)), SignalRequest)
        is_new = await self._store.jobs.signal(job_id, asked.name, asked.payload, key=asked.key)
        return _json(encode_json({"id": job_id, "signal": asked.name, "repeated": not is_new}))

    async def _body(self, request: Request) -> bytes:
        return await read_body(request.scope, request.receive, self._settings.max_body)


def _owner(request: Request) -> str:
    return request.headers.get(OWNER_HEADER) or ANONYMOUS


def _without_nul(field: str, value: Json) -> bytes:
    """Encode a value; NUL, which ends strings in too many places behind us, is refused wherever it stands."""
    encoded = encode_json(value)
    if b"\\u0000" in encoded and _NUL.search(encoded):
        raise Invalid(f"{field}: a string holds NUL")
    return encoded


def _idempotency_key(request: Request) -> str:
    key = request.headers.get("idempotency-key")
    if key is None:
        return ""
    if not _KEY.fullmatch(key):
        raise BadRequest("Idempotency-Key: 1 to 255 printable ASCII characters")
    return key


def _preferred_wait(request: Request) -> float | None:
    """N of `Prefer: wait=N` (RFC 7240); a preference that does not parse is ignored."""
    match = _PREFER_WAIT.search(request.headers.get("prefer", ""))
    return float(match[1]) if match else None


def _seconds(field: str, text: str) -> float:
    if not _WAIT.fullmatch(text):
        raise Invalid(f"{field}: seconds, at least 0")
    return float(text)


def _seq(field: str, text: str) -> int:
    if not _SEQ.fullmatch(text):
        raise Invalid(f"{field}: the number of an event, at least 1")
    return int(text)


def _etag(cursor: Cursor) -> str:
    return f'"{cursor}"'


def _is_known(if_none_match: str, cursor: Cursor) -> bool:
    tags = (tag.strip().removeprefix("W/") for tag in if_none_match.split(","))
    return any(tag in {_etag(cursor), "*"} for tag in tags)


def _links(job_id: str) -> dict[str, str]:
    here = f"/v1/jobs/{job_id}"
    return {"self": here, "events": f"{here}/events", "cancel": f"{here}/cancel"}


def _accepted(job_id: str, kind: str, status: str, cursor: Cursor, headers: Mapping[str, str]) -> Response:
    body: dict[str, Any] = {"id": job_id, "kind": kind, "status": status, "cursor": str(cursor)}
    return _json(encode_json(body | {"links": _links(job_id)}), headers, status_code=202)


def _viewed(snapshot: Snapshot, headers: Mapping[str, str] | None = None) -> Response:
    return _json(snapshot.view, {**(headers or {}), "ETag": _etag(snapshot.cursor)})


def _json(body: bytes, headers: Mapping[str, str] | None = None, status_code: int = 200) -> Response:
    caching = {"Cache-Control": "no-cache"}
    return Response(body, status_code, {**caching, **(headers or {})}, media_type="application/json")
