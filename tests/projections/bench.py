"""What the projections' tests share: projectors in this loop and in processes, and jobs of many lives."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from streamjobs import events as ev
from streamjobs.errors import JobNotFound
from streamjobs.projections import build
from streamjobs.projections.runner import Projection, Runner
from streamjobs.store import Batch, Lease, Store, Submission
from streamjobs.store.stats import Totals
from tests.harness import ROOT, environment

NAMES = ("index", "stats")
"""Those that these tests are about; what a projector process runs is the setting."""


class Floor:
    """Takes jobs and writes their logs, as workers would."""

    def __init__(self, store: Store, worker: str = "w1") -> None:
        self.store = store
        self.worker = worker
        self._number = 0
        self._batches: dict[str, int] = {}

    async def submit(self, kind: str = "work", **fields: Any) -> str:
        return (await self.store.jobs.submit(Submission(kind=kind, **fields))).job_id

    async def take(self, count: int = 1) -> list[Lease]:
        self._number += 1
        queues = list(self.store.settings.queues)
        return (await self.store.work.take(0, self.worker, self._number, count, queues)).leases

    async def write(self, lease: Lease, *events: ev.Event, outcome: Any = "keep", **more: Any) -> None:
        number = self._batches.get(f"{lease.job_id} {lease.epoch}", 0) + 1
        self._batches[f"{lease.job_id} {lease.epoch}"] = number
        rows = [(event.type, ev.encode_event(event)) for event in events]
        batch = Batch(lease.job_id, lease.epoch, number, rows, outcome, **more)
        (answer,) = await self.store.work.append(0, [batch])
        assert answer.verdict == "ok", answer

    async def now_ms(self) -> int:
        return await self.store.now_ms()

    async def live(self, kind: str = "work", end: str = "completed", **fields: Any) -> str:
        """A whole life: a turn of two tokens, a retry, and an end."""
        await self.submit(kind, **fields)
        (lease,) = await self.take()
        now = await self.now_ms()
        await self.write(lease, ev.TurnStarted(ts=now, turn=1), ev.TextDelta(ts=now + 70, turn=1, text="a"))
        error = ev.ErrorInfo("boom", "again", True)
        await self.write(lease, ev.JobRetrying(ts=now + 80, attempt=1, error=error), outcome="retry")
        (lease,) = await self.take()
        now = await self.now_ms()
        usage = ev.Usage(3, 5)
        await self.write(lease, ev.TurnStarted(ts=now, turn=1, attempt=2))
        await self.write(lease, *(ev.TextDelta(ts=now + i, turn=1, text="b") for i in range(2)))
        await self.write(lease, ev.TurnCompleted(ts=now + 9, turn=1, usage=usage))
        last = ev.JobCompleted(ts=now + 10) if end == "completed" else ev.JobFailed(ts=now + 10, error=error)
        await self.write(lease, last, outcome=end)
        return lease.job_id


def runner_of(store: Store, *projections: Projection, **options: Any) -> Runner:
    return Runner(store, projections or build(NAMES, store), **options)


@contextlib.asynccontextmanager
async def projecting(store: Store, *projections: Projection, **options: Any) -> AsyncIterator[Runner]:
    """A projector in this loop; it is dropped, as by kill -9, when the block ends."""
    runner = runner_of(store, *projections, **options)
    task = asyncio.create_task(runner.run(), name="projector under test")
    try:
        yield runner
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def caught_up(store: Store, names: Sequence[str] = NAMES) -> bool:
    """Whether projections have nothing left to do."""
    infos = {info.name: info for info in await store.feed.all()}
    return all(
        name in infos and infos[name].consumers and not infos[name].notes and not infos[name].rebuild
        for name in names
    )


async def carry(store: Store, *projections: Projection) -> Runner:
    """Do everything that projections have to do now."""
    runner = runner_of(store, *projections)
    await settle(runner, store)
    return runner


async def settle(runner: Runner, store: Store) -> None:
    for name in runner.names:
        for partition in store.partitions:
            while await runner.tick(name, partition):
                pass
    await runner.rebuild()


@contextlib.contextmanager
def projector_process(settings: Any, *, fault: str = "", **env: str) -> Iterator[subprocess.Popen[bytes]]:
    """A projector as `streamjobs projector` starts it."""
    env = environment(settings) | env | ({"STREAMJOBS_FAULT": fault} if fault else {})
    process = subprocess.Popen([sys.executable, "-m", "streamjobs", "projector"], env=env, cwd=ROOT)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(20)


# --- what the projections should hold, computed the slow way


async def jobs_of(store: Store) -> list[str]:
    return sorted({job for p in store.partitions async for page in store.feed.jobs(p) for job in page})


async def right_index(store: Store, owner: str) -> list[tuple[str, str, int]]:
    """(job, status, created) of an owner's jobs as a list should show them."""
    rows: list[tuple[str, str, int]] = []
    for job_id in await jobs_of(store):
        with contextlib.suppress(JobNotFound):
            job = await store.jobs.get(job_id)
            if job.owner == owner:
                rows.append((job.job_id, job.status, job.created_ms))
    return sorted(rows, key=lambda row: (row[2], row[0]), reverse=True)


async def shown_index(store: Store, owner: str, limit: int = 500) -> list[tuple[str, str, int]]:
    rows: list[tuple[str, str, int]] = []
    cursor = ""
    while True:
        jobs, cursor = await store.index.page(owner, limit=limit, before=cursor)
        rows += [(job.id, job.status, job.created_ms) for job in jobs]
        if not cursor:
            return rows


async def stored_index(store: Store, owner: str) -> dict[str, Any]:
    """The keys themselves: a list repairs what it comes by."""
    names = ("index", "indexed", "indexed_counts")
    (index, indexed, counts) = (f"sj:{{0}}:{name}:{owner}" for name in names)
    return {
        "order": await store.client.zrange(index, 0, -1, withscores=True),
        "rows": await store.client.hgetall(indexed),
        "counts": {k: v for k, v in (await store.client.hgetall(counts)).items() if k != b"swept"},
    }


def plain(totals: Totals) -> dict[tuple[str, str], dict[str, int]]:
    """Totals without what is zero, by which they may differ."""
    return {key: {what: n for what, n in counts.items() if n} for key, counts in totals.items()}
