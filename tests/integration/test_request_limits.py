"""What comes in is bounded, and whoever is over a bound is told which one."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from streamjobs.app import App
from streamjobs.gateway import server
from streamjobs.store import Submission
from tests.conftest import RedisProcess, wait_until
from tests.integration.gateway import Served, serving
from tests.integration.wire import BROKEN, Exchange, connected, exchange, head, port_of, posting, read_answer

LIMITS: dict[str, Any] = {
    "max_body": 2000, "max_json_items": 100, "max_json_depth": 20, "max_head": 4000, "max_headers": 20,
    "max_url": 300, "max_input": 1000, "max_metadata": 200, "max_prompt": 400, "max_messages": 3,
    "max_signal": 200,
}  # fmt: skip


def chat(prompt: str = "a", **fields: Any) -> bytes:
    return json.dumps({"kind": "chat", "input": {"prompt": prompt}} | fields).encode()


def any_job(given: Any) -> bytes:
    return json.dumps({"kind": "any", "input": given}).encode()


def talk(*texts: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text} for text in texts]}


@pytest.fixture
async def served(redis: RedisProcess) -> AsyncIterator[Served]:
    app = App()

    @app.workflow("any")
    async def _any(ctx: Any, given: Any) -> None:
        pass

    async with serving(redis.url, app, **LIMITS) as gateway:
        yield gateway


CHUNKED = head("POST /v1/jobs", "Transfer-Encoding: chunked")
Over = tuple[bytes, int, str, str]
OVER: dict[str, Over] = {
    "a URL": (head("GET /v1/jobs?kind=" + "a" * 300), 414, "url_too_long", ""),
    "headers": (head("GET /livez", *(f"h{n}: x" for n in range(21))), 431, "head_too_large", ""),
    "a body": (posting(b" " * 2001), 413, "too_large", ""),
    "a length": (head("POST /v1/jobs", "Content-Length: " + "9" * 20), 400, "bad_request", ""),
    "chunks": (CHUNKED + b"7d0\r\n" + b" " * 2000 + b"\r\n1\r\n \r\n0\r\n\r\n", 413, "too_large", ""),
    "values": (posting(b"[" + b"1," * 100 + b"1]"), 413, "too_many_items", ""),
    "lists": (posting(b"[" + b"[]," * 60 + b"1]"), 413, "too_many_items", ""),
    "members": (posting(json.dumps({str(n): n for n in range(101)}).encode()), 413, "too_many_items", ""),
    "depth": (posting(b'{"a":' * 21 + b"1" + b"}" * 21), 400, "bad_request", ""),
    "a coding": (
        posting(gzip.compress(chat()), "Content-Encoding: gzip"), 415, "unsupported_encoding", "",
    ),
} | {
    what: (posting(body), 422, "input_too_large", field)
    for what, body, field in (
        ("a prompt", chat("é" * 201), "input.prompt"),
        ("messages", chat(input=talk(*"abcd")), "input.messages"),
        ("words in messages", chat(input=talk("a" * 200, "b" * 201)), "input.messages"),
        ("an input", any_job("a" * 999), "input"),
        ("metadata", chat(metadata={"a": "b" * 200}), "metadata"),
    )
} | {
    what: (posting(body, path="/v1/schedules"), 422, "input_too_large", field)
    for what, body, field in (
        ("a schedule's prompt", chat("a" * 401, name="n", every=60), "input.prompt"),
        ("a schedule's metadata", chat(name="n", every=60, metadata={"a": "b" * 200}), "metadata"),
    )
}  # fmt: skip


async def test_what_is_over_a_limit_is_refused_by_its_name(served: Served):
    """A client would not know what to change; a service without the limit can be filled by anybody."""
    for what, (sent, status, code, field) in OVER.items():
        answer = await exchange(port_of(served), sent)
        assert (answer.status, answer.headers["content-type"]) == (status, "application/problem+json"), what
        said = answer.json
        assert (said["code"], said["status"], said.get("field", "")) == (code, status, field), what
        assert answer.headers["x-content-type-options"] == "nosniff", what
    assert (await served.client.get("/livez")).status_code == 200
    assert (await served.store.queues.all())[0].waiting == 0


AT: dict[str, tuple[bytes, int]] = {
    "a URL": (head("GET /v1/jobs?kind=" + "a" * 200), 200),
    "headers": (head("GET /livez", *(f"h{n}: x" for n in range(19))), 200),
    "a head": (head("GET /livez", "x: " + "a" * 3900), 200),
} | {
    what: (posting(body), 202)
    for what, body in (
        ("a body", chat().ljust(2000)),
        ("values", any_job([1] * 95)),
        ("words that look like values", chat("[,{" * 130)),
        ("quotes in words", chat('",[{\\' * 50)),
        ("depth", any_job(None).replace(b"null", b"[" * 18 + b"]" * 18)),
        ("a prompt", chat("é" * 200)),
        ("messages", chat(input=talk("a" * 200, "b" * 199, "c"))),
        ("an input", any_job("a" * 998)),
        ("metadata", chat(metadata={"a": "b" * 192})),
    )
} | {"a coding": (posting(chat(), "Content-Encoding: identity"), 202)}  # fmt: skip


async def test_what_is_within_a_limit_is_taken(served: Served):
    """A limit that is one too small refuses what its name promises."""
    for what, (sent, status) in AT.items():
        answer = await exchange(port_of(served), sent)
        assert answer.status == status, (what, answer.content)


async def test_a_signal_is_bounded(served: Served):
    """Anybody who may signal a job could fill its log."""
    job_id = (await served.client.post("/v1/jobs", content=chat())).json()["id"]
    for size, status in ((198, 200), (199, 422)):
        body = {"name": "s", "payload": "a" * size}
        answer = await served.client.post(f"/v1/jobs/{job_id}/signal", json=body)
        assert answer.status_code == status
    assert (answer.json()["code"], answer.json()["field"]) == ("input_too_large", "payload")


async def test_signals_and_pauses_end_where_the_log_is_full(redis: RedisProcess):
    """Each is small, and a loop of them would grow one job's log for ever."""
    async with serving(redis.url, max_events=5) as served:
        job_id = (await served.client.post("/v1/jobs", content=chat())).json()["id"]
        url, answers = f"/v1/jobs/{job_id}", list[int]()
        for _ in range(4):
            answers.append((await served.client.post(f"{url}/pause")).status_code)
            await served.client.post(f"{url}/resume")
        assert answers == [200, 200, 409, 409]
        assert (await served.client.post(f"{url}/signal", json={"name": "s"})).json()[
            "code"
        ] == "limit_exceeded"
        assert (await served.client.post(f"{url}/cancel")).status_code == 200


