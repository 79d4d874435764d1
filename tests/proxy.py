"""A TCP proxy in front of Redis that loses replies, goes silent or cuts, when a test says so."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable
from typing import Literal

from tests import acl

Mode = Literal["pass", "black hole", "refuse"]


class Proxy:
    """Forwards both ways. `swallow` loses the reply to one command; `mode` says what becomes of all else."""

    def __init__(self, upstream: int, tls: ssl.SSLContext | None = None) -> None:
        self.tls = tls
        self.mode: Mode = "pass"
        self.swallowed = 0
        self.connections = 0
        self.port = 0
        self._upstream = upstream
        self._wants_loss: Callable[[bytes], bool] | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        return f"redis{'s' * bool(self.tls)}://{acl.USER}:{acl.PASSWORD}@127.0.0.1:{self.port}"

    def swallow(self, matches: Callable[[bytes], bool]) -> None:
        """Let the next request that matches reach Redis, and lose its reply with the connection."""
        self._wants_loss = matches

    def abort_all(self) -> None:
        """Reset every connection."""
        for writer in tuple(self._open):
            writer.transport.abort()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.tls)
        self.port = self._server.sockets[0].getsockname()[1]

    async def aclose(self) -> None:
        assert self._server is not None
        self._server.close()
        self.abort_all()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if self.mode == "refuse":
            writer.transport.abort()
            return
        upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", self._upstream)
        both = {writer, upstream_writer}
        self._open |= both
        lost = asyncio.Event()
        tasks = [
            asyncio.create_task(self._forward_requests(reader, upstream_writer, lost)),
            asyncio.create_task(self._forward_replies(upstream_reader, writer, lost)),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._open -= both
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for each in both:
                each.transport.abort()

    async def _forward_requests(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, lost: asyncio.Event
    ) -> None:
        while data := await reader.read(1 << 20):
            if self._wants_loss is not None and self._wants_loss(data):
                self._wants_loss = None
                lost.set()
            if self.mode == "pass":
                writer.write(data)
                await writer.drain()

    async def _forward_replies(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, lost: asyncio.Event
    ) -> None:
        while data := await reader.read(1 << 20):
            if lost.is_set():
                self.swallowed += 1
                return
            if self.mode == "pass":
                writer.write(data)
                await writer.drain()


@contextlib.asynccontextmanager
async def proxying(port: int, tls: ssl.SSLContext | None = None) -> AsyncIterator[Proxy]:
    """A proxy in front of the Redis on `port`, while the block runs. With `tls` it speaks that only."""
    proxy = Proxy(port, tls)
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.aclose()
