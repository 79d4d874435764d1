"""Calling a provider over HTTP: one connection pool, four clocks, bounded reads, retries.

Rule 1: a request is repeated only while nothing of its answer was yielded.
Rule 2: comments and pings are no progress; the idle clock runs only while we wait for the provider,
so a slow reader of ours cannot make it expire. The total clock runs through retries and pauses.
Rule 3: everything read is bounded: an error's body, one event, the whole response.
Rule 4: an error never names the API key, nor the URL's query.
Rule 5: leaving the generator closes the connection; nothing is left to the garbage collector.

Decoders are sans-IO: they take events and return pieces, so every quirk can be tested from bytes.

Rejected: httpx's own transport (three times the CPU for each streamed chunk), and its read timeout,
which any byte resets, so that keep-alive comments would hold a dead stream open for ever.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing, suppress
from typing import Protocol, TypeVar, cast

import aiohttp
import httpx
import structlog
from httpx_aiohttp import AiohttpTransport

from streamjobs.config import Settings
from streamjobs.errors import ProviderError
from streamjobs.llm.base import Piece
from streamjobs.llm.sse import EventParser, ServerSentEvent
from streamjobs.llm.wire import decoder_of, error_from, one_line
from streamjobs.retry import Backoff, parse_retry_after

T = TypeVar("T")

MAX_ERROR_BYTES = 4096
_DRAIN_TIMEOUT = 0.1
_SHORTEST_SECRET = 6  # shorter ones are stand-ins for local servers, and parts of common words
_NETWORK = (httpx.RequestError, httpx.InvalidURL, aiohttp.ClientError, OSError)
_EVENT_STREAMS = frozenset({"", "text/event-stream", "text/plain", "application/octet-stream"})

log = structlog.stdlib.get_logger(__name__)
_decode_any = decoder_of(object)


class Decoder(Protocol):
    """Folds the events of one answer; made anew for every try."""

    is_done: bool
    """The answer's last event was seen: read no further."""

    @property
    def is_complete(self) -> bool:
        """What was seen is a whole answer, even if the connection breaks now."""
        ...

    def feed(self, event: ServerSentEvent) -> Iterable[Piece]:
        """Take an event. Raises `ProviderError` for an error in the stream, or data that makes no sense."""
        ...

    def end(self) -> Iterable[Piece]:
        """Take the end of a response; the last pieces. Raises `ProviderError` if it is truncated."""
        ...

    def resume(self) -> bytes | None:
        """The body of a further request that this answer needs; None, and `end` gave the `Answer`."""
        ...


class Clocks:
    """The limits in time of one call: first data, then idle between data, and total."""

    def __init__(self, settings: Settings) -> None:
        self._first = settings.provider_first_byte_timeout
        self._idle = settings.provider_idle_timeout
        self._total = settings.provider_total_timeout
        self._end = _now() + self._total
        self._until: float | None = None
        self._has_data = False

    def begin(self) -> None:
        """A request is about to be sent."""
        self._until, self._has_data = _now() + self._first, False

    def progress(self) -> None:
        """Data came: the idle clock starts again, when we next wait."""
        self._until, self._has_data = None, True

    def is_over_after(self, delay: float) -> bool:
        """Whether waiting `delay` seconds would use up the total."""
        return _now() + delay >= self._end

    async def wait(self, operation: Awaitable[T]) -> T:
        """Await a network operation within the limits.

        Raises `ProviderError` that names the clock that ran out, or the fault of the network, without
        the URLs that httpx's errors carry.
        """
        if self._until is None:
            self._until = _now() + self._idle
        try:
            async with asyncio.timeout_at(min(self._until, self._end)):
                return await operation
        except TimeoutError:
            raise self._expired() from None
        except _NETWORK as error:
            raise _network_error(error) from None

    def _expired(self) -> ProviderError:
        if _now() >= self._end:
            return ProviderError(f"no end of the answer within {self._total:g} s")
        what, limit = ("more data", self._idle) if self._has_data else ("data", self._first)
        return ProviderError(f"no {what} within {limit:g} s", retryable=True)


class WholeBody:
    """A parser for a body that is one JSON document: from servers that do not stream."""

    def __init__(self) -> None:
        self._body = bytearray()

    def feed(self, chunk: bytes) -> list[ServerSentEvent]:
        """Collect; the reader bounds the size."""
        self._body += chunk
        return []

    def close(self) -> list[ServerSentEvent]:
        """The body as one event."""
        return [ServerSentEvent("", bytes(self._body))]


