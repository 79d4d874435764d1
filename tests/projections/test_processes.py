"""Projectors as processes: killed, paused, drained, and over a Redis that is killed."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator

import pytest

from streamjobs.errors import StoreUnavailable
from streamjobs.faults import PROJECTOR_POINTS
from streamjobs.store import Store
from streamjobs.store.doctor import Doctor
from tests.conftest import RedisProcess, fast_settings, wait_until
from tests.harness import is_stopped
from tests.projections.bench import Floor, caught_up, projecting, projector_process, right_index, shown_index
from tests.projections.test_runner import same_as_rebuilt

OWNERS = ("anonymous", "bo")


@pytest.fixture
async def own_store(own_redis: RedisProcess) -> AsyncIterator[Store]:
    store = await Store.open(fast_settings(own_redis.url))
    yield store
    await store.aclose()


async def is_right(store: Store) -> None:
    """Lists and statistics are what the jobs' logs say, no less and no more."""
    for owner in OWNERS:
        right = await right_index(store, owner)
        assert await shown_index(store, owner) == right
        statuses = [status for _, status, _ in right]
        assert await store.index.counts(owner) == {status: statuses.count(status) for status in statuses}
    await same_as_rebuilt(store)
    assert (await Doctor(store).examine()).violations == []


async def busy(floor: Floor) -> None:
    for owner in OWNERS:
        await floor.live("chat", owner=owner)
        await floor.live(end="failed", owner=owner)
        await floor.submit(delay=60, owner=owner)


@pytest.mark.parametrize("point", [f"{point}:{n}" for point in PROJECTOR_POINTS for n in (1, 4)])
async def test_killed_there_nothing_is_lost_or_counted_twice(store: Store, point: str):
    """A pod that is killed would cost entries of a list, or be paid for twice in the statistics."""
    floor = Floor(store)
    await busy(floor)
    with projector_process(store.settings, fault=point) as victim:
        while victim.poll() is None:
            await busy(floor)
            await asyncio.sleep(0.05)
        assert victim.returncode == -signal.SIGKILL
    with projector_process(store.settings):
        await wait_until(lambda: caught_up(store), 60)
    await is_right(store)


async def test_paused_for_the_length_of_a_job_it_goes_on(store: Store):
    """A projector that was frozen would show a job as running for ever."""
    floor = Floor(store)
    with projector_process(store.settings) as paused:
        await floor.submit()
        await wait_until(lambda: caught_up(store), 60)
        paused.send_signal(signal.SIGSTOP)
        await busy(floor)
        assert (await store.stats.totals())["work", "default"]["submitted"] == 1
        paused.send_signal(signal.SIGCONT)
        await wait_until(lambda: caught_up(store), 60)
    await is_right(store)


async def test_paused_with_notes_in_hand_it_is_late_and_harmless(store: Store):
    """What another had taken over would be written a second time when it wakes."""
    floor = Floor(store)
    await busy(floor)
    with projector_process(store.settings, fault="after_notes_read:1:stop") as paused:
        await wait_until(lambda: is_stopped(paused.pid), what="the stop, with notes in hand")
        async with projecting(store):
            await wait_until(lambda: caught_up(store), 60)
            await busy(floor)
            await wait_until(lambda: caught_up(store), 60)
            paused.send_signal(signal.SIGCONT)
            await busy(floor)
            await wait_until(lambda: caught_up(store), 60)
    await is_right(store)


async def test_sigterm_drains(store: Store):
    """Each deployment would leave work to be claimed, one lease later."""
    floor = Floor(store)
    with projector_process(store.settings) as projector:
        await busy(floor)
        await wait_until(lambda: caught_up(store), 60)
        projector.send_signal(signal.SIGTERM)
        await wait_until(lambda: projector.poll() is not None, 60.0)
        assert projector.returncode == 0
    for name in ("index", "stats"):
        assert await store.client.xinfo_consumers("sj:{0}:feed", name) == []


async def test_a_projector_sweeps(store: Store):
    """With workers scaled to zero, sleepers would not wake."""
    job_id = await Floor(store).submit(delay=0.2)
    with projector_process(store.settings):

        async def is_queued() -> bool:
            return (await store.jobs.get(job_id)).status == "queued"

        await wait_until(is_queued)


async def test_redis_killed_in_the_middle(own_redis: RedisProcess, own_store: Store):
    """After an outage lists would lack jobs, or statistics count them twice; or projectors be gone."""
    floor = Floor(own_store)
    async with projecting(own_store):
        with projector_process(own_store.settings) as projector:
            for _ in range(2):
                await busy(floor)
                own_redis.kill()
                with pytest.raises(StoreUnavailable):
                    await floor.submit()
                own_redis.start()
                await busy(floor)
                await wait_until(lambda: caught_up(own_store), 60)
            assert projector.poll() is None
    assert sum(info.quarantined for info in await own_store.feed.all()) == 0
    await is_right(own_store)
