"""Cancelling: wherever a job is, it ends once, within a bound, and what it had open is closed."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from typing import Any

import pytest

from streamjobs.app import App, ToolContext
from streamjobs.errors import Fenced, JobEnded
from streamjobs.events import TERMINAL, Event, JobWaiting, encode_event
from streamjobs.store import Batch, Lease
from streamjobs.testing import Scenario, ScriptedCall, Turn
from streamjobs.testing.scenario import EndlessFault, StatusFault
from tests.conftest import RedisProcess, wait_until
from tests.harness import Lab, lab, one_end, talking, working

LONG = Scenario(turns=[Turn(text="word " * 20, faults=[EndlessFault()], rate=500.0)])


async def cancelled(bench: Lab, job_id: str, timeout: float = 60.0) -> dict[str, Any]:
    """Wait for the job's end, which must be the cancel; the event that says so."""
    view = await bench.ended(job_id, timeout=timeout)
    assert view.status == "cancelled"
    log = await bench.log(job_id)
    assert one_end(log) == "job.cancelled"
    requests = [event for event in log if event.type == "job.cancel_requested"]
    assert len(requests) == 1
    asked = log.index(requests[0])
    assert "tool.started" not in [event.type for event in log[asked:]]
    await bench.healthy()
    return log[-1].data


async def taken(bench: Lab) -> Lease:
    """Take the only job by hand."""
    took = await bench.store.work.take(0, "by-hand", 1, 1, bench.store.settings.queues)
    return took.leases[0]


def row(lease: Lease, outcome: Any, *events: Event, number: int = 1, delay_ms: int = 0) -> Batch:
    written = [(event.type, encode_event(event)) for event in events]
    return Batch(lease.job_id, lease.epoch, number, written, outcome, lease.inbox, delay_ms)


# --- where nobody runs it --------------------------------------------------------------------------------


async def test_a_queued_job_ends_at_once_and_never_starts(redis: RedisProcess):
    """The ticket is still there: a worker that comes later must leave the job alone."""
    async with lab(redis.url) as bench:
        job_id = await bench.chat()
        assert await bench.store.jobs.cancel(job_id, by="ann", reason="mistake") == "cancelled"
        event = await cancelled(bench, job_id)
        assert (event["by"], event["reason"], event["effective_ms"]) == ("ann", "mistake", 0)
        async with working(bench.store):
            await bench.run()
        assert "job.started" not in await bench.types(job_id)
        assert len(bench.provider.requests) == 1


async def test_a_held_job_ends_and_the_next_one_gets_its_place(redis: RedisProcess):
    """A cancelled job must not keep an owner's limit, or a place in its list."""
    async with lab(redis.url, owner_limit=1) as bench:
        first, second, third = [await bench.chat() for _ in range(3)]
        await bench.store.jobs.cancel(second)
        await cancelled(bench, second)
        async with working(bench.store):
            await bench.ended(first, third)
        await bench.healthy()


async def test_a_delayed_job_ends_at_once(redis: RedisProcess):
    """Nobody waits for a job's start to hear that it will not come."""
    async with lab(redis.url) as bench, working(bench.store):
        job_id = await bench.chat(delay=3600.0)
        await bench.store.jobs.cancel(job_id)
        await cancelled(bench, job_id)


async def test_a_job_that_backs_off_ends_at_once(redis: RedisProcess):
    """Between two attempts no worker has the job."""
    scenario = Scenario(turns=[Turn(text="x", faults=[StatusFault(status=500)])])
    async with talking(redis.url, scenario, provider_attempts=1, retry_base=600.0, retry_cap=600.0) as bench:
        job_id = await bench.chat()
        await bench.until(job_id, "job.retrying")
        assert await bench.status(job_id) == "scheduled"
        assert await bench.store.jobs.cancel(job_id) == "cancelled"
        await cancelled(bench, job_id)


