"""Everything of an owner on one connection: all their jobs, nobody else's, exactly, from any place on."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import Any

import pytest

from streamjobs.events import JobProgress
from streamjobs.gateway.owner_cursor import parse_owner_cursor
from streamjobs.store import Position
from tests.conftest import RedisProcess, unrestricted, wait_until
from tests.integration.gateway import Frame, Script, Served, Stream, serving

Told = tuple[str, str, str, str]
"""Job, event id, type, data."""


@pytest.fixture
async def served(redis: RedisProcess) -> AsyncIterator[Served]:
    async with serving(redis.url, position_interval=600.0) as gateway:  # nothing is made up for by the way
        yield gateway


def told(frame: Frame) -> Told:
    event = frame.json
    assert frame.event == event["type"]
    return event["job"], event["id"], event["type"], json.dumps(event["data"], separators=(",", ":"))


async def take(stream: Stream, count: int) -> list[Frame]:
    return [await anext(stream) for _ in range(count)]


async def until(stream: Stream, *ends: tuple[str, str]) -> list[Frame]:
    """Frames until each of these (job, type) was seen."""
    frames: list[Frame] = []
    missing = set(ends)
    async with asyncio.timeout(60.0):
        async for frame in stream:
            frames.append(frame)
            if frame.event not in {"ready", "reset", "error"}:
                missing.discard(told(frame)[0:3:2])
            if not missing:
                return frames
    raise AssertionError(f"the stream ended before {missing}")


async def lived(served: Served, owner: str, *, words: int = 3) -> Script:
    script = await served.script(owner=owner)
    await script.open_turn()
    await script.write(JobProgress(percent=50.0, message="half"))
    await script.say(*(f"w{n} " for n in range(words)))
    await script.complete()
    return script


async def lifecycle(script: Script) -> list[Told]:
    return [
        (script.id, *event)
        for event in await script.log()
        if event[1].startswith("job.") and event[1] != "job.log"
    ]


async def whole(script: Script) -> list[Told]:
    return [(script.id, *event) for event in await script.log()]


def by_job(frames: list[Frame]) -> dict[str, list[Told]]:
    found: dict[str, list[Told]] = defaultdict(list)
    for frame in frames:
        if frame.event not in {"ready", "reset", "error", "snapshot"}:
            found[told(frame)[0]].append(told(frame))
    return found


# --- what it says


async def test_all_of_an_owners_jobs_and_nobody_elses(served: Served):
    """A task panel would need a connection for each job, and show other people's."""
    async with served.everything("alice") as stream:
        ready = await anext(stream)
        assert (ready.event, ready.json) == ("ready", {"watch": []})
        assert ready.retry is not None
        first = await lived(served, "alice")
        await lived(served, "bob")
        second = await lived(served, "alice")
        frames = await until(stream, (first.id, "job.completed"), (second.id, "job.completed"))
    assert by_job(frames) == {first.id: await lifecycle(first), second.id: await lifecycle(second)}


async def test_watched_jobs_are_told_in_full(served: Served):
    """The answer that somebody is looking at would need a connection of its own."""
    script = await served.script(owner="alice")
    await script.open_turn()
    await script.say("hello ")
    async with served.everything("alice", watch=script.id) as stream:
        assert (await anext(stream)).json == {"watch": [script.id]}
        snapshot = (await anext(stream)).json
        assert (snapshot["job"], snapshot["type"], snapshot["data"]["text"]) == (
            script.id,
            "snapshot",
            "hello ",
        )
        other = await lived(served, "alice")
        await script.say("world")
        await script.complete()
        frames = await until(stream, (script.id, "job.completed"), (other.id, "job.completed"))
    seen = by_job(frames)
    assert seen[other.id] == await lifecycle(other)
    log = await whole(script)
    assert seen[script.id] == log[[event[1] for event in log].index(snapshot["id"]) + 1 :]


