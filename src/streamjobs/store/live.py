"""New events as they are published: one connection, one subscription for each watched job and owner.

Rule 1: what comes here is a hint. A listener that sees a hole, or is told `on_gap`, reads the log.
Rule 2: a listener is added before Redis confirms, and `subscribe` returns after: then the log is read.
Rule 3: the last listener of a channel leaving frees everything about it.
Rule 4: callers only change what is wanted; one task a connection tells Redis, so that nothing overtakes.

A session has three tasks: one reads, one sends what changed, one sees to it that the link lives. Silence for
longer than `WATCHDOG` although a PING was sent ends it; each later session confirms every channel again, and
then its listeners are told `on_gap`.

Rejected: redis-py's own PubSub. It reconnects and resubscribes without a word, does not check that a PING was
answered, and costs more for each message; so this reads one raw connection.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import structlog
from redis import exceptions
from redis.asyncio import Redis

from streamjobs.encryption import Cipher, has_envelope
from streamjobs.errors import Shredded, StoreUnavailable, StreamjobsError
from streamjobs.store import keys
from streamjobs.store.log import Entry, parse_live
from streamjobs.store.vault import Vault

log = structlog.get_logger(__name__)

WATCHDOG = 4.0
CONFIRM_TIMEOUT = 5.0
_BACKOFF_CAP = 2.0
_SLICE = 1000
"""Channels in one command."""


class Listener(Protocol):
    """Who watches a job or an owner's feed. Calls come from the event loop and must not block."""

    def on_entries(self, entries: list[Entry]) -> None:
        """Events were published, in order; some may have been missed before. Of an owner's feed: none."""

    def on_gap(self) -> None:
        """The connection is new: anything may have been missed."""


class _Channel:
    """A channel that somebody here wants. `is_known`: a confirmation from now on means a gap."""

    def __init__(self, parse: Callable[[bytes], list[Entry]]) -> None:
        self.parse = parse
        self.listeners: list[Listener] = []
        self.hear: Callable[[str], None] | None = None
        self.stands = asyncio.Event()
        self.is_known = False

    def confirm(self) -> None:
        """Redis has answered the subscription that counts."""
        if self.is_known:
            self._tell(lambda listener: listener.on_gap())
        self.is_known = True
        self.stands.set()

    def deliver(self, payload: bytes) -> None:
        """Hand on what was published; what is none of ours is passed over."""
        if self.hear is not None:
            self.hear(payload.decode(errors="replace"))
            return
        try:
            entries = self.parse(payload)
        except ValueError:
            log.warning("live.foreign_message", bytes=len(payload))
            return
        except StreamjobsError:
            self._tell(lambda listener: listener.on_gap())  # the log has it, and says what is wrong
            return
        self._tell(lambda listener: listener.on_entries(entries))

    def _tell(self, what: Callable[[Listener], None]) -> None:
        for listener in tuple(self.listeners):
            try:
                what(listener)
            except Exception:
                log.exception("live.listener_failed")


