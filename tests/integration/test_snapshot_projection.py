"""The snapshot projection: what is sealed when, at what cost, and by several processes at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from streamjobs import App, segments
from streamjobs import events as ev
from streamjobs.cursor import START, Cursor
from streamjobs.errors import StoreUnavailable
from streamjobs.job import Fold, InvalidTransition
from streamjobs.projections import snapshot
from streamjobs.projections.snapshot import SnapshotProjection
from streamjobs.store import Entry, Store, keys
from streamjobs.store.doctor import Doctor
from streamjobs.testing import Scenario, ScriptedCall, Turn
from tests.conftest import RedisProcess, fast_settings, unrestricted
from tests.harness import lab, working
from tests.sealing import Job

SMALL: dict[str, Any] = {"seal_events": 10, "seal_bytes": 2000, "snapshot_min_events": 15}


@pytest.fixture
async def store(redis: RedisProcess) -> AsyncIterator[Store]:
    opened = await Store.open(fast_settings(redis.url, **SMALL))
    yield opened
    await opened.aclose()


@pytest.fixture
async def job(store: Store) -> Job:
    return await Job.start(store)


async def folded_from_snapshot(job: Job) -> Any:
    """What a viewer who joins now sees."""
    stored = await job.store.snapshots.load(job.id)
    stored.fold.apply_all(stored.page.entries)
    async for page in job.store.log.pages(job.id, stored.fold.cursor):
        stored.fold.apply_all(page.entries)
    return stored.fold.view()


async def test_whoever_joins_sees_the_whole_job_at_every_moment(job: Job):
    """Someone who joins late would miss what was sealed, or see it twice."""
    projection = SnapshotProjection(job.store)
    for n in range(40):
        await job.say(n % 4 + 1)
        await projection.advance(job.id)
        assert await folded_from_snapshot(job) == job.fold().view()
    assert await job.stream() < len(job.whole) / 3
    assert await job.replay() == job.whole
    report = await Doctor(job.store).examine()
    assert report.violations == []


async def test_a_job_that_has_ended_is_sealed_whole(job: Job):
    """Thousands of old jobs would keep a stream each, at ten times the memory."""
    await job.say(3)
    await job.end()
    projection = SnapshotProjection(job.store)
    await projection.advance(job.id)
    await projection.advance(job.id)
    key = keys.job_key(job.id)
    assert not await job.store.client.exists(f"{key}:events")
    assert sorted(await job.store.client.hkeys(f"{key}:sealed")) == [b"6", b"index"], "too few for a snapshot"
    assert await job.store.client.pexpiretime(f"{key}:sealed") == await job.store.client.pexpiretime(key)
    assert await job.replay() == job.whole
    assert projection.kept == 0
    assert (await Doctor(job.store).examine()).violations == []


async def test_a_short_tail_stays(job: Job):
    """Each event of a quiet job would be a segment of its own."""
    projection = SnapshotProjection(job.store)
    await job.say(6)
    await projection.advance(job.id)
    assert (await job.store.snapshots.load(job.id)).sealed.log == START


async def test_a_projector_that_was_away_catches_up(job: Job):
    """After an outage it would hold all that it missed in memory at once, or never seal it."""
    for _ in range(20):
        await job.say(40)
    await SnapshotProjection(job.store).advance(job.id)
    stored = await job.store.snapshots.load(job.id)
    assert stored.sealed.snap == stored.sealed.log
    assert len(job.whole) - stored.sealed.log.seq <= 500 + 10
    assert await job.replay() == job.whole
    assert await folded_from_snapshot(job) == job.fold().view()


async def test_several_projectors_share_one_job(job: Job):
    """Two of them would each trim what the other one has in no segment."""
    crowd = [SnapshotProjection(job.store) for _ in range(3)]
    for n in range(30):
        await job.say(n % 7 + 1, size=100)
        await asyncio.gather(*(one.advance(job.id) for one in crowd), crowd[0].advance(job.id))
        assert await folded_from_snapshot(job) == job.fold().view()
    await job.end()
    await asyncio.gather(*(one.advance(job.id) for one in crowd))
    assert await job.replay() == job.whole
    assert (await Doctor(job.store).examine()).violations == []


async def test_all_the_work_is_linear(job: Job, monkeypatch: pytest.MonkeyPatch):
    """Rewriting a long answer's snapshot for every sentence would cost its length squared."""
    states: list[int] = []
    seal = job.store.snapshots.seal

    async def counted(*arguments: Any) -> Any:
        sealed = await seal(*arguments)
        states.append(sealed[1] if sealed else 0)
        return sealed

    monkeypatch.setattr(job.store.snapshots, "seal", counted)
    projection = SnapshotProjection(job.store)
    await job.write([ev.TurnStarted(turn=1)])
    for _ in range(300):
        await job.write([ev.TextDelta(turn=1, text="word " * 50)])
        await projection.advance(job.id)
    written = sum(len(entry.data) for entry in job.whole)
    assert len(states) > 5
    assert sum(states) < 6 * written
    assert await folded_from_snapshot(job) == job.fold().view()


