"""A gateway that is told to stop hands its viewers over, a few at a time, and they lose nothing."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

import pytest

from tests.conftest import RedisProcess, wait_until
from tests.faults.crowd import Viewer, speaking, watching
from tests.faults.gateways import gateway_process, store_beside
from tests.integration.gateway import Frame, Script


class Guest(Viewer):
    """Goes on at another gateway once it was handed over; notes when that was."""

    def __init__(self, job_id: str, port: int, next_port: int) -> None:
        super().__init__(job_id, port)
        self.left_at = 0.0
        self.retry = 0
        self._next = next_port

    def take(self, frame: Frame) -> str:
        if frame.event == "handover":
            self.left_at = asyncio.get_running_loop().time()
            self.retry = frame.retry or 0
            self.address = self.address[0], self._next
        return super().take(frame)


async def test_a_draining_gateway_hands_its_viewers_over(redis: RedisProcess):
    """A rollout would cut everybody off at once, or never end."""
    await check(redis, viewers=60, grace=2.0, at_once=0.5)


@pytest.mark.long
async def test_a_draining_gateway_hands_500_viewers_over(redis: RedisProcess):
    """The same with as many as one gateway has on a good day, and the time that Kubernetes gives."""
    await check(redis, viewers=500, grace=10.0, at_once=0.1)


async def check(redis: RedisProcess, *, viewers: int, grace: float, at_once: float) -> None:
    async with (
        gateway_process(redis.url, drain_grace=grace) as old,
        gateway_process(redis.url) as new,
        store_beside(new) as store,
    ):
        scripts = [await Script.start(store) for _ in range(5)]
        guests = [Guest(scripts[n % 5].id, old.port, new.port) for n in range(viewers)]
        async with watching(guests) as watched:
            await old.viewers(viewers)
            async with speaking(scripts):
                await wait_until(lambda: all(len(guest.rows) > 5 for guest in guests))
                loop = asyncio.get_running_loop()
                began = loop.time()
                old.terminate()
                status = await old.ended(grace + 20)
                took = loop.time() - began
                await new.viewers(viewers)
            for script in scripts:
                await script.complete()
            await watched
        logs = {script.id: await script.log() for script in scripts}
    assert status == 0
    for guest in guests:
        assert guest.rows == logs[guest.job_id]
        assert guest.endings == {"handover": 1, "job.completed": 1}
        assert 500 <= guest.retry <= 5000
    left = sorted(guest.left_at - began for guest in guests)
    most = busiest(left, 0.1)
    print(  # noqa: T201
        f"{viewers} viewers left from {left[0]:.2f} to {left[-1]:.2f} s of {grace:g}, at most {most}"
        f" in 100 ms; the gateway ended with {status} after {took:.1f} s"
    )
    assert most <= at_once * viewers
    assert left[-1] - left[0] > grace / 3
    assert len({guest.retry for guest in guests}) > viewers / 3, "they would all come back together"


def busiest(instants: Sequence[float], seconds: float) -> int:
    """The most that fall into one slot of so many seconds."""
    return max(Counter(int(instant / seconds) for instant in instants).values())
