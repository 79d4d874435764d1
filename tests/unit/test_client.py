"""The Python client: it comes back by itself, shows each event once, and knows a refusal from an absence."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from streamjobs.client import Client, GatewayError, GatewayUnreachable, client
from streamjobs.client.client import WatchedEvent

JOB = "j0-x"
Answer = Callable[[httpx.Request], httpx.Response]


class Gateway:
    """Answers one after the other from a list; the last one for ever."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []

    def answer(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        return self.answers[min(len(self.requests), len(self.answers)) - 1](request)

    @property
    def cursors(self) -> list[str | None]:
        """What each connection came back with."""
        return [request.headers.get("last-event-id") for request in self.requests]


def connect(gateway: Gateway, **options: Any) -> Client:
    made = Client("http://gateway", **options)
    made._http = httpx.AsyncClient(base_url="http://gateway", transport=httpx.MockTransport(gateway.answer))  # pyright: ignore
    return made


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client._Viewer, "pause", lambda _self: 0.0)  # pyright: ignore


def frame(seq: int, event: str, /, **data: Any) -> bytes:
    return f"id: {seq}-7\nevent: {event}\ndata: {json.dumps({'ts': 1, **data})}\n\n".encode()


def stream(*frames: bytes, breaks: bool = False) -> Answer:
    async def body() -> AsyncIterator[bytes]:
        for one in frames:
            yield one
        if breaks:
            raise httpx.ReadError("connection reset")

    return lambda _request: httpx.Response(200, content=body())


def status(number: int, /, **problem: Any) -> Answer:
    return lambda _request: httpx.Response(number, json=problem)


