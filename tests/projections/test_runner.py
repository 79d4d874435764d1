"""The runner: notes reach projections however projectors, notes and Redis behave."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from streamjobs import metrics
from streamjobs.errors import ConfigError, JobNotFound, StoreFull, StoreUnavailable
from streamjobs.projections import build
from streamjobs.store import Quarantined, Store
from streamjobs.store.feed import Feed
from tests.conftest import RedisProcess, wait_until
from tests.projections.bench import (
    Floor,
    carry,
    caught_up,
    plain,
    projecting,
    right_index,
    runner_of,
    settle,
    shown_index,
)

FEED = "sj:{0}:feed"


class Probe:
    """A projection that remembers what it was called for, and fails when it is told to."""

    def __init__(self, name: str = "probe") -> None:
        self.name = name
        self.seen: list[str] = []
        self.fails: dict[str, Exception] = {}
        self.sweeps = 0

    async def advance(self, job_id: str) -> None:
        self.seen.append(job_id)
        if job_id in self.fails:
            raise self.fails[job_id]


class Held(Probe):
    """One that waits until it is let go, and says how many wait at once."""

    def __init__(self) -> None:
        super().__init__()
        self.go = asyncio.Event()
        self.most = self.inside = 0

    async def advance(self, job_id: str) -> None:
        self.inside += 1
        self.most = max(self.most, self.inside)
        await self.go.wait()
        self.inside -= 1
        self.seen.append(job_id)


async def lag_of(store: Store, name: str = "probe") -> Any:
    (lag,) = [lag for lag in await store.feed.lag(0) if lag.name == name]
    return lag


# --- notes


async def test_a_batch_names_a_job_once(store: Store):
    """A chat of a thousand notes would be folded a thousand times."""
    floor, probe = Floor(store), Probe()
    runner = runner_of(store, probe)
    await runner.tick("probe", 0)
    jobs = [await floor.live() for _ in range(3)]
    assert await runner.tick("probe", 0) == 3
    assert sorted(probe.seen) == sorted(jobs)
    assert await runner.tick("probe", 0) == 0


async def test_so_many_jobs_are_folded_at_once(store: Store):
    """A burst would open as many reads of logs as it has jobs."""
    held = Held()
    runner = runner_of(store, held)
    await runner.tick("probe", 0)
    await asyncio.gather(*(Floor(store).submit() for _ in range(40)))
    ticking = asyncio.create_task(runner.tick("probe", 0))
    await wait_until(lambda: held.inside == store.settings.projector_concurrency)
    held.go.set()
    assert await ticking == 40
    assert held.most == store.settings.projector_concurrency


async def test_what_was_read_and_not_done_is_read_first(store: Store):
    """A lost answer of Redis, or a batch that failed, would leave jobs out of every list."""
    floor, probe = Floor(store), Probe()
    runner = runner_of(store, probe)
    await runner.tick("probe", 0)
    lost = await floor.submit()
    assert (await store.feed.read(0, "probe", runner.consumer, 10)).jobs == {lost: 1}
    later = await floor.submit()
    assert await runner.tick("probe", 0) == 1
    assert await runner.tick("probe", 0) == 1
    assert probe.seen == [lost, later]


@pytest.mark.parametrize("trouble", [StoreUnavailable("away"), StoreFull("full")])
async def test_trouble_with_redis_is_no_fault_of_a_job(store: Store, trouble: Exception):
    """After an outage every job that had news would be in quarantine."""
    floor, probe = Floor(store), Probe()
    runner = runner_of(store, probe)
    await runner.tick("probe", 0)
    job_id = await floor.submit()
    probe.fails[job_id] = trouble
    with pytest.raises(type(trouble)):
        await runner.tick("probe", 0)
    assert await store.feed.quarantined(0, "probe") == []
    assert (await lag_of(store)).notes == 1
    probe.fails.clear()
    assert await runner.tick("probe", 0) == 1
    assert (await lag_of(store)).notes == 0


async def test_projectors_share_the_work(store: Store):
    """A second projector would do all the work of the first again, or miss half of the jobs."""
    floor = Floor(store)
    one, two = Probe(), Probe()
    async with projecting(store, one) as first, projecting(store, two) as second:
        await wait_until(lambda: caught_up(store, ["probe"]))
        one.seen.clear()
        two.seen.clear()
        jobs = [await floor.submit() for _ in range(60)]
        await wait_until(lambda: {*one.seen, *two.seen} >= set(jobs))
        await wait_until(lambda: caught_up(store, ["probe"]))
        consumers = await store.client.xinfo_consumers(FEED, "probe")
    assert first.consumer != second.consumer
    assert {row["name"].decode() for row in consumers} <= {first.consumer, second.consumer}
    assert len(one.seen) + len(two.seen) == len(jobs)


async def test_a_projection_hears_of_news_at_once(store: Store, monkeypatch: pytest.MonkeyPatch):
    """A list would be a second behind on an idle system."""
    monkeypatch.setattr("streamjobs.projections.runner._POLL", 60.0)
    probe = Probe()
    async with projecting(store, probe):
        await wait_until(lambda: caught_up(store, ["probe"]))
        job_id = await Floor(store).submit()
        await wait_until(lambda: job_id in probe.seen, timeout=30.0)


async def test_drained_it_ends_what_it_has_read_and_leaves(store: Store):
    """A deployment would leave notes that wait for a claim, and a consumer for each pod that ever was."""
    held, floor = Held(), Floor(store)
    runner = runner_of(store, held)
    running = asyncio.create_task(runner.run())
    jobs = [await floor.submit() for _ in range(3)]
    await wait_until(lambda: held.inside)
    runner.drain()
    held.go.set()
    await running
    assert set(held.seen) <= set(jobs)
    assert await store.client.xinfo_consumers(FEED, "probe") == []
    assert (await lag_of(store)).pending == 0


# --- quarantine


async def test_a_job_that_fails_is_set_aside_and_others_go_on(store: Store):
    """One bad log would stop every list and every statistic."""
    floor, probe = Floor(store), Probe()
    runner = runner_of(store, probe)
    await runner.tick("probe", 0)
    bad, good = await floor.submit(), await floor.submit()
    probe.fails = {bad: ValueError("no such \ud800 thing")}
    assert await runner.tick("probe", 0) == 2
    (known,) = await store.feed.quarantined(0, "probe")
    assert (known.job, known.error, known.seq) == (bad, "ValueError: no such \ufffd thing", 1)
    assert abs(known.ts - await store.now_ms()) < 60_000
    (info,) = [info for info in await store.feed.all() if info.name == "probe"]
    assert (info.quarantined, info.errors, info.notes) == (1, [known], 0)
    assert good in probe.seen
    assert await runner.tick("probe", 0) == 0


async def test_what_is_set_aside_is_tried_again_when_asked(store: Store):
    """After a repair the jobs that failed would be missing for ever."""
    floor, probe = Floor(store), Probe()
    runner = runner_of(store, probe)
    await runner.tick("probe", 0)
    bad = [await floor.submit() for _ in range(150)]
    probe.fails = {job: RuntimeError("broken") for job in bad}
    await runner.tick("probe", 0)
    await runner.tick("probe", 0)
    probe.fails = {bad[0]: RuntimeError("broken still")}
    probe.seen.clear()
    assert sorted(await store.feed.retry("probe")) == sorted(bad)
    assert await store.feed.retry("probe") == []
    while await runner.tick("probe", 0):
        pass
    assert sorted(probe.seen) == sorted(bad)
    assert [one.job for one in await store.feed.quarantined(0, "probe")] == [bad[0]]


async def test_a_job_that_recovers_leaves_the_quarantine(store: Store):
    """The list of errors would name jobs with which nothing is wrong any more."""
    floor, probe = Floor(store), Probe()
    runner = runner_of(store, probe)
    await runner.tick("probe", 0)
    job_id = await floor.submit()
    probe.fails = {job_id: RuntimeError("broken")}
    await runner.tick("probe", 0)
    probe.fails = {job_id: JobNotFound("gone")}
    await store.jobs.cancel(job_id)
    await runner.tick("probe", 0)
    assert await store.feed.quarantined(0, "probe") == []


async def test_a_projection_that_fails_on_everything_stops(store: Store, monkeypatch: pytest.MonkeyPatch):
    """A broken release would fill Redis with errors, and its lag would say that all is well."""
    monkeypatch.setattr("streamjobs.store.feed._MAX_QUARANTINED", 2)
    for number in range(2):
        await store.feed.quarantine(0, "probe", Quarantined(f"j{number}", "x", 1, 1))
    await store.feed.quarantine(0, "probe", Quarantined("j1", "again", 2, 2))
    floor, probe = Floor(store), Probe()
    runner = runner_of(store, probe)
    await runner.tick("probe", 0)
    job_id = await floor.submit()
    probe.fails = {job_id: RuntimeError("broken")}
    with pytest.raises(StoreFull):
        await runner.tick("probe", 0)
    assert (await lag_of(store)).notes == 1


# --- the feed


async def test_the_feed_keeps_what_the_slowest_has_not_read(store: Store):
    """Trimmed by the fastest it would lose the others' notes; never trimmed it would always be at its cap."""
    floor, fast, slow = Floor(store), Probe("fast"), Probe("slow")
    runner = runner_of(store, fast, slow)
    for name in ("fast", "slow"):
        await runner.tick(name, 0)
    jobs = [await floor.submit() for _ in range(5)]
    while await runner.tick("fast", 0):
        pass
    assert await store.feed.trim(0) == 0
    notes = await store.feed.read(0, "slow", "one", 2)
    assert await store.feed.trim(0) == 0, "what is read and not done may be read again"
    await store.feed.ack(0, "slow", notes.entries, [])
    assert await store.feed.trim(0) == 2
    await store.feed.read(0, "slow", "one", 1)
    later = await store.feed.read(0, "slow", "two", 2)
    await store.feed.ack(0, "slow", later.entries, [])
    assert await store.feed.trim(0) == 0, "the oldest that is pending is not the last"
    assert (await store.feed.read(0, "slow", "one", 9)).jobs == {jobs[2]: 1}
    assert await store.client.xlen(FEED) == 3


