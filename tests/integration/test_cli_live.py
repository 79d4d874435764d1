"""The commands against the real thing: `streamjobs dev` in a process of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.dev import ENVIRONMENT, running_dev


def streamjobs(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "streamjobs", *words],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_dev(tmp_path_factory.mktemp("dev")) as (_, url):
        yield url


def test_submit_and_watch_to_the_end(url: str) -> None:
    """Without it, the README's first commands do not fit together."""
    done = streamjobs("submit", "--url", url, "--prompt", "Say hello", "--watch", "--json")
    assert done.returncode == 0, done.stderr
    submitted, *events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events[0]["type"] == "job.queued"
    assert events[-1]["type"] == "job.completed"
    assert [int(event["id"].partition("-")[0]) for event in events] == list(range(1, len(events) + 1))
    shown = json.loads(streamjobs("status", "--url", url, submitted["id"], "--json").stdout)
    assert shown["status"] == "completed"
    again = streamjobs("watch", "--url", url, submitted["id"], "--after", events[3]["id"], "--json")
    assert [json.loads(line) for line in again.stdout.splitlines()] == events[4:]


def test_cancel_twice(url: str) -> None:
    """Without it, an impatient person gets an error for asking again."""
    later = streamjobs("submit", "--url", url, "--prompt", "Hi", "--queue", "default", "--json")
    job_id = json.loads(later.stdout)["id"]
    answers = [streamjobs("cancel", "--url", url, job_id, "--json") for _ in range(2)]
    if answers[0].returncode == 0:  # it may have completed before
        assert answers[0].stdout == answers[1].stdout
    else:
        assert "job_ended" in answers[0].stderr


def test_refusals_are_one_line(url: str) -> None:
    """Without it, a typo is a page of Python."""
    for words in (("submit", "nosuchkind"), ("status", "j0-" + "a" * 26), ("watch", "nonsense")):
        done = streamjobs(*words, "--url", url)
        assert done.returncode == 1, words
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert "Traceback" not in done.stderr


def test_sigterm_ends_dev_in_order(tmp_path: Path) -> None:
    """Without it, ctrl-c leaves a redis-server behind, or loses what was being done."""
    with running_dev(tmp_path) as (process, url):
        assert streamjobs("submit", "--url", url, "--prompt", "Hi").returncode == 0
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 0
    assert not (tmp_path / "redis.sock").exists() or not _answers(tmp_path / "redis.sock")


def _answers(path: Path) -> bool:
    import socket

    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True
