"""Workers that were taken for dead and are not: what they write no longer counts, and who lives stays."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from streamjobs.testing import Scenario, ScriptedCall, Turn
from tests.conftest import RedisProcess, wait_until
from tests.faults.app import once_at_most_once, read_effects
from tests.harness import (
    Lab,
    Logged,
    WorkerProcess,
    lab,
    one_end,
    one_outcome_each,
    says,
    sweeping,
    worker_process,
    working,
)

LEASE = 0.8
WORDS = "The quick brown fox jumps over the lazy dog. " * 6
SLOW = says(WORDS, rate=25.0)


@pytest.fixture
async def bench(redis: RedisProcess) -> AsyncIterator[Lab]:
    async with lab(redis.url, SLOW, lease=LEASE) as opened:
        yield opened


@pytest.fixture
def zombie(bench: Lab) -> Iterator[WorkerProcess]:
    """A worker process that the test stops and lets go on."""
    with worker_process(bench.store.settings) as worker:
        yield worker
        worker.send(signal.SIGCONT)


async def frozen(bench: Lab, zombie: WorkerProcess) -> str:
    """Submit a job and stop its worker in the middle of the answer."""
    job_id = await bench.chat()
    await bench.until(job_id, "text.delta", 2)
    zombie.send(signal.SIGSTOP)
    return job_id


async def require_one_telling(bench: Lab, job_id: str, lost: int) -> list[Logged]:
    """The job completed with its words once, and each lease wrote under its own epoch only."""
    view = await bench.view(job_id)
    assert (view.status, view.text) == ("completed", WORDS), view.error
    log = await bench.log(job_id)
    assert one_end(log) == "job.completed"
    assert [event.type for event in log].count("job.lost") == lost
    require_own_epochs(log)
    await bench.healthy()
    return log


def require_own_epochs(log: list[Logged]) -> None:
    """Between one `job.started` and the next, all that a worker writes carries that lease's epoch."""
    epoch = 0
    for event in log:
        if event.type == "job.started":
            assert event.cursor.epoch > epoch
            epoch = event.cursor.epoch
        elif (
            event.type.split(".")[0] in {"turn", "text", "reasoning", "tool"} or event.type == "job.completed"
        ):
            assert event.cursor.epoch == epoch, event


async def test_a_zombie_that_wakes_after_the_takeover_writes_nothing(bench: Lab, zombie: WorkerProcess):
    """Two workers in one answer would be two answers mixed; the second one's stands, whole."""
    job_id = await frozen(bench, zombie)
    async with sweeping(bench.store), working(bench.store):
        await bench.until(job_id, "job.started", 2)
        zombie.send(signal.SIGCONT)
        await bench.ended(job_id)
    log = await require_one_telling(bench, job_id, lost=1)
    started = [event.data["worker"] for event in log if event.type == "job.started"]
    assert started[0] != started[1]
    assert zombie.process.poll() is None
    assert (await bench.run("another")).status == "completed"


async def test_a_zombie_that_wakes_after_the_end_changes_nothing(bench: Lab, zombie: WorkerProcess):
    """The job is over and read; what the old worker still has to say comes too late."""
    job_id = await frozen(bench, zombie)
    async with sweeping(bench.store), working(bench.store):
        await bench.ended(job_id)
    before = await bench.log(job_id)
    zombie.send(signal.SIGCONT)
    assert (await bench.run("another")).status == "completed"
    assert await bench.log(job_id) == before
    await require_one_telling(bench, job_id, lost=1)


async def test_a_zombie_that_wakes_before_anybody_takes_over_goes_on_afresh(
    bench: Lab, zombie: WorkerProcess
):
    """Lost, and back before the next take: its old life is over, and it may take the job as anybody may."""
    job_id = await frozen(bench, zombie)
    async with sweeping(bench.store):
        await bench.until(job_id, "job.lost")
    assert await bench.status(job_id) == "queued"
    zombie.send(signal.SIGCONT)
    await bench.ended(job_id)
    log = await require_one_telling(bench, job_id, lost=1)
    assert len({event.data["worker"] for event in log if event.type == "job.started"}) == 1


async def test_a_pause_that_nobody_noticed_costs_nothing(bench: Lab, zombie: WorkerProcess):
    """A lease that ran out and was not swept still holds: the worker wakes up and goes on in the sentence."""
    job_id = await frozen(bench, zombie)
    await asyncio.sleep(2 * LEASE)
    zombie.send(signal.SIGCONT)
    await bench.ended(job_id)
    log = await require_one_telling(bench, job_id, lost=0)
    assert "turn.restarted" not in [event.type for event in log]


async def test_a_frozen_redis_is_nobodys_death(own_redis: RedisProcess):
    """A store that was away for three leases comes back to workers that all live: no job is taken over."""
    async with lab(own_redis.url, SLOW, lease=LEASE) as bench, sweeping(bench.store), working(bench.store):
        jobs = [await bench.chat(str(n)) for n in range(5)]
        for job_id in jobs:
            await bench.until(job_id, "text.delta", 2)
        assert own_redis.process is not None
        own_redis.process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(3 * LEASE)
        own_redis.process.send_signal(signal.SIGCONT)
        await bench.ended(*jobs)
        for job_id in jobs:
            await require_one_telling(bench, job_id, lost=0)


def blocking(seconds: float) -> Scenario:
    call = ScriptedCall(name="blocking", arguments={"seconds": seconds})
    return Scenario(turns=[Turn(text="Blocking. ", tool_calls=[call]), Turn(text="Done.")])


async def test_a_tool_that_blocks_the_loop_keeps_its_leases(redis: RedisProcess, tmp_path: Path):
    """One badly written tool must not cost all the other jobs of its worker their leases."""
    effects = tmp_path / "effects"
    async with lab(redis.url, blocking(1.5 * LEASE), lease=LEASE) as bench, sweeping(bench.store):
        with worker_process(bench.store.settings, env={"EFFECTS": str(effects)}):
            other = await bench.submit("steps", 60)
            await bench.until(other, "job.progress")
            job_id = await bench.chat(tools=["blocking"])
            view = await bench.ended(job_id, other)
        for each in (job_id, other):
            assert "job.lost" not in await bench.types(each)
        assert view.status == "completed"
        assert [effect.tool for effect in read_effects(effects)] == ["blocking"]
        await bench.healthy()


async def test_a_loop_that_hangs_lets_go_of_its_jobs(redis: RedisProcess, tmp_path: Path):
    """A worker that can do nothing must not hold on to jobs; what it began once is not begun again."""
    effects = tmp_path / "effects"
    env: dict[str, Any] = {"env": {"EFFECTS": str(effects)}}
    async with lab(redis.url, blocking(8 * LEASE), lease=LEASE) as bench, sweeping(bench.store):
        with worker_process(bench.store.settings, **env):
            job_id = await bench.chat(tools=["blocking"])
            await wait_until(lambda: read_effects(effects))
            with worker_process(bench.store.settings, **env):
                view = await bench.ended(job_id)
                await asyncio.sleep(8 * LEASE - 5 * LEASE)
        assert (view.status, view.text) == ("completed", "Blocking. Done.")
        log = await bench.log(job_id)
        one_outcome_each(log)
        assert [event.type for event in log if event.type.startswith("tool.")][-1] == "tool.unknown"
        once_at_most_once(effects)
        assert len(read_effects(effects)) == 1
        await bench.healthy()
