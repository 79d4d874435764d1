"""Reads that outlast an outage of Redis: repeated with back-off for as long as somebody waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from streamjobs.errors import StoreUnavailable
from streamjobs.retry import Backoff

Result = TypeVar("Result")

PATIENCE = Backoff(base=0.1, cap=2.0)


async def patiently(read: Callable[[], Awaitable[Result]]) -> Result:
    """What `read` gives once Redis answers; every other error is raised."""
    failures = 0
    while True:
        try:
            return await read()
        except StoreUnavailable:
            failures += 1
            await asyncio.sleep(PATIENCE.delay(failures))
