"""Redis goes away under open streams, comes back, or comes back empty: nobody hangs, nobody misses a word."""

from __future__ import annotations

import asyncio
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from streamjobs.store import Store, live
from tests.conftest import RedisProcess, fast_settings, wait_until
from tests.faults.crowd import Viewer, say_patiently, speaking, watching
from tests.faults.gateways import GatewayProcess, gateway_process, store_beside
from tests.integration.gateway import Script, Served, serving
from tests.proxy import proxying


class Scene(NamedTuple):
    """A gateway, jobs that a test has talk, and who watches them."""

    gateway: GatewayProcess
    scripts: list[Script]
    crowd: list[Viewer]


@asynccontextmanager
async def scene(url: str, *, jobs: int, viewers: int, **changes: Any) -> AsyncIterator[Scene]:
    """Afterwards the jobs are completed, and every viewer must have seen all of it on one connection."""
    options = {"owner_limit": 0, "heartbeat_interval": 0.3, "position_interval": 600.0} | changes
    async with gateway_process(url, **options) as gateway, store_beside(gateway) as store:
        scripts = [await Script.start(store) for _ in range(jobs)]
        crowd = [Viewer(script.id, gateway.port) for script in scripts for _ in range(viewers)]
        async with watching(crowd) as watched:
            await gateway.viewers(len(crowd))
            yield Scene(gateway, scripts, crowd)
            for script in scripts:
                await script.complete()
            await watched
        logs = {script.id: await script.log() for script in scripts}
    for viewer in crowd:
        assert viewer.rows == logs[viewer.job_id]
        assert viewer.endings == {"job.completed": 1}, "the stream did not stay open"
        assert not viewer.others, viewer.others


async def all_level(scene: Scene) -> float:
    """Wait until every viewer has what is written now; for how many seconds."""
    began = time.monotonic()
    ends = {script.id: (await script.log())[-1][0] for script in scene.scripts}
    await wait_until(
        lambda: all(viewer.cursor == ends[viewer.job_id] for viewer in scene.crowd), 30, "all to be level"
    )
    return time.monotonic() - began


# --- away for a while


@pytest.mark.parametrize("seconds", [3.0, pytest.param(10.0, marks=pytest.mark.long)])
async def test_streams_stay_open_while_redis_stands_still(own_redis: RedisProcess, seconds: float):
    """A snapshot of Redis, a slow disk, a paused machine: every reader would be cut off, or stare at an end
    that is none."""
    async with scene(own_redis.tcp_url, jobs=5, viewers=10) as stage:
        async with speaking(stage.scripts):
            await wait_until(lambda: all(len(viewer.rows) > 20 for viewer in stage.crowd))
            assert own_redis.process
            own_redis.process.send_signal(signal.SIGSTOP)
            began, beats = time.monotonic(), [viewer.beats for viewer in stage.crowd]
            try:
                await wait_until(lambda: time.monotonic() - began > seconds)
                await wait_until(lambda: has_beaten(stage.crowd, beats, 3))
                assert await answers(stage.gateway, "/livez") == 200
            finally:
                own_redis.process.send_signal(signal.SIGCONT)
            seen = [len(viewer.rows) for viewer in stage.crowd]
            await wait_until(lambda: has_gone_on(stage.crowd, seen), 90, "words after the pause")
        level = await all_level(stage)
    print(f"paused for {seconds:g} s; level {level:.2f} s after the last word")  # noqa: T201


def has_beaten(crowd: list[Viewer], before: list[int], times: int) -> bool:
    return all(viewer.beats >= count + times for viewer, count in zip(crowd, before, strict=True))


def has_gone_on(crowd: list[Viewer], before: list[int]) -> bool:
    return all(len(viewer.rows) > count + 10 for viewer, count in zip(crowd, before, strict=True))


async def answers(gateway: GatewayProcess, path: str) -> int:
    async with httpx.AsyncClient() as client:
        url = f"http://127.0.0.1:{gateway.settings.ops_port}{path}"
        return (await client.get(url)).status_code