async def test_a_waiting_job_ends_at_once(redis: RedisProcess):
    """A job that waits for an approval that is no longer wanted."""
    async with lab(redis.url) as bench:
        job_id = await bench.chat()
        lease = await taken(bench)
        (answer,) = await bench.store.work.append(0, [row(lease, "wait", JobWaiting(waits_for="approval"))])
        assert answer.verdict == "ok"
        assert await bench.store.jobs.cancel(job_id) == "cancelled"
        await cancelled(bench, job_id)


async def test_a_paused_job_ends_at_once(redis: RedisProcess):
    """Nobody has to resume a job to get rid of it."""
    async with lab(redis.url) as bench:
        job_id = await bench.chat()
        assert await bench.store.jobs.pause(job_id) == "paused"
        assert await bench.store.jobs.cancel(job_id) == "cancelled"
        await cancelled(bench, job_id)


# --- where a worker runs it --------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["openai:scripted", "anthropic:scripted"])
async def test_a_running_turn_stops_and_its_connection_is_closed(redis: RedisProcess, model: str):
    """Otherwise the model talks on, unheard and paid for. The log proves how soon it really stopped."""
    async with talking(redis.url, LONG, lease=60.0) as bench:
        job_id = await bench.chat(model=model)
        await bench.until(job_id, "text.delta", 3)
        assert bench.provider.open_streams == 1
        assert await bench.store.jobs.cancel(job_id) == "requested"
        event = await cancelled(bench, job_id)
        await wait_until(lambda: bench.provider.open_streams == 0)
        assert bench.provider.closed_early == 1
        log = await bench.log(job_id)
        asked = next(i for i, one in enumerate(log) if one.type == "job.cancel_requested")
        late = [one for one in log[asked:] if one.type == "text.delta"]
        assert event["deltas_after"] == len(late)
        assert event["effective_ms"] == pytest.approx(log[-1].data["ts"] - log[asked].data["ts"], abs=2)
        assert event["effective_ms"] < 15_000, "with the next renewal it would be heard of after 20 s"


def app_with_tools() -> App:
    app = App(builtin_tools=False)

    @app.tool(timeout=60.0)
    async def waits() -> str:
        """Wait."""
        await asyncio.sleep(3600)
        return ""

    @app.tool(timeout=60.0)
    def threaded(ctx: ToolContext) -> str:
        """Work in a thread, and ask now and then whether that is still wanted."""
        BEGUN.set()
        while not ctx.is_cancelled:
            time.sleep(0.01)
        STOPPED.set()
        return "stopped"

    @app.tool(timeout=60.0, effect="once")
    async def pays() -> str:
        """Pay, slowly."""
        await asyncio.sleep(3600)
        return ""

    return app


BEGUN, STOPPED = threading.Event(), threading.Event()


@pytest.mark.parametrize("tool", ["waits", "threaded", "pays"])
async def test_a_running_tool_is_stopped_and_its_outcome_said_to_be_unknown(redis: RedisProcess, tool: str):
    """Whether a payment went out is a question that a log must not answer with a guess, or with nothing."""
    BEGUN.clear()
    STOPPED.clear()
    scenario = Scenario(turns=[Turn(tool_calls=[ScriptedCall(name=tool)]), Turn(text="never said")])
    async with talking(redis.url, scenario, app_with_tools()) as bench:
        job_id = await bench.chat(tools=[tool])
        await bench.until(job_id, "tool.started")
        if tool == "threaded":
            await wait_until(BEGUN.is_set, what="the thread")  # one that has not begun never does
        assert await bench.store.jobs.cancel(job_id) == "requested"
        await cancelled(bench, job_id)
        kinds = [kind for kind in await bench.types(job_id) if kind.startswith("tool.")]
        assert kinds == ["tool.called", "tool.started", "tool.unknown"]
        assert len(bench.provider.requests) == 1
        if tool == "threaded":
            await wait_until(STOPPED.is_set)


