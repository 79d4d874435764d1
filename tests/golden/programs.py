"""Workflows whose logs are kept for ever in `logs/`: what a release recorded, later ones must go on from.

A program here is never changed; a new way to record something gets a new program, and a log of its own.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

from streamjobs import App, Context, Permanent, Retry, StepError
from streamjobs.events import ToolCallRequest
from streamjobs.llm.base import Answer, ModelRequest

ANSWERS: dict[str, Any] = {"go": {"n": 7}, "approval": "approve"}
"""What the people of these programs say."""

PROGRAMS = ("everything", "retried")


def model(request: ModelRequest) -> Answer:
    """A model that looks once, then speaks."""
    if any(message.role == "tool" for message in request.messages):
        return Answer("it was seen")
    return Answer("let me see", calls=[ToolCallRequest("c1", "look", "{}")])


def made(done: Counter[str]) -> App:
    """The programs; `done` counts what really ran."""
    app = App(builtin_tools=False)

    async def act(name: str, value: Any = None) -> Any:
        done[name] += 1
        return value if value is not None else name

    async def fail(name: str, times: int) -> str:
        done[name] += 1
        if done[name] <= times:
            raise OSError(f"{name} {done[name]}")
        return name

    @app.tool
    async def look() -> str:
        """Look."""
        done["look"] += 1
        return "seen"

    @app.workflow("child")
    async def child(ctx: Context, number: int) -> int:
        return number

    @app.workflow("everything")
    async def everything(ctx: Context) -> list[Any]:
        ctx.progress(10, "begun")
        found = await asyncio.gather(*(ctx.step("side", act, f"side {n}") for n in range(3)))
        await ctx.sleep(60)
        said = await ctx.wait_for("go", timeout=600)
        nobody = await ctx.wait_for("never", timeout=30, default="nobody")
        decision = await ctx.approve("Go on?", detail=found)
        started = await ctx.spawn("child", 3)
        text = await ctx.chat("Look", tools=["look"])
        seen = await ctx.tool("look")
        ctx.log("joining")
        joined = await started.result()
        ctx.emit("nearly", {"done": True})
        once = await ctx.step("pay", act, "pay", effect="once")
        return [found, said, nobody, decision.approved, text, seen, joined, once]

    @app.workflow("retried", retry=Retry(attempts=2, base=0.0))
    async def retried(ctx: Context) -> list[Any]:
        first = await ctx.step("first", act, "first")
        again = await ctx.step("again", fail, "again", 1, retry=Retry(attempts=3, base=30.0, factor=1.0))
        caught = ""
        try:
            await ctx.step("wrong", refuse)
        except StepError as error:
            caught = error.step_code
        if ctx.attempt == 1:
            raise ConnectionError("once")
        return [first, again, caught, await ctx.step("last", act, "last")]

    async def refuse() -> None:
        done["wrong"] += 1
        raise Permanent("never")

    return app