# --- time


async def test_a_slow_body_is_not_waited_for(redis: RedisProcess):
    """A few hundred clients that send a byte now and then would hold all there is."""
    async with serving(redis.url, body_timeout=0.3) as served, connected(port_of(served)) as (reader, writer):
        writer.write(head("POST /v1/jobs", "Content-Length: 100") + b"{")
        answer = await read_answer(reader)
    assert (answer.status, answer.json["code"]) == (408, "too_slow")


async def test_a_slow_head_is_not_waited_for_on_a_connection_that_was_used(redis: RedisProcess):
    """One request would be enough to hold the connection for ever, header by header."""
    async with serving(redis.url, head_timeout=1.5) as served, connected(port_of(served)) as (reader, writer):
        writer.write(head("GET /livez"))
        assert (await read_answer(reader)).status == 200
        writer.write(b"GET /livez HTTP/1.1\r\n")
        assert await read_answer(reader) == BROKEN


async def test_line_ends_between_requests_do_not_keep_a_connection(
    redis: RedisProcess, monkeypatch: pytest.MonkeyPatch
):
    """They are no request, and would stop the clock of a connection that is kept for the next one."""
    monkeypatch.setattr(server, "KEEP_ALIVE", 0.3)
    async with serving(redis.url) as served, connected(port_of(served)) as (reader, writer):
        writer.write(head("GET /livez"))
        assert (await read_answer(reader)).status == 200
        writer.write(b"\r\n")
        assert await read_answer(reader) == BROKEN


async def test_a_body_that_nobody_reads_is_not_waited_for(served: Served, monkeypatch: pytest.MonkeyPatch):
    """It is answered before it is whole, and the connection would stay for as long as the client likes."""
    monkeypatch.setattr(server, "LINGER", 0.2)
    async with connected(port_of(served)) as (reader, writer):
        writer.write(head("POST /v1/jobs/unknown/rerun", "Content-Length: 1000") + b"{")
        assert (await read_answer(reader)).status == 404
        async with asyncio.timeout(server.KEEP_ALIVE / 2):
            assert await read_answer(reader) == BROKEN


