"""Results, logs for people, effects, artifacts and the catalog over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from streamjobs import App, Context
from streamjobs import events as ev
from streamjobs.events import ErrorInfo
from streamjobs.store import Submission, keys
from tests.conftest import RedisProcess
from tests.integration.gateway import Script, Served, serving
from tests.projections.bench import carry

NOBODY = "j0-" + "a" * 26


@pytest.fixture
async def served(redis: RedisProcess) -> AsyncIterator[Served]:
    async with serving(redis.url) as gateway:
        yield gateway


async def get(served: Served, path: str, expected: int = 200, /, **query: Any) -> Any:
    answer = await served.client.get(path, params=query)
    assert answer.status_code == expected, answer.text
    return answer.json()


# --- the owner's jobs


async def submitted(served: Served, owner: str, *kinds: str) -> list[str]:
    """Jobs of these kinds, newest first."""
    store, ids = served.store, list[str]()
    for kind in kinds:
        ids.append((await store.jobs.submit(Submission(kind=kind, owner=owner))).job_id)
        await store.client.hset(keys.job_key(ids[-1]), "created", await store.now_ms() + len(ids))
    await carry(store)
    return ids[::-1]


async def test_an_owner_sees_his_own_jobs_newest_first(served: Served):
    """Whoever has lost an id has lost the job; and sees everybody else's."""
    mine, other = await submitted(served, "alice", "a", "b"), await submitted(served, "bob", "a")
    alice, bob = {"x-streamjobs-owner": "alice"}, {"x-streamjobs-owner": "bob"}
    found = (await served.client.get("/v1/jobs", headers=alice)).json()
    assert [job["id"] for job in found["jobs"]] == mine
    assert found["cursor"] == ""
    assert [job["id"] for job in (await served.client.get("/v1/jobs", headers=bob)).json()["jobs"]] == other
    newest = found["jobs"][0]
    assert (newest["kind"], newest["status"], newest["owner"], newest["queue"]) == (
        "b",
        "queued",
        "alice",
        "default",
    )
    assert abs(newest["created_ms"] - await served.store.now_ms()) < 60_000
    assert (await get(served, "/v1/jobs"))["jobs"] == []


async def test_jobs_are_chosen_and_paged(served: Served):
    """The failed one would have to be looked for among thousands."""
    ids = await submitted(served, "anonymous", *"abcab")
    await served.store.jobs.cancel(ids[1])
    assert [job["id"] for job in (await get(served, "/v1/jobs", kind="a"))["jobs"]] == [ids[1], ids[4]]
    assert [job["id"] for job in (await get(served, "/v1/jobs", status="cancelled"))["jobs"]] == [ids[1]]
    assert (await get(served, "/v1/jobs", status="failed"))["jobs"] == []
    found, cursor = list[str](), ""
    for _ in range(10):
        page = await get(served, "/v1/jobs", limit="2", cursor=cursor)
        found += [job["id"] for job in page["jobs"]]
        cursor = page["cursor"]
        if not cursor:
            break
    assert found == ids


async def test_jobs_are_found_by_thread_and_time_and_counted(served: Served):
    """A chat page could not show its conversation's jobs, nor how many still run."""
    submission = Submission(kind="a", thread_id="t1", message_id="m1")
    job_id = (await served.store.jobs.submit(submission)).job_id
    (other,) = await submitted(served, "anonymous", "b")
    await served.store.jobs.cancel(other)
    await carry(served.store)
    for query in ({"thread": "t1"}, {"message": "m1"}, {"until": "2100-01-01T00:00:00Z", "kind": "a"}):
        (job,) = (await get(served, "/v1/jobs", **query))["jobs"]
        assert (job["id"], job["thread_id"], job["message_id"]) == (job_id, "t1", "m1")
    for query in ({"thread": "t2"}, {"queue": "bulk"}, {"since": "2100-01-01T00:00:00+01:00"}):
        assert (await get(served, "/v1/jobs", **query))["jobs"] == []
    answer = await get(served, "/v1/jobs", counts="1", limit="1")
    assert answer["counts"] == {"queued": 1, "cancelled": 1}
    assert "counts" not in await get(served, "/v1/jobs")


