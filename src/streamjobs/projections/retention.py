"""Keeps ended jobs as long as the policies say, and lets go of some when memory is short.

Rule 1: a job's expiry counts from its end, so it is the same whoever sets it, and however often.
Rule 2: without a policy a job is kept for `retention_sealed` where projectors seal, else for `retention`.
Rule 3: above `FULL` of Redis's memory, a bounded number of jobs goes in each sweep, until it is below again.
"""

from __future__ import annotations

import structlog

from streamjobs.errors import JobNotEnded, JobNotFound
from streamjobs.retention import kept_for, parse_policies
from streamjobs.store import Store

log = structlog.get_logger(__name__)

FULL = 0.85
_AT_ONCE = 100
_ROUNDS = 10
"""Calls of `_AT_ONCE` jobs that one sweep of a partition makes at most."""


class RetentionProjection:
    """Advances one job at a time; any number of processes may."""

    name = "retention"

    def __init__(self, store: Store) -> None:
        self._store = store
        settings = store.settings
        self._policies = parse_policies(settings.retention_policies)
        is_sealed = "snapshot" in settings.projections
        self._default = settings.retention_sealed if is_sealed else settings.retention

    async def advance(self, job_id: str) -> None:
        """Set the expiry of a job that has ended. Raises `StoreUnavailable`."""
        try:
            job = await self._store.jobs.get(job_id)
            if not job.is_ended:
                return
            seconds = kept_for(self._policies, job.kind, job.status)
            await self._store.retention.keep(job_id, self._default if seconds is None else seconds)
        except (JobNotFound, JobNotEnded):
            return

    async def sweep(self, partition: int) -> None:
        """Let jobs go while memory is short."""
        for _ in range(_ROUNDS):
            if await self._store.retention.fullness() <= FULL:
                return
            count = await self._store.retention.relieve(partition, _AT_ONCE)
            log.warning("retention.relieved", partition=partition, jobs=count)
            if not count:
                return
