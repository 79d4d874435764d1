"""A workflow in the caller: the same code, without any server."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import msgspec
import pytest

from streamjobs import App, Context, Permanent, Retry, StepError, ToolContext
from streamjobs.config import Settings, secrets_of
from streamjobs.errors import Invalid, UnknownKind
from streamjobs.testing import ScriptedProvider
from streamjobs.worker.inline import InlineJobFailed
from tests.harness import provider_settings, says

QUICK = Settings(park_after=0.02, retry_base=0.01)


def doubled(number: int) -> int:
    return number * 2


def made() -> App:
    app = App(builtin_tools=False)

    @app.tool
    def add(a: int, b: int) -> int:
        """Add."""
        return a + b

    @app.workflow("sums")
    async def sums(ctx: Context, numbers: list[int]) -> int:
        found = await asyncio.gather(*(ctx.step("double", doubled, n) for n in numbers))
        ctx.progress(50)
        return await ctx.tool("add", a=sum(found), b=1)

    return app


def test_a_script_needs_no_server() -> None:
    """The first thing that somebody tries must work with nothing installed but the package."""
    assert made().run_inline("sums", [1, 2], settings=QUICK) == 7


def test_a_tool_is_given_no_secret() -> None:
    """A tool that shows its context to a model would show it every key of the installation."""
    app = App(builtin_tools=False)

    @app.tool
    def look(ctx: ToolContext) -> str:
        """Look."""
        return str(secrets_of(ctx.settings)) + ctx.settings.files_root

    @app.workflow("looks")
    async def looks(ctx: Context) -> str:
        return await ctx.tool("look")

    settings = msgspec.structs.replace(
        QUICK, openai_api_key="sk-1", redis_url="redis://u:p@h", jwt_secrets=("s",), files_root="/data"
    )
    assert app.run_inline("looks", settings=settings) == "[]/data"


async def test_in_an_event_loop_it_is_awaited() -> None:
    """Tests of workflows are async themselves."""
    events: list[str] = []
    app = made()
    assert await app.run_inline("sums", [1], settings=QUICK, on_event=lambda _, e: events.append(e.type)) == 3
    assert (events[0], events[-1]) == ("job.queued", "job.completed")
    assert events.count("step.completed") == 1


async def test_it_sleeps_waits_retries_and_replays_like_a_worker() -> None:
    """What only breaks in a replay would be found in production only."""
    app, calls = App(builtin_tools=False), Counter[str]()

    @app.workflow("part")
    async def part(ctx: Context, n: int) -> int:
        await ctx.sleep(0.05)
        return n + 1

    @app.workflow("long", retry=Retry(attempts=2, base=0.01))
    async def long(ctx: Context) -> list[Any]:
        async def once() -> int:
            calls["once"] += 1
            return 1

        def twice() -> int:
            calls["twice"] += 1
            if calls["twice"] == 1:
                raise OSError("again")
            return 2

        first = await ctx.step("once", once)
        await ctx.sleep(0.05)
        child = await ctx.spawn("part", 1)
        decision = await ctx.approve("Go on?")
        return [
            first,
            await ctx.step("twice", twice),
            await child.result(),
            decision.approved,
            await ctx.wait_for("go"),
            await ctx.wait_for("never", timeout=0.05, default="nobody"),
        ]

    result = await app.run_inline("long", settings=QUICK, signals={"approval": "approve", "go": [5]})
    assert result == [1, 2, 2, True, 5, "nobody"]
    assert calls == {"once": 1, "twice": 2}


async def test_failures_are_raised_with_the_view() -> None:
    """A test of a workflow that fails must see why."""
    app = App(builtin_tools=False)

    @app.workflow("fails")
    async def fails(ctx: Context) -> None:
        await ctx.step("first", doubled, 1)
        raise Permanent("no")

    with pytest.raises(InlineJobFailed, match="permanent: no") as failure:
        await app.run_inline("fails", settings=QUICK)
    assert [step.state for step in failure.value.view.steps] == ["completed"]
    with pytest.raises(UnknownKind):
        await app.run_inline("fail", settings=QUICK)
    with pytest.raises(Invalid, match="input"):
        await made().run_inline("sums", ["x"], settings=QUICK)


async def test_a_wait_that_nobody_answers_fails_and_does_not_hang() -> None:
    """A forgotten signal would stop the whole test run."""
    app = App(builtin_tools=False)

    @app.workflow("waits")
    async def waits(ctx: Context) -> None:
        await ctx.wait_for("go")

    with pytest.raises(InlineJobFailed, match="nobody sends"):
        await app.run_inline("waits", settings=QUICK)


async def test_it_talks_to_a_model() -> None:
    """Scripts ask models, too."""
    app = App(builtin_tools=False)

    @app.workflow("asks")
    async def asks(ctx: Context) -> str:
        return await ctx.chat("hello")

    async with ScriptedProvider(says("fine")) as provider:
        settings = Settings(**provider_settings(provider))
        assert await app.run_inline("asks", settings=settings) == "fine"


async def test_timeouts_hold_here_too() -> None:
    """A hanging step would hang the script."""
    app = App(builtin_tools=False)

    @app.workflow("hangs")
    async def hangs(ctx: Context) -> str:
        try:
            await ctx.step("hang", asyncio.sleep, 3600, timeout=0.05)
        except StepError as error:
            return error.step_code
        return ""

    @app.workflow("slow", timeout=0.1)
    async def slow(ctx: Context) -> None:
        await ctx.step("hang", asyncio.sleep, 3600)

    assert await app.run_inline("hangs", settings=QUICK) == "step_timeout"
    with pytest.raises(InlineJobFailed, match="timeout"):
        await app.run_inline("slow", settings=QUICK)
