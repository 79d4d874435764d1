"""Requests that are spoilt at random, byte by byte: an answer or an end, never a fault of ours."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import secrets
from collections import Counter
from collections.abc import AsyncIterator

import pytest

from tests.conftest import RedisProcess, wait_until
from tests.integration.gateway import Served, serving
from tests.integration.test_ws_fuzz import no_faults
from tests.integration.wire import connected, head, port_of, posting
from tests.unit.test_parser_fuzz import spoilt

AT_ONCE = 20
PATIENCE = 0.1
"""Seconds that a client waits for an answer, which to half a request never comes, before it sends its end."""
BODY = b'{"kind":"chat","input":{"prompt":"Hi"}}'
UPGRADE = (
    "Upgrade: websocket",
    "Connection: Upgrade",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
)
SEEDS = [
    posting(BODY, "Idempotency-Key: k", "Prefer: wait=0", "Content-Type: application/json"),
    head("POST /v1/jobs", "Transfer-Encoding: chunked")
    + b'5\r\n{"kin\r\n22;x=y\r\n'
    + BODY[5:]
    + b"\r\n0\r\nx: y\r\n\r\n",
    head("POST /v1/jobs", "Expect: 100-continue", f"Content-Length: {len(BODY)}") + BODY,
    head(
        "GET /v1/jobs?status=queued&kind=chat&limit=5&since=2026-01-01T00:00:00Z&counts=1",
        "X-Streamjobs-Owner: ann",
    ),
    head(
        "GET /v1/jobs/j0-aaaaaaaaaaaaaaaaaaaaaaaaaa/events?after=1-1&merge=1&flush=100", "Last-Event-ID: 3-4"
    ),
    head("GET /v1/events?watch=j0-aaaaaaaaaaaaaaaaaaaaaaaaaa", "Accept: text/event-stream"),
    head("GET /v1/ws", *UPGRADE) + b"\x81\x85\x00\x00\x00\x00hello\x88\x80\x00\x00\x00\x00",
    head("GET /v1/jobs/x/artifacts/..%2f..%2fetc", "If-None-Match: *", "Range: bytes=0-1"),
    head("PUT /v1/strikes/kind/none", "Content-Length: 14")
    + b'{"reason":"a"}'
    + head("DELETE /v1/strikes/kind/none"),
    head("GET /livez") * 3,
    head("GET http://a/readyz", "Connection: close"),
    b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /livez HTTP/1.0\r\n\r\n",
    b"HEAD /v1/tools HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
    posting(b'{"name":"n","kind":"chat","every":60,"input":{"prompt":"a"}}', path="/v1/schedules"),
    posting(b'{"url":"https://h.example/","events":["job.completed"]}', path="/v1/webhooks"),
]


@pytest.fixture
async def served(redis: RedisProcess) -> AsyncIterator[Served]:
    async with serving(redis.url, max_wait=0.05, heartbeat_interval=0.5) as gateway:
        yield gateway


async def answer_to(port: int, sent: bytes) -> bytes:
    """What comes for it, to the end of the connection; the client ends it where it has the first piece."""
    answer = b""
    async with connected(port) as (reader, writer):
        with contextlib.suppress(ConnectionError):
            writer.write(sent)
            await writer.drain()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PATIENCE):
                    answer = await reader.read(1 << 16)
            writer.write_eof()
            # a stream with a request behind it is not read from: a heartbeat shows that nobody is there
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(20 * PATIENCE):
                    answer += await reader.read()
    return answer


@pytest.mark.parametrize("executions", [400, pytest.param(30_000, marks=pytest.mark.long)])
async def test_no_bytes_break_the_gateway(served: Served, caplog: pytest.LogCaptureFixture, executions: int):
    """Anybody who reaches the port could fill the log with errors, or leave connections behind."""
    seed = 6 if executions < 1000 else secrets.randbits(32)
    chance, statuses = random.Random(seed), Counter[int]()
    sent = [*SEEDS, *(spoilt(chance.choice(SEEDS), SEEDS, chance) for _ in range(executions - len(SEEDS)))]
    with no_faults(caplog):
        for start in range(0, len(sent), AT_ONCE):
            batch = sent[start : start + AT_ONCE]
            answers = await asyncio.gather(*(answer_to(port_of(served), one) for one in batch))
            for one, answer in zip(batch, answers, strict=True):
                found = [int(status) for status in re.findall(rb"^HTTP/1.1 (\d{3}) ", answer, re.MULTILINE)]
                assert all(status < 500 for status in found), f"seed {seed}: {one!r} {answer!r}"
                statuses.update(found or [0])
        await wait_until(lambda: served.gateway.hub.viewers == len(served.gateway.hub.open_streams) == 0)
    print(f"{len(sent)} executions, seed {seed}, {dict(statuses)}")  # noqa: T201 - how much was tried
    assert statuses.total() - statuses[0] > executions / 4
    assert (await served.client.get("/livez")).status_code == 200
