"""Redis dies, is away, or is full under a running worker: all jobs end, and nothing spins meanwhile."""

from __future__ import annotations

import asyncio
import time

import pytest
import redis as sync_redis

from streamjobs.errors import StoreFull
from streamjobs.store import Submission
from streamjobs.testing import Scenario, ScriptedCall, Turn
from streamjobs.testing.scenario import EndlessFault
from tests.conftest import RedisProcess, wait_until
from tests.faults.app import app
from tests.harness import Lab, lab, one_end, one_outcome_each, says, talking, working
from tests.proxy import proxying

WORDS = "It goes on and on, whatever happens below. " * 4


async def all_whole(bench: Lab, jobs: list[str]) -> None:
    """Every job completed with its words, and the store is sound."""
    for job_id in jobs:
        view = await bench.view(job_id)
        assert (view.status, view.text) == ("completed", WORDS), view.error
        assert one_end(await bench.log(job_id)) == "job.completed"
    await bench.healthy()


async def test_redis_killed_and_started_again(own_redis: RedisProcess):
    """A crash of the store costs seconds, not jobs: its append-only file has all that was acknowledged."""
    async with lab(own_redis.url, says(WORDS, rate=30.0), lease=2.0) as bench, working(bench.store):
        jobs = [await bench.chat(str(n)) for n in range(20)]
        for job_id in jobs:
            await bench.until(job_id, "text.delta")
        own_redis.kill(9)
        await asyncio.sleep(1.0)
        own_redis.start()
        await bench.ended(*jobs, timeout=90.0)
        await all_whole(bench, jobs)


async def test_an_outage_is_waited_for_without_a_hot_loop(own_redis: RedisProcess):
    """A fleet that hammers a Redis that comes back is what keeps it from coming back."""
    scenario = says(WORDS, rate=60.0)
    async with proxying(own_redis.port) as proxy, talking(proxy.url, scenario, lease=2.0) as bench:
        jobs = [await bench.chat(str(n)) for n in range(20)]
        for job_id in jobs:
            await bench.until(job_id, "text.delta")
        proxy.mode = "refuse"
        proxy.abort_all()
        before, cpu = proxy.connections, time.process_time()
        await asyncio.sleep(4.0)
        assert proxy.connections - before < 4.0 * 50
        assert time.process_time() - cpu < 2.0
        proxy.mode = "pass"
        await bench.ended(*jobs, timeout=90.0)
        await all_whole(bench, jobs)
        assert not [job_id for job_id in jobs if "job.lost" in await bench.types(job_id)]


async def test_memory_stays_bounded_while_redis_is_away(own_redis: RedisProcess):
    """A model that talks on during an outage is not read on: its words would pile up here."""
    endless = Scenario(turns=[Turn(text="word " * 50, faults=[EndlessFault()])])
    async with proxying(own_redis.port) as proxy:
        changes = {"lease": 60.0, "recorder_bytes": 20_000}
        async with lab(proxy.url, endless, **changes) as bench, working(bench.store) as worker:
            job_id = await bench.chat()
            await bench.until(job_id, "text.delta", 3)
            proxy.mode = "refuse"
            proxy.abort_all()
            (execution,) = worker._executions.values()
            await wait_until(lambda: execution.journal.unwritten >= 20_000, what="a full journal")
            await asyncio.sleep(1.0)
            assert 20_000 <= execution.journal.unwritten < 200_000
            proxy.mode = "pass"
            seq = (await bench.log(job_id))[-1].cursor.seq
            await wait_until(lambda: goes_on(bench, job_id, seq))
            await bench.store.jobs.cancel(job_id)
            assert (await bench.ended(job_id)).status == "cancelled"


async def goes_on(bench: Lab, job_id: str, seq: int) -> bool:
    return (await bench.store.jobs.get(job_id)).last.seq > seq + 5


async def test_a_full_redis_refuses_new_jobs_and_lets_running_ones_end(
    own_redis: RedisProcess, monkeypatch: pytest.MonkeyPatch, tmp_path: object
):
    """At the limit the system drains: if running jobs could not end, nothing would ever free memory."""
    monkeypatch.setenv("EFFECTS", f"{tmp_path}/effects")
    call = ScriptedCall(name="slow", arguments={"seconds": 1.0})
    scenario = Scenario(turns=[Turn(text="Calling. ", tool_calls=[call]), Turn(text=WORDS, rate=100.0)])
    async with lab(own_redis.url, scenario, lease=5.0) as bench, working(bench.store, app) as worker:
        jobs = [await bench.chat(str(n), tools=["slow"]) for n in range(5)]
        for job_id in jobs:
            await bench.until(job_id, "tool.started")
        with own_redis.client() as client:
            limit_memory(client)
            with pytest.raises(StoreFull):
                await bench.store.jobs.submit(Submission(kind="chat", input=b'{"prompt": "no"}'))
            await bench.ended(*jobs, timeout=60.0)
            assert worker.running == 0
            client.config_set("maxmemory", 0)
        for job_id in jobs:
            view = await bench.view(job_id)
            assert (view.status, view.text) == ("completed", "Calling. " + WORDS), view.error
            one_outcome_each(await bench.log(job_id))
        assert (await bench.run("yes", tools=["slow"])).status == "completed"
        await bench.healthy()


def limit_memory(client: sync_redis.Redis) -> None:
    """Set the limit below what is in use."""
    used = client.info("memory")["used_memory"]
    client.config_set("maxmemory", max(1, used - 200_000))
