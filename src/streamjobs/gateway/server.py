"""The socket and the server under the gateway: uvicorn, with what it does not have.

Rule 1: the listening socket is ours; accepted ones inherit a small send buffer, since a viewer that does
not read costs that much kernel memory, and TCP_USER_TIMEOUT, which ends half-open and stalled ones. A link
that dies while a stream is idle shows only at the next heartbeat: both together are 30 seconds by default.
Rule 2: signals are ours too: uvicorn's own shutdown would wait for streams for ever.
Rule 3: a WebSocket's handshake leaves uvicorn: the connection is a `websocket.WebSocket` from then on.
Rule 4: no access log: it would print query strings, and with them tokens. `edge` logs routes at debug level.
Rule 5: what is no request, or one over a limit, is answered by a problem document, as everything else is, and
what still comes is thrown away for a moment: a client that is still sending would not see the answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import urllib.parse
from collections.abc import Callable, Generator
from typing import Any, cast

import httptools
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from streamjobs import metrics
from streamjobs.config import Settings
from streamjobs.errors import BadRequest, ConfigError, HeadTooLarge, StreamjobsError, UrlTooLong
from streamjobs.gateway.edge import CONNECTION, SECURITY_HEADERS
from streamjobs.gateway.origin import is_this_machine
from streamjobs.gateway.problems import answer_to
from streamjobs.gateway.websocket import WebSocket, key_of

BACKLOG = 2048
KEEP_ALIVE = 65
"""Seconds; over the 60 of common proxies, and no more: a connection lost in that time is held as long."""
SHUTDOWN_TIMEOUT = 5
"""Seconds that uvicorn waits for what still runs after the drain."""
PIPELINED = 16
"""Requests of one connection that may wait for the answer to the one before: one piece of 256 KB that is read
holds 10,000, of 2 KB each in memory."""
LINGER = 2.0
"""Seconds for which what still comes of a request is thrown away that was refused, or answered early."""
LINGER_BYTES = 4 * 1024 * 1024
"""And bytes; then the connection is broken."""
_OVERHEAD = 16
"""Bytes on the wire for each byte of a body, at most: a chunk of one byte takes 6."""
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
    if not settings.auth and not is_this_machine(settings.host):
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
    """uvicorn's protocol; its connections can be broken and listened to, and must send heads in time.

    Listening here costs nothing while a stream is idle; a task that waits in `receive()` costs over 1 KB.
    So would attributes outside `__slots__`: the base class has as many as its instances share the keys of.
    Nothing more is taken while something waits for the socket: else each slow viewer holds what uvicorn lets
    gather, 64 KB and a piece.
    """

    max_head: int
    """Bytes that a request's head may hold: uvicorn gathers whatever comes. So may what frames a body."""
    max_headers: int
    max_url: int
    head_timeout: float

    __slots__ = ("_hear_lost", "_in_head", "_refusal", "_streaming", "_timer", "_unused")

    def connection_made(self, transport: Any) -> None:
        """Start the clock for the first request's head."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)
        self.flow = _Flow(transport)
        self.pipeline = cast("Any", _Pipeline())
        self._hear_lost: Callable[[], None] | None = None
        self._streaming: RequestResponseCycle | None = None
        self._timer = self.loop.call_later(self.head_timeout, self._give_up)
        self._in_head = False
        self._unused = 0
        self._refusal: StreamjobsError | None = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock, tell the stream."""
        self._timer.cancel()
        self._unset_keepalive_if_required()  # uvicorn forgets it where the connection was reset
        super().connection_lost(exc)
        if self._streaming is not None:
            self._streaming.disconnected = True
        if self._hear_lost is not None:
            self._hear_lost()

    def data_received(self, data: bytes) -> None:
        """Refuse a head that does not end, and a body that is nothing but framing (extensions, trailers)."""
        if self._refusal is not None:
            self._throw_away(len(data))
            return
        self._parse(data)
        if cast("Any", self.transport.get_protocol()) is not self:
            return  # it is a WebSocket's now
        self._unused = max(0, self._unused + len(data))
        if self._unused > self.max_head and self._is_receiving():
            self._refuse(HeadTooLarge(f"the head of a request may hold {self.max_head} bytes"))
        self._rearm_keep_alive()

    def _parse(self, data: bytes) -> None:
        """As uvicorn's `data_received`, but that what is wrong is not worth a line in the log."""
        self._unset_keepalive_if_required()
        parser: Any = self.parser
        try:
            parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            if self._should_upgrade():
                self.handle_websocket_upgrade()
        except httptools.HttpParserError as error:
            ours = error.__context__
            known = isinstance(ours, StreamjobsError)
            self._refuse(ours if known else BadRequest("this is no request of HTTP/1.1"))

    def _throw_away(self, size: int) -> None:
        self._unused += size
        if self._unused > LINGER_BYTES:
            self._give_up()

    def _is_receiving(self) -> bool:
        """Whether a request is under way of which something is still to come."""
        if self.transport.is_closing() or self._refusal is not None:
            return False
        return self._in_head or (bool(self.cycle) and self.cycle.more_body)

    def _rearm_keep_alive(self) -> None:
        """uvicorn unsets it for whatever comes, the rest of a request or line ends before one too."""
        is_idle = not self._in_head and bool(self.cycle) and self.cycle.response_complete
        if is_idle and self.timeout_keep_alive_task is None and not self.transport.is_closing():
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def on_message_begin(self) -> None:
        """Give the app its hold on this connection."""
        super().on_message_begin()
        if self._timer.cancelled():  # else it runs since the connection was made
            self._timer = self.loop.call_later(self.head_timeout, self._give_up)
        self._in_head = True
        self._unused = 0
        scope = cast("dict[str, Any]", self.scope)
        hold = {"abort": self.transport.abort, "wire": self}
        scope["extensions"] = {CONNECTION: hold}

    def on_url(self, url: bytes) -> None:
        """Take a piece of the URL."""
        super().on_url(url)
        if len(self.url) > self.max_url:
            raise UrlTooLong(f"a URL may hold {self.max_url} bytes")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header, or a trailer."""
        super().on_header(name, value)
        if len(self.headers) > self.max_headers:
            raise HeadTooLarge(f"a request may have {self.max_headers} headers")

    def on_headers_complete(self) -> None:
        """The head is here."""
        self._timer.cancel()
        self._in_head = False
        self._unused = 0
        if len(self.pipeline) >= PIPELINED:
            raise BadRequest("too many requests that do not wait for answers")
        super().on_headers_complete()
        if self.cycle and self.cycle.scope is self.scope:  # no WebSocket's
            hold = cast("dict[str, Any]", self.scope)["extensions"][CONNECTION]
            hold["on_lost"] = functools.partial(self._on_lost, self.cycle)

    def on_body(self, body: bytes) -> None:
        """Take a piece of the body."""
        self._unused -= _OVERHEAD * len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is here."""
        super().on_message_complete()
        if self.cycle and self.cycle.response_complete:
            self._timer.cancel()
            self.cycle.more_body = False

    def on_response_complete(self) -> None:
        """Wait a moment for what is still to come of the request, where nobody read it to its end."""
        super().on_response_complete()
        if self.cycle.response_complete and self.cycle.more_body and not self.transport.is_closing():
            self._timer.cancel()
            self._timer = self.loop.call_later(LINGER, self.transport.close)

    def _refuse(self, error: StreamjobsError) -> None:
        """Answer, unless an earlier request waits for its answer, or this one has begun to get it."""
        self._refusal, self._unused = error, 0
        self._timer.cancel()
        if self.cycle and not self.cycle.response_complete:
            self.transport.abort()
            return
        answer = answer_to(error)
        lines = [*answer.raw_headers, *SECURITY_HEADERS, (b"connection", b"close")]
        metrics.HTTP_REQUESTS.labels("none", str(answer.status_code)).inc()
        self.transport.write(STATUS_LINE[answer.status_code])
        self.transport.write(b"".join(b"%b: %b\r\n" % line for line in lines) + b"\r\n" + bytes(answer.body))
        self._timer = self.loop.call_later(LINGER, self._give_up)

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

    def _on_lost(self, cycle: RequestResponseCycle, hear: Callable[[], None] | None) -> None:
        """Tell the stream of this request, which may not be the newest: others may wait behind it."""
        self._hear_lost = hear
        self._streaming = None if hear is None else cycle
        cycle.message_event = cast("Any", _UNHEARD)
        if hear is not None and self.transport.is_closing():
            cycle.disconnected = True  # uvicorn is about to notice, and would log an error until then
            hear()

    def _give_up(self) -> None:
        self.transport.abort()


class Server(uvicorn.Server):
    """uvicorn without its signal handlers."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        names = ("max_head", "max_headers", "max_url", "head_timeout")
        limits: dict[str, Any] = {name: getattr(settings, name) for name in names}
        bounded = type("Bounded", (Protocol,), limits | {"__slots__": ()})
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
