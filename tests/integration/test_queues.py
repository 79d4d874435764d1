"""What is told of queues on a real Redis: dashboards and autoscalers read it."""

from __future__ import annotations

from streamjobs.store import QueueInfo, Store, Submission
from tests.conftest import RedisProcess, fast_settings


async def test_queues_are_counted_over_all_partitions(redis: RedisProcess):
    """An autoscaler would see one partition only, and a queue that is no longer declared not at all."""
    settings = fast_settings(redis.url, partitions=3, queues=("default", "bulk", "old"), owner_limit=2)
    store = await Store.open(settings)
    owners = ["anonymous", "anna", "bob@example.org", "x", "y", "z"]
    await store.jobs.submit_many(Submission(kind="work", owner=o) for o in owners for _ in range(3))
    await store.jobs.submit(Submission(kind="work", queue="old", priority="low"))
    taken = await store.work.take(0, "w1", 1, 1, ["default"])
    await store.strikes.strike("queue", "bulk")
    await store.aclose()

    store = await Store.open(
        fast_settings(redis.url, partitions=3, queues=("default", "bulk"), owner_limit=2)
    )
    infos = {info.name: info for info in await store.queues.all()}
    await store.aclose()
    assert list(infos) == ["default", "bulk", "old"]
    assert len(taken.leases) == 1
    default, old = infos["default"], infos["old"]
    assert (default.waiting, default.held, default.running, default.struck) == (11, 6, 1, False)
    assert infos["bulk"] == QueueInfo("bulk", 0, 0, 0, 0.0, True)
    assert (old.waiting, old.running) == (1, 0)
    assert 0 <= old.oldest_wait <= default.oldest_wait < 60


async def test_the_oldest_ticket_is_found_behind_the_first_stream(store: Store):
    """A low job that waits since yesterday would not be seen behind an urgent one of now."""
    await store.client.xadd("sj:{0}:work:default:low", {"j": "x", "d": ""}, id="1000-0")
    await store.jobs.submit(Submission(kind="work", priority="high"))
    (info,) = await store.queues.all()
    assert info.oldest_wait > 1e9
