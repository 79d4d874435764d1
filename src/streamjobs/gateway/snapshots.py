"""Views of jobs, folded once for all who ask at the same time.

Rule 1: a fold is kept for `RETAIN` seconds after its last use, so that a crowd costs one fold and then
only what is new; `forget` frees it at once.
Rule 2: a job that nobody here has folded is taken up from its stored snapshot: the cost is its state's, not
its log's.
Rule 3: a reader that must see its own writes says how far it has seen; an older view is not given to it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import NamedTuple

from streamjobs.cursor import START, Cursor
from streamjobs.errors import Invalid
from streamjobs.events import encode_json
from streamjobs.gateway.coding import Shared
from streamjobs.gateway.sse import snapshot_frame
from streamjobs.job import Fold
from streamjobs.store import Page, Store

RETAIN = 5.0
KEEP = 256
"""Folds that are kept at most."""


class Snapshot(NamedTuple):
    """A job's view as JSON, the event it stands at, and both as a frame for all streams that begin there."""

    cursor: Cursor
    view: bytes
    frame: Shared


class _Kept(NamedTuple):
    fold: Fold
    snapshot: Snapshot
    used: float


class Snapshots:
    """Folds logs, one at a time for each job."""

    def __init__(self, store: Store) -> None:
        self._log = store.log
        self._stored = store.snapshots
        self._kept: dict[str, _Kept] = {}
        self._folding: dict[str, asyncio.Task[Snapshot]] = {}

    @property
    def held(self) -> int:
        """How many folds are kept or under way."""
        return len(self._kept) + len(self._folding)

    @property
    def folding(self) -> Iterable[asyncio.Task[Snapshot]]:
        """Folds under way."""
        return self._folding.values()

    async def latest(self, job_id: str, at_least: Cursor = START) -> Snapshot:
        """The view of a job as it stands now, and in any case not before `at_least`.

        Raises `JobNotFound`, `StoreUnavailable`, or `InvalidTransition` for a damaged log.
        """
        snapshot = await self._shared(job_id)
        return snapshot if snapshot.cursor.seq >= at_least.seq else await self._shared(job_id)

    async def at(self, job_id: str, seq: int) -> Snapshot:
        """The view of a job as it stood at event `seq`. Raises `Invalid` beyond the log's end."""
        fold, page, *_ = await self._stored.load(job_id)
        if fold.cursor.seq > seq:  # the snapshot is a later one
            fold, page = Fold(job_id, self._stored.caps), await self._log.page(job_id)
        while True:
            fold.apply_all(entry for entry in page.entries if entry.cursor.seq <= seq)
            if fold.cursor.seq == seq:
                return snapshot_of(fold)
            if page.is_up_to_date:
                raise Invalid(f"at: the log ends at {fold.cursor.seq}")
            page = await self._log.page(job_id, fold.cursor)

    def forget(self, job_id: str) -> None:
        """Free what is kept of a job."""
        self._kept.pop(job_id, None)

    def sweep(self) -> None:
        """Free what has not been used for a while."""
        oldest = time.monotonic() - RETAIN
        for job_id in [job_id for job_id, kept in self._kept.items() if kept.used < oldest]:
            del self._kept[job_id]

    async def _shared(self, job_id: str) -> Snapshot:
        task = self._folding.get(job_id)
        if task is None:
            task = self._folding[job_id] = asyncio.create_task(self._fold(job_id), name="fold")
            task.add_done_callback(_retrieve)
        return await asyncio.shield(task)

    async def _fold(self, job_id: str) -> Snapshot:
        try:
            kept = self._kept.pop(job_id, None)
            known = kept.snapshot.cursor if kept else None
            fold = await self._up_to_date(job_id, kept.fold if kept else None)
            snapshot = kept.snapshot if kept and fold.cursor == known else snapshot_of(fold)
            self._keep(job_id, _Kept(fold, snapshot, time.monotonic()))
            return snapshot
        finally:
            del self._folding[job_id]

    async def _up_to_date(self, job_id: str, kept: Fold | None) -> Fold:
        """A fold that stands at the log's end; one whose position is not in the log is not gone on with."""
        fold, page = await self._start(job_id, kept)
        while page.found:
            fold.apply_all(page.entries)
            if page.is_up_to_date:
                return fold
            page = await self._log.page(job_id, fold.cursor)
        return await self._up_to_date(job_id, None)

    async def _start(self, job_id: str, kept: Fold | None) -> tuple[Fold, Page]:
        if kept is not None:
            return kept, await self._log.page(job_id, kept.cursor)
        stored = await self._stored.load(job_id)
        return stored.fold, stored.page

    def _keep(self, job_id: str, kept: _Kept) -> None:
        if len(self._kept) >= KEEP:
            del self._kept[next(iter(self._kept))]
        self._kept[job_id] = kept


def snapshot_of(fold: Fold) -> Snapshot:
    """What a fold shows now."""
    view = encode_json(fold.view())
    return Snapshot(fold.cursor, view, Shared(snapshot_frame(fold.cursor, view)))


def _retrieve(task: asyncio.Task[Snapshot]) -> None:
    """So that a fold that failed after its last reader left is no warning."""
    if not task.cancelled():
        task.exception()
