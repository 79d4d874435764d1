"""Snapshots of jobs, and the sealing of logs: what moves from the stream into segments.

Rule 1: one script seals, trims and keeps the snapshot, or does nothing of it; who comes second is told so.
Rule 2: a snapshot stands where the log is sealed: what follows it is in the stream.
Rule 3: a log of few events has no snapshot. Folding it costs less than keeping one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import structlog

from streamjobs import segments
from streamjobs.config import Settings
from streamjobs.cursor import START, Cursor
from streamjobs.encryption import Cipher
from streamjobs.errors import StreamjobsError
from streamjobs.job import Caps, Fold, UnknownState
from streamjobs.segments import DamagedSegment, Entry
from streamjobs.store import keys
from streamjobs.store.log import Log, Page, segment_place, snapshot_place, stored_cursor
from streamjobs.store.scripts import Scripts, flatten, text
from streamjobs.store.vault import Vault

log = structlog.get_logger(__name__)


class Sealed(NamedTuple):
    """Up to where a log is sealed, and at which event its stored snapshot stands; `START` for neither."""

    log: Cursor = START
    snap: Cursor = START


class Stored(NamedTuple):
    """A stored fold, or a new one; what follows it; and the size of the stored state, 0 without one."""

    fold: Fold
    page: Page
    sealed: Sealed
    weight: int


class Snapshots:
    """Reads and writes snapshots and segments."""

    def __init__(self, scripts: Scripts, log: Log, settings: Settings, vault: Vault | None = None) -> None:
        self._scripts = scripts
        self._vault = vault
        self._log = log
        self._min_events = settings.snapshot_min_events
        self.caps = Caps(
            text=settings.view_text,
            log_lines=settings.view_log_lines,
            steps=settings.view_steps,
            output=settings.view_output,
        )
        """How much a view shows: the same for all who fold."""

    async def load(self, job_id: str) -> Stored:
        """The stored fold and the page that follows it, in one round trip.

        Where there is none that this release can read, a new fold and the log's first page. Raises
        `JobNotFound`, `StoreUnavailable`, `DamagedSegment`.
        """
        page, sealed, snap, snapshot = await self._log.from_snapshot(job_id)
        where = Sealed(sealed, snap)
        if not snapshot:
            return Stored(Fold(job_id, self.caps), page, where, 0)
        try:
            state = segments.decompress(snapshot)
            return Stored(Fold.restore(state, self.caps), page, where, len(state))
        except (UnknownState, DamagedSegment) as error:
            log.warning("snapshot.unreadable", job_id=job_id, error=str(error))
            return Stored(Fold(job_id, self.caps), await self._log.page(job_id), where, 0)

    async def seal(self, job_id: str, known: Sealed, fold: Fold) -> tuple[Sealed, int] | None:
        """Seal a log up to where `fold` stands, and keep the fold where it is worth it.

        `known` is where the log was sealed when that was read. Answers where it is sealed now and the size of
        the state that was kept; None where another one was first or the job is gone: load it again.
        Raises `StoreUnavailable`, `JobNotFound`, or `StreamjobsError` for what cannot be right.
        """
        entries = await self._unsealed(job_id, known.log, fold.cursor)
        if not entries:
            return None
        state = fold.state() if known.snap != START or fold.cursor.seq > self._min_events else b""
        cipher = None if self._vault is None else await self._vault.ensure(job_id)
        rows = [_row(part, cipher) for part in segments.split(entries)]
        snapshot = segments.compress(state) if state else b""
        if snapshot and cipher is not None:
            snapshot = cipher.seal_blob(snapshot, snapshot_place(str(fold.cursor)))
        answer = await self._scripts.call(
            Scripts.SEAL, keys.partition_of_job(job_id), job_id, _said(known.log), _said(known.snap),
            snapshot, len(rows), *flatten(rows),
        )  # fmt: skip
        verdict = text(answer[0])
        if verdict in {"stale", "gone"}:
            return None
        if verdict == "bad":
            raise StreamjobsError(f"{job_id} cannot be sealed: {text(answer[1])}")
        return Sealed(*(stored_cursor(where or str(START)) for where in answer[1:])), len(state)

    async def _unsealed(self, job_id: str, after: Cursor, end: Cursor) -> list[Entry]:
        """What is behind `after` up to `end`; nothing where the log is another one."""
        entries: list[Entry] = []
        async for page in self._log.pages(job_id, after):
            entries += [entry for entry in page.entries if entry.cursor.seq <= end.seq]
            if entries and entries[-1].cursor.seq >= end.seq:
                break
        return entries if entries and entries[-1].cursor == end else []


def _row(part: Sequence[Entry], cipher: Cipher | None) -> tuple[str, bytes]:
    """A segment's line of the index, and the segment. It is compressed before it is encrypted."""
    line, blob = str(segments.describe(part)), segments.encode(part)
    return line, blob if cipher is None else cipher.seal_blob(blob, segment_place(line))


def _said(cursor: Cursor) -> str:
    return "" if cursor == START else str(cursor)
