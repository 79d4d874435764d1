"""A storm: workers are killed at random for a while, and every job ends as if they had not been."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from streamjobs.testing import Scenario, ScriptedCall, Turn
from tests.conftest import RedisProcess
from tests.faults.app import once_at_most_once
from tests.faults.storms import kill_at_random, require_quiet, seeded, workers
from tests.harness import Lab, lab, one_end, one_outcome_each, sweeping

TEXTS = (
    "Let me look into that first. ",
    "Now the payment. ",
    "All of it is done, and here is what came of it.",
)
SCENARIO = Scenario(
    turns=[
        Turn(
            text=TEXTS[0], tool_calls=[ScriptedCall(name="pure"), ScriptedCall(name="idempotent")], rate=30.0
        ),
        Turn(text=TEXTS[1], tool_calls=[ScriptedCall(name="once")], rate=30.0),
        Turn(text=TEXTS[2], rate=30.0),
    ]
)


@pytest.mark.timeout(300)
async def test_a_short_storm(redis: RedisProcess, tmp_path: Path):
    """Ten seconds of pulled plugs: no job lost, no word twice, no payment twice."""
    await storm(redis, tmp_path, seconds=10.0, jobs=100)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("run", range(3))
async def test_a_long_storm(redis: RedisProcess, tmp_path: Path, run: int):
    """The same for as long as it takes to meet what is rare."""
    await storm(redis, tmp_path, seconds=60.0, jobs=600)


async def storm(redis: RedisProcess, folder: Path, *, seconds: float, jobs: int) -> None:
    seed = seeded()
    effects = folder / "effects"
    changes = {"lease": 1.0, "max_crashes": 1000, "crash_cap": 0.2, "concurrency": 8, "owner_limit": 0}
    async with lab(redis.url, SCENARIO, **changes) as bench, sweeping(bench.store):
        ids = [await bench.chat(str(n), tools=["pure", "idempotent", "once"]) for n in range(jobs)]
        with workers(bench, effects) as running:
            await kill_at_random(bench, running, random.Random(seed), seconds)
            await bench.ended(*ids, timeout=200.0)
        lost = Counter[str]()
        for job_id in ids:
            lost.update(await require_whole(bench, job_id))
        once_at_most_once(effects)
        require_quiet(effects)
        report = await bench.healthy()
        assert report.statuses == {"completed": jobs}
        assert lost["job.lost"] > 0, "nothing was ever lost: the storm proves nothing"


async def require_whole(bench: Lab, job_id: str) -> Counter[str]:
    """One job ended once, with its text, and each of its calls with one outcome."""
    log = await bench.log(job_id)
    assert one_end(log) == "job.completed"
    assert (await bench.view(job_id)).text == "".join(TEXTS)
    one_outcome_each(log)
    return Counter(event.type for event in log)