async def test_a_body_that_nobody_reads_may_end_and_others_follow(served: Served):
    """A client with a connection for all of its requests would lose it."""
    async with connected(port_of(served)) as (reader, writer):
        writer.write(head("POST /v1/jobs/unknown/rerun", "Content-Length: 10") + b"{")
        assert (await read_answer(reader)).status == 404
        writer.write(b" " * 9 + head("GET /livez"))
        assert (await read_answer(reader)).status == 200


# --- what is never gathered


def endless(line: bytes) -> Iterator[bytes]:
    """More than anybody reads."""
    yield head("POST /v1/jobs", "Transfer-Encoding: chunked") + b"2\r\n{}\r\n"
    for _ in range(20_000):
        yield line


FRAMES = {
    "extensions of chunks": b"1;" + b"e" * 1000 + b"\r\n \r\n",
    "a trailer": b"0\r\n" + b"x: " + b"y" * 1000,
    "trailers": b"0\r\n" + b"x: y\r\n" * 200,
}


async def test_what_frames_a_body_is_bounded(served: Served):
    """It is no part of the body, so no limit of that counts it."""
    for what, line in FRAMES.items():
        assert (await exchange(port_of(served), endless(line))).status in {0, 400, 431}, what


async def test_chunks_of_one_byte_are_a_body(served: Served):
    """Clients that write as they go would be refused."""
    body = chat().ljust(1500)
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body)
    sent = head("POST /v1/jobs", "Transfer-Encoding: chunked") + chunks + b"0\r\n\r\n"
    assert (await exchange(port_of(served), sent)).status == 202


async def test_requests_that_do_not_wait_for_answers_are_few(served: Served):
    """One connection could make us hold ten thousand of them, of two kilobytes each."""
    async with connected(port_of(served)) as (reader, writer):
        writer.write(head("GET /livez") * (server.PIPELINED + 1))
        for _ in range(server.PIPELINED + 1):
            assert (await read_answer(reader)).status == 200
    async with connected(port_of(served)) as (reader, writer):
        writer.write(head("GET /livez") * 1000)
        assert await read_answer(reader) == BROKEN


async def test_a_request_behind_a_stream_is_answered_after_it(served: Served):
    """What the stream does with its connection would be done to the request that waits behind it."""
    script = await served.script()
    async with connected(port_of(served)) as (reader, writer):
        writer.write(head(f"GET /v1/jobs/{script.id}/events?after=0") + posting(chat()))
        assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
        assert b"job.queued" in await reader.readuntil(b"\n\n")
        await script.complete()
        await reader.readuntil(b"\r\n0\r\n\r\n")
        assert (await read_answer(reader)).status == 202


async def test_a_stream_with_a_request_behind_it_may_be_lost(
    redis: RedisProcess, caplog: pytest.LogCaptureFixture
):
    """Each would be an error in the log, and a client can make as many as it likes."""
    async with serving(redis.url, heartbeat_interval=0.1) as served:
        script = await served.script()
        async with connected(port_of(served)) as (reader, writer):
            writer.write(head(f"GET /v1/jobs/{script.id}/events?after=0") + posting(chat()))
            await reader.readuntil(b"job.queued")
            transport: Any = writer.transport
            transport.abort()
        await wait_until(lambda: served.gateway.hub.viewers == len(served.gateway.hub.open_streams) == 0)
        await script.complete()
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


# --- what an owner may have


async def test_an_owner_has_so_many_jobs_waiting(redis: RedisProcess):
    """One owner's loop would fill Redis, and everybody else's submissions fail."""
    async with serving(redis.url, owner_waiting=3) as served:
        statuses = [
            (
                await served.client.post("/v1/jobs", content=chat(), headers={"x-streamjobs-owner": owner})
            ).status_code
            for owner in ["ann"] * 5 + ["bob"]
        ]
        assert statuses == [202, 202, 202, 429, 429, 202]
        keyed = {"x-streamjobs-owner": "ann", "idempotency-key": "k"}
        answer = await served.client.post("/v1/jobs", content=chat(), headers=keyed)
        assert (answer.json()["code"], answer.headers["retry-after"]) == ("too_many_waiting", "10")
        await served.store.work.take(0, "w", 1, 1, served.store.settings.queues)
        assert (await served.client.post("/v1/jobs", content=chat(), headers=keyed)).status_code == 202
        again = await served.client.post("/v1/jobs", content=chat(), headers=keyed)
        assert (again.status_code, again.headers["idempotent-replayed"]) == (202, "true")


