"""Viewers of live streams that cost as little as they can: sockets that count tokens.

As a child: `python -m loadtests.crowd <plan as JSON>` (see `Plan`) connects all viewers, prints `ready`,
reads until every viewer has all its tokens, and prints a `Seen` as JSON. A token is `TOKEN<n> ` in an event,
n from 0 on. All viewers count tokens; one in `SAMPLE` also looks at each event: that its tokens follow each
other, and how long ago it was written (`"ts":<ms>` in the event, by this machine's clock).
"""

from __future__ import annotations

import asyncio
import json
import re
import resource
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import cast

import msgspec
import uvloop

from loadtests.measure import percentile

HOST = "127.0.0.1"
TOKEN = "~"
"""Of one byte that nothing else in an event has."""
SAMPLE = 25
AT_ONCE = 200
"""Viewers that connect at the same time."""
READY = "ready"
MARK = TOKEN.encode()
NUMBERS = re.compile(rb"~(\d+) ")
INSTANTS = re.compile(rb'"ts":(\d{13})')
IN_TEXT = re.compile(rb"~\d+ (\d{13}) ")


class Plan(msgspec.Struct):
    """`paths` are watched by `viewers` each, until each has seen `tokens`; `headers` go with each request."""

    port: int
    paths: list[str]
    viewers: int
    tokens: int
    timeout: float
    headers: dict[str, str] = {}
    is_timed_in_text: bool = False
    """Whether the instant stands behind each token's number, not in the event."""


@dataclass
class Seen:
    """Of all viewers: tokens, bytes, reads, seconds from the first token to the last; delays in ms; CPU in s.

    `short` counts viewers that have not got every token, `holes` places at which a sampled one missed some.
    """

    tokens: int
    received: int
    reads: int
    seconds: float
    cpu: float
    short: int
    holes: int
    delays: dict[str, float] = field(default_factory=dict[str, float])


class Viewer(asyncio.Protocol):
    """Reads one response."""

    __slots__ = ("crowd", "head", "opened", "reads", "received", "tokens", "transport")

    def __init__(self, crowd: Crowd, head: bytes) -> None:
        self.crowd = crowd
        self.head = head
        self.tokens = self.received = self.reads = 0
        self.opened = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.transport.write(self.head)

    def data_received(self, data: bytes) -> None:
        if not self.opened:
            self.opened = True
            self.crowd.on_opened()
        self.received += len(data)
        self.reads += 1
        # what a chat says at its end holds its text once more
        count = min(data.count(MARK), self.crowd.plan.tokens - self.tokens)
        if count:
            self.tokens += count
            self.crowd.on_tokens(count)

    def connection_lost(self, exc: Exception | None) -> None:
        self.crowd.on_lost(self)


class Watchful(Viewer):
    """A viewer that looks at what it gets."""

    __slots__ = ("next", "rest")

    def __init__(self, crowd: Crowd, head: bytes) -> None:
        super().__init__(crowd, head)
        self.next = 0
        self.rest = b""

    def data_received(self, data: bytes) -> None:
        if self.next == self.crowd.plan.tokens:
            return
        now = 1000 * time.time()
        whole, end, self.rest = (self.rest + data).rpartition(b"\n\n")
        left = self.crowd.plan.tokens - self.next
        if MARK in whole:  # what comes before the first token is as old as the job
            instants = self.crowd.instants.findall(whole)
            self.crowd.delays += [now - int(instant) for instant in instants[:left]]
        for number in NUMBERS.findall(whole + end)[:left]:
            self.crowd.holes += int(number) != self.next
            self.next = int(number) + 1
        super().data_received(data)


class Crowd:
    """All viewers."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.instants = IN_TEXT if plan.is_timed_in_text else INSTANTS
        self.holes = self.tokens = self.opened = 0
        self.delays: list[float] = []
        self.first = self.last = 0.0
        self.wanted = plan.viewers * len(plan.paths) * plan.tokens
        self.all_open, self.all_seen = asyncio.Event(), asyncio.Event()
        self.failed = ""
        self.viewers: list[Viewer] = []

    def on_opened(self) -> None:
        self.opened += 1
        if self.opened == self.plan.viewers * len(self.plan.paths):
            self.all_open.set()

    def on_tokens(self, count: int) -> None:
        self.last = time.perf_counter()
        self.first = self.first or self.last
        self.tokens += count
        if self.tokens >= self.wanted:
            self.all_seen.set()

    def on_lost(self, viewer: Viewer) -> None:
        if viewer.tokens < self.plan.tokens and not self.all_seen.is_set():
            self.failed = f"a viewer was closed after {viewer.tokens} tokens"
            self.all_open.set()
            self.all_seen.set()

    async def open(self) -> None:
        loop = asyncio.get_running_loop()
        heads = [self._head(path) for path in self.plan.paths for _ in range(self.plan.viewers)]
        for start in range(0, len(heads), AT_ONCE):
            made = [
                loop.create_connection(self._factory(start + n, head), HOST, self.plan.port)
                for n, head in enumerate(heads[start : start + AT_ONCE])
            ]
            self.viewers += [viewer for _, viewer in await asyncio.gather(*made)]
        await self.all_open.wait()

    def _factory(self, number: int, head: bytes):
        kind = Watchful if number % SAMPLE == 0 else Viewer
        return lambda: kind(self, head)

    def _head(self, path: str) -> bytes:
        lines = [f"GET {path} HTTP/1.1", f"Host: {HOST}", "Accept: text/event-stream"]
        lines += [f"{name}: {value}" for name, value in self.plan.headers.items()]
        return "\r\n".join([*lines, "", ""]).encode()

    def seen(self, cpu: float) -> Seen:
        shares = {"p50": 0.5, "p99": 0.99}
        delays = {name: percentile(self.delays, share) or 0.0 for name, share in shares.items()}
        return Seen(
            tokens=self.tokens,
            received=sum(viewer.received for viewer in self.viewers),
            reads=sum(viewer.reads for viewer in self.viewers),
            seconds=self.last - self.first,
            cpu=cpu,
            short=sum(viewer.tokens != self.plan.tokens for viewer in self.viewers),
            holes=self.holes,
            delays=delays,
        )


def raise_file_limit() -> None:
    """Allow as many sockets as the system lets us."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def main(plan: Plan) -> Seen:
    crowd = Crowd(plan)
    async with asyncio.timeout(plan.timeout):
        await crowd.open()
        print(READY, flush=True)
        used = time.process_time()
        await crowd.all_seen.wait()
    if crowd.failed:
        raise SystemExit(crowd.failed)
    return crowd.seen(time.process_time() - used)


if __name__ == "__main__":
    raise_file_limit()
    print(json.dumps(asdict(uvloop.run(main(msgspec.json.decode(sys.argv[1], type=Plan))))))
