"""Workflows on a real store: what they record, what a replay does again, and what waits give back."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Any

import msgspec
import pytest

from streamjobs import (
    App,
    ChildFailed,
    Context,
    Denied,
    OutcomeUnknown,
    Permanent,
    Retry,
    StepError,
    ToolContext,
)
from streamjobs.errors import JobEnded
from tests.conftest import RedisProcess, wait_until
from tests.harness import Lab, lab, says, talking, working


class Report(msgspec.Struct):
    """A typed result."""

    total: int
    names: list[str]


async def double(number: int) -> int:
    return number * 2


def slow_double(number: int) -> int:
    return number * 2


def app_of(kind: str, function: Any, **options: Any) -> App:
    app = App(builtin_tools=False)
    app.workflow(kind, **options)(function)
    return app


# --- steps


async def test_steps_run_once_and_their_outputs_come_back(redis: RedisProcess):
    """Without it nothing of a workflow survives its worker."""

    async def sums(ctx: Context, numbers: list[int]) -> Report:
        doubled = await asyncio.gather(*(ctx.step("double", double, n) for n in numbers))
        total = await ctx.step("sum", sum, doubled)
        halved = await ctx.step(slow_double, total)
        return Report(halved, [str(n) for n in doubled])

    async with talking(redis.url, app=app_of("sums", sums)) as bench:
        view = await bench.ended(await bench.submit("sums", [1, 2, 3, 3]))
    assert view.status == "completed", view.error
    assert view.result == {"total": 36, "names": ["2", "4", "6", "6"]}
    assert [step.state for step in view.steps] == ["completed"] * 6
    assert len({step.key for step in view.steps}) == 6, "the same step twice has an occurrence number"
    assert view.metrics.steps == 6


async def test_a_replay_does_only_what_is_missing(redis: RedisProcess):
    """Without it a job that sleeps, or loses its worker, would pay twice."""
    calls = Counter[str]()

    async def sleepy(ctx: Context) -> list[int]:
        async def counted(name: str) -> int:
            calls[name] += 1
            return len(calls)

        ctx.log("begun")
        first = await ctx.step("first", counted, "first")
        await ctx.sleep(1.0)
        second = await ctx.step("second", counted, "second")
        return [first, second]

    async with talking(redis.url, app=app_of("sleepy", sleepy), park_after=0.1) as bench:
        job_id = await bench.submit("sleepy")
        view = await bench.ended(job_id)
        types = await bench.types(job_id)
        await bench.healthy()
    assert view.status == "completed", view.error
    assert view.result == [1, 2]
    assert calls == {"first": 1, "second": 1}
    assert types == [
        "job.queued", "job.started", "job.log", "step.started", "step.completed", "timer.set", "job.waiting",
        "timer.fired", "job.requeued", "job.started", "step.started", "step.completed", "job.completed",
    ]  # fmt: skip


async def test_a_step_is_tried_again_as_its_policy_says(redis: RedisProcess):
    """Without it every flaky service would cost a whole attempt of the job."""
    tries = Counter[str]()

    async def flaky(ctx: Context) -> list[Any]:
        async def fails(name: str, times: int) -> str:
            tries[name] += 1
            if tries[name] <= times:
                raise OSError(f"try {tries[name]}")
            return f"after {times}"

        def wrong() -> None:
            tries["wrong"] += 1
            raise ValueError("never")

        soon = await ctx.step("soon", fails, "soon", 2, retry=Retry(attempts=3, base=0.01))
        late = await ctx.step("late", fails, "late", 1, retry=Retry(attempts=2, base=0.6, factor=1.0))
        caught = ""
        try:
            await ctx.step("wrong", wrong, retry=Retry(attempts=5, base=0.01, non_retryable=(ValueError,)))
        except StepError as error:
            caught = error.step_code
        return [soon, late, caught]

    async with talking(redis.url, app=app_of("flaky", flaky), park_after=0.1) as bench:
        job_id = await bench.submit("flaky")
        view = await bench.ended(job_id)
        log = await bench.log(job_id)
        await bench.healthy()
    assert view.result == ["after 2", "after 1", "exception"], view.error
    assert tries == {"soon": 3, "late": 2, "wrong": 1}
    failed = [
        (event.data["key"].split(":")[0], event.data.get("will_retry", False))
        for event in log
        if event.type == "step.failed"
    ]
    assert failed == [("soon", True), ("soon", True), ("late", True), ("wrong", False)]
    assert "job.waiting" in [event.type for event in log], "a long delay gives the slot up"


async def test_a_failed_step_fails_the_attempt_and_runs_again_in_the_next(redis: RedisProcess):
    """What completed stays done; only what failed is done again."""
    calls = Counter[str]()

    async def two(ctx: Context) -> str:
        async def fine() -> str:
            calls["fine"] += 1
            return "fine"

        async def twice() -> str:
            calls["twice"] += 1
            if calls["twice"] == 1:
                raise RuntimeError("boom")
            return "now"

        return await ctx.step("fine", fine) + await ctx.step("twice", twice)

    async with talking(redis.url, app=app_of("two", two, retry=Retry(attempts=2, base=0.01))) as bench:
        view = await bench.ended(await bench.submit("two"))
        await bench.healthy()
    assert (view.status, view.result, view.attempt) == ("completed", "finenow", 2)
    assert calls == {"fine": 1, "twice": 2}


async def test_what_cannot_get_better_is_not_tried_again(redis: RedisProcess):
    """Three attempts of a job that is wrong for good cost three times as much, and say the same."""

    async def wrong(ctx: Context, how: str) -> None:
        if how == "permanent":
            raise Permanent("the file is not there")
        raise KeyError("x")

    app = app_of("wrong", wrong, retry=Retry(attempts=5, base=0.01, non_retryable=("LookupError",)))
    async with talking(redis.url, app=app) as bench:
        one = await bench.ended(await bench.submit("wrong", "permanent"))
        other = await bench.ended(await bench.submit("wrong", "listed"))
    assert one.error is not None
    assert (one.error.code, one.attempt) == ("permanent", 1)
    assert (other.status, other.attempt) == ("failed", 1)


async def test_steps_are_bounded_in_time(redis: RedisProcess):
    """A hanging service would hang the job for an hour, async or not."""

    async def slow(ctx: Context) -> list[str]:
        async def forever() -> None:
            await asyncio.sleep(3600)

        codes: list[str] = []
        for function in (forever, lambda: time.sleep(1.0)):
            try:
                await ctx.step("slow", function, timeout=0.1)
            except StepError as error:
                codes.append(error.step_code)
        return codes

    async with talking(redis.url, app=app_of("slow", slow)) as bench:
        view = await bench.ended(await bench.submit("slow"))
    assert view.result == ["step_timeout", "step_timeout"], view.error


async def test_code_that_shows_no_life_fails_its_attempt(redis: RedisProcess):
    """A loop that hangs in the middle of a step would hold its slot until the job's timeout."""

    async def quiet(ctx: Context) -> None:
        async def hangs() -> None:
            await asyncio.sleep(3600)

        await ctx.step("hangs", hangs)

    async def alive(ctx: Context) -> str:
        async def beats() -> str:
            for _ in range(12):
                await asyncio.sleep(0.1)
                ctx.heartbeat()
            return "alive"

        return await ctx.step("beats", beats)

    app = app_of("quiet", quiet, max_attempts=1, heartbeat_timeout=0.9)
    app.workflow("alive", heartbeat_timeout=0.9)(alive)
    async with talking(redis.url, app=app) as bench:
        view = await bench.ended(await bench.submit("quiet"))
        other = await bench.ended(await bench.submit("alive"))
    assert view.error is not None
    assert (view.status, view.error.code) == ("failed", "heartbeat_timeout")
    assert other.result == "alive", other.error


