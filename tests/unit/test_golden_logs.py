"""Logs that releases recorded: from each event of each, today's code goes on and does only what is missing.

`STREAMJOBS_TEST_WRITE=1` writes a log that is not there yet; those that are there are never written again.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from streamjobs.cursor import parse_cursor
from streamjobs.job import Fold
from streamjobs.store import Entry
from tests.desk import Desk
from tests.golden.programs import ANSWERS, PROGRAMS, made, model

LOGS = Path(__file__).parents[1] / "golden" / "logs"
ALL = sorted(LOGS.glob("*.jsonl"))


def desk(kind: str, done: Counter[str]) -> Desk:
    return Desk(made(done), kind, script=model, default_model="m")


def read(path: Path) -> list[Entry]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [Entry(parse_cursor(one["id"]), one["type"], json.dumps(one["data"]).encode()) for one in lines]


def recorded(entries: list[Entry]) -> set[str]:
    """Names of the steps whose outcome is in a log."""
    outcomes = {"step.completed"}
    return {json.loads(e.data)["key"].split(":")[0] for e in entries if e.type in outcomes}


@pytest.mark.parametrize("kind", PROGRAMS)
async def test_every_program_has_a_log(kind: str):
    """A way to record something that no log keeps may be changed by anybody."""
    path = LOGS / f"{kind}-1.jsonl"
    if os.environ.get("STREAMJOBS_TEST_WRITE") and not path.exists():
        whole = desk(kind, Counter())
        await whole.finish(**ANSWERS)
        rows = [{"id": str(e.cursor), "type": e.type, "data": json.loads(e.data)} for e in whole.entries]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert path.exists()


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_a_recorded_log_folds(path: Path):
    """After an update, nobody could look at what ran before it."""
    fold = Fold("j0-" + "a" * 26)
    for entry in read(path):
        fold.apply_all([entry])
    assert fold.status == "completed"


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
async def test_a_recorded_log_is_gone_on_from_at_every_event(path: Path):
    """After an update, jobs in the middle of their work would fail, or pay again."""
    entries = read(path)
    kind = path.stem.rpartition("-")[0]
    wanted = json.loads(entries[-1].data)["result"]
    for length in range(2, len(entries)):
        done: Counter[str] = Counter()
        job = desk(kind, done)
        job.load(entries[:length])
        if "again" not in recorded(entries[:length]) and '"key": "again' in str(entries[:length]):
            done["again"] = 1  # its first try has failed
        await job.finish(**ANSWERS)
        assert is_kept_in_doubt(job) or job.result == wanted, (length, entries[length - 1].type)
        assert not [name for name in recorded(entries[:length]) if done[name]], (length, done)


def is_kept_in_doubt(job: Desk) -> bool:
    """Whether the log ends within a `once` step: then nobody knows, and the workflow is told so."""
    return "step.unknown" in job.types
