"""What `streamjobs dev` serves to the tests of the command line and of the Python client."""

from __future__ import annotations

from typing import Any

from streamjobs import App, Context
from streamjobs.errors import Permanent

app = App(name="cli-tests")


def count(text: str) -> int:
    """Count the words."""
    return len(text.split())


@app.workflow("report")
async def report(ctx: Context, text: str = "a b c") -> dict[str, Any]:
    """Count words, say so, and leave a file."""
    words = await ctx.step("count", count, text)
    ctx.log("counted", level="warning", data={"words": words})
    await ctx.artifact("words.txt", text)
    return {"words": words}


@app.workflow("large")
async def large(_ctx: Context) -> str:
    """Return more than an event may hold."""
    return "x" * 200_000


@app.workflow("ask")
async def ask(ctx: Context) -> dict[str, Any]:
    """Ask a person."""
    decision = await ctx.approve("go on?")
    return {"approved": decision.approved, "comment": decision.comment, "by": decision.by}


@app.workflow("listen")
async def listen(ctx: Context) -> Any:
    """Wait for a signal and return what it says."""
    return await ctx.wait_for("go")


@app.workflow("broken")
async def broken(_ctx: Context) -> None:
    """Fail for good."""
    raise Permanent("it cannot work")
