"""An asynchronous client: start jobs, look, act, watch them to their end, and operate the fleet.

Rule 1: `watch` resumes by itself, from the last event it yielded; each event comes once, in order.
Rule 2: what the gateway refuses is a `GatewayError` with its code; what cannot be reached is
`GatewayUnreachable`. Only what waits (`watch`, `wait`) comes back by itself, for `patience` seconds; whether
an act may be sent again is for its caller to say, with a key.
Rule 3: every route is one method here, by the job's id; `Handle` is these methods for one job.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Any, ClassVar, NamedTuple, Self
from urllib.parse import quote

import httpx
import msgspec

from streamjobs.client.handle import ENDED, Handle
from streamjobs.client.notices import NotificationsClient, WebhooksClient
from streamjobs.client.schedules import SchedulesClient
from streamjobs.cursor import Cursor, parse_cursor
from streamjobs.errors import Invalid, InvalidCursor, StreamjobsError
from streamjobs.events import TERMINAL, UNENCODABLE, Json, encode_json
from streamjobs.llm.sse import EventParser, ServerSentEvent

_SILENCE = 45.0
"""Seconds without a byte, three heartbeats, after which a stream counts as dead."""
_POLL = 30.0
"""Seconds that one request waits for a job's end."""
_ENDS = TERMINAL | {"error"}
_UNPLACED = frozenset({"reset", "error"})
"""Events that are none of the log's: the id that a parser has for them is the one before."""
_NO_EVENTS = frozenset({"handover", "ping"})
_NO_CONTENT, _OK = 204, 200
_PASSING = frozenset({429, 502, 503, 504})
"""What a proxy answers while gateways are replaced, and what a watcher waits for."""


class GatewayError(StreamjobsError):
    """The gateway refused; `code` is the problem's own, `http_status` its status."""

    def __init__(self, message: str, code: str, status: int) -> None:
        super().__init__(message)
        self.code = code  # pyright: ignore[reportAttributeAccessIssue]
        self.http_status = status  # pyright: ignore[reportAttributeAccessIssue]


class GatewayUnreachable(StreamjobsError):  # noqa: N818 - named after what happened, as all of ours
    """No gateway answers at that address."""

    code: ClassVar[str] = "gateway_unreachable"


class WatchedEvent(NamedTuple):
    """One event of a stream: its position (empty for `reset`), its type, its JSON, and that JSON decoded."""

    id: str
    type: str
    raw: bytes

    @property
    def data(self) -> Json:
        """The content, decoded."""
        return msgspec.json.decode(self.raw)


