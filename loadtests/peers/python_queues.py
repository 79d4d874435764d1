"""The Python queues: saq, and taskiq over Redis streams."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import redis

from loadtests.peers.peer import Peer, count_matching, installed_version, missing_package
from loadtests.processes import python


class Saq(Peer):
    """saq with its own worker command line."""

    name: ClassVar[str] = "saq"
    recorded: ClassVar[str] = "the job and its result, for 10 minutes"

    def prepare(self) -> str | None:
        return missing_package("saq")

    def version(self) -> str:
        return installed_version("saq")

    @property
    def tuning(self) -> str:
        return f"concurrency {self.concurrency}, uvloop, hiredis, orjson, blocking pool"

    def enqueue_command(self, warmup: int, jobs: int) -> list[str]:
        return python("-m", "loadtests.peers.saq_queue", "enqueue", str(warmup), str(jobs))

    def worker_command(self) -> list[str]:
        return python("-m", "saq", "loadtests.peers.saq_queue.settings")

    def done(self, client: redis.Redis, total: int) -> int:
        incomplete: Any = client.zcard("saq:default:incomplete")
        return total - incomplete

    def succeeded(self, client: redis.Redis, total: int) -> int:
        return count_matching(client, "saq:job:default:*", lambda p, key: p.get(key), _is_settled)


class TaskiqStreams(Peer):
    """taskiq with the stream broker of taskiq-redis and its own worker command line, one process."""

    name: ClassVar[str] = "taskiq-redis streams"
    recorded: ClassVar[str] = "the message; no state, no result"

    def prepare(self) -> str | None:
        return missing_package("taskiq") or missing_package("taskiq-redis")

    def version(self) -> str:
        return f"{installed_version('taskiq-redis')} (taskiq {installed_version('taskiq')})"

    @property
    def tuning(self) -> str:
        return f"concurrency {self.concurrency}, uvloop, hiredis, orjson, no result backend, reads of 200"

    def enqueue_command(self, warmup: int, jobs: int) -> list[str]:
        return python("-m", "loadtests.peers.taskiq_streams", "enqueue", str(warmup), str(jobs))

    def worker_command(self) -> list[str]:
        arguments = ("--workers", "1", "--log-level", "WARNING", "--no-parse")
        tasks = ("--max-async-tasks", str(self.concurrency), "--max-prefetch", str(self.concurrency))
        return python("-m", "taskiq", "worker", "loadtests.peers.taskiq_streams:broker", *arguments, *tasks)

    def done(self, client: redis.Redis, total: int) -> int:
        groups: Any = client.xinfo_groups("taskiq")
        return sum((group["entries-read"] or 0) - group["pending"] for group in groups)


def _is_settled(record: bytes | None) -> bool:
    """Whether a job is complete, or was swept.

    saq sweeps when its worker starts, and takes a job that was moved but not yet marked for a lost one: of
    the first jobs of the warm-up one or two are aborted so.
    """
    if record is None:
        return False
    job = json.loads(record)
    return job["status"] == "complete" or job.get("error") == "swept"