def away(_request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("refused")


async def watched(gateway: Gateway, after: str | None = "0", **options: Any) -> list[WatchedEvent]:
    async with connect(gateway, **options) as viewer:
        return [event async for event in viewer.watch(JOB, after)]


END = frame(4, "job.completed", result=1)


async def test_it_goes_on_where_it_was():
    """After a broken connection events would be missing, or come twice."""
    gateway = Gateway(
        stream(frame(1, "job.queued"), frame(2, "job.started"), breaks=True),
        away,
        stream(frame(2, "job.started"), frame(3, "text.delta", text="x"), END),
    )
    events = await watched(gateway)
    assert [event.id for event in events] == ["1-7", "2-7", "3-7", "4-7"]
    assert gateway.cursors == ["0", "2-7", "2-7"]


async def test_a_stream_that_ends_early_is_no_end():
    """A gateway that hands over would look like a job that is done."""
    handover = b'event: handover\nretry: 5\ndata: {"reason":"drain"}\n\n'
    gateway = Gateway(stream(frame(1, "job.queued"), handover), stream(frame(2, "job.started"), END))
    assert [event.type for event in await watched(gateway)] == ["job.queued", "job.started", "job.completed"]


async def test_the_end_is_the_end():
    """A watcher of a finished job would connect again and again."""
    assert await watched(Gateway(status(204)), after="4-7") == []
    gateway = Gateway(stream(END))
    assert len(await watched(gateway)) == 1
    assert len(gateway.requests) == 1


async def test_a_reset_in_the_middle_is_shown():
    """A reset has no id of its own: it would pass for one that was seen, and two histories would be
    spliced."""
    view = b'id: 2-9\nevent: snapshot\ndata: {"status":"running"}\n\n'
    gateway = Gateway(
        stream(frame(1, "job.queued"), frame(2, "x"), b'event: reset\ndata: {"reason":"gone"}\n\n', view,
               b"id: 3-9\nevent: text.delta\ndata: {}\n\n", breaks=True),
        stream(b"id: 4-9\nevent: job.completed\ndata: {}\n\n"),
    )  # fmt: skip
    events = await watched(gateway)
    assert [(event.id, event.type) for event in events[2:]] == [
        ("", "reset"), ("2-9", "snapshot"), ("3-9", "text.delta"), ("4-9", "job.completed"),
    ]  # fmt: skip
    assert gateway.cursors[1] == "3-9"


async def test_an_error_in_the_middle_ends_the_watch():
    """A job that vanished would be watched for ever."""
    gateway = Gateway(stream(frame(1, "job.queued"), b'event: error\ndata: {"code":"not_found"}\n\n'))
    events = await watched(gateway)
    assert [event.type for event in events] == ["job.queued", "error"]
    assert events[1].data == {"code": "not_found"}


@pytest.mark.parametrize("code", [429, 502, 503, 504])
async def test_a_proxy_without_a_gateway_is_waited_for(code: int):
    """Every deployment of the gateways would end every watch."""
    gateway = Gateway(stream(frame(1, "job.queued"), breaks=True), status(code), stream(END))
    assert [event.id for event in await watched(gateway)] == ["1-7", "4-7"]


async def test_patience_counts_from_the_first_failure(monkeypatch: pytest.MonkeyPatch):
    """A tool that runs for a minute without an event, then a gateway that restarts: the watch would give
    up at once."""
    now = 1000.0
    monkeypatch.setattr(client.time, "monotonic", lambda: now)

    def a_minute_later(_request: httpx.Request) -> httpx.Response:
        async def body() -> AsyncIterator[bytes]:
            nonlocal now
            yield frame(1, "job.queued")
            now += 60.0
            raise httpx.ReadError("connection reset")

        return httpx.Response(200, content=body())

    gateway = Gateway(away, a_minute_later, away, stream(END))
    assert len(await watched(gateway, patience=30.0)) == 2


async def test_patience_ends(monkeypatch: pytest.MonkeyPatch):
    """A script would hang for ever on an address that nobody answers."""
    now = 1000.0

    def clock() -> float:
        nonlocal now
        now += 1.0
        return now

    monkeypatch.setattr(client.time, "monotonic", clock)
    gateway = Gateway(away)
    with pytest.raises(GatewayUnreachable, match="no answer from http://gateway"):
        await watched(gateway, patience=10.0)
    assert 3 <= len(gateway.requests) <= 12


@pytest.mark.parametrize("code", [400, 401, 404, 409, 500])
async def test_a_refusal_is_told_with_its_code(code: int):
    """A job that does not exist would be waited for."""
    gateway = Gateway(status(code, code="some_code", detail="some words"))
    async with connect(gateway) as viewer:
        for call in (viewer.get(JOB), viewer.cancel(JOB, "why"), viewer.submit({}), anext(viewer.watch(JOB))):
            with pytest.raises(GatewayError, match="some words") as refused:
                await call
            assert (refused.value.code, refused.value.http_status) == ("some_code", code)


@pytest.mark.parametrize("content", [b"<html>", b"", b"[1]", b'{"detail": 5'])
async def test_an_answer_of_something_else_is_told(content: bytes):
    """A wrong port, a login page of a proxy: a traceback of a JSON parser."""
    for code in (200, 500):
        gateway = Gateway(lambda _request, code=code: httpx.Response(code, content=content))
        async with connect(gateway) as viewer:
            with pytest.raises(GatewayError):
                await viewer.get(JOB)


async def test_an_id_cannot_leave_its_place():
    """`streamjobs cancel "../x?"` would be a request to another route."""
    gateway = Gateway(status(200, id=JOB))
    async with connect(gateway) as viewer:
        await viewer.get("a/../b?c#d e")
    assert gateway.requests[0].url.raw_path == b"/v1/jobs/a%2F..%2Fb%3Fc%23d%20e"


async def test_leaving_closes_the_connection():
    """A viewer that stops reading would hold its connection, and its place in the gateway, until it is
    collected."""
    is_closed = False

    async def body() -> AsyncIterator[bytes]:
        nonlocal is_closed
        try:
            yield frame(1, "job.queued")
            yield frame(2, "job.started")
        finally:
            is_closed = True

    class Body(httpx.AsyncByteStream):
        def __init__(self) -> None:
            self.chunks = body()

        def __aiter__(self) -> AsyncIterator[bytes]:
            return self.chunks

        async def aclose(self) -> None:
            await self.chunks.aclose()  # type: ignore[attr-defined]

    gateway = Gateway(lambda _request: httpx.Response(200, stream=Body()))
    async with connect(gateway) as viewer:
        events = viewer.watch(JOB)
        await anext(events)
        await events.aclose()
        assert is_closed
