"""Limits hold over several workers: what Redis and the logs say, not what one process thinks."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from streamjobs import App, Context
from streamjobs.store import Submission
from tests.conftest import RedisProcess, wait_until
from tests.harness import Lab, lab, working

pytestmark = pytest.mark.timeout(90)


def busy_app(started: list[str]) -> App:
    app = App(builtin_tools=False)

    @app.workflow("busy")
    async def busy(ctx: Context) -> None:
        started.append(ctx.owner)
        await asyncio.sleep(0.03)

    return app


@contextlib.asynccontextmanager
async def three_workers(bench: Lab, app: App) -> AsyncIterator[None]:
    async with working(bench.store, app), working(bench.store, app), working(bench.store, app):
        yield


async def most_at_once(bench: Lab, *keys: str) -> dict[str, int]:
    """Sample the sizes of sets until cancelled; the largest of each."""
    client: Any = bench.store.client
    most = dict.fromkeys(keys, 0)
    with contextlib.suppress(asyncio.CancelledError):
        while True:
            for key in keys:
                most[key] = max(most[key], await client.scard(key))
            await asyncio.sleep(0.002)
    return most


async def overlap(bench: Lab, job_ids: list[str]) -> int:
    """How many of these jobs ran at once, by the clock of their logs; an end counts before a start."""
    moments: list[tuple[int, int]] = []
    for job_id in job_ids:
        log = await bench.log(job_id)
        moments += [(event.data["ts"], 1) for event in log if event.type == "job.started"]
        moments += [(log[-1].data["ts"], -1)]
    running = most = 0
    for _, change in sorted(moments):
        running += change
        most = max(most, running)
    return most


async def test_an_owner_never_runs_more_than_the_limit(redis: RedisProcess):
    """A limit that each worker keeps for itself is broken by the second worker."""
    owners = ("ann", "bob")
    async with lab(redis.url, owner_limit=3, concurrency=20) as bench:
        jobs = {owner: [await bench.submit("busy", owner=owner) for _ in range(30)] for owner in owners}
        names = [f"sj:{{0}}:running:{owner}" for owner in owners]
        sampling = asyncio.create_task(most_at_once(bench, *names))
        async with three_workers(bench, busy_app([])):
            await bench.ended(*jobs["ann"], *jobs["bob"], timeout=60.0)
        sampling.cancel()
        most = await sampling
        overlaps = [await overlap(bench, jobs[owner]) for owner in owners]
        held = [await bench.log(job_id) for job_id in jobs["ann"]]
        await bench.healthy()
    assert max(most.values()) <= 3, most
    assert max(overlaps) <= 3, overlaps
    assert any(event.data.get("held") == "owner_limit" for log in held for event in log), "it says so"


async def test_a_conversation_runs_one_job_at_a_time(redis: RedisProcess):
    """Two answers of one conversation would be written at once, each without the other."""
    async with lab(redis.url, concurrency=20) as bench:
        one = [await bench.submit("busy", concurrency_key="talk") for _ in range(15)]
        others = [await bench.submit("busy", concurrency_key=f"talk {n}") for n in range(10)]
        async with three_workers(bench, busy_app([])):
            await bench.ended(*one, *others, timeout=60.0)
        assert await overlap(bench, one) == 1
        assert await overlap(bench, others) > 1
        await bench.healthy()


async def test_a_struck_kind_does_not_start_anywhere(redis: RedisProcess):
    """An operator's stop that only some workers hear is none."""
    started: list[str] = []
    async with lab(redis.url) as bench:
        await bench.store.strikes.strike("kind", "busy", by="op")
        jobs = [await bench.submit("busy") for _ in range(10)]
        async with three_workers(bench, busy_app(started)):
            await bench.until(jobs[-1], "job.requeued")
            await asyncio.sleep(0.5)
            assert started == []
            assert (await bench.view(jobs[0])).held == "struck"
            await bench.store.strikes.lift("kind", "busy")
            await bench.ended(*jobs, timeout=30.0)
        await bench.healthy()
    assert len(started) == 10


async def test_five_thousand_jobs_of_one_owner_do_not_hold_up_another(redis: RedisProcess):
    """Whoever submits a backlog would make everybody else wait for it."""
    started: list[str] = []
    async with lab(redis.url, owner_limit=5, concurrency=10) as bench:
        backlog = [Submission(kind="busy", owner="big") for _ in range(5000)]
        await bench.store.jobs.submit_many(backlog)
        async with working(bench.store, busy_app(started)):
            await wait_until(lambda: len(started) >= 20)
            before = len(started)
            small = [await bench.submit("busy", owner="small") for _ in range(10)]
            await bench.ended(*small, timeout=30.0)
            since = started[before:]
    first, last = since.index("small"), len(since) - 1 - since[::-1].index("small")
    assert since[:first].count("big") <= 15, since
    assert since[: last + 1].count("big") <= 40, since
