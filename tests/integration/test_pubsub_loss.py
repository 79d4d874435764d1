"""Pub/sub that is cut again and again, without a word to anybody: viewers must still see exactly the log."""

from __future__ import annotations

import asyncio
import random

from tests.conftest import RedisProcess, wait_until
from tests.integration.gateway import Frame, Script, Served, serving

ROUNDS = 6
JOBS = 4
VIEWERS = 5


async def write(script: Script, cutting: asyncio.Task[None]) -> None:
    await script.open_turn()
    n = 0
    while not cutting.done():
        await script.say(*(f"{n}.{k} " for k in range(random.randint(1, 4))))
        n += 1
        await asyncio.sleep(random.uniform(0, 0.02))
    await script.complete()


async def cut(redis: RedisProcess) -> None:
    with redis.client() as client:
        for _ in range(ROUNDS):
            await asyncio.sleep(0.5)
            await wait_until(lambda: client.client_kill_filter(_type="pubsub"), what="a connection to kill")


async def view(served: Served, script: Script, delay: float) -> list[Frame]:
    await asyncio.sleep(delay)
    return await served.transcript(script.id)


def assert_exact(frames: list[Frame], log: list[tuple[str, str, str]]) -> None:
    """A snapshot, and then the log from there to its end, each event once."""
    snapshot, *tail = frames
    assert snapshot.event == "snapshot"
    ids = [event_id for event_id, _, _ in log]
    assert [frame.row for frame in tail] == log[ids.index(snapshot.id) + 1 :]


async def test_transcripts_are_exact_while_subscriptions_are_killed(redis: RedisProcess):
    async with serving(redis.url, flush_interval=0.02, position_interval=600.0) as served:
        scripts = [await served.script() for _ in range(JOBS)]
        async with asyncio.TaskGroup() as group:
            cutting = group.create_task(cut(redis))
            for script in scripts:
                group.create_task(write(script, cutting))
            viewing = [
                (script, group.create_task(view(served, script, random.uniform(0, 2.5))))
                for script in scripts
                for _ in range(VIEWERS)
            ]
        assert served.store.live.connections > ROUNDS // 2
        for script, viewer in viewing:
            assert_exact(viewer.result(), await script.log())


async def test_a_loss_right_before_the_end_is_made_up_for(redis: RedisProcess):
    """The last event of a job has none behind it that would show the hole."""
    async with serving(redis.url, position_interval=600.0) as served:
        script = await served.script()
        async with served.stream(script.id) as stream:
            await anext(stream)
            with redis.client() as client:
                client.client_kill_filter(_type="pubsub")
            await script.complete()
            assert [frame.event async for frame in stream] == ["job.completed"]
