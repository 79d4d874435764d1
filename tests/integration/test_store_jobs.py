"""What callers of the store do to jobs: what reaches the log, and reruns."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from streamjobs import events as ev
from streamjobs.errors import Invalid, JobNotEnded, JobNotFound
from streamjobs.store import Batch, DeadFilter, Store, Submission, keys
from streamjobs.store.doctor import Doctor


async def first_event(store: Store, job_id: str) -> dict[str, Any]:
    return msgspec.json.decode((await store.log.page(job_id)).entries[0].data)


async def last_event(store: Store, job_id: str) -> dict[str, Any]:
    return msgspec.json.decode((await store.log.load(job_id))[-1].data)


async def test_a_queue_timeout_is_in_the_log(store: Store):
    """A rerun of the job would wait for ever where the first one would not."""
    receipt = await store.jobs.submit(Submission(kind="work", start_timeout=2.5))
    assert (await first_event(store, receipt.job_id))["start_timeout_ms"] == 2500


async def test_a_signal_says_who_sent_it(store: Store):
    """An approval in the log would not say who gave it."""
    job_id = (await store.jobs.submit(Submission(kind="work"))).job_id
    await store.jobs.signal(job_id, "approval:deploy", {"approve": True}, by="ann@example.org")
    assert (await last_event(store, job_id))["by"] == "ann@example.org"
    await store.jobs.signal(job_id, "go")
    assert "by" not in await last_event(store, job_id)


# --- reruns


class Bench:
    """Ends jobs as a worker would."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.number = 0

    async def end(self, status: str = "failed", count: int = 1) -> list[str]:
        """Take that many jobs and end them."""
        self.number += 1
        leases = (await self.store.work.take(0, "w1", self.number, count, ["default"])).leases
        events: dict[str, ev.Event] = {
            "failed": ev.JobFailed(error=ev.ErrorInfo("boom", "it broke")),
            "completed": ev.JobCompleted(),
        }
        event = events[status]
        outcome: Any = status
        batches = [
            Batch(lease.job_id, lease.epoch, 1, [(event.type, ev.encode_event(event))], outcome)
            for lease in leases
        ]
        assert all(answer.is_written for answer in await self.store.work.append(0, batches))
        return [lease.job_id for lease in leases]

    async def failed(self, count: int = 1, **fields: Any) -> list[str]:
        await self.store.jobs.submit_many(Submission(**({"kind": "work"} | fields)) for _ in range(count))
        return await self.end(count=count)

    async def dead(self) -> set[str]:
        return {job.id for job in (await self.store.dead.page(DeadFilter(), limit=1000))[0]}


@pytest.fixture
def bench(store: Store) -> Bench:
    return Bench(store)


async def test_a_rerun_is_the_same_job_again(store: Store, bench: Bench):
    """It would run with another timeout, for another thread, or beside one it must not run beside."""
    fields: dict[str, Any] = {
        "kind": "work", "owner": "anna", "input": b'{"a": [1, "\\u2028"]}', "priority": "high",
        "thread_id": "t", "message_id": "m", "metadata": {"k": [1]}, "timeout": 12.5, "start_timeout": 99.0,
        "max_attempts": 7, "concurrency_key": "key",
    }  # fmt: skip
    (old,) = await bench.failed(**fields)
    receipt = await store.jobs.rerun(old, by="op@example.org")
    first, again = await first_event(store, old), await first_event(store, receipt.job_id)
    assert again.pop("rerun_of") == old
    assert again.pop("rerun_by") == "op@example.org"
    assert first.pop("ts") <= again.pop("ts")
    assert again == first
    assert await store.client.hget(keys.job_key(old), "rerun") == receipt.job_id.encode()
    assert await bench.dead() == set()
    (taken,) = (await store.work.take(0, "w2", 1, 5, ["default"])).leases
    assert (taken.job_id, taken.owner) == (receipt.job_id, "anna")
    assert (await Doctor(store).examine()).violations == []


async def test_no_delay_and_no_parent_is_inherited(store: Store, bench: Bench):
    """A rerun would wait again for an instant that has passed, or wake a parent that has long gone on."""
    parent = (await store.jobs.submit(Submission(kind="work", delay=60))).job_id
    (child,) = await bench.failed(parent=parent)
    delayed = (await store.jobs.submit(Submission(kind="work", delay=60))).job_id
    await store.jobs.cancel(delayed)
    for old in (child, delayed):
        again = (await store.jobs.rerun(old)).job_id
        assert (await store.jobs.get(again)).status == "queued"
        event = await first_event(store, again)
        assert not {"parent", "depth", "delay_ms"} & set(event)


async def test_the_same_key_is_the_same_rerun(store: Store, bench: Bench):
    """A request that is sent again after a lost reply would run the job twice."""
    (old,) = await bench.failed()
    first = await store.jobs.rerun(old, key="k")
    second = await store.jobs.rerun(old, key="k")
    assert (second.job_id, first.repeated, second.repeated) == (first.job_id, False, True)
    others = {(await store.jobs.rerun(old, key=key)).job_id for key in ("", "", "other", "\ud800")}
    assert len(others | {first.job_id}) == 5


async def test_every_end_can_be_run_again_and_nothing_else(store: Store, bench: Bench):
    """A job that still runs would run twice at once."""
    live = (await store.jobs.submit(Submission(kind="work"))).job_id
    with pytest.raises(JobNotEnded):
        await store.jobs.rerun(live)
    for end in (lambda: bench.end("completed"), lambda: bench.end("failed")):
        (ended,) = await end()
        live = (await store.jobs.rerun(ended)).job_id
    await store.jobs.cancel(live)
    await store.jobs.rerun(live)
    with pytest.raises(JobNotFound):
        await store.jobs.rerun(keys.new_job_id(0))


async def test_many_are_run_again_once(store: Store, bench: Bench):
    """After an outage somebody would name a thousand jobs by hand, or run them twice by asking again."""
    old = await bench.failed(30)
    other = await bench.failed(2, kind="other")
    where = DeadFilter(kind="work")
    part = await store.jobs.rerun_many(where, key="outage", limit=10)
    rest = await store.jobs.rerun_many(where, key="outage")
    assert len(part) == 10
    assert sorted(job for job, _ in part + rest) == sorted(old)
    assert await bench.dead() == set(other)
    new = await bench.end(count=50)
    assert sorted(new) == sorted(job for _, job in part + rest)
    assert await store.jobs.rerun_many(where, key="outage") == [], "what it made is not run again"
    assert len(await store.jobs.rerun_many(where, key="next", limit=40)) == 30
    with pytest.raises(Invalid):
        await store.jobs.rerun_many(where, key="")
