"""A provider that says the time: each token holds its number and when it was sent. As little else as it can.

As a child: `python -m loadtests.clock_provider <port> <tokens> <rate>`; any POST is answered as OpenAI's chat
completions stream does. One timer sends to all who listen.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import cast

import uvloop

from loadtests.crowd import HOST, TOKEN

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
FRAME = (
    'data: {"id":"c","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":"%s"}}]}\n\n'
)
END = (
    'data: {"id":"c","object":"chat.completion.chunk",'
    '"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
)


def chunk(text: str) -> bytes:
    return b"%x\r\n%b\r\n" % (len(text), text.encode())


class Stream(asyncio.Protocol):
    """One connection, which asks one thing at a time."""

    def __init__(self, tokens: int, rate: float) -> None:
        self._tokens = tokens
        self._rate = rate
        self._asked = b""
        self._said = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._asked += data
        head, blank, body = self._asked.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
        if blank and len(body) >= length:
            self._asked, self._said = b"", 0
            self._transport.write(HEAD)
            self._begun = time.perf_counter()
            self._say()

    def _say(self) -> None:
        if self._transport.is_closing():
            return
        if self._said == self._tokens:
            self._transport.write(chunk(END) + b"0\r\n\r\n")
            return
        self._transport.write(chunk(FRAME % f"{TOKEN}{self._said} {int(1000 * time.time())} "))
        self._said += 1
        wait = self._begun + self._said / self._rate - time.perf_counter()
        asyncio.get_running_loop().call_later(max(0.0, wait), self._say)


async def main(port: int, tokens: int, rate: float) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Stream(tokens, rate), HOST, port, backlog=4096)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
