"""clone_repo, on repositories of its own and a server that takes its time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from examples.app import app
from examples.clone_repo import Clone, is_there
from streamjobs.errors import Invalid
from tests.conftest import RedisProcess, wait_until
from tests.examples.conftest import commit, noise
from tests.harness import lab, one_end, sweeping, talking, worker_process, working

SLOW_SERVER = """#!/bin/sh
echo $$ >> {pids}
git --exec-path={git_core} upload-pack "$@" | {python} {throttle}
"""
THROTTLE = """
import os, time
while piece := os.read(0, 16384):
    os.write(1, piece)
    time.sleep(0.03)
"""


@pytest.fixture
def repository(root: Path) -> Path:
    """A repository of half a megabyte that does not compress."""
    commit(root / "origin", noise(count=128, size=4096))
    return root / "origin"


@pytest.fixture
def pids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes every git server slow; the file has the process ids of those that ran."""
    throttle, pids, commands = tmp_path / "throttle.py", tmp_path / "pids", tmp_path / "git-core"
    commands.mkdir()
    git_core = Path(subprocess.check_output(["git", "--exec-path"], text=True).strip())
    for command in git_core.iterdir():
        (commands / command.name).symlink_to(command)
    server = commands / "git-upload-pack"
    server.unlink()
    throttle.write_text(THROTTLE)
    server.write_text(
        SLOW_SERVER.format(pids=pids, python=sys.executable, throttle=throttle, git_core=git_core)
    )
    server.chmod(0o755)
    monkeypatch.setenv("GIT_EXEC_PATH", str(commands))
    return pids


def clones(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "output" / "clones").iterdir())


def is_running(pids: Path) -> bool:
    return any(Path(f"/proc/{pid}").exists() for pid in pids.read_text().split())


async def test_a_repository_is_cloned_with_progress(
    redis: RedisProcess, tmp_path: Path, repository: Path, pids: Path
):
    """Somebody who clones a large repository would look at nothing for minutes."""
    async with talking(redis.url, app=app) as bench:
        job_id = await bench.submit("clone_repo", {"url": f"file://{repository}"})
        view = await bench.ended(job_id)
        log = await bench.log(job_id)
    assert view.status == "completed", view.error
    assert view.result["files"] == 128
    assert view.result["bytes"] == 128 * 4096
    assert (Path(view.result["path"]) / ".git" / "HEAD").exists()
    assert clones(tmp_path) == [Path(view.result["path"]).name]
    told = [event.data["percent"] for event in log if event.type == "job.progress"]
    assert len([percent for percent in told if 5 < percent < 80]) > 10
    assert told == sorted(set(told))


async def test_cancel_kills_git_and_removes_the_half_clone(
    redis: RedisProcess, tmp_path: Path, repository: Path, pids: Path
):
    """A cancelled clone would go on downloading, or leave a folder that looks like a repository."""
    async with talking(redis.url, app=app) as bench:
        job_id = await bench.submit("clone_repo", {"url": f"file://{repository}"})
        await bench.until(job_id, "job.progress", 5)
        assert len(clones(tmp_path)) == 1, "git is at work"
        await bench.store.jobs.cancel(job_id, by="test", reason="changed my mind")
        view = await bench.ended(job_id)
        log = await bench.log(job_id)
        await wait_until(lambda: not is_running(pids), what="the end of all that git started")
    assert (view.status, one_end(log)) == ("cancelled", "job.cancelled")
    assert clones(tmp_path) == []


async def test_a_killed_worker_leaves_no_half_clone_behind(
    redis: RedisProcess, tmp_path: Path, repository: Path, pids: Path
):
    """After kill -9 the next worker would meet a half clone and call it the repository, or fail for ever."""
    async with lab(redis.url) as bench, sweeping(bench.store):
        job_id = await bench.submit("clone_repo", {"url": f"file://{repository}"})
        with worker_process(bench.store.settings, "examples.app:app") as worker:
            await bench.until(job_id, "job.progress", 5)
            worker.kill()
        await wait_until(lambda: not is_running(pids), what="the end of the git that nobody reads any more")
        assert [name for name in clones(tmp_path) if name[0] != "."] == [], "no half clone has its name"
        (tmp_path / "output" / "clones" / f".origin-{job_id}.dead" / ".git").mkdir(parents=True)
        async with working(bench.store, app):
            view = await bench.ended(job_id, timeout=60.0)
    assert view.status == "completed", view.error
    assert view.result["files"] == 128
    assert clones(tmp_path) == [Path(view.result["path"]).name]


def test_a_whole_clone_is_not_made_again(tmp_path: Path):
    """A worker that died between the clone and the log would clone twice, or trip over the first clone."""
    target = tmp_path / "repo-0-1"
    for folder in (target, tmp_path / ".repo-0-1.aaaa", tmp_path / ".repo-0-2.bbbb"):
        (folder / ".git").mkdir(parents=True)
    assert is_there(target)
    assert sorted(path.name for path in tmp_path.iterdir() if "repo" in path.name) == [
        ".repo-0-2.bbbb",
        "repo-0-1",
    ], "another job's half clone is left alone"


@pytest.mark.parametrize(
    "given",
    [
        {"url": "--upload-pack=touch /tmp/owned"},
        {"url": "ext::sh -c touch% /tmp/owned"},
        {"url": "ssh://example.org/repo"},
        {"url": "/etc"},
        {"url": "https://"},
        {"url": "https://me:secret@example.org/repo.git"},
        {"url": "https://example.org/repo.git", "branch": "--config=core.pager=x"},
        {"url": "https://example.org/repo.git", "shallow": True},
    ],
    ids=lambda given: str(given)[:40],
)
def test_what_is_no_repository_is_refused(given: dict[str, object]):
    """An URL could be an option of git, run a command, or put a password into the log."""
    with pytest.raises(Invalid, match=r"^input"):
        app.check_submission("clone_repo", msgspec.json.encode(given))


async def test_a_repository_that_is_not_there_fails_once(redis: RedisProcess, tmp_path: Path, root: Path):
    """A typing error would be tried again for minutes, and its reason would be lost."""
    async with talking(redis.url, app=app) as bench:
        job_id = await bench.submit("clone_repo", {"url": f"file://{root}/nothing"})
        view = await bench.ended(job_id)
    assert view.status == "failed"
    assert view.error is not None
    assert "does not appear to be a git repository" in view.error.message
    assert view.attempt == 1
    assert clones(tmp_path) == []


def test_folders_are_named_after_repositories():
    """A repository's name could lead out of the folder, or hide the clone."""
    assert Clone("https://example.org/some/Thing.git/").name == "Thing"
    assert Clone("https://example.org/..").name == "__"
