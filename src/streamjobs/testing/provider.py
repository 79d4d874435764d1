"""The scripted provider: a real HTTP server that speaks both wire formats and says what a scenario says.

Rule 1: what a request is answered depends on the request and the scenario; only the count of faults already
met is kept between requests.
Rule 2: a stream has one timer, and a slow client holds back only its own.
Rule 3: answers go out as raw ASGI messages; what fell due together is one write.

It is for tests (`async with ScriptedProvider(scenario) as provider`), for the demo, and for load tests, where
`serve` runs it in a process of its own.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import socket
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from email.utils import formatdate
from typing import Any, Self, cast

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from streamjobs.events import UNENCODABLE
from streamjobs.testing.formats import (
    Body,
    ChatCompletions,
    Format,
    Frame,
    Messages,
    Reply,
    reply_to,
    text_pieces,
)
from streamjobs.testing.scenario import (
    DEMO,
    Chosen,
    ContentTypeFault,
    Conversation,
    CutFault,
    DelayFault,
    EndlessFault,
    ErrorFault,
    Fault,
    GarbageFault,
    Scenario,
    StallFault,
    StatusFault,
    choose,
    fault_for,
)

_KEPT_REQUESTS = 1000
_KEPT_COUNTS = 100_000
_BATCH = 64  # frames in one write when nothing paces them
_SHORT_PAUSE = 0.25  # seconds after which a client that left is noticed in time anyway
_COMMENT_INTERVAL = 0.05
_EVENT_STREAM = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]

# Broken answers are on purpose here; uvicorn's own logger would report each as an error.
_quiet = logging.getLogger("streamjobs.testing.uvicorn")
_quiet.setLevel(logging.CRITICAL)


class ClientGoneError(Exception):
    """The client closed the connection before the end of its answer."""


class AnswerCutError(Exception):
    """The script says that this connection breaks now."""


class ScriptedProvider:
    """A provider that follows a scenario; also the record of what it was asked."""

    def __init__(self, scenario: Scenario = DEMO, host: str = "127.0.0.1", port: int = 0) -> None:
        self.scenario = scenario
        self.requests: deque[Body] = deque(maxlen=_KEPT_REQUESTS)
        """The bodies of the latest requests."""
        self.open_streams = 0
        """Answers being streamed now."""
        self.closed_early = 0
        """Clients that left before the end of their answer."""
        self.url = ""
        """Where it listens: the base URL for Anthropic; `openai_url` has the path that OpenAI's has."""
        self._address = (host, port)
        self._counts: Counter[tuple[str, int, int]] = Counter()
        self._streams: set[Stream] = set()
        self._server: uvicorn.Server | None = None

    @property
    def openai_url(self) -> str:
        """The base URL for an OpenAI client."""
        return f"{self.url}/v1"

    @property
    def connections(self) -> int:
        """Connections that are open now, idle ones too."""
        return len(self._server.server_state.connections) if self._server is not None else 0

    @property
    def app(self) -> Starlette:
        """The ASGI application."""
        formats: list[Format] = [ChatCompletions(), Messages()]
        return Starlette(routes=[Route(f.path, _Endpoint(self, f), methods=["POST"]) for f in formats])

    async def __aenter__(self) -> Self:
        listener = _listener(*self._address)
        host, port = listener.getsockname()[:2]
        self.url = f"http://{host}:{port}"
        # Started by hand: `Server.serve` takes over the process's signals.
        config = _config(self.app)
        config.load()
        self._server = uvicorn.Server(config)
        self._server.lifespan = config.lifespan_class(config)
        await self._server.startup(sockets=[listener])
        return self

    async def __aexit__(self, *_: object) -> None:
        for stream in self._streams:
            stream.leave()
        if self._server is not None:
            await self._server.shutdown()

    def choose(self, conversation: Conversation) -> tuple[Chosen, Fault | None]:
        """The turn for a request, and the fault that it meets; the request is counted."""
        chosen = choose(self.scenario, conversation)
        if not chosen.turn.faults:
            return chosen, None
        if len(self._counts) > _KEPT_COUNTS:
            self._counts.clear()
        place = (conversation.key, chosen.number, conversation.turn)
        self._counts[place] += 1
        return chosen, fault_for(chosen.turn, self._counts[place] - 1)

    @asynccontextmanager
    async def opened(self, stream: Stream) -> AsyncGenerator[None]:
        """Count a stream while it lasts, and notice a client that leaves."""
        self._streams.add(stream)
        self.open_streams += 1
        try:
            async with stream.watched():
                yield
        except ClientGoneError:
            self.closed_early += 1
        finally:
            self.open_streams -= 1
            self._streams.discard(stream)


