"""New events as they are published: one connection, one subscription for each watched job.

Rule 1: what comes here is a hint. A listener that sees a hole, or is told `on_gap`, reads the log.
Rule 2: a listener is added before Redis confirms, and `subscribe` returns after: then the log is read.
Rule 3: the last listener of a channel leaving frees everything about it.

redis-py's own PubSub reconnects and resubscribes without a word, does not check that a PING was
answered, and costs more for each message; so this reads one raw connection. Silence for longer than
`WATCHDOG` although a PING was sent closes it; after each reconnection every listener is told.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import structlog
from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import RedisError

from streamjobs.errors import StoreUnavailable
from streamjobs.store import keys
from streamjobs.store.log import Entry, parse_live

log = structlog.get_logger(__name__)

WATCHDOG = 4.0
CONFIRM_TIMEOUT = 5.0
_BACKOFF_CAP = 2.0


class Listener(Protocol):
    """Who watches a job. Calls come from the event loop and must not block."""

    def on_entries(self, entries: list[Entry]) -> None:
        """Events were published, in order; some may have been missed before them."""

    def on_gap(self) -> None:
        """The connection is new: anything may have been missed."""


class Live:
    """Subscriptions of this process over one connection. `connected` says whether it stands."""

    def __init__(self, client: Redis) -> None:
        self._client = client
        self._listeners: dict[str, list[Listener]] = {}
        self._hints: dict[str, Callable[[str], None]] = {}
        self._confirmed: dict[str, asyncio.Event] = {}
        self._connection: AbstractConnection | None = None
        self._reader: asyncio.Task[None] | None = None
        self._wanted = asyncio.Event()
        self._lock = asyncio.Lock()
        self._heard = False
        self.connected = False
        self.connections = 0

    @property
    def channels(self) -> int:
        """How many channels are subscribed to."""
        return len(self._listeners) + len(self._hints)

    async def subscribe(self, job_id: str, listener: Listener) -> None:
        """Hear of a job's events; returns once Redis has confirmed, so that a read after it leaves no hole.

        Raises `StoreUnavailable` when Redis does not confirm in time; the listener stays and is told
        `on_gap` once the connection stands.
        """
        channel = keys.live_channel(job_id)
        known = self._listeners.setdefault(channel, [])
        known.append(listener)
        if len(known) == 1:
            await self._join(channel)
        await self._confirmation(channel)

    async def unsubscribe(self, job_id: str, listener: Listener) -> None:
        """Stop hearing of a job's events."""
        channel = keys.live_channel(job_id)
        known = self._listeners.get(channel, [])
        if listener in known:
            known.remove(listener)
        if not known and self._listeners.pop(channel, None) is not None:
            confirmed = self._confirmed.pop(channel, None)
            if confirmed is not None:
                confirmed.set()
            await self._send("UNSUBSCRIBE", channel)

    async def on_inbox(self, partitions: Iterable[int], hear: Callable[[str], None]) -> None:
        """Hear of jobs that something came in for, by their ids."""
        for partition in partitions:
            channel = f"{keys.prefix(partition)}inbox"
            self._hints[channel] = hear
            await self._join(channel)

    async def aclose(self) -> None:
        """Stop reading and close the connection."""
        if self._reader is not None:
            self._reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reader
            self._reader = None
        await self._disconnect()

    async def _join(self, channel: str) -> None:
        self._confirmed[channel] = asyncio.Event()
        if self._reader is None:
            self._reader = asyncio.create_task(self._run(), name="live")
        await self._send("SUBSCRIBE", channel)

    async def _confirmation(self, channel: str) -> None:
        event = self._confirmed.get(channel)
        if event is None:
            return
        try:
            async with asyncio.timeout(CONFIRM_TIMEOUT):
                await event.wait()
        except TimeoutError:
            event.set()  # so that the confirmation, when it comes, counts as a gap
            raise StoreUnavailable("Redis does not confirm a subscription") from None

    async def _send(self, command: str, *channels: str) -> None:
        """Send on the connection that stands; without one, connecting subscribes to everything wanted."""
        async with self._lock:
            if self._connection is None or not self.connected:
                return
            try:
                await self._connection.send_command(command, *channels)
            except (RedisError, OSError):
                self.connected = False

    async def _run(self) -> None:
        failures = 0
        while True:
            try:
                connection = await self._connect()
                failures = 0
                await self._read(connection)
            except (RedisError, OSError, TimeoutError) as error:
                failures += 1
                log.warning("live.disconnected", error=type(error).__name__, failures=failures)
            finally:
                await self._disconnect()
            await asyncio.sleep(
                min(_BACKOFF_CAP, 0.05 * 2 ** min(failures, 10)) * (0.5 + random.random() / 2)
            )

    async def _connect(self) -> AbstractConnection:
        connection: AbstractConnection = self._client.connection_pool.make_connection()
        await connection.connect()
        async with self._lock:
            self._connection = connection
            channels = [*self._listeners, *self._hints]
            for start in range(0, len(channels), 1000):
                await connection.send_command("SUBSCRIBE", *channels[start : start + 1000])
            self.connected = True
        self.connections += 1
        return connection

    async def _disconnect(self) -> None:
        self.connected = False
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(RedisError, OSError):
                await connection.disconnect(nowait=True)

    async def _read(self, connection: AbstractConnection) -> None:
        watchdog = asyncio.create_task(self._watch(connection), name="live watchdog")
        try:
            while True:
                message = await connection.read_response(timeout=math.inf)
                self._heard = True
                self._dispatch(message)
        finally:
            watchdog.cancel()

    async def _watch(self, connection: AbstractConnection) -> None:
        """PING a connection that is silent; close one that stays silent, which ends the read."""
        asked = False
        while True:
            self._heard = False
            await asyncio.sleep(WATCHDOG / 2)
            if self._heard:
                asked = False
            elif asked:
                await connection.disconnect(nowait=True)
                return
            else:
                asked = True
                await self._send("PING")

    def _dispatch(self, message: Any) -> None:
        kind = message[0]
        if kind == b"message":
            self._deliver(message[1].decode(), message[2])
        elif kind == b"subscribe":
            self._on_confirmed(message[1].decode())

    def _deliver(self, channel: str, payload: bytes) -> None:
        hear = self._hints.get(channel)
        if hear is not None:
            hear(payload.decode())
            return
        listeners = self._listeners.get(channel)
        if listeners:
            entries = parse_live(payload)
            for listener in tuple(listeners):
                listener.on_entries(entries)

    def _on_confirmed(self, channel: str) -> None:
        event = self._confirmed.get(channel)
        if event is None:
            return
        if event.is_set():
            for listener in tuple(self._listeners.get(channel, ())):
                listener.on_gap()
        event.set()
