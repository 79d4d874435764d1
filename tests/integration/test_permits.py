"""Permits on a real Redis: all workers together use no more than there are."""

from __future__ import annotations

import asyncio

import pytest

from streamjobs.errors import Invalid
from streamjobs.store import Store


async def test_all_who_ask_share_them(store: Store):
    """Ten workers would each keep the limit, and the provider would see ten times as much."""
    other = await Store.open(store.settings)
    asks = [
        one.permits.acquire("tool:search", rate=0.01, burst=3, max_wait=0)
        for one in (store, other)
        for _ in range(5)
    ]
    answers = await asyncio.gather(*asks)
    await other.aclose()
    assert sum(permit.granted for permit in answers) == 3
    assert all(0 <= permit.wait <= 100 for permit in answers)
    assert (await store.permits.acquire("tool:other", rate=0.01, burst=1, max_wait=0)).granted


async def test_one_that_is_granted_for_later_is_reserved(store: Store):
    """Two callers would wait for the same permit, and use it both."""
    waits = [await store.permits.acquire("a", rate=0.1, burst=1, max_wait=15) for _ in range(3)]
    assert [permit.granted for permit in waits] == [True, True, False]
    assert waits[0].wait == 0
    assert 5 < waits[1].wait <= 10
    assert 15 < waits[2].wait <= 20


async def test_they_come_back(store: Store):
    """A tool that was used once would be refused for ever."""
    for _ in range(5):
        permit = await store.permits.acquire("a", rate=50, burst=1, max_wait=1)
        assert permit.granted
        await asyncio.sleep(permit.wait)


@pytest.mark.parametrize(
    ("name", "rate", "burst"), [("", 1, 1), ("a b", 1, 1), ("a", 0, 1), ("a", float("nan"), 1), ("a", 1, 0)]
)
async def test_what_cannot_be_kept_is_refused(store: Store, name: str, rate: float, burst: int):
    """A limit that was mistyped would be none, or stop the tool for ever."""
    with pytest.raises(Invalid):
        await store.permits.acquire(name, rate=rate, burst=burst, max_wait=0)
