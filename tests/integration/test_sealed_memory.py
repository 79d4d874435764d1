"""What a long job costs: its keys in Redis, and many viewers who replay it in a gateway.

The job is written by batches and sealed in this process; the gateway is one of its own, and its memory is
what the kernel says of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from random import Random
from typing import NamedTuple

import pytest

from streamjobs import events as ev
from streamjobs.config import Settings
from streamjobs.projections.snapshot import SnapshotProjection
from streamjobs.store import Batch, Store, Submission, keys
from tests.conftest import RedisProcess, fast_settings, free_port, unrestricted, wait_until
from tests.harness import ROOT, environment

DELTAS = 100_000
BATCH = 5000
VIEWERS = 100
MB = 1024 * 1024


class Said(NamedTuple):
    """A job that has said much; `text` in bytes, `last` the id of its last event."""

    job_id: str
    text: int
    last: str


def words(count: int) -> list[str]:
    """Words of letters at random: no text compresses worse that a model would write."""
    random = Random(7)
    return [
        f" {''.join(random.choices('etaoinshrdlcumwfgypbvk', k=random.randint(2, 8)))}" for _ in range(count)
    ]


async def say_much(store: Store) -> Said:
    """Write a job of 100,000 deltas, with the projection keeping level as it would."""
    job_id = (await store.jobs.submit(Submission(kind="chat", owner="anna"))).job_id
    (lease,) = (await store.work.take(0, "w1", 1, 1, ["default"])).leases
    projection, random, text = SnapshotProjection(store), Random(8), words(DELTAS)
    ts = await store.now_ms()
    for number, start in enumerate(range(0, DELTAS, BATCH), 1):
        rows: list[tuple[str, bytes]] = []
        for word in text[start : start + BATCH]:
            ts += random.randint(18, 26)
            rows.append(("text.delta", ev.encode_event(ev.TextDelta(ts=ts, turn=1, text=word))))
        (answer,) = await store.work.append(0, [Batch(job_id, lease.epoch, number, rows)])
        assert answer.verdict == "ok"
        await projection.advance(job_id)
    record = await store.jobs.get(job_id)
    return Said(job_id, sum(map(len, text)), str(record.last))


async def held(store: Store, job_id: str) -> int:
    """Bytes of all keys of a job."""
    sizes = 0
    async with unrestricted(store) as client:
        async for name in client.scan_iter(match=f"{keys.job_key(job_id)}*", count=1000):
            sizes += await client.memory_usage(name, samples=0)
    return sizes


@contextlib.asynccontextmanager
async def gateway_process(settings: Settings) -> AsyncIterator[tuple[int, int]]:
    """A gateway as `streamjobs serve` starts it: its pid and port."""
    port = free_port()
    command = [sys.executable, "-m", "streamjobs", "serve", "--port", str(port)]
    process = subprocess.Popen(command, env=environment(settings), cwd=ROOT)
    try:
        await wait_until(lambda: answers(port), 60.0, "the gateway")
        yield process.pid, port
    finally:
        process.terminate()
        process.wait(20)


async def answers(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


def resident(pid: int) -> int:
    """Bytes of memory that a process has, not those that it shares with others through files."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


class Reader:
    """A viewer on a bare socket; it keeps only the end of what it has read."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._end = b""
        self.received = 0

    @classmethod
    async def open(cls, port: int, job_id: str, query: str) -> Reader:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"GET /v1/jobs/{job_id}/events{query} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        return cls(reader, writer)

    async def until(self, wanted: bytes) -> None:
        while wanted not in self._end:
            data = await self._reader.read(256 * 1024)
            assert data, "the stream ended"
            self.received += len(data)
            self._end = (self._end + data)[-len(data) - len(wanted) :]

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()


@pytest.fixture
async def told(redis: RedisProcess) -> AsyncIterator[tuple[Store, Said]]:
    store = await Store.open(fast_settings(redis.url, lease=600.0))
    yield store, await say_much(store)
    await store.aclose()


async def test_a_long_job_leaves_less_than_one_and_a_half_times_its_text(told: tuple[Store, Said]):
    """Redis would fill up with a dozen times what anybody ever reads."""
    store, said = told
    assert await held(store, said.job_id) < 1.5 * said.text
    assert [
        entry.cursor.seq async for page in store.log.pages(said.job_id) for entry in page.entries
    ] == list(range(1, DELTAS + 3))


async def test_many_who_replay_a_long_job_cost_the_gateway_next_to_nothing(told: tuple[Store, Said]):
    """A shared link to a long answer would take the gateway down with everybody else's streams."""
    store, said = told
    async with gateway_process(store.settings) as (pid, port):
        idle = [await Reader.open(port, said.job_id, f"?after={said.last}") for _ in range(VIEWERS)]
        await asyncio.gather(*(viewer.until(b"\r\n\r\n") for viewer in idle))
        before = resident(pid)
        await asyncio.gather(*(viewer.close() for viewer in idle))
        replaying = [await Reader.open(port, said.job_id, "?after=0") for _ in range(VIEWERS)]
        most = await peak(pid, [viewer.until(f"id: {said.last}\n".encode()) for viewer in replaying])
        assert min(viewer.received for viewer in replaying) > 50 * DELTAS
        await asyncio.gather(*(viewer.close() for viewer in replaying))
    assert most - before < 4 * MB


async def peak(pid: int, work: list[Coroutine[None, None, None]]) -> int:
    """The most memory that a process had while this was done."""
    doing = asyncio.ensure_future(asyncio.gather(*work))
    most = 0
    while not doing.done():
        most = max(most, resident(pid))
        await asyncio.wait([doing], timeout=0.05)
    await doing
    return most
