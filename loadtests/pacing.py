"""Submitting: at once, or at a rate that no answer slows down.

Used by the submitting child of every system, so that all are paced and timed by the same code.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import asdict, dataclass
from typing import Any

import uvloop

Submit = Callable[[int], Awaitable[str]]
One = Callable[[int], Coroutine[Any, Any, None]]
LANES = 16


@dataclass(frozen=True)
class Plan:
    """Which numbers to submit, and how many a second: 0 for as fast as it goes."""

    first: int
    count: int
    rate: float

    def arguments(self) -> list[str]:
        return [str(self.first), str(self.count), str(self.rate)]

    @classmethod
    def parse(cls, arguments: list[str]) -> Plan:
        first, count, rate = arguments
        return cls(int(first), int(count), float(rate))


@dataclass(frozen=True)
class Submitted:
    """What was submitted, in the order of the numbers: ids, and the instant before each call."""

    ids: list[str]
    at: list[float]


async def submit_all(plan: Plan, submit: Submit) -> Submitted:
    """Submit every number; with a rate each one at its time, however long the ones before it take."""
    ids, at = [""] * plan.count, [0.0] * plan.count

    async def one(index: int) -> None:
        at[index] = time.time()
        ids[index] = await submit(plan.first + index)

    await (_at_a_rate(plan, one) if plan.rate else _in_lanes(plan, one))
    return Submitted(ids, at)


async def _in_lanes(plan: Plan, one: One) -> None:
    indexes = iter(range(plan.count))

    async def lane() -> None:
        for index in indexes:
            await one(index)

    await asyncio.gather(*(lane() for _ in range(LANES)))


async def _at_a_rate(plan: Plan, one: One) -> None:
    begun = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for index in range(plan.count):
            early = begun + index / plan.rate - time.monotonic()
            if early > 0:
                await asyncio.sleep(early)
            group.create_task(one(index))


def run(main: Callable[[Plan], Coroutine[Any, Any, Submitted]]) -> None:
    """Be the child: `<first> <count> <rate>` end its command line, what it submitted is printed as JSON."""
    print(json.dumps(asdict(uvloop.run(main(Plan.parse(sys.argv[-3:]))))))
