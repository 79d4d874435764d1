"""import_transcript: 200,000 lines, a worker killed in the middle, and every line there once."""

from __future__ import annotations

import signal
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from examples.app import app
from examples.import_transcript import MAX_LINE, Source, import_batch
from streamjobs import Permanent
from tests.conftest import RedisProcess
from tests.harness import lab, sweeping, talking, worker_process, working

LINES = 200_000


def write(path: Path, count: int, bad: dict[int, bytes] | None = None) -> Path:
    """A transcript whose line n says "line n"; those of `bad` are something else."""
    lines = [b'{"speaker": "Ada", "text": "line %d", "at": %d.5}' % (n, n) for n in range(1, count + 1)]
    for number, line in (bad or {}).items():
        lines[number - 1] = line
    path.write_bytes(b"\n".join(lines))
    return path


def query(database: str, sql: str) -> list[Any]:
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute(sql).fetchall()


async def test_a_killed_import_goes_on_at_its_last_batch(redis: RedisProcess, root: Path):
    """An import of an hour would begin again after each deployment, or lose and double lines."""
    write(root / "talk.jsonl", LINES)
    async with lab(redis.url) as bench, sweeping(bench.store):
        job_id = await bench.submit("import_transcript", {"path": "talk.jsonl"})
        fault = "after_step_recorded:8"  # it kills itself: whoever watches may be late
        with worker_process(bench.store.settings, "examples.app:app", fault=fault) as worker:
            assert await worker.ended() == -signal.SIGKILL
        before = [event for event in await bench.log(job_id) if event.type == "step.completed"]
        assert len(before) < 41, "it was killed in the middle"
        async with working(bench.store, app):
            view = await bench.ended(job_id, timeout=90.0)
        log = await bench.log(job_id)
        await bench.healthy()
    assert view.status == "completed", view.error
    assert view.result | {"database": ""} == {"database": "", "lines": LINES, "messages": LINES, "bad": 0}
    assert query(view.result["database"], "SELECT count(*), min(line), max(line) FROM messages") == [
        (LINES, 1, LINES)
    ]
    assert query(view.result["database"], "SELECT count(*) FROM messages WHERE text != 'line ' || line") == [
        (0,)
    ]
    completed = [event.data["key"] for event in log if event.type == "step.completed"]
    assert len(completed) == len(set(completed)) == 41, "opening it, and each batch once"
    progress = [event.data["percent"] for event in log if event.type == "job.progress"]
    assert len(progress) == 40
    assert progress == sorted(progress)
    assert progress[-1] == 100


async def test_lines_that_are_no_messages_are_counted_and_shown(redis: RedisProcess, root: Path):
    """One broken line of 200,000 would stop the import, or vanish without a word."""
    bad = {
        2: b"{not json", 150: b'{"speaker": "Ada"}', 151: b"", 299: b'{"speaker": "\xff", "text": ""}',
        300: b'"' + b"x" * MAX_LINE + b'"',
    }  # fmt: skip
    write(root / "talk.jsonl", 300, bad)
    async with talking(redis.url, app=app) as bench:
        job_id = await bench.submit("import_transcript", {"path": "talk.jsonl", "batch": 100})
        view = await bench.ended(job_id)
        media_type, artifact = await bench.store.artifacts.get(job_id, "bad-lines.json")
        logged = [event for event in await bench.log(job_id) if event.type == "job.log"]
    assert view.status == "completed", view.error
    assert (view.result["lines"], view.result["messages"], view.result["bad"]) == (300, 295, 5)
    assert media_type == "application/json"
    assert [line["line"] for line in msgspec.json.decode(artifact)] == sorted(bad)
    assert [event.data["message"] for event in logged] == ["5 lines are no messages"]
    imported = query(view.result["database"], "SELECT line FROM messages ORDER BY line")
    assert [line for (line,) in imported] == [n for n in range(1, 301) if n not in bad]


def test_a_batch_that_was_committed_is_not_imported_again(root: Path, tmp_path: Path):
    """A worker that died between the database and the log would double a batch, or fail on it for ever."""
    file = write(root / "talk.jsonl", 250)
    stat = file.stat()
    source, database = Source(str(file), stat.st_size, stat.st_mtime_ns), str(tmp_path / "talk.sqlite")
    first = import_batch(source, database, 0, 0, 200)
    file.unlink()  # not a line of it is read again
    assert import_batch(source, database, 0, 0, 200) == first
    assert query(database, "SELECT count(*) FROM messages") == [(200,)]


def test_a_file_that_changes_under_an_import_is_refused(root: Path, tmp_path: Path):
    """Offsets into another file would lose lines and tear others apart, and nobody would know."""
    file = write(root / "talk.jsonl", 250)
    source = Source(str(file), file.stat().st_size, 1)
    with pytest.raises(Permanent, match="was changed"):
        import_batch(source, str(tmp_path / "talk.sqlite"), 0, 0, 200)


@pytest.mark.parametrize("path", ["../outside.jsonl", "/etc/passwd", "link", "missing.jsonl", "."])
async def test_paths_stay_below_the_root(redis: RedisProcess, root: Path, path: str):
    """Whoever may submit jobs could read every file of the machine."""
    write(root.parent / "outside.jsonl", 3)
    (root / "link").symlink_to(root.parent / "outside.jsonl")
    async with talking(redis.url, app=app) as bench:
        view = await bench.ended(await bench.submit("import_transcript", {"path": path}))
    assert view.status == "failed"
    assert view.error is not None
    assert "path: " in view.error.message
    assert view.attempt == 1


async def test_an_empty_file_is_an_empty_transcript(redis: RedisProcess, root: Path):
    """A file without lines would be an error, or an import that never ends."""
    (root / "talk.jsonl").touch()
    async with talking(redis.url, app=app) as bench:
        view = await bench.ended(await bench.submit("import_transcript", {"path": "talk.jsonl"}))
    assert view.status == "completed", view.error
    assert view.result["lines"] == 0