async def test_large_outputs_become_artifacts(redis: RedisProcess):
    """Megabytes in an event would reach every viewer, and Redis would hold them twice."""
    calls = Counter[str]()

    async def large(ctx: Context) -> list[str]:
        def lines(count: int) -> list[str]:
            calls["lines"] += 1
            return [f"line {n}" for n in range(count)]

        found = await ctx.step("lines", lines, 20_000)
        await ctx.sleep(0.3)
        kept = await ctx.artifact("notes.txt", "a note")
        assert kept.size == 6
        return found

    async with talking(redis.url, app=app_of("large", large), park_after=0.1) as bench:
        job_id = await bench.submit("large")
        view = await bench.ended(job_id)
        media_type, content = await bench.store.artifacts.get(job_id, view.result_artifact)
        note = await bench.store.artifacts.get(job_id, "notes.txt")
        await bench.healthy()
    assert view.status == "completed", view.error
    assert calls == {"lines": 1}
    assert (view.result, view.result_artifact, media_type) == (None, "result", "application/json")
    assert msgspec.json.decode(content)[-1] == "line 19999"
    assert note == ("text/plain; charset=utf-8", b"a note")
    assert {artifact.name for artifact in view.artifacts} >= {"result", "notes.txt"}


async def test_an_output_that_is_too_large_or_no_json_fails_in_words(redis: RedisProcess):
    """A step that returns too much must say so, once, and not take Redis with it."""

    async def strange(ctx: Context) -> list[str]:
        said: list[str] = []
        for function in (object, lambda: "x" * 300_000):
            try:
                await ctx.step("made", function, key=str(len(said)), retry=5)
            except StepError as error:
                said.append(str(error))
        return said

    async with talking(redis.url, app=app_of("strange", strange), max_artifact=200_000) as bench:
        view = await bench.ended(await bench.submit("strange"))
    assert view.status == "completed", view.error
    assert "cannot be recorded as JSON" in view.result[0]
    assert "too large" in view.result[1]


