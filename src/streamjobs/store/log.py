"""Reading one job's log: bounded pages behind a cursor that is checked, never trusted.

Rule 1: a page says whether its cursor is in the log; a reader whose cursor is not there starts over.
Rule 2: no read is unbounded; the whole log is read page by page.
Rule 3: what is sealed and what is in the stream read as one log; a cursor inside a segment is checked there.
Rule 4: what is encrypted is decrypted here, with the data key that the same answer brought.
Rule 5: segments that were read last are kept decoded, `KEPT_BYTES` in all: many who replay one job cost one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Any, NamedTuple

from redis.asyncio import Redis

from streamjobs import segments
from streamjobs.cursor import START, Cursor
from streamjobs.encryption import Cipher
from streamjobs.errors import JobNotFound
from streamjobs.segments import DamagedSegment, Entry
from streamjobs.store import keys
from streamjobs.store.scripts import Scripts, text, translated
from streamjobs.store.vault import SHREDDED, Vault

PAGE_EVENTS = 500
PAGE_BYTES = 256 * 1024
KEPT_BYTES = 2 * 1024 * 1024
START_TEXT = str(START)
_RECORD = 9
"""The place of a data key's record in what the read script answers."""
_ENTRY_BYTES = 250
"""What an entry takes in this process beside its content."""


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


class Reading(NamedTuple):
    """A page, up to where the log is sealed, where its snapshot stands, and that if it was asked for."""

    page: Page
    sealed: Cursor
    snap: Cursor
    snapshot: bytes


class Log:
    """Reads logs of jobs."""

    def __init__(self, client: Redis, scripts: Scripts, vault: Vault | None = None) -> None:
        self._client: Any = client
        self._scripts = scripts
        self._vault = vault
        self._decoded = _Decoded()

    async def page(
        self, job_id: str, after: Cursor = START, *, limit: int = PAGE_EVENTS, max_bytes: int = PAGE_BYTES
    ) -> Page:
        """Read what follows `after`: at most `limit` events (500 at most), about `max_bytes` of content.

        Raises `JobNotFound`; where jobs are encrypted also `Shredded`, `EncryptionKeyMissing` and
        `DamagedCiphertext`, as all that read here.
        """
        limit = max(1, min(limit, PAGE_EVENTS))
        held = self._decoded.holding(job_id, after)
        reply = await self._read(job_id, str(after), limit, max_bytes, held.line)
        status, last, found, rows, line, blob, *_ = reply
        if line:
            # what is held may have left the kept ones while the script was asked
            entries = self._segment(job_id, text(line), blob, reply) if blob else held.entries
            first = after.seq + 1 - entries[0].cursor.seq
            found = found == 1 or entries[first - 1].cursor == after
            entries = _bounded(entries[first:], limit, max_bytes) if found else []
        else:
            entries = self._entries(job_id, rows, reply)
        return Page(bool(found), text(status), stored_cursor(last), entries)

    async def from_snapshot(self, job_id: str) -> Reading:
        """Read the stored snapshot and what follows it; from the first event where there is none.

        Raises `JobNotFound`.
        """
        reply = await self._read(job_id, "snap", PAGE_EVENTS, PAGE_BYTES)
        status, last, _, rows, line, blob, sealed, snap, snapshot, *_ = reply
        if line:
            entries = _bounded(self._segment(job_id, text(line), blob, reply), PAGE_EVENTS, PAGE_BYTES)
        else:
            entries = self._entries(job_id, rows, reply)
        if snapshot:
            snapshot = _opened(self._cipher(job_id, reply), snapshot, snapshot_place(text(snap)))
        page = Page(True, text(status), stored_cursor(last), entries)
        return Reading(page, stored_cursor(sealed or START_TEXT), stored_cursor(snap or START_TEXT), snapshot)

    async def last(self, job_id: str) -> Entry:
        """The log's last event. Raises `JobNotFound`."""
        reply = await self._read(job_id, "last", 1, 0)
        _, last, _, rows, line, blob, *_ = reply
        if line:
            entries = self._segment(job_id, text(line), blob, reply)
        else:
            entries = self._entries(job_id, rows, reply)
        if not entries or entries[-1].cursor != stored_cursor(last):
            raise DamagedSegment(f"the log does not end at {text(last)}")
        return entries[-1]

    async def _read(self, job_id: str, *arguments: str | int) -> list[Any]:
        if self._vault is not None:
            arguments = (*arguments, *("",) * (4 - len(arguments)), 1)
        reply: list[Any] = await self._scripts.read(keys.job_key(job_id), *arguments)
        if not reply:
            raise JobNotFound("no such job")
        if self._vault is not None and text(reply[_RECORD]) == SHREDDED:
            self._decoded.forget(job_id)
        self._cipher(job_id, reply)
        return reply

    def _cipher(self, job_id: str, reply: list[Any]) -> Cipher | None:
        """What the job's data key, as the reply brought it, opens with; None where it has none."""
        return None if self._vault is None else self._vault.cipher(job_id, reply[_RECORD])

    def _entries(self, job_id: str, rows: list[list[bytes]], reply: list[Any]) -> list[Entry]:
        entries = [_entry(row) for row in rows]
        return entries if self._vault is None else self._vault.decrypt(self._cipher(job_id, reply), entries)

    def _segment(self, job_id: str, line: str, blob: bytes, reply: list[Any]) -> list[Entry]:
        return self._decoded.entries(job_id, line, blob, self._cipher(job_id, reply))

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


