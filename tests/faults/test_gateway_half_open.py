"""Viewers whose link died without a word: nobody closes their connections, so the gateway must."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from streamjobs import metrics
from tests.conftest import RedisProcess, wait_until
from tests.faults.crowd import Viewer, speaking, stalled, watching
from tests.faults.gateways import GatewayProcess, gateway_process, send_queues, store_beside
from tests.integration.gateway import Script, serving

PEERS = 20
LIMIT = 35.0
"""Seconds: a heartbeat's interval until something is sent, the kernel's patience with it, and some slack."""


async def test_the_kernel_gives_up_peers_that_take_nothing(redis: RedisProcess):
    """With the application's own timeout out of the way: a dead connection would be held for a quarter of an
    hour, and its stream, its job's subscription and its file descriptor with it."""
    times = {"send_timeout": 600.0, "unacknowledged_timeout": 1.0, "heartbeat_interval": 0.2}
    async with serving(redis.url, **times) as served:
        script = await served.script()
        await script.open_turn()
        await script.say(*("x" * 2000 for _ in range(200)))
        before = gone()
        peers = await stalled(script.id, int(served.url.rpartition(":")[2]), PEERS)
        try:
            await wait_until(lambda: gone() >= before + PEERS, 90, "the end of those who take nothing")
            await wait_until(lambda: served.gateway.hub.viewers == served.gateway.hub.channels == 0)
        finally:
            for peer in peers:
                peer.close()
        await script.complete()


def gone() -> float:
    """How many viewers this process has lost."""
    return metrics.REGISTRY.get_sample_value("streamjobs_streams_closed_total", {"why": "gone"}) or 0.0


@pytest.mark.long
async def test_200_viewers_behind_a_dead_link_are_gone_in_half_a_minute(redis: RedisProcess):
    """As shipped, with a link that is really cut: half of them on a job that talks, half on a silent one."""
    with link() as cable:
        async with (
            gateway_process(redis.url, host=cable.host, owner_limit=0) as gateway,
            store_beside(gateway) as store,
        ):
            talking, silent = await Script.start(store), await Script.start(store)
            peers = [cable.run(script.id, gateway.port) for script in (talking, silent)]
            near = Viewer(talking.id, gateway.port, host=cable.host)
            async with watching([near]) as watched:
                await gateway.viewers(201)
                async with speaking([talking], pause=0.05):
                    await wait_until(lambda: len(near.rows) > 20)
                    cable.cut()
                    half, took = await until_gone(gateway, 200)
                assert len(send_queues(gateway.port)) == 1
                assert all(peer.poll() is None for peer in peers), "they hung up by themselves"
                await talking.complete()
                await watched
            assert near.rows == await talking.log()
            print(f"200 half-open viewers gone after {took:.1f} s, the first half after {half:.1f} s")  # noqa: T201
            await silent.complete()


async def until_gone(gateway: GatewayProcess, count: int) -> tuple[float, float]:
    """How long it takes until half of so many are gone, and until all are; one viewer is to stay."""
    began = time.monotonic()
    half = 0.0
    while (left := await gateway.metric("streamjobs_viewers")) > 1:
        took = time.monotonic() - began
        assert took < LIMIT, f"{left:.0f} viewers after {took:.0f} seconds"
        half = took if left - 1 > count / 2 else half
        await asyncio.sleep(0.25)
    return half, time.monotonic() - began


READER = """
import selectors, socket, sys
host, port, job, count = sys.argv[1:]
ready = selectors.DefaultSelector()
for _ in range(int(count)):
    peer = socket.create_connection((host, int(port)))
    peer.sendall(f"GET /v1/jobs/{job}/events?after=0 HTTP/1.1\\r\\nHost: a\\r\\n\\r\\n".encode())
    ready.register(peer, selectors.EVENT_READ)
while True:
    for key, _ in ready.select():
        if not key.fileobj.recv(65536):
            sys.exit("hung up on")
"""
"""A hundred viewers that read all they get."""


class Link(NamedTuple):
    """A virtual cable to another namespace: our address on it, how to cut it, how to have viewers there."""

    host: str
    cut: Callable[[], None]
    run: Callable[[str, int], subprocess.Popen[bytes]]


@contextlib.contextmanager
def link() -> Iterator[Link]:
    """A cable that is gone, with all behind it, when the block ends."""
    assert os.geteuid() == 0, "this test cuts a link between network namespaces: it needs root and Linux"
    name, number = f"sj{os.getpid()}", os.getpid() % 250
    host, far = f"10.203.{number}.1", f"10.203.{number}.2"
    children: list[subprocess.Popen[bytes]] = []

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    def cut() -> None:
        ip("-n", name, "link", "set", f"{name}b", "down")

    def run(job_id: str, port: int) -> subprocess.Popen[bytes]:
        program = [sys.executable, "-c", READER, host, str(port), job_id, "100"]
        children.append(subprocess.Popen(["ip", "netns", "exec", name, *program]))
        return children[-1]

    ip("netns", "add", name)
    try:
        ip("link", "add", name, "type", "veth", "peer", "name", f"{name}b", "netns", name)
        ip("address", "add", f"{host}/30", "dev", name)
        ip("-n", name, "address", "add", f"{far}/30", "dev", f"{name}b")
        ip("-n", name, "link", "set", f"{name}b", "up")
        ip("link", "set", name, "up")
        yield Link(host, cut, run)
    finally:
        for child in children:
            child.kill()
            child.wait(10)
        ip("netns", "delete", name)
