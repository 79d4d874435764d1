"""A worker as a whole: attempts, time, order, limits, leaving in order, and code that misbehaves."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from typing import Any

import msgspec
import pytest

from streamjobs.app import App
from streamjobs.errors import ProviderError
from streamjobs.testing import Scenario, Turn
from streamjobs.testing.scenario import EndlessFault
from streamjobs.worker.recorder import Committer
from streamjobs.worker.worker import Worker
from tests.conftest import RedisProcess, wait_until
from tests.harness import Lab, drained, lab, one_end, says, talking, worker_process, working

LONG = Scenario(turns=[Turn(text="word " * 20, faults=[EndlessFault(times=1)], rate=200.0)])


def one(kind: str, function: Any, app: App | None = None, **options: Any) -> App:
    """An app with one workflow."""
    app = app or App(builtin_tools=False)
    app.workflow(kind, **options)(function)
    return app


async def run(bench: Lab, kind: str, given: Any = None, **fields: Any) -> Any:
    return await bench.ended(await bench.submit(kind, given, **fields))


# --- attempts --------------------------------------------------------------------------------------------


async def test_a_failed_attempt_is_repeated_after_a_growing_pause(redis: RedisProcess):
    """What fails for a moment must not fail the user's job, nor be hammered."""

    async def flaky(ctx: Any) -> int:
        if ctx.attempt < 3:
            raise ConnectionError("not yet")
        return ctx.attempt

    app = one("flaky", flaky)
    async with talking(redis.url, app=app, retry_base=0.2, retry_cap=10.0) as bench:
        view = await run(bench, "flaky")
        assert (view.status, view.result, view.attempt, view.error) == ("completed", 3, 3, None)
        log = await bench.log(view.id)
        retries = [event for event in log if event.type == "job.retrying"]
        assert [event.data["attempt"] for event in retries] == [1, 2]
        for event, low, high in zip(retries, (100, 200), (200, 400), strict=True):
            assert low <= event.data["delay_ms"] <= high
            assert event.data["error"]["code"] == "exception"
            assert "ConnectionError: not yet" in event.data["error"]["message"]
        starts = [event.data["ts"] for event in log if event.type == "job.started"]
        for retry, start in zip(retries, starts[1:], strict=True):
            assert start - retry.data["ts"] >= retry.data["delay_ms"] - 5


async def test_attempts_are_limited_by_setting_workflow_and_submission(redis: RedisProcess):
    """The nearest wins: whoever submits knows best what a repetition costs."""

    async def broken(ctx: Any) -> None:
        raise RuntimeError("always")

    app = one("broken", broken, max_attempts=2)
    one("plain", broken, app)
    async with talking(redis.url, app=app, max_attempts=4, retry_base=0.01) as bench:
        cases = (("plain", {}, 4), ("broken", {}, 2), ("broken", {"max_attempts": 1}, 1))
        for kind, fields, attempts in cases:
            view = await run(bench, kind, **fields)
            assert view.error is not None
            assert (view.status, view.attempt, view.error.retryable) == ("failed", attempts, True)


async def test_a_providers_wish_for_a_pause_is_the_least(redis: RedisProcess):
    """Coming back sooner than a provider asked gets a whole key blocked."""

    async def limited(ctx: Any) -> None:
        if ctx.attempt == 1:
            raise ProviderError("slow down", retryable=True, retry_after=0.7)

    async with talking(redis.url, app=one("limited", limited), retry_base=0.01) as bench:
        view = await run(bench, "limited")
        assert view.status == "completed"
        (retry,) = [event for event in await bench.log(view.id) if event.type == "job.retrying"]
        assert retry.data["delay_ms"] >= 700


async def test_what_cannot_succeed_is_not_repeated(redis: RedisProcess):
    """An unknown kind, a bad input, a permanent error of a provider: told at once."""

    async def typed(ctx: Any, number: int) -> int:
        return number

    async def refused(ctx: Any) -> None:
        raise ProviderError("no such model", retryable=False)

    app = one("typed", typed)
    one("refused", refused, app)
    async with talking(redis.url, app=app) as bench:
        cases = (
            ("nothing", None, "unknown_kind"),
            ("typed", "x", "invalid"),
            ("refused", None, "provider_error"),
        )
        for kind, given, code in cases:
            view = await run(bench, kind, given)
            assert view.error is not None
            assert (view.status, view.error.code, view.attempt) == ("failed", code, 1)


# --- code that misbehaves --------------------------------------------------------------------------------


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


