"""nightly_report, by its schedule, on a repository whose day is known."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.app import app
from examples.nightly_report import Commit, commits_of, write, yesterday
from streamjobs.schedule import Schedule
from tests.conftest import RedisProcess, wait_until
from tests.examples.conftest import commit
from tests.harness import Lab, talking

DAY = "2026-03-03"


@pytest.fixture
def repository(root: Path) -> Path:
    """A repository with two commits of one day."""
    commit(root, {"a.txt": b"one\ntwo\n", "b.txt": b"x\n"}, "Begin")
    commit(root, {"a.txt": b"one\n", "c.bin": bytes(range(256))}, "Change *things* | <b>")
    return root


async def test_a_day_is_reported(redis: RedisProcess, repository: Path):
    """The report would miss commits, or count those of other days."""
    async with talking(redis.url, app=app) as bench:
        job_id = await bench.submit("nightly_report", {"day": DAY})
        view = await bench.ended(job_id)
        media_type, report = await bench.store.artifacts.get(job_id, "report.md")
        before = await bench.ended(await bench.submit("nightly_report", {"day": "2026-03-02"}))
    assert view.status == before.status == "completed", (view.error, before.error)
    assert view.result == {
        "day": DAY, "commits": 2, "files": 3, "added": 3, "removed": 1, "artifact": "report.md",
    }  # fmt: skip
    assert before.result["commits"] == 0
    assert media_type.startswith("text/markdown")
    assert "| Ada | 2 |" in report.decode()
    assert r"Change \*things\* \| \<b\> (+0 -1)" in report.decode()


async def test_the_schedule_gives_the_job(redis: RedisProcess, repository: Path):
    """The schedule would be declared with an input that its workflow does not take, and fail every night."""
    async with talking(redis.url, app=app) as bench:
        nightly = await wait_until(lambda: declared(bench), what="the schedule's declaration")
        receipt = await bench.store.schedules.trigger(nightly)
        view = await bench.ended(receipt.job_id)
    assert view.status == "completed", view.error
    assert view.result["day"] == yesterday()


async def declared(bench: Lab) -> str:
    records = await bench.store.schedules.of_owner("system")
    return next((record.id for record in records if record.schedule.name == "nightly"), "")


def test_it_comes_due_at_three_in_berlin():
    """The report would come in the middle of the day, or of its own day."""
    nightly: Schedule = app.schedules["nightly"]
    assert nightly.timing.cron == "0 3 * * *"
    assert nightly.timing.timezone == "Europe/Berlin"


async def test_the_edges_of_a_day_belong_to_one_day(root: Path, monkeypatch: pytest.MonkeyPatch):
    """A commit at midnight would be in two reports, or in none."""
    midnight = {f"GIT_{who}_DATE": "2026-03-03T00:00:00+0100" for who in ("AUTHOR", "COMMITTER")}
    monkeypatch.setattr("tests.examples.conftest.DATES", midnight)
    commit(root, {"a.txt": b"one\n"})
    found = [day for day in ("2026-03-02", "2026-03-03") if await commits_of(".", day)]
    assert found == ["2026-03-03"]


def test_a_long_report_is_cut():
    """A day of thousands of commits would be a report that nobody can open."""
    report = write(DAY, [Commit(str(n), f"person {n}", "words", [], 1, 1) for n in range(60)])
    assert report.count("\n- `") == 50
    assert report.endswith("- and 10 more\n")
