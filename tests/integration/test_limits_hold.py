"""Limits under concurrency: three workers at once, and what Redis and the logs say of them.

Every instant looked at is one of Redis's own: no worker is asked what it runs.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

from streamjobs import App, Context
from streamjobs.store import Store, Submission
from tests.conftest import RedisProcess, wait_until
from tests.harness import Lab, lab, working

WORKERS = 3
STARTS = {"job.started"}
STOPS = {"job.completed", "job.failed", "job.cancelled", "job.waiting", "job.retrying", "job.requeued"}


class Interval(NamedTuple):
    """One time that a job ran, by Redis's clock: its end is stamped before it is written, never after."""

    began: int
    ended: int
    job: str


class Watch:
    """Looks at the running jobs of an owner, as Redis has them, all the time."""

    def __init__(self, store: Store, owner: str) -> None:
        self._store = store
        self._key = f"sj:{{0}}:running:{owner}"
        self.seen: list[int] = []

    async def run(self) -> None:
        client: Any = self._store.client
        while True:
            self.seen.append(await client.scard(self._key))
            await asyncio.sleep(0.001)


def work() -> App:
    app = App(builtin_tools=False)

    @app.workflow("short")
    async def short(ctx: Context) -> int:
        """Work for a moment, wait parked, and work again."""
        for number in range(2):
            await ctx.step("work", asyncio.sleep, 0.01)
            if number == 0:
                await ctx.sleep(0.15)
        return 1

    app.workflow("other")(short)
    return app


@contextlib.asynccontextmanager
async def fleet(redis: RedisProcess, app: App, **changes: Any) -> AsyncIterator[Lab]:
    """A lab and three workers, each with connections of its own."""
    settings = {"park_after": 0.02, "concurrency": 16} | changes
    async with lab(redis.url, **settings) as bench, contextlib.AsyncExitStack() as stack:
        for _ in range(WORKERS):
            store = await Store.open(bench.store.settings)
            stack.push_async_callback(store.aclose)
            await stack.enter_async_context(working(store, app))
        yield bench


async def intervals(bench: Lab, jobs: Sequence[str], stops: frozenset[str]) -> list[Interval]:
    """When each of these ran, until an event of `stops`."""
    found: list[Interval] = []
    for job_id in jobs:
        began = 0
        for event in await bench.log(job_id):
            if event.type in STARTS and not began:
                began = event.data["ts"]
            elif event.type in stops and began:
                found.append(Interval(began, event.data["ts"], job_id))
                began = 0
    return found


def most_at_once(ran: Sequence[Interval]) -> int:
    """How many of the intervals there were at the worst instant."""
    changes = sorted([(i.began, 1) for i in ran] + [(i.ended, -1) for i in ran])
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


async def test_an_owner_never_runs_more_than_its_limit(redis: RedisProcess):
    """One tenant's thousand jobs would take every slot of the fleet."""
    async with fleet(redis, work(), owner_limit=4) as bench:
        watch = Watch(bench.store, "ann")
        watching = asyncio.create_task(watch.run())
        jobs = [await bench.submit("short", owner="ann") for _ in range(60)]
        others = [await bench.submit("short", owner="bob") for _ in range(10)]
        await bench.ended(*jobs, *others)
        watching.cancel()
        ran = await intervals(bench, jobs, frozenset(STOPS))
        await bench.healthy()
    assert max(watch.seen) == 4, Counter(watch.seen)
    assert most_at_once(ran) <= 4
    assert len(ran) > 1.5 * len(jobs), "parked ones, but for late ones, gave their place to others"


async def test_of_one_concurrency_key_one_job_runs_from_its_start_to_its_end(redis: RedisProcess):
    """Two answers in one conversation would be written at once."""
    async with fleet(redis, work()) as bench:
        by_key = {
            key: [await bench.submit("short", owner="ann", concurrency_key=key) for _ in range(8)]
            for key in ("k1", "k2", "k3")
        }
        jobs = [job for of_key in by_key.values() for job in of_key]
        await bench.ended(*jobs)
        ends = frozenset({"job.completed"})
        ran = {key: await intervals(bench, of_key, ends) for key, of_key in by_key.items()}
        await bench.healthy()
    for key, its in ran.items():
        assert most_at_once(its) == 1, its
        assert [one.job for one in sorted(its)] == by_key[key], "they start in the order they came in"
    assert most_at_once([one for its in ran.values() for one in its]) > 1, "keys do not wait for each other"


async def test_a_struck_kind_starts_nowhere(redis: RedisProcess):
    """An operator who stops a kind that does harm must not have one worker that did not hear of it."""
    async with fleet(redis, work()) as bench:
        before = [await bench.submit("short", owner="ann") for _ in range(20)]
        assert await bench.store.strikes.strike("kind", "short", by="ops")
        struck_ms = await bench.store.now_ms()
        after = [await bench.submit("short", owner="ann") for _ in range(20)]
        others = [await bench.submit("other", owner="ann") for _ in range(20)]
        await bench.ended(*others)
        first = [await first_start(bench, job) for job in (*before, *after)]
        assert not [at for at in first if at and at > struck_ms]
        assert await bench.store.strikes.lift("kind", "short")
        await bench.ended(*before, *after)
        await bench.healthy()


async def first_start(bench: Lab, job_id: str) -> int:
    """When a job was started first, 0 if it was not."""
    return next((event.data["ts"] for event in await bench.log(job_id) if event.type in STARTS), 0)


async def test_an_owner_with_5000_jobs_delays_another_by_few(redis: RedisProcess):
    """Whoever comes second would wait for all that the first one ever asked for."""
    app, started, delays = App(builtin_tools=False), Counter[str](), list[int]()

    @app.workflow("tick")
    async def tick(ctx: Context, before: int = 0) -> None:
        started[ctx.owner] += 1
        if ctx.owner == "small":
            delays.append(started["big"] - before)

    limit = 10
    async with fleet(redis, app, owner_limit=limit) as bench:
        await bench.store.jobs.submit_many(Submission(kind="tick", owner="big") for _ in range(5000))
        for _ in range(10):
            await wait_until(lambda: started["big"] > 0)
            small = await bench.submit("tick", started["big"], owner="small")
            await bench.ended(small)
        assert started["big"] < 5000, "the big owner had ended before anybody could be delayed"
    assert len(delays) == 10
    assert max(delays) <= 4 * limit, delays
