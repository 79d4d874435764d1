"""The feed: notes that say which jobs have something new, and the groups of the projections that read them.

Rule 1: a note is a hint. It may come twice, late or out of order; what is new stands in the job's log.
Rule 2: what a consumer has read and not acknowledged it reads first: a failed batch, or a lost answer.
Rule 3: the feed keeps what some group has yet to read, but never more than its cap: a group that the cap has
overtaken is told to go over all jobs (feed.lua says how that is known).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, NamedTuple

import msgspec
from redis.asyncio import Redis

from streamjobs import metrics
from streamjobs.config import Settings
from streamjobs.errors import StoreFull
from streamjobs.events import clean_text
from streamjobs.store import keys
from streamjobs.store.scripts import Scripts, ms, text, translated

_MAX_QUARANTINED = 10_000
_MAX_ERROR = 500
_PAGE = 1000
_ERRORS = 20


class Notes(NamedTuple):
    """What one read gave: entries to acknowledge, and the newest seq that was noted of each job."""

    entries: list[str]
    jobs: dict[str, int]


class Quarantined(msgspec.Struct, frozen=True):
    """A job on which a projection failed: at which seq, when, and how."""

    job: str
    error: str
    seq: int
    ts: int


class GroupLag(NamedTuple):
    """How far one projection is behind on one partition. `seconds` is the age of the oldest note left."""

    name: str
    notes: int
    pending: int
    seconds: float
    consumers: int
    quarantined: int
    rebuild: str


class ProjectionInfo(msgspec.Struct, frozen=True):
    """One projection over all partitions; `errors` are some of its quarantined jobs."""

    name: str
    notes: int = 0
    pending: int = 0
    seconds: float = 0.0
    consumers: int = 0
    quarantined: int = 0
    rebuild: str = ""
    errors: list[Quarantined] = []


class Feed:
    """Reads the feeds of all partitions for projections, and keeps their groups."""

    def __init__(self, client: Redis, scripts: Scripts, settings: Settings) -> None:
        self._client: Any = client
        self._scripts = scripts
        self._settings = settings

    # --- reading

    async def read(self, partition: int, name: str, consumer: str, most: int) -> Notes:
        """What a projection's consumer is to look at next: `most` entries at most, none if none is left."""
        entries: list[str] = []
        jobs: dict[str, int] = {}
        for raw_id, lines in await self._call("read", partition, name, consumer, most):
            entries.append(text(raw_id))
            for line in text(lines).split("\n") if lines else ():
                job_id, seq, _ = line.split(" ", 2)
                jobs[job_id] = max(int(seq), jobs.get(job_id, 0))
        return Notes(entries, jobs)

    async def ack(self, partition: int, name: str, entries: Sequence[str], done: Iterable[str]) -> None:
        """Be done with entries; jobs that were advanced leave the quarantine."""
        await self._call("ack", partition, name, len(entries), *entries, *done)

    async def wait(self, client: Any, after: dict[int, str], block: float) -> dict[int, str]:
        """Block until a feed has more than `after`; returns where each that has now ends."""
        streams = {_feed(partition): last for partition, last in after.items()}
        with translated():
            found: Any = await client.xread(streams, count=1, block=ms(block))
        names = {text(row[0]) for row in found or ()}
        ends = [(partition, await self.end(partition)) for partition in after if _feed(partition) in names]
        return dict(ends)

    async def end(self, partition: int) -> str:
        """The id of a feed's last entry."""
        with translated():
            last: list[Any] = await self._client.xrevrange(_feed(partition), count=1)
        return text(last[0][0]) if last else "0-0"

    # --- keeping

    async def claim(
        self, partition: int, name: str, consumer: str, idle: float, cursor: str
    ) -> tuple[str, int]:
        """Take over what others have left for `idle` seconds; the next cursor, and how many.

        The next reads give them.
        """
        position, count = await self._call("claim", partition, name, consumer, ms(idle), cursor)
        return text(position), int(count)

    async def reap(self, partition: int, name: str, consumer: str, idle: float) -> list[str]:
        """Remove other consumers that have nothing and were silent for `idle` seconds."""
        return [text(one) for one in await self._call("reap", partition, name, consumer, max(1, ms(idle)))]

    async def leave(self, partition: int, name: str, consumer: str) -> None:
        """Remove a consumer that ends, unless it leaves something behind for others to claim."""
        await self._call("reap", partition, name, consumer, 0)

    async def trim(self, partition: int) -> int:
        """Let go of what every group is done with."""
        return int((await self._call("trim", partition, ""))[0])

    async def lag(self, partition: int) -> list[GroupLag]:
        """How far each group is."""
        return [
            GroupLag(text(name), notes, pending, max(0, oldest) / 1000, consumers, quarantined, text(rebuild))
            for name, notes, pending, oldest, consumers, quarantined, rebuild in await self._call(
                "lag", partition, ""
            )
        ]

    async def report(self) -> None:
        """Set the metrics that say how far projections are."""
        for info in (await self._infos()).values():
            metrics.PROJECTION_LAG.labels(info.name).set(info.notes)
            metrics.PROJECTION_LAG_SECONDS.labels(info.name).set(info.seconds)
            metrics.PROJECTION_QUARANTINE.labels(info.name).set(info.quarantined)

    async def all(self) -> list[ProjectionInfo]:
        """Every projection that is configured or has ever run, over all partitions."""
        return [await self._with_errors(one) for one in (await self._infos()).values()]

    async def _infos(self) -> dict[str, ProjectionInfo]:
        found = {name: ProjectionInfo(name) for name in self._settings.projections}
        for partition in range(self._settings.partitions):
            for lag in await self.lag(partition):
                found[lag.name] = _added(found.get(lag.name, ProjectionInfo(lag.name)), lag)
        return found

    async def _with_errors(self, info: ProjectionInfo) -> ProjectionInfo:
        if not info.quarantined:
            return info
        errors: list[Quarantined] = []
        for partition in range(self._settings.partitions):
            errors += await self.quarantined(partition, info.name, _ERRORS - len(errors))
        return msgspec.structs.replace(info, errors=errors)

    # --- quarantine

    async def quarantine(self, partition: int, name: str, failed: Quarantined) -> None:
        """Set a job aside. Raises `StoreFull` where so many are that the projection itself must be broken."""
        known = msgspec.json.encode(
            {"error": clean_text(failed.error)[:_MAX_ERROR], "seq": failed.seq, "ts": failed.ts}
        )
        answer = await self._call("quarantine", partition, name, failed.job, known, _MAX_QUARANTINED)
        if text(answer[0]) == "full":
            raise StoreFull(f"projection {name}: {_MAX_QUARANTINED} jobs are in quarantine")

    async def quarantined(self, partition: int, name: str, most: int = _MAX_QUARANTINED) -> list[Quarantined]:
        """Jobs that are set aside, some of them where there are more."""
        found: list[Quarantined] = []
        with translated():
            async for job, known in self._client.hscan_iter(
                f"{keys.prefix(partition)}quarantine:{name}", count=100
            ):
                if len(found) >= most:
                    break
                found.append(Quarantined(text(job), **msgspec.json.decode(known)))
        return found

    async def retry(self, name: str) -> list[str]:
        """Note all jobs that are set aside once more, and return them."""
        jobs: list[str] = []
        for partition in range(self._settings.partitions):
            jobs += [text(job) for job in await self._call("retry", partition, name)]
        return jobs

    async def retry_jobs(self, partition: int, name: str, jobs: Sequence[str]) -> None:
        """The same for some of a partition's."""
        if jobs:
            await self._call("retry", partition, name, *jobs)

    # --- rebuild

    async def ask_rebuild(self, name: str) -> None:
        """Have a projection made anew from the logs, by whichever projector comes first."""
        for partition in range(self._settings.partitions):
            await self._call("ask", partition, name)

    async def begin_rebuild(self, partition: int, name: str, consumer: str, hold: float) -> str:
        """Take a rebuild that is asked for, for `hold` seconds; the request, empty without one."""
        answer = await self._call("begin", partition, name, consumer, ms(hold))
        return text(answer[0]) if answer else ""

    async def hold_rebuild(self, partition: int, name: str, consumer: str, hold: float) -> bool:
        """Keep it; False where another has it now."""
        return bool((await self._call("hold", partition, name, consumer, ms(hold)))[0])

    async def finish_rebuild(self, partition: int, name: str, consumer: str, request: str) -> None:
        """Be done with a request."""
        await self._call("finish", partition, name, consumer, request)

    async def jobs(self, partition: int) -> AsyncIterator[list[str]]:
        """All jobs that are there throughout, page by page, some perhaps twice."""
        cursor, pattern = 0, f"{keys.prefix(partition)}job:*"
        while True:
            with translated():
                cursor, names = await self._client.scan(cursor, match=pattern, count=_PAGE)
            heads = [name for name in map(text, names) if keys.HEAD.pattern.fullmatch(name)]
            yield [name.rpartition(":")[2] for name in heads]
            if not int(cursor):
                return

    async def _call(self, what: str, partition: int, name: str, *arguments: str | bytes | int) -> Any:
        return await self._scripts.call(Scripts.FEED, partition, what, name, *arguments)


def _feed(partition: int) -> str:
    return f"{keys.prefix(partition)}feed"


def _added(info: ProjectionInfo, lag: GroupLag) -> ProjectionInfo:
    return ProjectionInfo(
        info.name,
        info.notes + lag.notes,
        info.pending + lag.pending,
        max(info.seconds, lag.seconds),
        max(info.consumers, lag.consumers),
        info.quarantined + lag.quarantined,
        info.rebuild or lag.rebuild.partition(" ")[0],
    )
