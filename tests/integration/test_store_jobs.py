"""What callers of the store do to jobs: what reaches the log, reruns, and an owner's list."""

from __future__ import annotations

from typing import Any

import msgspec

from streamjobs.store import Store, Submission


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
