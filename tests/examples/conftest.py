"""What the examples' tests share: a folder to read, one to write, and git repositories."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

import pytest

DATES = {"GIT_AUTHOR_DATE": "2026-03-03T12:00:00+0100", "GIT_COMMITTER_DATE": "2026-03-03T12:00:00+0100"}
NOBODY = {
    "GIT_AUTHOR_NAME": "Ada", "GIT_AUTHOR_EMAIL": "ada@example.org", "GIT_COMMITTER_NAME": "Ada",
    "GIT_COMMITTER_EMAIL": "ada@example.org", "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1",
}  # fmt: skip


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the examples may read; what they write is in `output` beside it."""
    folder = tmp_path / "root"
    folder.mkdir()
    monkeypatch.setenv("EXAMPLES_ROOT", str(folder))
    monkeypatch.setenv("EXAMPLES_OUTPUT", str(tmp_path / "output"))
    monkeypatch.setenv("EXAMPLES_CLONE_SCHEMES", "https,file")
    return folder


def git(folder: Path, *arguments: str) -> str:
    environment = os.environ | NOBODY | DATES
    return subprocess.check_output(("git", "-C", folder, *arguments), env=environment, text=True)


def commit(folder: Path, files: dict[str, bytes], message: str = "Files") -> str:
    """Write files into a repository, which is made, and commit them; the commit's id."""
    if not (folder / ".git").exists():
        folder.mkdir(exist_ok=True)
        git(folder, "init", "--quiet", "--initial-branch=main")
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", message)
    return git(folder, "rev-parse", "HEAD").strip()


def noise(count: int, size: int) -> dict[str, bytes]:
    """Files that do not compress, so that a clone takes as long as it has bytes."""
    chance = random.Random(7)
    return {f"data/{number}.bin": chance.randbytes(size) for number in range(count)}
