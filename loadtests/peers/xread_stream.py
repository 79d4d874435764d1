"""A stream as it is often served: sse-starlette, and for each viewer an XREAD that blocks.

As a child: `python -m loadtests.peers.xread_stream <port>`, LOADTEST_REDIS_URL says which Redis.
`GET /<stream>` is the route; viewers get what is added after they came.
"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator

import uvicorn
from redis.asyncio import Redis
from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Route

from loadtests.crowd import raise_file_limit

BLOCK_MS = 5000


def application(client: Redis) -> Starlette:
    async def events(stream: str, after: str) -> AsyncIterator[dict[str, str]]:
        yield {"event": "open", "data": "{}"}
        while True:
            for _, entries in await client.xread({stream: after}, block=BLOCK_MS) or ():
                for entry_id, fields in entries:
                    after = entry_id.decode()
                    yield {"id": after, "event": "text.delta", "data": fields[b"d"].decode()}

    async def route(request: Request) -> EventSourceResponse:
        stream = request.path_params["stream"]
        newest = await client.xrevrange(stream, count=1)
        return EventSourceResponse(events(stream, newest[0][0].decode() if newest else "0-0"), sep="\n")

    return Starlette(routes=[Route("/{stream}", route)])


if __name__ == "__main__":
    raise_file_limit()
    redis = Redis.from_url(os.environ["LOADTEST_REDIS_URL"], max_connections=20_000)
    uvicorn.run(
        application(redis), port=int(sys.argv[1]), log_level="warning", access_log=False, backlog=4096
    )
