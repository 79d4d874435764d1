"""Jobs whose history is sealed, over HTTP: joins, replays and views of old moments."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from streamjobs import segments
from streamjobs.projections.snapshot import SnapshotProjection
from tests.conftest import RedisProcess
from tests.integration.gateway import Frame, Script, Served, Stream, frame_of, serving

SMALL: dict[str, Any] = {"seal_events": 10, "seal_bytes": 100_000, "snapshot_min_events": 15}
QUIET: dict[str, Any] = {"sweep_interval": 600.0, "position_interval": 600.0}
"""What loops ask of Redis by themselves is not to be counted."""


@pytest.fixture
async def served(redis: RedisProcess, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Served]:
    monkeypatch.setattr(segments, "SEGMENT_EVENTS", 9)
    async with serving(redis.url, **SMALL, **QUIET) as gateway:
        yield gateway


async def spoken(served: Served, sentences: int) -> Script:
    """A job that has said something, which is sealed but for a tail."""
    script = await served.script()
    await script.open_turn()
    projection = SnapshotProjection(served.store)
    for n in range(sentences):
        await script.say(f"{n}.", " a", " b", " c. ")
        await projection.advance(script.id)
    stored = await served.store.snapshots.load(script.id)
    assert stored.weight
    assert stored.page.entries, "a tail in the stream"
    return script


async def test_a_viewer_who_joins_gets_the_view_and_then_what_comes(served: Served):
    """Somebody who opens a long answer late would wait for all of it, or see a part of it twice."""
    script = await spoken(served, 30)
    said = "".join(f"{n}. a b c. " for n in range(30))
    async with served.stream(script.id) as stream:
        joined = await anext(stream)
        assert (joined.event, joined.json["text"]) == ("snapshot", said)
        await script.say("more")
        assert (await anext(stream)).json["text"] == "more"
        await script.complete()
        assert (await anext(stream)).event == "job.completed"


async def test_a_view_that_is_compressed_says_the_same_and_so_does_what_follows(served: Served):
    """Browsers and our own client take zstd by themselves: they would show something else than curl does."""
    script = await spoken(served, 30)
    plain = await first_of(served, script, "identity")
    assert plain == await first_of(served, script, "gzip, zstd")
    url = served.events_url(script.id)
    async with served.client.stream("GET", url, headers={"accept-encoding": "br, zstd"}) as coded:
        assert coded.headers["content-encoding"] == "zstd"
        assert coded.headers["vary"] == "accept-encoding"
        parts, text = coded.aiter_text(), ""
        while not text.endswith("\n\n"):
            text += await anext(parts)
        await script.say("more")
        await script.complete()
        text += "".join([part async for part in parts])
    assert text.endswith("\n\n")
    assert text.count("event: snapshot\n") == text.count("event: job.completed\n") == 1


async def first_of(served: Served, script: Script, accepts: str) -> Frame:
    headers = {"accept-encoding": accepts}
    async with served.client.stream("GET", served.events_url(script.id), headers=headers) as response:
        assert ("content-encoding" in response.headers) is ("zstd" in accepts)
        text = ""
        async for part in response.aiter_text():
            text += part
            if text.endswith("\n\n"):
                return frame_of(text.removesuffix("\n\n"))._replace(retry=None)
    raise AssertionError(f"no frame: {text}")


async def test_a_short_job_a_replay_and_a_resume_are_not_compressed(served: Served):
    """There is nothing to gain there, and a proxy that does not know zstd could break what works."""
    long, short = await spoken(served, 30), await served.script()
    log = await long.log()
    for job, query in ((short, {}), (long, {"after": "0"}), (long, {"after": log[3][0]})):
        url, headers = served.events_url(job.id), {"accept-encoding": "zstd"}
        async with served.client.stream("GET", url, params=query, headers=headers) as response:
            assert "content-encoding" not in response.headers


async def test_many_who_join_at_once_read_the_job_once(served: Served):
    """A link to a long answer that is sent to a thousand people would bring Redis down."""
    script = await spoken(served, 30)
    before = await calls(served)
    frames = await asyncio.gather(*(first_frame(served.stream(script.id)) for _ in range(80)))
    assert {frame.row for frame in frames} == {frames[0].row}
    assert await calls(served) - before < 60, "with those inside of scripts"


async def first_frame(stream: Stream) -> Frame:
    async with stream:
        return await anext(stream)


async def calls(served: Served) -> int:
    return (await served.store.client.info("stats"))["total_commands_processed"]


async def test_every_offset_replays_over_http(served: Served):
    """A browser that reconnects in the middle of what was sealed meanwhile would lose words."""
    script = await spoken(served, 12)
    await script.complete()
    await SnapshotProjection(served.store).advance(script.id)
    log = await script.log()
    frames = await served.transcript(script.id, after="0")
    assert [frame.row for frame in frames if frame.id] == log
    for at in range(0, len(log) - 1, 4):
        frames = await served.transcript(script.id, cursor=log[at][0])
        assert [frame.row for frame in frames if frame.id] == log[at + 1 :]


async def test_a_cursor_that_is_in_no_segment_is_a_reset(served: Served):
    """A page that was open through a failover would go on in the middle of another history."""
    script = await spoken(served, 12)
    seq, _, epoch = (await script.log())[4][0].partition("-")
    async with served.stream(script.id, cursor=f"{seq}-{int(epoch) + 1}") as stream:
        reset, snapshot = await anext(stream), await anext(stream)
    assert (reset.event, reset.json["reason"], snapshot.event) == ("reset", "unknown_cursor", "snapshot")


@pytest.mark.parametrize("has_ended", [False, True])
async def test_every_moment_can_be_looked_at(served: Served, has_ended: bool):
    """What the job looked like before it went wrong would be gone once it is sealed."""
    script = await spoken(served, 12)
    if has_ended:
        await script.complete()
        await SnapshotProjection(served.store).advance(script.id)
    log = await script.log()
    for seq in range(1, len(log) + 1):
        answer = await served.client.get(f"/v1/jobs/{script.id}?at={seq}")
        assert answer.status_code == 200, answer.text
        assert answer.json()["cursor"] == log[seq - 1][0]
    assert (await served.client.get(f"/v1/jobs/{script.id}?at={len(log) + 1}")).status_code == 422
    now = (await served.client.get(f"/v1/jobs/{script.id}")).json()
    then = (await served.client.get(f"/v1/jobs/{script.id}?at={len(log)}")).json()
    assert now == then


async def test_a_crowd_joins_in_one_round_trip(served: Served, monkeypatch: pytest.MonkeyPatch):
    """Five hundred viewers of a long answer would each read and fold all of it."""
    script = await spoken(served, 40)
    reads: list[str] = []
    read = served.store.log._scripts.read  # pyright: ignore

    async def counted(key: str, *arguments: Any) -> Any:
        reads.append(str(arguments[0]))
        return await read(key, *arguments)

    monkeypatch.setattr(served.store.log._scripts, "read", counted)  # pyright: ignore
    snapshots = served.gateway.hub.snapshots
    views = await asyncio.gather(*(snapshots.latest(script.id) for _ in range(50)))
    assert len(set(views)) == 1
    assert reads == ["snap"]
