"""A WebSocket connection of our server: the sans-I/O protocol of `websockets` on the transport.

Rule 1: who listens is called, and writes while `is_writable`: no task, no queue, no future for a connection.
Rule 2: nothing is added while something waits for the socket, but a close frame. Of pongs that wait, only
the newest is sent (RFC 6455, 5.5.3).
Rule 3: what comes is parsed in slices, every frame is told of before its message, and messages are bounded:
what a peer can make us hold is a slice and a message.
Rule 4: a ping that stays unanswered means that the peer is gone; anything that comes is an answer.
Rule 5: who closes waits `CLOSE_TIMEOUT` for the peer's answer, then breaks the connection.

No compression: permessage-deflate costs each connection a compressor and a decompressor, and what many get
could no longer be shared.

Rejected: uvicorn's implementations. They keep a queue and a task for what comes, write pongs and pings
whatever waits for the socket, and hold 64 KB and a message for a slow reader.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any, Protocol, cast

import structlog
from starlette.types import ASGIApp, Message, Scope
from uvicorn.server import ServerState
from websockets.frames import Frame, Opcode
from websockets.protocol import OPEN, SERVER
from websockets.protocol import Protocol as SansIO

from streamjobs.gateway.ring import CHUNK_BYTES

log = structlog.get_logger(__name__)

CLOSE_TIMEOUT = 2.0
"""Seconds that a peer has to answer a close frame; within what the server waits for at its own end."""

WHOLE = CHUNK_BYTES + CHUNK_BYTES // 2
"""Messages up to this size are one frame; larger ones go out in fragments of `CHUNK_BYTES`."""

_SLICE = 4096
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_KEY = re.compile(rb"[A-Za-z0-9+/]{22}==")
_PONG = 0x80 | Opcode.PONG

Headers = list[tuple[bytes, bytes]]
Parts = tuple[bytes | memoryview, ...]
"""A text message, in parts that others may share."""


class Listener(Protocol):
    """Who uses a connection. Calls must not block; none comes after `on_lost`."""

    def on_frame(self) -> None:
        """A frame came, a message's or a control frame."""

    def on_message(self, text: str) -> None:
        """A message came."""

    def on_writable(self) -> None:
        """The socket took everything."""

    def on_lost(self) -> None:
        """The peer is gone, or has been sent away for what it sent."""