@pytest.mark.parametrize(
    ("query", "status", "field"),
    [
        ({"status": "dead"}, 422, "status"),
        ({"since": "yesterday"}, 422, "since"),
        ({"counts": "2"}, 422, "counts"),
        ({"limit": "501"}, 422, "limit"),
        ({"stauts": "failed"}, 422, "stauts"),
        ({"cursor": "x"}, 400, None),
    ],
)
async def test_a_list_is_refused_what_it_does_not_know(
    served: Served, query: dict[str, str], status: int, field: str | None
):
    """A mistyped filter would show everything, as if it all were what was looked for."""
    assert (await get(served, "/v1/jobs", status, **query)).get("field") == field


# --- result


async def test_a_result_says_where_the_job_is_until_it_ends(served: Served):
    """A caller would take the absence of a result for an empty one."""
    script = await served.script()
    before = await get(served, f"/v1/jobs/{script.id}/result")
    assert (before["id"], before["kind"], before["status"], before["output"], before["error"]) == (
        script.id,
        "chat",
        "running",
        None,
        None,
    )
    waiting = asyncio.create_task(get(served, f"/v1/jobs/{script.id}/result", wait="20"))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await script.complete({"text": "done"})
    after = await waiting
    assert (after["status"], after["output"]) == ("completed", {"text": "done"})
    assert served.gateway.hub.channels == 0


async def test_a_result_says_what_it_cost(served: Served):
    """A bill could not be written without folding the log."""
    script = await served.script()
    await script.open_turn()
    await script.write(ev.TurnCompleted(turn=1, usage=ev.Usage(10, 20)))
    await script.complete()
    metrics = (await get(served, f"/v1/jobs/{script.id}/result"))["metrics"]
    assert (metrics["input_tokens"], metrics["output_tokens"], metrics["requests"]) == (10, 20, 1)
    assert {"tool_calls", "steps", "seconds"} <= set(metrics)


async def test_a_result_is_refused_what_it_cannot_do(served: Served):
    """A mistyped wait would answer at once, as if the job were done."""
    script = await served.script()
    assert (await get(served, f"/v1/jobs/{script.id}/result", 422, wait="long"))["field"] == "wait"
    assert (await get(served, f"/v1/jobs/{NOBODY}/result", 404))["code"] == "not_found"


# --- log


async def logged(script: Script) -> None:
    await script.write(
        ev.JobLog(ts=1, level="debug", message="a"),
        ev.JobProgress(percent=10),
        ev.JobLog(ts=2, level="info", message="b", data={"n": 1}),
        ev.JobLog(ts=3, level="warning", message="c"),
        ev.JobLog(ts=4, level="error", message="d"),
        ev.JobLog(ts=5, level="verbose", message="e"),
    )


@pytest.mark.parametrize(
    ("query", "messages"),
    [
        ({}, "abcde"),
        ({"level": "debug"}, "abcde"),
        ({"level": "info"}, "bcde"),
        ({"level": "warning"}, "cd"),
        ({"level": "critical"}, ""),
        ({"limit": "2"}, "de"),
        ({"level": "warning", "limit": "1"}, "d"),
    ],
)
async def test_lines_are_chosen_by_level_and_number(served: Served, query: dict[str, str], messages: str):
    """The one warning would have to be looked for among thousands of lines."""
    script = await served.script()
    await logged(script)
    answer = await get(served, f"/v1/jobs/{script.id}/log", **query)
    assert "".join(line["message"] for line in answer["lines"]) == messages


async def test_a_line_says_when_and_what(served: Served):
    """Lines could not be put beside the logs of other systems, and their data would be lost."""
    script = await served.script()
    await logged(script)
    answer = await get(served, f"/v1/jobs/{script.id}/log")
    line = answer["lines"][1]
    assert line.pop("cursor").startswith("5-")
    assert line == {"ts": 2, "level": "info", "message": "b", "data": {"n": 1}}
    assert (answer["job"], answer["cursor"].partition("-")[0]) == (script.id, "8")


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ({"level": "loud"}, "level"),
        ({"limit": "0"}, "limit"),
        ({"limit": "x"}, "limit"),
        ({"limit": "100000"}, "limit"),
        ({"lvel": "info"}, "lvel"),
    ],
)
async def test_a_filter_that_does_not_fit_is_refused(served: Served, query: dict[str, str], field: str):
    """A mistyped filter would show everything, as if nothing had been filtered."""
    script = await served.script()
    assert (await get(served, f"/v1/jobs/{script.id}/log", 422, **query))["field"] == field


# --- effects


