"""What a job queue must offer to be measured: two child processes and a count of finished jobs.

Rule 1: jobs go through the peer's normal client and its normal worker; nothing is stubbed.
Rule 2: counting must not disturb: one command of constant cost.
Rule 3: a job that failed fast is not a fast job: successes are counted after the run, where they are kept.
Rule 4: a peer that cannot run says why, and that sentence stands in the report.
"""

from __future__ import annotations

import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import redis

PAGE = 1_000


class Peer(ABC):
    """One job queue in the comparison."""

    name: ClassVar[str]
    concurrency: ClassVar[int] = 100
    recorded: ClassVar[str]
    """What is left in Redis about a finished job."""

    def prepare(self) -> str | None:
        """Install or find what is needed; return why that failed, or None."""
        return None

    @abstractmethod
    def version(self) -> str:
        """Return the version that runs."""

    @property
    @abstractmethod
    def tuning(self) -> str:
        """Say in a few words how it is configured."""

    @abstractmethod
    def enqueue_command(self, warmup: int, jobs: int) -> list[str]:
        """Return the child that adds `warmup + jobs` jobs and prints `{"jobs", "seconds"}` of the latter."""

    @abstractmethod
    def worker_command(self) -> list[str]:
        """Return the child that is one worker process."""

    def env(self, url: str) -> dict[str, str]:
        """Return what both children find in their environment."""
        return {"LOADTEST_REDIS_URL": url, "LOADTEST_CONCURRENCY": str(self.concurrency)}

    @abstractmethod
    def done(self, client: redis.Redis, total: int) -> int:
        """Count the finished jobs of `total` added ones."""

    def succeeded(self, client: redis.Redis, total: int) -> int:
        """Count the jobs recorded as a success, after the clock has stopped; `total` where none is kept."""
        return total


def installed_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def missing_package(package: str) -> str | None:
    """Return a reason if the package is not installed, else None."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f"{package} is not installed (extra `load`)"
    return None


def count_matching(
    client: redis.Redis, pattern: str, read: Callable[[Any, Any], object], is_success: Callable[[Any], bool]
) -> int:
    """Read the keys of a pattern in pipelines of `read(pipeline, key)`; count replies that are a success."""
    found = 0
    keys = list(client.scan_iter(match=pattern, count=5_000))
    for start in range(0, len(keys), PAGE):
        pipeline = client.pipeline(transaction=False)
        for key in keys[start : start + PAGE]:
            read(pipeline, key)
        found += sum(is_success(reply) for reply in pipeline.execute())
    return found