class Reader:
    """Reads one response as events, within the limits of time and size, until its decoder has the answer."""

    def __init__(
        self,
        response: httpx.Response,
        parser: EventParser | WholeBody,
        decoder: Decoder,
        clocks: Clocks,
        limit: int,
    ) -> None:
        self._chunks = _chunks(response)
        self._parser = parser
        self._decoder = decoder
        self._clocks = clocks
        self._limit = limit
        self._room = limit
        self._is_open = True

    async def read(self) -> list[ServerSentEvent] | None:
        """The next events, perhaps none yet; None after the end.

        A connection that breaks, or falls silent, after the whole answer is an end too.
        """
        if self._decoder.is_done or not self._is_open:
            return None
        try:
            events = self._parse(await self._clocks.wait(self._chunks.__anext__()))
        except StopAsyncIteration:
            self._is_open = False
            events = self._parser.close()
        except ProviderError as error:
            if self._decoder.is_complete and error.is_retryable:
                return None
            raise
        for event in events:
            if event.is_progress:
                self._clocks.progress()
        return events

    async def drain(self) -> None:
        """Let the response end, so that its connection can be used again; it does not wait for a slow one."""
        with suppress(TimeoutError, *_NETWORK):
            async with asyncio.timeout(_DRAIN_TIMEOUT):
                while self._is_open and await anext(self._chunks, None) is not None:
                    pass

    def _parse(self, chunk: bytes) -> list[ServerSentEvent]:
        self._room -= len(chunk)
        if self._room < 0:
            raise ProviderError(f"the answer is over {self._limit} bytes")
        return self._parser.feed(chunk)


def _chunks(response: httpx.Response) -> AsyncIterator[bytes]:
    """The body in pieces; if it is not compressed, past two layers of httpx that cost as much as the rest."""
    if response.headers.get("content-encoding", "identity") != "identity":
        return response.aiter_bytes()
    return aiter(cast("httpx.AsyncByteStream", response.stream))


