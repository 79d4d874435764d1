"""The dead list on a real Redis: all that failed, newest first, each once, whatever fails meanwhile."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from streamjobs import events as ev
from streamjobs.errors import InvalidCursor
from streamjobs.events import ErrorInfo
from streamjobs.store import Batch, DeadFilter, DeadJob, Lease, Store, Submission
from tests.conftest import RedisProcess, fast_settings

ALL = DeadFilter()


@pytest.fixture
async def wide(redis: RedisProcess) -> AsyncIterator[Store]:
    """A store of three partitions and two queues."""
    store = await Store.open(fast_settings(redis.url, partitions=3, queues=("default", "bulk")))
    yield store
    await store.aclose()


class Failing:
    """Lets jobs fail."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.number = 0

    async def take(self, partition: int) -> list[Lease]:
        self.number += 1
        taken = await self.store.work.take(partition, "w1", self.number, 400, ["default", "bulk"])
        return taken.leases

    async def fail(self, code: str = "boom", count: int = 1, **fields: Any) -> list[str]:
        """So many jobs that all fail in one call, within one millisecond or two."""
        await self.store.jobs.submit_many(Submission(**({"kind": "work"} | fields)) for _ in range(count))
        failed: list[str] = []
        for partition in self.store.partitions:
            leases = await self.take(partition)
            event = ev.JobFailed(error=ErrorInfo(code, f"it went {code}"))
            events = [(event.type, ev.encode_event(event))]
            await self.store.work.append(
                partition, [Batch(lease.job_id, lease.epoch, 1, events, "failed") for lease in leases]
            )
            failed += [lease.job_id for lease in leases]
        return failed


async def everything(store: Store, where: DeadFilter = ALL, *, limit: int = 7) -> list[DeadJob]:
    found, cursor = await store.dead.page(where, limit=limit)
    while cursor:
        more, cursor = await store.dead.page(where, limit=limit, before=cursor)
        assert len(more) <= limit
        found += more
    return found


async def test_it_says_what_is_known(wide: Store):
    """Somebody would have to read a job's log to learn why it failed."""
    (job_id,) = await Failing(wide).fail("timeout", owner="anna", queue="bulk")
    (job,) = await everything(wide)
    assert (job.id, job.owner, job.kind, job.queue) == (job_id, "anna", "work", "bulk")
    assert (job.code, job.message) == ("timeout", "it went timeout")
    assert (job.attempts, job.crashes, job.worker, job.rerun_as) == (1, 0, "w1", "")
    assert abs(job.ended_ms - await wide.now_ms()) < 60_000


async def test_every_failed_job_comes_once_in_order(wide: Store):
    """Pages would miss jobs that failed in the same millisecond or another partition, or show one twice."""
    failing = Failing(wide)
    ids = [job for owner in ("anna", "bob", "x") for job in await failing.fail(owner=owner, count=100)]
    found = await everything(wide, limit=7)
    assert sorted(job.id for job in found) == sorted(ids)
    places = [(job.ended_ms, job.id) for job in found]
    assert places == sorted(places, reverse=True)
    assert [job.id for job in await everything(wide, limit=1000)] == [job.id for job in found]


async def test_what_fails_meanwhile_moves_nothing(wide: Store):
    """A page that is turned while jobs fail would show some twice."""
    failing = Failing(wide)
    ids = await failing.fail(count=4)
    first, cursor = await wide.dead.page(ALL, limit=2)
    await failing.fail(count=3)
    second, cursor = await wide.dead.page(ALL, limit=2, before=cursor)
    assert cursor == ""
    assert sorted(job.id for job in first + second) == sorted(ids)


async def test_a_filter_finds_its_jobs(wide: Store):
    """Running again what one bad release broke would mean running everything again."""
    failing = Failing(wide)
    (a,) = await failing.fail("a", owner="anna")
    before = await wide.now_ms()
    while await wide.now_ms() == before:
        pass
    (b,) = await failing.fail("b", kind="other")
    (c,) = await failing.fail("b", queue="bulk")
    wanted = {
        "owner": {"anna": {a}, "nobody": set[str]()}, "kind": {"other": {b}, "work": {a, c}},
        "queue": {"bulk": {c}}, "code": {"a": {a}, "b": {b, c}},
        "since_ms": {before + 1: {b, c}}, "until_ms": {before + 1: {a}},
    }  # fmt: skip
    for name, cases in wanted.items():
        for value, ids in cases.items():
            where = DeadFilter(**{name: value})  # type: ignore[arg-type]
            assert {job.id for job in await everything(wide, where)} == ids, (name, value)


async def test_a_rare_match_is_found_behind_many(store: Store):
    """A page would be empty, and look like the last."""
    failing = Failing(store)
    rare = await failing.fail("rare")
    for _ in range(3):
        await failing.fail("common", count=150)
    assert [job.id for job in await everything(store, DeadFilter(code="rare"))] == rare


async def test_completed_and_cancelled_jobs_are_not_in_it(store: Store):
    """The list would be every job there was."""
    job_id = (await store.jobs.submit(Submission(kind="work"))).job_id
    await store.jobs.cancel(job_id)
    assert await everything(store) == []


async def test_one_that_is_gone_is_left_out(store: Store):
    """A page would fail, or show a job without anything, until the sweep has been."""
    failing = Failing(store)
    gone, stays = await failing.fail(count=2)
    await store.client.delete(*(f"sj:{{0}}:job:{gone}{rest}" for rest in ("", ":events")))
    assert [job.id for job in await everything(store)] == [stays]


@pytest.mark.parametrize("cursor", ["x", "1-x", "-1-j0-" + "a" * 26, "1-j0-" + "a" * 26 + "\n", "9" * 400])
async def test_a_cursor_that_is_none_is_refused(store: Store, cursor: str):
    """A mistyped one would start over, or break the page."""
    with pytest.raises(InvalidCursor):
        await store.dead.page(ALL, before=cursor)