def serve(scenario: Scenario = DEMO, host: str = "127.0.0.1", port: int = 8500) -> None:
    """Run the scripted provider until the process is told to stop."""
    config = _config(ScriptedProvider(scenario).app, host, port)
    uvicorn.Server(config).run()


def _listener(host: str, port: int) -> socket.socket:
    """Bind a socket. Its protocol is named, or asyncio leaves Nagle's delay on and tokens come 40 ms late."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    return listener


def _config(app: Starlette, host: str = "127.0.0.1", port: int = 0) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        http=cast("type[asyncio.Protocol]", _quiet_protocol),
        ws="none",
        lifespan="off",
        log_config=None,
        backlog=4096,
        timeout_graceful_shutdown=2,
    )


def _quiet_protocol(**options: Any) -> asyncio.Protocol:
    """Make uvicorn's protocol, with a log of its own: its loggers belong to the whole process."""
    protocol: Any = AutoHTTPProtocol(**options)
    protocol.logger = _quiet
    protocol.access_log = False
    return protocol


class _Endpoint:
    """One path: reads a request and plays its answer."""

    def __init__(self, provider: ScriptedProvider, wire: Format) -> None:
        self._provider = provider
        self._format = wire

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            content = await Request(scope, receive).body()
        except ClientDisconnect:
            return
        body = _body(content)
        if body is None:
            refusal = self._json(
                400, self._format.error("invalid_request_error", "messages: a list is required")
            )
            await refusal(scope, receive, send)
            return
        self._provider.requests.append(body)
        await self._answer(body, scope, receive, send)

    async def _answer(self, body: Body, scope: Scope, receive: Receive, send: Send) -> None:
        conversation = self._format.conversation(body)
        chosen, fault = self._provider.choose(conversation)
        text = (
            itertools.cycle(text_pieces(chosen.turn) or ["… "]) if isinstance(fault, EndlessFault) else None
        )
        reply = reply_to(body, conversation, chosen.turn, text)
        if isinstance(fault, StatusFault):
            await self._status(fault)(scope, receive, send)
        elif isinstance(fault, ContentTypeFault):
            await Response(fault.body, media_type=fault.content_type)(scope, receive, send)
        elif body.get("stream"):
            await self._stream(reply, fault, Stream(receive, send, chosen.turn.rate))
        else:
            await self._json(200, self._format.document(reply))(scope, receive, send)

    async def _stream(self, reply: Reply, fault: Fault | None, stream: Stream) -> None:
        with suppress(AnswerCutError):
            async with self._provider.opened(stream):
                if isinstance(fault, DelayFault):
                    await stream.pause(fault.seconds)
                await stream.begin()
                await self._play(reply, fault, stream)
                await stream.end()

    async def _play(self, reply: Reply, fault: Fault | None, stream: Stream) -> None:
        tokens = 0
        for frame in self._format.frames(reply):
            if fault is not None and _is_due(fault, frame, tokens):
                await self._strike(fault, frame, stream)
                fault = None
            if frame.kind == "token":
                tokens += 1
                await stream.write_token(frame.data)
            else:
                stream.write(frame.data)

    async def _strike(self, fault: Fault, frame: Frame, stream: Stream) -> None:
        """Do what the fault says, in front of a frame."""
        if isinstance(fault, CutFault):
            await self._cut(fault, frame, stream)
        elif isinstance(fault, StallFault):
            await _stall(fault, stream)
        elif isinstance(fault, GarbageFault):
            stream.write(b'data: {"choices": [{"delta": {"content": tru}\n\n')
        elif isinstance(fault, ErrorFault):
            stream.write(self._format.error_frame(fault.type, "the script says so"))

    async def _cut(self, fault: CutFault, frame: Frame, stream: Stream) -> None:
        if fault.where == "clean":
            await stream.end()
        elif fault.where == "character":
            whole = self._format.text_frame("\N{GRINNING FACE}")
            stream.write(whole[: whole.index("\N{GRINNING FACE}".encode()) + 2])
        else:
            stream.write(frame.data[: len(frame.data) // 2])
        await stream.flush()
        raise AnswerCutError

    def _status(self, fault: StatusFault) -> Response:
        kind = {429: "rate_limit_error", 529: "overloaded_error"}.get(fault.status, "api_error")
        return self._json(fault.status, self._format.error(kind, "the script says so"), _retry_after(fault))

    def _json(self, status: int, content: Body, headers: dict[str, str] | None = None) -> Response:
        return Response(msgspec.json.encode(content), status, headers, "application/json")


def _body(content: bytes) -> Body | None:
    """The request, if it is one: an object with a list of messages, which are objects."""
    try:
        body = msgspec.json.decode(content)
    except UNENCODABLE:
        return None
    messages = cast("Body", body).get("messages") if isinstance(body, dict) else None
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in cast("list[Any]", messages)):
        return None
    return cast("Body", body)


def _is_due(fault: Fault, frame: Frame, tokens: int) -> bool:
    """Whether the fault strikes before this frame: after so many tokens, or before the end at the latest."""
    if not isinstance(fault, CutFault | StallFault | GarbageFault | ErrorFault):
        return False
    return frame.kind == "tail" or (frame.kind == "token" and tokens >= fault.after)


async def _stall(fault: StallFault, stream: Stream) -> None:
    await stream.flush()
    if not fault.comments:
        await stream.pause(fault.seconds)
        return
    for _ in range(math.ceil(fault.seconds / _COMMENT_INTERVAL)):
        stream.write(b": keep-alive\n\nevent: ping\ndata: {}\n\n")
        await stream.flush()
        await stream.pause(_COMMENT_INTERVAL)


def _retry_after(fault: StatusFault) -> dict[str, str]:
    if fault.retry_after is None:
        return {}
    if fault.form == "ms":
        return {"retry-after-ms": f"{fault.retry_after * 1000:g}"}
    if fault.form == "date":
        return {"retry-after": formatdate(math.ceil(time.time() + fault.retry_after), usegmt=True)}
    return {"retry-after": f"{fault.retry_after:g}"}


class Stream:
    """One answer on its way: paced, gathered into few writes, and aware of a client that leaves."""

    def __init__(self, receive: Receive, send: Send, rate: float) -> None:
        self._receive = receive
        self._send = send
        self._interval = 1 / rate if rate > 0 else 0.0
        self._due = 0.0
        self._frames: list[bytes] = []
        self._gone = asyncio.Event()

    @asynccontextmanager
    async def watched(self) -> AsyncGenerator[None]:
        """Notice the client's leaving for as long as the block runs."""
        watcher = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            watcher.cancel()

    def leave(self) -> None:
        """Take the client for gone."""
        self._gone.set()

    async def begin(self) -> None:
        """Send the head of the response."""
        self._due = asyncio.get_running_loop().time()
        await self._send({"type": "http.response.start", "status": 200, "headers": _EVENT_STREAM})

    def write(self, frame: bytes) -> None:
        """Add a frame to the next write."""
        self._frames.append(frame)

    async def write_token(self, frame: bytes) -> None:
        """Add a token, send what is due, and wait until the next token is."""
        self._frames.append(frame)
        if not self._interval:
            if len(self._frames) >= _BATCH:
                await self.flush()
                await self.pause(0)
            return
        self._due += self._interval
        early = self._due - asyncio.get_running_loop().time()
        if early > 0:
            await self.flush()
            await self.pause(early)

    async def flush(self) -> None:
        """Send what was written. Raises `ClientGoneError`."""
        if self._gone.is_set():
            raise ClientGoneError
        frames, self._frames = self._frames, []
        await self._send({"type": "http.response.body", "body": b"".join(frames), "more_body": True})

    async def end(self) -> None:
        """Send the rest and end the response."""
        await self.flush()
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def pause(self, seconds: float) -> None:
        """Wait. Raises `ClientGoneError` as soon as the client leaves a long wait, or after a short one."""
        if seconds < _SHORT_PAUSE:
            await asyncio.sleep(seconds)
        else:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._gone.wait(), seconds)
        if self._gone.is_set():
            raise ClientGoneError

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._gone.set()
