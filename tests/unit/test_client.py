"""The Python client: it comes back by itself, shows each event once, and knows a refusal from an absence."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import msgspec
import pytest

from streamjobs.client import Client, GatewayError, GatewayUnreachable, JobCancelled, JobFailed, client
from streamjobs.client.client import WatchedEvent
from streamjobs.errors import Invalid

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


# --- handles


def outcome(now: str, output: Any = None, artifact: str = "") -> Answer:
    return status(200, id=JOB, status=now, output=output, output_artifact=artifact)


async def test_start_sends_what_was_given_and_nothing_else():
    """A default of the client would win over the workflow's own."""
    gateway = Gateway(status(202, id=JOB, kind="review", status="queued"))
    async with connect(gateway) as made:
        handle = await made.start("review", {"path": "src"}, key="k1", delay=5, timeout=60, metadata={"a": 1})
        assert (handle.id, handle.kind) == (JOB, "review")
    request = gateway.requests[0]
    assert json.loads(request.content) == {
        "kind": "review", "input": {"path": "src"}, "delay": 5, "timeout": 60, "metadata": {"a": 1},
    }  # fmt: skip
    assert request.headers["idempotency-key"] == "k1"
    assert request.headers["content-type"] == "application/json"


async def test_structs_are_inputs_and_what_is_no_json_is_refused_here():
    """The types that a workflow declares could not be used to call it; a typo would be a TypeError."""

    class Project(msgspec.Struct):
        path: str

    gateway = Gateway(status(202, id=JOB, kind="review"))
    async with connect(gateway) as made:
        await made.start("review", Project("src"))
        assert json.loads(gateway.requests[0].content)["input"] == {"path": "src"}
        with pytest.raises(Invalid):
            await made.start("review", object())


async def test_a_result_is_waited_for_over_many_requests():
    """A job of an hour would be given up after the first proxy's timeout."""
    gateway = Gateway(outcome("running"), away, status(503), outcome("completed", output={"n": 1}))
    async with connect(gateway) as made:
        assert await made.handle(JOB).result() == {"n": 1}
    assert len(gateway.requests) == 4
    assert {request.url.path for request in gateway.requests} == {f"/v1/jobs/{JOB}/result"}


async def test_a_large_result_is_fetched():
    """Only small results would come back, and larger ones as null."""
    gateway = Gateway(
        outcome("completed", artifact="result"),
        lambda _request: httpx.Response(200, content=b"[1, 2]"),
    )
    async with connect(gateway) as made:
        assert await made.handle(JOB).result() == [1, 2]
    assert gateway.requests[1].url.path == f"/v1/jobs/{JOB}/artifacts/result"


async def test_a_job_that_failed_raises_with_all_that_is_known():
    """A failed job's result would be None, and the program would go on with it."""
    error = {"code": "boom", "message": "it broke", "retryable": False}
    gateway = Gateway(outcome("failed"), status(200, id=JOB, status="failed", error=error, attempt=3))
    async with connect(gateway) as made:
        with pytest.raises(JobFailed, match="boom: it broke") as failed:
            await made.handle(JOB).result()
    assert failed.value.error == error
    assert failed.value.view["attempt"] == 3


async def test_a_job_that_was_cancelled_is_no_failure():
    """Who cancelled a job would be called at night for it."""
    gateway = Gateway(outcome("cancelled"), status(200, id=JOB, status="cancelled"))
    async with connect(gateway) as made:
        with pytest.raises(JobCancelled):
            await made.handle(JOB).result()


async def test_waiting_for_a_result_ends():
    """A program would hang on a job that waits for a person."""
    async with connect(Gateway(outcome("waiting"))) as made:
        with pytest.raises(TimeoutError, match="has not ended within 0 s"):
            await made.handle(JOB).result(timeout=0)


async def test_a_gateway_that_stays_away_ends_the_wait():
    """A program would hang for ever on an address that nobody answers."""
    async with connect(Gateway(away), patience=0.0) as made:
        with pytest.raises(GatewayUnreachable):
            await made.handle(JOB).result()


async def test_a_refusal_ends_the_wait_at_once():
    """A job that does not exist would be waited for."""
    gateway = Gateway(status(404, code="not_found", detail="no such job"))
    async with connect(gateway) as made:
        with pytest.raises(GatewayError, match="no such job"):
            await made.handle(JOB).result()
    assert len(gateway.requests) == 1


async def test_a_handle_says_everything_to_its_own_job():
    """Half of the routes would have to be called by hand."""
    answer = status(200, id=JOB, kind="k", status="paused", lines=[1], effects=[2], repeated=False, text="x")
    gateway = Gateway(answer)
    async with connect(gateway) as made:
        handle = made.handle(JOB)
        assert await handle.status() == "paused"
        assert await handle.log(level="warning") == [1]
        assert await handle.effects() == [2]
        assert (await handle.pause("lunch"), await handle.resume()) == ("paused", "paused")
        assert await handle.signal("ready", {"a": 1}, key="k") is True
        await handle.approve("fine")
        await handle.deny("no", request="call-7")
        await handle.cancel("enough")
        assert (await handle.rerun(key="again")).id == JOB
    asked = [(r.method, r.url.path.removeprefix(f"/v1/jobs/{JOB}"), r.content) for r in gateway.requests[3:]]
    assert [(method, path, json.loads(body or b"null")) for method, path, body in asked] == [
        ("POST", "/pause", {"reason": "lunch"}),
        ("POST", "/resume", None),
        ("POST", "/signal", {"name": "ready", "payload": {"a": 1}, "key": "k"}),
        ("POST", "/signal", {"name": "approve", "payload": {"comment": "fine", "key": ""}, "key": ""}),
        ("POST", "/signal", {"name": "deny", "payload": {"comment": "no", "key": "call-7"}, "key": ""}),
        ("POST", "/cancel", {"reason": "enough"}),
        ("POST", "/rerun", None),
    ]
    assert gateway.requests[-1].headers["idempotency-key"] == "again"
    assert gateway.requests[1].url.params["level"] == "warning"