async def test_a_once_step_whose_worker_died_is_unknown(redis: RedisProcess):
    """Nobody may pay twice; and nobody may be told that it was paid."""
    calls = Counter[str]()

    async def pays(ctx: Context) -> str:
        async def pay() -> str:
            calls["pay"] += 1
            await asyncio.sleep(3600)
            return "paid"

        try:
            return await ctx.step("pay", pay, effect="once")
        except OutcomeUnknown:
            return "unknown"

    async with talking(redis.url, app=app_of("pays", pays)) as bench:
        job_id = await bench.submit("pays")
        await bench.until(job_id, "step.started")
        async with working(bench.store, app_of("pays", pays)) as second:
            await drop_the_worker_of(bench, job_id, second.id)
            view = await bench.ended(job_id)
        types = await bench.types(job_id)
    assert view.result == "unknown", view.error
    assert calls == {"pay": 1}
    assert types.count("step.unknown") == 1


async def drop_the_worker_of(bench: Lab, job_id: str, survivor: str) -> None:
    """Take the lease away, as if the worker had died: its epoch is no longer the job's."""
    del survivor
    await bench.expire_lease(job_id)
    await bench.until(job_id, "job.lost")


async def test_a_changed_workflow_is_found_out_before_it_does_anything_else(redis: RedisProcess):
    """New code on old records would do something that nobody ever wrote."""
    calls = Counter[str]()

    async def count(name: str) -> None:
        calls[name] += 1

    async def before(ctx: Context) -> None:
        await ctx.step("old", count, "old")
        await ctx.wait_for("deployed")
        await ctx.step("end", count, "end")

    async def after(ctx: Context) -> None:
        await ctx.step("new", count, "new")
        await ctx.wait_for("deployed")
        await ctx.step("end", count, "end")

    async with talking(redis.url, app=app_of("changing", before), park_after=0.05) as bench:
        job_id = await bench.submit("changing")
        await bench.until(job_id, "job.waiting")
    async with lab(redis.url) as bench:
        await bench.store.jobs.signal(job_id, "deployed")
    async with talking(redis.url, app=app_of("changing", after), replay_timeout=0.2) as bench:
        view = await bench.ended(job_id)
        await bench.healthy()
    assert view.error is not None
    assert (view.status, view.error.code) == ("failed", "workflow_changed")
    assert "old" in view.error.message
    assert calls == {"old": 1}


# --- waits


async def test_signals_are_read_in_order_also_those_that_came_before(redis: RedisProcess):
    """An approval that comes a moment too early must not be lost."""

    async def reads(ctx: Context) -> list[Any]:
        early = await ctx.wait_for("go")
        await ctx.step("work", double, 1)
        return [early, await ctx.wait_for("go"), await ctx.wait_for("stop", timeout=60.0)]

    async with lab(redis.url, park_after=0.05) as bench:
        job_id = await bench.submit("reads")
        assert await bench.store.jobs.signal(job_id, "go", {"n": 1}, key="a")
        assert not await bench.store.jobs.signal(job_id, "go", {"n": 1}, key="a"), "the same answer"
        async with working(bench.store, app_of("reads", reads)):
            await bench.until(job_id, "job.waiting")
            await bench.store.jobs.signal(job_id, "go", {"n": 2}, key="b")
            await bench.until(job_id, "job.waiting", 2)
            assert (await bench.view(job_id)).waiting_for == "signal:stop"
            await bench.store.jobs.signal(job_id, "stop")
            view = await bench.ended(job_id)
        with pytest.raises(JobEnded, match="completed"):
            await bench.store.jobs.signal(job_id, "go")
        await bench.healthy()
    assert view.result == [{"n": 1}, {"n": 2}, None], view.error


