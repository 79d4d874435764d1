"""Requests that are made to fill a gateway's memory, or to hold it up: refused, and forgotten."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.conftest import RedisProcess
from tests.faults.gateways import GatewayProcess, gateway_process
from tests.integration.wire import connected, exchange, head, posting

MB = 1024 * 1024
ROOM = 100 * MB
"""What a gateway may need more than at rest while it refuses."""

WHOLE: dict[str, tuple[bytes, set[int]]] = {
    "lists of 15 MB": (posting(b"[" + b"[]," * 5_000_000 + b"1]"), {0, 413}),
    "as many lists as fit a body": (posting(b"[" + b"[]," * 340_000 + b"1]"), {413}),
    "as many lists as may be": (posting(b"[" + b"[]," * 49_000 + b"1]"), {422}),
    "depth 100,000": (posting(b"[" * 100_000 + b"]" * 100_000), {400, 413}),
    "objects, depth 100,000": (posting(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), {400, 413}),
    "a million keys": (posting(b"{" + b",".join(b'"%d":0' % n for n in range(1_000_000)) + b"}"), {0, 413}),
    "as many keys as may be": (posting(b"{" + b",".join(b'"%x":0' % n for n in range(99_000)) + b"}"), {422}),
    "a number of a million digits": (posting(b"9" * 1_000_000), {400}),
    "digits behind the point": (posting(b"0." + b"9" * 1_000_000), {422}),
    "an exponent": (posting(b"1e999999999"), {400}),
    "a million backslashes": (posting(b'"' + b"\\" * 1_000_000), {400}),
    "escapes": (posting(b'"' + b"\\u0000" * 170_000 + b'"'), {422}),
    "strings that do not end": (posting(b'"a\\"' * 250_000), {400}),
    "10,000 headers": (head("GET /v1/tools", *(f"h{n}: x" for n in range(10_000))), {431}),
    "a header of 10 MB": (head("GET /v1/tools", "x: " + "y" * 10_000_000), {0, 431}),
    "a URL of 10 MB": (head("GET /" + "y" * 10_000_000), {0, 414}),
    "a compressed body": (posting(gzip.compress(b" " * 100 * MB), "Content-Encoding: gzip"), {415}),
    "requests that wait for no answer": (head("GET /v1/queues") * 200_000, {0}),
    "no HTTP": (b"\x16\x03\x01\x02\x00" * 10_000, {400}),
}


def endless(line: bytes, first: bytes = b"") -> Iterator[bytes]:
    """30 MB in chunks, of which nobody says that they end."""
    yield head("POST /v1/jobs", "Transfer-Encoding: chunked") + first
    for _ in range(30 * MB // len(line)):
        yield line


def slowly(line: bytes) -> Iterator[bytes]:
    """A head that does not end."""
    yield b"GET /v1/tools HTTP/1.1\r\n"
    for _ in range(30 * MB // len(line)):
        yield line


ENDLESS: dict[str, tuple[bytes, bytes]] = {
    "chunks": (b"2710\r\n" + b" " * 10_000 + b"\r\n", b""),
    "chunks of one byte": (b"1\r\n \r\n" * 2000, b""),
    "extensions of chunks": (b"1;" + b"e" * 10_000 + b"\r\n \r\n", b""),
    "trailers": (b"x: " + b"y" * 10_000 + b"\r\n", b"2\r\n{}\r\n0\r\n"),
    "small trailers": (b"x: y\r\n" * 2000, b"2\r\n{}\r\n0\r\n"),
    "one trailer": (b"y" * 10_000, b"2\r\n{}\r\n0\r\nx: "),
}


def forget_peak(gateway: GatewayProcess) -> int:
    """Let the peak be what it is now, in bytes (Linux)."""
    Path(f"/proc/{gateway.process.pid}/clear_refs").write_text("5")
    return gateway.memory


def peak(gateway: GatewayProcess) -> int:
    status = Path(f"/proc/{gateway.process.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


async def statuses(port: int, times: int, make: Iterable[bytes] | bytes) -> set[int]:
    """What so many who send the same at once are answered."""
    pieces = [make if isinstance(make, bytes) else list(make) for _ in range(times)]
    return {answer.status for answer in await asyncio.gather(*(exchange(port, one) for one in pieces))}


@pytest.mark.parametrize("times", [4, pytest.param(100, marks=pytest.mark.long)])
async def test_no_request_fills_a_gateway(redis: RedisProcess, times: int):
    """Anybody who can reach the port could have the gateway killed, and with it everybody's streams."""
    async with gateway_process(redis.url) as gateway:
        await statuses(gateway.port, times, head("GET /v1/tools"))  # what a first request allocates for good
        rest = forget_peak(gateway)
        room = ROOM + times * 2 * MB
        for what, (sent, expected) in WHOLE.items():
            assert await statuses(gateway.port, times, sent) <= expected, what
            assert peak(gateway) - rest < room, what
        refused = [statuses(gateway.port, max(1, times // 8), endless(*lines)) for lines in ENDLESS.values()]
        assert set().union(*await asyncio.gather(*refused)) <= {0, 400, 413, 431}
        assert await statuses(gateway.port, 1, slowly(b"x: y\r\n" * 2000)) <= {0, 431}
        assert peak(gateway) - rest < room
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(200):
                _, writer = await stack.enter_async_context(connected(gateway.port))
                writer.write(b"GET /v1/tools HTTP/1.1\r\nx: " + b"y" * 60_000)  # which is never finished
                await writer.drain()
            assert await statuses(gateway.port, 1, head("GET /v1/tools")) == {200}
            assert peak(gateway) - rest < room
