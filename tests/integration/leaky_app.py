"""Workflows and tools whose errors say what they should not, as HTTP clients' errors do."""

from __future__ import annotations

import os

from streamjobs import App, Context
from streamjobs.errors import Permanent, StepError, ToolError

app = App(name="leaky")


def refused() -> str:
    """What an HTTP client says of a request that was refused."""
    secret = os.environ["LEAKED"]
    return (
        f"Client error '401 Unauthorized' for url 'https://u:{secret}@api.example/v1?api_key={secret}&x=1'\r\n"
        f"request headers: {{'authorization': 'Bearer {secret}', 'accept': '*/*'}}\u2028\x1b[31m\x00\ud800"
    )


@app.tool(effect="idempotent")
def look_up(word: str) -> str:
    """Look a word up."""
    raise (ToolError if word == "said" else RuntimeError)(refused())


def fetch() -> str:
    """Fetch something."""
    raise Permanent(refused())


@app.workflow("leaky")
async def leaky(ctx: Context) -> None:
    """Fail in every way there is."""
    for word in ("said", "raised"):
        try:
            await ctx.tool(look_up, word=word)
        except StepError as error:
            ctx.log(type(error).__name__)
    try:
        await ctx.step("fetch", fetch)
    except StepError as error:
        ctx.log(type(error).__name__)
    raise ExceptionGroup(refused(), [Permanent(refused()), Permanent("another")])
