"""An owner's newest jobs, as far back as the owner's feed goes: a stop-gap until a projection indexes jobs.

Rule: a cursor is a position in the feed, `<entry id>.<lines>`: what follows stands before that line.
"""

from __future__ import annotations

import re
from typing import Any

from redis.asyncio import Redis

from streamjobs.config import Settings
from streamjobs.errors import InvalidCursor
from streamjobs.store import keys
from streamjobs.store.scripts import text, translated

_CHUNK = 200
_SCAN = 4000
"""How many entries of the feed one call reads; where few submissions are among them, the page is short."""

_CURSOR = re.compile(r"(\d{1,15}-\d{1,10})\.(\d{1,6})", re.ASCII)


class Recent:
    """Reads the ids of an owner's jobs out of the owner's feed, newest first."""

    def __init__(self, client: Redis, settings: Settings) -> None:
        self._client: Any = client
        self._partitions = settings.partitions

    async def page(self, owner: str, limit: int, before: str) -> tuple[list[str], str]:
        """Up to `limit` job ids behind a cursor, and the next cursor, empty after the last.

        Raises `InvalidCursor`.
        """
        partition = keys.partition_of_owner(owner, self._partitions)
        feed = f"{keys.prefix(partition)}owner:{owner}:events"
        newest, lines_left = _position(before) if before else ("+", None)
        found: dict[str, None] = {}
        for _ in range(_SCAN // _CHUNK):
            with translated():
                entries: list[Any] = await self._client.xrevrange(feed, max=newest, count=_CHUNK)
            for raw_id, fields in entries:
                entry_id, lines = text(raw_id), text(fields[b"e"]).split("\n")
                if lines_left is not None and entry_id == newest:
                    lines = lines[:lines_left]
                for at in range(len(lines) - 1, -1, -1):
                    job_id, _, kind = lines[at].split(" ", 3)[:3]
                    if kind == "job.queued":
                        found[job_id] = None
                    if len(found) == limit:
                        return list(found), f"{entry_id}.{at}"
            if len(entries) < _CHUNK:
                return list(found), ""
            newest, lines_left = text(entries[-1][0]), 0
        return list(found), f"{newest}.0"


def _position(cursor: str) -> tuple[str, int]:
    match = _CURSOR.fullmatch(cursor)
    if match is None:
        raise InvalidCursor("a cursor of an owner's jobs is <entry id>.<lines>")
    return match[1], int(match[2])
