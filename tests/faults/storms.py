"""What the storms share: workers in processes, and somebody who kills them at random."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.conftest import wait_until
from tests.harness import Lab, Logged, WorkerProcess, worker_process

WORKERS = 3
LEAST_KILLS = 3
"""A worker of a busy machine may need most of a storm's time to start."""


def seeded() -> int:
    """The run's seed: STREAMJOBS_TEST_SEED or a new one; printed, and so shown with a failure."""
    seed = int(os.environ.get("STREAMJOBS_TEST_SEED") or random.randrange(10**6))
    print(f"STREAMJOBS_TEST_SEED={seed}")  # noqa: T201
    return seed


@contextlib.contextmanager
def workers(
    bench: Lab, effects: Path, app: str = "tests.faults.app:app", **env: str
) -> Iterator[list[WorkerProcess]]:
    options: dict[str, Any] = {"env": env | {"EFFECTS": str(effects)}, "output": effects.with_name("output")}
    with contextlib.ExitStack() as stack:
        processes = (worker_process(bench.store.settings, app, **options) for _ in range(WORKERS))
        yield [stack.enter_context(process) for process in processes]


async def kill_at_random(
    bench: Lab, running: list[WorkerProcess], chance: random.Random, seconds: float, most: float = 1.5
) -> int:
    """Kill and restart one worker after the other, of those that run jobs; how many were killed.

    It takes `seconds`, and longer where they are over, and jobs are left, before a few were killed.
    """
    until, kills = time.monotonic() + seconds, 0
    while time.monotonic() < until or (kills < LEAST_KILLS and await is_busy(bench)):
        await asyncio.sleep(chance.uniform(0.3, most))
        at_work = await pids_at_work(bench)
        victims = [worker for worker in running if worker.pid in at_work]
        if victims:
            victim = chance.choice(victims)
            victim.kill()
            victim.restart()
            kills += 1
    await wait_until(lambda: all(worker.process.poll() is None for worker in running))
    return kills


async def is_busy(bench: Lab) -> bool:
    return any((await bench.store.work.backlog(0)).values())


async def pids_at_work(bench: Lab) -> set[int]:
    """The processes that hold leases: a worker's id is host, process and chance."""
    client: Any = bench.store.client
    jobs = [job_id.decode() for job_id in await client.zrange("sj:{0}:leases", 0, -1)]
    workers = [await client.hget(f"sj:{{0}}:job:{job_id}", "worker") for job_id in jobs]
    return {int(worker.split(b"-")[-2]) for worker in workers if worker}


def require_quiet(effects: Path) -> None:
    """No worker wrote what the store refuses, nor failed itself: both heal, and so are seen nowhere else."""
    output = effects.with_name("output").read_text()
    bad = ("commit.refused", "job.crashed_execution", "Traceback", "news.unread")
    lines = [line for line in output.splitlines() if any(word in line for word in bad)]
    assert not lines, lines[:5]


def report(kills: int, drained: float, logs: Sequence[Sequence[Logged]]) -> Counter[str]:
    """Print a storm's figures; how many events of each type there were."""
    types = Counter(event.type for log in logs for event in log)
    crashes = max((e.data.get("crashes", 0) for log in logs for e in log if e.type == "job.lost"), default=0)
    unknown = types["step.unknown"] + types["tool.unknown"]
    print(  # noqa: T201
        f"{len(logs)} jobs, {kills} kills, {types['job.lost']} lost leases, at most {crashes} crashes in a"
        f" row, {types['job.started']} starts, {unknown} unknown outcomes,"
        f" all ended {drained:.1f} s after the last kill"
    )
    return types