@pytest.mark.parametrize("times", [1, pytest.param(10, marks=pytest.mark.long)])
async def test_streams_outlive_restarts_of_redis(own_redis: RedisProcess, times: int):
    """An update of Redis would cost every reader the connection, and some a word."""
    async with scene(own_redis.url, jobs=5, viewers=10) as stage:
        async with speaking(stage.scripts):
            for _ in range(times):
                seen = [len(viewer.rows) for viewer in stage.crowd]
                await wait_until(lambda seen=seen: has_gone_on(stage.crowd, seen), 90, "words in between")
                own_redis.kill()
                beats = [viewer.beats for viewer in stage.crowd]
                await wait_until(lambda beats=beats: has_beaten(stage.crowd, beats, 2))
                own_redis.start()
        level = await all_level(stage)
    print(f"{times} restarts; level {level:.2f} s after the last word")  # noqa: T201


# --- live delivery


@pytest.mark.parametrize("kills", [4, pytest.param(60, marks=pytest.mark.long)])
async def test_viewers_are_level_soon_after_each_loss_of_live_delivery(redis: RedisProcess, kills: int):
    """What was published meanwhile is gone: without a reader of the log the last word would be missing until
    somebody says another."""
    lags: list[float] = []
    async with scene(redis.url, jobs=5, viewers=10) as stage:
        for script in stage.scripts:
            await script.open_turn()
        with redis.client() as client:
            for n in range(kills):
                assert client.client_kill_filter(_type="pubsub") >= 1
                for script in stage.scripts:
                    await say_patiently(script, [f"{n} "])
                lags.append(await all_level(stage))
        assert await stage.gateway.metric('streamjobs_gap_fills_total{why="reconnected"}') > 0
    print(f"{kills} kills; level after {max(lags):.2f} s at most")  # noqa: T201
    assert max(lags) < 20.0


async def test_a_gateway_too_slow_for_its_subscriptions_makes_up_for_it(own_redis: RedisProcess):
    """Redis cuts a subscriber off whose buffer is full, with all that was in it."""
    with own_redis.client() as client:
        client.config_set("client-output-buffer-limit", "pubsub 64kb 64kb 1")
        async with scene(own_redis.tcp_url, jobs=2, viewers=5) as stage:
            for script in stage.scripts:
                await script.open_turn()
            await all_level(stage)
            stage.gateway.process.send_signal(signal.SIGSTOP)
            try:
                await fill_until(lambda: not client.client_list(_type="pubsub"), stage.scripts)
            finally:
                stage.gateway.process.send_signal(signal.SIGCONT)
            level = await all_level(stage)
            assert await stage.gateway.metric('streamjobs_gap_fills_total{why="reconnected"}') > 0
    print(f"level {level:.2f} s after it went on")  # noqa: T201


async def fill_until(is_cut: Any, scripts: list[Script]) -> None:
    """Have jobs say so much that the buffers of a subscriber that does not read are full."""
    for _ in range(300):
        for script in scripts:
            await script.say(*["x" * 10_000] * 10)
        if is_cut():
            return
    raise AssertionError("Redis has room for 60 MB")


@pytest.mark.parametrize(
    ("seconds", "watchdog"),
    [(2.0, 0.8), pytest.param(12.0, live.WATCHDOG, marks=pytest.mark.long)],
)
async def test_a_link_to_redis_that_swallows_everything_is_given_up(
    redis: RedisProcess, monkeypatch: pytest.MonkeyPatch, seconds: float, watchdog: float
):
    """TCP says nothing for a quarter of an hour. Viewers would get heartbeats, and never another word."""
    monkeypatch.setattr(live, "WATCHDOG", watchdog)
    async with proxying(redis.port) as proxy, direct(redis) as store:
        async with serving(proxy.url, redis_timeout=1.0, heartbeat_interval=0.2) as served:
            script = await Script.start(store)
            crowd = [Viewer(script.id, port_of(served)) for _ in range(20)]
            async with watching(crowd) as watched:
                async with speaking([script]):
                    await wait_until(lambda: all(len(viewer.rows) > 20 for viewer in crowd))
                    proxy.mode = "black hole"
                    began = time.monotonic()
                    await wait_until(lambda: not served.store.live.connected, 10 + watchdog)
                    noticed = time.monotonic() - began
                    beats = [viewer.beats for viewer in crowd]
                    await wait_until(lambda: has_beaten(crowd, beats, 3))
                    await wait_until(lambda: time.monotonic() - began > seconds)
                    proxy.mode = "pass"
                    seen = [len(viewer.rows) for viewer in crowd]
                    await wait_until(lambda: has_gone_on(crowd, seen), 90, "words after the outage")
                await script.complete()
                await asyncio.wait_for(watched, 90)
        log = await script.log()
    for viewer in crowd:
        assert viewer.rows == log
        assert viewer.endings == {"job.completed": 1}
    print(f"noticed after {noticed:.1f} s")  # noqa: T201