async def test_done_is_trimmed_whole(store: Store):
    """Each partition would keep notes that nobody needs."""
    floor, probe = Floor(store), Probe()
    runner = runner_of(store, probe)
    await runner.tick("probe", 0)
    await floor.submit()
    await runner.tick("probe", 0)
    assert await store.feed.trim(0) == 1
    assert await store.client.xlen(FEED) == 0
    await floor.submit()
    assert (await lag_of(store)).notes == 1
    assert await runner.tick("probe", 0) == 1


async def test_lag_says_how_many_and_how_old(store: Store):
    """Nobody would see that lists are minutes behind."""
    floor, probe = Floor(store), Probe()
    runner = runner_of(store, probe)
    await runner.tick("probe", 0)
    await runner.rebuild()
    lag = await lag_of(store)
    assert (lag.notes, lag.pending, lag.seconds, lag.quarantined, lag.rebuild) == (0, 0, 0.0, 0, "")
    for _ in range(3):
        await floor.submit()
    await store.client.xadd(FEED, {"n": "x 1 y"})
    lag = await lag_of(store)
    assert (lag.notes, lag.pending) == (4, 0)
    await store.feed.read(0, "probe", "dead", 1)
    lag = await lag_of(store)
    assert (lag.notes, lag.pending) == (4, 1)
    assert 0 <= lag.seconds < 60
    await store.client.xadd("sj:{0}:feed", {"n": "x 1 y"})
    await runner.keep()
    assert metrics.PROJECTION_LAG.labels("probe")._value.get() == 5
    assert metrics.PROJECTION_LAG_SECONDS.labels("probe")._value.get() >= 0