class WebSocket(asyncio.Protocol):
    """One connection. While the app decides it is an ASGI one; then it is its listener's."""

    __slots__ = (
        "_closing", "_conn", "_is_reading", "_key", "_listener", "_message", "_pong", "_pong_timer",
        "_server", "_transport", "is_writable",
    )  # fmt: skip

    def __init__(self, server: ServerState, transport: asyncio.Transport, key: bytes) -> None:
        self.is_writable = True
        self._server = server
        self._transport = transport
        self._key = key
        self._conn: SansIO | None = None
        self._listener: Listener | None = None
        self._message: bytearray | None = None
        self._pong = b""
        self._pong_timer: asyncio.TimerHandle | None = None
        self._closing: asyncio.TimerHandle | None = None
        self._is_reading = True
        self.pause_reading()
        server.connections.add(cast("Any", self))
        transport.set_protocol(self)

    # --- the handshake

    def ask(self, app: ASGIApp, scope: Scope) -> None:
        """Have the app decide."""
        task = asyncio.get_running_loop().create_task(self._ask(app, scope))
        self._server.tasks.add(task)
        task.add_done_callback(self._server.tasks.discard)

    async def _ask(self, app: ASGIApp, scope: Scope) -> None:
        try:
            await app(scope, _connect, self._send)
        finally:
            if self._listener is None and self._closing is None:
                self._transport.close()

    async def _send(self, message: Message) -> None:
        kind = message["type"]
        if kind == "websocket.accept":
            self._write_head(101, [*_switching(self._key), *message.get("headers", [])])
        elif kind == "websocket.close":
            self._write_head(403, [(b"content-length", b"0"), (b"connection", b"close")])
        elif kind == "websocket.http.response.start":
            self._write_head(message["status"], [*message["headers"], (b"connection", b"close")])
        elif kind == "websocket.http.response.body":
            self._transport.write(message.get("body", b""))

    def _write_head(self, status: int, headers: Headers) -> None:
        lines = [b"%b: %b\r\n" % header for header in headers]
        phrase = HTTPStatus(status).phrase.encode()
        self._transport.write(b"HTTP/1.1 %d %b\r\n%b\r\n" % (status, phrase, b"".join(lines)))

    def listen(self, listener: Listener, max_message: int) -> None:
        """Begin, once accepted; messages over `max_message` bytes end the connection."""
        self._conn = SansIO(SERVER, state=OPEN, max_size=max_message)
        self._listener = listener
        self.resume_reading()
        if self._transport.is_closing():
            self._lose()

    # --- sending

    def write(self, data: bytes) -> None:
        """Send whole frames; to be called while `is_writable`."""
        self._transport.write(data)

    def ping(self, timeout: float) -> None:
        """Ask for a sign of life; without one within `timeout` seconds the connection is broken."""
        if self._conn is not None and self._pong_timer is None:
            self._conn.send_ping(b"")
            self._flush()
            self._pong_timer = asyncio.get_running_loop().call_later(timeout, self.abort)

    def close(self, code: int, reason: str = "") -> None:
        """Say goodbye, behind what was written; the listener hears nothing more."""
        self._listener = None
        if self._conn is not None and self._conn.state is OPEN:
            self._conn.send_close(code, reason)
            self._flush()
        self._close_soon()

    def refuse(self, code: int, reason: str) -> None:
        """Send the peer away for what it sent; to be called while that is being told of."""
        assert self._conn is not None
        self._conn.fail(code, reason)

    def abort(self) -> None:
        """Break the connection at once."""
        self._transport.abort()

    def shutdown(self) -> None:
        """End it, because the server ends."""
        listener = self._listener
        if self._conn is None:
            self._transport.close()
        else:
            self.close(1012)
        if listener is not None:
            listener.on_lost()

    def pause_reading(self) -> None:
        """Let what the peer sends wait."""
        if self._is_reading and not self._transport.is_closing():
            self._is_reading = False
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Go on."""
        if not self._is_reading and not self._transport.is_closing():
            self._is_reading = True
            self._transport.resume_reading()

    def _flush(self) -> None:
        """Write what the protocol has to say; an empty piece means that nothing comes behind it."""
        assert self._conn is not None
        for data in self._conn.data_to_send():
            if self._transport.is_closing():
                return
            if not data:
                self._transport.write_eof()
            elif data[0] == _PONG and not self.is_writable:
                self._pong = data
            else:
                self._transport.write(data)

    def _close_soon(self) -> None:
        """The closing handshake is under way."""
        self._forget_ping()
        self._pong = b""
        self.resume_reading()
        if self._closing is None:
            self._closing = asyncio.get_running_loop().call_later(CLOSE_TIMEOUT, self.abort)

    # --- what the transport says

    def data_received(self, data: bytes) -> None:
        """Take what came."""
        self._forget_ping()
        conn = self._conn
        assert conn is not None
        for start in range(0, len(data), _SLICE):
            conn.receive_data(data[start : start + _SLICE])
            for frame in cast("list[Frame]", conn.events_received()):
                self._take(conn, frame)
            self._flush()
            if conn.state is not OPEN:
                self._close_soon()
                self._lose()

    def pause_writing(self) -> None:
        """Wait: something did not go out at once."""
        self.is_writable = False

    def resume_writing(self) -> None:
        """Go on: everything went out."""
        self.is_writable = True
        if self._pong:
            self._transport.write(self._pong)
            self._pong = b""
        if self._listener is not None and self.is_writable:
            self._listener.on_writable()

    def connection_lost(self, exc: Exception | None) -> None:
        """Free everything."""
        self._forget_ping()
        if self._closing is not None:
            self._closing.cancel()
        self._server.connections.discard(cast("Any", self))
        self._lose()

    def _lose(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.on_lost()

    def _forget_ping(self) -> None:
        if self._pong_timer is not None:
            self._pong_timer.cancel()
            self._pong_timer = None

    # --- messages

    def _take(self, conn: SansIO, frame: Frame) -> None:
        if self._listener is not None and conn.state is OPEN:
            self._listener.on_frame()
        if conn.state is not OPEN:
            return
        if frame.opcode is Opcode.BINARY:
            self.refuse(1003, "messages are text")
        elif frame.opcode is Opcode.TEXT and frame.fin:
            self._tell(bytes(frame.data))
        elif frame.opcode is Opcode.TEXT:
            self._message = bytearray(frame.data)
        elif frame.opcode is Opcode.CONT and self._message is not None:
            self._message += frame.data
            if frame.fin:
                data, self._message = bytes(self._message), None
                self._tell(data)

    def _tell(self, data: bytes) -> None:
        try:
            text = data.decode()
        except UnicodeDecodeError:
            self.refuse(1007, "messages are UTF-8")
            return
        if self._listener is not None:
            self._listener.on_message(text)


async def _connect() -> Message:
    return {"type": "websocket.connect"}


def key_of(headers: Headers) -> bytes:
    """The key of a handshake as RFC 6455 has it, section 4.2.1; empty where it is none."""
    found = dict(headers)
    key = found.get(b"sec-websocket-key", b"")
    is_right = found.get(b"sec-websocket-version") == b"13" and _KEY.fullmatch(key)
    return key if is_right else b""


def _switching(key: bytes) -> Headers:
    accept = base64.b64encode(hashlib.sha1(key + _GUID).digest())  # noqa: S324 - the standard wants this one
    return [(b"upgrade", b"websocket"), (b"connection", b"Upgrade"), (b"sec-websocket-accept", accept)]


def size_of(message: Parts) -> int:
    """Bytes of a message."""
    return sum(map(len, message))


def frame_of(message: Parts) -> bytes:
    """A message as one frame."""
    return b"".join((_head(Opcode.TEXT, size_of(message), is_last=True), *message))


def fragments_of(message: Parts) -> Iterator[bytes]:
    """A large message as frames, none of which is copied before it is its turn."""
    opcode = Opcode.TEXT
    left = size_of(message)
    for part in message:
        whole = memoryview(part)
        for start in range(0, len(whole), CHUNK_BYTES):
            piece = whole[start : start + CHUNK_BYTES]
            left -= len(piece)
            yield b"".join((_head(opcode, len(piece), is_last=not left), piece))
            opcode = Opcode.CONT


def _head(opcode: int, size: int, *, is_last: bool) -> bytes:
    first = opcode | (0x80 if is_last else 0)
    if size < 126:
        return bytes((first, size))
    if size < 1 << 16:
        return bytes((first, 126)) + size.to_bytes(2)
    return bytes((first, 127)) + size.to_bytes(8)