async def test_what_was_folded_is_not_folded_again(job: Job, monkeypatch: pytest.MonkeyPatch):
    """Every note about a long job would cost the projector the whole job."""
    projection = SnapshotProjection(job.store)
    await job.say(30)
    await projection.advance(job.id)
    loads: list[str] = []
    monkeypatch.setattr(job.store.snapshots, "load", loads.append)
    await job.say(30)
    await projection.advance(job.id)
    assert loads == []
    assert projection.kept == 1


async def test_what_is_kept_of_many_jobs_is_bounded(store: Store, monkeypatch: pytest.MonkeyPatch):
    """A projector would grow with the jobs it has ever seen, until it is killed."""
    monkeypatch.setattr(snapshot, "KEPT_BYTES", 30_000)
    projection = SnapshotProjection(store)
    jobs = [await Job.start(store, number) for number in range(1, 9)]
    for _ in range(2):
        for one in jobs:
            await one.say(3)
            await projection.advance(one.id)
    assert 1 <= projection.kept <= 3
    for one in jobs:
        await one.say(20)
        await projection.advance(one.id)
        assert await folded_from_snapshot(one) == one.fold().view()


async def test_a_job_that_is_gone_is_forgotten(job: Job):
    """A note about a job that has expired meanwhile would be an error for ever."""
    projection = SnapshotProjection(job.store)
    await projection.advance(job.id)
    async with unrestricted(job.store) as client:
        await client.flushall()
    await projection.advance(job.id)
    assert projection.kept == 0


async def test_a_log_that_was_replaced_is_folded_anew(job: Job):
    """After a failover that lost a tail, the snapshot would hold words that nobody ever said."""
    projection = SnapshotProjection(job.store)
    await job.say(5)
    log = f"{keys.job_key(job.id)}:events"
    async with unrestricted(job.store) as client:
        kept = await client.dump(log), await client.hgetall(keys.job_key(job.id))
    await job.say(2)
    await projection.advance(job.id)
    async with unrestricted(job.store) as client:
        await client.restore(log, 0, kept[0], replace=True)
    await job.store.client.hset(keys.job_key(job.id), mapping=kept[1])
    job.batch, job.whole = job.batch - 1, job.whole[:-2]
    await job.store.client.hset(
        keys.job_key(job.id), mapping={"lease": job.lease.epoch + 1, "epoch": job.lease.epoch + 1}
    )
    job.lease = job.lease._replace(epoch=job.lease.epoch + 1)
    await job.say(20)
    await projection.advance(job.id)
    assert await folded_from_snapshot(job) == job.fold().view()
    assert await job.replay() == job.whole


async def test_a_damaged_log_is_an_error_and_stays_as_it_is(job: Job):
    """What nobody can read any more would be sealed, and the evidence be gone."""
    projection = SnapshotProjection(job.store)
    await job.say(30)
    await job.store.client.xadd(
        f"{keys.job_key(job.id)}:events", {"t": "job.queued", "d": '{"kind":"k","owner":"o"}'}, id="40-1"
    )
    with pytest.raises(InvalidTransition):
        await projection.advance(job.id)
    assert await job.stream() == len(job.whole) + 1
    assert projection.kept == 0