async def raises_group(ctx: Any) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(raises(ValueError("one")))
        group.create_task(raises(KeyError("two")))


async def raises(error: BaseException) -> None:
    raise error


MISBEHAVIOUR: dict[str, tuple[Any, str]] = {
    "SystemExit": (lambda ctx: raises(SystemExit(3)), "SystemExit: 3"),
    "KeyboardInterrupt": (lambda ctx: raises(KeyboardInterrupt()), "KeyboardInterrupt"),
    "CancelledError": (lambda ctx: raises(asyncio.CancelledError()), "CancelledError"),
    "GeneratorExit": (lambda ctx: raises(GeneratorExit()), "GeneratorExit"),
    "RecursionError": (lambda ctx: raises(RecursionError("deep")), "RecursionError"),
    "unprintable": (lambda ctx: raises(Unprintable()), "Unprintable"),
    "surrogates": (lambda ctx: raises(ValueError("a\ud800b\x00")), "ValueError: a"),
    "group": (raises_group, "ValueError: one; KeyError"),
    "cancels itself": (lambda ctx: cancels_itself(), "CancelledError"),
}


async def cancels_itself() -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(1)


@pytest.mark.parametrize("name", MISBEHAVIOUR)
async def test_whatever_code_raises_fails_its_job_and_nothing_else(redis: RedisProcess, name: str):
    """One user's `sys.exit()` in a workflow must not take down the jobs of everybody else."""
    misbehave, words = MISBEHAVIOUR[name]
    app = App(builtin_tools=False)

    @app.workflow("bad")
    async def bad(ctx: Any) -> None:
        await misbehave(ctx)

    @app.workflow("good")
    async def good(ctx: Any) -> str:
        await asyncio.sleep(0.1)
        return "fine"

    async with talking(redis.url, app=app) as bench:
        jobs = [
            await bench.submit("good"),
            await bench.submit("bad", max_attempts=2),
            await bench.submit("good"),
        ]
        await bench.ended(*jobs)
        first, view, last = [await bench.view(job_id) for job_id in jobs]
        assert (first.result, last.result) == ("fine", "fine")
        assert view.error is not None
        assert (view.status, view.error.code, view.attempt) == ("failed", "exception", 2)
        assert words in view.error.message
        await bench.healthy()


async def test_results_that_cannot_be_stored_fail_in_words(redis: RedisProcess):
    """Not JSON, or too large: the job says which, once, and does not run again for it.

    Half a character is no reason to lose the rest.
    """

    async def strange(ctx: Any) -> Any:
        return object()

    async def huge(ctx: Any) -> str:
        return "x" * 2_000_000

    async def half(ctx: Any) -> str:
        return "\ud800"

    app = one("strange", strange)
    one("huge", huge, app)
    one("half", half, app)
    async with talking(redis.url, app=app, max_artifact=1_000_000) as bench:
        for kind, code in (("strange", "invalid_result"), ("huge", "result_too_large")):
            view = await run(bench, kind)
            assert view.error is not None
            assert (view.status, view.error.code, view.attempt) == ("failed", code, 1)
        view = await run(bench, "half")
        assert (view.status, view.result) == ("completed", "\ufffd")


async def test_code_that_never_awaits_still_ends(redis: RedisProcess):
    """The simplest workflow there is, and a hundred at once of it."""

    async def at_once(ctx: Any) -> int:
        ctx.progress(100)
        return 1

    async with talking(redis.url, app=one("at_once", at_once)) as bench:
        jobs = [await bench.submit("at_once") for _ in range(100)]
        view = await bench.ended(*jobs)
        assert view.progress is not None
        assert (view.result, view.progress.percent) == (1, 100)
        await bench.healthy()


async def test_a_forgotten_task_cannot_write_behind_the_end(redis: RedisProcess):
    """A workflow's stray background task must not spoil the end of its job."""
    strays: list[asyncio.Task[None]] = []

    async def forgets(ctx: Any) -> str:
        async def stray() -> None:
            for number in range(10_000):
                ctx.log(f"line {number}")
                await asyncio.sleep(0)

        strays.append(asyncio.create_task(stray()))
        await asyncio.sleep(0.05)
        return "done"

    async with talking(redis.url, app=one("forgets", forgets)) as bench:
        view = await run(bench, "forgets")
        assert (view.status, view.result) == ("completed", "done")
        await asyncio.gather(*strays, return_exceptions=True)
        await bench.healthy()


