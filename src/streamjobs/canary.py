"""The job that a canary watches: a kind that every App has, so that any fleet can be probed."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import msgspec

from streamjobs.workflow import Workflow

CANARY = "streamjobs.canary"
EVENT = "canary"


class CanaryInput(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How many events, over how many seconds."""

    events: Annotated[int, msgspec.Meta(ge=2, le=1000)] = 20
    seconds: Annotated[float, msgspec.Meta(ge=0, le=60)] = 1.0


async def sing(ctx: Any, request: CanaryInput) -> int:
    """Say the numbers from 0 on, evenly spread, and how many there were."""
    for number in range(request.events):
        ctx.emit(EVENT, {"n": number})
        await asyncio.sleep(request.seconds / request.events)
    return request.events


WORKFLOW = Workflow.of(CANARY, sing, timeout=120.0, max_attempts=1)
