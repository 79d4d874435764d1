"""Random programs, cut at random events: each goes on as if it had not been, branch by branch."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

from tests.desk import Desk
from tests.faults.programs import app, expected, program, signals


class Family(Desk):
    """A desk whose children end with what their programs count."""

    def end_child(self, job_id: str, result: Any = None, status: str = "completed") -> None:
        super().end_child(job_id, {}, status)


@pytest.mark.parametrize("park_after", [0.0, 0.05])
async def test_random_programs_go_on_from_random_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, park_after: float
):
    """Users write what no list of ours has: what it told once it must tell again, in that order."""
    await check(tmp_path, monkeypatch, park_after, programs=8)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("park_after", [0.0, 0.05])
async def test_many_random_programs_go_on_from_random_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, park_after: float
):
    """The same with twenty times as many."""
    await check(tmp_path, monkeypatch, park_after, programs=160)


async def check(folder: Path, monkeypatch: pytest.MonkeyPatch, park_after: float, programs: int) -> None:
    seed = int(os.environ.get("STREAMJOBS_TEST_SEED") or random.randrange(10**6))
    print(f"STREAMJOBS_TEST_SEED={seed}")  # noqa: T201 - shown with a failure
    chance = random.Random(seed)
    for _ in range(programs):
        number = chance.randrange(10**6)
        while not 4 < len(expected(program(number))) < 25:
            number = chance.randrange(10**6)
        monkeypatch.setenv("EFFECTS", str(folder / f"effects-{number}"))
        whole = await run(number, park_after)
        for length in chance.sample(range(2, len(whole.entries)), k=3):
            await run(number, park_after, whole, length)


async def run(number: int, park_after: float, whole: Desk | None = None, length: int = 0) -> Desk:
    """Run a program, from the beginning of a whole log where one is given; it ends right at once."""
    desk = Family(app, "program", {"seed": number}, park_after=park_after)
    if whole is not None:
        desk.artifacts = dict(whole.artifacts)
        desk.load(whole.entries[:length])
    await desk.finish(**dict.fromkeys(signals(program(number)), 1))
    assert not desk.of("job.retrying"), (number, length, desk.of("job.retrying"))
    assert desk.status == "completed", (number, length, desk.error)
    return desk
