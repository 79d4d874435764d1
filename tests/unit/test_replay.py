"""What a replay tells a workflow, and in which order: cut at any event, a job goes on as if it had not been.

Each workflow runs once undisturbed and then from every beginning of its log, as a worker that takes over
finds it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from streamjobs import App, Context, Permanent, Retry
from streamjobs.errors import ProviderError, StepError, WaitTimeout
from streamjobs.events import ToolCallRequest
from streamjobs.llm.base import Answer, ModelRequest
from tests.desk import Desk

Code = Callable[..., Awaitable[Any]]
DONE = {"step.started", "timer.set", "child.spawned", "approval.requested", "turn.started", "tool.started"}
"""What a job whose code was changed must not write."""


async def give(value: Any) -> Any:
    return value


async def later(value: Any, turns: int) -> Any:
    for _ in range(turns):
        await asyncio.sleep(0)
    return value


def app_of(code: Code) -> App:
    app = App(builtin_tools=False)
    app.workflow("tried")(code)

    @app.workflow("child")
    async def child(ctx: Context, number: int) -> int:
        return number

    @app.tool
    async def look() -> str:
        """Look."""
        return "seen"

    return app


def desk_of(code: Code, **options: Any) -> Desk:
    return Desk(app_of(code), "tried", **({"default_model": "m"} | options))


def speaks(text: str) -> Callable[[ModelRequest], Answer]:
    return lambda _request: Answer(text)


def once_looks(request: ModelRequest) -> Answer:
    """A call of the tool in the first turn, words in the second."""
    if any(message.role == "tool" for message in request.messages):
        return Answer("it was seen")
    return Answer("let me see", calls=[ToolCallRequest("c1", "look", "{}")])


async def every_beginning(code: Code, answers: dict[str, Any] | None = None, **options: Any) -> Desk:
    """Run it, then go on from every beginning of its log: each ends well, and does nothing twice."""
    whole = desk_of(code, **options)
    await whole.finish(**(answers or {}))
    assert whole.status == "completed", whole.error
    for length in range(2, len(whole.entries)):
        desk = desk_of(code, **options)
        desk.artifacts = dict(whole.artifacts)
        desk.load(whole.entries[:length])
        await desk.finish(**(answers or {}))
        assert desk.status == "completed", (length, whole.types[length - 1], desk.error)
        require_done_once(desk)
    return whole


def require_done_once(desk: Desk) -> None:
    """Each step, timer and turn has at most one outcome, and each child one beginning."""
    names = [
        (kind, content.get("key") or content.get("job") or content.get("turn"))
        for kind, content in desk.events
        if (kind == "step.completed" or kind in {"timer.fired", "child.spawned", "turn.completed"})
    ]
    assert len(names) == len(set(names)), names


# --- order -------------------------------------------------------------------------------------------


async def steps_side_by_side(ctx: Context) -> Any:
    seen: list[Any] = []

    async def branch(number: int) -> None:
        for turn in range(3):
            await ctx.step(f"b{number}", later, turn, (7 * number + 3 * turn) % 5)
            seen.append((number, turn))

    await asyncio.gather(*(branch(number) for number in range(4)))
    return await ctx.step("all", give, seen)


async def a_short_sleep_beside_a_step(ctx: Context) -> Any:
    seen: list[str] = []

    async def sleeper() -> None:
        await ctx.sleep(0.01)
        seen.append("slept")

    async def worker() -> None:
        await ctx.step("work", give, 1)
        seen.append("worked")

    await asyncio.gather(sleeper(), worker())
    return await ctx.step("all", give, seen)


async def artifacts_beside_steps(ctx: Context) -> Any:
    seen: list[str] = []

    async def maker() -> None:
        await ctx.artifact("a", b"1")
        await ctx.artifact("a", b"2")
        seen.append("made")

    async def worker(turns: int) -> None:
        await ctx.step("work", later, 1, turns)
        seen.append("worked")

    await asyncio.gather(worker(0), maker(), worker(5), worker(20))
    return await ctx.step("all", give, seen)


async def children_beside_steps(ctx: Context) -> Any:
    seen: list[str] = []

    async def parent() -> None:
        children = [await ctx.spawn("child", number) for number in range(3)]
        seen.append("spawned")
        await ctx.join(*children)
        seen.append("joined")

    async def worker(turns: int) -> None:
        await ctx.step("work", later, 1, turns)
        seen.append("worked")

    await asyncio.gather(worker(0), parent(), worker(9), worker(20))
    return await ctx.step("all", give, seen)


async def a_chat_beside_steps(ctx: Context) -> Any:
    seen: list[str] = []

    async def talker() -> None:
        await ctx.chat("hello", tools=["look"])
        seen.append("talked")

    async def worker(turns: int) -> None:
        for turn in range(turns):
            await ctx.step("work", later, turns, turn)
            seen.append("worked")

    await asyncio.gather(talker(), *(worker(turns) for turns in range(1, 6)))
    return await ctx.step("all", give, seen)


async def large_outputs_beside_small(ctx: Context) -> Any:
    seen: list[str] = []

    async def branch(size: int) -> None:
        await ctx.step("make", give, "x" * size)
        seen.append(str(size))
        await ctx.step("next", give, size)
        seen.append(f"next {size}")

    await asyncio.gather(branch(2000), branch(1), branch(3000), branch(2))
    return await ctx.step("all", give, seen)


async def signals_beside_steps(ctx: Context) -> Any:
    seen: list[Any] = []

    async def reader(name: str) -> None:
        seen.append(await ctx.wait_for(name, timeout=5, default="none"))

    async def worker() -> None:
        for number in range(3):
            seen.append(await ctx.step("work", give, number))
            await ctx.sleep(3)

    await asyncio.gather(reader("go"), reader("never"), reader("go"), worker())
    return await ctx.step("all", give, seen)


async def a_group_whose_branch_fails(ctx: Context) -> Any:
    async def fails() -> None:
        raise Permanent("no")

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(ctx.step("slow", later, 1, 200))
            group.create_task(ctx.step("fails", fails))
    except* StepError as failures:
        why = [str(error) for error in failures.exceptions]
    return await ctx.step("fallback", give, why)


async def steps_beside_what_needs_no_time(ctx: Context) -> Any:
    seen: list[str] = []

    async def busy(name: str, doing: Awaitable[Any]) -> None:
        await doing
        seen.append(name)

    async def idle() -> None:
        ctx.emit("idle")
        seen.append("idle")

    slept = busy("slept", ctx.sleep(0.01))
    made = busy("made", ctx.artifact("a", b"1"))
    worked = busy("worked", ctx.step("work", give, 1))
    await asyncio.gather(slept, idle(), made, idle(), worked, idle())
    return await ctx.step("all", give, seen)


ORDERED = [
    steps_beside_what_needs_no_time, steps_side_by_side, a_short_sleep_beside_a_step,
    artifacts_beside_steps, children_beside_steps, a_chat_beside_steps, large_outputs_beside_small,
    signals_beside_steps, a_group_whose_branch_fails,
]  # fmt: skip


@pytest.mark.parametrize("code", ORDERED, ids=lambda code: code.__name__)
async def test_branches_go_on_in_the_order_of_the_first_run(code: Code):
    """What branches share (a list that a later step gets) must not differ in a replay: a healthy job would
    fail as changed code."""
    for park_after in (0.0, 0.02):
        await every_beginning(
            code, {"go": "went"}, script=once_looks, inline_output=1000, park_after=park_after
        )


@pytest.mark.parametrize("words", range(1, 12, 2))
async def test_a_chat_ends_beside_steps_in_one_order(words: int):
    """However long the answer takes, whoever was first in the log is first again."""
    await every_beginning(a_chat_beside_steps, script=speaks(" ".join("w" * words)))


@pytest.mark.parametrize("depth", range(5))
async def test_who_takes_the_first_to_complete_gets_the_same_again(depth: int):
    """`asyncio.wait(FIRST_COMPLETED)` over steps that are committed together is decided once."""

    async def nested(doing: Awaitable[Any], more: int) -> Any:
        return (await asyncio.gather(nested(doing, more - 1)))[0] if more else await doing

    async def code(ctx: Context) -> Any:
        steps = {asyncio.ensure_future(nested(ctx.step(name, later, 1, 1), depth)) for name in "abc"}
        done, _ = await asyncio.wait(steps, return_when=asyncio.FIRST_COMPLETED)
        await ctx.step("count", give, len(done))
        return await asyncio.gather(*steps)

    await every_beginning(code)


# --- waits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["signal", "timer"])
async def test_signal_and_timeout_together_are_decided_by_the_log(first: str):
    """A worker that finds both must not decide otherwise than the one before."""

    async def code(ctx: Context) -> Any:
        try:
            told: Any = await ctx.wait_for("go", timeout=5)
        except WaitTimeout:
            told = "too late"
        await ctx.step("told", give, told)
        return [told, await ctx.wait_for("go", timeout=7, default="nobody")]

    whole = desk_of(code)
    assert await whole.run() == "waiting"
    acts = [lambda: whole.signal("go", "came"), whole.fire]
    for act in acts if first == "signal" else reversed(acts):
        act()
    await whole.finish()
    assert whole.result == (["came", "nobody"] if first == "signal" else ["too late", "came"])
    for length in range(whole.types.index("step.started"), len(whole.entries)):
        desk = desk_of(code)
        desk.load(whole.entries[:length])
        await desk.finish()
        assert desk.result == whole.result, length


async def test_a_signal_that_comes_while_the_job_runs_is_told_behind_what_came_before():
    """A job that is not parked hears of the outside in the order of its log, too."""

    async def code(ctx: Context) -> Any:
        seen: list[Any] = []
        desk.calls_in_flight.set()

        async def worker() -> None:
            for number in range(5):
                seen.append(await ctx.step("work", later, number, 3))

        async def reader() -> None:
            seen.append(await ctx.wait_for("go"))

        await asyncio.gather(worker(), reader())
        return await ctx.step("all", give, seen)

    desk = desk_of(code)
    assert await desk.run(meanwhile=lambda: desk.signal("go", "went")) == "completed"
    for length in range(2, len(desk.entries)):
        again = desk_of(code)
        again.load(desk.entries[:length])
        await again.finish(go="went")
        assert again.status == "completed", (length, again.error)


async def test_signals_are_read_in_order_each_once():
    """Two messages to a job are two messages, in a replay too."""

    async def code(ctx: Context) -> Any:
        await ctx.sleep(5)
        return [await ctx.wait_for("word"), await ctx.wait_for("word"), await ctx.wait_for("word")]

    desk = desk_of(code)
    await desk.run()
    for word in "abc":
        desk.signal("word", word)
    desk.fire()
    await desk.finish()
    assert desk.result == ["a", "b", "c"]


async def test_a_job_is_never_parked_on_a_wait_that_is_over():
    """Where the event loop stood still, whoever was just told something must wake up before the job sleeps:
    its signal would never come again."""

    async def code(ctx: Context) -> Any:
        await ctx.sleep(1)
        first = await ctx.wait_for("go")
        await ctx.sleep(1)
        return first

    desk = desk_of(code, park_after=0.0)
    for happens in (desk.fire, lambda: desk.signal("go", 1), desk.fire):
        await desk.run()
        happens()
    assert await desk.run() == "completed"
    assert desk.types.count("job.waiting") == 3


@pytest.mark.parametrize("kind", ["signal", "signal with timeout", "approval", "approval with timeout"])
@pytest.mark.parametrize("first", ["signal", "timer"])
async def test_an_answer_that_came_before_it_was_asked_for_is_told_in_one_order(kind: str, first: str):
    """A person who is quicker than the workflow must not make it go another way in a replay."""
    timeout = 60 if "timeout" in kind else None

    async def code(ctx: Context) -> Any:
        seen: list[str] = []

        async def asks() -> None:
            await ctx.wait_for("go", timeout=60)
            if "approval" in kind:
                await ctx.approve("Well?", timeout=timeout, key="well")
            else:
                await ctx.wait_for("early", timeout=timeout)
            seen.append("answered")

        async def sleeps() -> None:
            await ctx.sleep(5)
            seen.append("slept")

        async def works() -> None:
            await ctx.sleep(4)
            await ctx.step("work", give, 1)
            seen.append("worked")

        await asyncio.gather(asks(), sleeps(), works())
        return await ctx.step("all", give, seen)

    whole = desk_of(code)
    await whole.run()
    early = ("approval", {"decision": "approve"}) if "approval" in kind else ("early", None)
    acts = [lambda: whole.signal("go"), lambda: whole.fire("sleep:4"), lambda: whole.fire("sleep:5")]
    whole.signal(*early)
    for act in acts if first == "signal" else reversed(acts):
        act()
    await whole.finish()
    assert whole.status == "completed", whole.error
    for length in range(2, len(whole.entries)):
        desk = desk_of(code)
        desk.load(whole.entries[:length])
        await desk.finish(go=None, early=None, approval="approve")
        assert desk.status == "completed", (length, whole.types[length - 1], desk.error)


@pytest.mark.parametrize("news", ["signal", "timer"])
async def test_news_at_any_turn_of_parking_wake_the_job(news: str):
    """Between the decision to park and the store's answer nothing may be told and yet not heard: it would
    sleep on a wait that is over, for ever."""

    async def code(ctx: Context) -> Any:
        desk.calls_in_flight.set()
        return await (ctx.wait_for("go") if news == "signal" else ctx.sleep(5))

    for turns in range(60):
        desk = desk_of(code)
        happens = (lambda desk=desk: desk.signal("go")) if news == "signal" else desk.fire
        status = await desk.run(meanwhile=happens, turns=turns + 10)
        assert status in {"completed", "queued"}, turns
        if status == "queued":
            assert await desk.run() == "completed"


# --- changed code ------------------------------------------------------------------------------------


async def recorded(ctx: Context) -> Any:
    first = await ctx.step("first", give, 1)
    await ctx.step("second", give, first)
    await ctx.chat("How is it?")
    await ctx.sleep(5)
    return await ctx.step("last", give, 4)


async def without_a_step(ctx: Context) -> Any:
    await ctx.step("second", give, 1)
    await ctx.chat("How is it?")
    await ctx.sleep(5)
    return await ctx.step("last", give, 4)


async def without_the_end(ctx: Context) -> Any:
    return await ctx.step("first", give, 1)


async def with_other_arguments(ctx: Context) -> Any:
    first = await ctx.step("first", give, 1)
    await ctx.step("second", give, first + 1)
    await ctx.chat("How is it?")
    await ctx.sleep(5)
    return await ctx.step("last", give, 4)


async def in_another_order(ctx: Context) -> Any:
    await ctx.step("second", give, 1)
    await ctx.step("first", give, 1)
    await ctx.chat("How is it?")
    await ctx.sleep(5)
    return await ctx.step("last", give, 4)


async def with_another_question(ctx: Context) -> Any:
    first = await ctx.step("first", give, 1)
    await ctx.step("second", give, first)
    await ctx.chat("How was it?")
    await ctx.sleep(5)
    return await ctx.step("last", give, 4)


async def with_a_new_step_before(ctx: Context) -> Any:
    await ctx.step("new", give, 0)
    return await recorded(ctx)


async def without_the_sleep(ctx: Context) -> Any:
    first = await ctx.step("first", give, 1)
    await ctx.step("second", give, first)
    await ctx.chat("How is it?")
    return await ctx.step("last", give, 4)


CHANGED = [
    without_a_step, without_the_end, with_other_arguments, in_another_order, with_another_question,
    with_a_new_step_before, without_the_sleep,
]  # fmt: skip


@pytest.mark.parametrize("code", CHANGED, ids=lambda code: code.__name__)
async def test_changed_code_fails_and_does_nothing_else(code: Code):
    """A deploy in the middle of a job must not make it do other things than were recorded, nor hang it."""
    before = desk_of(recorded, script=speaks("well"))
    await before.run()
    before.fire()
    desk = desk_of(code, script=speaks("well"))
    desk.load(before.entries)
    await desk.run()
    assert desk.error["code"] == "workflow_changed", desk.error
    assert desk.error["retryable"] is False
    new = set(desk.types[len(before.entries) :])
    assert not new & DONE, new


async def test_code_that_catches_everything_does_not_hide_that_it_was_changed():
    """A broad `except` in a workflow must not turn a wrong replay into a result."""

    async def code(ctx: Context) -> Any:
        try:
            await ctx.step("second", give, 1)
        except Exception:  # noqa: BLE001 - the point of the test
            return "caught"

    before = desk_of(recorded, script=speaks("well"))
    await before.run()
    before.fire()
    desk = desk_of(code)
    desk.load(before.entries)
    await desk.run()
    assert desk.error["code"] == "workflow_changed"


async def test_code_that_grew_at_its_end_goes_on():
    """Steps may be added where no job has been yet."""

    async def grown(ctx: Context) -> Any:
        return [await recorded(ctx), await ctx.step("more", give, 5)]

    before = desk_of(recorded, script=speaks("well"))
    await before.run()
    before.fire()
    desk = desk_of(grown, script=speaks("well"))
    desk.load(before.entries)
    await desk.finish()
    assert desk.result == [4, 5]


async def test_a_slow_event_loop_is_no_changed_code():
    """A process that stood still for longer than `replay_timeout` must not fail all its jobs for good."""

    async def code(ctx: Context) -> Any:
        import time

        for number in range(5):
            await ctx.step("work", give, number)
            time.sleep(0.05)  # stands for another job that blocks the loop
        return "done"

    await every_beginning(code, replay_timeout=0.02)


# --- names and attempts ------------------------------------------------------------------------------


async def test_the_same_step_again_has_its_own_number():
    """Two equal calls are two calls; a replay gives each its own output back."""
    outputs = iter(range(100))

    async def counted() -> int:
        return next(outputs)

    async def code(ctx: Context) -> Any:
        return [await ctx.step("count", counted) for _ in range(3)]

    whole = desk_of(code)
    await whole.finish()
    assert whole.result == [0, 1, 2]
    assert [content["key"] for content in whole.of("step.completed")] == ["count", "count#2", "count#3"]
    whole.load(whole.entries[:-1])
    await whole.finish()
    assert whole.result == [0, 1, 2]


async def test_a_new_attempt_does_again_what_failed_and_nothing_else():
    """An attempt that fails late must not pay again for what it has."""
    calls: list[str] = []

    async def called(name: str) -> str:
        calls.append(name)
        if name == "fails" and calls.count("fails") < 3:
            raise ConnectionError(name)
        return name

    async def code(ctx: Context) -> Any:
        await ctx.step("good", called, "good")
        await ctx.sleep(5)
        await ctx.step("fails", called, "fails")
        return ctx.attempt

    desk = desk_of(code, max_attempts=5)
    await desk.finish()
    assert desk.result == 3
    assert calls == ["good", "fails", "fails", "fails"]
    assert desk.types.count("timer.set") == 1


async def test_a_failed_step_fails_again_within_its_attempt():
    """What the code decided on a failure, it decides again in a replay."""
    calls: list[int] = []

    async def fails() -> None:
        calls.append(1)
        raise ConnectionError("away")

    async def code(ctx: Context) -> Any:
        try:
            await ctx.step("fails", fails)
        except StepError as error:
            await ctx.sleep(5)
            return await ctx.step("instead", give, str(error))

    whole = desk_of(code)
    await whole.finish()
    assert len(calls) == 1
    assert "away" in whole.result
    whole.load(whole.entries[: whole.types.index("step.failed") + 1])
    await whole.finish()
    assert len(calls) == 1


async def test_a_new_attempt_waits_again_between_the_tries_of_a_step():
    """Back-off that was waited for in the first attempt protects nobody in the second."""

    async def fails() -> None:
        raise ConnectionError("away")

    async def code(ctx: Context) -> Any:
        await ctx.step("fails", fails, retry=Retry(attempts=2, base=5.0))

    desk = desk_of(code, max_attempts=2)
    assert await desk.finish() == "failed"
    assert desk.types.count("step.started") == 4
    assert desk.types.count("timer.fired") == 2


async def test_a_step_goes_on_counting_its_attempts_after_a_crash():
    """A worker that dies must not give a step that fails all its tries back."""

    async def fails() -> None:
        raise ConnectionError("away")

    async def code(ctx: Context) -> Any:
        await ctx.step("fails", fails, retry=Retry(attempts=3, base=5.0))

    whole = desk_of(code, max_attempts=1)
    assert await whole.finish() == "failed"
    assert [content.get("attempt", 1) for content in whole.of("step.started")] == [1, 2, 3]
    for length in range(3, len(whole.entries)):
        desk = desk_of(code, max_attempts=1)
        desk.load(whole.entries[:length])
        assert await desk.finish() == "failed"
        assert [content.get("attempt", 1) for content in desk.of("step.failed")] == [1, 2, 3]


async def test_a_chat_that_failed_and_was_caught_fails_again_in_a_replay():
    """A workflow that fell back to something else must not be asked again whether it should have."""
    asked: list[str] = []

    def script(request: ModelRequest) -> Answer:
        asked.append(request.messages[-1].content)
        if len(asked) == 1:
            raise ProviderError("refused", retryable=False)
        return Answer("fine")

    async def code(ctx: Context) -> Any:
        try:
            return await ctx.chat("first")
        except ProviderError:
            return await ctx.step("instead", give, await ctx.chat("second"))

    whole = desk_of(code, script=script)
    await whole.finish()
    assert (whole.result, asked) == ("fine", ["first", "second"])
    whole.load(whole.entries[:-1])
    await whole.finish()
    assert (whole.result, asked) == ("fine", ["first", "second"])