async def test_a_job_over_its_budget_fails_even_if_its_code_does_not_care(redis: RedisProcess):
    """A budget that code can ignore by catching an exception is none."""

    async def careless(ctx: Any) -> str:
        for number in range(200):
            with contextlib.suppress(Exception):
                ctx.log(f"line {number}")
                await ctx.journal.commit()
        return "done"

    async with talking(redis.url, app=one("careless", careless), max_events=50) as bench:
        view = await run(bench, "careless")
        assert view.error is not None
        assert (view.status, view.error.code) == ("failed", "limit_exceeded")
        await bench.healthy()


# --- time --------------------------------------------------------------------------------------------------


async def test_a_job_ends_with_its_time(redis: RedisProcess):
    """A job that hangs is ended, and says why; the time runs over all its attempts."""

    async def hangs(ctx: Any) -> None:
        await asyncio.sleep(3600)

    async with talking(redis.url, app=one("hangs", hangs)) as bench:
        started = time.monotonic()
        view = await run(bench, "hangs", timeout=0.5)
        assert view.error is not None
        assert (view.status, view.error.code) == ("failed", "timeout")
        assert 0.49 <= time.monotonic() - started < 40


async def test_time_that_ran_out_between_attempts_ends_the_job(redis: RedisProcess):
    """A deadline that passes while the job backs off holds as well."""

    async def broken(ctx: Any) -> None:
        raise RuntimeError("again")

    async with talking(redis.url, app=one("broken", broken), retry_base=60.0) as bench:
        view = await run(bench, "broken", timeout=0.3)
        assert view.error is not None
        assert (view.status, view.error.code) == ("failed", "timeout")


# --- order and limits ------------------------------------------------------------------------------------


def recording() -> tuple[App, list[str]]:
    """An app whose jobs note their input as they start."""
    seen: list[str] = []
    app = App(builtin_tools=False)

    @app.workflow("note")
    async def note(ctx: Any, name: str) -> None:
        seen.append(name)

    return app, seen


async def test_priorities_come_in_their_order(redis: RedisProcess):
    """An urgent job overtakes a backlog; equals keep their order."""
    app, seen = recording()
    async with lab(redis.url, concurrency=1, priority_weights=(1, 0, 0)) as bench:
        jobs = [
            await bench.submit("note", f"{priority} {n}", priority=priority)
            for priority in ("low", "default", "high")
            for n in range(3)
        ]
        async with working(bench.store, app):
            await bench.ended(*jobs)
    assert seen == [f"{priority} {n}" for priority in ("high", "default", "low") for n in range(3)]


async def test_a_worker_takes_from_its_queues_only(redis: RedisProcess):
    """A queue for expensive machines must not leak onto cheap ones."""
    app, seen = recording()
    async with lab(redis.url, queues=("default", "gpu")) as bench:
        other = await bench.submit("note", "default", queue="default")
        async with working(bench.store, app, queues=["gpu"]):
            await bench.ended(await bench.submit("note", "gpu", queue="gpu"))
            assert await bench.status(other) == "queued"
        async with working(bench.store, app):
            await bench.ended(other)
    assert seen == ["gpu", "default"]


class Gauge:
    """How many run at once, and the most there were. All but `free` ones run until `go` is set."""

    def __init__(self, free: str = "") -> None:
        self.now: dict[str, int] = {}
        self.most: dict[str, int] = {}
        self.go = asyncio.Event()
        self._free = free

    async def workflow(self, ctx: Any) -> None:
        """Be counted for a while, in all and for the owner."""
        names = ("all", ctx.owner)
        for name in names:
            self.now[name] = self.now.get(name, 0) + 1
            self.most[name] = max(self.most.get(name, 0), self.now[name])
        if ctx.owner != self._free:
            await self.go.wait()
        await asyncio.sleep(0.01)
        for name in names:
            self.now[name] -= 1


async def test_concurrency_is_respected_and_used(redis: RedisProcess):
    """More at once than asked for takes the machine down; fewer waste it."""
    gauge = Gauge()
    async with lab(redis.url, concurrency=10, owner_limit=0) as bench:
        jobs = [await bench.submit("count") for _ in range(80)]
        async with working(bench.store, one("count", gauge.workflow)):
            await wait_until(lambda: gauge.now.get("all") == 10, what="ten that run at once")
            gauge.go.set()
            await bench.ended(*jobs)
    assert gauge.most["all"] == 10


