"""Strikes: what an operator has stopped, for the whole fleet and at once.

Rule 1: a struck queue keeps its tickets, jobs of a struck kind are held; what runs already runs on until it
parks or ends. A struck tool is the workers' to respect.
Rule 2: every partition knows every strike; partition 0 hears of it last, so what it lists holds everywhere.
"""

from __future__ import annotations

import re
from typing import Any, Literal, get_args

import msgspec
from redis.asyncio import Redis

from streamjobs.config import Settings
from streamjobs.errors import Invalid, UnknownQueue
from streamjobs.events import UNENCODABLE, encode_json
from streamjobs.store import keys
from streamjobs.store.scripts import Scripts, text, translated

Scope = Literal["queue", "kind", "tool"]

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)


class Strike(msgspec.Struct, frozen=True):
    """One thing that is stopped, by whom, why and since when (Redis's clock)."""

    scope: Scope
    name: str
    by: str
    reason: str
    since_ms: int


class _Stored(msgspec.Struct, frozen=True):
    by: str
    reason: str
    since_ms: int


class Strikes:
    """Strikes queues, kinds and tools, and lifts that."""

    def __init__(self, client: Redis, scripts: Scripts, settings: Settings) -> None:
        self._client: Any = client
        self._scripts = scripts
        self._settings = settings

    async def strike(self, scope: Scope, name: str, *, by: str = "", reason: str = "") -> bool:
        """Stop a queue, a kind or a tool; False where it was stopped already, which then stands as it was.

        Raises `Invalid`, `UnknownQueue`, `StoreUnavailable`; after the last, try again.
        """
        if scope == "queue" and name not in self._settings.queues:
            raise UnknownQueue(f"queue: {name!r} is not one of {', '.join(self._settings.queues)}")
        try:
            fields = encode_json({"by": by, "reason": reason})[1:-1]
        except UNENCODABLE as error:
            raise Invalid(f"cannot be stored as JSON: {error}") from error
        return "struck" in await self._everywhere("set", scope, name, fields)

    async def lift(self, scope: Scope, name: str) -> bool:
        """Let it go on; False where it was not stopped. Held jobs follow with the next sweep.

        Raises `Invalid`, `StoreUnavailable`; after the last, try again.
        """
        return "lifted" in await self._everywhere("lift", scope, name, b"")

    async def all(self) -> list[Strike]:
        """Everything that is stopped, by scope and name."""
        with translated():
            found: dict[Any, Any] = await self._client.hgetall(f"{keys.prefix(0)}strikes")
        return [_strike(text(what), found[what]) for what in sorted(found, key=text)]

    async def _everywhere(self, act: str, scope: Scope, name: str, fields: bytes) -> set[str]:
        if scope not in get_args(Scope):
            raise Invalid("scope: queue, kind or tool")
        if not _NAME.fullmatch(name):
            raise Invalid(f"{scope}: 1 to 64 of letters, digits and ._-")
        said: set[str] = set()
        for partition in reversed(range(self._settings.partitions)):
            answer = await self._scripts.call(Scripts.STRIKE, partition, act, f"{scope}:{name}", fields)
            said.add(text(answer[0]))
        return said


def _strike(what: str, raw: bytes) -> Strike:
    scope, _, name = what.partition(":")
    stored = msgspec.json.decode(raw, type=_Stored)
    return msgspec.convert({"scope": scope, "name": name, **msgspec.structs.asdict(stored)}, Strike)
