"""`streamjobs serve --workers 2` as people run it: one gateway to everybody outside, whatever becomes of its
processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from streamjobs.config import Settings
from streamjobs.store import Store
from tests.conftest import RedisProcess, fast_settings, free_port, wait_until
from tests.harness import ROOT, environment
from tests.integration.gateway import Script
from tests.integration.test_serve import read_all

CROWD = 24
"""Connections: that all of them are given to one of two processes happens once in eight million times."""
EVENTS = "/v1/jobs/{id}/events"


class Gateway:
    """The supervisor's process, its log, and both of its ports."""

    def __init__(self, settings: Settings, folder: Path, env: dict[str, str]) -> None:
        self.api = f"http://127.0.0.1:{settings.port}"
        self.ops = f"http://127.0.0.1:{settings.ops_port}"
        self.client = httpx.AsyncClient(timeout=30, limits=httpx.Limits(max_connections=None))
        self._log = folder / "stderr"
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "streamjobs", "serve", "--workers", "2"],
                env=environment(settings) | env, cwd=ROOT, stderr=log, stdout=log,
            )  # fmt: skip

    @property
    def log(self) -> str:
        return self._log.read_text()

    def records(self, event: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.log.splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == event]

    @property
    def pids(self) -> list[int]:
        """Every process that has served."""
        return [line["pid"] for line in self.records("gateway.process_ready")]

    def watch(self, script: Script, after: str = "") -> list[asyncio.Task[str]]:
        url = f"{self.api}{EVENTS.format(id=script.id)}" + (f"?after={after}" if after else "")
        return [asyncio.create_task(read_all(self.client, url)) for _ in range(CROWD)]

    async def metric(self, name: str) -> float:
        """The sum of a metric's series whose name and labels begin like this."""
        text = (await self.client.get(f"{self.ops}/metrics")).text
        return sum(float(value) for value in re.findall(rf"^{re.escape(name)}.* (\S+)$", text, re.MULTILINE))

    async def viewers(self, count: int) -> None:
        async def are_there() -> bool:
            return await self.metric("streamjobs_viewers") == count

        await wait_until(are_there, 30, f"{count} viewers")

    async def ended(self) -> int:
        await wait_until(lambda: self.process.poll() is not None, 90, "the supervisor's end")
        assert self.process.returncode is not None
        return self.process.returncode


@asynccontextmanager
async def started(
    redis_url: str, folder: Path, env: dict[str, str], **changes: Any
) -> AsyncIterator[Gateway]:
    values = {"port": free_port(), "ops_port": free_port(), "lease": 60.0, "drain_grace": 1.0}
    gateway = Gateway(fast_settings(redis_url, **(values | {"log_level": "info"} | changes)), folder, env)
    try:
        yield gateway
    finally:
        if gateway.process.poll() is None:
            gateway.process.kill()
        gateway.process.wait(20)
        await wait_until(lambda: not any(is_alive(pid) for pid in gateway.pids), 90, "all processes to end")
        await gateway.client.aclose()


