"""Viewers come and go; what they leave behind is nothing."""

from __future__ import annotations

import asyncio
import gc
import random

import httpx
import pytest

from streamjobs.gateway.channel import Channel
from streamjobs.gateway.viewer import Viewer
from tests.conftest import RedisProcess, wait_until
from tests.integration.gateway import Script, Served, serving

JOBS = 100
VIEWERS = 100


async def visit(served: Served, scripts: list[Script], visits: int) -> None:
    """Open streams of random jobs, leave each at a random moment, sometimes before the first byte."""
    for _ in range(visits):
        script = random.choice(scripts)
        cursor = random.choice(["0", "999-1", None])
        try:
            async with asyncio.timeout(random.uniform(0, 0.3)), served.stream(script.id, cursor) as stream:
                async for _ in stream:
                    pass
        except (TimeoutError, httpx.HTTPError):
            pass


async def talk(scripts: list[Script], visiting: list[asyncio.Task[None]]) -> None:
    while not all(task.done() for task in visiting):
        await random.choice(scripts).say("word ")
        await asyncio.sleep(0.002)


def alive(kind: type) -> int:
    gc.collect()
    return sum(isinstance(thing, kind) for thing in gc.get_objects())


@pytest.mark.parametrize("visits", [4, pytest.param(100, marks=pytest.mark.long)])
async def test_after_a_crowd_everything_is_as_before(redis: RedisProcess, visits: int):
    """A gateway would grow with each viewer that it ever had."""
    async with serving(redis.url, owner_limit=0) as served:
        scripts = [await served.script() for _ in range(JOBS)]
        for script in scripts:
            await script.open_turn()
        async with served.stream(scripts[0].id) as stream:
            await anext(stream)
        await wait_until(lambda: served.store.live.channels == 0)
        tasks = len(asyncio.all_tasks())
        visiting = [asyncio.create_task(visit(served, scripts, visits)) for _ in range(VIEWERS)]
        await talk(scripts, visiting)
        await asyncio.gather(*visiting)

        hub = served.gateway.hub
        await wait_until(lambda: hub.viewers == 0 and hub.channels == 0 and hub.snapshots.held == 0)
        await wait_until(lambda: served.store.live.channels == 0)
        await wait_until(lambda: len(asyncio.all_tasks()) <= tasks)
        with redis.client() as client:
            await wait_until(lambda: client.pubsub_channels() == [])
        await wait_until(lambda: alive(Channel) == alive(Viewer) == 0)