async def test_the_last_free_slots_are_used_too(redis: RedisProcess):
    """A worker full of long jobs but for one slot must not let the next job wait for more of them."""
    started: list[int] = []

    async def long(ctx: Any) -> None:
        started.append(1)
        await asyncio.sleep(3600)

    async with lab(redis.url, concurrency=32) as bench, working(bench.store, one("long", long)):
        for _ in range(31):
            await bench.submit("long")
        await wait_until(lambda: len(started) == 31)
        await bench.submit("long")
        await wait_until(lambda: len(started) == 32)


async def test_an_owners_limit_holds_and_leaves_room_for_others(redis: RedisProcess):
    """One customer's thousand jobs must not stand in front of another's first."""
    gauge = Gauge(free="single")
    async with lab(redis.url, owner_limit=2) as bench:
        many = [await bench.submit("count", owner="many") for _ in range(20)]
        single = await bench.submit("count", owner="single")
        async with working(bench.store, one("count", gauge.workflow)):
            await bench.ended(single)
            await wait_until(lambda: gauge.now.get("many") == 2, what="as many as the limit allows")
            gauge.go.set()
            await bench.ended(*many)
        await bench.healthy()
    assert gauge.most["many"] == 2


async def test_three_hundred_jobs_leave_a_sound_store(redis: RedisProcess):
    """The whole of it once, in bulk; the fixture checks every key that is left behind."""
    scenario = Scenario(turns=[Turn(text="one two three ")])
    async with talking(redis.url, scenario, owner_limit=0) as bench:
        jobs = [await bench.chat(str(n)) for n in range(300)]
        await bench.ended(*jobs, timeout=90.0)
        report = await bench.healthy()
        assert report.statuses == {"completed": 300}
        assert await bench.store.work.backlog(0) in ({}, {"waiting:default": 0, "running:default": 0})


# --- coming and going ------------------------------------------------------------------------------------


async def test_a_worker_is_registered_while_it_works(redis: RedisProcess):
    """Operators see who works, and what on; a worker that left is not shown as there."""
    async with talking(redis.url, LONG, worker_ttl=2.0) as bench:
        await bench.until(await bench.chat(), "text.delta")

        async def info() -> Any:
            return [worker for worker in await bench.store.workers.all() if worker.running == 1]

        (worker,) = await wait_until(info)
        assert (worker.queues, worker.concurrency) == (["default"], bench.store.settings.concurrency)

    async with lab(redis.url) as bench, working(bench.store) as worker:
        await wait_until(bench.store.workers.all)
        await drained(worker, bench.store)


async def test_a_drain_lets_end_what_ends_in_time(redis: RedisProcess):
    """A rollout must not interrupt what is nearly done."""
    async with lab(redis.url, says("word " * 30, rate=60.0)) as bench, working(bench.store) as worker:
        job_id = await bench.chat()
        await bench.until(job_id, "text.delta")
        await drained(worker, bench.store)
        view = await bench.view(job_id)
        assert (view.status, view.text) == ("completed", "word " * 30)
        assert (await bench.types(job_id)).count("job.started") == 1


async def test_a_drain_hands_back_between_rounds(redis: RedisProcess):
    """At a recorded point nothing is lost by handing over: the next worker goes on with the next turn."""
    from streamjobs.testing import ScriptedCall

    app, may_end = App(builtin_tools=False), asyncio.Event()

    @app.tool
    async def brief() -> str:
        """Take a moment."""
        await may_end.wait()
        return "done"

    scenario = Scenario(
        turns=[Turn(text="Using it. ", tool_calls=[ScriptedCall(name="brief")]), Turn(text="Used.")]
    )
    async with lab(redis.url, scenario) as bench:
        async with working(bench.store, app) as worker:
            job_id = await bench.chat(tools=["brief"])
            await bench.until(job_id, "tool.started")
            worker.drain()
            may_end.set()
            await drained(worker, bench.store)
        assert await bench.status(job_id) == "queued"
        async with working(bench.store, app):
            view = await bench.ended(job_id)
        assert (view.status, view.text, view.attempt) == ("completed", "Using it. Used.", 1)
        kinds = await bench.types(job_id)
        assert (kinds.count("job.lost"), kinds.count("turn.restarted"), kinds.count("tool.started")) == (
            0,
            0,
            1,
        )


