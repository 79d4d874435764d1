"""The workflows whose recorded logs are kept in `recorded/`: this code is frozen, like the logs.

`python -m tests.golden.record` records logs that are not there yet; it never replaces one.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from streamjobs import App, ChildFailed, Context, Retry, StepError
from streamjobs.llm.base import Answer, ModelRequest

app = App(name="golden", builtin_tools=False)
failures_left: dict[str, int] = {}
"""How often the flaky steps still fail, by name."""


class Total(msgspec.Struct):
    """A typed result."""

    total: int
    names: list[str]


async def double(number: int) -> int:
    return 2 * number


def letters(count: int) -> str:
    return "x" * count


async def flaky(name: str) -> str:
    failures_left[name] = failures_left.get(name, 0) - 1
    if failures_left[name] >= 0:
        raise ConnectionError(f"{name} is away")
    return name


@app.tool
async def weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


@app.tool(effect="once", approval="Pay?")
async def pay(amount: int) -> str:
    """Pay an amount."""
    return f"paid {amount}"


@app.workflow("steps")
async def steps(ctx: Context, numbers: list[int]) -> Total:
    """One after the other, side by side, twice the same, one too large for an event."""
    first = await ctx.step("first", double, numbers[0])
    ctx.progress(10, "begun")
    doubled = await asyncio.gather(*(ctx.step("double", double, number) for number in numbers))
    ctx.log("doubled", data=doubled)
    large = await ctx.step("large", letters, 2000)
    await ctx.artifact("note", f"{first} first")
    ctx.emit("milestone", {"first": first})
    return Total(sum(doubled) + len(large), [str(number) for number in doubled])


@app.workflow("sleeps")
async def sleeps(ctx: Context) -> str:
    """Shortly in the worker, longer by the store."""
    await ctx.sleep(0.01)
    before = await ctx.step("before", letters, 1)
    await ctx.sleep(0.3)
    return before + await ctx.step("after", letters, 2)


@app.workflow("waits")
async def waits(ctx: Context) -> list[Any]:
    """For a signal that comes, one that does not, and two beside a step."""
    first = await ctx.wait_for("first", timeout=60)
    never = await ctx.wait_for("never", timeout=0.3, default="nobody")
    both = await asyncio.gather(ctx.wait_for("second"), ctx.wait_for("second"), ctx.step("beside", double, 4))
    return [first, never, *both]


@app.workflow("approvals")
async def approvals(ctx: Context) -> list[Any]:
    """Of the job, of a step, of a tool."""
    decision = await ctx.approve("Begin?", detail={"why": "golden"}, key="begin")
    doubled = await ctx.step("double", double, 3, approval="Double it?")
    return [decision.approved, doubled, await ctx.tool(pay, amount=5)]


@app.workflow("child")
async def child(ctx: Context, number: int) -> int:
    """Double a number; a negative one is refused."""
    if number < 0:
        raise ValueError("below 0")
    return await ctx.step("double", double, number)  # type: ignore[no-any-return]


@app.workflow("children")
async def children(ctx: Context) -> list[Any]:
    """Two that end well, one that does not."""
    good = [await ctx.spawn("child", number) for number in (1, 2)]
    bad = await ctx.spawn("child", -1, max_attempts=1)
    results = await ctx.join(*good)
    try:
        results.append(await bad.result())
    except ChildFailed as failed:
        results.append(failed.status)
    return results


@app.workflow("chats")
async def chats(ctx: Context) -> list[str]:
    """With tools, and then about what came of it."""
    first = await ctx.chat("How is the weather?", tools=[weather])
    noted = await ctx.step("note", letters, 3)
    return [first, noted, await ctx.chat("Sure?", data=first)]


def says(request: ModelRequest) -> Answer:
    """What the model answers in a replay; recorded logs have it from the scripted provider."""
    from streamjobs.events import ToolCallRequest

    question = next(message.content for message in request.messages if message.role == "user")
    if question.startswith("Sure?"):
        return Answer("Very sure.")
    if any(message.role == "tool" for message in request.messages):
        return Answer("It is sunny.")
    return Answer("Let me look.", calls=[ToolCallRequest("look", "weather", '{"city": "Paris"}')])


@app.workflow("retries")
async def retries(ctx: Context) -> list[Any]:
    """A step that is tried again, one that fails and is caught, one that fails the attempt of the job."""
    tried = await ctx.step("tried", flaky, "tried", retry=Retry(attempts=3, base=0.01))
    try:
        await ctx.step("caught", flaky, "caught")
        caught = "completed"
    except StepError:
        caught = "failed"
    await ctx.step("fatal", flaky, "fatal")
    return [tried, caught, ctx.attempt]
