"""A client of `/v1/ws` for tests, on the `websockets` package; it reads as strictly as can be."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from tests.integration.gateway import Served

Row = tuple[str, str, str]


class _Event(msgspec.Struct, forbid_unknown_fields=True):
    id: str
    type: str
    data: msgspec.Raw


class Message(msgspec.Struct):
    """What the server says."""

    op: str
    job: str = ""
    id: str = ""
    events: list[_Event] = []
    data: msgspec.Raw = msgspec.Raw(b"")
    code: str = ""
    detail: str = ""
    status: int = 0
    field: str = ""
    reason: str = ""
    cursor: str = ""
    retry: int = 0

    @property
    def rows(self) -> list[Row]:
        """Its events as (id, type, data), as a log has them."""
        return [(event.id, event.type, bytes(event.data).decode()) for event in self.events]

    @property
    def json(self) -> Any:
        return json.loads(bytes(self.data))


class Talk:
    """One connection."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection

    async def say(self, op: str, **fields: Any) -> None:
        await self.connection.send(json.dumps({"op": op, **fields}))

    async def subscribe(self, job: str, after: str | None = None, **fields: Any) -> None:
        await self.say("subscribe", job=job, **({} if after is None else {"after": after}), **fields)

    async def hear(self) -> Message:
        async with asyncio.timeout(30):
            text = await self.connection.recv()
        assert isinstance(text, str)
        return msgspec.json.decode(text, type=Message)

    async def until(self, op: str, job: str = "") -> list[Message]:
        """Messages up to and with the first one of that name (of that job)."""
        heard: list[Message] = []
        while not heard or heard[-1].op != op or (job and heard[-1].job != job):
            heard.append(await self.hear())
        return heard

    async def transcript(self, job: str, after: str | None = None, **fields: Any) -> list[Message]:
        """Everything about a job from subscribing to its end."""
        await self.subscribe(job, after, **fields)
        return await self.until("ended", job)

    async def is_alive(self) -> bool:
        """Whether it answers."""
        await self.say("ping", data="alive")
        return (await self.until("pong"))[-1].json == "alive"

    async def end(self) -> tuple[int, str]:
        """Wait for the server to close; its code and reason."""
        async with asyncio.timeout(30):
            with contextlib.suppress(ConnectionClosed):
                while True:
                    await self.connection.recv()
        received = self.connection.protocol.close_rcvd
        return (received.code, received.reason) if received else (1006, "")


@contextlib.asynccontextmanager
async def talking(served: Served, **options: Any) -> AsyncIterator[Talk]:
    """A connection for as long as the block runs."""
    url = served.url.replace("http", "ws") + "/v1/ws"
    defaults: dict[str, Any] = {"max_size": None, "ping_interval": None, "close_timeout": 5}
    async with connect(url, **(defaults | options)) as connection:
        yield Talk(connection)


def rows(messages: list[Message], job: str = "") -> list[Row]:
    """All events of (a job's) messages."""
    return [row for message in messages if not job or message.job == job for row in message.rows]
