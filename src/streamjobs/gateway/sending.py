"""A stream's bytes on their way to its connection: one `send` for all that is due, no task for an event.

The stream talks to the server itself: what comes back from `send` says that the connection took the bytes.
"""

from __future__ import annotations

import asyncio

from starlette.types import Receive, Scope, Send

from streamjobs import metrics
from streamjobs.gateway.coding import Coding
from streamjobs.gateway.edge import on_lost
from streamjobs.gateway.hub import Hub
from streamjobs.gateway.stream import EventStream

BROKEN = frozenset({"gone", "slow"})
"""How streams end to which nothing more can be sent."""


async def run(
    hub: Hub, stream: EventStream, coding: Coding, scope: Scope, receive: Receive, send: Send
) -> None:
    """Send what is due until the stream is over, whose head has been sent; then it is closed."""
    hub.attach(stream)
    listener = None if on_lost(scope, stream.lose) else asyncio.create_task(_listen(receive, stream))
    try:
        await _pump(stream, coding, send)
    finally:
        hub.close(stream)
        on_lost(scope, None)
        if listener is not None:
            listener.cancel()


async def _pump(stream: EventStream, coding: Coding, send: Send) -> None:
    while not stream.ended:
        due = stream.take()
        if not due:
            if not stream.ended:
                await stream.wait()
            continue
        for portion in coding.portions(due):
            if stream.ended in BROKEN:
                return
            stream.begin_send()
            await send({"type": "http.response.body", "body": portion, "more_body": True})
            stream.end_send()
            metrics.STREAM_BYTES.inc(len(portion))
        stream.count()
    if stream.ended not in BROKEN:
        await send({"type": "http.response.body", "body": coding.end()})


async def _listen(receive: Receive, stream: EventStream) -> None:
    """Notice that the client is gone on a server that does not tell us by itself."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            stream.lose()
            return
