"""Requests byte by byte, as no client library would send them."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterable
from typing import Any, NamedTuple

from tests.integration.gateway import Served


class Exchange(NamedTuple):
    """What came for it: status 0 where the connection was broken without an answer."""

    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.content)


BROKEN = Exchange(0, {}, b"")


def head(line: str, *headers: str) -> bytes:
    """A request's head."""
    return "\r\n".join([f"{line} HTTP/1.1", "Host: a", *headers, "", ""]).encode()


def posting(body: bytes, *headers: str, path: str = "/v1/jobs") -> bytes:
    """A whole request with a body."""
    return head(f"POST {path}", f"Content-Length: {len(body)}", *headers) + body


def port_of(served: Served) -> int:
    return int(served.url.rpartition(":")[2])


@contextlib.asynccontextmanager
async def connected(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection that is closed whatever happens to it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def exchange(port: int, *pieces: bytes | Iterable[bytes]) -> Exchange:
    """Send bytes until they are sent or nobody takes them, and read one answer."""
    async with connected(port) as (reader, writer):
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                for data in (piece,) if isinstance(piece, bytes) else piece:
                    writer.write(data)
                    await writer.drain()
        return await read_answer(reader)


async def read_answer(reader: asyncio.StreamReader) -> Exchange:
    """One answer with a length, or without a body; `BROKEN` where none came."""
    try:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        content = await reader.readexactly(int(headers.get("content-length", 0)))
    except (ConnectionError, asyncio.IncompleteReadError):
        return BROKEN
    return Exchange(int(first.split(" ")[1]), headers, content)
