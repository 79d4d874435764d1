"""Random workflows under random kills count what their seeds say, whatever happened to their workers."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from pathlib import Path

import pytest

from streamjobs.cursor import START
from tests.conftest import RedisProcess
from tests.faults.programs import expected, program, signals
from tests.faults.storms import kill_at_random, report, require_quiet, seeded, workers
from tests.harness import Lab, Logged, lab, one_end, sweeping

APP = "tests.faults.programs:app"
CHANGES = {
    "lease": 1.0, "max_crashes": 1000, "crash_cap": 0.2, "concurrency": 32, "owner_limit": 0,
    "park_after": 0.2, "retry_base": 0.05,
}  # fmt: skip


@pytest.mark.timeout(300)
async def test_random_workflows_count_what_their_seeds_say(redis: RedisProcess, tmp_path: Path):
    """No list of cases has all that users write: of whatever it is, nothing is left out or done twice."""
    await check(redis, tmp_path, seconds=8.0, jobs=30)


@pytest.mark.long
@pytest.mark.timeout(600)
async def test_many_random_workflows_count_what_their_seeds_say(redis: RedisProcess, tmp_path: Path):
    """The same with ten times as many."""
    await check(redis, tmp_path, seconds=60.0, jobs=300)


async def check(redis: RedisProcess, folder: Path, *, seconds: float, jobs: int) -> None:
    chance, effects = random.Random(seeded()), folder / "effects"
    async with lab(redis.url, **CHANGES) as bench, sweeping(bench.store):
        with workers(bench, effects, APP) as running:
            killing = asyncio.create_task(kill_at_random(bench, running, chance, seconds, most=1.5))
            calm: list[float] = []
            killing.add_done_callback(lambda _: calm.append(time.monotonic()))
            seeds = await submit_over(bench, chance, jobs, 0.8 * seconds)
            kills = await killing
            await bench.ended(*seeds, timeout=200.0)
            drained = time.monotonic() - calm[0]
        logs = [await require_counted(bench, job_id, seed) for job_id, seed in seeds.items()]
        types = report(kills, drained, logs)
        require_quiet(effects)
        statuses = (await bench.healthy()).statuses
    assert set(statuses) == {"completed"}
    assert types["job.lost"] > 0, "nothing was ever lost: the run proves nothing"


async def submit_over(bench: Lab, chance: random.Random, jobs: int, seconds: float) -> dict[str, int]:
    """Submit jobs one after the other, and answer what they wait for."""
    seeds: dict[str, int] = {}
    async with asyncio.TaskGroup() as group:
        for _ in range(jobs):
            seed = chance.randrange(10**6)
            job_id = await bench.submit("program", {"seed": seed})
            seeds[job_id] = seed
            for name in signals(program(seed)):
                if chance.random() < 0.3:  # some come before they are waited for
                    await bench.store.jobs.signal(job_id, name, 1, key=name)
            group.create_task(attend(bench, job_id))
            await asyncio.sleep(seconds / jobs)
    return seeds


async def attend(bench: Lab, job_id: str) -> None:
    """Send what a job, and its children, wait for, until it has ended."""
    cursor, is_ended = START, False
    async with asyncio.TaskGroup() as group:
        while not is_ended:
            is_ended = (await bench.store.jobs.get(job_id)).is_ended
            for event in await bench.log(job_id, after=cursor):
                cursor = event.cursor
                if event.type == "child.spawned":
                    group.create_task(attend(bench, event.data["job"]))
                elif (
                    event.type == "timer.set" and event.data["key"].startswith("signal:wait") and not is_ended
                ):
                    name = event.data["key"].removeprefix("signal:")
                    await bench.store.jobs.signal(job_id, name, 1, key=name)
            await asyncio.sleep(0.3)


async def require_counted(bench: Lab, job_id: str, seed: int) -> list[Logged]:
    """The job ended with what its seed says, and recorded nothing twice."""
    log, view = await bench.log(job_id), await bench.view(job_id)
    failures = [event.data["error"]["message"] for event in log if event.type == "job.retrying"]
    assert not failures, (seed, failures)
    assert view.status == "completed", (seed, view.error)
    assert one_end(log) == "job.completed"
    assert view.result == dict(expected(program(seed))), seed
    for kind, field in ("step.completed", "key"), ("timer.fired", "key"), ("child.spawned", "job"):
        twice = [what for what, n in Counter(e.data[field] for e in log if e.type == kind).items() if n > 1]
        assert not twice, (seed, kind, twice)
    return log