class Live:
    """Subscriptions of this process over one connection. `connected` says whether it stands."""

    def __init__(self, client: Redis, partitions: int = 1, vault: Vault | None = None) -> None:
        self._client: Any = client
        self._vault = vault
        self._partitions = partitions
        self._channels: dict[str, _Channel] = {}
        self._told: set[str] = set()
        """What Redis was told to send, on this connection."""
        self._unanswered: Counter[str] = Counter()
        """SUBSCRIBEs without an answer: only the last one's says that a channel stands."""
        self._touched: dict[str, None] = {}
        self._changed = asyncio.Event()
        self._wants_ping = False
        self._heard = False
        self._runner: asyncio.Task[None] | None = None
        self._is_closed = False
        self.connected = False
        self.connections = 0

    @property
    def channels(self) -> int:
        """How many channels are wanted."""
        return len(self._channels)

    @property
    def is_down(self) -> bool:
        """Whether somebody wants to hear and nothing can be heard now."""
        return bool(self._channels) and not self.connected

    async def subscribe(self, job_id: str, listener: Listener) -> None:
        """Hear of a job's events; returns once Redis has confirmed, so that a read after it leaves no hole.

        Raises `StoreUnavailable` when Redis does not confirm in time; the listener stays and is told
        `on_gap` once the connection stands. A cancelled call leaves no listener.
        """
        if self._vault is None:
            await self._subscribe(keys.live_channel(job_id), listener, parse_live)
            return
        await self._subscribe(keys.live_channel(job_id), listener, _Decrypting(self._vault, job_id))

    async def unsubscribe(self, job_id: str, listener: Listener) -> None:
        """Stop hearing of a job's events; those of a call that still waits for Redis too."""
        self._remove(keys.live_channel(job_id), listener)

    async def subscribe_owner(self, owner: str, listener: Listener) -> None:
        """Hear that an owner's feed has more; otherwise as `subscribe`."""
        await self._subscribe(keys.owner_channel(owner, self._partitions), listener, _nothing)

    async def unsubscribe_owner(self, owner: str, listener: Listener) -> None:
        """Stop hearing of an owner's feed."""
        self._remove(keys.owner_channel(owner, self._partitions), listener)

    async def _subscribe(self, name: str, listener: Listener, parse: Callable[[bytes], list[Entry]]) -> None:
        channel = self._want(name, parse)
        channel.listeners.append(listener)
        try:
            await self._until_it_stands(channel)
        except asyncio.CancelledError:
            self._remove(name, listener)
            raise

    async def on_inbox(self, partitions: Iterable[int], hear: Callable[[str], None]) -> None:
        """Hear of jobs that something came in for, by their ids."""
        for partition in partitions:
            self._want(f"{keys.prefix(partition)}inbox", _nothing).hear = hear

    async def aclose(self) -> None:
        """Stop reading and close the connection. Whoever waits for a confirmation gets `StoreUnavailable`."""
        self._is_closed = True
        for channel in self._channels.values():
            channel.stands.set()
        if self._runner is not None:
            self._runner.cancel()
            await asyncio.gather(self._runner, return_exceptions=True)
            self._runner = None

    # --- what is wanted

    def _want(self, name: str, parse: Callable[[bytes], list[Entry]]) -> _Channel:
        if self._is_closed:
            raise StoreUnavailable("this process is closing")
        if self._runner is None:
            self._runner = asyncio.create_task(self._run(), name="live")
        channel = self._channels.get(name)
        if channel is None:
            channel = self._channels[name] = _Channel(parse)
            if name in self._told and name not in self._unanswered:
                channel.confirm()
            self._touch(name)
        return channel

    def _remove(self, name: str, listener: Listener) -> None:
        channel = self._channels.get(name)
        if channel is None or listener not in channel.listeners:
            return
        channel.listeners.remove(listener)
        if not channel.listeners:
            del self._channels[name]
            channel.stands.set()
            self._touch(name)

    def _touch(self, name: str) -> None:
        self._touched[name] = None
        self._changed.set()

    async def _until_it_stands(self, channel: _Channel) -> None:
        try:
            async with asyncio.timeout(CONFIRM_TIMEOUT):
                await channel.stands.wait()
        except TimeoutError:
            channel.is_known = True
            raise StoreUnavailable("Redis does not confirm a subscription") from None
        if self._is_closed:
            raise StoreUnavailable("this process is closing")

    # --- the connection

    async def _run(self) -> None:
        failures = 0
        while True:
            self._heard = False
            try:
                await self._connected()
            except* (exceptions.RedisError, OSError) as group:
                log.warning("live.disconnected", error=_first_name(group), failures=failures)
            except* Exception:
                log.exception("live.failed", failures=failures)
            failures = 1 if self._heard else failures + 1
            delay = min(_BACKOFF_CAP, 0.05 * 2 ** min(failures, 10))
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))

    async def _connected(self) -> None:
        """One connection, from its beginning to its end, which is always an exception."""
        connection: Any = self._client.connection_pool.make_connection()
        try:
            async with asyncio.timeout(WATCHDOG):
                await connection.connect()
            await self._session(connection)
        finally:
            self.connected = False
            self._told.clear()
            self._unanswered.clear()
            if not self._is_closed:
                for channel in self._channels.values():
                    channel.stands.clear()
            await _close(connection)

    async def _session(self, connection: Any) -> None:
        self._touched = dict.fromkeys(self._channels)
        self._changed.set()
        self.connected = True
        self.connections += 1
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._read(connection), name="live read")
            tasks.create_task(self._write(connection), name="live write")
            tasks.create_task(self._watch(), name="live watchdog")

    async def _read(self, connection: Any) -> None:
        while True:
            message: Any = await connection.read_response(timeout=math.inf)
            self._heard = True
            self._dispatch(message)

    async def _write(self, connection: Any) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            if self._wants_ping:
                self._wants_ping = False
                await _send(connection, "PING")
            names, self._touched = self._touched, {}
            leaving = [name for name in names if name in self._told and name not in self._channels]
            joining = [name for name in names if name in self._channels and name not in self._told]
            self._told.difference_update(leaving)
            self._told.update(joining)
            self._unanswered.update(joining)
            for command, channels in (("UNSUBSCRIBE", leaving), ("SUBSCRIBE", joining)):
                for start in range(0, len(channels), _SLICE):
                    await _send(connection, command, *channels[start : start + _SLICE])

    async def _watch(self) -> None:
        """Have a silent connection asked for a sign of life; end one that stays silent."""
        while True:
            self._heard = False
            await asyncio.sleep(WATCHDOG / 2)
            if self._heard:
                continue
            self._wants_ping = True
            self._changed.set()
            await asyncio.sleep(WATCHDOG / 2)
            if not self._heard:
                raise TimeoutError("Redis is silent")

    def _dispatch(self, message: Any) -> None:
        kind = message[0]
        if kind == b"message":
            channel = self._channels.get(message[1].decode())
            if channel is not None:
                channel.deliver(message[2])
        elif kind == b"subscribe":
            self._on_confirmed(message[1].decode())

    def _on_confirmed(self, name: str) -> None:
        self._unanswered[name] -= 1
        if self._unanswered[name] > 0:
            return
        del self._unanswered[name]
        channel = self._channels.get(name)
        if channel is not None and name in self._told:
            channel.confirm()


