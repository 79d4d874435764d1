"""streamjobs in the steps scenario. As a child: `python -m loadtests.streamjobs_steps <first> <count> <rate>`
submits workflows and prints what it submitted."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import redis

from loadtests import pacing, redis_server
from loadtests.bench import Bench
from loadtests.pacing import Plan, Submitted
from loadtests.processes import python
from loadtests.step_system import Outcome, Site, StepSystem
from loadtests.streamjobs_peer import (
    BATCH,
    OWNERS,
    events_key,
    hash_key,
    opened,
    settings_env,
    worker_command,
)
from streamjobs.store import Receipt, Submission

CONCURRENCY = 400
PAGE = 100


class StreamjobsSteps(StepSystem):
    """A workflow of `ctx.step`s through one `streamjobs worker`."""

    name: ClassVar[str] = "streamjobs"
    store: ClassVar[str] = "redis"
    tuning: ClassVar[str] = (
        f"concurrency {CONCURRENCY}, {OWNERS} owners without a limit, other settings as they come; Redis as "
        "in the other scenarios; at once means submit_many"
    )

    def version(self) -> str:
        server = redis_server.version(redis_server.find_binary())
        return f"{importlib.metadata.version('streamjobs')} (Redis {server})"

    @contextmanager
    def opened(self, bench: Bench) -> Iterator[Site]:
        with redis_server.fresh_server(bench.binary) as server:
            yield Site(server.url, server.child)

    def env(self, site: Site) -> dict[str, str]:
        return settings_env(site.url)

    def worker_command(self) -> list[str]:
        return worker_command("loadtests.steps_app:app", CONCURRENCY)

    def submit_command(self, plan: Plan) -> list[str]:
        return python("-m", "loadtests.streamjobs_steps", *plan.arguments())

    def outcomes(self, site: Site, ids: Sequence[str]) -> dict[str, Outcome]:
        found: dict[str, Outcome] = {}
        with redis.Redis.from_url(site.url, socket_timeout=10.0) as client:
            for start in range(0, len(ids), PAGE):
                page = ids[start : start + PAGE]
                pipeline = client.pipeline(transaction=False)
                for job_id in page:
                    pipeline.hmget(hash_key(job_id), "status", "ended")
                    pipeline.xrange(events_key(job_id))
                replies: list[Any] = pipeline.execute()
                for job_id, (status, ended), log in zip(page, replies[::2], replies[1::2], strict=True):
                    if status == b"completed":
                        steps = sum(fields[b"t"] == b"step.completed" for _, fields in log)
                        found[job_id] = Outcome(int(ended) / 1000, steps)
        return found


async def submit(plan: Plan) -> Submitted:
    """Submit in batches where no rate is asked for, else one by one."""
    async with opened() as store:

        async def one(number: int) -> str:
            return (await store.jobs.submit(_submission(number))).job_id

        if plan.rate:
            return await pacing.submit_all(plan, one)
        receipts: list[Receipt] = []
        at: list[float] = []
        for start in range(plan.first, plan.first + plan.count, BATCH):
            numbers = range(start, min(start + BATCH, plan.first + plan.count))
            at += [time.time()] * len(numbers)
            receipts += await store.jobs.submit_many([_submission(number) for number in numbers])
        return Submitted([receipt.job_id for receipt in receipts], at)


def _submission(number: int) -> Submission:
    return Submission(kind="ten-steps", owner=f"owner-{number % OWNERS}", input=b"%d" % number)


if __name__ == "__main__":
    pacing.run(submit)
