"""What owners are told of their jobs: ended, failed, waiting for an approval, once each."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from streamjobs.cursor import START
from streamjobs.errors import InvalidCursor, JobNotFound
from streamjobs.events import ApprovalRequested, ErrorInfo, JobProgress
from streamjobs.projections.notify import PAGE, PATIENCE, NotifyProjection
from streamjobs.store import Notice, Store, Submission
from streamjobs.webhook import Webhook
from tests.conftest import RedisProcess, fast_settings, wait_until
from tests.integration.gateway import Script
from tests.projections.bench import caught_up, projecting

APPROVAL = ApprovalRequested(key="deploy", subject="step", message="Deploy to production?")


@pytest.fixture
def notify(store: Store) -> NotifyProjection:
    return NotifyProjection(store)


async def told(store: Store, owner: str = "anonymous", **options: Any) -> list[Notice]:
    return (await store.notices.page(owner, **options))[0]


def about(notice: Notice) -> dict[str, Any]:
    return msgspec.json.decode(notice.about)


async def test_the_owner_is_told_of_the_end(store: Store, notify: NotifyProjection):
    """A user who left would not hear that the night's job is done."""
    job = await Script.start(store, owner="anna", thread_id="t1")
    await job.complete()
    await notify.advance(job.id)
    (notice,) = await told(store, "anna")
    assert (notice.type, notice.job, notice.read) == ("job.completed", job.id, False)
    assert notice.cursor == str((await store.jobs.get(job.id)).last)
    assert (about(notice)["kind"], about(notice)["status"], about(notice)["thread_id"]) == (
        "chat",
        "completed",
        "t1",
    )
    assert await store.notices.unread("anna") == 1
    assert await told(store, "bob") == []


async def test_why_it_failed_is_said(store: Store, notify: NotifyProjection):
    """The notice would send everybody to the log."""
    job = await Script.start(store)
    await job.fail(ErrorInfo("rate_limited", "The provider is busy." * 100))
    await notify.advance(job.id)
    (notice,) = await told(store)
    assert notice.type == "job.failed"
    assert about(notice)["code"] == "rate_limited"
    assert about(notice)["message"] == ("The provider is busy." * 100)[:500]


async def test_a_job_that_needs_an_approval_says_so_at_once(store: Store, notify: NotifyProjection):
    """It would wait for somebody who does not know."""
    job = await Script.start(store)
    await job.write(APPROVAL)
    await notify.advance(job.id)
    (notice,) = await told(store)
    assert notice.type == "approval.requested"
    assert about(notice)["key"] == "deploy"
    assert about(notice)["message"] == "Deploy to production?"
    await job.complete()
    await notify.advance(job.id)
    assert [one.type for one in await told(store)] == ["job.completed", "approval.requested"]


async def test_a_cancelled_job_is_news(store: Store, notify: NotifyProjection):
    """Somebody else's cancel would go unseen."""
    job_id = (await store.jobs.submit(Submission(kind="chat"))).job_id
    await store.jobs.cancel(job_id, by="bob", reason="too expensive")
    await notify.advance(job_id)
    (notice,) = await told(store)
    assert (notice.type, about(notice)["by"], about(notice)["message"]) == (
        "job.cancelled",
        "bob",
        "too expensive",
    )


async def test_notes_that_come_again_or_at_once_tell_it_once(store: Store, notify: NotifyProjection):
    """Every crash of a projector, and every second one, would tell everything again."""
    other = NotifyProjection(store)
    jobs = [await Script.start(store) for _ in range(10)]
    for job in jobs:
        await job.write(APPROVAL)
        await job.complete()
    await asyncio.gather(*(one.advance(job.id) for job in jobs for one in (notify, other) * 3))
    notices = await told(store, limit=500)
    assert len(notices) == 20
    assert len({(one.job, one.cursor) for one in notices}) == 20
    assert len({one.id for one in notices}) == 20


async def test_whoever_read_an_older_position_tells_nothing(store: Store, notify: NotifyProjection):
    """Two projectors that read the same stretch would both tell of it, as would a call that came twice."""
    job = await Script.start(store)
    await job.complete()
    page = await store.log.page(job.id)
    after = page.entries[-1].cursor
    assert await store.notices.tell(job.id, START, after, [], [])
    assert not await store.notices.tell(job.id, START, after, [], [])
    with pytest.raises(JobNotFound):
        await store.notices.tell("j0-" + "a" * 26, START, after, [], [])