async def test_sigterm_hands_back_what_does_not_end_and_exits_cleanly(redis: RedisProcess):
    """Kubernetes takes workers away every day: no job waits for a lease, and none starts from nothing."""
    async with lab(redis.url, LONG, drain_grace=0.2, lease=30.0) as bench:
        with worker_process(bench.store.settings) as first:
            job_id = await bench.chat()
            await bench.until(job_id, "text.delta")
            first.terminate()
            assert await first.ended() == 0
        assert await bench.status(job_id) == "queued"
        assert await bench.store.workers.all() == []
        with worker_process(bench.store.settings) as second:
            view = await bench.ended(job_id)
            second.terminate()
            assert await second.ended() == 0
        assert (view.status, view.text, view.attempt, view.crashes) == ("completed", "word " * 20, 1, 0)
        kinds = await bench.types(job_id)
        assert (kinds.count("job.requeued"), kinds.count("job.lost"), kinds.count("turn.restarted")) == (
            1,
            0,
            1,
        )
        await bench.healthy()


async def test_sigterm_does_not_wait_for_code_that_ignores_it(redis: RedisProcess):
    """A pod that does not end is killed, with all its leases; one bad workflow must not cause that."""
    async with lab(redis.url, drain_grace=0.1, cancel_timeout=0.3) as bench:
        with worker_process(bench.store.settings) as worker:
            job_id = await bench.submit("stubborn")
            await bench.until(job_id, "job.progress")
            started = time.monotonic()
            worker.terminate()
            assert await worker.ended() == 0
            assert time.monotonic() - started < 30
        assert await bench.status(job_id) == "queued"
        assert one_of(await bench.types(job_id), "job.requeued")


def one_of(kinds: list[str], kind: str) -> bool:
    return kinds.count(kind) == 1


async def test_a_second_sigterm_ends_it_at_once(redis: RedisProcess):
    """An operator in a hurry is not argued with; the job is taken over like any lost one."""
    async with lab(redis.url, LONG, drain_grace=600.0, lease=1.0, worker_ttl=1.0) as bench:

        async def is_draining() -> bool:
            return any(info.draining for info in await bench.store.workers.all())

        with worker_process(bench.store.settings) as worker:
            job_id = await bench.chat()
            await bench.until(job_id, "text.delta")
            worker.terminate()
            await wait_until(is_draining, what="the drain: two signals at once may be heard as one")
            worker.terminate()
            assert await worker.ended() == 130
        async with working(bench.store):
            assert (await bench.ended(job_id)).status == "completed"


async def test_sigterm_with_redis_away_ends_within_its_bound(own_redis: RedisProcess):
    """An outage and a rollout at once: pods must still go, not wait for a Redis that does not come."""
    async with lab(own_redis.url, LONG, drain_grace=0.2, lease=1.0, cancel_timeout=0.5) as bench:
        with worker_process(bench.store.settings) as worker:
            job_id = await bench.chat()
            await bench.until(job_id, "text.delta")
            own_redis.kill(signal.SIGKILL)
            await asyncio.sleep(0.3)
            started = time.monotonic()
            worker.terminate()
            assert await worker.ended(60.0) == 0
            assert time.monotonic() - started < 40
        own_redis.start()


async def test_a_loop_that_fails_ends_the_worker(redis: RedisProcess, monkeypatch: pytest.MonkeyPatch):
    """A worker that keeps its leases and writes nothing is worse than none: nobody takes its jobs over."""

    async def fails(self: Any) -> None:
        await asyncio.sleep(0.1)
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(Committer, "run", fails)
    async with lab(redis.url) as bench:
        with pytest.raises(RuntimeError, match="a bug of ours"):
            await Worker(bench.store, App()).run()
        assert await bench.store.workers.all() == []


async def test_what_a_workflow_says_is_said_once_over_a_crash(redis: RedisProcess):
    """A viewer must not read the same progress and log lines again because a worker died."""
    crashed = asyncio.Event()
    lives: list[int] = []

    async def tells(ctx: Any) -> str:
        lives.append(1)
        for number in range(6):
            ctx.progress(10 * number)
            ctx.log(f"line {number}")
            ctx.emit("mine", {"n": number})
            if number == 3 and len(lives) == 1:
                await ctx.journal.commit()
                crashed.set()
                await asyncio.sleep(3600)
        return "told"

    app = one("tells", tells)
    async with lab(redis.url) as bench:
        async with working(bench.store, app):
            job_id = await bench.submit("tells")
            await crashed.wait()
        await bench.expire_lease(job_id)
        async with working(bench.store, app):
            view = await bench.ended(job_id)
        assert (view.status, view.result, len(lives)) == ("completed", "told", 2)
        log = await bench.log(job_id)
        assert [event.data["percent"] for event in log if event.type == "job.progress"] == [
            0,
            10,
            20,
            30,
            40,
            50,
        ]
        assert [event.data["message"] for event in log if event.type == "job.log"] == [
            f"line {n}" for n in range(6)
        ]
        assert [event.data["data"]["n"] for event in log if event.type == "x.mine"] == list(range(6))
        assert one_end(log) == "job.completed"
        await bench.healthy()


