"""The socket and the server under the gateway: uvicorn, with what it does not have.

Rule 1: the listening socket is ours; accepted ones inherit a small send buffer, since a viewer that does
not read costs that much kernel memory, and TCP_USER_TIMEOUT, which ends half-open and stalled ones. A link
that dies while a stream is idle shows only at the next heartbeat: both together are 30 seconds by default.
Rule 2: signals are ours too: uvicorn's own shutdown would wait for streams for ever.
Rule 3: a WebSocket's handshake leaves uvicorn: the connection is a `websocket.WebSocket` from then on.
Rule 4: no access log: it would print query strings, and with them tokens. `edge` logs routes at debug level.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import urllib.parse
from collections.abc import Callable, Generator
from typing import Any, cast

import httptools
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from streamjobs.config import Settings
from streamjobs.errors import ConfigError
from streamjobs.gateway.edge import CONNECTION
from streamjobs.gateway.websocket import WebSocket, key_of

BACKLOG = 2048
KEEP_ALIVE = 65
"""Seconds; over the 60 of common proxies, and no more: a connection lost in that time is held as long."""
SHUTDOWN_TIMEOUT = 5
"""Seconds that uvicorn waits for what still runs after the drain."""
HEAD_TIMEOUT = 15.0
"""Seconds from connecting to a whole request head."""
_TCP_USER_TIMEOUT = 18  # socket.TCP_USER_TIMEOUT is missing on some platforms


def listen(settings: Settings, port: int, *, is_shared: bool = False) -> socket.socket:
    """A bound, listening socket; a shared one beside others of the same address.

    Raises `OSError`, and `ConfigError` where strangers could reach what asks nobody who he is.
    """
    require_guarded(settings)
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # with the protocol named, asyncio turns Nagle off for what is accepted; else tokens come 40 ms late
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, settings.send_buffer)
        with contextlib.suppress(OSError):
            option: int = getattr(socket, "TCP_USER_TIMEOUT", _TCP_USER_TIMEOUT)
            listener.setsockopt(socket.IPPROTO_TCP, option, round(1000 * settings.unacknowledged_timeout))
        listener.bind((settings.host, port))
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def require_guarded(settings: Settings) -> None:
    """Raise `ConfigError` where strangers could reach a gateway that asks nobody who he is."""
    if settings.auth or settings.host == "localhost":
        return
    try:
        is_loopback = ipaddress.ip_address(settings.host).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback:
        raise ConfigError(
            f"setting 'host': {settings.host} can be reached from elsewhere, and nobody is asked who he is: "
            "set 'auth' (keys, jwt, proxy or a function of yours; open: on purpose), or listen on 127.0.0.1"
        )


class _Flow(FlowControl):
    """uvicorn's, without the event that it keeps for each connection: an empty deque is 0.7 KB."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self.read_paused = self.write_paused = False
        self._drained: asyncio.Future[None] | None = None

    async def drain(self) -> None:
        """Wait until writing goes on. Of several who wait each is told."""
        while self.write_paused:
            if self._drained is None:
                self._drained = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._drained)

    def pause_writing(self) -> None:
        """Something waits for the socket."""
        self.write_paused = True

    def resume_writing(self) -> None:
        """Nothing does, or nobody is there any more."""
        self.write_paused = False
        drained, self._drained = self._drained, None
        if drained is not None:
            drained.set_result(None)


class _Pipeline(list[Any]):
    """Requests that came before the answer to the one before them, mostly none: see `_Flow`."""

    def appendleft(self, request: Any) -> None:
        """As of a deque."""
        self.insert(0, request)


class _Unheard:
    """In place of the event that `receive()` waits for, once a stream has its own way to hear of the end."""

    def set(self) -> None:
        """Nobody waits."""


_UNHEARD = _Unheard()


