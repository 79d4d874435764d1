"""Viewers that cost as little as they can: sockets that count, and look at what they got only afterwards.

As a child: `python -m loadtests.viewers <port> <path> <encoding> <last> <at once> <one by one>` prints when
each viewer was up to date, in seconds from when all of those at once, or that one, began to connect, and how
many bytes it got. How many make one up to date is learned from a first viewer, which reads until nothing
comes. Of each it is checked afterwards that it got the whole frame of event `last`.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import cast

import uvloop
import zstandard

TIMEOUT = 300.0
SILENCE = 0.5
"""Seconds after which the first viewer counts as up to date."""
SLACK = 32
"""Bytes by which answers differ: heartbeats, how long to wait before coming back."""
HOST = "127.0.0.1"


@dataclass(frozen=True)
class Joins:
    """Of each viewer: seconds until it was up to date; the bytes that it takes."""

    at_once: list[float]
    one_by_one: list[float]
    received: int


class Viewer(asyncio.Protocol):
    """Reads one response without looking into it; `done` when so many bytes are there."""

    def __init__(self, request: bytes, wanted: int) -> None:
        self.done: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self.received = 0
        self.heard = time.perf_counter()
        self._request = request
        self._wanted = wanted
        self._parts: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._parts.append(data)
        self.received += len(data)
        self.heard = time.perf_counter()
        if self.received >= self._wanted and not self.done.done():
            self.done.set_result(self.heard)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(exc or ConnectionError("the stream ended too early"))

    def require(self, last: str) -> None:
        """Raise `RuntimeError` where the frame of event `last` is not there, or not whole."""
        head, _, body = b"".join(self._parts).partition(b"\r\n\r\n")
        content = b"".join(_chunks(body))
        if b"content-encoding: zstd" in head.lower():
            content = zstandard.ZstdDecompressor().decompressobj().decompress(content)
        if b"\n\n" not in content.partition(f"id: {last}\n".encode())[2]:
            raise RuntimeError(f"a viewer did not get {last} in {self.received:,} bytes")


def _chunks(body: bytes) -> Iterator[bytes]:
    """What HTTP's chunked coding holds, as far as it is there."""
    at = 0
    while (newline := body.find(b"\r\n", at)) >= 0:
        size = int(body[at:newline], 16)
        yield body[newline + 2 : newline + 2 + size]
        at = newline + 2 + size + 2


class Gate:
    """Where viewers come in."""

    def __init__(self, port: int, path: str, encoding: str, last: str) -> None:
        accepts = f"Accept-Encoding: {encoding}\r\n" if encoding else ""
        self._request = (
            f"GET {path} HTTP/1.1\r\nHost: {HOST}\r\nAccept: text/event-stream\r\n{accepts}\r\n".encode()
        )
        self._port = port
        self._last = last
        self.wanted = 1 << 62

    async def learn(self) -> None:
        """Find out how many bytes bring a viewer up to date."""
        viewer = await self._enter()
        try:
            async with asyncio.timeout(TIMEOUT):
                while viewer.received < SLACK or time.perf_counter() - viewer.heard < SILENCE:
                    await asyncio.sleep(SILENCE / 10)
        finally:
            viewer.transport.abort()
        viewer.require(self._last)
        self.wanted = viewer.received - SLACK

    async def join(self, count: int) -> list[float]:
        """Let viewers in at once; returns when each was up to date."""
        begun = time.perf_counter()
        viewers = await asyncio.gather(*(self._enter() for _ in range(count)))
        try:
            async with asyncio.timeout(TIMEOUT):
                at = await asyncio.gather(*(viewer.done for viewer in viewers))
                await asyncio.sleep(SILENCE / 10)
        finally:
            for viewer in viewers:
                viewer.transport.abort()
        for viewer in viewers:
            viewer.require(self._last)
        return [instant - begun for instant in at]

    async def _enter(self) -> Viewer:
        loop = asyncio.get_running_loop()
        _, viewer = await loop.create_connection(lambda: Viewer(self._request, self.wanted), HOST, self._port)
        return viewer


async def main(port: int, path: str, encoding: str, last: str, at_once: int, one_by_one: int) -> Joins:
    gate = Gate(port, path, encoding, last)
    await gate.learn()
    singles = [seconds for _ in range(one_by_one) for seconds in await gate.join(1)]
    return Joins(await gate.join(at_once) if at_once else [], singles, gate.wanted + SLACK)


if __name__ == "__main__":
    _, port, path, encoding, last, at_once, one_by_one = sys.argv
    joins = uvloop.run(main(int(port), path, encoding, last, int(at_once), int(one_by_one)))
    print(json.dumps(asdict(joins)))
