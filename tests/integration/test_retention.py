"""How long ended jobs are kept, and that everything of one goes at the same instant."""

from __future__ import annotations

import asyncio

import pytest

from streamjobs.client import Client
from streamjobs.errors import ConfigError, JobNotEnded, JobNotFound
from streamjobs.events import ErrorInfo
from streamjobs.projections.retention import RetentionProjection
from streamjobs.retention import kept_for, parse_policies
from streamjobs.store import Store, Submission
from tests.conftest import RedisProcess, fast_settings, unrestricted
from tests.integration.gateway import Script, serving

DAY = 86400.0


async def kept_days(store: Store, job_id: str) -> float:
    """Days from a job's end to its expiry."""
    key = f"sj:{{0}}:job:{job_id}"
    return (await store.client.pexpiretime(key) - int(await store.client.hget(key, "ended"))) / DAY / 1000


async def test_policies_decide_by_kind_and_outcome(redis: RedisProcess):
    """Failures would be gone before anybody looked, or everything would be kept as long as they are."""
    policies = ("chat:failed=90d", "*:failed=1d", "*=0.5d")
    store = await Store.open(fast_settings(redis.url, retention_policies=policies))
    retention = RetentionProjection(store)
    for kind, outcome, days in (("chat", "failed", 90), ("other", "failed", 1), ("chat", "completed", 0.5)):
        job = await Script.start(store, kind=kind, idempotency_key=f"{kind} {outcome}")
        await job.keep("a", "text/plain", b"x")
        await retention.advance(job.id)
        await (job.complete() if outcome == "completed" else job.fail(ErrorInfo("x", "y")))
        await retention.advance(job.id)
        await retention.advance(job.id)
        assert await kept_days(store, job.id) == pytest.approx(days, abs=1e-6)
    await store.aclose()  # the fixture checks that all keys of a job expire at once


@pytest.mark.parametrize(("projections", "days"), [(("snapshot", "retention"), 30), (("retention",), 7)])
async def test_without_a_policy_what_is_sealed_is_kept_longer(
    redis: RedisProcess, projections: tuple[str, ...], days: int
):
    """A month of history would take what a week of streams does, or a week of streams would be a month's."""
    store = await Store.open(fast_settings(redis.url, projections=projections))
    job = await Script.start(store)
    await job.complete()
    await RetentionProjection(store).advance(job.id)
    assert await kept_days(store, job.id) == pytest.approx(days, abs=1e-6)
    await store.aclose()


async def test_a_live_job_has_no_end_yet(store: Store):
    """It would expire while it runs."""
    job = await Script.start(store)
    await RetentionProjection(store).advance(job.id)
    await RetentionProjection(store).advance("j0-aaaaaaaaaaaaaaaaaaaaaaaaaa")
    assert await store.client.pttl(f"sj:{{0}}:job:{job.id}") == -1
    with pytest.raises(JobNotEnded):
        await store.retention.keep(job.id, 1.0)


async def test_a_deleted_job_is_gone_with_everything_of_it(redis: RedisProcess):
    """Somebody who must forget a job would find pieces of it for a month; its list would still name it."""
    async with serving(redis.url) as served:
        job = await served.script(idempotency_key="once")
        refused = await served.client.delete(f"/v1/jobs/{job.id}")
        assert (refused.status_code, refused.json()["code"]) == (409, "job_not_ended")
        await job.keep("a", "text/plain", b"x")
        await served.store.jobs.signal(job.id, "x")
        child = await served.script(parent=job.id)
        await child.complete()
        await job.fail(ErrorInfo("x", "y"))
        await RetentionProjection(served.store).advance(job.id)
        notes = await served.store.client.xlen("sj:{0}:feed")
        async with Client(served.url) as python:
            await python.handle(job.id).delete()
        for path in ("", "/events?after=0", "/result"):
            assert (await served.client.get(f"/v1/jobs/{job.id}{path}")).status_code == 404
        assert (await served.client.delete(f"/v1/jobs/{job.id}")).status_code == 404
        async with unrestricted(served.store) as client:
            assert await client.keys(f"*{job.id}*") == []
            assert await client.keys("*idem*") == []
            assert await client.zcard("sj:{0}:dead") == await client.zcard("sj:{0}:ended") == 0
            assert await client.xlen("sj:{0}:feed") == notes + 1
        again = await served.store.jobs.submit(Submission(kind="chat", idempotency_key="once"))
        assert again.job_id != job.id


async def test_when_memory_is_short_the_first_to_expire_go_first(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    """Redis would fill up with what nobody looks at, and refuse new jobs; or what ended just now would go."""
    retention = RetentionProjection(store)
    jobs = [await Script.start(store) for _ in range(4)]
    for days, job in enumerate(jobs[:3], 1):
        await job.complete()
        await store.retention.keep(job.id, days * DAY)
    await retention.sweep(0)  # there is no limit
    assert await store.retention.relieve(0, 10) == 0, "they ended just now"
    assert await store.retention.relieve(0, 2, fresh=0.0) == 2
    for job in jobs[:2]:
        with pytest.raises(JobNotFound):
            await store.jobs.get(job.id)
    assert (await store.jobs.get(jobs[2].id)).is_ended
    assert not (await store.jobs.get(jobs[3].id)).is_ended
    calls: list[int] = []

    async def relieve(partition: int, count: int) -> int:
        calls.append(count)
        return 1 if len(calls) < 3 else 0

    monkeypatch.setattr(store.retention, "relieve", relieve)
    monkeypatch.setattr("streamjobs.projections.retention.FULL", -1.0)
    await retention.sweep(0)
    assert len(calls) == 3


async def test_memory_is_measured_against_redis_own_limit(own_redis: RedisProcess):
    """The projection would let go of everything, or of nothing."""
    store = await Store.open(fast_settings(own_redis.url))
    assert await store.retention.fullness() == 0.0
    with own_redis.client() as client:
        used = client.info("memory")["used_memory"]
        client.config_set("maxmemory", used * 2)
    assert 0.3 < await store.retention.fullness() < 0.9
    await store.aclose()


async def test_an_expired_job_is_no_longer_counted(store: Store):
    """What names ended jobs would grow for ever."""
    for _ in range(2):
        job = await Script.start(store)
        await job.complete()
        await store.retention.keep(job.id, 0.001)
        await asyncio.sleep(0.02)
    assert await store.client.zcard("sj:{0}:ended") == 1


@pytest.mark.parametrize(
    "text", ["", "chat", "chat=", "chat=7", "chat=-1d", "chat:ended=1d", "a b=1x", "*=0d", "*=9999d"]
)
def test_a_policy_that_is_none_is_refused(text: str):
    """A typo would keep nothing, or everything, in silence."""
    with pytest.raises(ConfigError, match="retention_policies"):
        parse_policies([text])


def test_the_first_policy_that_fits_decides():
    """The order in which they are written would mean nothing."""
    policies = parse_policies(["chat:failed=2h", "chat=30min", "*:cancelled=10s"])
    said = [
        kept_for(policies, *job)
        for job in (("chat", "failed"), ("chat", "cancelled"), ("x", "cancelled"), ("x", "failed"))
    ]
    assert said == [7200.0, 1800.0, 10.0, None]