@asynccontextmanager
async def direct(redis: RedisProcess) -> AsyncIterator[Store]:
    """A store that does not go through the proxy."""
    store = await Store.open(fast_settings(redis.url, lease=60.0))
    try:
        yield store
    finally:
        await store.aclose()


def port_of(served: Served) -> int:
    return int(served.url.rpartition(":")[2])


# --- comes back empty


@pytest.fixture
def forgetful_redis() -> Iterator[RedisProcess]:
    """A server that keeps nothing over a restart."""
    with tempfile.TemporaryDirectory(prefix="sj-") as folder:
        server = RedisProcess(Path(folder))
        server.start()
        yield server
        server.stop()


async def test_a_redis_that_comes_back_empty_ends_every_stream(forgetful_redis: RedisProcess):
    """Whoever watches a job that is no more would wait for ever, and ask again for ever."""

    async def lose(served: Served) -> None:
        forgetful_redis.kill()
        await wait_until(lambda: not served.store.live.connected)
        forgetful_redis.start()

    await check_loss(forgetful_redis, lose)


async def test_a_redis_that_is_emptied_ends_every_stream(forgetful_redis: RedisProcess):
    """The same while the connections stand: nothing but the comparison of positions can tell."""

    async def lose(_served: Served) -> None:
        with forgetful_redis.client() as client:
            client.flushall()
            client.script_flush()

    await check_loss(forgetful_redis, lose)


async def check_loss(redis: RedisProcess, lose: Any) -> None:
    options = {"redis_timeout": 1.0, "position_interval": 0.3, "heartbeat_interval": 0.2}
    async with serving(redis.url, **options) as served:
        script = await served.script()
        await script.open_turn()
        cursor = (await script.log())[-1][0]
        crowd = [Viewer(script.id, port_of(served), start) for start in ("", "0", cursor) for _ in range(5)]
        async with watching(crowd) as watched:
            await wait_until(lambda: all(viewer.cursor == cursor for viewer in crowd))
            waiting = asyncio.create_task(served.client.get(f"/v1/jobs/{script.id}", params={"wait": "20"}))
            await wait_until(lambda: served.gateway.hub.viewers == len(crowd) + 1)
            await lose(served)
            await asyncio.wait_for(watched, 90)
        for viewer in crowd:
            assert [frame.json["code"] for frame in viewer.others if frame.event == "error"] == ["not_found"]
            assert viewer.endings == {"error": 1}
        assert (await waiting).status_code == 404
        again = await served.client.get(served.events_url(script.id), headers={"last-event-id": cursor})
        assert again.status_code == 404
        await wait_until(lambda: served.gateway.hub.channels == 0 and served.store.live.channels == 0)
        await require_new_life(served)


async def require_new_life(served: Served) -> None:
    """The same gateway serves a new job as if nothing had been."""
    script = await served.script()
    viewer = Viewer(script.id, port_of(served))
    async with watching([viewer]) as watched:
        await wait_until(lambda: viewer.rows)
        await script.open_turn()
        await script.complete()
        await asyncio.wait_for(watched, 90)
    assert viewer.rows == await script.log()
