"""The index: what lists show, filter, page and count, and that rows leave with their jobs."""

from __future__ import annotations

import random
from typing import Any

import pytest

from streamjobs.errors import InvalidCursor
from streamjobs.projections.index import IndexProjection
from streamjobs.store import JobFilter, Store, keys
from tests.conftest import RedisProcess
from tests.projections.bench import Floor, carry, right_index, shown_index, stored_index


async def ids(store: Store, **where: Any) -> list[str]:
    found: list[str] = []
    cursor = ""
    while True:
        jobs, cursor = await store.index.page("anonymous", JobFilter(**where), limit=3, before=cursor)
        found += [job.id for job in jobs]
        if not cursor:
            return found


async def delete(store: Store, job_id: str) -> None:
    await store.client.delete(keys.job_key(job_id), f"{keys.job_key(job_id)}:events")


@pytest.mark.parametrize("limit", [1, 3, 7, 500])
async def test_an_owner_sees_each_job_once(store: Store, limit: int):
    """Pages would cut jobs that were submitted together apart, lose some, or show another's."""
    floor = Floor(store)
    submitted = [await floor.submit(owner="anna") for _ in range(9)]
    for _ in range(3):
        await floor.submit(owner="bob")
    await floor.live(owner="anna")
    await carry(store)
    shown = await shown_index(store, "anna", limit)
    assert shown == await right_index(store, "anna")
    assert {job_id for job_id, *_ in shown} >= set(submitted)
    assert len(await shown_index(store, "bob", limit)) == 3
    assert await shown_index(store, "nobody", limit) == []


async def test_many_jobs_of_one_millisecond_are_paged_apart(store: Store):
    """A batch of submissions: pages would repeat or skip within it, also when the page's last job is gone."""
    floor = Floor(store)
    await floor.submit()
    for _ in range(20):
        await store.client.hset(keys.job_key(await floor.submit()), "created", 1_700_000_000_000)
    await carry(store)
    right = await right_index(store, "anonymous")
    jobs, cursor = await store.index.page("anonymous", limit=8)
    await delete(store, jobs[-1].id)
    await store.index.forget("anonymous", jobs[-1].id)
    rest, end = await store.index.page("anonymous", before=cursor)
    assert [job.id for job in jobs + rest] == [job_id for job_id, *_ in right]
    assert end == ""


async def test_filters_combine(store: Store):
    """A page of one conversation, or of what failed today, would have to read everything."""
    floor = Floor(store)
    c = await floor.live("a", thread_id="t1", message_id="m2")
    d = await floor.live("b", end="failed")
    a = await floor.submit("a", thread_id="t1", message_id="m|1")
    b = await floor.submit("b", thread_id="t1|", message_id="")
    for n, job_id in enumerate((c, d, a, b)):
        await store.client.hset(keys.job_key(job_id), "created", 1000 + n)
    await carry(store)
    assert await ids(store) == [b, a, d, c]
    assert await ids(store, thread_id="t1") == [a, c]
    assert await ids(store, thread_id="t1|") == [b]
    assert await ids(store, message_id="m|1") == [a]
    assert await ids(store, kind="a", status="completed") == [c]
    assert await ids(store, status="failed", thread_id="t1") == []
    assert await ids(store, queue="default", kind="b") == [b, d]
    assert await ids(store, queue="other") == []
    (first,), _ = await store.index.page("anonymous", JobFilter(message_id="m|1"))
    assert (first.thread_id, first.message_id, first.kind, first.status) == ("t1", "m|1", "a", "queued")
    assert first.cursor == str((await store.jobs.get(a)).last)


async def test_a_time_bounds_a_list(store: Store):
    """Yesterday's failures would be found by hand."""
    floor = Floor(store)
    jobs = [await floor.submit() for _ in range(4)]
    for n, job_id in enumerate(jobs):
        await store.client.hset(keys.job_key(job_id), "created", 1000 * (n + 1))
    await carry(store)
    assert await ids(store, since_ms=2000) == jobs[:0:-1]
    assert await ids(store, until_ms=3000) == [jobs[1], jobs[0]]
    assert await ids(store, since_ms=2000, until_ms=3000) == [jobs[1]]


async def test_a_list_shows_where_jobs_are_now(store: Store):
    """A filter for running jobs would show ended ones, as long as the projector is behind."""
    floor = Floor(store)
    job_id = await floor.submit()
    await carry(store)
    await store.jobs.cancel(job_id)
    assert await ids(store, status="queued") == []
    (job,), _ = await store.index.page("anonymous")
    assert (job.status, job.cancel_requested) == ("cancelled", True)
    assert await store.index.counts("anonymous") == {"cancelled": 1}


