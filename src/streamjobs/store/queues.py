"""What waits and runs in each queue, over all partitions. Reads only."""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec
from redis.asyncio import Redis

from streamjobs.config import Settings
from streamjobs.store import keys
from streamjobs.store.scripts import text, translated

_CLASSES = ("resume", "high", "default", "low")


class QueueInfo(msgspec.Struct, frozen=True):
    """One queue. `oldest_wait` is the seconds since the oldest ticket in it came, 0 without any."""

    name: str
    waiting: int
    held: int
    running: int
    oldest_wait: float
    struck: bool


class Queues:
    """The declared queues, and those that still hold jobs."""

    def __init__(self, client: Redis, settings: Settings) -> None:
        self._client: Any = client
        self._settings = settings

    async def all(self) -> list[QueueInfo]:
        """Every queue: the declared ones in their order, then others by name."""
        partitions = [keys.prefix(partition) for partition in range(self._settings.partitions)]
        with translated():
            async with self._client.pipeline(transaction=False) as pipe:
                pipe.hkeys(f"{keys.prefix(0)}strikes")
                for prefix in partitions:
                    pipe.hgetall(f"{prefix}counts")
                struck_raw, *counts_raw = await pipe.execute()
        struck = {text(what) for what in struck_raw}
        counts: Counter[str] = Counter()
        for raw in counts_raw:
            counts.update({text(field): int(n) for field, n in raw.items()})
        found = {field.partition(":")[2] for field, n in counts.items() if ":" in field and n}
        names = [*self._settings.queues, *sorted(found - set(self._settings.queues))]
        waits = await self._oldest_waits(partitions, names)
        return [_info(name, counts, waits[name], f"queue:{name}" in struck) for name in names]

    async def _oldest_waits(self, partitions: list[str], names: list[str]) -> dict[str, float]:
        """A ticket's id is the instant at which it came, by Redis's clock."""
        streams = [
            (name, f"{prefix}work:{name}:{kind}")
            for name in names
            for prefix in partitions
            for kind in _CLASSES
        ]
        with translated():
            async with self._client.pipeline(transaction=False) as pipe:
                pipe.time()
                for _, stream in streams:
                    pipe.xrange(stream, count=1)
                now, *firsts = await pipe.execute()
        now_ms = int(now[0]) * 1000 + int(now[1]) // 1000
        waits: dict[str, float] = dict.fromkeys(names, 0.0)
        for (name, _), entries in zip(streams, firsts, strict=True):
            if entries:
                came_ms = int(text(entries[0][0]).partition("-")[0])
                waits[name] = max(waits[name], (now_ms - came_ms) / 1000)
        return waits


def _info(name: str, counts: Counter[str], oldest_wait: float, is_struck: bool) -> QueueInfo:
    waiting, held, running = (counts[f"{what}:{name}"] for what in ("waiting", "held", "running"))
    return QueueInfo(name, waiting, held, running, oldest_wait, is_struck)
