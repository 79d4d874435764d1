"""The index: each owner's jobs, newest first, by status, kind, queue, thread and message.

The job's head, which scripts keep, is already the fold that this needs; of the log only the first event is
read, once, for the thread and the message.
"""

from __future__ import annotations

from streamjobs.errors import Invalid, JobNotFound
from streamjobs.events import JobQueued, decode_event
from streamjobs.store import Store

_SWEEPS = 20
"""Calls that one sweep makes at most, while each finds something to drop."""


class IndexProjection:
    """Writes the rows of jobs that have something new."""

    name = "index"

    def __init__(self, store: Store) -> None:
        self._store = store

    async def advance(self, job_id: str) -> None:
        """Bring a job's row up to date."""
        if await self._store.index.put(job_id):
            return
        try:
            page = await self._store.log.page(job_id, limit=1)
        except JobNotFound:
            return
        queued = decode_event(page.entries[0].type, page.entries[0].data)
        if not isinstance(queued, JobQueued):
            raise Invalid("the job's log has no beginning")
        await self._store.index.put(job_id, queued.thread_id, queued.message_id)

    async def sweep(self, partition: int) -> None:
        """Let rows go whose jobs are gone."""
        for _ in range(_SWEEPS):
            _, dropped = await self._store.index.sweep(partition)
            if not dropped:
                return

    async def reset(self, partition: int) -> None:
        """Begin from nothing."""
        await self._store.index.reset(partition)
