"""A stream's bytes on their way to its connection, past everything that is made for requests and answers.

On our own server bytes go straight to the socket's transport as chunks of the answer; on any other one they
go through ASGI's `send`, and the stream's task is woken for each.
"""

from __future__ import annotations

import asyncio
from functools import partial

from starlette.types import Receive, Scope, Send

from streamjobs.events import encode_json
from streamjobs.gateway import sse
from streamjobs.gateway.access import TOKEN, Access
from streamjobs.gateway.coding import Bytes, Coding
from streamjobs.gateway.edge import on_lost, wire_of
from streamjobs.gateway.hub import Hub
from streamjobs.gateway.renewal import Renewal
from streamjobs.gateway.stream import BROKEN, EventStream
from streamjobs.identity.streamtoken import StreamToken


async def run(
    hub: Hub,
    stream: EventStream,
    coding: Coding,
    scope: Scope,
    receive: Receive,
    send: Send,
    access: Access,
) -> None:
    """Send what is due until the stream is over, whose head has been sent; then it is closed."""
    hub.attach(stream)
    token: StreamToken | None = scope.get(TOKEN)
    renewal = None if token is None else Renewal(token, access.renew, partial(_tell, stream))
    listener = None if on_lost(scope, stream.lose) else asyncio.create_task(_listen(receive, stream))
    try:
        await stream.run(wire_of(scope) or _Sent(send), coding)
        if stream.ended not in BROKEN:
            await send({"type": "http.response.body", "body": coding.end()})
    finally:
        hub.close(stream)
        on_lost(scope, None)
        if renewal is not None:
            renewal.cancel()
        if listener is not None:
            listener.cancel()


def _tell(stream: EventStream, text: str, token: StreamToken) -> None:
    stream.insert(sse.frame("", "token", encode_json({"token": text, "expires_ms": token.expires * 1000})))


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