class Client:
    """Talks to one gateway. Use as `async with Client(url, token=…) as client`.

    `token` is an API key or a JWT; `owner` whom to act as, where that is allowed.
    """

    def __init__(self, base_url: str, *, owner: str = "", token: str = "", patience: float = 30.0) -> None:
        headers = {"x-streamjobs-owner": owner} if owner else {}
        if token:
            headers["authorization"] = f"Bearer {token}"
        timeout = httpx.Timeout(10.0, read=90.0)
        try:
            self._http = httpx.AsyncClient(
                base_url=base_url, headers=headers, timeout=timeout, trust_env=False
            )
        except httpx.InvalidURL as error:
            raise GatewayUnreachable(f"not an address: {base_url} ({error})") from error
        self._patience = patience
        self.schedules = SchedulesClient(self._call)
        self.notifications = NotificationsClient(self._call)
        self.webhooks = WebhooksClient(self._call)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    # --- start

    async def submit(self, submission: dict[str, Json], *, idempotency_key: str = "") -> dict[str, Any]:
        """Submit a job as `POST /v1/jobs` takes it; returns its id, status, cursor and links."""
        return await self._post("/v1/jobs", submission, idempotency_key)

    async def start(
        self,
        kind: str,
        input: object = None,  # noqa: A002 - what the field is called everywhere
        *,
        key: str = "",
        queue: str | None = None,
        priority: str | None = None,
        delay: float | None = None,
        timeout: float | None = None,
        start_timeout: float | None = None,
        max_attempts: int | None = None,
        concurrency_key: str | None = None,
        thread_id: str | None = None,
        message_id: str | None = None,
        metadata: dict[str, Json] | None = None,
    ) -> Handle:
        """Submit a job and get a handle on it; the same `key` is the same job.

        `input` may be anything that encodes to JSON, structs and dataclasses too. Durations are in seconds;
        None leaves a field to the workflow and the settings. Raises `GatewayError`, `GatewayUnreachable`,
        `Invalid` where the input does not encode.
        """
        asked = {
            "queue": queue, "priority": priority, "delay": delay, "timeout": timeout,
            "start_timeout": start_timeout, "max_attempts": max_attempts, "concurrency_key": concurrency_key,
            "thread_id": thread_id, "message_id": message_id, "metadata": metadata,
        }  # fmt: skip
        given = {name: value for name, value in asked.items() if value is not None}
        answer = await self.submit({"kind": kind, "input": input, **given}, idempotency_key=key)
        return Handle(self, answer["id"], kind)

    def handle(self, job_id: str, kind: str = "") -> Handle:
        """A handle on a job that exists."""
        return Handle(self, job_id, kind)

    async def rerun(self, job_id: str, *, key: str = "") -> Handle:
        """Submit an ended job again, as a new one that is linked to it."""
        answer = await self._post(f"{_path(job_id)}/rerun", None, key)
        return Handle(self, answer["id"], answer["kind"])

    # --- look

    async def get(self, job_id: str) -> dict[str, Any]:
        """A job's view."""
        return await self._call("GET", _path(job_id))

    async def result(self, job_id: str, wait: float = 0.0) -> dict[str, Any]:
        """What came of a job so far, after waiting up to `wait` seconds for its end."""
        return await self._call("GET", f"{_path(job_id)}/result", params={"wait": f"{max(wait, 0.0):.3f}"})

    async def wait(self, job_id: str, timeout: float | None = None) -> dict[str, Any]:
        """Wait for a job's end, over any number of requests; its `result`. Raises `TimeoutError`."""
        until = math.inf if timeout is None else time.monotonic() + timeout
        viewer = _Viewer(None)
        while True:
            began = time.monotonic()
            seconds = max(0.0, min(_POLL, until - began))
            try:
                answer = await self.result(job_id, seconds)
            except (GatewayUnreachable, GatewayError) as error:
                if not _is_passing(error) or viewer.seconds_alone() > self._patience:
                    raise
                answer = None
            else:
                viewer.has_company()
            if answer is not None and answer["status"] in ENDED:
                return answer
            if time.monotonic() >= until:
                raise TimeoutError(f"{job_id} has not ended within {timeout:g} s")
            if answer is None or time.monotonic() - began < seconds / 2:
                await asyncio.sleep(viewer.pause())  # a gateway that is away, or drains, answers at once

    async def log(self, job_id: str, *, level: str = "debug", limit: int = 1000) -> list[dict[str, Any]]:
        """The newest lines of a job's log for people, from a level up, oldest first."""
        answer = await self._call("GET", f"{_path(job_id)}/log", params={"level": level, "limit": limit})
        return answer["lines"]

    async def effects(self, job_id: str) -> list[dict[str, Any]]:
        """Every tool call and step of a job, and how far it is known to be."""
        return (await self._call("GET", f"{_path(job_id)}/effects"))["effects"]

    async def export(self, job_id: str) -> AsyncGenerator[bytes]:
        """A job's whole log as it stands, a line of JSON an event, in pieces of any size.

        Of a live, an ended or an archived job. Raises `GatewayError`, and `GatewayUnreachable` also where
        the end is missing.
        """
        headers = {"accept": "application/x-ndjson"}
        try:
            async with self._http.stream("GET", f"{_path(job_id)}/events", headers=headers) as response:
                if response.status_code != _OK:
                    raise _refusal(response, await response.aread())
                async for piece in response.aiter_bytes():
                    yield piece
        except httpx.TransportError as error:
            raise GatewayUnreachable(f"{self._http.base_url} broke off: {type(error).__name__}") from error

    async def artifact(self, job_id: str, name: str) -> bytes:
        """The content of something that a job made; its media type is in the view's `artifacts`."""
        return (await self._request("GET", f"{_path(job_id)}/artifacts/{quote(name, safe='')}")).content

    async def jobs(self, **where: Any) -> dict[str, Any]:
        """One page of the owner's jobs, newest first: `jobs`, and the `cursor` of the next page.

        `where`: status, kind, queue, thread, message, since, until, limit, cursor; with counts=1 the answer
        has `counts` of all the owner's jobs by status.
        """
        return await self._call("GET", "/v1/jobs", params=_given(**where))

    # --- act

    async def cancel(self, job_id: str, reason: str = "") -> dict[str, Any]:
        """Ask for a job's end."""
        return await self._post(f"{_path(job_id)}/cancel", _given(reason=reason))

    async def pause(self, job_id: str, reason: str = "", *, key: str = "") -> dict[str, Any]:
        """Park a job until it is resumed; `status` is `paused`, or `requested` while it still runs."""
        return await self._post(f"{_path(job_id)}/pause", _given(reason=reason), key)

    async def resume(self, job_id: str, reason: str = "", *, key: str = "") -> dict[str, Any]:
        """Let a paused job go on."""
        return await self._post(f"{_path(job_id)}/resume", _given(reason=reason), key)

    async def signal(self, job_id: str, name: str, payload: object = None, *, key: str = "") -> bool:
        """Send a live job a value; False where the `key` was used before, and nothing was done."""
        body = {"name": name, "payload": payload, "key": key}
        return not (await self._post(f"{_path(job_id)}/signal", body))["repeated"]

    async def approve(self, job_id: str, comment: str = "", *, request: str = "", key: str = "") -> bool:
        """Say yes to the approval of that `request` key, or to the oldest that waits."""
        return await self.signal(job_id, "approve", {"comment": comment, "key": request}, key=key)

    async def deny(self, job_id: str, comment: str = "", *, request: str = "", key: str = "") -> bool:
        """Say no to the approval of that `request` key, or to the oldest that waits."""
        return await self.signal(job_id, "deny", {"comment": comment, "key": request}, key=key)

    async def delete(self, job_id: str) -> None:
        """Forget an ended job, and everything of it, now."""
        await self._call("DELETE", _path(job_id))

    # --- operate

    async def workers(self) -> list[dict[str, Any]]:
        """Who works."""
        return (await self._call("GET", "/v1/workers"))["workers"]

    async def queues(self) -> list[dict[str, Any]]:
        """What waits in each queue, and since when."""
        return (await self._call("GET", "/v1/queues"))["queues"]

    async def stats(self, **where: Any) -> dict[str, Any]:
        """What was counted for each kind and queue: `stats`, or `history` in steps.

        `where`: kind, queue, history (5m or 1h), since.
        """
        return await self._call("GET", "/v1/stats", params=_given(**where))

    async def projections(self) -> list[dict[str, Any]]:
        """How far each projection is behind, and on which jobs it failed."""
        return (await self._call("GET", "/v1/projections"))["projections"]

    async def rebuild_projection(self, name: str) -> dict[str, Any]:
        """Have a projection made anew from the logs."""
        return await self._post(f"/v1/projections/{quote(name, safe='')}/rebuild", {})

    async def retry_projection(self, name: str) -> dict[str, Any]:
        """Let a projection look again at the jobs on which it failed; `retried` says how many."""
        return await self._post(f"/v1/projections/{quote(name, safe='')}/retry", {})

    async def workflows(self) -> list[dict[str, Any]]:
        """Every kind of job that may be submitted."""
        return (await self._call("GET", "/v1/workflows"))["workflows"]

    async def tools(self) -> list[dict[str, Any]]:
        """Every tool that a model may be given."""
        return (await self._call("GET", "/v1/tools"))["tools"]

    async def dead(self, **where: Any) -> dict[str, Any]:
        """One page of failed jobs, newest first.

        `where`: kind, queue, code, owner, since, until, limit, cursor.
        """
        return await self._call("GET", "/v1/dead", params=_given(**where))

    async def rerun_dead(self, *, key: str = "", **where: Any) -> list[dict[str, str]]:
        """Submit failed jobs again: `from` and `to` of each; `where` as in `dead`, without a cursor."""
        return (await self._post("/v1/dead/rerun", _given(**where), key))["rerun"]

    async def strikes(self) -> list[dict[str, Any]]:
        """What operators have stopped."""
        return (await self._call("GET", "/v1/strikes"))["strikes"]

    async def strike(self, scope: str, name: str, reason: str = "") -> bool:
        """Stop a queue, a kind or a tool for the whole fleet; False where it was stopped already."""
        content = _encoded(_given(reason=reason))
        return (await self._call("PUT", _strike(scope, name), content=content))["changed"]

    async def unstrike(self, scope: str, name: str) -> bool:
        """Let it go on; False where it was not stopped."""
        return (await self._call("DELETE", _strike(scope, name)))["changed"]

    # --- watch

    async def watch(self, job_id: str, after: str | None = None) -> AsyncGenerator[WatchedEvent]:
        """Yield a job's events until its end, over any number of connections.

        `after` None begins with a `snapshot` event, "0" with the first event, a cursor behind it. A `reset`
        event, followed by a `snapshot`, says that the log was replaced. Raises `GatewayError`,
        `GatewayUnreachable`.
        """
        viewer = _Viewer(after)
        while not viewer.is_over:
            try:
                async with contextlib.aclosing(self._connection(job_id, viewer)) as events:
                    async for event in events:
                        yield event
                        if event.type in _ENDS:
                            return
            except httpx.TransportError as error:
                if viewer.seconds_alone() > self._patience:
                    raise GatewayUnreachable(f"no answer from {self._http.base_url}: {error}") from error
            if not viewer.is_over:
                await asyncio.sleep(viewer.pause())

    async def _connection(self, job_id: str, viewer: _Viewer) -> AsyncGenerator[WatchedEvent]:
        headers = {"accept": "text/event-stream"}
        if viewer.cursor is not None:
            headers["last-event-id"] = viewer.cursor
        timeout = httpx.Timeout(10.0, read=_SILENCE)
        async with self._http.stream(
            "GET", f"{_path(job_id)}/events", headers=headers, timeout=timeout
        ) as response:
            if response.status_code == _NO_CONTENT:
                viewer.is_over = True
                return
            if response.status_code in _PASSING:
                raise httpx.RemoteProtocolError(f"status {response.status_code}")
            if response.status_code != _OK:
                raise _refusal(response, await response.aread())
            viewer.has_company()
            parser = EventParser()
            async for chunk in response.aiter_bytes():
                for event in parser.feed(chunk):
                    watched = viewer.take(event)
                    if watched is not None:
                        yield watched

    # --- requests

    async def _post(self, path: str, body: object, key: str = "") -> dict[str, Any]:
        headers = {"idempotency-key": key} if key else {}
        return await self._call("POST", path, content=_encoded(body), headers=headers)

    async def _call(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        response = await self._request(method, path, **request)
        try:
            return msgspec.json.decode(response.content, type=dict[str, Any])
        except msgspec.MsgspecError as error:
            message = f"what answers at {self._http.base_url} is no gateway"
            raise GatewayError(message, "no_gateway", response.status_code) from error

    async def _request(self, method: str, path: str, **request: Any) -> httpx.Response:
        if request.get("content"):
            request["headers"] = {"content-type": "application/json", **request.get("headers", {})}
        try:
            response = await self._http.request(method, path, **request)
        except httpx.TransportError as error:
            raise GatewayUnreachable(
                f"no answer from {self._http.base_url}: {type(error).__name__}"
            ) from error
        if response.is_error:
            raise _refusal(response, response.content)
        return response


class _Viewer:
    """Where a watcher is: what it has seen, and how long it waits before it comes back."""

    def __init__(self, after: str | None) -> None:
        self.cursor = after
        self.is_over = False
        self._seen = _seq(after)
        self._retry = 1.0
        self._failures = 0
        self._alone_since: float | None = None

    def has_company(self) -> None:
        """A gateway answered."""
        self._alone_since = None

    def seconds_alone(self) -> float:
        """How long no gateway has answered; counts from the first failure, not from the last event."""
        if self._alone_since is None:
            self._alone_since = time.monotonic()
        return time.monotonic() - self._alone_since

    def take(self, event: ServerSentEvent) -> WatchedEvent | None:
        """The event, or None for one that was seen before or tells of the connection only."""
        self._failures = 0
        if event.retry is not None:
            self._retry = event.retry / 1000
        if event.event in _NO_EVENTS:
            return None
        if not event.id or event.event in _UNPLACED:
            return WatchedEvent("", event.event, event.data)
        position = _seq(event.id)
        if event.event != "snapshot" and position.seq <= self._seen.seq:
            return None
        self._seen = position
        self.cursor = event.id
        return WatchedEvent(event.id, event.event, event.data)

    def pause(self) -> float:
        """Seconds before the next connection."""
        self._failures += 1
        return min(self._retry, 0.2 * 2 ** min(self._failures, 8)) * random.uniform(0.5, 1.0)


def _path(job_id: str) -> str:
    return f"/v1/jobs/{quote(job_id, safe='')}"


def _strike(scope: str, name: str) -> str:
    return f"/v1/strikes/{quote(scope, safe='')}/{quote(name, safe='')}"


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value not in {"", None}}


def _encoded(body: object) -> bytes:
    """A body as JSON; none for None or no fields. Raises `Invalid`."""
    if body is None or body == {}:
        return b""
    try:
        return encode_json(body)
    except UNENCODABLE as error:
        raise Invalid(f"cannot be sent as JSON: {error}") from error


def _is_passing(error: StreamjobsError) -> bool:
    return isinstance(error, GatewayUnreachable) or error.http_status in _PASSING


def _seq(cursor: str | None) -> Cursor:
    try:
        return parse_cursor(cursor or "0")
    except InvalidCursor:
        return Cursor(0, 0)


def _refusal(response: httpx.Response, body: bytes) -> GatewayError:
    try:
        problem: dict[str, Any] = msgspec.json.decode(body)
        detail, code = str(problem.get("detail") or problem.get("title")), str(problem.get("code"))
    except (msgspec.MsgspecError, AttributeError):
        detail, code = f"the gateway answered {response.status_code}", "gateway_error"
    return GatewayError(detail, code, response.status_code)
