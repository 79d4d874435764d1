"""A job whose events are written as a test says, and which is sealed as it says."""

from __future__ import annotations

from typing import Any

from streamjobs import events as ev
from streamjobs.cursor import START, Cursor
from streamjobs.events import Event
from streamjobs.job import Fold
from streamjobs.store import Batch, Entry, Lease, Sealed, Store, Submission, keys


class Job:
    """A job under a lease of the test's own. `whole` is its log as it was when it was written."""

    def __init__(self, store: Store, lease: Lease) -> None:
        self.store = store
        self.lease = lease
        self.id = lease.job_id
        self.batch = 0
        self.whole: list[Entry] = []

    @classmethod
    async def start(cls, store: Store, number: int = 1) -> Job:
        """Submit and take a job; `number` is the worker's how-many-th take this is."""
        await store.jobs.submit(Submission(kind="noop", owner="anna"))
        taken = await store.work.take(0, "w1", number, 1, ["default"])
        job = cls(store, taken.leases[0])
        job.whole = (await store.log.page(job.id)).entries
        return job

    async def write(self, events: list[Event], outcome: Any = "keep") -> None:
        self.batch += 1
        encoded = [(event.type, ev.encode_event(event)) for event in events]
        answers = await self.store.work.append(
            0, [Batch(self.id, self.lease.epoch, self.batch, encoded, outcome)]
        )
        assert answers[0].is_written
        self.whole += await self.replay(self.whole[-1].cursor)

    async def say(self, count: int, size: int = 5) -> None:
        words = [ev.JobLog(message=f"{self.batch}.{n} {'x' * size}") for n in range(count)]
        await self.write([*words])

    async def end(self) -> None:
        await self.write([ev.JobCompleted()], "completed")

    def fold(self, upto: int | None = None) -> Fold:
        fold = Fold(self.id)
        fold.apply_all(self.whole[:upto])
        return fold

    async def seal(self, upto: int | None = None, known: Sealed | None = None) -> Sealed | None:
        stored = await self.store.snapshots.load(self.id)
        sealed = await self.store.snapshots.seal(self.id, known or stored.sealed, self.fold(upto))
        return sealed and sealed[0]

    async def stream(self) -> int:
        return await self.store.client.xlen(f"{keys.job_key(self.id)}:events")

    async def replay(self, after: Cursor = START) -> list[Entry]:
        return [entry async for page in self.store.log.pages(self.id, after) for entry in page.entries]
