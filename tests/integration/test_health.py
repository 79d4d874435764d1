"""What a gateway says of itself: that Redis is away, how late events are, how streams began."""

from __future__ import annotations

import asyncio
from typing import Any, NamedTuple, cast

import httpx
import pytest

from streamjobs.events import JobProgress
from streamjobs.gateway.health import Health, written_ms
from tests.conftest import RedisProcess, wait_until
from tests.integration.gateway import Served, serving


async def scraped(served: Served, name: str) -> float:
    """A sample of `/metrics`, 0 where it is not there."""
    text = (await served.client.get("/metrics")).text
    lines = [line.rpartition(" ") for line in text.splitlines() if line.startswith(name)]
    return sum(float(value) for sample, _, value in lines if sample == name)


async def test_streams_say_that_redis_is_away_and_go_on_without_a_hole(own_redis: RedisProcess):
    """A page would show a live answer as if nothing were wrong, and an operator would see healthy streams."""
    async with serving(own_redis.tcp_url, redis_timeout=1.0, heartbeat_interval=0.3) as served:
        script = await served.script()
        await script.open_turn()
        async with served.stream(script.id, after="0") as stream, served.everything("anonymous") as panel:
            await stream.until("turn.started")
            assert (await anext(panel)).event == "ready"
            assert await scraped(served, "streamjobs_degraded") == 0.0
            assert (await served.client.get("/readyz")).status_code == 200
            following = asyncio.create_task(stream.until("job.completed"))
            telling = asyncio.create_task(panel.until("job.completed"))
            own_redis.kill()
            await wait_until(lambda: stream.degraded and panel.degraded, what="streams that say so")
            assert await scraped(served, "streamjobs_degraded") == 1.0
            assert await scraped(served, "streamjobs_degraded_seconds_total") > 0
            assert (await served.client.get("/readyz")).status_code == 200
            await asyncio.to_thread(own_redis.start)
            await wait_until(lambda: not served.gateway.hub.health.is_degraded, what="recovery")
            await script.say("on ", "it goes")
            await script.complete()
            frames = await following
            told = await telling
        log = await script.log()
    assert [frame.row for frame in frames] == log[-len(frames) :]
    assert len(frames) == 3
    assert told[-1].json["id"] == log[-1][0]


class Down(NamedTuple):
    is_down: bool


class FakeStore(NamedTuple):
    live: Down


def test_a_short_silence_is_no_outage():
    """Every reconnection would ring somebody's pager."""
    health = Health(cast("Any", FakeStore(Down(is_down=True))))
    assert not health.look(10.0)
    assert not health.look(10.4)
    health._store = cast("Any", FakeStore(Down(is_down=False)))
    assert not health.look(10.6)
    health._store = cast("Any", FakeStore(Down(is_down=True)))
    assert not health.look(11.0)
    assert not health.is_degraded
    assert health.look(11.6), "it has just begun"
    assert not health.look(12.0), "it goes on"
    assert health.is_degraded


async def test_how_late_events_are_is_measured_by_redis_clock(redis: RedisProcess):
    """Nobody would know that viewers wait, until they say so."""
    async with serving(redis.url) as served:
        await wait_until(lambda: served.gateway.hub.health._clock.is_known, what="Redis's time")
        before = await scraped(served, "streamjobs_delivery_seconds_count")
        late = await scraped(served, "streamjobs_delivery_seconds_sum")
        script = await served.script()
        async with served.stream(script.id, after="0") as stream:
            await stream.until("job.started")
            await script.write(JobProgress(ts=await served.store.now_ms(), percent=5.0))
            await stream.until("job.progress")
        count = await scraped(served, "streamjobs_delivery_seconds_count") - before
        seconds = await scraped(served, "streamjobs_delivery_seconds_sum") - late
    assert count >= 1
    assert 0 <= seconds / count < 30


@pytest.mark.parametrize(
    ("event", "instant"),
    [
        (b'{"ts":1795586124295,"turn":1}', 1795586124295),
        (b'{"ts":1795586124295}', 1795586124295),
        (b'{"turn":1,"ts":5}', None),
        (b'{"ts":"x"}', None),
        (b"null", None),
    ],
)
def test_an_events_instant(event: bytes, instant: int | None):
    assert written_ms(event) == instant


async def test_how_streams_began_is_counted(redis: RedisProcess):
    """Whether resuming works would have to be believed."""

    async def began(served: Served) -> dict[str, float]:
        kinds = ("snapshot", "replay", "resumed", "reset", "refused")
        name = "streamjobs_streams_opened_total"
        return {kind: await scraped(served, f'{name}{{began="{kind}"}}') for kind in kinds}

    async with serving(redis.url) as served:
        script = await served.script()
        await script.open_turn()
        await script.complete()
        log = await script.log()
        before = await began(served)
        await served.transcript(script.id)
        await served.transcript(script.id, after="0")
        await served.transcript(script.id, log[0][0])
        await served.transcript(script.id, "999-9")
        refused: list[httpx.Response] = [
            await served.client.get(served.events_url(script.id), params={"after": "x"}),
            await served.client.get(served.events_url("j0-" + "a" * 26)),
        ]
        after = await began(served)
    assert [answer.status_code for answer in refused] == [400, 404]
    grown = {kind: after[kind] - before[kind] for kind in after}
    assert grown == {"snapshot": 1, "replay": 1, "resumed": 1, "reset": 1, "refused": 2}
