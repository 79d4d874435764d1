"""Schedules on a real Redis: one job a tick whoever sweeps, what becomes of missed ticks, what code says."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import msgspec
import pytest

from streamjobs.app import App
from streamjobs.cron import Timing
from streamjobs.errors import (
    IdempotencyMismatch,
    Invalid,
    ScheduleNotFound,
    TickTaken,
    UnknownQueue,
    UnreadableSchedule,
)
from streamjobs.schedule import Schedule
from streamjobs.store import ScheduleRecord, Store, Tick, keys
from streamjobs.store import schedules as schedules_module
from streamjobs.store.sweeper import Sweeper
from streamjobs.worker.worker import Worker
from tests.conftest import RedisProcess, wait_until
from tests.harness import ROOT, Lab, lab, says, talking, working

HOUR = 3600.0
MINUTE_MS = 60_000


def schedule(name: str = "s", **fields: Any) -> Schedule:
    defaults: dict[str, Any] = {"kind": "chat", "owner": "ann", "timing": Timing(every=HOUR)}
    return Schedule(name=name, **(defaults | fields))


async def made(store: Store, name: str = "s", **fields: Any) -> ScheduleRecord:
    return (await store.schedules.create(schedule(name, **fields)))[0]


async def in_half_an_hour(store: Store) -> Timing:
    """Ticks of every hour of which none is near: schedules made one after the other have the same ones."""
    return Timing(every=HOUR, offset=(await store.now_ms() // 1000 + HOUR / 2) % HOUR)


async def wait_for(store: Store, record: ScheduleRecord, tick_ms: int) -> None:
    """Put a schedule back to where it stood when nobody was there to sweep."""
    await store.client.zadd("sj:{0}:schedules", {record.id: tick_ms})


async def run_due(store: Store, now_ms: int | None = None) -> list[str]:
    ticked = await store.ticks.run_due(0, await store.now_ms() if now_ms is None else now_ms)
    return [what for _, what in ticked.changes]


async def jobs_of(store: Store, record: ScheduleRecord | None = None) -> list[dict[str, Any]]:
    """`job.queued` of every job that a schedule gave, by tick."""
    found: list[dict[str, Any]] = []
    async for raw in store.client.scan_iter(match="sj:{0}:job:*:events", count=1000):
        ((_, fields),) = await store.client.xrange(raw, count=1)
        found.append(json.loads(fields[b"d"]))
    ours = [job for job in found if record is None or job.get("schedule") == record.id]
    return sorted(ours, key=lambda job: job.get("tick_ms", 0))


# --- five sweepers


@contextlib.contextmanager
def sweeper_processes(url: str, count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-m", "tests.integration.sweeps", url], cwd=ROOT)

    running = [start() for _ in range(count)]
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait(20)


async def test_five_sweepers_make_one_job_a_tick(redis: RedisProcess, store: Store):
    """Five gateways send the same invoice five times; or, when one of them dies just then, not at all."""
    records = [
        await made(store, f"s{i}", timing=Timing(every=1, offset=i / 10), missed="all") for i in range(10)
    ]
    with sweeper_processes(redis.url, 5) as sweepers:
        await wait_until(lambda: has_run(store, records, 3), 80, "three ticks of each schedule")
        for _ in range(3):  # whatever they are in the middle of
            victim = sweepers.pop(random.randrange(len(sweepers)))
            victim.kill()
            victim.wait(20)
            await asyncio.sleep(random.random() / 2)
        before = [(await store.schedules.get(record.id)).runs for record in records]
        await wait_until(lambda: has_run(store, records, max(before) + 3), 80, "ticks after the kills")
    for record in records:
        await one_job_a_tick(store, record)


async def has_run(store: Store, records: list[ScheduleRecord], times: int) -> bool:
    return all([(await store.schedules.get(record.id)).runs >= times for record in records])


async def one_job_a_tick(store: Store, record: ScheduleRecord) -> None:
    now = await store.schedules.get(record.id)
    ticks = [job["tick_ms"] for job in await jobs_of(store, record)]
    assert [n for n in Counter(ticks).values() if n != 1] == []
    assert ticks[0] == record.next_ms
    assert {after - before for before, after in pairwise(ticks)} == {1000}, "a hole"
    assert (len(ticks), ticks[-1], now.skipped, now.error) == (now.runs, now.last_tick_ms, 0, "")
    assert now.next_ms == ticks[-1] + 1000


async def test_all_sweepers_at_the_same_instant(store: Store):
    """The race that a fleet runs at every full hour: whoever lost it must notice, not fail."""
    record = await made(store)
    assert record.next_ms is not None
    done = await asyncio.gather(*(run_due(store, record.next_ms) for _ in range(20)))
    assert sorted(filter(None, done)) == [["ticked"]]
    assert len(await jobs_of(store, record)) == 1


async def test_a_tick_is_not_a_sweep_late(redis: RedisProcess):
    """With a sweep every ten minutes a job a minute would come every ten."""
    async with lab(redis.url, sweep_interval=600.0) as bench:
        record = await made(bench.store, timing=Timing(every=2))
        assert record.next_ms is not None
        delay = await Sweeper(bench.store).tick()
        assert 0 < delay <= 2
        await bench.store.schedules.pause(record.id)
        assert await Sweeper(bench.store).tick() == 600.0


# --- what is missed


@pytest.mark.parametrize(("missed", "jobs", "skipped"), [("skip", 0, 3), ("once", 1, 2), ("all", 3, 0)])
async def test_ticks_that_nobody_was_there_for(store: Store, missed: Any, jobs: int, skipped: int):
    """Everything was down for the night: what then runs must be what was asked for."""
    record = await made(store, timing=Timing(every=HOUR, offset=1800.0), missed=missed)
    assert record.next_ms is not None
    hour_ms = 3_600_000
    await wait_for(store, record, record.next_ms - 3 * hour_ms)
    last = record.next_ms - hour_ms
    await run_due(store, last + 2 * MINUTE_MS)
    found = await jobs_of(store, record)
    assert [job["tick_ms"] for job in found] == [last - hour_ms * i for i in reversed(range(jobs))]
    after = await store.schedules.get(record.id)
    assert (after.runs, after.skipped, after.next_ms) == (jobs, skipped, record.next_ms)


async def test_catching_up_is_bounded(store: Store):
    """A schedule of seconds that stood still for a day would bury everything else."""
    record = await made(store, timing=Timing(every=1), missed="all")
    now = await store.now_ms()
    await wait_for(store, record, now - now % 1000 - 500_000)
    assert Counter(await run_due(store, now)) == {"ticked": 100, "skipped": 401}
    assert await run_due(store, now) == []


async def test_no_job_beside_a_live_one(store: Store):
    """A backup that takes longer than its interval would run twice at once."""
    record = await made(store, timing=Timing(every=1), overlap="skip")
    assert record.next_ms is not None
    assert await run_due(store, record.next_ms + 2000) == ["ticked", "overlap", "overlap"]
    (job,) = await jobs_of(store, record)
    assert job["tick_ms"] == record.next_ms
    await store.jobs.cancel((await store.schedules.get(record.id)).last_job)
    assert await run_due(store, record.next_ms + 3000) == ["ticked"]
    assert (await store.schedules.get(record.id)).skipped == 2


# --- what goes wrong


async def test_one_that_fails_says_so_and_goes_on(redis: RedisProcess, store: Store):
    """One schedule of a queue that was removed would stop all others; or fail and nobody sees it."""
    async with lab(redis.url, queues=("default", "slow")) as other:
        timing = await in_half_an_hour(store)
        bad = await made(other.store, "bad", queue="slow", timing=timing)
    good = await made(store, "good", timing=timing)
    assert bad.next_ms == good.next_ms is not None
    assert Counter(await run_due(store, good.next_ms)) == {"ticked": 1, "failed": 1}
    after = await store.schedules.get(bad.id)
    assert after.error.startswith("queue: 'slow' is not one of")
    assert (after.runs, after.skipped, after.next_ms) == (0, 1, bad.next_ms + 3_600_000)
    assert await run_due(store, good.next_ms) == []


async def test_one_that_cannot_be_read_waits_for_who_can(store: Store):
    """While releases change, a schedule of the new one would stop the sweeps of the old one, or be lost."""
    timing = await in_half_an_hour(store)
    bad, good = await made(store, "bad", timing=timing), await made(store, "good", timing=timing)
    assert bad.next_ms is not None
    definition = json.loads(await store.client.hget(keys.schedule_key(bad.id), "definition"))
    damaged = json.dumps(definition | {"missed": "tomorrow"})
    await store.client.hset(keys.schedule_key(bad.id), "definition", damaged)
    assert await run_due(store, bad.next_ms) == ["ticked"]
    assert len(await jobs_of(store, good)) == 1
    assert await store.client.zscore("sj:{0}:schedules", bad.id) == bad.next_ms
    ticked = await store.ticks.run_due(0, bad.next_ms)
    assert ticked.next_due_ms > bad.next_ms, "it would be looked at without a pause"
    with pytest.raises(UnreadableSchedule):
        await store.schedules.get(bad.id)
    assert [one.id for one in await store.schedules.of_owner("ann")] == [good.id]
    await store.schedules.delete(bad.id)


async def test_a_full_store_keeps_its_ticks(redis: RedisProcess, store: Store):
    """What came due while Redis was full would be lost; or running jobs would not be swept meanwhile."""
    record = await made(store, timing=Timing(every=1), missed="all")
    await wait_until(lambda: is_due(store, record))
    with redis.client() as client:
        client.config_set("maxmemory", 1)
        assert await Sweeper(store).tick() > 0
        assert await jobs_of(store, record) == []
        client.config_set("maxmemory", 0)
    await Sweeper(store).tick()
    assert (await jobs_of(store, record))[0]["tick_ms"] == record.next_ms


async def is_due(store: Store, record: ScheduleRecord) -> bool:
    return await store.now_ms() >= (record.next_ms or 0)


async def test_a_clock_that_stepped_back(store: Store):
    """A schedule that is made to wait for a tick that had its job would wait for ever."""
    record = await made(store, timing=Timing(every=1))
    assert record.next_ms is not None
    await run_due(store, record.next_ms)
    await wait_for(store, record, record.next_ms)
    assert await run_due(store, record.next_ms) == ["ticked"]
    after = await store.schedules.get(record.id)
    assert (after.next_ms, after.runs, len(await jobs_of(store, record))) == (record.next_ms + 1000, 1, 1)


async def test_a_schedule_that_is_half_gone(store: Store):
    """What waits without being there would be looked at for ever."""
    await store.client.zadd("sj:{0}:schedules", {f"s0-{'a' * 26}": 1})
    assert await run_due(store) == []
    assert await store.client.exists("sj:{0}:schedules") == 0


# --- the job that a tick gives


async def test_every_field_reaches_the_job(store: Store):
    """The job would run with other limits, for somebody else, or on another queue than was asked for."""
    record = await made(
        store, input=msgspec.Raw(b'{"prompt":"hi"}'), priority="low", metadata={"a": [1]}, thread_id="t1",
        timeout=9.0, max_attempts=2, concurrency_key="k",
    )  # fmt: skip
    await run_due(store, record.next_ms)
    (job,) = await jobs_of(store, record)
    job.pop("ts")
    assert job == {
        "kind": "chat", "owner": "ann", "priority": "low", "metadata": {"a": [1]}, "thread_id": "t1",
        "timeout_ms": 9000, "max_attempts": 2, "concurrency_key": "k", "input": {"prompt": "hi"},
        "schedule": record.id, "tick_ms": record.next_ms,
    }  # fmt: skip


async def test_the_job_of_a_tick_runs(redis: RedisProcess):
    """All of it would be for nothing."""
    async with talking(redis.url, says("good night")) as bench:
        raw = msgspec.Raw(b'{"prompt":"hi"}')
        record = await made(bench.store, timing=Timing(every=1), input=raw)
        await wait_until(lambda: has_run(bench.store, [record], 1))
        view = await bench.ended((await bench.store.schedules.get(record.id)).last_job)
        assert view.text == "good night"
        await bench.store.schedules.delete(record.id)
        await bench.healthy()


async def test_a_submission_for_a_tick_that_is_over(store: Store):
    """The error would not say whether to try again."""
    record = await made(store)
    submission = store.schedules.submission(record.schedule, Tick(record.id, 5, 6))
    with pytest.raises(TickTaken):
        await store.jobs.submit(submission)
    await store.schedules.delete(record.id)
    with pytest.raises(ScheduleNotFound):
        await store.jobs.submit(submission)


# --- making and acting


async def test_the_same_key_makes_one(store: Store):
    """A client that tries again after a timeout gets two schedules."""
    first, was_there = await store.schedules.create(schedule(), key="k")
    assert not was_there
    assert await store.schedules.create(schedule(), key="k") == (first, True)
    with pytest.raises(IdempotencyMismatch):
        await store.schedules.create(schedule("other"), key="k")
    other, _ = await store.schedules.create(schedule(owner="ben"), key="k")
    assert other.id != first.id
    assert [one.id for one in await store.schedules.of_owner("ann")] == [first.id]


@pytest.mark.parametrize(
    ("field", "value"),
    [("queue", "nowhere"), ("owner", "a b"), ("kind", ""), ("timeout", -1.0), ("metadata", {"a": "\ud800"})],
)
async def test_what_could_never_be_submitted_is_refused_at_once(store: Store, field: str, value: Any):
    """It would be found in the log of the sweeps, at the first tick."""
    with pytest.raises(Invalid):
        await made(store, **{field: value})
    assert await store.schedules.of_owner("ann") == []


async def test_an_owner_has_so_many(store: Store, monkeypatch: pytest.MonkeyPatch):
    """A loop in a client fills Redis with schedules that tick for ever."""
    monkeypatch.setattr(schedules_module, "MAX_SCHEDULES", 2)
    for name in ("a", "b"):
        await made(store, name)
    with pytest.raises(Invalid, match="owner: has 2 schedules"):
        await made(store, "c")


async def test_pause_and_resume(store: Store):
    """A paused schedule goes on; or a resumed one runs all that passed meanwhile."""
    record = await made(store, missed="all")
    assert record.next_ms is not None
    await store.schedules.pause(record.id)
    paused = await store.schedules.get(record.id)
    assert (paused.is_paused, paused.coming(3)) == (True, [])
    assert await run_due(store, record.next_ms + 10_000) == []
    await store.schedules.resume(record.id)
    resumed = await store.schedules.get(record.id)
    assert resumed.coming(3) == [record.next_ms + 3_600_000 * i for i in range(3)]


async def test_trigger(store: Store):
    """Waiting for three in the morning to see whether the report works; or two reports for one click."""
    record = await made(store)
    await store.schedules.pause(record.id)
    receipt = await store.schedules.trigger(record.id, key="k")
    assert (await store.schedules.trigger(record.id, key="k")).job_id == receipt.job_id
    assert (await store.schedules.trigger(record.id)).job_id != receipt.job_id
    after = await store.schedules.get(record.id)
    assert (after.runs, after.is_paused, after.last_tick_ms) == (2, True, None)


async def test_delete(store: Store):
    """Its jobs would be gone with it, or it would go on."""
    record = await made(store)
    receipt = await store.schedules.trigger(record.id)
    await store.schedules.delete(record.id)
    assert (await store.jobs.get(receipt.job_id)).status == "queued"
    assert await store.schedules.of_owner("ann") == []
    for act in (
        store.schedules.delete,
        store.schedules.pause,
        store.schedules.resume,
        store.schedules.trigger,
    ):
        with pytest.raises(ScheduleNotFound):
            await act(record.id)
    for wrong in ("", "x", "s0-short", "../x", "j0-" + "a" * 26):
        with pytest.raises(ScheduleNotFound):
            await store.schedules.get(wrong)


# --- what code declares


def reporting(every: float = HOUR) -> App:
    app = App(name="reports", builtin_tools=False)

    @app.workflow("report")
    async def report(_ctx: Any, day: str) -> str:
        return f"report of {day}"

    app.schedule("nightly", "report", every=every, input="monday")
    return app


async def test_workers_declare_what_their_code_says(redis: RedisProcess):
    """A schedule in the code that nobody runs; or one for each worker."""
    async with lab(redis.url) as bench:
        app = reporting(every=1)
        async with working(bench.store, app), working(bench.store, app):
            record = await declared(bench)
            assert (record.app, record.schedule.owner) == ("reports", "system")
            assert record.declared_ms is not None
            await wait_until(lambda: has_run(bench.store, [record], 2))
            last = (await bench.store.schedules.get(record.id)).last_job
            assert (await bench.ended(last)).result == "report of monday"
        await bench.store.schedules.delete(record.id)


async def declared(bench: Lab) -> ScheduleRecord:
    await wait_until(lambda: bench.store.schedules.of_owner("system"), what="the declaration")
    (record,) = await bench.store.schedules.of_owner("system")
    return record


async def test_declaring_again(store: Store):
    """Every deployment would move the next tick away, or leave the old rule, or start what was paused."""
    await store.schedules.declare("reports", reporting().schedules.values())
    (first,) = await store.schedules.of_owner("system")
    await store.schedules.declare("reports", reporting().schedules.values())
    (same,) = await store.schedules.of_owner("system")
    assert (same.id, same.next_ms, same.created_ms) == (first.id, first.next_ms, first.created_ms)
    await store.schedules.declare("reports", reporting(7.0).schedules.values())
    (changed,) = await store.schedules.of_owner("system")
    assert (changed.id, changed.schedule.timing.every) == (first.id, 7.0)
    await store.schedules.pause(first.id)
    await store.schedules.declare("reports", reporting().schedules.values())
    (paused,) = await store.schedules.of_owner("system")
    assert (paused.is_paused, paused.schedule.timing.every) == (True, HOUR)
    await store.schedules.declare("reports", [])
    assert len(await store.schedules.of_owner("system")) == 1


async def test_a_worker_whose_schedule_cannot_be_does_not_start(store: Store):
    """It would run everything but the nightly report, and look healthy."""
    app = reporting()
    app.schedule("weekly", "report", every=60, input="x", queue="nowhere")
    with pytest.raises(UnknownQueue, match="nowhere"):
        async with asyncio.timeout(60):
            await Worker(store, app).run()
