"""A job's stream as it is often served: for each viewer XRANGE from the first entry, an SSE frame for each.

Read in pages of a thousand, which is kinder than `XRANGE - +`; the stream ends with the log, where a real one
would go on with XREAD. As a child: `python -m loadtests.peers.xrange_join <port>`, LOADTEST_REDIS_URL says
which Redis. `GET /<stream>` is the route.
"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator

import uvicorn
from redis.asyncio import Redis
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

PAGE = 1000


def application(client: Redis) -> Starlette:
    async def frames(stream: str) -> AsyncIterator[bytes]:
        start = "-"
        while True:
            entries = await client.xrange(stream, start, "+", count=PAGE)
            if entries:
                yield b"".join(
                    b"id: %b\nevent: %b\ndata: %b\n\n" % (entry_id, fields[b"t"], fields[b"d"])
                    for entry_id, fields in entries
                )
            if len(entries) < PAGE:
                return
            start = f"({entries[-1][0].decode()}"

    async def events(request: Request) -> StreamingResponse:
        return StreamingResponse(frames(request.path_params["stream"]), media_type="text/event-stream")

    return Starlette(routes=[Route("/{stream}", events)])


if __name__ == "__main__":
    redis = Redis.from_url(os.environ["LOADTEST_REDIS_URL"])
    uvicorn.run(application(redis), port=int(sys.argv[1]), log_level="warning", access_log=False)