class Endpoint:
    """One URL of one provider, and the connections to it. It serves many calls at once."""

    def __init__(
        self,
        settings: Settings,
        *,
        name: str,
        url: httpx.URL,
        key: str,
        headers: Mapping[str, str],
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        require_sendable(name, key)
        self._settings = settings
        self._name = name
        self._url = url
        self._secrets = [secret for secret in (key, url.query.decode()) if len(secret) >= _SHORTEST_SECRET]
        self._backoff = Backoff(base=settings.retry_base, cap=settings.provider_max_retry_after)
        self._client = httpx.AsyncClient(
            transport=transport or make_transport(settings),
            headers={"accept": "text/event-stream", "accept-encoding": "identity", **headers},
            timeout=httpx.Timeout(None, connect=settings.provider_connect_timeout),
            trust_env=False,
        )

    async def stream(self, body: bytes, make_decoder: Callable[[], Decoder]) -> AsyncGenerator[Piece, None]:
        """Send the request, again where that can help, and yield the pieces of the answer.

        Raises `ProviderError`, its message led by the provider's name.
        """
        clocks = Clocks(self._settings)
        attempt, has_yielded = 0, False
        while True:
            attempt += 1
            try:
                async with aclosing(self._attempt(body, make_decoder(), clocks)) as pieces:
                    async for piece in pieces:
                        has_yielded = True
                        yield piece
                return
            except ProviderError as error:
                delay = None if has_yielded else self._delay(error, attempt, clocks)
                if delay is None:
                    raise self._presentable(error) from None
                log.info(
                    "provider.retry", provider=self._name, attempt=attempt, delay=delay, status=error.status
                )
            await asyncio.sleep(delay)

    async def aclose(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    def _delay(self, error: ProviderError, attempt: int, clocks: Clocks) -> float | None:
        """Seconds until the next try; None if there is to be none."""
        if not error.is_retryable or attempt >= self._settings.provider_attempts:
            return None
        delay = self._backoff.delay(attempt, at_least=error.retry_after)
        return None if clocks.is_over_after(delay) else delay

    def _presentable(self, error: ProviderError) -> ProviderError:
        message = str(error)
        for secret in self._secrets:
            message = message.replace(secret, "[hidden]")
        return ProviderError(
            f"{self._name}: {message}",
            retryable=error.is_retryable,
            retry_after=error.retry_after,
            status=error.status,
        )

    async def _attempt(self, body: bytes, decoder: Decoder, clocks: Clocks) -> AsyncGenerator[Piece, None]:
        """One try: one request, and those that the answer asks for."""
        following: bytes | None = body
        while following is not None:
            async with aclosing(self._respond(following, decoder, clocks)) as pieces:
                async for piece in pieces:
                    yield piece
            for piece in decoder.end():
                yield piece
            following = decoder.resume()

    async def _respond(self, body: bytes, decoder: Decoder, clocks: Clocks) -> AsyncGenerator[Piece, None]:
        clocks.begin()
        response = await clocks.wait(self._send(body))
        try:
            reader = await self._reader(response, decoder, clocks)
            while (events := await reader.read()) is not None:
                for event in events:
                    for piece in decoder.feed(event):
                        yield piece
            await reader.drain()
        finally:
            with suppress(*_NETWORK):
                await response.aclose()

    async def _send(self, body: bytes) -> httpx.Response:
        request = self._client.build_request(
            "POST", self._url, content=body, headers={"content-type": "application/json"}
        )
        return await self._client.send(request, stream=True)

    async def _reader(self, response: httpx.Response, decoder: Decoder, clocks: Clocks) -> Reader:
        """Choose how to read the response. Raises `ProviderError` for one that is no answer."""
        if response.status_code != 200:
            raise await _status_error(response, clocks)
        limit = self._settings.provider_max_bytes
        media_type = _media_type(response)
        if media_type == "application/json":
            return Reader(response, WholeBody(), decoder, clocks, limit)
        if media_type in _EVENT_STREAMS:
            return Reader(response, EventParser(), decoder, clocks, limit)
        raise ProviderError(f"HTTP 200 with {one_line(media_type, 60)}, not an event stream", retryable=True)


def _network_error(error: Exception) -> ProviderError:
    if isinstance(error, httpx.UnsupportedProtocol | httpx.InvalidURL):
        return ProviderError("the base URL is not an http or https URL")
    if isinstance(error, httpx.DecodingError):
        return ProviderError("the response does not decompress", retryable=True)
    return ProviderError(f"connection failed: {_reason(error)}", retryable=True)


def _reason(error: BaseException) -> str:
    """The system's words for a network error where it has some, else the error's class."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno:
            # Names have negative numbers of their own; asyncio puts the address into `strerror`.
            return os.strerror(cause.errno) if cause.errno > 0 else one_line(str(cause.strerror), 100)
        cause = cause.__cause__
    return type(error.__cause__ or error).__name__


async def _status_error(response: httpx.Response, clocks: Clocks) -> ProviderError:
    body = await _head(response, clocks)
    return error_from(
        _described(body, _media_type(response)),
        status=response.status_code,
        retry_after=_retry_after(response),
    )


async def _head(response: httpx.Response, clocks: Clocks) -> bytes:
    """The first 4 KB of a body; what cannot be read is left out: the status says enough."""
    body = bytearray()
    chunks = response.aiter_bytes()
    with suppress(ProviderError):
        while len(body) < MAX_ERROR_BYTES and (chunk := await clocks.wait(anext(chunks, None))) is not None:
            body += chunk
    return bytes(body[:MAX_ERROR_BYTES])


def _described(body: bytes, media_type: str) -> object:
    """The error inside a body: `error` of a JSON object, the object itself, or the text."""
    if media_type == "text/html":
        return "an HTML page"
    try:
        payload = _decode_any(body)
    except ProviderError:
        return body.decode("utf-8", "replace")
    if isinstance(payload, list) and len(payload) == 1:  # pyright: ignore[reportUnknownArgumentType]
        payload = payload[0]  # pyright: ignore[reportUnknownVariableType]
    if isinstance(payload, dict):
        return payload.get("error") or payload  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return payload  # pyright: ignore[reportUnknownVariableType]


def _retry_after(response: httpx.Response) -> float | None:
    milliseconds = parse_retry_after(response.headers.get("retry-after-ms"), time.time())
    if milliseconds is not None:
        return milliseconds / 1000
    return parse_retry_after(response.headers.get("retry-after"), time.time())


def _media_type(response: httpx.Response) -> str:
    return response.headers.get("content-type", "").partition(";")[0].strip().lower()


def make_transport(settings: Settings) -> AiohttpTransport:
    """The transport for real use: no proxies from the environment, no cookies, no limit but ours."""
    context = httpx.create_ssl_context(trust_env=False)

    def make_session() -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(
            ssl=context, limit=settings.provider_connections, keepalive_timeout=30.0
        )
        return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())

    return AiohttpTransport(verify=context, trust_env=False, client=make_session)


def endpoint_url(base: str, path: str) -> httpx.URL:
    """Join a base URL and a path; the base's path and query stay. Raises `ProviderError` for no URL."""
    try:
        url = httpx.URL(base.strip())
    except httpx.InvalidURL:
        url = httpx.URL()
    if url.scheme not in {"http", "https"} or not url.host:
        raise ProviderError("the base URL is not an http or https URL")
    if url.userinfo:
        raise ProviderError("the base URL has a user name or a password in it; give a key instead")
    return url.copy_with(path=url.path.rstrip("/") + path)


def require_sendable(name: str, key: str) -> None:
    """Raise `ProviderError` for a key that no header can carry."""
    if not (key.isascii() and key.isprintable()):
        raise ProviderError(f"{name}: the API key has characters that no header can carry")


def _now() -> float:
    return asyncio.get_running_loop().time()
