"""A storm over workflows that do everything: workers are killed at random, and every promise holds."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path

import pytest

from tests.conftest import RedisProcess
from tests.faults.storms import kill_at_random, report, require_quiet, seeded, workers
from tests.faults.workflows import SCENARIO, SETTINGS, answer, require_right
from tests.harness import Lab, lab, sweeping

APP = "tests.faults.workflows:app"
CHANGES = SETTINGS | {
    "lease": 1.0, "max_crashes": 1000, "crash_cap": 0.2, "concurrency": 16, "owner_limit": 0
}  # fmt: skip


@pytest.mark.timeout(300)
async def test_a_short_storm_over_workflows(redis: RedisProcess, tmp_path: Path):
    """Ten seconds of pulled plugs: no step twice in a log, nothing paid twice, every answer used."""
    await storm(redis, tmp_path, seconds=10.0, jobs=60)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("run", range(3))
async def test_a_long_storm_over_workflows(redis: RedisProcess, tmp_path: Path, run: int):
    """The same for as long as it takes to meet what is rare."""
    await storm(redis, tmp_path, seconds=30.0, jobs=200)


async def storm(redis: RedisProcess, folder: Path, *, seconds: float, jobs: int) -> None:
    chance, effects = random.Random(seeded()), folder / "effects"
    async with lab(redis.url, SCENARIO, **CHANGES) as bench, sweeping(bench.store):
        with workers(bench, effects, APP, STEP_SECONDS="0.15") as running:
            killing = asyncio.create_task(kill_at_random(bench, running, chance, seconds, most=2.0))
            calm: list[float] = []
            killing.add_done_callback(lambda _: calm.append(time.monotonic()))
            submitted = await submit_over(bench, jobs, 0.9 * seconds)
            kills = await killing
            await bench.ended(*submitted, timeout=200.0)
            drained = time.monotonic() - calm[0]
        logs = [await require_right(bench, job_id, number, effects) for job_id, number in submitted.items()]
        types = report(kills, drained, logs)
        require_quiet(effects)
        statuses = (await bench.healthy()).statuses
    assert statuses == {"completed": 2 * jobs}, "each has a child"
    assert types["job.lost"] > 0, "nothing was ever lost: the storm proves nothing"


async def submit_over(bench: Lab, jobs: int, seconds: float) -> dict[str, int]:
    """Submit jobs all through the storm, and answer them; every other one talks to a model."""
    numbers: dict[str, int] = {}
    async with asyncio.TaskGroup() as group:
        for n in range(jobs):
            number = n if n % 2 else -n - 1
            job_id = await bench.submit("everything", number)
            numbers[job_id] = number
            group.create_task(answer(bench, job_id, 0.5))
            await asyncio.sleep(seconds / jobs)
    return numbers
