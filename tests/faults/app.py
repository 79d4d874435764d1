"""The program that the fault tests run in worker processes: its tools write each effect to a file.

One line an effect: tool, idempotency key, job. The file is named by EFFECTS.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from streamjobs.app import App, ToolContext

app = App(name="faults", builtin_tools=False)


class Effect(NamedTuple):
    """One line of the file."""

    tool: str
    key: str
    job: str


def take_effect(name: str, key: str, job: str) -> None:
    """Do what cannot be undone: add a line to the file."""
    file = os.open(os.environ["EFFECTS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(file, f"{name} {key} {job}\n".encode())
    finally:
        os.close(file)


def read_effects(path: Path) -> list[Effect]:
    """Every effect so far."""
    return [Effect(*line.split()) for line in path.read_text().splitlines()] if path.exists() else []


def once_at_most_once(path: Path) -> None:
    """No `once` tool took effect twice, and whatever ran again did so under the same key."""
    effects = read_effects(path)
    once = Counter(effect.key for effect in effects if effect.tool == "once")
    assert not [key for key, n in once.items() if n > 1], once
    keys = Counter((tool, job) for tool, _, job in {(e.tool, e.key, e.job) for e in effects})
    assert not keys or max(keys.values()) == 1, keys


@app.tool(effect="pure")
async def pure(ctx: ToolContext) -> str:
    """Answer."""
    take_effect("pure", ctx.idempotency_key, ctx.job_id)
    return "pure answer"


@app.tool(effect="idempotent")
async def idempotent(ctx: ToolContext) -> str:
    """Write."""
    take_effect("idempotent", ctx.idempotency_key, ctx.job_id)
    return "idempotent answer"


@app.tool(effect="once")
def once(ctx: ToolContext) -> str:
    """Pay."""
    take_effect("once", ctx.idempotency_key, ctx.job_id)
    return "once answer"


@app.tool(effect="idempotent", timeout=60.0)
async def slow(ctx: ToolContext, seconds: float) -> str:
    """Take a while."""
    take_effect("slow", ctx.idempotency_key, ctx.job_id)
    await asyncio.sleep(seconds)
    return "slow answer"


@app.tool(effect="once", timeout=60.0)
async def blocking(ctx: ToolContext, seconds: float) -> str:
    """Hold up the whole event loop, as broken tools do."""
    take_effect("blocking", ctx.idempotency_key, ctx.job_id)
    time.sleep(seconds)
    return "blocking answer"


@app.workflow("steps")
async def steps(ctx: Any, count: int = 5) -> int:
    """Say something, many times, slowly enough to be killed in between."""
    for number in range(count):
        ctx.progress(100 * number / count, f"step {number}")
        await ctx.journal.commit()
        await asyncio.sleep(0.05)
    return count


@app.workflow("stubborn")
async def stubborn(ctx: Any) -> None:
    """Ignore every cancellation."""
    ctx.progress(1)
    while True:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(3600)