async def test_a_long_log_is_told_to_its_end(store: Store, notify: NotifyProjection):
    """A job of many events would never be told of; or each note would read its whole log again."""
    job = await Script.start(store)
    await job.say(*("x" for _ in range(2 * PAGE)))
    await notify.advance(job.id)
    assert (await store.notices.told(job.id)).cursor.seq > 2 * PAGE - PATIENCE
    await job.write(APPROVAL)
    await job.say(*("y" * 3000 for _ in range(PAGE)))
    await job.complete()
    await notify.advance(job.id)
    assert [one.type for one in await told(store)] == ["job.completed", "approval.requested"]


async def test_a_few_events_without_news_cost_no_write(store: Store, notify: NotifyProjection):
    """Each step of each job would be a write to Redis that says nothing."""
    job = await Script.start(store)
    await job.write(JobProgress(percent=1))
    await notify.advance(job.id)
    assert (await store.notices.told(job.id)).cursor == START


async def test_a_job_that_is_gone_is_nothing_to_tell(store: Store, notify: NotifyProjection):
    """One note of a job whose retention has passed would stop the projection."""
    await notify.advance("j0-aaaaaaaaaaaaaaaaaaaaaaaaaa")


async def test_a_log_of_another_history_is_told_anew(store: Store, notify: NotifyProjection):
    """After a failover that lost the end, the end that then came would go untold."""
    job = await Script.start(store)
    await store.client.hset(f"sj:{{0}}:job:{job.id}", "told", "2-99")
    await job.complete()
    await notify.advance(job.id)
    assert [one.type for one in await told(store)] == ["job.completed"]


async def test_a_childs_end_is_its_parents_news(store: Store, notify: NotifyProjection):
    """A job with a thousand children would bury everything else that its owner is told; its webhooks may ask
    for them."""
    await store.webhooks.create("anonymous", Webhook(url="https://x.example/"))
    parent = await Script.start(store)
    child = await Script.start(store, parent=parent.id)
    await child.write(APPROVAL)
    await child.complete()
    await notify.advance(child.id)
    assert [one.type for one in await told(store)] == ["approval.requested"]
    claims = await store.deliveries.claim(0, 10)
    assert sorted(msgspec.json.decode(one.content)["type"] for one in claims.claimed) == [
        "approval.requested",
        "job.completed",
    ]


async def test_webhooks_get_what_they_asked_for(store: Store, notify: NotifyProjection):
    """A receiver would get everybody's everything; or the body would tell what the job was given."""
    hooks = {}
    for name, fields in {
        "all": {},
        "failed": {"events": ("job.failed",)},
        "other": {"kinds": ("review",)},
        "own": {"events": ("x.*",), "kinds": ("chat",)},
    }.items():
        record, _ = await store.webhooks.create("anna", Webhook(url=f"https://x.example/{name}", **fields))
        hooks[record.id] = name
    await store.webhooks.create("bob", Webhook(url="https://x.example/bob"))
    off, _ = await store.webhooks.create("anna", Webhook(url="https://x.example/off"))
    await store.webhooks.disable("anna", off.id, "by its owner")
    job = await Script.start(store, owner="anna", input=b'{"prompt": "canary"}', thread_id="t1")
    await job.write_raw(("x.found", b'{"ts":1,"what":"canary"}'))
    await job.complete("canary")
    await notify.advance(job.id)
    await notify.advance(job.id)
    claimed = (await store.deliveries.claim(0, 10)).claimed
    got = sorted((hooks[one.webhook_id], msgspec.json.decode(one.content)["type"]) for one in claimed)
    assert got == [("all", "job.completed"), ("own", "x.found")]
    assert all(b"canary" not in one.content for one in claimed)
    body = msgspec.json.decode(next(one.content for one in claimed if hooks[one.webhook_id] == "all"))
    assert body["data"] == {
        "id": job.id,
        "kind": "chat",
        "status": "completed",
        "cursor": str((await store.jobs.get(job.id)).last),
        "thread_id": "t1",
        "links": {"self": f"/v1/jobs/{job.id}", "events": f"/v1/jobs/{job.id}/events"},
    }
    assert body["timestamp"].endswith("Z")


