"""taskiq-redis streams, both sides: `enqueue <warmup> <jobs>`; the worker is taskiq's own command line.

Tuned: uvloop and hiredis (taskiq takes them by itself), orjson messages, no result backend (its default,
and the fastest: nothing is written about a finished task but the acknowledgement), large reads.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time

import uvloop
from taskiq.serializers import ORJSONSerializer
from taskiq_redis import RedisStreamBroker

CONCURRENCY = int(os.environ.get("LOADTEST_CONCURRENCY", "100"))
IN_FLIGHT = 100

broker = RedisStreamBroker(
    os.environ.get("LOADTEST_REDIS_URL", ""),
    consumer_id="0",
    xread_count=2 * CONCURRENCY,
    max_connection_pool_size=2 * CONCURRENCY,
).with_serializer(ORJSONSerializer())


@broker.task(task_name="noop")
async def noop(n: int) -> None:
    """Do nothing."""


async def add(count: int) -> None:
    numbers = iter(range(count))

    async def lane() -> None:
        for n in numbers:
            await noop.kiq(n)

    await asyncio.gather(*(lane() for _ in range(IN_FLIGHT)))


async def enqueue(warmup: int, jobs: int) -> None:
    await broker.startup()
    await add(warmup)
    started = time.perf_counter()
    await add(jobs)
    seconds = time.perf_counter() - started
    await broker.shutdown()
    print(json.dumps({"jobs": jobs, "seconds": seconds}))


if __name__ == "__main__":
    # `python -m` made this module __main__; the task must carry the name that the worker imports.
    uvloop.run(enqueue(int(sys.argv[2]), int(sys.argv[3])))
