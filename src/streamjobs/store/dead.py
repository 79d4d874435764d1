"""The dead list: failed jobs that nobody has run again, newest first, with what is known of each.

Rule 1: the list names jobs, what is said of them is theirs; one that is gone is left out.
Rule 2: a cursor is a position in the order, not in a list: jobs that fail meanwhile move nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import msgspec
from redis.asyncio import Redis

from streamjobs.config import Settings
from streamjobs.errors import Invalid, InvalidCursor, JobNotFound, Shredded
from streamjobs.events import JobFailed, decode_event
from streamjobs.store import keys
from streamjobs.store.log import Log
from streamjobs.store.scripts import text, translated
from streamjobs.store.vault import Vault

_CHUNK = 200
_SCAN = 5000
"""How many jobs one page looks at; one that finds few among them is short, and its cursor goes on."""

_CURSOR = re.compile(r"(\d{1,15})-(j\d{1,4}-[a-z2-7]{26})", re.ASCII)
_FIELDS = ("status", "owner", "kind", "queue", "error", "attempt", "crashes", "worker", "ended", "rerun")

Place = tuple[int, str]
"""When a job ended, and its id: the order of the list."""


class DeadJob(msgspec.Struct, frozen=True, kw_only=True):
    """A failed job: why, after how many attempts and crashes, and who ran it last."""

    id: str
    owner: str
    kind: str
    queue: str
    code: str
    message: str
    attempts: int
    crashes: int
    worker: str
    ended_ms: int
    rerun_as: str


class DeadFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which failed jobs; what is empty does not matter. They ended from `since_ms` to before `until_ms`."""

    owner: str = ""
    kind: str = ""
    queue: str = ""
    code: str = ""
    since_ms: int = 0
    until_ms: int = 0


class Dead:
    """Reads the dead lists of all partitions as one."""

    def __init__(self, client: Redis, log: Log, settings: Settings, vault: Vault | None = None) -> None:
        self._client: Any = client
        self._log = log
        self._vault = vault
        self._settings = settings

    async def page(
        self, where: DeadFilter, *, limit: int = 100, before: str = ""
    ) -> tuple[list[DeadJob], str]:
        """Failed jobs, newest first, behind the cursor `before`; and the next cursor, empty after the last.

        A page may be shorter than `limit` (1 to 1000) and not the last. Raises `InvalidCursor`,
        `StoreUnavailable`.
        """
        limit = max(1, min(limit, 1000))
        place = _place(before) if before else None
        found: list[DeadJob] = []
        for _ in range(_SCAN // _CHUNK):
            places = await self._places(where, place)
            found += await self._jobs(where, places)
            if len(found) > limit or (len(found) == limit and len(places) == _CHUNK):
                return found[:limit], f"{found[limit - 1].ended_ms}-{found[limit - 1].id}"
            if len(places) < _CHUNK:
                return found, ""
            place = places[-1]
        return found, f"{place[0]}-{place[1]}" if place else ""

    async def _places(self, where: DeadFilter, place: Place | None) -> list[Place]:
        """The next places of all partitions in their common order, `_CHUNK` of them at most."""
        partitions: Iterable[int] = range(self._settings.partitions)
        if where.owner:
            partitions = [keys.partition_of_owner(where.owner, self._settings.partitions)]
        places: list[Place] = []
        for partition in partitions:
            places += await self._places_in(partition, where, place)
        return sorted(places, reverse=True)[:_CHUNK]

    async def _places_in(self, partition: int, where: DeadFilter, place: Place | None) -> list[Place]:
        newest = "+inf" if place is None else str(place[0])
        if where.until_ms and (place is None or where.until_ms <= place[0]):
            newest = f"({where.until_ms}"
        found: list[Place] = []
        offset = 0
        while len(found) < _CHUNK:
            with translated():
                rows: list[Any] = await self._client.zrevrangebyscore(
                    f"{keys.prefix(partition)}dead", newest, where.since_ms, offset, _CHUNK, withscores=True
                )
            offset += len(rows)
            places = [(int(ended), text(job_id)) for job_id, ended in rows]
            found += [one for one in places if place is None or one < place]
            if len(rows) < _CHUNK:
                break
        return found[:_CHUNK]

    async def _jobs(self, where: DeadFilter, places: list[Place]) -> list[DeadJob]:
        heads = await self._heads(places)
        wanted = [
            (job_id, head) for (_, job_id), head in zip(places, heads, strict=True) if _fits(where, head)
        ]
        messages = await self._messages([job_id for job_id, _ in wanted])
        return [_dead_job(job_id, head, messages[job_id]) for job_id, head in wanted]

    async def _heads(self, places: list[Place]) -> list[dict[str, str]]:
        with translated():
            async with self._client.pipeline(transaction=False) as pipe:
                for _, job_id in places:
                    pipe.hmget(keys.job_key(job_id), _FIELDS)
                rows: list[list[Any]] = await pipe.execute() if places else []
        return [{name: text(raw or b"") for name, raw in zip(_FIELDS, row, strict=True)} for row in rows]

    async def _messages(self, job_ids: list[str]) -> dict[str, str]:
        """What the last event of each log says to people."""
        with translated():
            async with self._client.pipeline(transaction=False) as pipe:
                for job_id in job_ids:
                    pipe.xrevrange(f"{keys.job_key(job_id)}:events", count=1)
                logs: list[list[Any]] = await pipe.execute() if job_ids else []
        return {
            job_id: await self._unsealed(job_id, log[0][1]) if log else await self._sealed(job_id)
            for job_id, log in zip(job_ids, logs, strict=True)
        }

    async def _unsealed(self, job_id: str, entry: dict[bytes, bytes]) -> str:
        """The same of a log in its stream; empty where it is shredded."""
        kind, content = text(entry[b"t"]), entry[b"d"]
        if self._vault is not None:
            try:
                content = await self._vault.decrypted(job_id, kind, content)
            except Shredded:
                return ""
        return _message(kind, content)

    async def _sealed(self, job_id: str) -> str:
        """The same of a log that has left its stream, or of a job that is gone."""
        try:
            last = await self._log.last(job_id)
        except JobNotFound:
            return ""
        return _message(last.type, last.data)


def _fits(where: DeadFilter, head: dict[str, str]) -> bool:
    if head["status"] != "failed":  # gone, or this is another history
        return False
    pairs = ((where.owner, "owner"), (where.kind, "kind"), (where.queue, "queue"), (where.code, "error"))
    return all(not wanted or head[name] == wanted for wanted, name in pairs)


def _dead_job(job_id: str, head: dict[str, str], message: str) -> DeadJob:
    return DeadJob(
        id=job_id,
        owner=head["owner"],
        kind=head["kind"],
        queue=head["queue"],
        code=head["error"],
        message=message,
        attempts=int(head["attempt"] or 0),
        crashes=int(head["crashes"] or 0),
        worker=head["worker"],
        ended_ms=int(head["ended"] or 0),
        rerun_as=head["rerun"],
    )


def _message(kind: str, data: bytes) -> str:
    try:
        event = decode_event(kind, data)
    except Invalid:
        return ""
    return event.error.message if isinstance(event, JobFailed) else ""


def _place(cursor: str) -> Place:
    match = _CURSOR.fullmatch(cursor)
    if match is None:
        raise InvalidCursor("a cursor of the dead list is <ended_ms>-<job id>")
    return int(match[1]), match[2]
