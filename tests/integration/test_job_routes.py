"""Looking at jobs, waiting for them, cancelling and signalling them; and everything that is no route."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from streamjobs.app import App
from streamjobs.events import JobProgress
from streamjobs.gateway.act import ActRoutes
from tests.conftest import RedisProcess, wait_until
from tests.integration.gateway import Served, serving


@pytest.fixture
async def served(redis: RedisProcess) -> AsyncIterator[Served]:
    async with serving(redis.url) as gateway:
        yield gateway


NOBODY = "j0-" + "a" * 26

# --- view


async def test_the_view_is_never_older_than_what_was_written(served: Served):
    script = await served.script()
    await script.open_turn()
    for n in range(20):
        await script.say(str(n))
        view = (await served.client.get(f"/v1/jobs/{script.id}")).json()
        assert view["text"] == "".join(map(str, range(n + 1)))


async def test_the_view_at_an_earlier_moment(served: Served):
    script = await served.script()
    await script.open_turn()
    await script.say(*"abcdef")
    await script.complete()
    for n in range(7):
        view = (await served.client.get(f"/v1/jobs/{script.id}", params={"at": 3 + n})).json()
        assert (view["text"], view["status"]) == ("abcdef"[:n], "running")
    assert (await served.client.get(f"/v1/jobs/{script.id}?at=1")).json()["status"] == "queued"


@pytest.mark.parametrize("at", ["0", "-1", "x", "1.5", "99", "1" * 20, "\x00", ""])
async def test_a_moment_that_is_not_in_the_log_is_refused(served: Served, at: str):
    script = await served.script()
    answer = await served.client.get(f"/v1/jobs/{script.id}", params={"at": at})
    assert (answer.status_code, answer.json()["field"]) == (422, "at")


async def test_the_etag_is_the_cursor(served: Served):
    script = await served.script()
    url = f"/v1/jobs/{script.id}"
    answer = await served.client.get(url)
    tag = answer.headers["etag"]
    assert tag == f'"{answer.json()["cursor"]}"'
    for known in (tag, f'"1-1", W/{tag}', "*"):
        assert (await served.client.get(url, headers={"if-none-match": known})).status_code == 304
    await script.open_turn()
    assert (await served.client.get(url, headers={"if-none-match": tag})).status_code == 200


async def test_a_long_poll_answers_at_the_next_event(served: Served):
    script = await served.script()
    cursor = (await served.client.get(f"/v1/jobs/{script.id}")).json()["cursor"]
    url = f"/v1/jobs/{script.id}"
    waiting = asyncio.create_task(served.client.get(url, params={"wait": "20", "after": cursor}))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    await script.write(JobProgress(percent=50))
    assert (await waiting).json()["progress"]["percent"] == 50
    assert served.gateway.hub.channels == 0


async def test_a_long_poll_that_is_behind_answers_at_once(served: Served):
    script = await served.script()
    async with asyncio.timeout(18):
        for after in ("0", "1-1", "99-99"):
            answer = await served.client.get(f"/v1/jobs/{script.id}", params={"wait": "20", "after": after})
            assert answer.status_code == 200


async def test_waiting_without_a_cursor_waits_for_the_end(served: Served):
    script = await served.script()
    waiting = asyncio.create_task(served.client.get(f"/v1/jobs/{script.id}?wait=20"))
    await script.write(JobProgress(percent=50))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    await script.complete("end")
    assert (await waiting).json()["result"] == "end"
    assert (await served.client.get(f"/v1/jobs/{script.id}?wait=20")).json()["result"] == "end"


async def test_a_wait_that_times_out_answers_with_what_there_is(served: Served):
    script = await served.script()
    answer = await served.client.get(f"/v1/jobs/{script.id}?wait=0.05")
    assert (answer.status_code, answer.json()["status"]) == (200, "running")


async def test_a_wait_that_does_not_parse_is_refused(served: Served):
    script = await served.script()
    for query in ({"wait": "x"}, {"wait": "-1"}, {"wait": "1e9"}):
        answer = await served.client.get(f"/v1/jobs/{script.id}", params=query)
        assert (answer.status_code, answer.json()["field"]) == (422, "wait")
    answer = await served.client.get(f"/v1/jobs/{script.id}", params={"wait": "1", "after": "x"})
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_cursor")


async def test_a_hundred_who_look_at_once_cost_one_fold(served: Served, monkeypatch: pytest.MonkeyPatch):
    script = await served.script()
    await script.open_turn()
    await script.say(*"x" * 1200)
    reads = 0
    page = served.store.log.page

    async def counted(*args: object, **named: object) -> object:
        nonlocal reads
        reads += 1
        return await page(*args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(served.store.log, "page", counted)
    views = await asyncio.gather(*(served.client.get(f"/v1/jobs/{script.id}") for _ in range(100)))
    assert {len(view.json()["text"]) for view in views} == {1200}
    assert reads < 60


# --- cancel, signal


async def test_cancelling_a_queued_job_ends_it(served: Served):
    job = (await served.client.post("/v1/jobs", json={"kind": "chat", "input": {"prompt": "a"}})).json()["id"]
    first = await served.client.post(f"/v1/jobs/{job}/cancel", json={"reason": "changed my mind"})
    again = await served.client.post(f"/v1/jobs/{job}/cancel")
    assert first.status_code == again.status_code == 200
    assert first.json() == again.json()
    assert first.json()["cancel_requested"] is True
    log = [data async for page in served.store.log.pages(job) for _, _, data in page.entries]
    assert b'"by":"anonymous","reason":"changed my mind"' in log[1]


async def test_cancelling_a_running_job_tells_its_worker(served: Served):
    script = await served.script()
    first, again = [await served.client.post(f"/v1/jobs/{script.id}/cancel") for _ in range(2)]
    assert first.status_code == again.status_code == 200
    assert first.json() == again.json()
    assert (await served.store.jobs.get(script.id)).cancel_requested


async def test_what_has_completed_cannot_be_cancelled(served: Served):
    script = await served.script()
    await script.complete()
    answer = await served.client.post(f"/v1/jobs/{script.id}/cancel")
    assert (answer.status_code, answer.json()["code"]) == (409, "job_ended")


async def test_a_signal_is_in_the_log_once_for_its_key(served: Served):
    script = await served.script()
    body = {"name": "ready", "payload": {"ok": True}, "key": "k1"}
    first = await served.client.post(f"/v1/jobs/{script.id}/signal", json=body)
    again = await served.client.post(f"/v1/jobs/{script.id}/signal", json=body)
    assert (first.json()["repeated"], again.json()["repeated"]) == (False, True)
    assert [kind for _, kind, _ in await script.log()].count("signal.received") == 1


@pytest.mark.parametrize(
    "body",
    [{}, {"name": ""}, {"name": "a\x00"}, {"name": 1}, {"name": "a", "kye": "b"}, {"name": "a", "key": 1}],
)
async def test_a_signal_that_does_not_fit_is_refused(served: Served, body: dict[str, object]):
    script = await served.script()
    assert (await served.client.post(f"/v1/jobs/{script.id}/signal", json=body)).status_code == 422


async def test_an_ended_job_takes_no_signal(served: Served):
    script = await served.script()
    await script.complete()
    answer = await served.client.post(f"/v1/jobs/{script.id}/signal", json={"name": "a"})
    assert (answer.status_code, answer.json()["code"]) == (409, "job_ended")


# --- what is not there


@pytest.mark.parametrize(
    "job", [NOBODY, "x", "j0-", "j99999-" + "a" * 26, "%00", "..%2f", "é", "j0-" + "A" * 26]
)
async def test_a_job_that_does_not_exist_is_a_problem(served: Served, job: str):
    for method, path in (("GET", ""), ("GET", "/events"), ("POST", "/cancel")):
        answer = await served.client.request(method, f"/v1/jobs/{job}{path}")
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found"), answer.text
        assert answer.headers["content-type"] == "application/problem+json"


async def test_an_unknown_path_and_a_wrong_method_are_problems(served: Served):
    answer = await served.client.get("/v2/jobs")
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    answer = await served.client.put("/v1/jobs")
    assert (answer.status_code, answer.json()["code"]) == (405, "method_not_allowed")
    assert answer.headers["allow"] == "GET, HEAD, POST"
    answer = await served.client.post(f"/v1/jobs/{NOBODY}/effects")
    assert (answer.status_code, set(answer.headers["allow"].split(", "))) == (405, {"GET", "HEAD"})


async def test_every_answer_has_the_security_headers(served: Served):
    for path in ("/livez", "/nothing", f"/v1/jobs/{NOBODY}"):
        answer = await served.client.get(path)
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"


async def test_an_unforeseen_error_shows_nothing_of_the_inside(
    redis: RedisProcess, monkeypatch: pytest.MonkeyPatch
):
    async def broken(*_: object) -> None:
        raise RuntimeError("the password is hunter2")

    monkeypatch.setattr(ActRoutes, "signal", broken)
    async with serving(redis.url, App()) as served:
        answer = await served.client.post(f"/v1/jobs/{NOBODY}/signal", json={"name": "a"})
        assert (answer.status_code, answer.json()["code"]) == (500, "internal")
        assert "hunter2" not in answer.text


# --- probes


async def test_metrics_have_route_templates_and_no_ids(served: Served):
    script = await served.script()
    await served.client.get(f"/v1/jobs/{script.id}")
    text = (await served.client.get("/metrics")).text
    assert 'streamjobs_http_requests_total{route="/v1/jobs/{id}",status="200"}' in text
    assert script.id not in text


async def test_an_outage_leaves_the_gateway_alive_and_ready(own_redis: RedisProcess):
    """Else every gateway would leave the load balancer at once, and browsers would give up for good."""
    async with serving(own_redis.url, redis_timeout=1.0) as served:
        assert (await served.client.get("/readyz")).status_code == 200
        own_redis.kill()
        assert (await served.client.get("/livez")).status_code == 200
        answer = await served.client.get("/readyz")
        assert (answer.status_code, answer.text) == (200, "ok, Redis is away\n")
        own_redis.start()


async def test_readiness_can_be_told_to_follow_redis(own_redis: RedisProcess):
    async with serving(own_redis.url, redis_timeout=1.0, ready_timeout=0.1) as served:
        assert (await served.client.get("/readyz")).status_code == 200
        own_redis.kill()

        async def is_unready() -> bool:
            return (await served.client.get("/readyz")).status_code == 503

        await wait_until(is_unready)
        own_redis.start()


async def test_a_draining_gateway_is_alive_and_not_ready(served: Served):
    await served.gateway.drain(0.0)
    assert (await served.client.get("/livez")).status_code == 200
    assert (await served.client.get("/readyz")).status_code == 503