class _Held(NamedTuple):
    """A segment that was kept: its line of the index, its entries."""

    line: str
    entries: list[Entry]


class _Decoded:
    """The segments that were read last, by job and index line. They never change, so none is ever stale."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], list[Entry]] = {}
        self._bytes = 0

    def holding(self, job_id: str, after: Cursor) -> _Held:
        """The segment kept here that holds `after` and more; an empty one where there is none."""
        for (job, line), entries in self._kept.items():
            at = after.seq - entries[0].cursor.seq
            if job == job_id and 0 <= at < len(entries) - 1 and entries[at].cursor == after:
                self._kept[job, line] = self._kept.pop((job, line))
                return _Held(line, entries)
        return _Held("", [])

    def forget(self, job_id: str) -> None:
        """Let go of a job's, which nobody may read any more."""
        for job, line in list(self._kept):
            if job == job_id:
                self._bytes -= _cost(self._kept.pop((job, line)))

    def entries(self, job_id: str, line: str, blob: bytes, cipher: Cipher | None) -> list[Entry]:
        """The entries of a segment, which must be what the index says."""
        kept = self._kept.pop((job_id, line), None)
        if kept is None:
            kept = segments.decode(_opened(cipher, blob, segment_place(line)))
            if not kept or str(segments.describe(kept)) != line:
                raise DamagedSegment(f"a segment of {job_id} is not what its index says: {line}")
            self._bytes += _cost(kept)
        self._kept[job_id, line] = kept
        while self._bytes > KEPT_BYTES and len(self._kept) > 1:
            self._bytes -= _cost(self._kept.pop(next(iter(self._kept))))
        return kept


def _opened(cipher: Cipher | None, blob: bytes, place: bytes) -> bytes:
    return blob if cipher is None else cipher.open_blob(blob, place)


def segment_place(line: str) -> bytes:
    """Where a segment opens: its own line of the index, which says what it holds."""
    return b"segment\0" + line.encode()


def snapshot_place(cursor: str) -> bytes:
    """Where a snapshot opens: the event at which it stands."""
    return b"snapshot\0" + cursor.encode()


def _cost(entries: list[Entry]) -> int:
    return sum(len(entry.data) + _ENTRY_BYTES for entry in entries)


def _bounded(entries: list[Entry], limit: int, max_bytes: int) -> list[Entry]:
    """The first entries, at least one: as many as fit."""
    size = 0
    for at, entry in enumerate(entries[:limit]):
        size += len(entry.data)
        if at and size > max_bytes:
            return entries[:at]
    return entries[:limit]


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
