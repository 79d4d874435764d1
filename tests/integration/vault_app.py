"""The program of the tests of encryption: it puts a word of its own into everything that a job can say.

A word is `<what>-KANARI-<which run>`: it is looked for afterwards, in all that was written.
"""

from __future__ import annotations

from typing import Any

from streamjobs import App, Context
from streamjobs.errors import ChildFailed, Permanent, StepError

MARK = "KANARI"

app = App(name="vault", builtin_tools=False)


def word(what: str, run: str) -> str:
    return f"{what}-{MARK}-{run}"


@app.tool(effect="pure")
async def look(query: str) -> str:
    """Look something up."""
    return word("output", query.rpartition("-")[2])


def make(run: str) -> str:
    return word("step", run)


def break_down(run: str) -> str:
    raise Permanent(word("failure", run))


@app.workflow("everything")
async def everything(ctx: Context, run: str) -> dict[str, Any]:
    """Say one word in every way there is."""
    made = await ctx.step("make", make, run)
    try:
        await ctx.step("break", break_down, run)
    except StepError:
        ctx.log(word("log", run), data={"more": word("data", run)})
    ctx.progress(50.0, word("progress", run))
    ctx.emit("mine", {"own": word("own", run)})
    await ctx.artifact("file.txt", word("artifact", run))
    child = await ctx.spawn("child", {"run": run, "given": word("given", run)})
    bad = await ctx.spawn("bad", run)
    results = [await child.result()]
    try:
        await bad.result()
    except ChildFailed as error:
        results.append(str(error))
    decision = await ctx.approve(word("question", run), detail=word("detail", run))
    told = await ctx.wait_for("news")
    ctx.summary = word("summary", run)
    return {
        "made": made,
        "results": results,
        "told": told,
        "comment": decision.comment,
        "end": word("result", run),
    }


@app.workflow("child")
async def child(_ctx: Context, given: dict[str, str]) -> str:
    """Return a word."""
    return word("child", given["run"])


@app.workflow("bad")
async def bad(_ctx: Context, run: str) -> None:
    """Fail with a word."""
    raise Permanent(word("error", run))


@app.workflow("patient")
async def patient(ctx: Context, run: str) -> list[Any]:
    """Wait for signals, and return what they said."""
    first = await ctx.wait_for("first")
    return [run, first, await ctx.wait_for("second")]
