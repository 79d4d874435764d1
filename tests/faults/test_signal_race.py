"""A signal that arrives while a job says 'I wait': it wakes the job, or the job is told to read it first."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

from streamjobs.config import Settings
from streamjobs.events import JobWaiting, encode_event
from streamjobs.store import Batch, Lease, Store, Submission
from tests.conftest import RedisProcess, fast_settings
from tests.harness import lab

TRIES = 1000
AT_ONCE = 100


async def test_no_approval_is_lost_between_i_wait_and_here_it_is(redis: RedisProcess):
    """A lost approval is a job that waits for ever, and a person who is sure to have pressed the button."""
    settings = fast_settings(redis.url, owner_limit=0, lease=60.0)
    seed = random.randrange(10**6)
    print(f"seed {seed}")  # noqa: T201 - shown with a failure
    chance = random.Random(seed)
    worker, people = await Store.open(settings), await Store.open(settings)
    outcomes: Counter[str] = Counter()
    for start in range(0, TRIES, AT_ONCE):
        leases = await lease_many(worker, settings, start // AT_ONCE + 1)
        outcomes.update(await asyncio.gather(*(race(worker, people, lease, chance) for lease in leases)))
    assert sum(outcomes.values()) == TRIES
    assert set(outcomes) == {"woken", "told"}, f"the race was always won by one side: {outcomes}"
    async with lab(redis.url, owner_limit=0) as bench:
        await bench.healthy()
    await worker.aclose()
    await people.aclose()


async def lease_many(store: Store, settings: Settings, number: int) -> list[Lease]:
    """Submit jobs and take them all."""
    await store.jobs.submit_many([Submission(kind="chat") for _ in range(AT_ONCE)])
    taken = await store.work.take(0, "racer", number, AT_ONCE, settings.queues)
    assert len(taken.leases) == AT_ONCE
    return taken.leases


async def race(worker: Store, people: Store, lease: Lease, chance: random.Random) -> str:
    """Wait and signal at once, from two clients; what came of it."""

    async def wait() -> str:
        await asyncio.sleep(chance.uniform(0, 0.003))
        return await append_wait(worker, lease, 0)

    async def signal() -> bool:
        await asyncio.sleep(chance.uniform(0, 0.003))
        return await people.jobs.signal(lease.job_id, "approval", True, key="once")

    verdict, was_sent = await asyncio.gather(wait(), signal())
    assert was_sent
    status = (await people.jobs.get(lease.job_id)).status
    await finish(people, lease, worker, verdict, status)
    return "woken" if verdict == "ok" else "told"


async def finish(people: Store, lease: Lease, worker: Store, verdict: str, status: str) -> None:
    """Check what the race came to, and end the job."""
    if verdict == "ok":
        assert status == "queued", "it waits, and the signal is in its log: nothing will ever wake it"
        await people.jobs.cancel(lease.job_id)
        return
    assert (verdict, status) == ("inbox", "running")
    assert await append_wait(worker, lease, 1) == "ok"
    assert (await people.jobs.get(lease.job_id)).status == "waiting"
    await people.jobs.cancel(lease.job_id)


async def append_wait(store: Store, lease: Lease, seen: int) -> str:
    """Hand in that the job waits, having read so much of its inbox; the script's verdict."""
    event = JobWaiting(waits_for="approval")
    batch = Batch(lease.job_id, lease.epoch, 1, [(event.type, encode_event(event))], "wait", seen)
    (answer,) = await store.work.append(0, [batch])
    return answer.verdict
