"""The app that the streamjobs worker runs in the steps scenario: ten small steps, one after another."""

from __future__ import annotations

from loadtests.marks import Pen
from streamjobs import App, Context

app = App()
pen = Pen()


async def add(number: int) -> int:
    """Return what is to be added: next to nothing, but an outcome to keep."""
    return number


@app.workflow("ten-steps")
async def ten_steps(ctx: Context, number: int) -> int:
    """Sum up the outcomes of ten steps."""
    pen.begin(number)
    total = 0
    for i in range(10):
        total += await ctx.step("add", add, number + i)
    pen.end(number)
    return total
