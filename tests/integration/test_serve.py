"""The role as a process: its sockets, its signals, and the sweeps that go on while no worker is there."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from streamjobs.app import App
from streamjobs.config import Settings
from streamjobs.events import JobProgress
from streamjobs.gateway.app import Stop, serve
from streamjobs.gateway.server import listen
from streamjobs.store import Store
from streamjobs.store.sweeper import Sweeper
from tests.conftest import RedisProcess, fast_settings, free_port, wait_until
from tests.integration.gateway import Script, serving

PROGRAM = """
import sys
from streamjobs.app import App
from streamjobs.config import Settings
from streamjobs.gateway.app import run
url, port, ops, grace = sys.argv[1:]
run(Settings(redis_url=url, port=int(port), ops_port=int(ops), drain_grace=float(grace), lease=60.0), App())
"""


class Process:
    """A gateway in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process, port: int, ops: int) -> None:
        self.process = process
        self.api = f"http://127.0.0.1:{port}"
        self.ops = f"http://127.0.0.1:{ops}"

    async def answers(self, url: str) -> int:
        try:
            async with httpx.AsyncClient(verify=False, timeout=20) as client:
                return (await client.get(url)).status_code
        except httpx.TransportError:
            return 0

    async def ended(self) -> int:
        async with asyncio.timeout(60):
            return await self.process.wait()


@asynccontextmanager
async def gateway_process(redis: RedisProcess, grace: float) -> AsyncIterator[Process]:
    port, ops = free_port(), free_port()
    arguments = [redis.url, str(port), str(ops), str(grace)]
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", PROGRAM, *arguments)
    try:
        started = Process(process, port, ops)
        await wait_until(lambda: started.answers(f"{started.ops}/readyz"))
        yield started
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def read_all(client: httpx.AsyncClient, url: str) -> str:
    async with client.stream("GET", url) as response:
        return "".join([text async for text in response.aiter_text()])


async def test_sigterm_drains_and_then_ends(redis: RedisProcess, store: Store):
    """A rollout must end every stream with a word, not all at once, and leave no process behind."""
    script = await Script.start(store)
    async with gateway_process(redis, grace=4.0) as gateway, httpx.AsyncClient(timeout=60) as client:
        url = f"{gateway.api}/v1/jobs/{script.id}/events"
        viewers = [asyncio.create_task(read_all(client, url)) for _ in range(10)]
        await wait_until(lambda: viewing(client, gateway, 10))
        gateway.process.send_signal(signal.SIGTERM)
        await wait_until(lambda: is_draining(gateway))
        texts = await asyncio.gather(*viewers)
        assert all("event: handover\n" in text for text in texts)
        assert await gateway.ended() == 0


async def viewing(client: httpx.AsyncClient, gateway: Process, count: int) -> bool:
    return f"streamjobs_viewers {count:.1f}" in (await client.get(f"{gateway.ops}/metrics")).text


async def is_draining(gateway: Process) -> bool:
    return await gateway.answers(f"{gateway.ops}/readyz") == 503


async def test_sigint_does_not_keep_a_person_waiting(redis: RedisProcess, store: Store):
    script = await Script.start(store)
    async with gateway_process(redis, grace=90) as gateway, httpx.AsyncClient(timeout=60) as client:
        viewer = asyncio.create_task(read_all(client, f"{gateway.api}/v1/jobs/{script.id}/events"))
        await wait_until(lambda: viewing(client, gateway, 1))
        began = time.monotonic()
        gateway.process.send_signal(signal.SIGINT)
        assert "event: handover\n" in await viewer
        assert await gateway.ended() == 0
        assert time.monotonic() - began < 50, "far from the grace"


