"""What the gateway's tests share: a gateway on a free port, jobs written by hand, and strict readers."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import httpx
import msgspec

from streamjobs.app import App
from streamjobs.config import Settings
from streamjobs.events import (
    ErrorInfo,
    Event,
    JobCompleted,
    JobFailed,
    TextDelta,
    TurnStarted,
    encode_event,
    encode_json,
)
from streamjobs.gateway.app import Gateway, url_of
from streamjobs.gateway.server import Server, listen
from streamjobs.store import Batch, Lease, Store, Submission
from tests.conftest import fast_settings

_workers = itertools.count()


class Served(NamedTuple):
    """A gateway that answers at `url`, for tests in the same loop."""

    url: str
    gateway: Gateway
    store: Store
    client: httpx.AsyncClient

    async def script(self, **fields: Any) -> Script:
        return await Script.start(self.store, **fields)

    def events_url(self, job_id: str) -> str:
        return f"{self.url}/v1/jobs/{job_id}/events"

    def stream(self, job_id: str, cursor: str | None = None, **parameters: str) -> Stream:
        return Stream(self, self.events_url(job_id), cursor, parameters)

    def everything(self, owner: str, cursor: str | None = None, **parameters: str) -> Stream:
        """The stream of all of an owner's events."""
        headers = {"x-streamjobs-owner": owner}
        return Stream(self, f"{self.url}/v1/events", cursor, parameters, headers)

    async def transcript(self, job_id: str, cursor: str | None = None, **parameters: str) -> list[Frame]:
        """Everything a stream says until it ends."""
        async with self.stream(job_id, cursor, **parameters) as stream:
            return [frame async for frame in stream]


@contextlib.asynccontextmanager
async def serving(url: str, app: App | None = None, **changes: Any) -> AsyncIterator[Served]:
    """A store, a gateway and a real server on a free port."""
    settings = fast_settings(url, **({"lease": 60.0, "flush_interval": 0.01} | changes))
    store = await Store.open(settings)
    gateway = Gateway(store, app or App(), settings)
    listener = listen(settings, 0)
    server = Server(gateway.asgi, settings)
    task = asyncio.create_task(server.serve([listener]))
    await gateway.start()
    base = url_of(listener)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=base, timeout=30.0, limits=limits) as client:
        try:
            yield Served(base, gateway, store, client)
        finally:
            await gateway.drain(0.0)
            server.should_exit = True
            await task
            await gateway.aclose()
            await store.aclose()


def settings_of(served: Served) -> Settings:
    return served.gateway.settings


class Script:
    """A job whose log a test writes, as a worker would."""

    def __init__(self, store: Store, lease: Lease) -> None:
        self._store = store
        self._lease = lease
        self._number = 0
        self.id = lease.job_id

    @classmethod
    async def start(cls, store: Store, **fields: Any) -> Script:
        """Submit a job and take it: its log has two events."""
        await store.jobs.submit(Submission(**({"kind": "chat"} | fields)))
        taken = await store.work.take(0, f"script-{next(_workers)}", 1, 1, store.settings.queues)
        return cls(store, taken.leases[0])

    @property
    def epoch(self) -> int:
        return self._lease.epoch

    def under(self, store: Store) -> Script:
        """The same job, written on through another store."""
        other = Script(store, self._lease)
        other._number = self._number
        return other

    async def write(self, *events: Event) -> None:
        await self.write_raw(*((event.type, encode_event(event)) for event in events))

    async def write_raw(self, *events: tuple[str, bytes]) -> None:
        await self._append(Batch(self.id, self._lease.epoch, self._number + 1, events))

    async def say(self, *texts: str) -> None:
        """Append one delta for each text."""
        for start in range(0, len(texts), 200):
            await self.write(*(TextDelta(turn=1, text=text) for text in texts[start : start + 200]))

    async def open_turn(self) -> None:
        await self.write(TurnStarted(turn=1, model="scripted"))

    async def keep(self, name: str, media_type: str, content: bytes) -> None:
        """Store an artifact."""
        await self._store.artifacts.put(self.id, self._lease.epoch, name, media_type, content)

    async def complete(self, result: Any = "done") -> None:
        await self._end(JobCompleted(result=msgspec.Raw(encode_json(result))), "completed")

    async def fail(self, error: ErrorInfo) -> None:
        await self._end(JobFailed(error=error), "failed")

    async def _end(self, event: Event, outcome: str) -> None:
        events = [(event.type, encode_event(event))]
        await self._append(Batch(self.id, self._lease.epoch, self._number + 1, events, outcome))

    async def _append(self, batch: Batch) -> None:
        (answer,) = await self._store.work.append(0, [batch], always=True)
        assert answer.is_written, answer
        self._number += 1

    async def log(self) -> list[tuple[str, str, str]]:
        """The whole log as (id, type, data)."""
        return [
            (str(entry.cursor), entry.type, entry.data.decode())
            async for page in self._store.log.pages(self.id)
            for entry in page.entries
        ]


class Frame(NamedTuple):
    """One server-sent event."""

    id: str
    event: str
    data: str
    retry: int | None = None

    @property
    def json(self) -> Any:
        return json.loads(self.data)

    @property
    def row(self) -> tuple[str, str, str]:
        return self.id, self.event, self.data


def frame_of(block: str) -> Frame:
    """Read one block as strictly as the standard allows; comments are skipped."""
    fields: dict[str, str] = {}
    for line in block.split("\n"):
        if line.startswith(":"):
            continue
        name, colon, value = line.partition(": ")
        assert colon, f"not a field: {line!r}"
        assert name not in fields, f"{name} twice in {block!r}"
        fields[name] = value
    assert "data" in fields, f"a block without data: {block!r}"
    retry = fields.get("retry")
    return Frame(fields.get("id", ""), fields["event"], fields["data"], int(retry) if retry else None)


class Stream:
    """A client of the event stream that reads strictly; `beats` counts heartbeats, `degraded` some."""

    def __init__(
        self,
        served: Served,
        url: str,
        cursor: str | None,
        parameters: dict[str, str],
        headers: dict[str, str] | None = None,
    ) -> None:
        self._served = served
        self._url = url
        self._headers = {"accept": "text/event-stream"} | (headers or {})
        if cursor is not None:
            self._headers["last-event-id"] = cursor
        self._parameters = parameters
        self._stack = contextlib.AsyncExitStack()
        self._buffer = ""
        self.beats = self.degraded = 0
        self.response: httpx.Response

    async def __aenter__(self) -> Stream:
        request = self._served.client.stream("GET", self._url, headers=self._headers, params=self._parameters)
        self.response = await self._stack.enter_async_context(request)
        self._chunks = self.response.aiter_text()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Frame:
        while True:
            while self._buffer.startswith(":"):
                line, newline, rest = self._buffer.partition("\n")
                if not newline:
                    break
                assert line in {":", ": degraded"}, line
                self.beats += 1
                self.degraded += line != ":"
                self._buffer = rest
            block, blank, rest = self._buffer.partition("\n\n")
            if blank:
                self._buffer = rest
                return frame_of(block)
            self._buffer += await self._next_chunk()

    async def _next_chunk(self) -> str:
        try:
            return await anext(self._chunks)
        except StopAsyncIteration:
            assert not self._buffer, f"an unfinished block: {self._buffer!r}"
            raise

    async def until(self, event: str) -> list[Frame]:
        """Frames up to and with the first one of that name."""
        frames: list[Frame] = []
        async for frame in self:
            frames.append(frame)
            if frame.event == event:
                return frames
        raise AssertionError(f"the stream ended before {event}: {frames}")
