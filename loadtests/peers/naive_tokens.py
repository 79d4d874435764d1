"""The usual way to keep a token stream: for each token an INCR and an XADD, two round trips.

One process, one coroutine a stream, httpx as the provider's client, uvloop and hiredis. As a child:
`python -m loadtests.peers.naive_tokens <streams>`; it warms up, sets `ready`, waits for `go`, and counts
every stream that has ended in `finished`. Environment: LOADTEST_REDIS_URL, LOADTEST_PROVIDER_URL,
LOADTEST_MODEL, LOADTEST_WARMUP_MODEL.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator

import httpx
import uvloop
from redis.asyncio import BlockingConnectionPool, Redis

URL = os.environ.get("LOADTEST_PROVIDER_URL", "") + "/chat/completions"
READY, GO, FINISHED = "ready", "go", "finished"
PREFIX = "tokens:"
WARMUP_STREAMS = 10
GO_TIMEOUT = 60


async def tokens(client: httpx.AsyncClient, model: str) -> AsyncIterator[str]:
    """Yield the text pieces of one streamed answer."""
    request = {"model": model, "stream": True, "messages": [{"role": "user", "content": "go"}]}
    async with client.stream("POST", URL, json=request) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            choices = json.loads(line[6:])["choices"]
            piece = choices[0]["delta"].get("content") if choices else None
            if piece:
                yield piece


async def record(redis: Redis, client: httpx.AsyncClient, name: str, model: str) -> None:
    """Write one answer to its stream, a token at a time."""
    async for piece in tokens(client, model):
        seq = await redis.incr(f"seq:{name}")
        await redis.xadd(f"{PREFIX}{name}", {"seq": seq, "text": piece})
    await redis.incr(FINISHED)


async def main(streams: int) -> None:
    pool = BlockingConnectionPool.from_url(
        os.environ["LOADTEST_REDIS_URL"], max_connections=streams + 10, timeout=None, socket_timeout=None
    )
    redis = Redis(connection_pool=pool)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(limits=limits, timeout=httpx.Timeout(60.0)) as client:
        warmup = os.environ["LOADTEST_WARMUP_MODEL"]
        await asyncio.gather(*(record(redis, client, f"warmup-{n}", warmup) for n in range(WARMUP_STREAMS)))
        await redis.flushdb()
        await redis.set(READY, 1)
        if await redis.blpop([GO], timeout=GO_TIMEOUT) is None:
            sys.exit("nobody said go")
        model = os.environ["LOADTEST_MODEL"]
        await asyncio.gather(*(record(redis, client, str(n), model) for n in range(streams)))
        await asyncio.Event().wait()  # the harness ends this process once it has read the clocks


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