@pytest.mark.parametrize("park_after", [0.05, 5.0], ids=["parked", "in memory"])
async def test_a_wait_ends_with_its_timeout(redis: RedisProcess, park_after: float):
    """A person who never answers must not keep a job for ever."""

    async def waits(ctx: Context) -> list[Any]:
        raised = False
        try:
            await ctx.wait_for("never", timeout=0.4)
        except TimeoutError:
            raised = True
        return [raised, await ctx.wait_for("never", timeout=0.2, default="nobody")]

    async with talking(redis.url, app=app_of("waits", waits), park_after=park_after) as bench:
        view = await bench.ended(await bench.submit("waits"))
        await bench.healthy()
    assert view.result == [True, "nobody"], view.error


async def test_an_answered_wait_leaves_no_alarm_behind(redis: RedisProcess):
    """The timeout of a wait that is over would wake the job again and again."""

    async def waits(ctx: Context) -> str:
        await ctx.wait_for("go", timeout=2.0)
        await ctx.wait_for("end")
        return "done"

    async with talking(redis.url, app=app_of("waits", waits), park_after=0.05) as bench:
        job_id = await bench.submit("waits")
        await bench.until(job_id, "job.waiting")
        await bench.store.jobs.signal(job_id, "go")
        await bench.until(job_id, "job.waiting", 2)
        await asyncio.sleep(2.2)
        types = await bench.types(job_id)
        await bench.store.jobs.signal(job_id, "end")
        await bench.ended(job_id)
    assert "timer.fired" not in types


async def test_two_branches_wait_each_for_its_own(redis: RedisProcess):
    """Parallel branches must not read each other's mail, nor hold each other up."""

    async def branches(ctx: Context) -> list[Any]:
        async def branch(name: str) -> Any:
            said = await ctx.wait_for(name)
            return await ctx.step(f"after {name}", double, said)

        return await asyncio.gather(branch("left"), branch("right"))

    async with talking(redis.url, app=app_of("branches", branches), park_after=0.05) as bench:
        job_id = await bench.submit("branches")
        await bench.until(job_id, "job.waiting")
        await bench.store.jobs.signal(job_id, "right", 2)
        await bench.until(job_id, "step.completed")
        await bench.store.jobs.signal(job_id, "left", 1)
        view = await bench.ended(job_id)
        await bench.healthy()
    assert view.result == [2, 4], view.error


async def test_a_short_sleep_stays_in_memory(redis: RedisProcess):
    """A pause of a moment must not give up the slot."""

    async def naps(ctx: Context) -> None:
        for _ in range(3):
            await ctx.sleep(0.01)

    async with talking(redis.url, app=app_of("naps", naps)) as bench:
        job_id = await bench.submit("naps")
        await bench.ended(job_id)
        naps_taken = ["timer.set", "timer.fired"] * 3
        assert await bench.types(job_id) == ["job.queued", "job.started", *naps_taken, "job.completed"]


# --- approvals


