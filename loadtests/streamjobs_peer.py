"""streamjobs as the load tests see it; the one module that knows its names.

As a child: `python -m loadtests.streamjobs_peer noop <warmup> <jobs>` enqueues no-ops and prints its timing
as JSON; `... chat <jobs> <model>` submits chat jobs and prints their ids; `... cancel <interval> <id> ...`
cancels them, one every so many seconds, and prints what was answered.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from typing import Any, ClassVar

import redis
import uvloop

from loadtests.peers.peer import Peer, count_matching
from loadtests.processes import python
from streamjobs.confidential import decrypt
from streamjobs.config import load_settings
from streamjobs.encryption import Cipher, Keyring
from streamjobs.store import Store, Submission

BATCH = 500
OWNERS = 20
QUEUE = "default"
ENCRYPT = "LOADTESTS_ENCRYPT"
"""The variable that has every job encrypted; `--encrypt` sets it."""
_KEY = "load:" + base64.b64encode(bytes(32)).decode()
COUNTS = "sj:{0}:counts"
FEED = "sj:{0}:feed"
HASHES = "sj:{0}:job:" + "?" * 29


class Streamjobs(Peer):
    """streamjobs with its full event log: queued, started, completed."""

    name: ClassVar[str] = "streamjobs"
    concurrency: ClassVar[int] = 400
    recorded: ClassVar[str] = "its whole event log, its state, its owner's feed, notes for projections"

    def version(self) -> str:
        return importlib.metadata.version("streamjobs")

    @property
    def tuning(self) -> str:
        return f"concurrency {self.concurrency}, submit_many of {BATCH}, {OWNERS} owners without a limit"

    def enqueue_command(self, warmup: int, jobs: int) -> list[str]:
        return python("-m", "loadtests.streamjobs_peer", "noop", str(warmup), str(jobs))

    def worker_command(self) -> list[str]:
        return worker_command("loadtests.noop_app:app", self.concurrency)

    def env(self, url: str) -> dict[str, str]:
        return super().env(url) | settings_env(url)

    def done(self, client: redis.Redis, total: int) -> int:
        return total - unended(client)

    def succeeded(self, client: redis.Redis, total: int) -> int:
        return count_matching(client, HASHES, lambda p, key: p.hmget(key, "status", "seq"), _is_whole)


def worker_command(app: str, concurrency: int) -> list[str]:
    return python("-m", "streamjobs", "worker", app, "--concurrency", str(concurrency))


def settings_env(url: str, **settings: str) -> dict[str, str]:
    """Return the settings of every streamjobs process here, as environment variables."""
    unlimited = dict.fromkeys(("owner_limit", "owner_waiting", "owner_streams"), "0")
    chosen = unlimited | {"redis_url": url, "log_level": "warning"} | settings
    if os.environ.get(ENCRYPT):
        chosen["encryption_keys"] = _KEY
    return {f"STREAMJOBS_{name.upper()}": value for name, value in chosen.items()}


def _is_whole(reply: list[bytes]) -> bool:
    """Whether a job has completed in its first run: its log is queued, started, completed."""
    return reply == [b"completed", b"3"]


def events_key(job_id: str) -> str:
    return f"sj:{{0}}:job:{job_id}:events"


def content_of(client: redis.Redis, job_id: str, kind: str, content: bytes) -> bytes:
    """Return an event's content as it was written, also where jobs are encrypted."""
    return content if not os.environ.get(ENCRYPT) else decrypt(_cipher(client, job_id), kind, content)


@functools.lru_cache(maxsize=1)
def _cipher(client: redis.Redis, job_id: str) -> Cipher:
    record: Any = client.get(f"{hash_key(job_id)}:datakey")
    return Keyring.parse([_KEY]).cipher(job_id, record.decode())


def hash_key(job_id: str) -> str:
    return f"sj:{{0}}:job:{job_id}"


def sealed_key(job_id: str) -> str:
    return f"sj:{{0}}:job:{job_id}:sealed"


def live_channel(job_id: str) -> str:
    return f"sj:{{0}}:live:{job_id}"


def job_kinds(client: redis.Redis) -> dict[str, float]:
    """Return bytes a job by kind of key, of those that grow with the jobs."""
    jobs, sizes = 0, dict[str, int]()
    names: list[bytes] = list(client.scan_iter(match="sj:*", count=5_000))
    for start in range(0, len(names), BATCH):
        page = names[start : start + BATCH]
        pipeline = client.pipeline(transaction=False)
        for name in page:
            pipeline.memory_usage(name, samples=0)
        for name, size in zip(page, pipeline.execute(), strict=True):
            kind = kind_of(name.decode())
            sizes[kind] = sizes.get(kind, 0) + size
            jobs += kind == "job:<id>"
    return {kind: size / jobs for kind, size in sorted(sizes.items()) if size >= jobs}


def kind_of(name: str) -> str:
    """Say what a key is, whatever job or owner it is of."""
    parts = name.split(":")[2:]
    return ":".join(["<id>" if n == 1 else part for n, part in enumerate(parts)])


def unended(client: redis.Redis) -> int:
    """Count the jobs that wait, are held or run: one HMGET."""
    fields = [f"{place}:{QUEUE}" for place in ("waiting", "held", "running")]
    counts: Any = client.hmget(COUNTS, fields)
    return sum(int(count or 0) for count in counts)


async def enqueue(warmup: int, jobs: int) -> None:
    """Add no-ops; time those after the warm-up."""
    async with opened() as store:
        await add(store, warmup)
        started = time.perf_counter()
        await add(store, jobs)
        seconds = time.perf_counter() - started
    print(json.dumps({"jobs": jobs, "seconds": seconds}))


async def add(store: Store, count: int) -> None:
    for start in range(0, count, BATCH):
        numbers = range(start, min(start + BATCH, count))
        await store.jobs.submit_many(
            [Submission(kind="noop", owner=f"owner-{n % OWNERS}", input=b"%d" % n) for n in numbers]
        )


async def chat(jobs: int, model: str) -> None:
    """Submit chat jobs in one batch; each prompt is numbered."""
    async with opened() as store:
        receipts = await store.jobs.submit_many(
            [
                Submission(kind="chat", owner=f"owner-{n % OWNERS}", input=_chat_input(n, model))
                for n in range(jobs)
            ]
        )
    print(json.dumps({"ids": [receipt.job_id for receipt in receipts]}))


def _chat_input(number: int, model: str) -> bytes:
    return json.dumps({"prompt": f"stream {number}", "model": model, "tools": []}).encode()


async def cancel(interval: float, ids: list[str]) -> None:
    """Cancel jobs, each at its time, however long the answers take."""
    async with opened() as store:

        async def one(index: int) -> str:
            await asyncio.sleep(index * interval)
            return await store.jobs.cancel(ids[index], by="load")

        answers = await asyncio.gather(*(one(index) for index in range(len(ids))))
    print(json.dumps({"answers": answers}))


@contextlib.asynccontextmanager
async def opened() -> AsyncIterator[Store]:
    store = await Store.open(load_settings())
    try:
        yield store
    finally:
        await store.aclose()


if __name__ == "__main__":
    _, verb, first, *rest = sys.argv
    match verb:
        case "chat":
            uvloop.run(chat(int(first), rest[0]))
        case "cancel":
            uvloop.run(cancel(float(first), rest))
        case _:
            uvloop.run(enqueue(int(first), int(rest[0])))
