"""What a replay makes of approvals and retries inside steps and tools that are over."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest

from streamjobs import App, Context, Retry
from streamjobs.testing import Scenario, ScriptedCall, Turn
from tests.conftest import RedisProcess, wait_until
from tests.harness import Lab, one_outcome_each, talking

PATIENT = {"park_after": 0.1, "replay_timeout": 30.0}
"""A replay that waits for something that never comes fails these tests instead of passing them late."""


def program(done: Counter[str]) -> App:
    app = App(builtin_tools=False)

    async def act(name: str) -> str:
        done[name] += 1
        return name

    async def fails_once(name: str) -> str:
        done[name] += 1
        if done[name] == 1:
            raise ConnectionError("once")
        return name

    @app.tool(effect="once", approval="Act?")
    async def acting(name: str) -> str:
        """Act."""
        return await act(name)

    @app.workflow("steps")
    async def steps(ctx: Context) -> list[Any]:
        first = await ctx.step("act", act, "one", approval="One?")
        await ctx.sleep(0.5)
        second = await ctx.step("act", act, "two", approval="Two?")
        await ctx.sleep(0.5)
        return [first, second]

    @app.workflow("tools")
    async def tools(ctx: Context) -> list[Any]:
        first = await ctx.tool(acting, name="one")
        await ctx.sleep(0.5)
        second = await ctx.tool(acting, name="two")
        await ctx.sleep(0.5)
        return [first, second]

    @app.workflow("retried")
    async def retried(ctx: Context) -> list[Any]:
        first = await ctx.step(fails_once, "one", retry=Retry(base=0.5))
        await ctx.sleep(0.5)
        return [first, await ctx.step(act, "two")]

    @app.workflow("attempts", max_attempts=2, retry=Retry(attempts=2, base=0.1))
    async def attempts(ctx: Context) -> list[Any]:
        first = await ctx.step("act", act, "one", approval="One?")
        await ctx.step("fail", fails_once, "fails", approval="Fail?")
        return [first, await ctx.step("act", act, "two", approval="Two?")]

    return app


async def approve_next(bench: Lab, job_id: str, number: int, word: str = "approve") -> None:
    await bench.until(job_id, "approval.requested", number)
    await bench.store.jobs.signal(job_id, "approval", {"decision": word}, by="a person")


async def parked(bench: Lab, job_id: str, requests: int) -> None:
    """Wait until so many approvals were asked for, and the job waits for the last without a worker."""
    await bench.until(job_id, "approval.requested", requests)

    async def is_parked() -> bool:
        return (await bench.types(job_id))[-1] == "job.waiting"

    await wait_until(is_parked, what="the job's parking")


@pytest.mark.parametrize("kind", ["steps", "tools"])
async def test_a_job_goes_on_after_what_was_approved(redis: RedisProcess, kind: str):
    """A job that slept, or lost its worker, after an approved step would hang for ever, its lease renewed."""
    done = Counter[str]()
    async with talking(redis.url, app=program(done), **PATIENT) as bench:
        job_id = await bench.submit(kind)
        for number in (1, 2):
            await parked(bench, job_id, number)
            await approve_next(bench, job_id, number)
        view = await bench.ended(job_id, timeout=25.0)
    assert view.status == "completed", view.error
    assert view.result == ["one", "two"]
    assert done == {"one": 1, "two": 1}


@pytest.mark.parametrize("kind", ["steps", "tools"])
async def test_an_answer_is_for_one_question(redis: RedisProcess, kind: str):
    """The yes to the first question would approve the second one, too, which nobody was asked."""
    done = Counter[str]()
    async with talking(redis.url, app=program(done), **PATIENT) as bench:
        job_id = await bench.submit(kind)
        await approve_next(bench, job_id, 1)
        await approve_next(bench, job_id, 2, "deny")
        view = await bench.ended(job_id, timeout=25.0)
    assert view.status == "failed"
    assert done == {"one": 1}


async def test_an_answer_is_not_taken_again_by_the_next_attempt(redis: RedisProcess):
    """After a failed attempt, the answers to its questions would approve others, or be asked for again."""
    done = Counter[str]()
    async with talking(redis.url, app=program(done), **PATIENT) as bench:
        job_id = await bench.submit("attempts")
        await approve_next(bench, job_id, 1)
        await approve_next(bench, job_id, 2)
        await parked(bench, job_id, 3)
        assert done == {"one": 1, "fails": 2}, "what was approved and failed is done again without asking"
        await approve_next(bench, job_id, 3)
        view = await bench.ended(job_id, timeout=25.0)
    assert view.status == "completed", view.error
    assert view.result == ["one", "two"]
    assert done == {"one": 1, "fails": 2, "two": 1}


async def test_a_step_that_was_tried_again_is_replayed(redis: RedisProcess):
    """A job that waited between the tries of a step would hang in its next run."""
    done = Counter[str]()
    async with talking(redis.url, app=program(done), **PATIENT) as bench:
        view = await bench.ended(await bench.submit("retried"), timeout=25.0)
    assert view.status == "completed", view.error
    assert done == {"one": 2, "two": 1}


async def test_a_chat_goes_on_after_what_was_approved(redis: RedisProcess):
    """An agent that asks twice would hang after the second answer, the first one being recorded."""
    done = Counter[str]()
    turns = [
        Turn(tool_calls=[ScriptedCall(name="acting", arguments={"name": name}) for name in names])
        for names in (["one", "two"], ["three"])
    ]
    scenario = Scenario(turns=[*turns, Turn(text="Done.")])
    async with talking(redis.url, scenario, program(done), **PATIENT) as bench:
        job_id = await bench.chat("Act", tools=["acting"])
        await bench.until(job_id, "approval.requested", 2)
        await asyncio.gather(approve_next(bench, job_id, 2), approve_next(bench, job_id, 2))
        await parked(bench, job_id, 3)
        assert done == {"one": 1, "two": 1}
        await approve_next(bench, job_id, 3)
        view = await bench.ended(job_id, timeout=25.0)
        one_outcome_each(await bench.log(job_id))
    assert view.status == "completed", view.error
    assert done == {"one": 1, "two": 1, "three": 1}
