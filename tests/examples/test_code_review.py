"""code_review, over this repository's own source and a file that has everything wrong."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from examples.app import app
from examples.code_review import AT_ONCE, check
from tests.conftest import RedisProcess
from tests.examples.conftest import commit
from tests.harness import lab, one_end, says, sweeping, talking, worker_process, working

SOURCE = Path(__file__).parents[2] / "src"

BAD = b"""\
def forgotten():
    try:
        pass
    except:  # TODO: say which
        return "TODO is no comment here"
"""
EXPECTED = {
    (1, "no-docstring", "the module has no docstring"),
    (1, "no-docstring", "forgotten has no docstring"),
    (4, "bare-except", "catches everything, also cancellation"),
    (4, "unfinished", "TODO: say which"),
}


@pytest.fixture
def repository(root: Path) -> Path:
    """This repository's source under git, and one bad file."""
    folder = root / "project"
    shutil.copytree(SOURCE, folder / "src", ignore=shutil.ignore_patterns("__pycache__"))
    commit(folder, {"src/bad.py": BAD, "tests/left_out.py": BAD, "README.md": b"# TODO\n"})
    return folder


async def test_a_repository_is_reviewed_and_summed_up(redis: RedisProcess, repository: Path):
    """The review would miss files, or sum up what nobody found."""
    async with talking(redis.url, says("One file is bad."), app=app) as bench:
        job_id = await bench.submit("code_review", {"path": "project", "below": "src"})
        view = await bench.ended(job_id, timeout=60.0)
        log = await bench.log(job_id)
        asked = bench.provider.requests[0]["messages"][-1]["content"]
    assert view.status == "completed", view.error
    files = sorted(path.relative_to(repository) for path in (repository / "src").rglob("*.py"))
    assert view.result["files"] == len(files) > 50
    found = {
        (f["line"], f["rule"], f["message"]) for f in view.result["findings"] if f["file"] == "src/bad.py"
    }
    assert found == EXPECTED
    assert view.result["findings"][0]["rule"] == "bare-except", "the worst comes first"
    assert view.result["summary"] == view.text == "One file is bad."
    assert '"file":"src/bad.py"' in asked
    assert most_open_steps([(event.type, event.data.get("key")) for event in log]) <= AT_ONCE


async def test_a_killed_review_reviews_no_file_again(redis: RedisProcess, repository: Path):
    """A review of thousands of files would begin again with every worker that goes."""
    async with lab(redis.url, says("Fine.")) as bench, sweeping(bench.store):
        job_id = await bench.submit("code_review", {"path": "project"})
        fault = "after_step_recorded:20"  # it kills itself: whoever watches may be late
        with worker_process(bench.store.settings, "examples.app:app", fault=fault) as worker:
            assert await worker.ended() == -signal.SIGKILL
        async with working(bench.store, app):
            view = await bench.ended(job_id, timeout=60.0)
        log = await bench.log(job_id)
        await bench.healthy()
    assert view.status == "completed", view.error
    assert one_end(log) == "job.completed"
    assert "job.lost" in {event.type for event in log}, "it was killed in the middle"
    completed = [event.data["key"] for event in log if event.type == "step.completed"]
    assert len(completed) == len(set(completed)) == view.result["files"] + 1


def test_sources_that_do_not_parse_are_findings():
    """One file in the Python of another age, or none at all, would fail the whole review."""
    for source in (b"print 'hello'\n", b"\0", b"\xff\xfe", b"x = (" * 300):
        [(_, rule, _)] = check(source)
        assert rule == "syntax"
    assert list(check(b"")) == []


def test_long_functions_are_found():
    """The rule would be there and never find anything."""
    long = '"""M."""\n\n\ndef f():\n    """D."""\n' + "    x = 1\n" * 60
    assert list(check(long.encode())) == [(4, "long-function", "f has 62 lines")]


def most_open_steps(log: list[tuple[str, str | None]]) -> int:
    running: set[str | None] = set()
    most = 0
    for kind, key in log:
        if kind == "step.started":
            running.add(key)
        elif kind == "step.completed":
            running.discard(key)
        most = max(most, len(running))
    return most
