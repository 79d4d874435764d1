"""Submitting: what is taken, what is refused, and that a refusal says why."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from streamjobs.app import App
from streamjobs.store import Store
from tests.conftest import RedisProcess, wait_until
from tests.integration.gateway import Script, Served, serving


@pytest.fixture
async def served(redis: RedisProcess) -> AsyncIterator[Served]:
    app = App()

    @app.workflow("greet", timeout=12.0, max_attempts=7)
    async def greet(_ctx: Any, name: str) -> str:
        return name

    async with serving(redis.url, app, queues=("default", "bulk"), max_body=100_000) as gateway:
        yield gateway


BODY = {"kind": "chat", "input": {"prompt": "hello"}}


async def submit(served: Served, body: Any = BODY, **headers: str) -> Any:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return await served.client.post("/v1/jobs", content=content, headers=headers)


async def first_event(store: Store, job_id: str) -> dict[str, Any]:
    page = await store.log.page(job_id)
    return json.loads(page.entries[0].data)


async def test_a_submission_is_answered_with_where_to_look(served: Served):
    answer = await submit(served)
    body = answer.json()
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/v1/jobs/{body['id']}"
    assert (body["kind"], body["status"]) == ("chat", "queued")
    assert body["cursor"].startswith("1-")
    assert body["links"] == {
        "self": f"/v1/jobs/{body['id']}",
        "events": f"/v1/jobs/{body['id']}/events",
        "cancel": f"/v1/jobs/{body['id']}/cancel",
    }


async def test_every_field_reaches_the_log(served: Served):
    fields = {
        "queue": "bulk", "priority": "high", "thread_id": "t 1", "message_id": "m/1", "metadata": {"a": [1]},
        "delay": 2.5, "timeout": 9, "start_timeout": 60, "max_attempts": 2,
    }  # fmt: skip
    answer = await submit(served, BODY | fields | {"concurrency_key": "k"}, X_Streamjobs_Owner="ann@example")
    assert answer.json()["status"] == "scheduled"
    event = await first_event(served.store, answer.json()["id"])
    assert event["owner"] == "ann@example"
    assert event["input"] == {"prompt": "hello"}
    assert (event["delay_ms"], event["timeout_ms"], event["start_timeout_ms"]) == (2500, 9000, 60_000)
    for name in ("queue", "priority", "thread_id", "message_id", "metadata", "max_attempts"):
        assert event[name] == fields[name]


async def test_a_workflow_brings_its_own_defaults(served: Served):
    answer = await submit(served, {"kind": "greet", "input": "ann"})
    event = await first_event(served.store, answer.json()["id"])
    assert (event["timeout_ms"], event["max_attempts"]) == (12_000, 7)
    answer = await submit(served, {"kind": "greet", "input": "ann", "timeout": 1, "max_attempts": 1})
    event = await first_event(served.store, answer.json()["id"])
    assert (event["timeout_ms"], event["max_attempts"]) == (1000, 1)


async def test_an_instant_becomes_a_delay(served: Served):
    soon = (datetime.now(UTC) + timedelta(seconds=100)).isoformat()
    event = await first_event(served.store, (await submit(served, BODY | {"run_at": soon})).json()["id"])
    assert 95_000 < event["delay_ms"] <= 100_000
    past = (datetime.now(UTC) - timedelta(seconds=100)).isoformat()
    assert (await submit(served, BODY | {"run_at": past})).json()["status"] == "queued"


async def test_pretty_printed_json_is_stored_as_one_line(served: Served):
    """A raw line end in an event would forge lines of the live channel and fields of the stream."""
    body = json.dumps(BODY | {"metadata": {"a": {"b": 1}}}, indent=4).encode()
    answer = await submit(served, body)
    page = await served.store.log.page(answer.json()["id"])
    assert b"\n" not in page.entries[0].data


DEEP = b'{"kind":"chat","input":' + b"[" * 5000 + b"]" * 5000 + b"}"
MALFORMED = {
    "nothing": b"",
    "no json": b"{",
    "a second value": b'{"kind":"chat"} {}',
    "invalid UTF-8": b'{"kind":"chat","input":"\xff\xfe"}',
    "invalid UTF-8 in a key": b'{"\xff":1}',
    "a lone surrogate": b'{"kind":"chat","input":{"prompt":"\\ud800"}}',
    "5,000 levels": DEEP,
    "5,000 levels in a field of no name": DEEP.replace(b'"input"', b'"other"'),
    "more levels than the log takes": DEEP.replace(b"[" * 5000, b"[" * 300).replace(b"]" * 5000, b"]" * 300),
    "NaN": b'{"kind":"chat","input":NaN}',
    "an infinite number": b'{"kind":"chat","input":1e400}',
    "5,000 digits": b'{"kind":"chat","input":' + b"9" * 5000 + b"}",
    "a raw control character": b'{"kind":"chat","input":"a\nb"}',
}


@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED)
async def test_what_is_not_json_is_refused(served: Served, body: bytes):
    """One such job in the log would break every reader of it, for ever."""
    answer = await submit(served, body)
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_request")
    assert answer.headers["content-type"] == "application/problem+json"
    assert await served.store.work.backlog(0) == {}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "kind of another type": ({"kind": 7}, "kind"),
    "kind with NUL": ({"kind": "ch\x00at"}, "kind"),
    "queue of another type": ({"queue": ["default"]}, "queue"),
    "queue with a line end": ({"queue": "a\nb"}, "queue"),
    "unknown queue": ({"queue": "other"}, "queue"),
    "priority": ({"priority": "urgent"}, "priority"),
    "thread_id of another type": ({"thread_id": 1}, "thread_id"),
    "thread_id with NUL": ({"thread_id": "a\x00"}, "thread_id"),
    "thread_id too long": ({"thread_id": "a" * 201}, "thread_id"),
    "message_id with a control character": ({"message_id": "a\x1b[31m"}, "message_id"),
    "metadata of another type": ({"metadata": [1]}, "metadata"),
    "a name in metadata with NUL": ({"metadata": {"a\x00": 1}}, "metadata"),
    "too much metadata": ({"metadata": {str(n): n for n in range(65)}}, "metadata"),
    "negative delay": ({"delay": -1}, "delay"),
    "delay of a thousand years": ({"delay": 1e11}, "delay"),
    "delay of another type": ({"delay": "1"}, "delay"),
    "an instant without an offset": ({"run_at": "2030-01-01T00:00:00"}, "run_at"),
    "an instant of another form": ({"run_at": "tomorrow"}, "run_at"),
    "an instant and a delay": ({"run_at": "2030-01-01T00:00:00Z", "delay": 1}, "run_at"),
    "an instant of the year 9999": ({"run_at": "9999-01-01T00:00:00Z"}, "delay"),
    "negative timeout": ({"timeout": -1}, "timeout"),
    "negative start_timeout": ({"start_timeout": -1}, "start_timeout"),
    "a parent from outside": ({"parent": "j0-" + "a" * 26}, "parent"),
    "a schedule from outside": ({"schedule": "s1"}, "schedule"),
    "no attempts": ({"max_attempts": 0}, "max_attempts"),
    "half an attempt": ({"max_attempts": 1.5}, "max_attempts"),
    "concurrency_key with NUL": ({"concurrency_key": "\x00"}, "concurrency_key"),
    "a typo": ({"priorty": "high"}, "priorty"),
    "chat without a prompt": ({"input": {}}, "input"),
    "a prompt with NUL": ({"input": {"prompt": "a\x00b"}}, "input"),
    "NUL behind a backslash": ({"input": {"prompt": "\\\x00"}}, "input"),
    "NUL deep in metadata": ({"metadata": {"a": [{"b": "\x00"}]}}, "metadata"),
    "chat with an unknown field": ({"input": {"prompt": "a", "tol": 1}}, "input"),
}


@pytest.mark.parametrize(("change", "field"), WRONG.values(), ids=WRONG)
async def test_what_does_not_fit_names_its_field(served: Served, change: dict[str, Any], field: str):
    answer = await submit(served, BODY | change)
    problem = answer.json()
    assert answer.status_code == 422, problem
    assert problem["field"].split(".")[0] == field, problem
    assert {"type", "title", "status", "code", "detail"} <= set(problem)


async def test_text_that_only_looks_like_nul_is_taken(served: Served):
    """Without it, nobody can ask a model how NUL is written in JSON."""
    answer = await submit(served, BODY | {"input": {"prompt": "written \\u0000 in JSON"}})
    assert answer.status_code == 202, answer.text


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ([], "invalid"),
        ("chat", "invalid"),
        ({"input": 1}, "invalid"),
        ({"kind": "other"}, "unknown_kind"),
        ({"kind": "chat", "input": {"prompt": "a", "tools": ["other"]}}, "unknown_tool"),
        ({"kind": "chat", "input": {"prompt": "a", "agent": "other"}}, "unknown_agent"),
    ],
)
async def test_what_could_never_run_is_refused(served: Served, body: Any, code: str):
    answer = await submit(served, body)
    assert (answer.status_code, answer.json()["code"]) == (422, code)


async def test_an_owner_that_cannot_be_part_of_a_key_is_refused(served: Served):
    for owner in ("a b", "a" * 129, "{1}", "é"):
        answer = await served.client.post(
            "/v1/jobs", json=BODY, headers={"x-streamjobs-owner": owner.encode()}
        )
        assert (answer.status_code, answer.json()["field"]) == (422, "owner")


# --- size


async def test_a_declared_body_over_the_limit_is_refused(served: Served):
    answer = await submit(served, b" " * 100_001)
    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
    assert answer.headers["connection"] == "close"


async def test_a_body_over_the_limit_is_counted_as_it_comes(served: Served):
    """Without a length a body has no bound; the server itself has none either."""

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(200):
            yield b" " * 1000

    answer = await served.client.post("/v1/jobs", content=chunks())
    assert answer.status_code == 413


async def test_a_body_at_the_limit_is_taken(served: Served):
    body = json.dumps(BODY).encode()
    assert (await submit(served, body + b" " * (100_000 - len(body)))).status_code == 202


async def test_a_body_that_breaks_off_makes_no_job(served: Served):
    host, port = served.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(b'POST /v1/jobs HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{"kind":"chat"')
    await writer.drain()
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    writer.close()
    await asyncio.sleep(0.1)
    assert await served.store.work.backlog(0) == {}


# --- sending again


async def test_the_same_key_and_body_get_the_same_job(served: Served):
    """A client whose answer was lost sends again; it must not pay for two jobs."""
    first = await submit(served, Idempotency_Key="a b/1")
    again = await submit(served, Idempotency_Key="a b/1")
    assert again.status_code == 202
    assert again.json()["id"] == first.json()["id"]
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"


async def test_a_repeated_submission_shows_where_the_job_is(served: Served):
    first = await submit(served, Idempotency_Key="k")
    await served.store.jobs.cancel(first.json()["id"])
    assert (await submit(served, Idempotency_Key="k")).json()["status"] == "cancelled"


async def test_the_same_key_with_another_body_is_refused(served: Served):
    await submit(served, Idempotency_Key="k")
    answer = await submit(served, BODY | {"priority": "low"}, Idempotency_Key="k")
    assert (answer.status_code, answer.json()["code"]) == (422, "idempotency_mismatch")


async def test_keys_belong_to_owners(served: Served):
    """One tenant's key must not reach another's job."""
    one = await submit(served, Idempotency_Key="k", X_Streamjobs_Owner="a")
    other = await submit(served, Idempotency_Key="k", X_Streamjobs_Owner="b")
    assert one.json()["id"] != other.json()["id"]


async def test_twenty_at_once_make_one_job(served: Served):
    answers = await asyncio.gather(*(submit(served, Idempotency_Key="k") for _ in range(20)))
    assert len({answer.json()["id"] for answer in answers}) == 1


@pytest.mark.parametrize("key", ["", "a" * 256, "a\tb", "é"])
async def test_a_key_of_another_form_is_refused(served: Served, key: str):
    answer = await served.client.post("/v1/jobs", json=BODY, headers={"idempotency-key": key.encode()})
    assert (answer.status_code, answer.json()["field"]) == (400, "Idempotency-Key")


# --- waiting


async def complete_next(served: Served) -> None:
    """Play the worker of the next job."""

    async def take() -> Any:
        return (await served.store.work.take(0, "late", 1, 1, ["default"])).leases

    (lease,) = await wait_until(take)
    await Script(served.store, lease).complete({"answer": 42})


async def test_prefer_wait_answers_with_the_ended_job(served: Served):
    answer, _ = await asyncio.gather(submit(served, Prefer="respond-async, wait=20"), complete_next(served))
    assert answer.status_code == 200
    assert answer.json()["result"] == {"answer": 42}
    assert answer.headers["preference-applied"] == "wait=20"
    assert served.gateway.hub.channels == 0


async def test_prefer_wait_gives_up_in_time(served: Served):
    answer = await submit(served, Prefer="wait=0")
    assert (answer.status_code, answer.json()["status"]) == (202, "queued")
    assert answer.headers["preference-applied"] == "wait=0"


@pytest.mark.parametrize("preference", ["wait=-1", "wait=x", "wait", "waits=3", "return=minimal"])
async def test_a_preference_that_does_not_parse_is_ignored(served: Served, preference: str):
    answer = await submit(served, Prefer=preference)
    assert answer.status_code == 202
    assert "preference-applied" not in answer.headers


async def test_prefer_wait_asks_for_no_more_than_is_allowed(redis: RedisProcess):
    async with serving(redis.url, max_wait=0.05) as served:
        answer = await submit(served, Prefer="wait=600")
        assert answer.status_code == 202


# --- an outage


async def test_without_redis_a_submission_is_asked_to_come_again(own_redis: RedisProcess):
    async with serving(own_redis.url, redis_timeout=1.0) as served:
        own_redis.kill()
        answer = await submit(served)
        assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable")
        assert answer.headers["retry-after"]
        assert str(own_redis.folder) not in answer.text
        own_redis.start()
        assert (await submit(served)).status_code == 202