async def test_delayed_jobs_count_as_the_index_knows_them(redis: RedisProcess):
    """A million jobs for next year take the same room as those for now."""
    async with serving(redis.url, owner_waiting=3) as served:
        ids = [
            (await served.store.jobs.submit(Submission(kind="chat", delay=9999.0))).job_id for _ in range(3)
        ]
        for job_id in ids:
            await served.store.index.put(job_id, "", "")
        assert (await served.client.post("/v1/jobs", content=chat())).json()["code"] == "too_many_waiting"


async def test_a_child_is_not_refused_for_what_waits(redis: RedisProcess):
    """Work that is under way would fail half done."""
    async with serving(redis.url, owner_waiting=1) as served:
        script = await served.script(owner="ann")
        for number in range(3):
            await served.store.jobs.submit(
                Submission(kind="chat", owner="ann", parent=script.id, job_id=f"j0-{'a' * 25}{'abc'[number]}")
            )


async def open_stream(served: Served, path: str, owner: str) -> contextlib.AsyncExitStack:
    """A stream that is being sent."""
    stack = contextlib.AsyncExitStack()
    request = served.client.stream(
        "GET", path, headers={"x-streamjobs-owner": owner, "accept": "text/event-stream"}
    )
    response = await stack.enter_async_context(request)
    assert response.status_code == 200
    return stack


async def open_socket(served: Served, owner: str) -> contextlib.AsyncExitStack:
    stack = contextlib.AsyncExitStack()
    url = served.url.replace("http", "ws") + "/v1/ws"
    await stack.enter_async_context(connect(url, additional_headers={"x-streamjobs-owner": owner}))
    return stack


async def test_an_owner_holds_so_many_streams_open(redis: RedisProcess):
    """One page that reconnects in a loop without closing would take every connection there is."""
    async with serving(redis.url, owner_streams=3) as served:
        script = await served.script(owner="ann")
        events = f"/v1/jobs/{script.id}/events"
        stacks = [
            await open_stream(served, events, "ann"),
            await open_stream(served, "/v1/events", "ann"),
            await open_socket(served, "ann"),
        ]
        ann = {"x-streamjobs-owner": "ann"}
        for path in (events, "/v1/events"):
            answer = await served.client.get(path, headers=ann)
            assert (answer.status_code, answer.json()["code"]) == (429, "too_many_streams")
            assert answer.headers["retry-after"] == "10"
        with pytest.raises(InvalidStatus) as refusal:
            await open_socket(served, "ann")
        assert refusal.value.response.status_code == 429
        assert json.loads(refusal.value.response.body)["code"] == "too_many_streams"
        await (await open_stream(served, "/v1/events", "bob")).aclose()
        for stack, again in zip(tuple(stacks), (events, "/v1/events", events), strict=True):
            await stack.aclose()
            await wait_until(lambda: len(served.gateway.hub.open_streams) == 2)
            stacks.append(await open_stream(served, again, "ann"))
        for stack in stacks[3:]:
            await stack.aclose()
        await wait_until(lambda: len(served.gateway.hub.open_streams) == 0)
        await script.complete()


async def test_a_stream_that_is_refused_or_short_leaves_no_trace(redis: RedisProcess):
    """Places would be lost one by one, until the owner can open none."""
    async with serving(redis.url, owner_streams=2) as served:
        script = await served.script()
        await script.complete()
        end = (await script.log())[-1][0]
        events = f"/v1/jobs/{script.id}/events"
        answers: list[Exchange] = []
        for path in (
            "/v1/jobs/j0-" + "a" * 26 + "/events",
            events + "?after=x",
            events + "?after=" + end,
            "/v1/events?after=x",
        ):
            for _ in range(3):
                answers.append(await exchange(port_of(served), head("GET " + path, "Connection: close")))
        assert [answer.status for answer in answers] == [404] * 3 + [400] * 3 + [204] * 3 + [400] * 3
        for accept in ("application/json", "application/x-ndjson", "text/event-stream"):
            async with asyncio.timeout(60):
                assert (await served.client.get(events, headers={"accept": accept})).status_code == 200
        await wait_until(lambda: len(served.gateway.hub.open_streams) == 0)