async def test_a_person_approves_or_denies(redis: RedisProcess):
    """The one thing that must never happen by itself."""
    effects: list[str] = []

    async def deploy(name: str) -> str:
        effects.append(name)
        return f"deployed {name}"

    async def asks(ctx: Context) -> list[Any]:
        decision = await ctx.approve("Begin?", detail={"cost": 3})
        said: list[Any] = [decision.approved, decision.comment, decision.by]
        said.append(await ctx.step("deploy", deploy, "a", approval="Deploy a?"))
        try:
            await ctx.step("deploy", deploy, "b", approval="Deploy b?")
        except Denied as error:
            said.append(str(error))
        return said

    async with talking(redis.url, app=app_of("asks", asks), park_after=0.05) as bench:
        job_id = await bench.submit("asks")
        for number, payload in enumerate(
            [
                {"decision": "approve", "comment": "fine"},
                {"decision": "approve"},
                {"decision": "deny", "comment": "too late"},
            ],
            1,
        ):
            await bench.until(job_id, "approval.requested", number)
            pending = [one for one in (await bench.view(job_id)).approvals if one.state == "pending"]
            assert len(pending) == 1
            await bench.store.jobs.signal(job_id, "approval", {**payload, "key": pending[0].key}, by="ann")
        view = await bench.ended(job_id)
        await bench.healthy()
    assert view.result == [True, "fine", "ann", "deployed a", "too late"], view.error
    assert effects == ["a"]
    assert [one.state for one in view.approvals] == ["approved", "approved", "denied"]
    assert [step.state for step in view.steps] == ["completed", "failed"]


async def test_a_models_call_waits_for_a_person(redis: RedisProcess):
    """An agent that mails, pays or deletes does so when somebody said yes, and hears a no."""
    from streamjobs.testing import Scenario, ScriptedCall, Turn

    sent: list[str] = []
    app = App(builtin_tools=False)

    @app.tool(effect="once", approval="Send the mail?")
    def send(to: str) -> str:
        """Send."""
        sent.append(to)
        return "sent"

    scenario = Scenario(
        turns=[
            Turn(
                text="I ask. ",
                tool_calls=[
                    ScriptedCall(name="send", arguments={"to": "bo"}),
                    ScriptedCall(name="send", arguments={"to": "eve"}),
                ],
            ),
            Turn(text="Done."),
        ]
    )
    async with talking(redis.url, scenario, app, park_after=0.05) as bench:
        job_id = await bench.chat("mail bo", tools=["send"])
        await bench.until(job_id, "approval.requested", 2)
        await bench.until(job_id, "job.waiting")
        bo, eve = (await bench.view(job_id)).approvals
        assert bo.detail == {"tool": "send", "arguments": {"to": "bo"}}
        await bench.store.jobs.signal(
            job_id, "approval", {"decision": "deny", "key": eve.key, "comment": "no"}
        )
        await bench.store.jobs.signal(job_id, "approval", {"decision": "approve", "key": bo.key})
        view = await bench.ended(job_id)
        await bench.healthy()
    assert view.status == "completed", view.error
    assert sent == ["bo"]
    assert [call.state for call in view.tool_calls] == ["completed", "failed"]
    assert view.tool_calls[1].error is not None
    assert (view.tool_calls[1].error.code, view.tool_calls[1].error.message) == ("denied", "no")
    assert view.text == "I ask. Done."


# --- tools from workflows


async def test_a_workflow_calls_tools_by_their_rules(redis: RedisProcess):
    """Effects, schemas and limits of a tool hold whoever calls it."""
    app, keys = App(builtin_tools=False), []

    @app.tool(effect="idempotent")
    async def add(ctx: ToolContext, a: int, b: int) -> int:
        """Add."""
        keys.append(ctx.idempotency_key)
        return a + b

    @app.workflow("tools")
    async def tools(ctx: Context) -> list[Any]:
        first = await ctx.tool(add, a=1, b=2)
        again = await ctx.tool("add", a=1, b=2)
        await ctx.sleep(0.3)
        try:
            await ctx.tool("add", a="x", b=2)
        except StepError as error:
            return [first, again, error.step_code]
        return []

    async with talking(redis.url, app=app, park_after=0.05) as bench:
        job_id = await bench.submit("tools")
        view = await bench.ended(job_id)
        await bench.healthy()
    assert view.result == [3, 3, "invalid_arguments"], view.error
    assert len(keys) == len(set(keys)) == 2
    assert [call.state for call in view.tool_calls] == ["completed", "completed", "failed"]


