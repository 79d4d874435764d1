"""Artifacts on a real Redis: who may store them, how much, and for how long they stay."""

from __future__ import annotations

import pytest

from streamjobs.errors import ArtifactNotFound, Fenced, Invalid, JobNotFound, LimitExceeded
from streamjobs.store import Batch, Lease, Store, Submission, keys
from tests.conftest import fast_settings


async def taken(store: Store) -> Lease:
    await store.jobs.submit(Submission(kind="work"))
    return (await store.work.take(0, "w1", 1, 1, ["default"])).leases[0]


async def test_what_is_stored_is_what_is_read(store: Store):
    """Bytes that are no text, or hold line ends, would come back as something else."""
    lease = await taken(store)
    content = bytes(range(256)) + b"\r\n/"
    await store.artifacts.put(lease.job_id, lease.epoch, "step:read@1#2=x", "image/png; a=b", content)
    await store.artifacts.put(lease.job_id, lease.epoch, "empty", "text/plain", b"")
    assert await store.artifacts.get(lease.job_id, "step:read@1#2=x") == ("image/png; a=b", content)
    assert await store.artifacts.get(lease.job_id, "empty") == ("text/plain", b"")
    assert await store.artifacts.names(lease.job_id) == {"empty": 0, "step:read@1#2=x": 259}


async def test_what_is_not_there_is_said_to_be(store: Store):
    """A caller could not tell a job that is gone from a name that was mistyped."""
    lease = await taken(store)
    await store.artifacts.put(lease.job_id, lease.epoch, "a", "text/plain", b"1")
    assert await store.artifacts.names((await store.jobs.submit(Submission(kind="work"))).job_id) == {}
    for name in ("b", "a/", "", "ü"):
        with pytest.raises(ArtifactNotFound):
            await store.artifacts.get(lease.job_id, name)
    for gone in (keys.new_job_id(0), "nonsense"):
        for call in (store.artifacts.names(gone), store.artifacts.get(gone, "a")):
            with pytest.raises(JobNotFound) as caught:
                await call
            assert caught.value.code == "not_found"


@pytest.mark.parametrize("name", ["", "a/b", "a b", "a\n", "ü", "a" * 201])
async def test_a_name_that_does_not_fit_is_refused(store: Store, name: str):
    """Names become parts of URLs and of the store's fields: one could name another's media type."""
    with pytest.raises(Invalid):
        await store.artifacts.put(keys.new_job_id(0), 1, name, "text/plain", b"")
    with pytest.raises(Invalid):
        await store.artifacts.put(keys.new_job_id(0), 1, "a", f"text/plain\n{name}", b"")


async def test_only_the_holder_of_the_lease_stores(store: Store):
    """A worker that was declared dead would replace what its successor made."""
    lease = await taken(store)
    with pytest.raises(Fenced):
        await store.artifacts.put(lease.job_id, lease.epoch - 1, "a", "text/plain", b"")
    with pytest.raises(JobNotFound):
        await store.artifacts.put(keys.new_job_id(0), 1, "a", "text/plain", b"")


async def test_there_is_an_end_to_them(settings: object):
    """One job would fill Redis, and stop all others."""
    url = settings.redis_url  # type: ignore[attr-defined]
    store = await Store.open(fast_settings(url, max_artifact=10, max_artifacts=15))
    lease = await taken(store)
    with pytest.raises(LimitExceeded, match="one artifact may have 10 bytes"):
        await store.artifacts.put(lease.job_id, lease.epoch, "a", "text/plain", b"x" * 11)
    await store.artifacts.put(lease.job_id, lease.epoch, "a", "text/plain", b"x" * 10)
    with pytest.raises(LimitExceeded, match="all artifacts of a job may have 15 bytes"):
        await store.artifacts.put(lease.job_id, lease.epoch, "b", "text/plain", b"x" * 6)
    await store.artifacts.put(lease.job_id, lease.epoch, "a", "text/plain", b"x" * 9)
    await store.artifacts.put(lease.job_id, lease.epoch, "b", "text/plain", b"x" * 6)
    await store.aclose()


async def test_they_stay_as_long_as_their_job(store: Store):
    """They would stay for ever, or be gone while the job's log still names them."""
    lease = await taken(store)
    await store.artifacts.put(lease.job_id, lease.epoch, "a", "text/plain", b"1")
    end = Batch(lease.job_id, lease.epoch, 1, [("job.completed", b'{"ts":1}')], "completed")
    assert (await store.work.append(0, [end]))[0].is_written
    key = keys.job_key(lease.job_id)
    assert await store.client.pexpiretime(f"{key}:artifacts") == await store.client.pexpiretime(key) > 0
