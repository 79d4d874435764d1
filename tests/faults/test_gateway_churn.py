"""Connections that come and go in all the ways there are leave nothing in the gateway: no stream, no file
descriptor, no memory."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import socket
import struct
from pathlib import Path

import pytest

from streamjobs.gateway.server import Protocol
from tests.conftest import RedisProcess, wait_until
from tests.faults.crowd import request_for, speaking
from tests.faults.gateways import GatewayProcess, gateway_process, store_beside
from tests.integration.gateway import Script, serving

AT_ONCE = 50
GROWTH = 8 << 20
"""Bytes; less than one kilobyte for each of ten thousand."""


@pytest.mark.parametrize("connections", [600, pytest.param(10_000, marks=pytest.mark.long)])
async def test_short_connections_leave_nothing(
    redis: RedisProcess, connections: int, capfd: pytest.CaptureFixture[str]
):
    """A page that is reloaded, a phone in a tunnel, a scanner: after a week of them the gateway would be
    full, or its log."""
    async with gateway_process(redis.url, owner_limit=0) as gateway, store_beside(gateway) as store:
        scripts = [await Script.start(store) for _ in range(20)]
        jobs = [script.id for script in scripts]
        async with speaking(scripts, pause=0.3):
            await come_and_go(gateway, jobs, min(connections, 1000))
            await nobody_is_left(gateway)
            files, memory = descriptors(gateway), gateway.memory
            await come_and_go(gateway, jobs, connections)
            await nobody_is_left(gateway)
            spare = gateway.settings.redis_max_connections
            await wait_until(lambda: descriptors(gateway) <= files + spare, 20, "descriptors to be closed")
            grown = gateway.memory - memory
        for script in scripts:
            await script.complete()
    output = "".join(capfd.readouterr())
    assert "ERROR" not in output, output
    assert "Traceback" not in output, output
    print(f"after {connections} connections: {grown / 1024:.0f} KB more")  # noqa: T201
    assert grown < GROWTH


async def come_and_go(gateway: GatewayProcess, jobs: list[str], connections: int) -> None:
    async def one_after_the_other() -> None:
        for _ in range(connections // AT_ONCE):
            await visit(gateway.port, random.choice(jobs))

    await asyncio.gather(*(one_after_the_other() for _ in range(AT_ONCE)))


async def visit(port: int, job_id: str) -> None:
    """One connection, left in one of many ways."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    request = request_for(job_id, random.choice(["", "0", "0", "999-1", "garbage"]))
    sent = random.choice([b"", request[:20], request, request, request, page_request(job_id), b"\0\r\n\r\n"])
    with contextlib.suppress(ConnectionError):
        writer.write(sent)
        if len(sent) > 20 and random.random() < 0.7:
            await reader.read(random.choice([1, 1000, 100_000]))
        if random.random() < 0.3:
            break_off(writer)
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


def page_request(job_id: str) -> bytes:
    return request_for(job_id, "").replace(b"text/event-stream", b"application/json")


def break_off(writer: asyncio.StreamWriter) -> None:
    """Have the connection end by a reset."""
    peer: socket.socket = writer.get_extra_info("socket")
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def nobody_is_left(gateway: GatewayProcess) -> None:
    await gateway.viewers(0)

    async def nothing_is_watched() -> bool:
        return await gateway.metric("streamjobs_channels") == 0

    await wait_until(nothing_is_watched, 20, "channels to be freed")


def descriptors(gateway: GatewayProcess) -> int:
    return len(list(Path(f"/proc/{gateway.process.pid}/fd").iterdir()))


async def test_a_connection_that_is_reset_is_forgotten_at_once(redis: RedisProcess):
    """All that belongs to a request would stay for as long as connections may idle: a minute of a scanner's
    visits at a time."""
    async with serving(redis.url) as served:
        script = await served.script()
        port, before = int(served.url.rpartition(":")[2]), alive(Protocol)
        for _ in range(10):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(page_request(script.id))
            await reader.readuntil(b"}")
            break_off(writer)
            writer.close()
        await wait_until(lambda: alive(Protocol) <= before, 20, "connections to be freed")
        await script.complete()


def alive(kind: type) -> int:
    gc.collect()
    return sum(isinstance(thing, kind) for thing in gc.get_objects())