async def test_a_once_call_whose_worker_died_is_looked_up(redis: RedisProcess):
    """A tool that can be asked what it did need not leave anybody in doubt."""
    happened: dict[str, str] = {}
    app = App(builtin_tools=False)

    def lookup(key: str) -> str:
        return happened[key]

    @app.tool(effect="once", lookup=lookup, timeout=60.0)
    async def pay(ctx: ToolContext, amount: int, late: bool) -> str:
        """Pay."""
        if late and ctx.attempt == 1:
            await asyncio.sleep(3600)
        happened[ctx.idempotency_key] = f"paid {amount}"
        if ctx.attempt == 1:
            await asyncio.sleep(3600)
        return happened[ctx.idempotency_key]

    @app.workflow("pays")
    async def pays(ctx: Context, late: bool) -> str:
        return await ctx.tool(pay, amount=5, late=late)

    async with talking(redis.url, app=app) as bench:
        for late in (False, True):
            job_id = await bench.submit("pays", late)
            await bench.until(job_id, "tool.started")
            if not late:
                await wait_until(lambda: happened)
            await drop_the_worker_of(bench, job_id, "")
            view = await bench.ended(job_id)
            assert view.result == "paid 5", view.error
            assert (await bench.types(job_id)).count("tool.started") == (2 if late else 1)


async def test_calls_wait_for_their_rate(redis: RedisProcess):
    """A rate that each worker keeps for itself is broken by the second worker."""
    app, called = App(builtin_tools=False), []

    @app.tool(rate="5/s")
    async def ask(n: int) -> int:
        """Ask."""
        called.append(time.monotonic())
        return n

    @app.workflow("asks")
    async def asks(ctx: Context) -> int:
        return sum(await asyncio.gather(*(ctx.tool(ask, n=n) for n in range(4))))

    async with talking(redis.url, app=app) as bench, working(bench.store, app):
        began = time.monotonic()
        view = await bench.ended(*[await bench.submit("asks", owner=f"o{n}") for n in range(3)])
    assert view.result == 6, view.error
    assert len(called) == 12
    assert max(called) - began > 1.3, "twelve calls, five at once, then five a second"


async def test_a_struck_tool_waits_until_the_strike_is_lifted(redis: RedisProcess):
    """An operator who stops a broken tool must not lose the jobs that need it."""
    app = App(builtin_tools=False)

    @app.tool
    async def ask() -> str:
        """Ask."""
        return "answer"

    @app.workflow("asks")
    async def asks(ctx: Context) -> str:
        await ctx.step("first", double, 1)
        return await ctx.tool(ask)

    async with lab(redis.url, park_after=30.0) as bench, working(bench.store, app) as worker:
        await bench.store.strikes.strike("tool", "ask", by="op", reason="broken")
        await wait_until(lambda: worker._is_struck("ask"), what="the worker's hearing of it")
        job_id = await bench.submit("asks")
        await bench.until(job_id, "tool.called")
        await asyncio.sleep(0.5)
        assert "tool.started" not in await bench.types(job_id)
        await bench.store.strikes.lift("tool", "ask")
        view = await bench.ended(job_id)
    assert view.result == "answer", view.error


# --- children


async def test_children_run_beside_and_are_joined(redis: RedisProcess):
    """A large job is cut into small ones, and waits for them without a slot."""
    app = App(builtin_tools=False)

    @app.workflow("part")
    async def part(ctx: Context, n: int) -> int:
        if n == 13:
            raise Permanent("unlucky")
        return await ctx.step("double", double, n)

    @app.workflow("whole")
    async def whole(ctx: Context, numbers: list[int]) -> list[Any]:
        children = [await ctx.spawn("part", n) for n in numbers]
        await ctx.step("between", double, 0)
        results: list[Any] = []
        for child in children:
            try:
                results.append(await child.result())
            except ChildFailed as error:
                results.append([error.status, "unlucky" in str(error)])
        return results

    async with talking(redis.url, app=app, park_after=0.05) as bench:
        job_id = await bench.submit("whole", [1, 2, 13])
        view = await bench.ended(job_id)
        await bench.healthy()
    assert view.result == [2, 4, ["failed", True]], view.error
    assert [(child.kind, child.status) for child in view.children] == [
        ("part", "completed"),
        ("part", "completed"),
        ("part", "failed"),
    ]


