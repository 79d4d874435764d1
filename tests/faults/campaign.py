"""The single-fault campaign: one worker killed at each named point of a workflow that does everything.

`python -m tests.faults.campaign` runs all of it and prints a table in Markdown.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from streamjobs import faults
from streamjobs.store import Entry
from tests.conftest import RedisProcess
from tests.desk import Desk
from tests.faults.workflows import SCENARIO, SETTINGS, answer, app, require_right
from tests.harness import Lab, lab, sweeping, worker_process, working

TARGET = "tests.faults.workflows:app"
LEASE = 1.0
LATER = (
    "after_step_started:5", "after_step_effect:3", "after_step_effect:8", "after_step_recorded:6",
    "after_artifact_stored:2", "before_tool_started:2", "after_tool_started:2", "after_tool_effect:2",
    "after_tool_completed:3", "after_turn_started:2", "after_turn_completed:2", "after_timer_set:3",
    "after_news_read:3", "after_load:3", "after_finish:2", "before_append:9",
    "after_append:14", "before_append:22",
)  # fmt: skip
"""The same points at another time: in other steps, the second tool, later waits."""


class Verdict(NamedTuple):
    """What came of one kill; nothing in `broken` if all that is promised held."""

    point: str
    recovered: float
    events: int
    broken: str = ""


async def passed_points(bench: Lab, patch: pytest.MonkeyPatch, effects: Path) -> Counter[str]:
    """How often a run that nobody disturbs passes each point."""
    passed: Counter[str] = Counter()
    patch.setattr(faults, "_ARMED", "all")
    patch.setattr(faults, "_strike", lambda name: passed.update([name]))
    async with working(bench.store, app):
        job_id = await bench.submit("everything", 1, queue=bench.store.settings.queues[0])
        await asyncio.gather(bench.ended(job_id, timeout=60.0), answer(bench, job_id))
    patch.undo()
    await require_right(bench, job_id, 1, effects)
    return passed


def queues_of(points: Sequence[str]) -> tuple[str, ...]:
    """A queue for each point, so that its job meets the worker that is to die there."""
    return tuple(point.replace(":", "-") for point in points)


async def strike(bench: Lab, point: str, effects: Path) -> Verdict:
    """Kill a worker at `point`, let another go on, and examine what it came to."""
    (queue,) = queues_of([point])
    own = msgspec.structs.replace(bench.store.settings, queues=(queue,))
    with worker_process(own, TARGET, fault=point, env={"EFFECTS": str(effects)}) as victim:
        job_id = await bench.submit("everything", 1, queue=queue)
        answering = asyncio.create_task(answer(bench, job_id))
        assert await victim.ended(60.0) == -signal.SIGKILL
    died = time.monotonic()
    try:
        async with working(bench.store, app, queues=[queue]):
            await bench.ended(job_id, timeout=60.0)
        recovered = time.monotonic() - died
        events = len(await require_right(bench, job_id, 1, effects))
        await require_replays(bench, job_id)
    except AssertionError as error:
        return Verdict(point, time.monotonic() - died, 0, _told(error))
    finally:
        answering.cancel()
    return Verdict(point, recovered, events)


def _told(error: AssertionError) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{where.name}: {where.line} {error}".replace("|", "/")


async def require_replays(bench: Lab, job_id: str) -> None:
    """A worker that gets the log as it was before its end does nothing again and ends with the same."""
    entries: list[Entry] = []
    async for page in bench.store.log.pages(job_id):
        entries.extend(page.entries)
    desk = Desk(app, "everything", 1, job_id=job_id, **(SETTINGS | {"default_model": "m"}))
    for name in {content["name"] for kind, content in desk.read(entries) if kind == "artifact.created"}:
        _, desk.artifacts[job_id, name] = await bench.store.artifacts.get(job_id, name)
    desk.load(entries[:-1])
    await desk.run()
    assert desk.result == desk.read(entries)[-1][1]["result"]
    assert desk.types[len(entries) - 1 :] == ["job.lost", "job.started", "job.completed"]


async def campaign(bench: Lab, points: Sequence[str], effects: Path, *, together: int) -> list[Verdict]:
    """Strike at every point, a few at a time."""
    slots = asyncio.Semaphore(together)

    async def one(point: str) -> Verdict:
        async with slots:
            return await strike(bench, point, effects)

    async with sweeping(bench.store):
        return list(await asyncio.gather(*(one(point) for point in points)))


def table(verdicts: Sequence[Verdict]) -> str:
    """The verdicts in Markdown."""
    rows = [
        f"| `{v.point}` | {v.recovered:.1f} s | {v.events} | {v.broken or 'all hold'} |" for v in verdicts
    ]
    return "\n".join(["| killed at | ended after | events | invariants |", "|---|---|---|---|", *rows])


async def main() -> int:
    """Run all of it; 1 if anything is broken."""
    points = (*faults.WORKER_POINTS, *LATER)
    with tempfile.TemporaryDirectory(prefix="sj-") as folder:
        effects = Path(folder) / "effects"
        os.environ["EFFECTS"] = str(effects)
        redis = RedisProcess(Path(folder))
        redis.start()
        try:
            async with lab(redis.url, SCENARIO, lease=LEASE, queues=queues_of(points), **SETTINGS) as bench:
                verdicts = await campaign(bench, points, effects, together=3)
                await bench.healthy()
        finally:
            redis.stop()
    print(f"A lease is {LEASE:g} s; an undisturbed job takes about 3 s.\n\n{table(verdicts)}")  # noqa: T201
    return int(any(verdict.broken for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