async def test_one_page_looks_at_so_many_rows(store: Store, monkeypatch: pytest.MonkeyPatch):
    """A filter that fits nothing would keep Redis busy for as long as the list is."""
    monkeypatch.setattr("streamjobs.store.index._SCAN", 10)
    floor = Floor(store)
    rare = await floor.submit("rare")
    for _ in range(24):
        await floor.submit()
    await carry(store)
    jobs, cursor = await store.index.page("anonymous", JobFilter(kind="rare"))
    assert (jobs, bool(cursor)) == ([], True)
    assert await ids(store, kind="rare") == [rare]


async def test_rows_leave_with_their_jobs(store: Store, redis: RedisProcess):
    """Lists would show what cannot be opened, and the index would grow for ever."""
    floor = Floor(store)
    jobs = [await floor.submit(owner=owner) for owner in ("a", "b") for _ in range(3)]
    await carry(store)
    for job_id in jobs[1:]:
        await delete(store, job_id)
    assert [job for job, *_ in await shown_index(store, "a")] == [jobs[0]]
    assert await store.index.counts("a") == {"queued": 1}
    for _ in range(2):
        await IndexProjection(store).sweep(0)
    with redis.client() as client:
        assert client.keys("*ndex*:b") == []
    assert await store.client.zrange("sj:{0}:indexes", 0, -1) == [b"a"]


async def test_the_sweep_goes_round(store: Store, monkeypatch: pytest.MonkeyPatch):
    """Beyond the first rows nothing would ever be swept."""
    monkeypatch.setattr("streamjobs.store.index._SWEEP", 4)
    floor = Floor(store)
    jobs = [await floor.submit() for _ in range(10)]
    await carry(store)
    heads = [await store.jobs.get(job) for job in jobs]
    # as lists have them: those of one millisecond are in the order of their ids
    oldest, *others = sorted(jobs, key=lambda job: (heads[jobs.index(job)].created_ms, job))
    await delete(store, oldest)
    await store.jobs.cancel(others[4])
    assert [await store.index.sweep(0) for _ in range(4)] == [(4, 0), (4, 0), (2, 1), (4, 0)]
    stored = await stored_index(store, "anonymous")
    assert len(stored["rows"]) == len(stored["order"]) == 9
    assert stored["counts"] == {b"q": b"8", b"x": b"1"}


async def test_puts_may_come_in_any_order(store: Store):
    """A late note would turn a list back."""
    floor = Floor(store)
    projection = IndexProjection(store)
    jobs = [await floor.live(end=random.choice(["completed", "failed"])) for _ in range(4)]
    for job_id in random.choices(jobs, k=20) + jobs:
        await projection.advance(job_id)
    assert await shown_index(store, "anonymous") == await right_index(store, "anonymous")
    assert sum((await store.index.counts("anonymous")).values()) == 4
    await projection.advance("j0-" + "a" * 26)


async def test_a_rebuild_gives_the_same(store: Store):
    """A damaged index could not be repaired but by hand."""
    floor = Floor(store)
    for _ in range(3):
        await floor.live(thread_id="t")
    await floor.submit()
    runner = await carry(store)
    before = await stored_index(store, "anonymous")
    await store.client.hset("sj:{0}:indexed_counts:anonymous", "q", 77)
    await store.client.zadd("sj:{0}:index:anonymous", {"j0-" + "b" * 26: 5})
    await store.feed.ask_rebuild("index")
    await runner.rebuild()
    assert await stored_index(store, "anonymous") == before


async def test_an_index_is_small(store: Store, redis: RedisProcess):
    """A million kept jobs would need gigabytes for their list alone."""
    floor = Floor(store)
    projection = IndexProjection(store)
    for _ in range(400):
        await projection.advance(await floor.submit("chat"))
    with redis.client() as client:
        names = [f"sj:{{0}}:{name}:anonymous" for name in ("index", "indexed", "indexed_counts")]
        used = sum(int(client.memory_usage(name, samples=0) or 0) for name in names)
    assert used / 400 < 260


@pytest.mark.parametrize("cursor", ["x", "1-1", "1-j0-", "-.1", "1-j0-" + "a" * 26 + "\n", "9" * 400])
async def test_a_cursor_that_is_none_is_refused(store: Store, cursor: str):
    """A mistyped one would start over, or break the list."""
    with pytest.raises(InvalidCursor):
        await store.index.page("anonymous", before=cursor)