async def test_cancelling_a_parent_cancels_its_children(redis: RedisProcess):
    """A stopped job whose children work on is not stopped."""
    app, stopped = App(builtin_tools=False), []

    @app.workflow("part")
    async def part(ctx: Context, n: int) -> None:
        async def works() -> None:
            try:
                await asyncio.sleep(3600)
            finally:
                stopped.append(n)

        await ctx.step("works", works)

    @app.workflow("whole")
    async def whole(ctx: Context) -> None:
        await ctx.join(*[await ctx.spawn("part", n) for n in range(3)])

    async with talking(redis.url, app=app, park_after=0.05) as bench:
        job_id = await bench.submit("whole")
        await bench.until(job_id, "child.spawned", 3)
        children = [child.job for child in (await bench.view(job_id)).children]
        for child in children:
            await bench.until(child, "step.started")
        await bench.store.jobs.cancel(job_id, by="ann", reason="enough")
        await bench.ended(job_id, *children)
        views = [await bench.view(one) for one in (job_id, *children)]
        await bench.healthy()
    assert [view.status for view in views] == ["cancelled"] * 4
    assert sorted(stopped) == [0, 1, 2]


async def test_recursion_ends_at_the_depth_limit(redis: RedisProcess):
    """A workflow that spawns itself would fill the store."""
    app = App(builtin_tools=False)

    @app.workflow("nested")
    async def nested(ctx: Context, n: int) -> Any:
        return await (await ctx.spawn("nested", n + 1)).result()

    async with talking(redis.url, app=app, max_depth=3) as bench:
        view = await bench.ended(await bench.submit("nested", 0))
        await bench.healthy()
    assert view.error is not None
    assert (view.status, view.error.code) == ("failed", "child_failed")
    assert "too_deep" in view.error.message


async def test_what_a_workflow_asks_wrongly_fails_it_in_words(redis: RedisProcess):
    """An unknown kind, an input that does not fit: the job says so, and the worker goes on."""
    app = App(builtin_tools=False)

    @app.workflow("part")
    async def part(ctx: Context, n: int) -> int:
        return n

    @app.workflow("whole")
    async def whole(ctx: Context, given: list[Any]) -> Any:
        return await (await ctx.spawn(given[0], given[1])).result()

    async with talking(redis.url, app=app) as bench:
        unknown = await bench.ended(await bench.submit("whole", ["parts", 1]))
        unfit = await bench.ended(await bench.submit("whole", ["part", "x"]))
        fine = await bench.ended(await bench.submit("whole", ["part", 1]))
    assert unknown.error is not None
    assert unfit.error is not None
    assert (unknown.error.code, unfit.error.code) == ("unknown_kind", "invalid")
    assert "did you mean 'part'" in unknown.error.message
    assert unfit.error.message.startswith("input:")
    assert fine.result == 1


# --- pause, drain, timeouts


async def test_a_paused_job_goes_on_where_it_was(redis: RedisProcess):
    """Its owner stops it at the next recorded point, and lets it go on, on any worker."""
    calls, may_end = Counter[str](), asyncio.Event()

    async def steps(ctx: Context) -> int:
        async def counted(n: int) -> None:
            calls[str(n)] += 1
            if n == 3:
                await may_end.wait()
            await asyncio.sleep(0.01)

        for n in range(10):
            await ctx.step("n", counted, n)
        return len(calls)

    app = app_of("steps", steps)
    async with lab(redis.url) as bench, working(bench.store, app) as one, working(bench.store, app) as other:
        job_id = await bench.submit("steps")
        await bench.until(job_id, "step.completed", 3)
        assert await bench.store.jobs.pause(job_id, by="ann") == "requested"
        (execution,) = [*one._executions.values(), *other._executions.values()]
        await wait_until(lambda: execution.journal.asked == "pause", what="the worker's hearing of it")
        may_end.set()
        await bench.until(job_id, "job.paused")
        before = len(calls)
        await asyncio.sleep(0.3)
        assert len(calls) == before < 10
        assert await bench.store.jobs.resume(job_id, by="ann") == "resumed"
        view = await bench.ended(job_id)
        await bench.healthy()
    assert view.result == 10, view.error
    assert set(calls.values()) == {1}


async def test_a_waiting_job_is_paused_at_once(redis: RedisProcess):
    """Also one that waits in its worker's memory."""

    async def waits(ctx: Context) -> Any:
        return await ctx.wait_for("go")

    async with talking(redis.url, app=app_of("waits", waits), park_after=30.0) as bench:
        job_id = await bench.submit("waits")
        await bench.until(job_id, "job.started")
        await bench.store.jobs.pause(job_id)
        await bench.until(job_id, "job.paused")
        await bench.store.jobs.signal(job_id, "go", 7)
        await bench.store.jobs.resume(job_id)
        view = await bench.ended(job_id)
        await bench.healthy()
    assert view.result == 7, view.error


