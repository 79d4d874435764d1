"""Calls of the store that a run cannot do without: made again for as long as Redis is away or full.

What bounds them is the job's own timeout, and its lease: a run that lost it is stopped.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from streamjobs.errors import ArtifactNotFound, Fenced, JobNotFound, StoreFull, StoreUnavailable

Result = TypeVar("Result")

_FIRST, _LONGEST = 0.05, 2.0


async def patiently(call: Callable[[], Awaitable[Result]]) -> Result:
    """Make a call that may be made twice, until it is answered. Raises `Fenced` where the job is gone."""
    delay = _FIRST
    while True:
        try:
            return await call()
        except ArtifactNotFound:
            raise
        except JobNotFound as error:
            raise Fenced("the job is gone") from error
        except (StoreUnavailable, StoreFull):
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))
            delay = min(_LONGEST, delay * 2)