class _Decrypting:
    """Parses what a job publishes, with its data key, which reading the log has brought here."""

    def __init__(self, vault: Vault, job_id: str) -> None:
        self._vault = vault
        self._job_id = job_id
        self._cipher: Cipher | None = None

    def __call__(self, payload: bytes) -> list[Entry]:
        """Raises `Shredded` where the data key is not known here, `DamagedCiphertext`."""
        entries = parse_live(payload)
        if not has_envelope(payload):
            return entries
        self._cipher = self._vault.known(self._job_id) or self._cipher
        if self._cipher is None:
            raise Shredded("the job's data key is not known here")
        return self._vault.decrypt(self._cipher, entries)


def _nothing(_payload: bytes) -> list[Entry]:
    """What a message says that is only a hint."""
    return []


async def _send(connection: Any, *command: str) -> None:
    """Send on a connection that stands. redis-py would open it anew, without its subscriptions."""
    if not connection.is_connected:
        raise exceptions.ConnectionError("the connection is closed")
    await connection.send_command(*command)


async def _close(connection: Any) -> None:
    try:
        await connection.disconnect(nowait=True)
    except (exceptions.RedisError, OSError):
        log.debug("live.close_failed")


def _first_name(group: BaseExceptionGroup[Any]) -> str:
    first: Any = group.exceptions[0]
    return _first_name(first) if hasattr(first, "exceptions") else type(first).__name__