async def test_a_tool_does_not_start_after_a_cancel(redis: RedisProcess):
    """The cancel is in the log before the model's calls are: none of them may take effect."""
    runs: list[int] = []
    app = App(builtin_tools=False)

    @app.tool(effect="once")
    async def pays() -> str:
        """Pay."""
        runs.append(1)
        return "paid"

    turn = Turn(text="I will pay. " * 5, tool_calls=[ScriptedCall(name="pays")], rate=8.0)
    async with talking(redis.url, Scenario(turns=[turn]), app) as bench:
        bench.store.live.on_inbox = nothing_heard  # type: ignore[method-assign, assignment]
        jobs: list[str] = []
        for _ in range(10):
            jobs.append(await bench.chat(tools=["pays"]))
            await bench.until(jobs[-1], "turn.started")
            assert await bench.store.jobs.cancel(jobs[-1]) == "requested"
        await bench.ended(*jobs)
        for job_id in jobs:
            await cancelled(bench, job_id)
        assert runs == []


async def nothing_heard(*_: Any) -> None:
    """In place of the hints: a connection over which nothing ever comes."""


async def test_a_cancel_whose_hint_is_lost_is_heard_with_the_next_renewal(redis: RedisProcess):
    """Pub/sub loses without a word; a silent job must stop all the same, within a third of a lease."""
    async with lab(redis.url, lease=6.0) as bench:
        bench.store.live.on_inbox = nothing_heard  # type: ignore[method-assign, assignment]
        app = App()
        app.workflow("silent")(silent)
        async with working(bench.store, app):
            job_id = await bench.submit("silent")
            await bench.until(job_id, "job.progress")
            await bench.store.jobs.cancel(job_id)
            event = await cancelled(bench, job_id)
            assert event["effective_ms"] < 5500, "two seconds, and what a busy machine adds"


async def silent(ctx: Any) -> None:
    """Say one thing, then nothing."""
    ctx.progress(1)
    await asyncio.sleep(3600)


async def test_a_second_cancel_changes_nothing(redis: RedisProcess):
    """People click twice. The first one's words and clock count."""
    async with talking(redis.url, LONG) as bench:
        job_id = await bench.chat()
        await bench.until(job_id, "text.delta")
        answers = await asyncio.gather(*(bench.store.jobs.cancel(job_id, by=str(n)) for n in range(5)))
        assert set(answers) <= {"requested", "cancelled"}
        event = await cancelled(bench, job_id)
        assert event["by"] in "01234"
        assert await bench.store.jobs.cancel(job_id, by="late") == "cancelled"
        await cancelled(bench, job_id)


async def test_a_completed_job_cannot_be_cancelled(redis: RedisProcess):
    """Its result stands."""
    async with talking(redis.url) as bench:
        view = await bench.run()
        with pytest.raises(JobEnded):
            await bench.store.jobs.cancel(view.id)
        assert (await bench.view(view.id)).status == "completed"


async def test_code_that_ignores_its_cancellation_is_left_behind(redis: RedisProcess):
    """One workflow with a bare `except` must not hold its job, its slot or the worker for ever."""
    app = App()
    may_end = asyncio.Event()
    wrote: list[str] = []

    @app.workflow("stubborn")
    async def stubborn(ctx: Any) -> None:
        ctx.progress(1)
        while not may_end.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await may_end.wait()
        try:
            ctx.progress(100)
            wrote.append("still")
        except Fenced as error:
            wrote.append(type(error).__name__)

    async with lab(redis.url, cancel_timeout=0.3) as bench, working(bench.store, app) as worker:
        job_id = await bench.submit("stubborn")
        await bench.until(job_id, "job.progress")
        await bench.store.jobs.cancel(job_id)
        event = await cancelled(bench, job_id)
        assert 250 <= event["effective_ms"] < 30_000
        await wait_until(lambda: worker.running == 0)
        assert (await bench.run()).status == "completed"
        may_end.set()
        await wait_until(lambda: wrote)
        assert wrote == ["Fenced"]


