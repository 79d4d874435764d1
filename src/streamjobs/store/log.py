"""Reading one job's log: bounded pages behind a cursor that is checked, never trusted.

Rule 1: a page says whether its cursor is in the log; a reader whose cursor is not there starts over.
Rule 2: no read is unbounded; the whole log is read page by page.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Any, NamedTuple

from redis.asyncio import Redis

from streamjobs.cursor import START, Cursor
from streamjobs.errors import JobNotFound
from streamjobs.store import keys
from streamjobs.store.scripts import Scripts, text, translated

PAGE_EVENTS = 500
PAGE_BYTES = 256 * 1024


class Entry(NamedTuple):
    """One event as it is stored: `data` is one line of JSON."""

    cursor: Cursor
    type: str
    data: bytes


class Page(NamedTuple):
    """Events behind a cursor. `found`: the cursor is in the log; `last`: the log's end at that instant."""

    found: bool
    status: str
    last: Cursor
    entries: list[Entry]

    @property
    def is_up_to_date(self) -> bool:
        """Whether this page reaches the log's end (or its cursor is not in the log)."""
        return not self.entries or self.entries[-1].cursor == self.last


class Log:
    """Reads logs of jobs."""

    def __init__(self, client: Redis, scripts: Scripts) -> None:
        self._client: Any = client
        self._scripts = scripts

    async def page(
        self, job_id: str, after: Cursor = START, *, limit: int = PAGE_EVENTS, max_bytes: int = PAGE_BYTES
    ) -> Page:
        """Read what follows `after`: at most `limit` events (500 at most), about `max_bytes` of content.

        Raises `JobNotFound`.
        """
        limit = max(1, min(limit, PAGE_EVENTS))
        reply = await self._scripts.read(keys.job_key(job_id), str(after), limit, max_bytes)
        if not reply:
            raise JobNotFound("no such job")
        status, last, found, rows = reply
        return Page(bool(found), text(status), stored_cursor(last), [_entry(row) for row in rows])

    async def pages(self, job_id: str, after: Cursor = START) -> AsyncIterator[Page]:
        """Read from `after` to the end, page by page; the first page comes even when it is empty."""
        while True:
            page = await self.page(job_id, after)
            yield page
            if page.is_up_to_date:
                return
            after = page.entries[-1].cursor

    async def load(self, job_id: str, after: Cursor = START) -> list[Entry]:
        """Everything a worker replays from: the log without its deltas.

        Raises `JobNotFound`.
        """
        entries: list[Entry] = []
        async for page in self.pages(job_id, after):
            entries.extend(entry for entry in page.entries if not entry.type.endswith(".delta"))
        return entries

    async def tops(self, job_ids: Iterable[str]) -> dict[str, Cursor | None]:
        """Where each job's log ends, in one round trip; None for jobs that are gone."""
        ids = list(job_ids)
        with translated():
            async with self._client.pipeline(transaction=False) as pipe:
                for job_id in ids:
                    pipe.hget(keys.job_key(job_id), "last")
                lasts: list[Any] = await pipe.execute()
        return {
            job_id: stored_cursor(last) if last else None for job_id, last in zip(ids, lasts, strict=True)
        }


def stored_cursor(raw: bytes | str) -> Cursor:
    """A cursor as Redis has it, which needs no checking."""
    seq, _, epoch = text(raw).partition("-")
    return Cursor(int(seq), int(epoch))


def _entry(row: list[bytes]) -> Entry:
    return Entry(stored_cursor(row[0]), row[1].decode(), row[2])


def parse_live(payload: bytes) -> list[Entry]:
    """Read what a script published: a line `<id> <type> <json>` for each event."""
    entries: list[Entry] = []
    for line in payload.split(b"\n"):
        cursor, kind, data = line.split(b" ", 2)
        entries.append(Entry(stored_cursor(cursor), kind.decode(), data))
    return entries