async def test_sealing_survives_an_outage(job: Job, monkeypatch: pytest.MonkeyPatch):
    """A fold that was half done when Redis went away would be taken up at the wrong place."""
    projection = SnapshotProjection(job.store)
    await job.say(20)
    seal = job.store.snapshots.seal

    async def lost(*arguments: Any) -> Any:
        await seal(*arguments)
        raise StoreUnavailable("the reply is lost")

    monkeypatch.setattr(job.store.snapshots, "seal", lost)
    with pytest.raises(StoreUnavailable):
        await projection.advance(job.id)
    monkeypatch.setattr(job.store.snapshots, "seal", seal)
    await job.say(20)
    await projection.advance(job.id)
    assert await folded_from_snapshot(job) == job.fold().view()
    assert await job.replay() == job.whole


async def test_a_viewer_reads_on_while_its_job_is_sealed(job: Job):
    """A live viewer would meet a hole at the moment the log is trimmed."""
    seen: list[Entry] = []

    async def watch() -> None:
        cursor = START
        while not seen or seen[-1].type != "job.completed":
            page = await job.store.log.page(job.id, cursor, limit=3)
            assert page.found
            seen.extend(page.entries)
            cursor = seen[-1].cursor
            await asyncio.sleep(0)

    async def work() -> None:
        projections = [SnapshotProjection(job.store) for _ in range(2)]
        for _ in range(25):
            await job.say(5)
            await asyncio.gather(*(one.advance(job.id) for one in projections))
        await job.end()
        await projections[0].advance(job.id)

    await asyncio.gather(watch(), work())
    assert seen == job.whole


DAMAGES: dict[str, dict[str, bytes]] = {
    "a segment that is none": {"12": b"nonsense"},
    "a segment in another one's place": {"12": segments.encode([Entry(Cursor(1, 1), "x.a", b"{}")])},
    "the snapshot of another job": {"snap": segments.compress(Fold("j0-other").state())},
    "a snapshot that is none": {"snap": b"nonsense"},
}


@pytest.mark.parametrize("damage", DAMAGES)
async def test_the_doctor_finds_damaged_history(job: Job, damage: str):
    """What was sealed wrongly would be found by the user who replays it, when it is too late."""
    projection = SnapshotProjection(job.store)
    for _ in range(4):
        await job.say(10)
        await projection.advance(job.id)
    history = f"{keys.job_key(job.id)}:sealed"
    assert await job.store.client.hexists(history, "12")
    await job.store.client.hset(history, mapping=DAMAGES[damage])
    other = await Store.open(job.store.settings)
    report = await Doctor(other).examine()
    await other.aclose()
    assert [violation.check for violation in report.violations] == ["sealed_history"]


async def test_who_was_second_goes_on_to_the_end(job: Job, monkeypatch: pytest.MonkeyPatch):
    """The last note about a job may reach the projector that lost the race: its end would stay unsealed."""
    await job.say(30)
    await job.end()
    seal = job.store.snapshots.seal
    lost: list[str] = []

    async def second_once(job_id: str, *rest: Any) -> Any:
        if not lost:
            lost.append(job_id)
            return None
        return await seal(job_id, *rest)

    monkeypatch.setattr(job.store.snapshots, "seal", second_once)
    await SnapshotProjection(job.store).advance(job.id)
    assert lost
    assert await job.stream() == 0


async def test_a_recorded_chat_is_whole_at_every_event(redis: RedisProcess):
    """What a real worker writes, and random logs do not, would be lost in the snapshot."""
    app = App()

    @app.tool(effect="pure")
    async def look(at: str) -> str:
        return f"{at} is well"

    call = ScriptedCall(name="look", arguments={"at": "it"})
    turns = [Turn(text="I look. " * 20, tool_calls=[call]), Turn(text="It is well. " * 20)]
    async with lab(redis.url, Scenario(turns=turns), **SMALL) as bench, working(bench.store, app):
        job_id = await bench.chat(tools=["look"])
        await bench.ended(job_id)
        store = bench.store
        log = [entry async for page in store.log.pages(job_id) for entry in page.entries]
        whole = Fold(job_id)
        for seq, entry in enumerate(log, 1):
            whole.apply_all([entry])
            rest = Fold.restore(whole.state())
            assert rest.view() == whole.view()
            rest.apply_all(log[seq:])
            assert rest.view() == await bench.view(job_id)
        await SnapshotProjection(store).advance(job_id)
        assert [entry async for page in store.log.pages(job_id) for entry in page.entries] == log
        await bench.healthy()
