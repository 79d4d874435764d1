"""Keeps ended jobs as long as the policies say, archives them, and lets go of some when memory is short.

Rule 1: a job's expiry counts from its end, so it is the same whoever sets it, and however often.
Rule 2: without a policy a job is kept for `retention_sealed` where projectors seal, else for `retention`.
Rule 3: above `FULL` of Redis's memory, a bounded number of jobs goes in each sweep, until it is below again.
Rule 4: where there is an archive, a job's file is there before its policy counts; one whose file could not
be written is kept at least as long as jobs without a policy, and does not go when memory is short.
Rule 5: what the archive refused is in quarantine, and tried again after as long as it has been tried for, up
to `_LONGEST`. After a failure the archive is left alone for a moment: jobs do not queue up in front of it.
"""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator

import structlog

from streamjobs import metrics
from streamjobs.archive import Archive, DamagedArchive, Header
from streamjobs.errors import ArchiveUnavailable, JobNotEnded, JobNotFound, StoreUnavailable
from streamjobs.retention import kept_for, parse_policies
from streamjobs.store import Entry, JobRecord, Quarantined, Store

log = structlog.get_logger(__name__)

FULL = 0.85
_AT_ONCE = 100
_ROUNDS = 10
"""Calls of `_AT_ONCE` jobs that one sweep of a partition makes at most."""
_SHORTEST, _LONGEST = 5.0, 900.0
"""Seconds before what the archive refused is tried again."""
_ARCHIVE_ERRORS = (ArchiveUnavailable.__name__, DamagedArchive.__name__)


class RetentionProjection:
    """Advances one job at a time; any number of processes may."""

    name = "retention"

    def __init__(self, store: Store, *, shortest: float = _SHORTEST) -> None:
        self._store = store
        settings = store.settings
        self._policies = parse_policies(settings.retention_policies)
        is_sealed = "snapshot" in settings.projections
        self._default = settings.retention_sealed if is_sealed else settings.retention
        self._archive = Archive.of(settings.archive_url, settings.archive_timeout, store.vault)
        self._shortest = shortest
        self._closed_until = 0.0
        self._looks_again = 0.0

    async def advance(self, job_id: str) -> None:
        """Archive a job that has ended, and set its expiry.

        Raises `StoreUnavailable`, `ArchiveUnavailable`, `DamagedArchive`.
        """
        try:
            job = await self._store.jobs.get(job_id)
            if not job.is_ended:
                return
            seconds = kept_for(self._policies, job.kind, job.status)
            await self._keep(job, self._default if seconds is None else seconds)
        except (JobNotFound, JobNotEnded):
            return

    async def sweep(self, partition: int) -> None:
        """Let jobs go while memory is short, and let refused jobs be archived again."""
        await self._relieve(partition)
        if self._archive is not None:
            await self._try_again(partition)

    async def _relieve(self, partition: int) -> None:
        for _ in range(_ROUNDS):
            if await self._store.retention.fullness() <= FULL:
                return
            count = await self._store.retention.relieve(partition, _AT_ONCE)
            log.warning("retention.relieved", partition=partition, jobs=count)
            if not count:
                return

    # --- the archive

    async def _keep(self, job: JobRecord, seconds: float) -> None:
        if self._archive is None or job.is_archived:
            await self._store.retention.keep(job.job_id, seconds)
            return
        try:
            await self._write(self._archive, job)
        except (JobNotFound, StoreUnavailable):
            raise
        except Exception:
            metrics.ARCHIVED.labels("failed").inc()
            await self._store.retention.keep(job.job_id, max(seconds, self._default), archive="held")
            raise
        try:
            await self._store.retention.keep(job.job_id, seconds, archive="archived")
        except JobNotFound:  # it was deleted meanwhile, and its file is to be gone too
            await self._archive.remove(job.job_id)
            raise
        metrics.ARCHIVED.labels("archived").inc()

    async def _write(self, archive: Archive, job: JobRecord) -> None:
        if time.monotonic() < self._closed_until:
            raise ArchiveUnavailable("the archive: it failed a moment ago")
        try:
            await archive.write(_header(job), self._pages(job.job_id))
        except ArchiveUnavailable:
            self._closed_until = time.monotonic() + self._shortest
            raise

    async def _pages(self, job_id: str) -> AsyncIterator[list[Entry]]:
        async for page in self._store.log.pages(job_id):
            yield page.entries

    async def _try_again(self, partition: int) -> None:
        if time.monotonic() < max(self._closed_until, self._looks_again):
            return
        failed = await self._store.feed.quarantined(partition, self.name)
        now_ms = await self._store.now_ms()
        due = [one for one in failed if self._is_refused(one) and now_ms - one.ts >= self._shortest * 1000]
        chosen = [one.job for one in random.sample(due, min(len(due), _AT_ONCE))
                  if await self._is_due(one, now_ms)]  # fmt: skip
        if chosen:
            await self._store.feed.retry_jobs(partition, self.name, chosen)
        if partition == self._store.partitions[-1]:
            self._looks_again = time.monotonic() + self._shortest

    def _is_refused(self, one: Quarantined) -> bool:
        return one.error.partition(":")[0] in _ARCHIVE_ERRORS

    async def _is_due(self, one: Quarantined, now_ms: int) -> bool:
        """A job that is gone is due: a look at it takes it out of the quarantine."""
        try:
            job = await self._store.jobs.get(one.job)
        except JobNotFound:
            return True
        return now_ms - one.ts >= min(one.ts - job.ended_ms, _LONGEST * 1000)


def _header(job: JobRecord) -> Header:
    return Header(
        id=job.job_id,
        owner=job.owner,
        kind=job.kind,
        status=job.status,
        created_ms=job.created_ms,
        ended_ms=job.ended_ms,
        events=job.last.seq,
        last=str(job.last),
    )
