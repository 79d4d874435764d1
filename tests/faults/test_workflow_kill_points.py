"""A worker of a workflow killed at every named fault point: another goes on, and every promise holds."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from streamjobs.faults import WORKER_POINTS
from tests.conftest import RedisProcess
from tests.faults.campaign import LATER, LEASE, campaign, passed_points, queues_of, table
from tests.faults.workflows import SCENARIO, SETTINGS
from tests.harness import Lab, lab


@pytest.fixture
async def bench(redis: RedisProcess) -> AsyncIterator[Lab]:
    queues = queues_of((*WORKER_POINTS, *LATER))
    async with lab(redis.url, SCENARIO, lease=LEASE, queues=queues, **SETTINGS) as opened:
        yield opened


@pytest.fixture
def effects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "effects"
    monkeypatch.setenv("EFFECTS", str(path))
    return path


async def test_the_workflow_passes_every_point(bench: Lab, effects: Path):
    """A point that the campaign's workflow never passes is one where nobody was ever killed."""
    with pytest.MonkeyPatch.context() as patch:
        passed = await passed_points(bench, patch, effects)
    assert set(passed) == set(WORKER_POINTS)
    for later in LATER:
        point, _, count = later.partition(":")
        assert passed[point] >= int(count), (later, passed[point])


@pytest.mark.timeout(400)
async def test_a_worker_killed_at_any_point_costs_a_lease_and_nothing_else(bench: Lab, effects: Path):
    """The promise of durable workflows: pull the plug anywhere, and the work is done, once."""
    verdicts = await campaign(bench, WORKER_POINTS, effects, together=8)
    assert not [verdict for verdict in verdicts if verdict.broken], table(verdicts)
    await bench.healthy()


@pytest.mark.long
@pytest.mark.timeout(600)
async def test_a_worker_killed_later(bench: Lab, effects: Path):
    """The same points in other steps, tools and waits."""
    verdicts = await campaign(bench, LATER, effects, together=8)
    assert not [verdict for verdict in verdicts if verdict.broken], table(verdicts)
    await bench.healthy()
