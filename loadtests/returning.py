"""Viewers of one text who lose their connections in the middle and come back by their cursors, all at once.

As a child: `python -m loadtests.returning <port> <path> <viewers> <tokens> <abort|wait>`: prints `ready` when
all are connected, `half` when one has half of the tokens (with `abort` all then break their connections; with
`wait` somebody else does), `exact` when every viewer has gone on with the token that it lacked, and at the
end how long that took (from the first lost connection), how often they knocked, what was missed or repeated.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from dataclasses import asdict, dataclass
from typing import cast

import uvloop

from loadtests.crowd import AT_ONCE, HOST, NUMBERS, raise_file_limit

IDS = re.compile(rb"^id: (\S+)$", re.MULTILINE)
TIMEOUT = 180.0
KNOCK = 0.1
"""Seconds between attempts to come back."""


@dataclass
class Came:
    """Seconds until each viewer had gone on; attempts to connect; tokens missed or repeated; who is short."""

    seconds: list[float]
    knocks: int
    wrong: int
    short: int


class Viewer(asyncio.Protocol):
    """One viewer, over all its connections."""

    def __init__(self, crowd: Crowd) -> None:
        self.crowd = crowd
        self.cursor = b"0"
        self.next = 0
        self.rest = b""
        self.lost_at = 0.0
        self.opened = False
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.rest = b""
        lines = [f"GET {self.crowd.path} HTTP/1.1", f"Host: {HOST}", f"Last-Event-ID: {self.cursor.decode()}"]
        self.transport.write("\r\n".join([*lines, "", ""]).encode())

    def data_received(self, data: bytes) -> None:
        if not self.opened:
            self.opened = True
            self.crowd.on_opened()
        whole, _, self.rest = (self.rest + data).rpartition(b"\n\n")
        ids = IDS.findall(whole)
        if ids:
            self.cursor = ids[-1]
        numbers = NUMBERS.findall(whole)
        if not numbers:
            return
        for number in numbers:
            self.crowd.wrong += int(number) != self.next
            self.next = int(number) + 1
        if self.lost_at:
            self.crowd.on_exact(time.perf_counter() - self.crowd.lost_at)
            self.lost_at = 0.0
        self.crowd.on_tokens(self.next)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.next < self.crowd.tokens:
            self.lost_at = time.perf_counter()
            self.crowd.on_lost(self)


class Crowd:
    """All viewers."""

    def __init__(self, port: int, path: str, count: int, tokens: int, *, aborts: bool) -> None:
        self.port = port
        self.path = path
        self.tokens = tokens
        self.aborts = aborts
        self.viewers = [Viewer(self) for _ in range(count)]
        self.wrong = self.opened = self.knocks = 0
        self.lost_at = 0.0
        self.is_half = False
        self.seconds: list[float] = []
        self.tasks: set[asyncio.Task[None]] = set()
        self.all_open, self.all_exact, self.all_seen = asyncio.Event(), asyncio.Event(), asyncio.Event()

    def on_opened(self) -> None:
        self.opened += 1
        if self.opened == len(self.viewers):
            self.all_open.set()

    def on_tokens(self, following: int) -> None:
        if not self.is_half and following >= self.tokens / 2:
            self.is_half = True
            print("half", flush=True)
            if self.aborts:
                asyncio.get_running_loop().call_soon(self.break_all)
        if following == self.tokens and all(viewer.next == self.tokens for viewer in self.viewers):
            self.all_seen.set()

    def break_all(self) -> None:
        self.lost_at = time.perf_counter()
        for viewer in self.viewers:
            assert viewer.transport is not None
            viewer.transport.abort()

    def on_lost(self, viewer: Viewer) -> None:
        self.lost_at = self.lost_at or time.perf_counter()
        task = asyncio.ensure_future(self.connect(viewer))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def on_exact(self, seconds: float) -> None:
        self.seconds.append(seconds)
        if len(self.seconds) == len(self.viewers):
            print("exact", flush=True)
            self.all_exact.set()

    async def connect(self, viewer: Viewer) -> None:
        """Connect, again and again until somebody answers."""
        while True:
            self.knocks += 1
            try:
                await asyncio.get_running_loop().create_connection(lambda: viewer, HOST, self.port)
            except OSError:
                await asyncio.sleep(KNOCK)
            else:
                return

    async def run(self) -> Came:
        async with asyncio.timeout(TIMEOUT):
            for start in range(0, len(self.viewers), AT_ONCE):
                await asyncio.gather(*map(self.connect, self.viewers[start : start + AT_ONCE]))
            await self.all_open.wait()
            self.knocks = 0
            print("ready", flush=True)
            await self.all_exact.wait()
            await self.all_seen.wait()
        short = sum(viewer.next != self.tokens for viewer in self.viewers)
        return Came(self.seconds, self.knocks, self.wrong, short)


if __name__ == "__main__":
    _, port, path, viewers, tokens, how = sys.argv
    raise_file_limit()
    crowd = Crowd(int(port), path, int(viewers), int(tokens), aborts=how == "abort")
    print(json.dumps(asdict(uvloop.run(crowd.run()))))