async def fill(store: Store, count: int, floor: Floor) -> list[str]:
    """Jobs whose notes come one by one, and more than the cap lets stay."""
    jobs = [await floor.submit() for _ in range(count)]
    await store.client.xtrim(FEED, maxlen=count // 2, approximate=False)
    return jobs


@pytest.mark.parametrize("has_read", [False, True])
async def test_overtaken_by_the_cap_it_goes_over_all_jobs(store: Store, has_read: bool):
    """A projector that was away for too long would leave jobs out for ever."""
    floor, probe = Floor(store), Probe()
    runner = runner_of(store, probe)
    await runner.tick("probe", 0)
    await runner.rebuild()
    await floor.submit()
    if has_read:
        await settle(runner, store)
    jobs = await fill(store, 20, floor)
    await settle(runner, store)
    assert set(probe.seen) >= set(jobs)
    assert (await lag_of(store))[1:3] == (0, 0)
    probe.seen.clear()
    await floor.submit()
    await settle(runner, store)
    assert len(probe.seen) == 1, "once is enough"


async def test_a_hole_behind_which_it_reads_on_is_seen(store: Store):
    """Trimmed between two reads: the second would go on behind the hole, and nobody would know."""
    floor, probe = Floor(store), Probe()
    runner = runner_of(store, probe)
    await settle(runner, store)
    await floor.submit()
    await runner.tick("probe", 0)
    await store.feed.trim(0)
    jobs = await fill(store, 6, floor)
    await runner.tick("probe", 0)
    assert (await lag_of(store)).rebuild.startswith("behind ")
    assert not set(probe.seen) >= set(jobs)
    await runner.rebuild()
    assert set(probe.seen) >= set(jobs)
    assert (await lag_of(store)).rebuild == ""


async def test_the_cap_takes_nothing_that_was_read(store: Store):
    """Each projection would go over all jobs whenever a slower one is overtaken."""
    floor, fast, slow = Floor(store), Probe("fast"), Probe("slow")
    runner = runner_of(store, fast, slow)
    await settle(runner, store)
    for _ in range(10):
        await floor.submit()
    while await runner.tick("fast", 0):
        pass
    await floor.submit()
    await store.client.xtrim(FEED, maxlen=5, approximate=False)
    await runner.tick("fast", 0)
    await runner.tick("slow", 0)
    assert (await lag_of(store, "fast")).rebuild == ""
    assert (await lag_of(store, "slow")).rebuild.startswith("behind ")


async def test_the_cap_takes_what_a_dead_one_had_read(store: Store):
    """Its notes would be gone with it: claimed, they are only ids."""
    floor, probe = Floor(store), Probe()
    runner = runner_of(store, probe)
    await settle(runner, store)
    await floor.submit()
    await store.feed.read(0, "probe", "dead", 5)
    await store.client.xtrim(FEED, maxlen=0, approximate=False)
    await store.feed.claim(0, "probe", runner.consumer, 0, "0-0")
    assert (await lag_of(store)).rebuild.startswith("behind ")


async def test_the_cap_takes_what_it_has_in_hand(store: Store):
    """After an outage it would acknowledge notes whose jobs it never heard of."""
    floor, probe = Floor(store), Probe()
    runner = runner_of(store, probe)
    await settle(runner, store)
    jobs = [await floor.submit() for _ in range(2)]
    await store.feed.read(0, "probe", runner.consumer, 5)
    await store.client.xtrim(FEED, maxlen=1, approximate=False)
    await runner.tick("probe", 0)
    assert probe.seen == jobs[1:]
    assert (await lag_of(store)).rebuild.startswith("behind ")
    await settle(runner, store)
    assert set(probe.seen) == set(jobs)
    assert (await lag_of(store)).pending == 0


async def test_a_new_projection_sees_the_old_jobs(store: Store):
    """Turned on a year later, a list would begin with today."""
    floor = Floor(store)
    old = [await floor.live() for _ in range(3)]
    await store.client.delete(FEED)
    probe = Probe()
    async with projecting(store, probe):
        await wait_until(lambda: set(probe.seen) >= set(old))


async def test_a_lost_feed_is_no_end(store: Store):
    """After a failover to an empty replica projectors would spin on NOGROUP."""
    floor, probe = Floor(store), Probe()
    async with projecting(store, probe):
        first = await floor.submit()
        await wait_until(lambda: first in probe.seen)
        await store.client.delete(FEED)
        second = await floor.submit()
        await wait_until(lambda: second in probe.seen)


# --- dead projectors


async def test_a_dead_projectors_notes_are_taken_over(store: Store):
    """A killed pod would take the jobs it had just read with it."""
    floor, probe = Floor(store), Probe()
    runner = runner_of(store, probe)
    await settle(runner, store)
    jobs = [await floor.submit() for _ in range(150)]
    await store.feed.read(0, "probe", "dead", 120)
    while await runner.tick("probe", 0):
        pass
    assert len(set(probe.seen)) == 30
    await runner.keep()
    assert (await lag_of(store)).pending == 120, "nobody is dead who was here just now"
    await asyncio.sleep(store.settings.lease + 0.05)
    for _ in range(2):  # a hundred at once, the next ones where the first call stopped
        await runner.keep()
        while await runner.tick("probe", 0):
            pass
    assert set(probe.seen) == set(jobs)
    assert (await lag_of(store))[1:3] == (0, 0)


async def test_consumers_that_are_gone_are_removed(store: Store, redis: RedisProcess):
    """Every pod that ever was would be listed, for ever."""
    feed, probe = store.feed, Probe()
    runner = await carry(store, probe)
    await feed.leave(0, "probe", runner.consumer)
    job_id = await Floor(store).submit()
    await feed.read(0, "probe", "dead", 5)
    with redis.client() as client:
        client.xgroup_createconsumer(FEED, "probe", "idle")
    await asyncio.sleep(0.02)
    assert await feed.reap(0, "probe", "me", 60) == []
    assert await feed.reap(0, "probe", "me", 0.01) == ["idle"]
    assert (await feed.read(0, "probe", "dead", 5)).jobs == {job_id: 1}, "what it had read is still its own"
    await feed.leave(0, "probe", "dead")
    assert (await lag_of(store)).pending == 1


# --- rebuild


async def test_one_projector_rebuilds(store: Store):
    """With ten projectors every log would be read ten times."""
    floor, one, two = Floor(store), Probe(), Probe()
    first, second = runner_of(store, one), runner_of(store, two)
    await settle(first, store)
    await floor.submit()
    await settle(first, store)
    await store.feed.ask_rebuild("probe")
    request = await store.feed.begin_rebuild(0, "probe", first.consumer, 30)
    assert request.startswith("asked ")
    await second.rebuild()
    assert two.seen == []
    await store.feed.ask_rebuild("probe")
    await store.feed.finish_rebuild(0, "probe", second.consumer, request)
    assert not await store.feed.hold_rebuild(0, "probe", second.consumer, 30)
    assert await store.feed.hold_rebuild(0, "probe", first.consumer, 30)
    await asyncio.sleep(0.002)
    await store.feed.ask_rebuild("probe")
    await store.feed.finish_rebuild(0, "probe", first.consumer, request)
    await second.rebuild()
    assert len(two.seen) == 1, "what was asked for meanwhile is done too"


async def test_a_projector_that_lost_its_rebuild_stops(store: Store, monkeypatch: pytest.MonkeyPatch):
    """One that was paused would go on beside the one that took over, and call it done too early."""
    probe = Probe()
    runner = runner_of(store, probe)
    await settle(runner, store)
    await Floor(store).submit()
    await store.feed.ask_rebuild("probe")

    async def lost(self: Feed, *_: Any) -> bool:
        return False

    monkeypatch.setattr(Feed, "hold_rebuild", lost)
    await runner.rebuild()
    assert (await lag_of(store)).rebuild.startswith("asked ")


async def test_rebuilt_while_jobs_run_it_is_the_same(store: Store):
    """A rebuild would need the system to stand still."""
    floor = Floor(store)
    async with projecting(store), projecting(store):
        for round_number in range(6):
            await asyncio.gather(*(floor.submit(owner=owner) for owner in "abc"))
            await floor.live(owner="a")
            for name in ("index", "stats"):
                await store.feed.ask_rebuild(name)
            await floor.live(owner="b", end="failed")
            if round_number % 2:
                await store.jobs.cancel(await floor.submit(owner="c"))
        await wait_until(lambda: caught_up(store), 60)
    for owner in "abc":
        assert await shown_index(store, owner) == await right_index(store, owner)
    await same_as_rebuilt(store)


async def same_as_rebuilt(store: Store) -> None:
    """Statistics as they came about are those that the logs give."""
    incremental = plain(await store.stats.totals())
    await store.stats.reset(0)
    for projection in build(["stats"], store):
        async for page in store.feed.jobs(0):
            for job_id in page:
                await projection.advance(job_id)
    assert plain(await store.stats.totals()) == incremental


def test_a_projection_that_nobody_knows_is_refused(settings: Any):
    """A mistyped name would run nothing, quietly."""
    with pytest.raises(ConfigError, match="indx"):
        build(["indx"], Store(settings, None))