async def test_a_second_signal_cuts_the_drain_short(redis: RedisProcess, store: Store):
    script = await Script.start(store)
    async with gateway_process(redis, grace=90) as gateway, httpx.AsyncClient(timeout=60) as client:
        viewers = [
            asyncio.create_task(read_all(client, f"{gateway.api}/v1/jobs/{script.id}/events"))
            for _ in range(5)
        ]
        await wait_until(lambda: viewing(client, gateway, 5))
        began = time.monotonic()
        gateway.process.send_signal(signal.SIGTERM)
        await wait_until(lambda: is_draining(gateway))
        gateway.process.send_signal(signal.SIGTERM)
        await asyncio.gather(*viewers)
        assert await gateway.ended() == 0
        assert time.monotonic() - began < 50, "far from the grace"


async def test_probes_and_metrics_have_a_port_of_their_own(redis: RedisProcess):
    async with gateway_process(redis, grace=0.1) as gateway:
        for path in ("/livez", "/readyz", "/metrics"):
            assert await gateway.answers(f"{gateway.ops}{path}") == 200
            assert await gateway.answers(f"{gateway.api}{path}") == 404
        assert await gateway.answers(f"{gateway.ops}/v1/jobs/x") == 404


async def test_serving_with_a_store_and_a_stop_of_ones_own(store: Store):
    """`dev` runs everything in one process: the gateway must neither hear signals nor close the store."""
    stop, urls = Stop(), []
    serving_task = asyncio.create_task(
        serve(
            fast_settings(store.settings.redis_url, port=0),
            App(),
            store=store,
            stop=stop,
            on_ready=urls.append,
        )
    )
    (url,) = await wait_until(lambda: urls)
    async with httpx.AsyncClient() as client:
        assert (await client.get(f"{url}/livez")).status_code == 200
    stop(signal.SIGINT)
    async with asyncio.timeout(60):
        await serving_task
    await store.ping()


async def test_a_port_that_is_taken_is_said_at_once(store: Store):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        settings = fast_settings(store.settings.redis_url, port=taken.getsockname()[1])
        with pytest.raises(OSError, match="in use"):
            await serve(settings, App(), store=store, stop=Stop())


def test_accepted_sockets_inherit_small_buffers_and_a_timeout():
    """A viewer that does not read otherwise costs megabytes of kernel memory, for ever."""
    with (
        listen(Settings(send_buffer=32 * 1024, unacknowledged_timeout=2.5), 0) as listener,
        socket.socket() as client,
    ):
        client.connect(listener.getsockname())
        listener.setblocking(True)
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) <= 64 * 1024
            if sys.platform == "linux":
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 2500


async def test_a_client_that_sends_no_request_is_dropped(redis: RedisProcess):
    async with serving(redis.url, head_timeout=0.2) as served:
        host, port = served.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET / HT")
        async with asyncio.timeout(60):
            with pytest.raises(ConnectionError):
                assert await reader.read() == b""
                raise ConnectionError
        writer.close()


# --- sweeps


async def test_a_gateway_wakes_sleepers_while_no_worker_is_there(redis: RedisProcess):
    """With workers scaled to zero somebody must still put due jobs back in the queue."""
    async with serving(redis.url, sweep_interval=0.05) as served:
        body = {"kind": "chat", "input": {"prompt": "a"}, "delay": 0.2}
        job = (await served.client.post("/v1/jobs", json=body)).json()["id"]
        async with served.stream(job, after="0") as stream:
            frames = await stream.until("job.requeued")
        assert frames[-1].json["why"] == "timer"


async def test_a_sweep_says_when_something_is_due(store: Store):
    sweeper = Sweeper(store)
    assert await sweeper.tick() == store.settings.sweep_interval
    script = await Script.start(store)
    await script.write(JobProgress(percent=1))
    assert 0 < await sweeper.tick() <= store.settings.sweep_interval


async def test_sweeping_survives_an_outage(own_redis: RedisProcess):
    async with serving(own_redis.url, sweep_interval=0.05, redis_timeout=1.0) as served:
        own_redis.kill()
        await asyncio.sleep(0.5)
        own_redis.start()
        body = {"kind": "chat", "input": {"prompt": "a"}, "delay": 0.2}
        job = (await served.client.post("/v1/jobs", json=body)).json()["id"]
        async with served.stream(job, after="0") as stream:
            await stream.until("job.requeued")