async def test_a_job_that_crashes_its_workers_is_set_aside(redis: RedisProcess):
    """One poisonous job must not take down every worker, one after the other, for ever."""

    lives: list[int] = []

    async def poison(ctx: Any) -> None:
        lives.append(1)
        await asyncio.sleep(3600)  # it writes nothing: a crash of the interpreter comes without a word

    app = one("poison", poison)
    async with lab(redis.url, lease=30.0, max_crashes=2, crash_base=0.1) as bench:
        job_id = await bench.submit("poison")
        for life in range(1, 5):
            async with working(bench.store, app):
                await wait_until(lambda life=life: len(lives) == life)
            await bench.expire_lease(job_id)
        async with working(bench.store):
            view = await bench.ended(job_id)
        assert view.error is not None
        assert (view.status, view.error.code) == ("failed", "poisoned")
        lost = [event.data for event in await bench.log(job_id) if event.type == "job.lost"]
        assert [event["crashes"] for event in lost] == [0, 1, 2, 3]
        assert [event["delay_ms"] for event in lost[:3]] == [0, 0, 100]
        await bench.healthy()


async def test_a_long_log_does_not_hold_up_the_loop(redis: RedisProcess):
    """A job with a long past is replayed in pieces; all other jobs of the worker go on meanwhile."""
    paused = asyncio.Event()

    async def chatty(ctx: Any) -> int:
        for number in range(5000):
            ctx.log(f"line {number}")
        if not paused.is_set():
            await ctx.journal.commit()
            paused.set()
            await asyncio.sleep(3600)
        return len(await _lines(ctx))

    async def _lines(ctx: Any) -> list[Any]:
        return [kind for kind, left in ctx.history.emitted.items() if kind == "job.log" and left == 0]

    app = one("chatty", chatty)
    async with lab(redis.url, drain_grace=0.1) as bench:
        async with working(bench.store, app) as worker:
            job_id = await bench.submit("chatty")
            await paused.wait()
            await drained(worker, bench.store)
        async with working(bench.store, app):
            view = await bench.ended(job_id)
        assert (view.status, view.result) == ("completed", 1)
        assert (await bench.types(job_id)).count("job.log") == 5000


async def test_a_pause_takes_effect_at_the_next_recorded_point(redis: RedisProcess):
    """A paused job gives its slot back, and goes on where it was."""
    from streamjobs.testing import ScriptedCall

    app, may_end = App(builtin_tools=False), asyncio.Event()

    @app.tool
    async def brief() -> str:
        """Take a moment."""
        await may_end.wait()
        return "done"

    scenario = Scenario(
        turns=[Turn(text="One. ", tool_calls=[ScriptedCall(name="brief")]), Turn(text="Two.")]
    )
    async with lab(redis.url, scenario) as bench, working(bench.store, app) as worker:
        job_id = await bench.chat(tools=["brief"])
        await bench.until(job_id, "tool.started")
        assert await bench.store.jobs.pause(job_id, by="ann") == "requested"
        (execution,) = worker._executions.values()
        await wait_until(lambda: execution.journal.asked == "pause", what="the worker's hearing of it")
        may_end.set()
        await bench.until(job_id, "job.paused")
        assert await bench.status(job_id) == "paused"
        assert await bench.store.jobs.resume(job_id) == "resumed"
        view = await bench.ended(job_id)
        assert (view.status, view.text) == ("completed", "One. Two.")
        assert (await bench.types(job_id)).count("tool.started") == 1
        await bench.healthy()


def test_settings_reach_a_worker_process_whole():
    """The harness passes settings by the environment: what it forgets would be tested with other values."""
    from streamjobs.config import Settings, load_settings
    from tests.harness import environment

    settings = Settings(redis_url="unix:///x", queues=("a", "b"), lease=1.25, priority_weights=(1, 0, 0))
    env = {name: text for name, text in environment(settings).items() if name.startswith("STREAMJOBS_")}
    assert msgspec.structs.asdict(load_settings(env)) == msgspec.structs.asdict(settings)