@pytest.mark.parametrize("parameters", [{}, {"merge": "1"}, {"merge": "1", "flush": "50"}], ids=str)
async def test_a_cut_at_any_place_loses_and_repeats_nothing(served: Served, parameters: dict[str, str]):
    """Whoever changes trains would miss an answer, or read it twice."""
    jobs = [await served.script(owner="alice") for _ in range(2)]
    query = {"watch": ",".join(job.id for job in jobs)} | parameters
    async with served.everything("alice", **query) as stream:
        frames = await take(stream, 3)
        for n in range(3):
            for job in jobs:
                await job.say(f"{n}", "x")
            await lived(served, "alice")
        for job in jobs:
            await job.complete()
        last = await lived(served, "alice")
        ends = [(job.id, "job.completed") for job in (*jobs, last)]
        frames += await until(stream, *ends)
    for at, frame in enumerate(frames[2:-1], 3):  # a cut before the snapshots gets them as they are then
        missing = [told(f)[0:3:2] for f in frames[at:] if f.event == "job.completed"]
        async with served.everything("alice", frame.id, **query) as stream:
            rest = await until(stream, *missing)
        assert texts(rest) == texts(frames[at:]), f"after {frame.id}"
        assert facts(rest) == facts(frames[at:]), f"after {frame.id}"


def texts(frames: list[Frame]) -> dict[str, str]:
    """The text of each job; merging may cut it elsewhere."""
    found: dict[str, str] = defaultdict(str)
    for frame in frames:
        if frame.event == "text.delta":
            found[frame.json["job"]] += frame.json["data"]["text"]
    return found


def facts(frames: list[Frame]) -> dict[str, list[Told]]:
    seen = by_job(frames)
    return {
        job: rest
        for job, events in seen.items()
        if (rest := [event for event in events if event[2] != "text.delta"])
    }


async def test_two_tabs_get_the_same(served: Served):
    async with served.everything("alice") as one, served.everything("alice") as two:
        await anext(one), await anext(two)
        assert served.gateway.hub.feeds == 1
        script = await lived(served, "alice")
        both = [await until(tab, (script.id, "job.completed")) for tab in (one, two)]
    assert both[0] == both[1]


async def test_a_job_that_is_not_the_owners_cannot_be_watched(served: Served):
    """Ids leak; what they stand for must not."""
    foreign, gone = await lived(served, "bob"), "j0-" + "a" * 26
    async with served.everything("alice", watch=f"{foreign.id},{gone}") as stream:
        frames = await take(stream, 3)
        mine = await lived(served, "alice")
        rest = await until(stream, (mine.id, "job.completed"))
    assert [frame.event for frame in frames] == ["ready", "error", "error"]
    problems = {frame.json.pop("job"): frame.json for frame in frames[1:]}
    assert set(problems) == {foreign.id, gone}
    assert [frame.json["code"] for frame in frames[1:]] == ["not_found"] * 2
    assert frames[1].json | {"job": ""} == frames[2].json | {"job": ""}, "nothing tells them apart"
    assert set(by_job(rest)) == {mine.id}


# --- places that are not there


async def test_from_before_anything_was_written(served: Served):
    """The first job ever would be missed by the tab that was cut before it."""
    async with served.everything("alice") as stream:
        ready = await anext(stream)
    script = await lived(served, "alice")
    async with served.everything("alice", ready.id) as stream:
        frames = await until(stream, (script.id, "job.completed"))
    assert by_job(frames) == {script.id: await lifecycle(script)}


@pytest.mark.parametrize("how", ["trimmed", "expired", "trimmed from the start"])
async def test_a_place_that_has_left_the_feed_is_reset(served: Served, how: str):
    """A panel would silently miss what happened meanwhile, and show a job as running for ever."""
    async with served.everything("alice") as stream:
        place = (await anext(stream)).id
        script = await lived(served, "alice")
        if how != "trimmed from the start":
            place = (await until(stream, (script.id, "job.completed")))[-1].id
    feed = "sj:{0}:owner:alice:events"
    if how == "expired":
        await served.store.client.delete(feed)
    else:
        await lived(served, "alice")
        await served.store.client.xtrim(feed, maxlen=1, approximate=False)
    async with served.everything("alice", place) as stream:
        reset, ready = await take(stream, 2)
        assert (reset.event, reset.json["reason"]) == ("reset", "unknown_cursor")
        assert str(parse_owner_cursor(place).feed) == reset.json["cursor"]
        assert ready.event == "ready"
        script = await lived(served, "alice")
        assert by_job(await until(stream, (script.id, "job.completed"))) == {
            script.id: await lifecycle(script)
        }