async def test_code_that_swallows_its_cancellation_and_returns_is_cancelled(redis: RedisProcess):
    """Who cancelled was told that it will be: a result that comes afterwards is a bad surprise."""
    app = App()

    @app.workflow("swallows")
    async def swallows(ctx: Any) -> str:
        ctx.progress(1)
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(3600)
        return "done anyway"

    async with lab(redis.url) as bench, working(bench.store, app):
        job_id = await bench.submit("swallows")
        await bench.until(job_id, "job.progress")
        await bench.store.jobs.cancel(job_id)
        await cancelled(bench, job_id)


async def test_a_job_that_waits_for_redis_can_be_stopped(redis: RedisProcess):
    """A reader that is held back by a full buffer is where a cancel finds it, too."""
    async with lab(redis.url, LONG, recorder_bytes=200, coalesce_interval=0.5) as bench, working(bench.store):
        job_id = await bench.chat()
        await bench.until(job_id, "text.delta", 3)
        await bench.store.jobs.cancel(job_id)
        await cancelled(bench, job_id)
        await wait_until(lambda: bench.provider.open_streams == 0)


async def test_a_cancel_beats_a_drain(redis: RedisProcess):
    """A worker that is told to leave must not hand on a job that is to end."""
    async with lab(redis.url, LONG, drain_grace=0.0) as bench, working(bench.store) as worker:
        jobs = [await bench.chat() for _ in range(10)]
        for job_id in jobs:
            await bench.until(job_id, "text.delta")
        for place, job_id in enumerate(jobs):
            await bench.store.jobs.cancel(job_id)
            if place == 4:
                worker.drain()
        await bench.ended(*jobs)
        for job_id in jobs:
            await cancelled(bench, job_id)


async def test_a_cancel_that_races_with_the_end_leaves_one_end(redis: RedisProcess):
    """Two hundred jobs cancelled at random moments of their short lives: each ends once, as it says."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")  # noqa: T201 - shown with a failure
    chance = random.Random(seed)
    app = App(builtin_tools=False)

    @app.tool
    async def quick() -> str:
        """Be quick."""
        return "done"

    scenario = Scenario(
        turns=[Turn(text="a b c ", tool_calls=[ScriptedCall(name="quick")]), Turn(text="d e f")]
    )
    async with lab(redis.url, scenario, owner_limit=0, concurrency=20) as bench:
        jobs = [await bench.chat(str(n), tools=["quick"]) for n in range(200)]

        async def cancel(job_id: str) -> None:
            moment = chance.choice(MOMENTS)
            await wait_until(lambda: _has_come_to(bench, job_id, moment))
            with contextlib.suppress(JobEnded):
                await bench.store.jobs.cancel(job_id)

        async with working(bench.store, app):
            await asyncio.gather(*map(cancel, jobs))
            await bench.ended(*jobs, timeout=60.0)
            await wait_until(lambda: bench.provider.open_streams == 0)
        ends = [one_end(await bench.log(job_id)) for job_id in jobs]
        assert set(ends) <= {"job.completed", "job.cancelled"}
        report = await bench.healthy()
        assert report.statuses.get("completed", 0) + report.statuses.get("cancelled", 0) == 200
        assert len(set(ends)) == 2, "the moments were not random enough to prove anything"


MOMENTS = ["job.queued", "job.started", "turn.started", "tool.called", "tool.completed", "job.completed"]
"""By what a log says, not by a clock: however busy the machine is, some come too early and some too late."""


async def _has_come_to(bench: Lab, job_id: str, moment: str) -> bool:
    types = await bench.types(job_id)
    return moment in types or types[-1] in TERMINAL


async def test_the_slots_of_cancelled_jobs_are_free_again(redis: RedisProcess):
    """A leak of one slot a cancel stops a worker for good, some days later."""
    async with lab(redis.url, LONG, concurrency=4) as bench, working(bench.store) as worker:
        for _ in range(3):
            jobs = [await bench.chat() for _ in range(4)]
            for job_id in jobs:
                await bench.until(job_id, "text.delta")
            for job_id in jobs:
                await bench.store.jobs.cancel(job_id)
            await bench.ended(*jobs)
        await wait_until(lambda: worker.running == 0)
        await wait_until(lambda: bench.provider.open_streams == 0)
