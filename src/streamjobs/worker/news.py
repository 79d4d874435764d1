"""Reads what others write into the log of a job that runs: signals, fired timers, ends of children.

Rule 1: the inbox count that appends and renewals carry says that there is something; the log says what.
Rule 2: a count is taken as read only once the log was read after it was known.
"""

from __future__ import annotations

import asyncio
import random

from streamjobs import events as ev
from streamjobs.cursor import START, Cursor
from streamjobs.errors import Fenced, JobNotFound, StoreUnavailable
from streamjobs.faults import fault
from streamjobs.store import Entry, Log
from streamjobs.worker.history import occurrence_of
from streamjobs.worker.recorder import Journal
from streamjobs.worker.replay import Replay

_OURS = frozenset({"signal.received", "timer.fired", "child.ended"})


class News:
    """Follows one job's log for what a workflow waits for."""

    def __init__(self, log: Log, journal: Journal, replay: Replay, cursor: Cursor) -> None:
        self._log = log
        self._journal = journal
        self._replay = replay
        # the first event of a fresh job came along with its ticket, without its id
        self._cursor = cursor if cursor.epoch else START
        self._known = cursor.seq
        self._lock = asyncio.Lock()

    @property
    def is_behind(self) -> bool:
        """Whether something came in that was not read."""
        return self._journal.inbox != self._journal.read

    async def catch_up(self) -> None:
        """Read what came in, and tell the workflow. Raises `Fenced` where the log is not the one it was."""
        async with self._lock:
            delay = 0.05
            while self.is_behind:
                inbox = self._journal.inbox
                try:
                    await self._read()
                except StoreUnavailable:
                    await asyncio.sleep(delay * random.uniform(0.5, 1.0))
                    delay = min(1.0, delay * 2)
                except JobNotFound as error:
                    raise Fenced("the job is gone") from error
                else:
                    self._journal.read = inbox
                    fault("after_news_read")

    async def _read(self) -> None:
        if self._journal.read_seq > self._cursor.seq:
            # all up to there was ours, or was read
            self._cursor = Cursor(self._journal.read_seq, self._journal.lease.epoch)
        async for page in self._log.pages(self._journal.lease.job_id, self._cursor):
            if not page.found and self._cursor != START:
                raise Fenced("the log is not the one it was")
            for entry in page.entries:
                self._take(entry)

    def _take(self, entry: Entry) -> None:
        self._cursor = entry.cursor
        if entry.type not in _OURS or entry.cursor.seq <= self._known:
            return
        self._known = entry.cursor.seq
        occurrence = occurrence_of(entry.cursor.seq, ev.decode_event(entry.type, entry.data))
        if occurrence is not None:
            self._replay.tell(occurrence)