# --- the feed


async def filed(store: Store, notify: NotifyProjection, count: int) -> list[str]:
    """The ids of so many notices, oldest first."""
    for _ in range(count):
        job_id = (await store.jobs.submit(Submission(kind="chat"))).job_id
        await store.jobs.cancel(job_id)
        await notify.advance(job_id)
    return [one.id for one in reversed(await told(store, limit=500))]


async def test_reading_marks_one_or_all_up_to_one(store: Store, notify: NotifyProjection):
    """The number beside the bell would never go down, or take with it what came meanwhile."""
    ids = await filed(store, notify, 5)
    assert await store.notices.mark_read("anonymous", ids=[ids[3]]) == 1
    assert await store.notices.mark_read("anonymous", ids=[ids[3]]) == 0
    assert await store.notices.mark_read("anonymous", until=ids[1]) == 2
    assert await store.notices.mark_read("bob", until=ids[4]) == 0
    assert await store.notices.unread("anonymous") == 2
    assert [one.id for one in await told(store, unread=True)] == [ids[4], ids[2]]
    assert [one.read for one in await told(store)] == [False, True, False, True, True]


@pytest.mark.parametrize("unread", [False, True])
async def test_pages_join(store: Store, notify: NotifyProjection, unread: bool):
    """A notice would be on two pages, or on none."""
    ids = await filed(store, notify, 7)
    seen: list[str] = []
    cursor = ""
    for _ in range(10):
        page, cursor = await store.notices.page("anonymous", unread=unread, before=cursor, limit=3)
        seen += [one.id for one in page]
        if not cursor:
            break
    assert seen == ids[::-1]
    with pytest.raises(InvalidCursor):
        await store.notices.page("anonymous", before="x")


async def test_the_feed_is_bounded_and_so_is_what_is_unread(redis: RedisProcess):
    """An owner who never looks would fill Redis; the count would tell of notices that are gone."""
    store = await Store.open(fast_settings(redis.url, notice_cap=3, notice_ttl=60.0))
    ids = await filed(store, NotifyProjection(store), 5)
    assert len(ids) == 3
    assert await store.notices.unread("anonymous") == 3
    assert [one.id for one in await told(store, unread=True)] == ids[::-1]
    assert 0 < await store.client.pttl("sj:{0}:notices:anonymous") <= 60_000
    await store.aclose()


async def test_old_notices_leave_with_the_next_new_one(redis: RedisProcess):
    """A feed that is in use would keep things for ever."""
    store = await Store.open(fast_settings(redis.url, notice_ttl=2.0))
    notify = NotifyProjection(store)
    await filed(store, notify, 1)
    await asyncio.sleep(2.1)
    assert len(await filed(store, notify, 1)) == 1
    assert await store.notices.unread("anonymous") == 1
    await store.aclose()


async def test_the_first_projector_over_an_old_store_tells_nothing_old(store: Store):
    """Whoever turns notifications on would get thousands of mails about last year's jobs."""
    hook, _ = await store.webhooks.create("anna", Webhook(url="https://example.org/hook"))
    old = [await Script.start(store, owner="anna") for _ in range(3)]
    live, waiting = [await Script.start(store, owner="anna") for _ in range(2)]
    for job in old:
        await job.complete()
    await waiting.write(APPROVAL)
    await asyncio.sleep(0.01)
    async with projecting(store, NotifyProjection(store)):
        await wait_until(lambda: caught_up(store, ["notify"]), 60)
        assert [one.job for one in await told(store, "anna")] == [waiting.id], "it still waits"
        await live.complete()
        await wait_until(lambda: caught_up(store, ["notify"]), 60)
    assert [one.job for one in await told(store, "anna")] == [live.id, waiting.id]
    await store.feed.ask_rebuild("notify")
    async with projecting(store, NotifyProjection(store)):
        await wait_until(lambda: caught_up(store, ["notify"]), 60)
    assert len(await told(store, "anna")) == 2
    assert await store.client.zcard("sj:{0}:deliveries") == 2, hook