async def test_a_job_is_ended_at_its_timeout_wherever_it_waits(redis: RedisProcess):
    """Start-to-finish holds for sleepers and waiters, too."""

    async def waits(ctx: Context) -> None:
        await ctx.wait_for("never")

    async with talking(redis.url, app=app_of("waits", waits), park_after=0.05) as bench:
        view = await bench.ended(await bench.submit("waits", timeout=0.6))
        await bench.healthy()
    assert view.error is not None
    assert (view.status, view.error.code) == ("failed", "timeout")


async def test_a_chat_belongs_to_its_workflow(redis: RedisProcess):
    """Deltas stream into the same job; a replay does not ask the model again."""

    async def asks(ctx: Context) -> list[str]:
        first = await ctx.chat("one")
        await ctx.sleep(0.3)
        return [first, await ctx.chat("two", data={"a": 1})]

    async with talking(redis.url, says("answer"), app_of("asks", asks), park_after=0.05) as bench:
        job_id = await bench.submit("asks")
        view = await bench.ended(job_id)
        requests = len(bench.provider.requests)
        await bench.healthy()
    assert view.result == ["answer", "answer"], view.error
    assert view.text == "answeranswer"
    assert requests == view.metrics.requests == 2


async def test_a_summary_stands_beside_the_result(redis: RedisProcess):
    """Lists show a line for people, not a result of kilobytes."""

    async def works(ctx: Context) -> int:
        ctx.summary = "all fine"
        return 1

    async with talking(redis.url, app=app_of("works", works)) as bench:
        view = await bench.ended(await bench.submit("works"))
    assert (view.summary, view.result) == ("all fine", 1)
    assert view.metrics.seconds is not None


# --- queues


async def test_a_queue_has_its_own_concurrency(redis: RedisProcess):
    """Twenty large documents must not take every slot from the chats beside them."""
    running, most, full = Counter[str](), Counter[str](), asyncio.Event()
    app = App(builtin_tools=False)

    async def busy(ctx: Context, queue: str) -> None:
        running[queue] += 1
        most[queue] = max(most[queue], running[queue])
        await full.wait()
        running[queue] -= 1

    app.workflow("busy")(busy)
    async with lab(redis.url, queues=("chat", "documents")) as bench:
        documents = [await bench.submit("busy", "documents", queue="documents") for _ in range(8)]
        chats = [await bench.submit("busy", "chat", queue="chat") for _ in range(4)]
        async with working(bench.store, app, queue_limits={"documents": 2}):
            await wait_until(lambda: running == {"documents": 2, "chat": 4}, what="all that may run at once")
            full.set()
            await bench.ended(*documents, *chats)
        await bench.healthy()
    assert most == {"documents": 2, "chat": 4}


# --- what a step says


async def test_what_a_step_says_does_not_silence_what_comes_after(redis: RedisProcess):
    """A log line would be swallowed in a replay, for each that a step had written before."""

    async def talks(ctx: Context) -> None:
        def loud() -> None:
            for n in range(3):
                ctx.log(f"in a thread {n}")

        async def quiet() -> None:
            ctx.log("in a step")
            await ctx.artifact("made", "within")

        await ctx.step(loud)
        await ctx.step(quiet)
        ctx.log("before")
        await ctx.sleep(0.3)
        ctx.log("after")
        await ctx.artifact("made", "behind")

    async with talking(redis.url, app=app_of("talks", talks), park_after=0.05) as bench:
        job_id = await bench.submit("talks")
        view = await bench.ended(job_id)
        _, made = await bench.store.artifacts.get(job_id, "made")
    said = [line.message for line in view.log_lines]
    assert said == [*(f"in a thread {n}" for n in range(3)), "in a step", "before", "after"]
    assert made == b"behind"


async def test_a_step_may_not_ask_for_what_is_the_workflows(redis: RedisProcess):
    """A step within a step would be asked for in the first run only, and the job would hang in the next."""

    async def nests(ctx: Context) -> str:
        async def inner() -> None:
            await ctx.sleep(1.0)

        try:
            await ctx.step(inner)
        except StepError as error:
            return str(error)
        return ""

    async with talking(redis.url, app=app_of("nests", nests)) as bench:
        view = await bench.ended(await bench.submit("nests"))
    assert "within step 'inner'" in view.result, view.error
