"""Strikes on a real Redis: what is stopped stays stopped everywhere, and goes on when it is lifted."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from streamjobs.errors import Invalid, UnknownQueue
from streamjobs.store import Store, Submission
from streamjobs.store.doctor import Doctor
from tests.conftest import RedisProcess, fast_settings


@pytest.fixture
async def wide(redis: RedisProcess) -> AsyncIterator[Store]:
    """A store of three partitions and two queues."""
    store = await Store.open(fast_settings(redis.url, partitions=3, queues=("default", "bulk")))
    yield store
    await store.aclose()


async def taken(store: Store, number: int, *queues: str) -> list[str]:
    """The kinds of all jobs that can be taken now, from every partition."""
    kinds: list[str] = []
    for partition in store.partitions:
        found = await store.work.take(partition, "w1", number, 50, queues or ("default",))
        kinds += [lease.kind for lease in found.leases]
    return sorted(kinds)


async def submit(store: Store, kind: str, **fields: Any) -> list[str]:
    """A job of that kind in every partition."""
    owners = ["anonymous", "anna", "bob@example.org", "x", "y", "z"]
    receipts = await store.jobs.submit_many(
        [Submission(kind=kind, owner=owner, **fields) for owner in owners]
    )
    ids = [receipt.job_id for receipt in receipts]
    assert {job_id[:2] for job_id in ids} == {"j0", "j1", "j2"}
    return ids


async def test_a_struck_kind_stops_everywhere(wide: Store):
    """An operator who stops a workflow that does harm would stop it for some owners only."""
    await submit(wide, "harm")
    await submit(wide, "good")
    assert await wide.strikes.strike("kind", "harm", by="op@example.org", reason='it "harms"')
    assert await taken(wide, 1) == ["good"] * 6
    assert (await Doctor(wide).examine()).violations == []
    assert await wide.strikes.lift("kind", "harm")
    for partition in wide.partitions:
        await wide.work.wake(partition)
    assert await taken(wide, 2) == ["harm"] * 6


async def test_a_struck_queue_keeps_its_jobs(wide: Store):
    """Stopping a queue would lose its jobs, or the others' with it."""
    await submit(wide, "slow", queue="bulk")
    await submit(wide, "quick")
    await wide.strikes.strike("queue", "bulk")
    assert await taken(wide, 1, "bulk", "default") == ["quick"] * 6
    found = await wide.work.take(0, "w2", 1, 5, ["bulk"])
    assert len(found.ends) == 4, "the worker knows where to block, and does not spin"
    assert not await wide.work.wait_for_tickets(wide.client, found.ends, 0.01)
    await wide.strikes.lift("queue", "bulk")
    assert await taken(wide, 2, "bulk", "default") == ["slow"] * 6


async def test_all_that_is_struck_is_listed(wide: Store):
    """Nobody would find out why nothing runs, or whom to ask."""
    assert await wide.strikes.all() == []
    before = await wide.now_ms()
    assert await wide.strikes.strike("tool", "search", by="op", reason="quota")
    assert not await wide.strikes.strike("tool", "search", by="somebody else")
    assert await wide.strikes.strike("queue", "bulk")
    queue, tool = await wide.strikes.all()
    assert (queue.scope, queue.name, queue.by, queue.reason) == ("queue", "bulk", "", "")
    assert (tool.scope, tool.name, tool.by, tool.reason) == ("tool", "search", "op", "quota")
    assert before <= tool.since_ms <= await wide.now_ms()
    assert await wide.strikes.lift("tool", "search")
    assert not await wide.strikes.lift("tool", "search")
    assert [strike.scope for strike in await wide.strikes.all()] == ["queue"]


@pytest.mark.parametrize("name", ["", "a b", "a|b", "a" * 65, "a\n"])
async def test_a_name_that_cannot_be_is_refused(store: Store, name: str):
    """An operator who mistypes would believe that it has stopped."""
    with pytest.raises(Invalid):
        await store.strikes.strike("kind", name)
    with pytest.raises(Invalid):
        await store.strikes.lift("tool", name)
    with pytest.raises(UnknownQueue):
        await store.strikes.strike("queue", name)


async def test_only_queues_kinds_and_tools_can_be_struck(store: Store):
    """A strike of something else would be listed and have no effect."""
    scope: Any = "owner"
    with pytest.raises(Invalid):
        await store.strikes.strike(scope, "anna")
    with pytest.raises(Invalid):
        await store.strikes.strike("kind", "a", reason="\ud800")
