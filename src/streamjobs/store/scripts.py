"""Loads the Lua scripts and calls them.

Rule 1: every state change is a script; a script may be sent twice.
Rule 2: what Redis answers badly becomes one of our errors here; no redis-py exception leaves the store.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import ssl
from collections.abc import Iterable
from importlib import resources
from typing import Any, ClassVar

import msgspec
from redis import exceptions as refusals
from redis.asyncio import Redis
from redis.exceptions import NoScriptError, RedisError

from streamjobs.config import Settings
from streamjobs.errors import MissingPermission, StoreFull, StoreUnavailable, StreamjobsError
from streamjobs.store import keys


class Limits(msgspec.Struct, frozen=True):
    """What every script is told, as JSON; durations in ms."""

    lease: int
    sweep: int
    retention: int
    idempotency: int
    owner_limit: int
    owner_rate: int
    owner_waiting: int
    dead_cap: int
    max_depth: int
    max_children: int
    max_crashes: int
    crash_base: int
    crash_cap: int
    max_events: int
    max_bytes: int
    feed_cap: int
    feed_bytes: int
    owner_feed_cap: int
    owner_feed_bytes: int
    owner_feed_ttl: int
    inline_bytes: int
    encrypts: bool | msgspec.UnsetType = msgspec.UNSET
    scan: int = 2000
    publish: str = "PUBLISH"

    @classmethod
    def of(cls, settings: Settings) -> Limits:
        """The limits that these settings mean."""
        return cls(
            lease=ms(settings.lease),
            sweep=ms(settings.sweep_interval),
            retention=ms(settings.retention),
            idempotency=ms(settings.idempotency_ttl),
            owner_limit=settings.owner_limit,
            owner_rate=settings.owner_rate,
            owner_waiting=settings.owner_waiting,
            dead_cap=settings.dead_cap,
            max_depth=settings.max_depth,
            max_children=settings.max_children,
            max_crashes=settings.max_crashes,
            crash_base=ms(settings.crash_base),
            crash_cap=ms(settings.crash_cap),
            max_events=settings.max_events,
            max_bytes=settings.max_bytes,
            feed_cap=settings.feed_cap,
            feed_bytes=settings.feed_bytes,
            owner_feed_cap=settings.owner_feed_cap,
            owner_feed_bytes=settings.owner_feed_bytes,
            owner_feed_ttl=ms(settings.owner_feed_ttl),
            inline_bytes=settings.inline_bytes,
            encrypts=True if settings.encryption_keys or settings.encryption_keys_file else msgspec.UNSET,
        )


def ms(seconds: float) -> int:
    """Seconds as whole milliseconds."""
    return round(seconds * 1000)


# In fakeredis an error that pcall answers is no Lua string, and reading a stream that is not there is one.
_FAKE_HEAD = """
local real, redis = redis, { call = redis.call }
function redis.pcall(...)
  local reply = real.pcall(...)
  if type(reply) ~= 'table' or not reply.err then return reply end
  reply.err = tostring(reply.err)
  return not string.find(reply.err, 'requires the key to exist', 1, true) and reply
end
"""


class Script:
    """One script's text and digest. `flags` is its `#!lua` line; `shared` puts common.lua in front."""

    def __init__(self, name: str, flags: str = "", *, shared: bool = True) -> None:
        folder = resources.files("streamjobs.store") / "scripts"
        body = (folder / f"{name}.lua").read_text()
        common = (folder / "common.lua").read_text() if shared else ""
        head = f"#!lua{' flags=' + flags if flags else ''}\n"
        self.text = head + common + body
        self.sha = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()
        self.plain_text = _FAKE_HEAD + common + body
        self.plain_sha = hashlib.sha1(self.plain_text.encode(), usedforsecurity=False).hexdigest()


