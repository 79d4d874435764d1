"""Running jobs again, the dead list, strikes and workers over HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from streamjobs.events import ErrorInfo
from streamjobs.store import Quarantined, Submission, WorkerInfo
from tests.conftest import RedisProcess, wait_until
from tests.integration.gateway import Served, serving
from tests.projections.bench import carry

NOBODY = "j0-" + "a" * 26


@pytest.fixture
async def served(redis: RedisProcess) -> AsyncIterator[Served]:
    async with serving(redis.url, queues=("default", "bulk")) as gateway:
        yield gateway


async def call(served: Served, method: str, path: str, status: int = 200, **options: Any) -> Any:
    answer = await served.client.request(method, path, **options)
    assert answer.status_code == status, answer.text
    return answer.json()


async def failed(served: Served, code: str = "boom", **fields: Any) -> str:
    """A job that failed at an instant of its own: lists order the same millisecond by id."""
    script = await served.script(**fields)
    await script.fail(ErrorInfo(code, "it broke"))
    await past(served, await served.store.now_ms())
    return script.id


async def past(served: Served, instant: int) -> None:
    async def is_past() -> bool:
        return await served.store.now_ms() > instant

    await wait_until(is_past, what="Redis's next millisecond")


# --- run again


async def test_an_ended_job_runs_again_as_another(served: Served):
    """Somebody would have to find out what the job had been submitted with, and do it by hand."""
    old = await failed(served, kind="work", input=b'{"n":1}', owner="alice", priority="high")
    answer = await served.client.post(f"/v1/jobs/{old}/rerun")
    assert answer.status_code == 202
    body = answer.json()
    assert (body["kind"], body["status"], body["rerun_of"]) == ("work", "queued", old)
    assert answer.headers["location"] == body["links"]["self"] == f"/v1/jobs/{body['id']}"
    view = await call(served, "GET", f"/v1/jobs/{body['id']}")
    assert (view["owner"], view["input"], view["priority"], view["rerun_of"]) == (
        "alice",
        {"n": 1},
        "high",
        old,
    )
    assert (await call(served, "GET", "/v1/dead"))["dead"] == []


async def test_the_same_key_is_the_same_rerun(served: Served):
    """A lost answer, sent again, would do the work twice."""
    old = await failed(served)
    answers = [
        await served.client.post(f"/v1/jobs/{old}/rerun", headers={"idempotency-key": key})
        for key in ("a", "a", "b")
    ]
    first, again, other = (answer.json()["id"] for answer in answers)
    assert first == again != other
    assert [answer.headers.get("idempotent-replayed") for answer in answers] == [None, "true", None]


async def test_only_what_has_ended_runs_again(served: Served):
    """Two copies of a job would run at once."""
    script = await served.script()
    problem = await call(served, "POST", f"/v1/jobs/{script.id}/rerun", 409)
    assert problem["code"] == "job_not_ended"
    assert (await call(served, "POST", f"/v1/jobs/{NOBODY}/rerun", 404))["code"] == "not_found"


# --- the dead list


async def test_the_dead_list_says_why(served: Served):
    """After a bad night somebody would have to open every job to find the ones that failed, and why."""
    job_id = await failed(served, "timeout", kind="work", owner="alice")
    (dead,) = (await call(served, "GET", "/v1/dead"))["dead"]
    assert (dead["id"], dead["kind"], dead["owner"], dead["queue"]) == (job_id, "work", "alice", "default")
    assert (dead["code"], dead["message"], dead["attempts"]) == ("timeout", "it broke", 1)


async def test_the_dead_are_chosen_by_filter(served: Served):
    """Out of thousands, the twelve of one cause would have to be picked by hand."""
    a = await failed(served, "timeout", kind="work", owner="alice")
    b = await failed(served, "boom", kind="other", owner="bob", queue="bulk")

    async def chosen(**query: str) -> list[str]:
        return [dead["id"] for dead in (await call(served, "GET", "/v1/dead", params=query))["dead"]]

    assert await chosen() == [b, a]
    for query in ({"kind": "work"}, {"owner": "alice"}, {"code": "timeout"}, {"queue": "default"}):
        assert await chosen(**query) == [a], query
    later = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    assert await chosen(since=later) == []
    assert await chosen(until=later) == [b, a]


async def test_the_dead_list_is_paged(served: Served):
    """A list of a hundred thousand would not be answered at all."""
    ids = [await failed(served) for _ in range(5)]
    found, cursor = list[str](), ""
    while True:
        page = await call(served, "GET", "/v1/dead", params={"limit": "2", "cursor": cursor})
        assert len(page["dead"]) <= 2
        found += [dead["id"] for dead in page["dead"]]
        cursor = page["cursor"]
        if not cursor:
            break
    assert found == sorted(found, key=ids[::-1].index)
    assert set(found) == set(ids)


@pytest.mark.parametrize(
    ("query", "status", "field"),
    [
        ({"limit": "0"}, 422, "limit"),
        ({"limit": "x"}, 422, "limit"),
        ({"since": "yesterday"}, 422, "since"),
        ({"since": "2026-01-01T00:00:00"}, 422, "since"),
        ({"kidn": "work"}, 422, "kidn"),
        ({"cursor": "x"}, 400, None),
    ],
)
async def test_a_filter_that_does_not_fit_is_refused(
    served: Served, query: dict[str, str], status: int, field: str | None
):
    """A mistyped filter would choose everything, and everything would run again."""
    assert (await call(served, "GET", "/v1/dead", status, params=query)).get("field") == field


async def test_the_dead_run_again_by_filter(served: Served):
    """After an outage of a provider thousands of jobs would have to be run again one by one."""
    ids = {await failed(served, "provider_error") for _ in range(3)}
    other = await failed(served, "boom")
    answer = await call(served, "POST", "/v1/dead/rerun", json={"code": "provider_error"})
    assert answer["count"] == 3
    assert {pair["from"] for pair in answer["rerun"]} == ids
    for pair in answer["rerun"]:
        assert (await call(served, "GET", f"/v1/jobs/{pair['to']}"))["rerun_of"] == pair["from"]
    assert [dead["id"] for dead in (await call(served, "GET", "/v1/dead"))["dead"]] == [other]


async def test_running_the_dead_again_may_be_sent_again(served: Served):
    """An answer that was lost, and half of the jobs would run twice."""
    for _ in range(3):
        await failed(served)
    options: dict[str, Any] = {"json": {"limit": 2}, "headers": {"idempotency-key": "night"}}
    counts = [(await call(served, "POST", "/v1/dead/rerun", **options))["count"] for _ in range(3)]
    assert counts == [2, 1, 0]


@pytest.mark.parametrize("body", [{"cursor": "1"}, {"limit": 0}, {"limit": "5"}, {"knid": "x"}])
async def test_what_to_run_again_must_fit(served: Served, body: dict[str, Any]):
    """A mistyped filter would run every failed job again."""
    await failed(served)
    assert (await call(served, "POST", "/v1/dead/rerun", 422, json=body))["field"] == next(iter(body))
    await call(served, "POST", "/v1/dead/rerun", 400)
    assert len((await call(served, "GET", "/v1/dead"))["dead"]) == 1


# --- strikes


async def test_a_queue_is_stopped_and_let_go(served: Served):
    """To stop a queue, every worker would have to be stopped."""
    path, by = "/v1/strikes/queue/bulk", {"x-streamjobs-owner": "olga"}
    first = await call(served, "PUT", path, json={"reason": "provider is down"}, headers=by)
    assert first == {"scope": "queue", "name": "bulk", "struck": True, "changed": True}
    assert (await call(served, "PUT", path))["changed"] is False
    (strike,) = (await call(served, "GET", "/v1/strikes"))["strikes"]
    assert (strike["by"], strike["reason"], strike["since_ms"] > 0) == ("olga", "provider is down", True)
    await served.store.jobs.submit(Submission(kind="work", queue="bulk"))
    assert (await served.store.work.take(0, "w", 1, 1, ["bulk"])).leases == []
    assert (await call(served, "DELETE", path))["changed"] is True
    assert (await call(served, "DELETE", path)) == {**first, "struck": False, "changed": False}
    assert len((await served.store.work.take(0, "w", 2, 1, ["bulk"])).leases) == 1


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("planet/earth", "invalid"),
        ("queue/nope", "unknown_queue"),
        ("tool/a%20b", "invalid"),
        ("kind/" + "a" * 65, "invalid"),
    ],
)
async def test_what_cannot_be_struck_is_refused(served: Served, path: str, code: str):
    """A mistyped name would be struck, and what was meant runs on."""
    assert (await call(served, "PUT", f"/v1/strikes/{path}", 422))["code"] == code
    assert (await call(served, "GET", "/v1/strikes"))["strikes"] == []


# --- queues and workers


async def test_queues_say_what_waits(served: Served):
    """Nobody could tell whether to start more workers, and for what."""
    for _ in range(3):
        await served.store.jobs.submit(Submission(kind="work", queue="bulk"))
    await served.script(queue="default", priority="high")
    await call(served, "PUT", "/v1/strikes/queue/bulk")
    default, bulk = (await call(served, "GET", "/v1/queues"))["queues"]
    assert (default["name"], bulk["name"]) == ("default", "bulk")
    assert default["running"] + bulk["running"] == 1
    assert default["waiting"] + bulk["waiting"] == 3
    assert (bulk["struck"], default["struck"], bulk["oldest_wait"] >= 0) == (True, False, True)


async def test_workers_are_listed(served: Served):
    """Nobody could see whether anything works at all."""
    assert (await call(served, "GET", "/v1/workers"))["workers"] == []
    now = await served.store.now_ms()
    await served.store.workers.beat(
        WorkerInfo("w1", "host", 7, ["default"], 400, 3, 99, now - 5000, now, draining=False)
    )
    answer = await call(served, "GET", "/v1/workers")
    (worker,) = answer["workers"]
    assert (worker["id"], worker["running"], worker["queues"]) == ("w1", 3, ["default"])
    assert answer["now_ms"] >= worker["heartbeat_ms"]


# --- projections and statistics


async def test_statistics_are_read_at_once(served: Served):
    """A dashboard would have to read every job."""
    assert (await call(served, "GET", "/v1/stats"))["stats"] == []
    script = await served.script(queue="bulk")
    await script.say("a")
    await script.complete()
    await served.store.jobs.submit(Submission(kind="work"))
    await carry(served.store)
    chat, work = (await call(served, "GET", "/v1/stats"))["stats"]
    assert (chat["kind"], chat["queue"], chat["completed"], chat["submitted"]) == ("chat", "bulk", 1, 1)
    assert (work["kind"], work["now"]["queued"], work["run_seconds"]["count"]) == ("work", 1, 0)
    wait = chat["wait_seconds"]
    assert (wait["count"], wait["buckets"]["14400"], list(wait["buckets"])[:2]) == (1, 1, ["0.01", "0.05"])
    only = await call(served, "GET", "/v1/stats", params={"kind": "work"})
    assert only["stats"] == [work]
    assert (await call(served, "GET", "/v1/stats", params={"queue": "bulk"}))["stats"] == [chat]


async def test_statistics_have_a_history(served: Served):
    """Whether it is getting worse could not be seen."""
    await served.store.jobs.submit(Submission(kind="work"))
    await carry(served.store)
    for step, length in (("5m", 300_000), ("1h", 3_600_000)):
        answer = await call(served, "GET", "/v1/stats", params={"history": step})
        (point,) = answer["history"]
        assert answer["step"] == step
        assert point["at_ms"] % length == 0
        assert point["stats"][0]["submitted"] == 1
    for query in ({"history": "5m", "kind": "x"}, {"history": "1h", "since": "2100-01-01T00:00:00Z"}):
        assert (await call(served, "GET", "/v1/stats", params=query))["history"] == []
    await call(served, "GET", "/v1/stats", 422, params={"history": "1s"})


async def two_projections(served: Served) -> list[dict[str, Any]]:
    found = (await call(served, "GET", "/v1/projections"))["projections"]
    return [one for name in ("index", "stats") for one in found if one["name"] == name]


async def test_projections_are_looked_after(served: Served):
    """Nobody would know that lists are behind, or be able to make them anew."""
    runner = await carry(served.store)
    job_id = (await served.store.jobs.submit(Submission(kind="work"))).job_id
    await served.store.feed.quarantine(0, "index", Quarantined(job_id, "Boom", 1, 2))
    index, stats = await two_projections(served)
    assert (index["name"], index["notes"], index["quarantined"], index["rebuild"]) == ("index", 1, 1, "")
    assert index["errors"] == [{"job": job_id, "error": "Boom", "seq": 1, "ts": 2}]
    assert (stats["name"], stats["quarantined"], stats["errors"]) == ("stats", 0, [])
    assert (await call(served, "POST", "/v1/projections/index/retry"))["retried"] == 1
    await call(served, "POST", "/v1/projections/stats/rebuild")
    index, stats = await two_projections(served)
    assert (index["quarantined"], index["notes"], stats["rebuild"]) == (0, 2, "asked")
    await runner.rebuild()
    assert [one["rebuild"] for one in await two_projections(served)] == ["", ""]
    assert (await call(served, "POST", "/v1/projections/nope/rebuild", 404))["code"] == "not_found"
