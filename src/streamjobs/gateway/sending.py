"""A stream's bytes on their way to its connection, past everything that is made for requests and answers.

On our own server bytes go straight to the socket's transport as chunks of the answer; on any other one they
go through ASGI's `send`, and the stream's task is woken for each.
"""

from __future__ import annotations

import asyncio

from starlette.types import Receive, Scope, Send

from streamjobs.gateway.coding import Bytes, Coding
from streamjobs.gateway.edge import on_lost, wire_of
from streamjobs.gateway.hub import Hub
from streamjobs.gateway.stream import BROKEN, EventStream


async def run(
    hub: Hub, stream: EventStream, coding: Coding, scope: Scope, receive: Receive, send: Send
) -> None:
    """Send what is due until the stream is over, whose head has been sent; then it is closed."""
    hub.attach(stream)
    listener = None if on_lost(scope, stream.lose) else asyncio.create_task(_listen(receive, stream))
    try:
        await stream.run(wire_of(scope) or _Sent(send), coding)
        if stream.ended not in BROKEN:
            await send({"type": "http.response.body", "body": coding.end()})
    finally:
        hub.close(stream)
        on_lost(scope, None)
        if listener is not None:
            listener.cancel()


class _Sent:
    """A wire on a server that knows only `send`."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._portion: Bytes = b""

    def write(self, portion: Bytes) -> bool:
        """See `Wire`."""
        self._portion = portion
        return False

    async def drain(self) -> None:
        """See `Wire`."""
        await self._send({"type": "http.response.body", "body": bytes(self._portion), "more_body": True})


async def _listen(receive: Receive, stream: EventStream) -> None:
    """Notice that the client is gone on a server that does not tell us by itself."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            stream.lose()
            return