async def test_effects_tell_how_far_each_is(served: Served):
    """After a crash nobody could say whether the mail was sent."""
    script = await served.script()
    await script.open_turn()
    await script.say("let me see")
    await script.write(
        ev.TurnCompleted(turn=1),
        ev.ToolCalled(ts=10, call_id="c1", tool="send", turn=1),
        ev.ToolCalled(ts=10, call_id="c2", tool="look", turn=1),
        ev.ToolStarted(ts=12, call_id="c1", idempotency_key="ik", effect="once"),
        ev.ToolFailed(ts=15, call_id="c2", error=ErrorInfo("tool_error", "no")),
        ev.StepStarted(ts=16, key="pay:0f", name="pay", effect="idempotent"),
        ev.StepCompleted(ts=20, key="pay:0f", ms=4),
    )
    answer = await get(served, f"/v1/jobs/{script.id}/effects")
    rows = [(row["kind"], row["key"], row["name"], row["state"]) for row in answer["effects"]]
    assert rows == [
        ("tool", "c1", "send", "started"),
        ("tool", "c2", "look", "failed"),
        ("step", "pay:0f", "pay", "confirmed"),
    ]
    worker = (await get(served, f"/v1/jobs/{script.id}"))["worker"]
    assert answer["effects"][0] == {
        "kind": "tool", "key": "c1", "name": "send", "effect": "once", "idempotency_key": "ik",
        "state": "started", "approval": "", "attempts": 1, "turn": 1, "intended_ms": 10, "started_ms": 12,
        "ended_ms": None, "ms": None, "error": None, "workers": [worker],
    }  # fmt: skip
    assert answer["effects"][1]["error"]["code"] == "tool_error"
    assert answer["cursor"] == str((await served.store.jobs.get(script.id)).last)


async def test_a_job_without_effects_has_an_empty_ledger(served: Served):
    """An error would look like a job that cannot be accounted for."""
    script = await served.script()
    assert (await get(served, f"/v1/jobs/{script.id}/effects"))["effects"] == []
    assert (await get(served, f"/v1/jobs/{NOBODY}/effects", 404))["code"] == "not_found"


# --- artifacts


async def test_an_artifact_is_a_download_in_a_sandbox(served: Served):
    """A page that a job made would run in the gateway's origin, with the viewer's rights."""
    script = await served.script()
    content = b"<script>\x00\xff"
    await script.keep("report.html", "text/html", content)
    answer = await served.client.get(f"/v1/jobs/{script.id}/artifacts/report.html")
    assert answer.content == content
    assert answer.headers["content-type"] == "text/html"
    assert answer.headers["content-disposition"] == 'attachment; filename="report.html"'
    assert answer.headers["content-security-policy"].startswith("sandbox")
    assert answer.headers["x-content-type-options"] == "nosniff"


async def test_an_artifact_that_is_not_there_is_told_from_a_job_that_is_not(served: Served):
    """A mistyped name would look like a job that is gone."""
    script = await served.script()
    path = f"/v1/jobs/{script.id}/artifacts"
    assert (await get(served, f"{path}/nope", 404))["code"] == "artifact_not_found"
    assert (await get(served, f"{path}/%00", 404))["code"] == "artifact_not_found"
    assert (await get(served, f"/v1/jobs/{NOBODY}/artifacts/nope", 404))["code"] == "not_found"


# --- the catalog


async def test_the_catalog_says_what_may_be_submitted(redis: RedisProcess):
    """A page or a script would have to know by heart what to submit, and in which form."""
    app = App(builtin_tools=False)

    @app.workflow("review", queue="bulk")
    async def review(ctx: Context, path: str) -> str:
        """Review a folder."""
        return path

    @app.tool(effect="once")
    def send(to: str) -> str:
        """Send a mail."""
        return to

    async with serving(redis.url, app, queues=("default", "bulk")) as served:
        chat, own = (await get(served, "/v1/workflows"))["workflows"]
        tools = (await get(served, "/v1/tools"))["tools"]
    assert (chat["kind"], chat["queue"]) == ("chat", None)
    assert "prompt" in str(chat["input_schema"])
    assert own == {
        "kind": "review",
        "description": "Review a folder.",
        "input_schema": review_schema(app),
        "queue": "bulk",
    }
    assert [(tool["name"], tool["description"], tool["effect"]) for tool in tools] == [
        ("send", "Send a mail.", "once")
    ]
    assert tools[0]["parameters"]["required"] == ["to"]


def review_schema(app: App) -> dict[str, Any]:
    return dict(app.workflows["review"].input_schema)
