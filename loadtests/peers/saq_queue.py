"""saq's two sides: `enqueue <warmup> <jobs>` prints its timing as JSON; the worker is saq's own command line.

Tuned: uvloop, hiredis, orjson for its records, pools and its throttle wide enough for the concurrency.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
import warnings
from typing import Any

import orjson
import uvloop
from redis.asyncio import BlockingConnectionPool, Redis
from saq.queue.redis import RedisQueue

CONCURRENCY = int(os.environ.get("LOADTEST_CONCURRENCY", "100"))
IN_FLIGHT = 100


def make_queue() -> RedisQueue:
    pool = BlockingConnectionPool.from_url(
        os.environ["LOADTEST_REDIS_URL"], max_connections=4 * CONCURRENCY, timeout=None, socket_timeout=None
    )
    redis = Redis(connection_pool=pool)
    return RedisQueue(redis, dump=orjson.dumps, load=orjson.loads, max_concurrent_ops=CONCURRENCY)


async def noop(_context: Any, *, n: int) -> None:
    """Do nothing."""


def settings() -> dict[str, Any]:
    """Return what `saq loadtests.peers.saq_queue.settings` runs; the loop is made after this call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    return {"queue": make_queue(), "functions": [noop], "concurrency": CONCURRENCY}


async def add(queue: RedisQueue, count: int) -> None:
    numbers = iter(range(count))

    async def lane() -> None:
        for n in numbers:
            await queue.enqueue("noop", n=n)

    await asyncio.gather(*(lane() for _ in range(IN_FLIGHT)))


async def enqueue(warmup: int, jobs: int) -> None:
    queue = make_queue()
    await add(queue, warmup)
    started = time.perf_counter()
    await add(queue, jobs)
    seconds = time.perf_counter() - started
    await queue.disconnect()
    print(json.dumps({"jobs": jobs, "seconds": seconds}))


if __name__ == "__main__":
    uvloop.run(enqueue(int(sys.argv[2]), int(sys.argv[3])))
