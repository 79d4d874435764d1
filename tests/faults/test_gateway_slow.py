"""Viewers that do not read, beside some that do: what they cost, how they end, and who notices them."""

from __future__ import annotations

import time
from typing import NamedTuple

import pytest

from tests.conftest import RedisProcess, wait_until
from tests.faults.crowd import Viewer, percentile, speaking, stalled, watching
from tests.faults.gateways import GatewayProcess, gateway_process, send_queues, store_beside
from tests.integration.gateway import Frame, Script

COST = 200 * 1024
"""Bytes that one viewer who does not read may take, in the gateway and in the kernel."""
BLOCKED = 32 * 1024
"""A connection with more than this in its send queue takes no more."""


def timed_words() -> list[str]:
    """About 8 KB, which say when they were written."""
    return [f"{time.monotonic()} {'x' * 400}"] * 20


class TimedViewer(Viewer):
    """Notes how long after it was written each word came."""

    def __init__(self, job_id: str, port: int) -> None:
        super().__init__(job_id, port)
        self.delays: list[float] = []

    def take(self, frame: Frame) -> str:
        if frame.event == "text.delta":
            self.delays.append(time.monotonic() - float(frame.json["text"].split()[0]))
        return super().take(frame)


class Cost(NamedTuple):
    """What `blocked` viewers who do not read took each, in bytes."""

    blocked: int = 0
    gateway: float = 0.0
    kernel: float = 0.0

    @classmethod
    def now(cls, gateway: GatewayProcess, before: int) -> Cost:
        full = [queue for queue in send_queues(gateway.port) if queue > BLOCKED]
        each = max(1, len(full))
        return cls(len(full), (gateway.memory - before) / each, sum(full) / each)


async def test_stalled_viewers_are_cheap_closed_and_unnoticed(redis: RedisProcess):
    """A hundred tabs that hang would take the gateway's memory from everybody, and make all others wait."""
    await check(redis, stalling=100, fast=10, send_timeout=4.0, patience=2.0)


@pytest.mark.long
async def test_500_stalled_viewers_are_cheap_closed_and_unnoticed(redis: RedisProcess):
    """The same with as many as a bad day brings."""
    await check(redis, stalling=500, fast=50, send_timeout=10.0, patience=1.0)


async def check(
    redis: RedisProcess, *, stalling: int, fast: int, send_timeout: float, patience: float
) -> None:
    options = {"send_timeout": send_timeout, "heartbeat_interval": 1.0, "owner_limit": 0}
    async with gateway_process(redis.url, **options) as gateway, store_beside(gateway) as store:
        script = await Script.start(store)
        viewers = [TimedViewer(script.id, gateway.port) for _ in range(fast)]
        async with watching(viewers) as watched:
            async with speaking([script], timed_words, pause=0.05):
                await wait_until(lambda: all(len(viewer.delays) > 400 for viewer in viewers))
                cost, closed = await stall(gateway, script.id, stalling, fast)
            await script.complete()
            await watched
        log = await script.log()
        for viewer in viewers:
            assert viewer.rows == log
            assert viewer.endings == {"job.completed": 1}, "a viewer that reads was disturbed"
        p99 = percentile([delay for viewer in viewers for delay in viewer.delays], 0.99)
        print(  # noqa: T201
            f"{stalling} stalled beside {fast} fast: {cost.gateway / 1024:.0f} KB in the gateway and"
            f" {cost.kernel / 1024:.0f} KB in the kernel each,"
            f" closed after {closed:.1f} s of {send_timeout:g}, fast p99 {1000 * p99:.0f} ms"
        )
        assert cost.gateway + cost.kernel < COST, cost
        assert p99 < patience


async def stall(gateway: GatewayProcess, job_id: str, stalling: int, fast: int) -> tuple[Cost, float]:
    """Have so many not read, until they are closed; what they took, and for how long."""
    before, began, worst = gateway.memory, time.monotonic(), Cost()
    peers = await stalled(job_id, gateway.port, stalling)

    async def are_closed() -> bool:
        nonlocal worst
        worst = max(worst, Cost.now(gateway, before))
        return await gateway.metric('streamjobs_streams_closed_total{why="slow"}') == stalling

    try:
        limit = 3 * gateway.settings.send_timeout + 20
        await wait_until(are_closed, limit, "the end of those who do not read")
        await gateway.viewers(fast)
    finally:
        for peer in peers:
            peer.close()
    assert worst.blocked > stalling / 2, "they did not stall together: the run proves nothing"
    return worst, time.monotonic() - began
