"""What every request passes: security headers, metrics by route template, errors as problem documents.

A WebSocket's handshake is a request too.
One wrapper around `send` and nothing else, since streams pass it too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, MutableMapping
from typing import Any

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from streamjobs import metrics
from streamjobs.gateway.problems import answer_to
from streamjobs.gateway.requests import PRINCIPAL
from streamjobs.gateway.stream import Wire
from streamjobs.gateway.websocket import WebSocket

log = structlog.get_logger(__name__)

SECURITY_HEADERS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]
CONNECTION = "streamjobs.connection"
"""Our server's ASGI extension: `abort()` breaks the connection at once, `on_lost(hear)` tells of its end,
`wire` takes chunks of the answer; a WebSocket's has `socket`, the connection itself."""
_STATUSES = {"websocket.accept": 101, "websocket.close": 403}
"""What a WebSocket's first message answers to its handshake."""


class Edge:
    """Wraps an ASGI app. `is_logged`: whether each request is told at level info."""

    def __init__(self, app: ASGIApp, *, is_logged: bool = False) -> None:
        self._app = app
        self._log = log.info if is_logged else log.debug

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; an error becomes an answer, or breaks the connection if one has begun."""
        if scope["type"] not in {"http", "websocket"}:
            return
        scope["app"] = self  # makes the router raise for unknown paths and methods
        sending = _Sending(scope, send, self._log)
        try:
            await self._app(scope, receive, sending)
        except Exception as error:  # noqa: BLE001 - the last one to see it; it is answered and logged
            if sending.has_begun:
                log.warning("response.broken", route=route_of(scope), error=type(error).__name__)
                abort_of(scope)()
            else:
                await answer_to(error)(scope, receive, sending)


class _Sending:
    """`send` that knows whether the answer has begun, and adds what every answer has."""

    __slots__ = ("_log", "_scope", "_send", "_started", "has_begun")

    def __init__(self, scope: Scope, send: Send, tell: Callable[..., None]) -> None:
        self._log = tell
        self._scope = scope
        self._send = send
        self._started = time.perf_counter()
        self.has_begun = False

    async def __call__(self, message: Message) -> None:
        if not self.has_begun:
            self._begin(message)
        await self._send(message)

    def _begin(self, message: MutableMapping[str, Any]) -> None:
        self.has_begun = True
        message["headers"] = [*message.get("headers", []), *SECURITY_HEADERS]
        route, status = route_of(self._scope), message.get("status") or _STATUSES[message["type"]]
        metrics.HTTP_REQUESTS.labels(route, str(status)).inc()
        seconds = time.perf_counter() - self._started
        metrics.HTTP_SECONDS.labels(route).observe(seconds)
        principal = self._scope.get(PRINCIPAL)
        self._log(
            "request",
            method=self._scope.get("method", "GET"),
            route=route,
            status=status,
            ms=round(seconds * 1000, 1),
            credential="" if principal is None else principal.credential,
        )


def route_of(scope: Scope) -> str:
    """The template of the route, never the path: ids and queries are not for labels and logs."""
    route = scope.get("route")
    return "none" if route is None else str(route.path)


def abort_of(scope: Scope) -> Callable[[], None]:
    """How to break this connection; a server without our extension closes it when the app returns."""
    return _connection_of(scope).get("abort", _nothing)


def socket_of(scope: Scope) -> WebSocket:
    """A WebSocket's connection, to be used once it is accepted; only our server has that."""
    return _connection_of(scope)["socket"]


def on_lost(scope: Scope, hear: Callable[[], None] | None) -> bool:
    """Be told when the client is gone, or no more; False on a server without our extension."""
    tell = _connection_of(scope).get("on_lost")
    if tell is None:
        return False
    tell(hear)
    return True


def wire_of(scope: Scope) -> Wire | None:
    """Where the chunks of an answer that has begun can be written directly, if that is our own server."""
    wire: Wire | None = _connection_of(scope).get("wire")
    return wire


def _connection_of(scope: Scope) -> dict[str, Any]:
    extensions: dict[str, dict[str, Any]] = scope.get("extensions") or {}
    return extensions.get(CONNECTION, {})


def _nothing() -> None:
    pass
