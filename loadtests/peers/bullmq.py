"""BullMQ: the newest release from npm, installed once into an ignored folder of the repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import redis

from loadtests.peers import node
from loadtests.peers.peer import Peer

FOLDER = node.CACHE / "bullmq"
PACKAGES = ("bullmq@latest", "ioredis@latest")
SCRIPT = Path(__file__).with_suffix(".mjs")


class BullMQ(Peer):
    """BullMQ on Node with ioredis, completed jobs kept as it does by default."""

    name: ClassVar[str] = "BullMQ"
    concurrency: ClassVar[int] = 150
    recorded: ClassVar[str] = "the job, its times and result; the last 10,000 events of the queue"

    def prepare(self) -> str | None:
        return node.missing(FOLDER, PACKAGES)

    def version(self) -> str:
        bullmq, ioredis = (node.package_version(FOLDER, name) for name in ("bullmq", "ioredis"))
        return f"{bullmq} (ioredis {ioredis}, node {node.node_version()})"

    @property
    def tuning(self) -> str:
        return f"concurrency {self.concurrency}, addBulk of 1,000"

    def enqueue_command(self, warmup: int, jobs: int) -> list[str]:
        return [*node.node(), str(SCRIPT), "enqueue", str(warmup), str(jobs)]

    def worker_command(self) -> list[str]:
        return [*node.node(), str(SCRIPT), "worker"]

    def env(self, url: str) -> dict[str, str]:
        return super().env(url) | {"LOADTEST_NODE_MODULES": str(FOLDER), "NODE_ENV": "production"}

    def done(self, client: redis.Redis, total: int) -> int:
        completed: Any = client.zcard("bull:noop:completed")
        return completed
