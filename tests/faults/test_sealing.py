"""A projector killed while it seals: another one goes on, and no event is lost, doubled or trimmed away."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from streamjobs.faults import SEAL_POINTS
from streamjobs.projections.snapshot import SnapshotProjection
from streamjobs.store import Store, keys
from streamjobs.store.doctor import Doctor
from tests.conftest import RedisProcess, fast_settings, wait_until
from tests.harness import is_stopped
from tests.sealing import Job

ROOT = Path(__file__).parent.parent.parent
SMALL = {"seal_events": 10, "seal_bytes": 500, "snapshot_min_events": 15}

PROJECTOR = """
import asyncio, sys
from streamjobs.config import load_settings
from streamjobs.projections.snapshot import SnapshotProjection
from streamjobs.store import Store

async def main():
    store = await Store.open(load_settings())
    await SnapshotProjection(store).advance(sys.argv[1])

asyncio.run(main())
"""


@pytest.fixture
async def store(redis: RedisProcess) -> AsyncIterator[Store]:
    opened = await Store.open(fast_settings(redis.url, **SMALL))
    yield opened
    await opened.aclose()


async def project(store: Store, job_id: str, fault: str = "") -> int:
    """Advance a job in a process of its own; its exit status."""
    env = os.environ | {f"STREAMJOBS_{name.upper()}": str(value) for name, value in SMALL.items()}
    env |= {"STREAMJOBS_REDIS_URL": store.settings.redis_url, "STREAMJOBS_FAULT": fault}
    process = subprocess.Popen([sys.executable, "-c", PROJECTOR, job_id], env=env, cwd=ROOT)
    await wait_until(lambda: process.poll() is not None, 60.0, "the end of the projector's process")
    return process.returncode


@pytest.mark.parametrize("point", [*SEAL_POINTS, *(f"{point}:2" for point in SEAL_POINTS)])
@pytest.mark.parametrize("has_ended", [False, True])
async def test_a_projector_killed_there_costs_nothing(store: Store, point: str, has_ended: bool):
    """A kill between reading and sealing would leave a log that ends in nothing, for ever."""
    job = await Job.start(store)
    for _ in range(21):
        await job.say(200)  # two full segments, and some more
    if has_ended:
        await job.end()
    assert await project(store, job.id, point) == -signal.SIGKILL
    assert await job.replay() == job.whole
    assert (await Doctor(store).examine()).violations == []
    assert await project(store, job.id) == 0
    assert await job.replay() == job.whole
    stored = await store.snapshots.load(job.id)
    stored.fold.apply_all(stored.page.entries)
    assert stored.fold.view() == job.fold().view()
    assert await store.client.exists(f"{keys.job_key(job.id)}:events") == (not has_ended)
    assert (await Doctor(store).examine()).violations == []


async def test_a_projector_that_was_frozen_does_no_harm(store: Store):
    """One that stopped before it sealed would, hours later, trim what others have sealed otherwise."""
    job = await Job.start(store)
    await job.say(40)
    env = os.environ | {f"STREAMJOBS_{name.upper()}": str(value) for name, value in SMALL.items()}
    env |= {"STREAMJOBS_REDIS_URL": store.settings.redis_url, "STREAMJOBS_FAULT": "before_seal:1:stop"}
    frozen = subprocess.Popen([sys.executable, "-c", PROJECTOR, job.id], env=env, cwd=ROOT)
    try:
        await wait_until(lambda: is_stopped(frozen.pid), 60.0, "the stop")
        await job.say(3)
        await SnapshotProjection(store).advance(job.id)
        await job.say(20)
        await SnapshotProjection(store).advance(job.id)
        frozen.send_signal(signal.SIGCONT)
        await wait_until(lambda: frozen.poll() is not None, 60.0, "the end")
    finally:
        frozen.kill()
        await asyncio.to_thread(frozen.wait, 20)
    assert frozen.returncode == 0
    assert await job.replay() == job.whole
    assert (await Doctor(store).examine()).violations == []
