"""Seals logs: old events go into segments, and a snapshot says what they come to.

Rule 1: a job is folded from where this process stands, else from the stored snapshot; never twice from the
beginning while it lives.
Rule 2: a live job is sealed when its stream has grown by enough, and by a quarter of its snapshot: each
snapshot is paid for by new events, so all the work together is linear in the log.
Rule 3: a job that has ended is sealed whole. A projector that is behind seals full segments.
Rule 4: any number of processes may work on one job. The script lets one through; who was second loads again.
"""

from __future__ import annotations

from collections.abc import Iterable

from streamjobs.errors import JobNotFound, StoreUnavailable
from streamjobs.faults import fault
from streamjobs.segments import SEGMENT_BYTES, SEGMENT_EVENTS, Entry
from streamjobs.store import Page, Store, Stored

KEPT_BYTES = 64 * 1024 * 1024
"""What the folds that are kept between calls may hold, about; the one used longest ago leaves first."""

_FOLD_BYTES = 8 * 1024
_TRIES = 20


class _Work:
    """A job as far as this process has folded it."""

    def __init__(self, stored: Stored) -> None:
        self.fold = stored.fold
        self.sealed = stored.sealed
        self.weight = stored.weight
        self.bytes = 0
        """Of the events that are folded and not sealed."""
        self.size = _FOLD_BYTES + stored.weight

    @property
    def events(self) -> int:
        """How many events are folded and not sealed."""
        return self.fold.cursor.seq - self.sealed.log.seq

    def take(self, entries: Iterable[Entry]) -> None:
        """Fold what follows."""
        for entry in entries:
            self.size += len(entry.data)
            if entry.cursor.seq > self.sealed.log.seq:
                self.bytes += len(entry.data)
        self.fold.apply_all(entries)


class SnapshotProjection:
    """Seals the logs of jobs, each when it is worth it."""

    name = "snapshot"

    def __init__(self, store: Store) -> None:
        self._store = store
        self._events = store.settings.seal_events
        self._bytes = store.settings.seal_bytes
        self._kept: dict[str, _Work] = {}
        self._size = 0

    @property
    def kept(self) -> int:
        """How many folds are kept."""
        return len(self._kept)

    async def advance(self, job_id: str) -> None:
        """Fold what is new of a job, and seal what is due; a job that is gone is forgotten.

        Raises `StoreUnavailable`, and `InvalidTransition`, `Invalid` or `DamagedSegment` for a damaged log.
        """
        for _ in range(_TRIES):
            try:
                if await self._advance(job_id):
                    return
            except JobNotFound:
                return
        raise StoreUnavailable(f"others seal {job_id} all the time")

    async def _advance(self, job_id: str) -> bool:
        """Whether it went to the log's end; not so where another process was first, or the log is another."""
        work, page = await self._start(job_id)
        while page.found:
            work.take(page.entries)
            if self._is_due(work, page) and not await self._seal(job_id, work):
                return False
            if page.is_up_to_date:
                self._keep(job_id, work)
                return True
            page = await self._store.log.page(job_id, work.fold.cursor)
        return False

    async def _start(self, job_id: str) -> tuple[_Work, Page]:
        kept = self._kept.pop(job_id, None)
        if kept is None:
            stored = await self._store.snapshots.load(job_id)
            return _Work(stored), stored.page
        self._size -= kept.size
        return kept, await self._store.log.page(job_id, kept.fold.cursor)

    def _is_due(self, work: _Work, page: Page) -> bool:
        if work.fold.status.is_terminal:
            return work.events > 0
        if not page.is_up_to_date:  # there is more: a full segment at a time
            return work.events >= SEGMENT_EVENTS or work.bytes >= SEGMENT_BYTES
        return (work.events > self._events or work.bytes > self._bytes) and 4 * work.bytes > work.weight

    async def _seal(self, job_id: str, work: _Work) -> bool:
        fault("before_seal")
        sealed = await self._store.snapshots.seal(job_id, work.sealed, work.fold)
        fault("after_seal")
        if sealed is None:
            return False
        work.sealed, work.weight = sealed
        work.bytes = 0
        return True

    def _keep(self, job_id: str, work: _Work) -> None:
        if work.fold.status.is_terminal:
            return
        # two calls for one job may run at a time; the later one's fold stays
        replaced = self._kept.pop(job_id, None)
        self._size += work.size - (replaced.size if replaced else 0)
        self._kept[job_id] = work
        while self._size > KEPT_BYTES and len(self._kept) > 1:
            self._size -= self._kept.pop(next(iter(self._kept))).size