class Protocol(HttpToolsProtocol):
    """uvicorn's protocol; its connections can be broken and listened to, and must send a head in time.

    Listening here costs nothing while a stream is idle; a task that waits in `receive()` costs over 1 KB.
    So would attributes outside `__slots__`: the base class has as many as its instances share the keys of.
    Nothing more is taken while something waits for the socket: else each slow viewer holds what uvicorn lets
    gather, 64 KB and a piece.
    """

    max_head: int
    """Bytes that a request's head may hold: uvicorn gathers whatever comes."""

    __slots__ = ("_head_size", "_head_timer", "_hear_lost")

    def connection_made(self, transport: Any) -> None:
        """Start the clock for the first request's head."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)
        self.flow = _Flow(transport)
        self.pipeline = cast("Any", _Pipeline())
        self._hear_lost: Callable[[], None] | None = None
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT, self._give_up)
        self._head_size: int | None = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock, tell the stream."""
        self._head_timer.cancel()
        self._unset_keepalive_if_required()  # uvicorn forgets it where the connection was reset
        super().connection_lost(exc)
        if self._hear_lost is not None:
            self._hear_lost()

    def data_received(self, data: bytes) -> None:
        """Refuse a head that does not end."""
        super().data_received(data)
        if self._head_size is not None:
            self._head_size += len(data)
            if self._head_size > self.max_head and not self.transport.is_closing():
                self.send_400_response("The head of the request is too large.")

    def on_message_begin(self) -> None:
        """Give the app its hold on this connection."""
        super().on_message_begin()
        self._head_size = 0
        scope = cast("dict[str, Any]", self.scope)
        hold = {"abort": self.transport.abort, "on_lost": self._on_lost, "wire": self}
        scope["extensions"] = {CONNECTION: hold}

    def on_headers_complete(self) -> None:
        """The head is here."""
        self._head_timer.cancel()
        self._head_size = None
        super().on_headers_complete()

    def write(self, portion: bytes | memoryview) -> bool:
        """Write a chunk of an answer whose head is out; see `Wire`."""
        if portion:  # an empty chunk would be the answer's end
            self.transport.writelines((b"%x\r\n" % len(portion), portion, b"\r\n"))
        return not self.flow.write_paused

    async def drain(self) -> None:
        """Wait until the socket has taken everything; see `Wire`."""
        await self.flow.drain()

    def handle_websocket_upgrade(self) -> None:
        """Hand the connection over; from here on this object is of no use."""
        if self.cycle and not self.cycle.response_complete:
            self.transport.abort()  # it did not wait for the answer before this one
            return
        self.connections.discard(self)
        scope = cast("dict[str, Any]", self.scope)
        url = httptools.parse_url(self.url)
        socket = WebSocket(self.server_state, self.transport, key_of(scope["headers"]))
        scope |= {
            "type": "websocket",
            "path": self.root_path + urllib.parse.unquote(url.path.decode("ascii")),
            "raw_path": self.root_path.encode("ascii") + url.path,
            "query_string": url.query or b"",
            "subprotocols": [],
            "extensions": {
                "websocket.http.response": {},
                CONNECTION: {"abort": socket.abort, "socket": socket},
            },
        }
        socket.ask(cast("ASGIApp", self.app), scope)

    def _should_upgrade(self) -> bool:
        """Whether this is a WebSocket's handshake; what is not quite one is a plain request."""
        is_get = (self.scope["method"], self.scope["http_version"]) == ("GET", "1.1")
        return is_get and super()._should_upgrade() and bool(key_of(self.headers))

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing: strangers may ask for what they like."""

    def _on_lost(self, hear: Callable[[], None] | None) -> None:
        self._hear_lost = hear
        self.cycle.message_event = cast("Any", _UNHEARD)
        if hear is not None and self.transport.is_closing():
            self.cycle.disconnected = True  # uvicorn is about to notice, and would log an error until then
            hear()

    def _give_up(self) -> None:
        self.transport.abort()


class Server(uvicorn.Server):
    """uvicorn without its signal handlers."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        bounded = type("Bounded", (Protocol,), {"max_head": settings.max_head, "__slots__": ()})
        super().__init__(
            uvicorn.Config(
                cast("Any", app),
                http=bounded,
                ws=WebSocket,
                lifespan="off",
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE,
                timeout_graceful_shutdown=SHUTDOWN_TIMEOUT,
                access_log=False,
                log_config=None,
                log_level="warning",
                server_header=False,
                proxy_headers=False,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave signals to `serve`."""
        yield
