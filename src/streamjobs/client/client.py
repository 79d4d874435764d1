"""An asynchronous client: submit, look, cancel, and watch a job to its end.

Rule 1: `watch` resumes by itself, from the last event it yielded; each event comes once, in order.
Rule 2: what the gateway refuses is a `GatewayError` with its code; what cannot be reached is
`GatewayUnreachable`, after `patience` seconds without any answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Any, ClassVar, NamedTuple, Self
from urllib.parse import quote

import httpx
import msgspec

from streamjobs.client.schedules import SchedulesClient
from streamjobs.cursor import Cursor, parse_cursor
from streamjobs.errors import InvalidCursor, StreamjobsError
from streamjobs.events import TERMINAL, Json
from streamjobs.llm.sse import EventParser, ServerSentEvent

_SILENCE = 45.0
"""Seconds without a byte, three heartbeats, after which a stream counts as dead."""
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
    """Talks to one gateway. Use as `async with Client(url) as client`."""

    def __init__(self, base_url: str, *, owner: str = "", patience: float = 30.0) -> None:
        headers = {"x-streamjobs-owner": owner} if owner else {}
        timeout = httpx.Timeout(10.0, read=90.0)
        try:
            self._http = httpx.AsyncClient(
                base_url=base_url, headers=headers, timeout=timeout, trust_env=False
            )
        except httpx.InvalidURL as error:
            raise GatewayUnreachable(f"not an address: {base_url} ({error})") from error
        self._patience = patience
        self.schedules = SchedulesClient(self._call)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def submit(self, submission: dict[str, Json], *, idempotency_key: str = "") -> dict[str, Any]:
        """Submit a job as `POST /v1/jobs` takes it; returns its id, status, cursor and links."""
        headers = {"idempotency-key": idempotency_key} if idempotency_key else {}
        return await self._call("POST", "/v1/jobs", json=submission, headers=headers)

    async def get(self, job_id: str) -> dict[str, Any]:
        """A job's view."""
        return await self._call("GET", _path(job_id))

    async def cancel(self, job_id: str, reason: str = "") -> dict[str, Any]:
        """Ask for a job's end."""
        return await self._call(
            "POST", f"{_path(job_id)}/cancel", json={"reason": reason} if reason else None
        )

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

    async def _call(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        try:
            response = await self._http.request(method, path, **request)
        except httpx.TransportError as error:
            raise GatewayUnreachable(
                f"no answer from {self._http.base_url}: {type(error).__name__}"
            ) from error
        if response.is_error:
            raise _refusal(response, response.content)
        try:
            return msgspec.json.decode(response.content, type=dict[str, Any])
        except msgspec.MsgspecError as error:
            message = f"what answers at {self._http.base_url} is no gateway"
            raise GatewayError(message, "no_gateway", response.status_code) from error


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