async def test_a_watched_jobs_lost_place_is_reset_alone(served: Served):
    script = await served.script(owner="alice")
    async with served.everything("alice", watch=script.id) as stream:
        ready, _ = await take(stream, 2)
    tag = script.id.rpartition("-")[2][:8]
    async with served.everything("alice", f"{ready.id}:{tag}.999-999", watch=script.id) as stream:
        reset, snapshot = await take(stream, 2)
    assert (reset.event, reset.json) == (
        "reset",
        {"job": script.id, "reason": "unknown_cursor", "cursor": "999-999"},
    )
    assert (snapshot.event, snapshot.json["job"]) == ("snapshot", script.id)


@pytest.mark.parametrize(
    ("query", "status", "code"),
    [
        ({"after": "x"}, 400, "invalid_cursor"),
        ({"after": "1-1"}, 400, "invalid_cursor"),
        ({"watch": ",".join(f"j0-{n:0>26}" for n in "abcdefghijklmnopq")}, 422, "invalid"),
        ({"watch": f"j0-{'a' * 26},j1-{'a' * 26}"}, 422, "invalid"),
        ({"flush": "1"}, 422, "invalid"),
    ],
)
async def test_what_cannot_be_answered_is_refused(
    served: Served, query: dict[str, str], status: int, code: str
):
    answer = await served.client.get("/v1/events", params=query)
    assert (answer.status_code, answer.json()["code"]) == (status, code)


# --- trouble


async def test_events_come_although_nobody_hears_of_them(served: Served):
    """Pub/sub may lose anything; then a panel would stand still until something else happens."""
    async with served.everything("alice") as stream:
        await anext(stream)
        for name, channel in served.store.live._channels.items():
            if name.endswith("owner:alice:live"):
                channel.listeners.clear()
        script = await lived(served, "alice")
        await served.gateway.hub.check_positions()
        frames = await until(stream, (script.id, "job.completed"))
    assert by_job(frames) == {script.id: await lifecycle(script)}


async def test_a_killed_subscription_leaves_no_hole(served: Served):
    async with served.everything("alice") as stream:
        await anext(stream)
        scripts: list[Script] = []
        for _ in range(5):
            async with unrestricted(served.store) as client:
                await client.client_kill_filter(_type="pubsub")
            scripts.append(await lived(served, "alice"))
        frames = await until(stream, *((script.id, "job.completed") for script in scripts))
    assert by_job(frames) == {script.id: await lifecycle(script) for script in scripts}


async def test_a_long_feed_is_read_page_by_page(served: Served, monkeypatch: pytest.MonkeyPatch):
    """After a weekend away a browser would get everything in one piece, or only the newest."""
    async with served.everything("alice") as stream:
        place = (await anext(stream)).id
    scripts = [await lived(served, "alice") for _ in range(12)]
    for limit in (1, 3, 1000):
        monkeypatch.setattr("streamjobs.store.owners._PAGE_EVENTS", limit)
        async with served.everything("alice", place) as stream:
            frames = await until(stream, (scripts[-1].id, "job.completed"))
        assert by_job(frames) == {script.id: await lifecycle(script) for script in scripts}


async def test_it_ends_with_a_handover_when_the_gateway_does(served: Served):
    async with served.everything("alice") as stream:
        ready = await anext(stream)
        draining = asyncio.create_task(served.gateway.drain(0.1))
        frames = [frame async for frame in stream]
        await draining
    assert [frame.event for frame in frames] == ["handover"]
    assert frames[0].retry is not None
    assert parse_owner_cursor(ready.id).feed == Position(0, 0, 0)


async def test_the_last_one_leaving_leaves_nothing(served: Served):
    """A gateway would hear of everybody who was ever there, for ever."""
    hub, script = served.gateway.hub, await served.script(owner="alice")

    async def come_and_go(times: int) -> None:
        for _ in range(times):
            async with served.everything("alice", watch=script.id) as stream:
                await take(stream, 2)
        await wait_until(lambda: left() == (0, 0, 0, 0), what=f"nothing left of {left()}")

    def left() -> Any:
        return hub.feeds, hub.channels, hub.viewers, served.store.live.channels

    await come_and_go(1)  # the connection to Redis stays
    before = len(asyncio.all_tasks())
    await come_and_go(20)
    await wait_until(lambda: len(asyncio.all_tasks()) <= before, what="the end of its tasks")
