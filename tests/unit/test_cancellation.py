"""A loop that calls Redis must end when it is told to, also when redis-py swallows the telling."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from redis import exceptions

from streamjobs.store.scripts import translated


async def swallow(error: Exception | None = None) -> None:
    """What `asyncio.wait_for` does before Python 3.12 to a cancellation that comes as it ends."""
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.sleep(60)
    if error is not None:
        raise error


async def loop_over(error: Exception | None) -> None:
    while True:
        with translated():
            await swallow(error)


@pytest.mark.parametrize("error", [None, exceptions.ConnectionError("gone")])
async def test_a_swallowed_cancellation_still_ends_the_loop(error: Exception | None):
    """Else a shutdown waits for this loop for ever."""
    task = asyncio.create_task(loop_over(error))
    await asyncio.sleep(0)
    task.cancel()
    done, _ = await asyncio.wait([task], timeout=60)
    assert done
    assert task.cancelled()


async def test_a_swallowed_timeout_is_still_one():
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            with translated():
                await swallow()


async def test_calls_while_a_task_cleans_up_go_through():
    """A worker hands its jobs back after it was cancelled."""
    cleaned: list[bool] = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            with translated():
                await asyncio.sleep(0)
            cleaned.append(True)

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task], timeout=60)
    assert cleaned == [True]