class Scripts:
    """Calls scripts on one client. `plain` is for servers that know no `#!lua` line (fakeredis)."""

    SUBMIT: ClassVar = Script("submit")
    TAKE: ClassVar = Script("take", "allow-oom")
    APPEND: ClassVar = Script("append")
    APPEND_ALWAYS: ClassVar = Script("append", "allow-oom")
    RENEW: ClassVar = Script("renew", "allow-oom")
    WAKE: ClassVar = Script("wake", "allow-oom")
    CANCEL: ClassVar = Script("cancel", "allow-oom")
    SIGNAL: ClassVar = Script("signal")
    PAUSE: ClassVar = Script("pause", "allow-oom")
    RESUME: ClassVar = Script("resume", "allow-oom")
    SCHEDULE: ClassVar = Script("schedule")
    SCHEDULE_ALWAYS: ClassVar = Script("schedule", "allow-oom")
    ARTIFACT: ClassVar = Script("artifact")
    PERMIT: ClassVar = Script("permit", "allow-oom")
    STRIKE: ClassVar = Script("strike", "allow-oom")
    RERUN: ClassVar = Script("rerun")
    RETAIN: ClassVar = Script("retain", "allow-oom")
    NOTIFY: ClassVar = Script("notify")
    WEBHOOK: ClassVar = Script("webhook")
    DELIVER: ClassVar = Script("deliver", "allow-oom")
    FEED: ClassVar = Script("feed", "allow-oom")
    INDEX: ClassVar = Script("index", "allow-oom")
    STATS: ClassVar = Script("stats", "allow-oom")
    INSPECT: ClassVar = Script("inspect", "no-writes")
    ALLOWED: ClassVar = Script("allowed", "no-writes", shared=False)
    DATAKEY: ClassVar = Script("datakey", "allow-oom")
    SEAL: ClassVar = Script("seal", "allow-oom")
    READ: ClassVar = Script("read", "no-writes", shared=False)

    def __init__(self, client: Redis, limits: Limits, *, plain: bool = False) -> None:
        self._client: Any = client
        self._limits = msgspec.json.encode(limits)
        self._plain = plain

    async def call(self, script: Script, partition: int, *arguments: str | bytes | int) -> Any:
        """Run a script on a partition; ARGV is the limits, then `arguments`.

        Raises `StoreFull`, `StoreUnavailable`, or `StreamjobsError` for a script's own fault.
        """
        return await self._run(script, f"{keys.prefix(partition)}leases", self._limits, *arguments)

    async def read(self, key: str, *arguments: str | bytes | int) -> Any:
        """Run the read script, which takes the job's key and no limits."""
        return await self._run(self.READ, key, *arguments)

    async def _run(self, script: Script, key: str, *arguments: str | bytes | int) -> Any:
        sha, text = (script.plain_sha, script.plain_text) if self._plain else (script.sha, script.text)
        with translated():
            try:
                return await self._client.execute_command("EVALSHA", sha, 1, key, *arguments)
            except NoScriptError:
                return await self._client.execute_command("EVAL", text, 1, key, *arguments)


async def is_plain(client: Any) -> bool:
    """Whether a server knows no `#!lua` line, as fakeredis. It has no INFO to ask either."""
    with translated():
        try:
            await client.execute_command("EVAL", "#!lua flags=no-writes\nreturn 1", 0)
        except refusals.ResponseError as error:
            if "near '#'" not in str(error):
                raise
            return True
    return False


class translated:  # noqa: N801 - reads as the statement it is
    """`with translated():` turns redis-py's exceptions into ours, and loses no cancellation.

    redis-py sends under `asyncio.wait_for`, which before Python 3.12 swallows a cancellation that comes
    just as the wait ends: a loop around it would then never stop.
    """

    def __enter__(self) -> None:
        self._cancelling = _cancelling()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if _cancelling() > self._cancelling and not isinstance(error, asyncio.CancelledError):
            raise asyncio.CancelledError from error
        if isinstance(error, RedisError):
            raise _ours(error) from error


def _cancelling() -> int:
    """How many times this task was told to stop; 0 in the thread that keeps leases, which has no loop."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        return 0
    return 0 if task is None else task.cancelling()


_AWAY = (
    refusals.ConnectionError,
    refusals.TimeoutError,
    refusals.BusyLoadingError,
    refusals.ReadOnlyError,
)


def _ours(error: RedisError) -> StreamjobsError:
    if isinstance(error, refusals.OutOfMemoryError):
        return StoreFull("Redis is at its memory limit")
    if isinstance(error, refusals.NoPermissionError) or "ACL failure in script" in str(error):
        return MissingPermission(
            f"Redis does not allow its user {_refused(str(error))}; ask streamjobs doctor"
        )
    if isinstance(error, _AWAY):
        return StoreUnavailable(f"Redis cannot be reached: {_refusal(error) or type(error).__name__}")
    if isinstance(error, refusals.ResponseError) and str(error).startswith(
        ("LOADING", "MISCONF", "BUSY", "MASTERDOWN", "UNBLOCKED")
    ):
        return StoreUnavailable(f"Redis refuses commands now: {error}")
    return StreamjobsError(f"Redis: {error}")


def _refusal(error: BaseException | None) -> str:
    """Whether one end refuses the other, which redis-py says in an error's cause."""
    while error is not None:
        if isinstance(error, refusals.AuthenticationError):
            return "it refuses the user name or the password"
        if isinstance(error, ssl.SSLCertVerificationError):
            return f"its certificate is refused ({error.verify_message})"
        if isinstance(error, ssl.SSLError):
            return f"TLS fails ({error.reason or error})"
        error = error.__cause__ or error.__context__
    return ""


def _refused(said: str) -> str:
    """What was refused: a command, keys or channels. Not the user's name: callers of the API may see it."""
    command = re.search(r"'([a-z|]+)'", said)
    return f"the command {command[1]}" if command else "a channel" if "channel" in said else "a key"


def flatten(rows: Iterable[Iterable[str | bytes | int]]) -> list[str | bytes | int]:
    """Rows as the flat list that ARGV is."""
    return [value for row in rows for value in row]


def text(value: bytes | str) -> str:
    """A reply's string, whatever the client decodes."""
    return value.decode() if isinstance(value, bytes) else value
