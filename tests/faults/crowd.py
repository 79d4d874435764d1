"""Crowds of viewers on raw sockets, cheap enough for thousands, strict enough to tell one event too few.

A viewer comes back by the last id that it saw whole, as a browser does, until its job has ended. Its
transcript over all its connections must be the log: that shows what was lost, and what came twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence

from streamjobs.errors import StoreUnavailable
from streamjobs.events import TERMINAL
from tests.integration.gateway import Frame, Script, frame_of

Row = tuple[str, str, str]


class Unchunked:
    """Takes an HTTP answer as it comes: its status, and the content of its chunks."""

    def __init__(self) -> None:
        self.status = 0
        self.is_whole = False
        self._raw = bytearray()
        self._has_head = False

    def feed(self, data: bytes) -> bytes:
        """What `data` adds to the content."""
        self._raw += data
        if not self._has_head and not self._take_head():
            return b""
        content = b""
        while (end := self._raw.find(b"\r\n")) >= 0:
            size = int(self._raw[:end], 16)
            begins = end + 2
            if len(self._raw) < begins + size + 2:
                break
            content += self._raw[begins : begins + size]
            del self._raw[: begins + size + 2]
            self.is_whole = self.is_whole or size == 0
        return content

    def _take_head(self) -> bool:
        head, blank, rest = bytes(self._raw).partition(b"\r\n\r\n")
        if blank:
            self.status = int(head.split(b" ", 2)[1])
            self._raw[:] = rest
            self._has_head = True
        return self._has_head


class Viewer:
    """Watches one job to its end. `comes_back`: the range of seconds between two connections.

    `rows` is its transcript; `others` are frames of no log; `beats` counts heartbeats, `endings`
    how connections ended, `statuses` what the server answered.
    """

    def __init__(
        self,
        job_id: str,
        port: int,
        cursor: str = "0",
        comes_back: tuple[float, float] = (0.01, 0.1),
        host: str = "127.0.0.1",
    ) -> None:
        self.job_id = job_id
        self.address = host, port
        self.cursor = cursor
        self.rows: list[Row] = []
        self.statuses: Counter[int] = Counter()
        self.endings: Counter[str] = Counter()
        self.others: list[Frame] = []
        self.beats = 0
        self.is_over = False
        self._comes_back = comes_back

    async def run(self) -> None:
        """Watch until the job has ended."""
        while not self.is_over:
            try:
                self.endings[await self._visit()] += 1
            except OSError:
                self.endings["broken"] += 1
            if not self.is_over:
                await asyncio.sleep(random.uniform(*self._comes_back))

    async def _visit(self) -> str:
        """One connection; how it ended."""
        reader, writer = await asyncio.open_connection(*self.address)
        try:
            writer.write(request_for(self.job_id, self.cursor))
            return await self._read(reader)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _read(self, reader: asyncio.StreamReader) -> str:
        answer, text, name = Unchunked(), b"", "cut"
        while not answer.is_whole and (data := await reader.read(1 << 16)):
            content = answer.feed(data)
            self.beats += sum(line.startswith(b":") for line in content.split(b"\n"))
            *blocks, text = (text + content).split(b"\n\n")
            for block in blocks:
                name = self.take(frame_of(block.decode()))
            if answer.status not in (0, 200):
                break
        self.statuses[answer.status] += 1
        self.is_over = self.is_over or answer.status not in (0, 200)
        return name if answer.is_whole else "cut"

    def take(self, frame: Frame) -> str:
        """Take one event; its name where it says how the connection ends."""
        if not frame.id or frame.event == "snapshot":
            self.others.append(frame)
        else:
            self.rows.append(frame.row)
        self.cursor = frame.id or self.cursor
        self.is_over = frame.event in TERMINAL or frame.event == "error"
        return frame.event


def request_for(job_id: str, cursor: str) -> bytes:
    """What a viewer sends."""
    lines = [f"GET /v1/jobs/{job_id}/events HTTP/1.1", "Host: a", "Accept: text/event-stream"]
    if cursor:
        lines.append(f"Last-Event-ID: {cursor}")
    return "\r\n".join([*lines, "", ""]).encode()


@contextlib.asynccontextmanager
async def watching(viewers: Sequence[Viewer]) -> AsyncIterator[asyncio.Future[list[None]]]:
    """The viewers at work; what the block gets is a task that ends when all their jobs have."""
    group = asyncio.gather(*(viewer.run() for viewer in viewers))
    try:
        yield group
    finally:
        group.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await group


@contextlib.asynccontextmanager
async def speaking(
    scripts: Sequence[Script], words: Callable[[], Sequence[str]] = lambda: ("word ",), pause: float = 0.02
) -> AsyncIterator[None]:
    """Have jobs talk for as long as the block runs, through outages too; what was begun is written then."""
    is_over = asyncio.Event()

    async def speak() -> None:
        for script in scripts:
            await script.open_turn()
        while not is_over.is_set():
            for script in scripts:
                await say_patiently(script, words())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(is_over.wait(), pause)

    task = asyncio.create_task(speak())
    try:
        yield
    finally:
        is_over.set()
        await task


async def say_patiently(script: Script, texts: Sequence[str]) -> None:
    """Say something as a worker does: again and again, until it is known to be written."""
    while True:
        try:
            return await script.say(*texts)
        except StoreUnavailable:
            await asyncio.sleep(0.05)


async def stalled(job_id: str, port: int, count: int, cursor: str = "0") -> list[socket.socket]:
    """Connections that ask for a job's events and never read; the caller closes them."""
    loop = asyncio.get_running_loop()
    sockets: list[socket.socket] = []
    for _ in range(count):
        peer = socket.socket()
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        peer.setblocking(False)
        sockets.append(peer)
        await loop.sock_connect(peer, ("127.0.0.1", port))
        await loop.sock_sendall(peer, request_for(job_id, cursor))
    return sockets


def percentile(values: Sequence[float], share: float) -> float:
    """The value that this share of them does not exceed."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]
