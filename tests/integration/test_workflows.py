"""Workflows on a real store: what they record, what a replay does again, and what waits give back."""

from __future__ import annotations

import asyncio
from collections import Counter

import msgspec
import pytest

from streamjobs import App, Context
from tests.conftest import RedisProcess
from tests.harness import talking

pytestmark = pytest.mark.timeout(60)


class Report(msgspec.Struct):
    """A typed result."""

    total: int
    names: list[str]


async def double(number: int) -> int:
    return number * 2


def slow_double(number: int) -> int:
    return number * 2


async def test_steps_run_once_and_their_outputs_come_back(redis: RedisProcess):
    """Without it nothing of a workflow survives its worker."""
    app = App(builtin_tools=False)

    @app.workflow("sums")
    async def sums(ctx: Context, numbers: list[int]) -> Report:
        doubled = await asyncio.gather(*(ctx.step("double", double, n) for n in numbers))
        total = await ctx.step("sum", sum, doubled)
        halved = await ctx.step(slow_double, total)
        return Report(halved, [str(n) for n in doubled])

    async with talking(redis.url, app=app) as bench:
        view = await bench.ended(await bench.submit("sums", [1, 2, 3, 3]))
    assert view.status == "completed", view.error
    assert view.result == {"total": 36, "names": ["2", "4", "6", "6"]}
    assert [step.state for step in view.steps] == ["completed"] * 6
    assert len({step.key for step in view.steps}) == 6, "the same step twice has an occurrence number"


async def test_a_replay_does_only_what_is_missing(redis: RedisProcess):
    """Without it a job that sleeps, or loses its worker, would pay twice."""
    app, calls = App(builtin_tools=False), Counter[str]()

    @app.workflow("sleepy")
    async def sleepy(ctx: Context) -> list[int]:
        async def counted(name: str) -> int:
            calls[name] += 1
            return len(calls)

        first = await ctx.step("first", counted, "first")
        await ctx.sleep(1.0)
        second = await ctx.step("second", counted, "second")
        return [first, second]

    async with talking(redis.url, app=app, park_after=0.1) as bench:
        job_id = await bench.submit("sleepy")
        view = await bench.ended(job_id)
        types = await bench.types(job_id)
        await bench.healthy()
    assert view.status == "completed", view.error
    assert view.result == [1, 2]
    assert calls == {"first": 1, "second": 1}
    assert types == [
        "job.queued", "job.started", "step.started", "step.completed", "timer.set", "job.waiting",
        "timer.fired", "job.requeued", "job.started", "step.started", "step.completed", "job.completed",
    ]  # fmt: skip
