"""Redis did what it was told and the reply was lost: redis-py asks again, and nothing happens twice."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from streamjobs.errors import StoreUnavailable
from streamjobs.events import Event, JobCompleted, JobLog, JobWaiting, encode_event
from streamjobs.store import Batch, Lease, Store, Submission
from streamjobs.store.scripts import Script, Scripts
from streamjobs.testing import Scenario, ScriptedCall, Turn
from tests.conftest import RedisProcess, fast_settings, wait_until
from tests.faults.app import app, once_at_most_once
from tests.harness import Lab, lab, one_end, one_outcome_each, working
from tests.proxy import Proxy, proxying


class Bench:
    """A store behind the proxy, and one that sees Redis directly."""

    def __init__(self, proxy: Proxy, store: Store, direct: Lab) -> None:
        self.proxy = proxy
        self.store = store
        self.direct = direct

    async def losing(self, script: Script, call: Callable[[], Any]) -> Any:
        """Make a call whose first reply is lost on the way."""
        self.proxy.swallow(lambda data: script.sha.encode() in data)
        before = self.proxy.swallowed
        answer = await call()
        assert self.proxy.swallowed == before + 1
        return answer

    async def submitted(self, **fields: Any) -> str:
        return (await self.store.jobs.submit(Submission(kind="chat", **fields))).job_id

    async def leased(self) -> Lease:
        """Submit a job and take it."""
        await self.submitted()
        (lease,) = await self.take("helper")
        return lease

    async def take(self, worker: str, number: int = 1) -> list[Lease]:
        return (await self.store.work.take(0, worker, number, 10, ("default",))).leases

    async def append(self, lease: Lease, outcome: Any, *events: Event, **fields: Any) -> Any:
        written = [(event.type, encode_event(event)) for event in events]
        batch = Batch(lease.job_id, lease.epoch, 1, written, outcome, **fields)
        (answer,) = await self.store.work.append(0, [batch])
        return answer

    async def tickets(self) -> int:
        """How many jobs wait for a worker, in the streams themselves."""
        client = self.direct.store.client
        names = [name async for name in client.scan_iter(match="sj:{0}:work:*")]
        return sum([await client.xlen(name) for name in names])

    async def types(self, job_id: str) -> list[str]:
        return await self.direct.types(job_id)


@pytest.fixture
async def bench(redis: RedisProcess) -> AsyncIterator[Bench]:
    async with proxying(redis.port) as proxy, lab(redis.url) as direct:
        store = await Store.open(fast_settings(proxy.url, lease=60.0, redis_timeout=1.0))
        load_scripts(redis)
        yield Bench(proxy, store, direct)
        await direct.healthy()
        await store.aclose()


def load_scripts(redis: RedisProcess) -> None:
    """Have every script known, so that the call that is lost is the one that acts."""
    with redis.client() as client:
        for script in vars(Scripts).values():
            if isinstance(script, Script):
                client.script_load(script.text)


async def test_submit(bench: Bench):
    """A user pays for a job once, whatever the network does to the answer."""
    receipt = await bench.losing(Scripts.SUBMIT, lambda: bench.store.jobs.submit(Submission(kind="chat")))
    assert receipt.repeated
    assert await bench.types(receipt.job_id) == ["job.queued"]
    assert await bench.tickets() == 1
    assert await bench.store.work.backlog(0) == {"waiting:default": 1}


async def test_submit_of_many_with_a_key(bench: Bench):
    """A batch is one call: each of its jobs exists once."""
    subs = [Submission(kind="chat", idempotency_key=str(n)) for n in range(50)]
    receipts = await bench.losing(Scripts.SUBMIT, lambda: bench.store.jobs.submit_many(subs))
    assert len({receipt.job_id for receipt in receipts}) == 50
    assert await bench.tickets() == 50


async def test_take(bench: Bench):
    """The jobs that a lost reply carried are answered again: nobody waits out a lease."""
    jobs = {await bench.submitted() for _ in range(5)}
    leases = await bench.losing(Scripts.TAKE, lambda: bench.take("w"))
    assert {lease.job_id for lease in leases} == jobs
    assert await bench.tickets() == 0
    for job_id in jobs:
        assert await bench.types(job_id) == ["job.queued", "job.started"]
    assert await bench.take("w", 2) == []
    assert (await bench.append(leases[0], "keep", JobLog(message="mine"))).verdict == "ok"


@pytest.mark.parametrize("outcome", ["keep", "completed", "retry", "wait", "yield", "cancelled"])
async def test_append(bench: Bench, outcome: str):
    """An event that is there twice is a sentence said twice; an outcome done twice, a job run twice."""
    lease = await bench.leased()
    events: dict[str, Event] = {"completed": JobCompleted(), "wait": JobWaiting(waits_for="x")}
    event = events.get(outcome, JobLog(message="said"))
    fields = {"delay_ms": 60_000} if outcome == "retry" else {}
    answer = await bench.losing(Scripts.APPEND, lambda: bench.append(lease, outcome, event, **fields))
    assert answer.verdict == "dup"
    kinds = await bench.types(lease.job_id)
    assert kinds.count(event.type) == 1
    assert kinds.count("job.requeued") == (outcome == "yield")
    assert await bench.tickets() == (outcome == "yield")
    assert answer.seq == 3 + (outcome == "cancelled")
    if outcome == "retry":
        await bench.store.jobs.cancel(lease.job_id)


async def test_renew(bench: Bench):
    """A lease that was renewed twice is a renewed lease."""
    lease = await bench.leased()
    pair = (lease.job_id, lease.epoch)
    _, (renewal,) = await bench.losing(Scripts.RENEW, lambda: bench.store.work.renew(0, [pair]))
    assert renewal.held


async def test_wake(bench: Bench):
    """A delayed job that is woken by a lost sweep gets one ticket."""
    job_id = await bench.submitted(delay=0.2)
    await asyncio.sleep(0.25)
    await bench.losing(Scripts.WAKE, lambda: bench.store.work.wake(0))
    assert await bench.types(job_id) == ["job.queued", "job.requeued"]
    assert await bench.tickets() == 1


async def test_cancel(bench: Bench):
    """Cancelled twice is cancelled once, waiting or running."""
    running = (await bench.leased()).job_id
    waiting = await bench.submitted()
    for job_id in {waiting, running}:
        answer = await bench.losing(Scripts.CANCEL, lambda job_id=job_id: bench.store.jobs.cancel(job_id))
        assert answer in {"cancelled", "requested"}
        assert (await bench.types(job_id)).count("job.cancel_requested") == 1


async def test_signal(bench: Bench):
    """An approval that arrives twice must not approve the next question as well."""
    job_id = await bench.submitted()
    await bench.losing(Scripts.SIGNAL, lambda: bench.store.jobs.signal(job_id, "approve", True))
    assert await bench.types(job_id) == ["job.queued", "signal.received"]


async def test_pause_and_resume(bench: Bench):
    """A pause or a resume whose answer was lost counts once: one event, one ticket."""
    job_id = await bench.submitted()
    await bench.losing(Scripts.PAUSE, lambda: bench.store.jobs.pause(job_id))
    assert await bench.types(job_id) == ["job.queued", "job.paused"]
    await bench.losing(Scripts.RESUME, lambda: bench.store.jobs.resume(job_id))
    assert await bench.types(job_id) == ["job.queued", "job.paused", "job.resumed"]
    leases = await bench.take("w")
    assert [lease.job_id for lease in leases] == [job_id]


async def test_a_silent_redis_is_given_up_and_found_again(bench: Bench):
    """Packets that go nowhere: the call fails within its bound, and the next one works."""
    bench.proxy.mode = "black hole"
    with pytest.raises(StoreUnavailable):
        async with asyncio.timeout(60):
            await bench.store.ping()
    bench.proxy.mode = "pass"
    bench.proxy.abort_all()
    await bench.store.ping()


TURNS = [
    Turn(
        text="One, two, three. " * 3,
        tool_calls=[ScriptedCall(name="once"), ScriptedCall(name="pure")],
        rate=15.0,
    ),
    Turn(text="Done.", rate=200.0),
]


async def test_a_worker_whose_replies_are_lost_all_the_time(
    redis: RedisProcess, tmp_path: Any, monkeypatch: Any
):
    """Through a network that loses replies and cuts connections: each word once, each payment once."""
    monkeypatch.setenv("EFFECTS", str(tmp_path / "effects"))
    async with proxying(redis.port) as proxy, lab(proxy.url, Scenario(turns=TURNS), lease=20.0) as bench:
        load_scripts(redis)
        shas = [script.sha.encode() for script in (Scripts.APPEND, Scripts.TAKE, Scripts.APPEND_ALWAYS)]
        jobs = [await bench.chat(str(n), tools=["once", "pure"]) for n in range(10)]

        async def disturb() -> None:
            for turn in range(10**6):
                proxy.swallow(lambda data: any(sha in data for sha in shas))
                await asyncio.sleep(0.06)
                if turn % 12 == 11:
                    proxy.abort_all()

        disturbing = asyncio.create_task(disturb())
        async with working(bench.store, app):
            await wait_until(lambda: all_ended(redis, jobs), timeout=90.0)
        disturbing.cancel()
        assert proxy.swallowed > 5
    async with lab(redis.url) as direct:
        for job_id in jobs:
            log = await direct.log(job_id)
            assert one_end(log) == "job.completed"
            one_outcome_each(log)
            assert (await direct.view(job_id)).text == TURNS[0].text + TURNS[1].text
            assert Counter(event.type for event in log)["job.lost"] == 0
        await direct.healthy()
    once_at_most_once(tmp_path / "effects")


def all_ended(redis: RedisProcess, jobs: list[str]) -> bool:
    """Whether all have ended, asked past the proxy."""
    with redis.client() as client:
        states = {client.hget(f"sj:{{0}}:job:{job_id}", "status") for job_id in jobs}
    return states <= {b"completed", b"failed", b"cancelled"}
