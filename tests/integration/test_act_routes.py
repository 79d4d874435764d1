"""Pausing, resuming and deciding over HTTP, and what an ended job says to all of it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from streamjobs.events import ApprovalRequested
from tests.conftest import RedisProcess
from tests.integration.gateway import Script, Served, serving

NOBODY = "j0-" + "a" * 26
ALICE = {"x-streamjobs-owner": "alice"}


@pytest.fixture
async def served(redis: RedisProcess) -> AsyncIterator[Served]:
    async with serving(redis.url) as gateway:
        yield gateway


async def queued(served: Served) -> str:
    body = {"kind": "chat", "input": {"prompt": "a"}}
    job_id: str = (await served.client.post("/v1/jobs", json=body)).json()["id"]
    return job_id


async def act(served: Served, job_id: str, what: str, status: int = 200, **options: Any) -> Any:
    answer = await served.client.post(f"/v1/jobs/{job_id}/{what}", **options)
    assert answer.status_code == status, answer.text
    return answer.json()


async def events_of(served: Served, job_id: str) -> list[tuple[str, Any]]:
    return [
        (entry.type, json.loads(entry.data))
        async for page in served.store.log.pages(job_id)
        for entry in page.entries
    ]


# --- pause, resume


async def test_a_queued_job_is_parked_and_goes_on(served: Served):
    """An operator could not hold a job back, or could not let it go again."""
    job_id = await queued(served)
    assert (await act(served, job_id, "pause", json={"reason": "lunch"}, headers=ALICE))["status"] == "paused"
    assert (await served.client.get(f"/v1/jobs/{job_id}")).json()["status"] == "paused"
    assert (await act(served, job_id, "resume", headers=ALICE))["status"] == "resumed"
    assert (await served.client.get(f"/v1/jobs/{job_id}")).json()["status"] == "queued"
    paused, resumed = (await events_of(served, job_id))[1:]
    assert paused[0] == "job.paused"
    assert (paused[1]["by"], paused[1]["reason"]) == ("alice", "lunch")
    assert (resumed[0], resumed[1]["by"]) == ("job.resumed", "alice")


async def test_a_running_job_is_asked_to_pause(served: Served):
    """Somebody is told that it stands still while it still runs."""
    script = await served.script()
    for _ in range(2):
        assert (await act(served, script.id, "pause"))["status"] == "requested"
    assert (await act(served, script.id, "resume"))["status"] == "resumed"
    assert (await act(served, script.id, "resume"))["status"] == "running"


@pytest.mark.parametrize("is_running", [False, True])
async def test_a_key_makes_pause_and_resume_safe_to_send_again(served: Served, is_running: bool):
    """A pause whose answer was lost, sent again after somebody resumed, would park the job once more."""
    job_id = (await served.script()).id if is_running else await queued(served)
    pause, resume = {"idempotency-key": "k1"}, {"idempotency-key": "k2"}
    first = await act(served, job_id, "pause", headers=pause)
    again = await act(served, job_id, "pause", headers=pause)
    assert (first["status"], first["repeated"], again["repeated"]) == (again["status"], False, True)
    resumed = await act(served, job_id, "resume", headers=resume)
    assert (resumed["status"], resumed["repeated"]) == ("resumed", False)
    assert (await act(served, job_id, "resume", headers=resume))["repeated"] is True
    await act(served, job_id, "pause", headers=pause)
    assert (await served.client.get(f"/v1/jobs/{job_id}")).json()["status"] in {"queued", "running"}


async def test_keys_of_different_acts_do_not_meet(served: Served):
    """A client that numbers its requests for each route: its pause would pass for a repeated signal."""
    script = await served.script()
    await act(served, script.id, "signal", json={"name": "ready", "key": "1"})
    key = {"idempotency-key": "1"}
    assert (await act(served, script.id, "pause", headers=key))["repeated"] is False
    assert (await act(served, script.id, "resume", headers=key))["repeated"] is False


@pytest.mark.parametrize("what", ["pause", "resume"])
async def test_a_body_that_does_not_fit_is_refused(served: Served, what: str):
    """A reason in a mistyped field would be lost without a word."""
    job_id = await queued(served)
    assert (await act(served, job_id, what, 422, json={"resaon": "x"}))["field"] == "resaon"
    assert (await act(served, job_id, what, 422, json={"reason": "x" * 1001}))["field"] == "reason"
    assert (await act(served, job_id, what, 400, content=b"{"))["code"] == "bad_request"
    assert (await act(served, job_id, what, 400, headers={"idempotency-key": "x" * 256}))["status"] == 400
    assert (await act(served, NOBODY, what, 404))["code"] == "not_found"


@pytest.mark.parametrize("what", ["cancel", "signal", "pause", "resume"])
async def test_an_ended_job_says_how_it_ended(served: Served, what: str):
    """A caller that is late cannot tell a success from a failure without asking again."""
    script = await served.script()
    await script.complete()
    problem = await act(served, script.id, what, 409, json={"name": "a"} if what == "signal" else {})
    assert (problem["code"], problem["job_status"], problem["status"]) == ("job_ended", "completed", 409)
    assert "completed" in problem["detail"]


# --- decisions


@pytest.mark.parametrize(
    ("sent", "decision"),
    [
        ({"name": "approve"}, "approve"),
        ({"name": "deny"}, "deny"),
        ({"name": "approval", "payload": {"decision": "approve"}}, "approve"),
        ({"name": "approval", "payload": {"approved": False}}, "deny"),
        ({"name": "approval", "payload": "deny"}, "deny"),
    ],
)
async def test_a_decision_has_one_form_in_the_log(served: Served, sent: dict[str, Any], decision: str):
    """Who decided what would be told in five ways, and not by whom."""
    script = await asking(served)
    assert await act(served, script.id, "signal", json=sent, headers=ALICE) == {
        "id": script.id,
        "signal": "approval",
        "repeated": False,
    }
    kind, said = (await events_of(served, script.id))[-1]
    assert (kind, said["name"], said["by"]) == ("signal.received", "approval", "alice")
    assert said["payload"] == {"decision": decision, "comment": "", "key": ""}


async def asking(served: Served) -> Script:
    """A job that asks a person."""
    script = await served.script()
    await script.write(ApprovalRequested(key="call-7", subject="tool", message="May it?"))
    return script


@pytest.mark.parametrize("payload", [True, {"ok": True}, {"approved": True}, "later"])
async def test_an_approval_of_the_workflows_own_is_left_alone(served: Served, payload: Any):
    """`ctx.wait_for("approval")` would get another value than was sent."""
    script = await served.script()
    await act(served, script.id, "signal", json={"name": "approval", "payload": payload})
    _, said = (await events_of(served, script.id))[-1]
    assert said["payload"] == payload


async def test_comment_and_request_key_of_a_decision_are_kept(served: Served):
    """A yes for one payment would be taken for another's, and the reason of a no would be lost."""
    script = await served.script()
    body = {"name": "deny", "payload": {"comment": "too much", "key": "call-7"}, "key": "once"}
    assert (await act(served, script.id, "signal", json=body))["repeated"] is False
    assert (await act(served, script.id, "signal", json=body))["repeated"] is True
    decisions = [said for kind, said in await events_of(served, script.id) if kind == "signal.received"]
    assert [said["payload"] for said in decisions] == [
        {"decision": "deny", "comment": "too much", "key": "call-7"}
    ]


@pytest.mark.parametrize(
    "payload", [None, {}, {"decision": "maybe"}, {"decision": None}, {"approve": "yes"}, {"ok": True}, 1]
)
async def test_what_decides_nothing_is_refused(served: Served, payload: Any):
    """A decision that no worker can read would be answered with 200, and the job would wait on."""
    script = await asking(served)
    problem = await act(served, script.id, "signal", 422, json={"name": "approval", "payload": payload})
    assert problem["code"] == "invalid"
    assert problem["field"].startswith("payload.")
    assert [kind for kind, _ in await events_of(served, script.id)].count("signal.received") == 0


async def test_a_decision_names_its_field_when_it_is_refused(served: Served):
    """A form could not mark the field that is wrong."""
    script = await asking(served)
    problem = await act(served, script.id, "signal", 422, json={"name": "approval", "payload": {}})
    assert problem["field"] == "payload.decision"
    body = {"name": "approve", "payload": {"key": 7}}
    assert (await act(served, script.id, "signal", 422, json=body))["field"] == "payload.key"
