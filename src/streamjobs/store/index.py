"""An owner's jobs, newest first, by what lists filter: kept by a projection, so a little behind the jobs.

Rule 1: a row is written from the job as it stands in that instant, again when a list comes by it.
Rule 2: a page looks at a bounded number of rows; where few of them fit it is short, and its cursor goes on.
Rule 3: rows leave with their jobs: at the latest when a list comes by them, or the sweep.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec
from redis.asyncio import Redis

from streamjobs.config import Settings
from streamjobs.errors import InvalidCursor
from streamjobs.store import keys
from streamjobs.store.scripts import Scripts, text, translated

_SCAN = 5000
"""Rows that one page looks at."""
_SWEEP = 500
_OWNERS = 100
_MAX_PAGE = 500

_CURSOR = re.compile(r"(\d{1,15})-(j\d{1,4}-[a-z2-7]{26})", re.ASCII)


class JobFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which jobs; what is empty does not matter. They were made from `since_ms` to before `until_ms`."""

    status: str = ""
    kind: str = ""
    queue: str = ""
    thread_id: str = ""
    message_id: str = ""
    since_ms: int = 0
    until_ms: int = 0


class ListedJob(msgspec.Struct, frozen=True, kw_only=True):
    """A job in a list."""

    id: str
    kind: str
    status: str
    owner: str
    queue: str
    thread_id: str
    message_id: str
    created_ms: int
    cursor: str
    cancel_requested: bool


class Index:
    """Keeps and reads the lists of jobs."""

    def __init__(self, client: Redis, scripts: Scripts, settings: Settings) -> None:
        self._client: Any = client
        self._scripts = scripts
        self._settings = settings

    async def page(
        self, owner: str, where: JobFilter | None = None, *, limit: int = 50, before: str = ""
    ) -> tuple[list[ListedJob], str]:
        """An owner's jobs, newest first, behind the cursor `before`; and the next cursor, empty at the end.

        A page may be shorter than `limit` (1 to 500) and not the last. Raises `InvalidCursor`.
        """
        chosen = where or JobFilter()
        created, job_id = _place(before) if before else ("", "")
        arguments = (owner, created, job_id, max(1, min(limit, _MAX_PAGE)), _SCAN, chosen.since_ms,
                     chosen.until_ms, chosen.status, chosen.kind, chosen.queue, chosen.thread_id,
                     chosen.message_id)  # fmt: skip
        cursor, rows = await self._call(self._partition(owner), "list", *arguments)
        return [_listed(owner, row) for row in rows], text(cursor)

    async def counts(self, owner: str) -> dict[str, int]:
        """How many of an owner's jobs are in each status that has any."""
        flat = await self._call(self._partition(owner), "counts", owner)
        return {text(flat[i]): int(flat[i + 1]) for i in range(0, len(flat), 2)}

    async def put(self, job_id: str, thread_id: str | None = None, message_id: str = "") -> bool:
        """Write a job's row as the job stands now; one that is gone needs none.

        Returns False where the job has no row yet: then its thread and message are needed.
        """
        texts = () if thread_id is None else (thread_id, message_id)
        answer = await self._call(keys.partition_of_job(job_id), "put", job_id, *texts)
        return text(answer[0]) != "unknown"

    async def forget(self, owner: str, *job_ids: str) -> None:
        """Take out jobs that are gone."""
        await self._call(self._partition(owner), "forget", owner, *job_ids)

    async def sweep(self, partition: int) -> tuple[int, int]:
        """Look at some rows, owner by owner; how many, and how many were left by jobs that are gone."""
        seen, dropped = await self._call(partition, "sweep", _SWEEP)
        return int(seen), int(dropped)

    async def reset(self, partition: int) -> None:
        """Empty the index; lists fill again as jobs are put."""
        with translated():
            rounds = 1 + await self._client.zcard(f"{keys.prefix(partition)}indexes") // _OWNERS
        for _ in range(rounds):
            await self._call(partition, "reset", _OWNERS)

    def _partition(self, owner: str) -> int:
        return keys.partition_of_owner(owner, self._settings.partitions)

    async def _call(self, partition: int, *arguments: str | bytes | int) -> Any:
        return await self._scripts.call(Scripts.INDEX, partition, *arguments)


def _listed(owner: str, row: list[Any]) -> ListedJob:
    job_id, status, kind, queue, thread, message, created, last = (text(value) for value in row[:8])
    return ListedJob(
        id=job_id,
        kind=kind,
        status=status,
        owner=owner,
        queue=queue,
        thread_id=thread,
        message_id=message,
        created_ms=int(created),
        cursor=last,
        cancel_requested=bool(row[8]),
    )


def _place(cursor: str) -> tuple[str, str]:
    match = _CURSOR.fullmatch(cursor)
    if match is None:
        raise InvalidCursor("a cursor of an owner's jobs is <created_ms>-<job id>")
    return match[1], match[2]
