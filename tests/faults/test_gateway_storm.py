"""A gateway that dies with all its viewers: they come back at once, and Redis hardly notices."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from streamjobs.gateway import channel
from tests.conftest import RedisProcess, wait_until
from tests.faults.crowd import Viewer, speaking, watching
from tests.faults.gateways import GatewayProcess, gateway_process, store_beside
from tests.integration.gateway import Script, serving

READS = 10
"""Reads of Redis that coming back may cost for each job: its head, a page for each place of viewers."""
READING = ("hmget", "hgetall")
"""What every read of a job does once, in a script or not."""


async def test_a_crowd_comes_back_to_a_restarted_gateway(redis: RedisProcess):
    """Each deployment that goes wrong would bring Redis down with it, and with Redis all the workers."""
    await check(redis, jobs=10, viewers=20, comes_back=(0.2, 1.5))


@pytest.mark.long
async def test_2000_viewers_come_back_to_a_restarted_gateway(redis: RedisProcess):
    """The same with 2,000 viewers of 100 jobs, who take ten seconds for it as browsers are told to."""
    await check(redis, jobs=100, viewers=20, comes_back=(1.0, 10.0))


@pytest.mark.long
async def test_2000_viewers_come_back_in_the_same_second(redis: RedisProcess):
    """Clients of other people's, which do not wait for what we ask them to."""
    await check(redis, jobs=100, viewers=20, comes_back=(0.0, 1.0))


async def check(redis: RedisProcess, *, jobs: int, viewers: int, comes_back: tuple[float, float]) -> None:
    async with (
        gateway_process(redis.url, owner_limit=0, position_interval=600.0) as gateway,
        store_beside(gateway) as store,
    ):
        scripts = [await Script.start(store) for _ in range(jobs)]
        crowd = [
            Viewer(script.id, gateway.port, comes_back=comes_back)
            for script in scripts
            for _ in range(viewers)
        ]
        async with watching(crowd) as watched:
            await gateway.viewers(len(crowd))
            async with speaking(scripts, pause=0.0):
                await wait_until(lambda: all(len(v.rows) > 20 for v in crowd), 60, "events at all viewers")
                await asyncio.to_thread(gateway.kill)
            for script in scripts:
                await script.say(*(f"missed {n} " for n in range(20)))
            took, reads = await come_back(redis, gateway, crowd, scripts)
            peak = gateway.memory
            for script in scripts:
                await script.complete()
            await watched
        logs = {script.id: await script.log() for script in scripts}
        for viewer in crowd:
            assert viewer.rows == logs[viewer.job_id]
            assert not viewer.others, viewer.others
        statuses = sum((viewer.statuses for viewer in crowd), Counter[int]())
        assert set(statuses) <= {0, 200}, statuses
        print(  # noqa: T201
            f"{len(crowd)} viewers of {jobs} jobs were exact {took:.1f} s after the restart; reads a job:"
            f" { {name: round(count / jobs, 1) for name, count in reads.items()} };"
            f" the gateway has {peak >> 20} MB"
        )
        assert sum(reads.values()) <= READS * jobs, reads


async def come_back(
    redis: RedisProcess, gateway: GatewayProcess, crowd: Sequence[Viewer], scripts: Sequence[Script]
) -> tuple[float, dict[str, int]]:
    """Start the gateway again, until everybody has what was missed; how long it took, and what was read."""
    ends = {script.id: (await script.log())[-1][0] for script in scripts}
    loop = asyncio.get_running_loop()
    with redis.client() as client:
        client.config_resetstat()
        began = loop.time()
        gateway.restart()
        await wait_until(
            lambda: all(viewer.cursor == ends[viewer.job_id] for viewer in crowd), 60, "all to be exact again"
        )
        took, stats = loop.time() - began, client.info("commandstats")
    return took, {name: stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in READING}


async def test_who_comes_back_late_reads_what_others_did(
    redis: RedisProcess, monkeypatch: pytest.MonkeyPatch
):
    """Viewers return over many seconds, as they are asked to: each would cost Redis a read of its own."""
    monkeypatch.setattr(channel, "PAGE_KEPT", 0.0)
    async with serving(redis.url) as served, contextlib.AsyncExitStack() as stack:
        script = await served.script()
        await script.open_turn()
        await script.say(*(f"word {n} " for n in range(100)))
        log = await script.log()
        reads = 0
        page_of = served.store.log.page

        async def counted(*args: Any, **named: Any) -> Any:
            nonlocal reads
            reads += 1
            return await page_of(*args, **named)

        monkeypatch.setattr(served.store.log, "page", counted)
        for place in (50, 50, 60, 103, 50, 20, 30, 50):
            stream = await stack.enter_async_context(served.stream(script.id, log[place - 1][0]))
            rest = [(await anext(stream)).row for _ in log[place:]]
            assert rest == log[place:]
        assert reads == 2, "from 50 on, and from 20"
        await script.complete()
