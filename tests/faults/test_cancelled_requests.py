"""Requests that are cut off at any moment: the reply to one's command is never another's answer.

A connection to Redis on which a cancelled command waited for its reply must not be used again: the next
command would read that reply. Here requests of twenty owners run through one gateway, and most are cut off.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import pytest

from streamjobs.events import JobLog
from tests.conftest import RedisProcess, wait_until
from tests.integration.gateway import Served, serving

OWNERS = 20
AT_ONCE = 40
TICKS = 30
"""Turns of the event loop after which a request is cut off, at most; many take that long."""


class Owner(NamedTuple):
    """An owner, the word that is theirs, and a job that has ended with it."""

    name: str
    canary: str
    job: str


class Ask(NamedTuple):
    """A request; `shows`: its whole answer has the canary. `ends`: it comes to an end by itself."""

    path: str
    accept: str = "application/json"
    shows: bool = True
    ends: bool = True


ASKS = (
    Ask("/v1/jobs/{job}"),
    Ask("/v1/jobs/{job}?wait=1"),
    Ask("/v1/jobs/{job}?at=3"),
    Ask("/v1/jobs/{job}/result"),
    Ask("/v1/jobs/{job}/log"),
    Ask("/v1/jobs/{job}/effects", shows=False),
    Ask("/v1/jobs/{job}/artifacts/canary.txt"),
    Ask("/v1/jobs/{job}/events"),
    Ask("/v1/jobs/{job}/events", "application/x-ndjson"),
    Ask("/v1/jobs/{job}/events", "text/event-stream"),
    Ask("/v1/jobs/{job}/events?after=0", "text/event-stream"),
    Ask("/v1/jobs"),
    Ask("/v1/notifications", shows=False),
    Ask("/v1/events?watch={job}", "text/event-stream", ends=False),
)


@pytest.fixture
async def served(redis: RedisProcess) -> AsyncIterator[Served]:
    async with serving(redis.url, redis_max_connections=8, redis_timeout=30.0) as gateway:
        yield gateway


async def owner(served: Served, number: int) -> Owner:
    canary = f"canary-{number:02}-{random.getrandbits(64):016x}"
    script = await served.script(owner=f"owner{number}", thread_id=canary, input=f'"{canary}"'.encode())
    await script.open_turn()
    await script.say(f"{canary} ", "said")
    await script.write(JobLog(level="info", message=canary))
    await script.keep("canary.txt", "text/plain", canary.encode())
    await script.complete(canary)
    await served.store.index.put(script.id, canary, "")
    return Owner(f"owner{number}", canary, script.id)


async def ask(served: Served, who: Owner, what: Ask, got: bytearray) -> int:
    """One request straight to the app, in this task; its status. What comes of the answer goes into `got`."""
    path, _, query = what.path.format(job=who.job).partition("?")
    headers = {"x-streamjobs-owner": who.name, "accept": what.accept}
    scope = {
        "type": "http", "method": "GET", "http_version": "1.1", "path": path, "raw_path": path.encode(),
        "query_string": query.encode(), "root_path": "", "scheme": "http", "client": None, "server": None,
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }  # fmt: skip
    status = 0

    async def send(message: Any) -> None:
        nonlocal status
        status = message.get("status", status)
        got.extend(message.get("body", b""))

    await served.gateway.asgi(scope, asyncio.Event().wait, send)  # pyright: ignore[reportArgumentType]
    return status


class Run:
    """Requests of all owners, and what became of them."""

    def __init__(self, served: Served, owners: list[Owner], chance: random.Random) -> None:
        self.outcomes = Counter[str]()
        self._served = served
        self._owners = owners
        self._chance = chance
        self._places = asyncio.Semaphore(AT_ONCE)

    async def one(self) -> None:
        async with self._places:
            who, what = self._chance.choice(self._owners), self._chance.choice(ASKS)
            ticks = self._chance.randrange(TICKS) if not what.ends or self._chance.random() < 0.8 else None
            got = bytearray()
            task = asyncio.create_task(ask(self._served, who, what, got))
            if ticks is not None:
                await self._cut(task, ticks)
            with contextlib.suppress(asyncio.CancelledError):
                assert await task == 200, (what, bytes(got))
            self._judge(who, what, bytes(got), was_cut=task.cancelled())

    @staticmethod
    async def _cut(task: asyncio.Task[int], ticks: int) -> None:
        for _ in range(ticks):
            if task.done():
                return
            await asyncio.sleep(0)
        task.cancel()

    def _judge(self, who: Owner, what: Ask, got: bytes, *, was_cut: bool) -> None:
        self.outcomes["cut" if was_cut else "whole"] += 1
        self.outcomes["cut with content"] += was_cut and bool(got)
        foreign = [other.name for other in self._owners if other != who and other.canary.encode() in got]
        assert foreign == [], f"{who.name} asked for {what.path} and saw what is of {foreign}"
        if not was_cut:
            assert not what.shows or who.canary.encode() in got, (what, got)


@pytest.mark.parametrize("cuts", [500, pytest.param(10_000, marks=pytest.mark.long)])
async def test_nobody_is_given_anothers_answer(served: Served, cuts: int):
    """A page that is closed while it loads would have its data shown to whoever asks next."""
    chance = random.Random(random.getrandbits(64))
    owners = [await owner(served, number) for number in range(OWNERS)]
    run = Run(served, owners, chance)
    while run.outcomes["cut"] < cuts:
        async with asyncio.TaskGroup() as group:
            for _ in range(500):
                group.create_task(run.one())
    print(dict(run.outcomes))  # noqa: T201 - how much was tried
    assert run.outcomes["whole"] > cuts / 20
    assert run.outcomes["cut with content"] > 0
    await wait_until(lambda: is_idle(served))
    pool: Any = served.store.client.connection_pool
    for _ in range(3 * 8):  # every connection that is kept answers what it is asked
        for who in owners:
            assert (await served.store.jobs.get(who.job)).owner == who.name
    assert not pool._in_use_connections


def is_idle(served: Served) -> bool:
    """Nothing is left of any request."""
    hub, pool = served.gateway.hub, served.store.client.connection_pool
    streams = hub.viewers, hub.channels, hub.feeds, len(hub.open_streams)
    return streams == (0, 0, 0, 0) and not pool._in_use_connections  # pyright: ignore[reportAttributeAccessIssue]