@pytest.fixture
def private_tmp(tmp_path: Path) -> dict[str, str]:
    """Where temporary files of the processes are, and of nobody else."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    return {"TMPDIR": str(folder)}


@pytest.fixture
async def gateway(redis: RedisProcess, tmp_path: Path, private_tmp: dict[str, str]) -> AsyncIterator[Gateway]:
    """Two processes that serve."""
    async with started(redis.url, tmp_path, private_tmp) as gateway:
        await wait_until(lambda: gateway.records("gateway.ready"), 90, "both processes")
        yield gateway


@pytest.fixture
async def patient(redis: RedisProcess) -> AsyncIterator[Store]:
    """A store whose leases outlast a start: jobs that a test writes are not taken from it."""
    opened = await Store.open(fast_settings(redis.url, lease=60.0))
    yield opened
    await opened.aclose()


def is_alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def split(tasks: Sequence[asyncio.Task[str]]) -> tuple[list[asyncio.Task[str]], list[asyncio.Task[str]]]:
    """Those that are broken, and those that go on."""
    broken = [task for task in tasks if task.done() and isinstance(task.exception(), httpx.TransportError)]
    return broken, [task for task in tasks if not task.done()]


async def test_whichever_process_answers_the_answer_is_the_same(patient: Store, gateway: Gateway):
    """A page would show something else after each reload, and what it counts would depend on luck."""
    script = await Script.start(patient)
    watching = gateway.watch(script, after="0")
    await gateway.viewers(CROWD)
    await script.open_turn()
    await script.say("one", "two", "three")
    await script.complete()
    texts = await asyncio.gather(*watching)
    texts += await asyncio.gather(*gateway.watch(script, after="0"))
    (text,) = {
        text[text.index("id: ") :] for text in texts
    }  # without a comment, and `retry:`, which is random
    assert text.count("event: text.delta\n") == 3
    await gateway.viewers(0)
    for _ in range(8):  # whichever process is asked
        for name in ("streamjobs_http_requests_total", "streamjobs_http_seconds_count"):
            assert await gateway.metric(f'{name}{{route="{EVENTS}"') == 2 * CROWD
        assert await gateway.metric("streamjobs_streams_opened_total") == 2 * CROWD


async def test_a_process_that_is_killed_is_replaced_and_no_counter_goes_down(
    patient: Store, gateway: Gateway
):
    """Half of the viewers would stay away, and every rate on a dashboard would have a hole or a spike."""
    script = await Script.start(patient)
    watching = gateway.watch(script)
    await gateway.viewers(CROWD)
    counters = (
        "streamjobs_http_requests_total",
        "streamjobs_streams_opened_total",
        "streamjobs_http_seconds_count",
    )
    before = [await gateway.metric(name) for name in counters]
    killed, other = gateway.pids
    os.kill(killed, signal.SIGKILL)
    await wait_until(lambda: split(watching)[0])
    await wait_until(lambda: len(gateway.pids) == 3, 90, "a new process")
    _, going_on = split(watching)
    assert 0 < len(going_on) < CROWD
    await gateway.viewers(len(going_on))
    after = [await gateway.metric(name) for name in counters]
    assert all(then >= earlier for then, earlier in zip(after, before, strict=True)), (before, after)
    assert [record["pid"] for record in gateway.records("gateway.process_ended")] == [killed]
    # the new one serves: with the other one stopped, all that comes to it is answered
    back = gateway.watch(script)
    await gateway.viewers(len(going_on) + CROWD)
    os.kill(other, signal.SIGKILL)
    await script.complete()
    texts = [task.result() for task in back if not await asyncio.wait_for(failed(task), 90)]
    assert 0 < len(texts) < CROWD
    assert all("event: job.completed" in text for text in texts)
    assert await gateway.metric("streamjobs_streams_opened_total") >= 2 * CROWD
    await asyncio.gather(*watching, return_exceptions=True)


async def failed(task: asyncio.Task[str]) -> bool:
    """Whether a stream broke, once it has ended."""
    await asyncio.wait([task])
    return task.exception() is not None


async def test_sigterm_drains_all_of_them(patient: Store, gateway: Gateway, private_tmp: dict[str, str]):
    """A rollout would cut off the viewers of all processes but one, or never end."""
    script = await Script.start(patient)
    watching = gateway.watch(script)
    await gateway.viewers(CROWD)
    gateway.process.send_signal(signal.SIGTERM)
    texts = await asyncio.gather(*watching)
    assert all("event: handover\n" in text for text in texts)
    assert await gateway.ended() == 0
    drained = gateway.records("gateway.draining")
    assert sum(record["streams"] for record in drained) == CROWD
    assert sorted(record["slot"] for record in drained) == [0, 1]
    assert min(record["streams"] for record in drained) > 0, "both had some"
    assert list(Path(private_tmp["TMPDIR"]).iterdir()) == []


async def test_no_process_outlives_its_supervisor(
    patient: Store, gateway: Gateway, private_tmp: dict[str, str]
):
    """The next supervisor would find its port taken by processes that nobody looks after."""
    script = await Script.start(patient)
    watching = gateway.watch(script)
    await gateway.viewers(CROWD)
    gateway.process.kill()
    assert all("event: handover\n" in text for text in await asyncio.gather(*watching))
    await wait_until(lambda: not any(is_alive(pid) for pid in gateway.pids), 90, "all processes to end")
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", int(gateway.api.rpartition(":")[2])))
        listener.listen()
    assert list(Path(private_tmp["TMPDIR"]).iterdir()) == []


@contextlib.contextmanager
def taken_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


@pytest.mark.parametrize("wrong", ["port", "partitions", "redis_url"])
async def test_what_keeps_it_from_starting_is_said_once(
    wrong: str, redis: RedisProcess, store: Store, tmp_path: Path
):
    """An orchestrator would see a process that runs, a person the same line for ever."""
    with taken_port() as taken:
        value = {"port": taken, "partitions": 7, "redis_url": "redis://127.0.0.1:1"}[wrong]
        url = redis.url if wrong != "redis_url" else str(value)
        changes = {} if wrong == "redis_url" else {wrong: value}
        async with started(url, tmp_path, {}, **changes) as gateway:
            assert await gateway.ended() == 1
    expected = {"port": "in use", "partitions": "created with partitions", "redis_url": "cannot be reached"}
    (line,) = gateway.log.splitlines()
    assert expected[wrong] in line
