"""Statistics for each kind and queue: totals that are read at once, and their history in coarse steps.

Rule 1: what one job adds is added together with how far its log is counted then: nothing counts twice.
Rule 2: history goes by when events happened, not by when they were counted: counting again gives the same.
Rule 3: jobs that are gone stay counted, but a rebuild counts only what is still kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from redis.asyncio import Redis

from streamjobs.config import Settings
from streamjobs.store import keys
from streamjobs.store.scripts import Scripts, text, translated

Step = Literal["5m", "1h"]
STEPS: Mapping[Step, tuple[str, int, int]] = {
    "5m": ("fine", 300_000, 86_400_000),
    "1h": ("coarse", 3_600_000, 14 * 86_400_000),
}
"""Name of a step -> its part of keys, how long it is, how long it is kept, in ms."""

BOUNDS_MS = (
    10, 50, 100, 250, 500, 1000, 2500, 5000, 10_000, 30_000, 60_000, 300_000, 900_000, 3_600_000, 14_400_000,
)  # fmt: skip
"""Upper bounds of the buckets that durations are counted in; one more is for what is longer."""

Totals = dict[tuple[str, str], Counter[str]]
"""(kind, queue) -> what is counted -> how much."""


class Counted(NamedTuple):
    """How far a job is counted: `position`, empty for not at all, in this `generation` of the statistics."""

    generation: int
    position: str
    kind: str
    queue: str


class Stats:
    """Adds to the statistics and reads them."""

    def __init__(self, client: Redis, scripts: Scripts, settings: Settings) -> None:
        self._client: Any = client
        self._scripts = scripts
        self._settings = settings

    async def counted(self, job_id: str) -> Counted | None:
        """How far a job is counted; None for one that is gone."""
        partition = keys.partition_of_job(job_id)
        with translated():
            async with self._client.pipeline(transaction=False) as pipe:
                pipe.hget(f"{keys.prefix(partition)}projections", "stats")
                pipe.hmget(keys.job_key(job_id), ("kind", "queue", "stats"))
                generation, head = await pipe.execute()
        if head[0] is None:
            return None
        return Counted(int(generation or 1), text(head[2] or b""), text(head[0]), text(head[1]))

    async def add(
        self, job_id: str, before: Counted, position: str, amounts: Mapping[tuple[int, str], int]
    ) -> bool:
        """Add (start of five minutes in ms or 0, what) -> how much; False where another was first.

        `position` is the new one, without its generation. A job that is gone adds nothing.
        """
        rows: list[str | int] = []
        for (slot, what), amount in amounts.items():
            rows += [slot, what, amount]
        answer = await self._scripts.call(
            Scripts.STATS, keys.partition_of_job(job_id), "fold", job_id, before.position,
            f"{before.generation} {position}", before.kind, before.queue, *rows,
        )  # fmt: skip
        return text(answer[0]) != "moved"

    async def totals(self) -> Totals:
        """Everything since the statistics began, and what stands now."""
        names = [
            f"{keys.prefix(partition)}totals:{generation}"
            for partition, generation in (await self._generations()).items()
        ]
        return _totals(await self._hashes(names))

    async def history(self, step: Step, since_ms: int = 0) -> list[tuple[int, Totals]]:
        """(start in ms, what was counted in that step), oldest first; steps without anything are left out."""
        now_ms = await self._now_ms()
        part, length, kept = STEPS[step]
        first = max(since_ms, now_ms - kept) // length * length
        starts = range(first, now_ms + 1, length)
        generations = await self._generations()
        names = [
            f"{keys.prefix(partition)}history:{generation}:{part}:{start}"
            for start in starts
            for partition, generation in generations.items()
        ]
        hashes = await self._hashes(names)
        width = len(generations)
        steps = [(start, _totals(hashes[i * width : (i + 1) * width])) for i, start in enumerate(starts)]
        return [(start, totals) for start, totals in steps if totals]

    async def reset(self, partition: int) -> None:
        """Begin a new generation: every job counts as not counted."""
        await self._scripts.call(Scripts.STATS, partition, "reset")

    async def _generations(self) -> dict[int, int]:
        partitions = range(self._settings.partitions)
        with translated():
            async with self._client.pipeline(transaction=False) as pipe:
                for partition in partitions:
                    pipe.hget(f"{keys.prefix(partition)}projections", "stats")
                found = await pipe.execute()
        return {partition: int(raw or 1) for partition, raw in zip(partitions, found, strict=True)}

    async def _hashes(self, names: list[str]) -> list[dict[bytes, bytes]]:
        with translated():
            async with self._client.pipeline(transaction=False) as pipe:
                for name in names:
                    pipe.hgetall(name)
                return await pipe.execute() if names else []

    async def _now_ms(self) -> int:
        with translated():
            seconds, microseconds = await self._client.time()
        return int(seconds) * 1000 + int(microseconds) // 1000


def _totals(hashes: Iterable[Mapping[bytes, bytes]]) -> Totals:
    totals: Totals = {}
    for fields in hashes:
        for field, amount in fields.items():
            kind, queue, what = text(field).split("|", 2)
            totals.setdefault((kind, queue), Counter())[what] += int(amount)
    return totals
