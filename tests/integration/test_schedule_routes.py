"""Schedules from outside: by HTTP, by the Python client, by the command line."""

from __future__ import annotations

import asyncio
import json
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from click.testing import CliRunner

from streamjobs.app import App
from streamjobs.cli import options
from streamjobs.cli.main import cli
from streamjobs.client import Client, GatewayError
from tests.conftest import RedisProcess, wait_until
from tests.integration.gateway import Served, serving

BERLIN = "Europe/Berlin"
NIGHTLY = {"name": "nightly", "kind": "greet", "input": "ann", "cron": "0 3 * * *", "timezone": BERLIN}
HOURLY = {"name": "hourly", "kind": "greet", "input": "ann", "every": 3600}
NOBODY = "s0-" + "a" * 26


@pytest.fixture
async def served(redis: RedisProcess) -> AsyncIterator[Served]:
    app = App()

    @app.workflow("greet", timeout=12.0, max_attempts=7, queue="bulk")
    async def greet(_ctx: Any, name: str) -> str:
        return name

    async with serving(redis.url, app, queues=("default", "bulk"), max_body=100_000) as gateway:
        yield gateway


async def ask(served: Served, method: str, path: str = "", body: Any = None, **headers: str) -> Any:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    content = None if body is None else json.dumps(body).encode()
    return await served.client.request(method, f"/v1/schedules{path}", content=content, headers=named)


async def made(served: Served, body: dict[str, Any] = NIGHTLY, **headers: str) -> dict[str, Any]:
    answer = await ask(served, "POST", "", body, **headers)
    assert answer.status_code == 201, answer.text
    return answer.json()


# --- make and look


async def test_a_schedule_is_answered_with_what_it_is(served: Served):
    """Whoever makes a schedule would have to wait a night to see whether it is right."""
    answer = await ask(served, "POST", "", NIGHTLY, X_Streamjobs_Owner="ann@example")
    body = answer.json()
    assert answer.status_code == 201
    assert answer.headers["location"] == f"/v1/schedules/{body['id']}" == body["links"]["self"]
    assert (body["owner"], body["input"], body["queue"], body["timeout"], body["max_attempts"]) == (
        "ann@example", "ann", "bulk", 12.0, 7,
    )  # fmt: skip
    assert (body["missed"], body["overlap"], body["paused"], body["runs"]) == ("skip", "allow", False, 0)
    coming = [datetime.fromtimestamp(ms / 1000, ZoneInfo(BERLIN)) for ms in body["coming_ms"]]
    assert len(coming) == 5 and {moment.hour for moment in coming} == {3}
    assert body["next_ms"] == body["coming_ms"][0]
    assert "every" not in body


async def test_every_field_is_kept(served: Served):
    """A schedule would run with other limits than were asked for."""
    fields = {
        "offset": 60.0, "every": 3600.0, "priority": "low", "thread_id": "t 1", "metadata": {"a": [1]},
        "timeout": 9.0, "max_attempts": 2, "concurrency_key": "k", "missed": "all", "overlap": "skip",
        "queue": "default",
    }  # fmt: skip
    body = await made(served, HOURLY | fields)
    assert {name: body[name] for name in fields} == fields
    again = (await ask(served, "GET", f"/{body['id']}")).json()
    assert again == body


async def test_making_it_again_with_its_key_is_making_it_once(served: Served):
    """A client that tries again after a timeout gets two reports each night."""
    first = await made(served, NIGHTLY, Idempotency_Key="k")
    answer = await ask(served, "POST", "", NIGHTLY, Idempotency_Key="k")
    assert (answer.status_code, answer.json()["id"]) == (201, first["id"])
    assert answer.headers["idempotent-replayed"] == "true"
    other = await ask(served, "POST", "", HOURLY, Idempotency_Key="k")
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_mismatch")


async def test_the_list_is_the_owners(served: Served):
    """One customer sees what another one runs."""
    mine = [await made(served, body) for body in (NIGHTLY, HOURLY)]
    await made(served, X_Streamjobs_Owner="eve")
    listed = (await ask(served, "GET")).json()["schedules"]
    assert [one["id"] for one in listed] == [one["id"] for one in mine]
    assert [one["name"] for one in listed] == ["nightly", "hourly"]


@pytest.mark.parametrize(
    ("change", "status", "code", "field"),
    [
        ({"cron": "61 * * * *"}, 422, "invalid", "cron"),
        ({"cron": "every night"}, 422, "invalid", "cron"),
        ({"cron": ""}, 422, "invalid", "cron"),
        ({"every": 5.0}, 422, "invalid", "cron"),
        ({"timezone": "Berlin"}, 422, "invalid", "timezone"),
        ({"cron": "", "timezone": "UTC", "every": 0.01}, 422, "invalid", "every"),
        ({"cron": "", "timezone": "UTC", "every": 5, "offset": 6}, 422, "invalid", "offset"),
        ({"missed": "later"}, 422, "invalid", "missed"),
        ({"name": ""}, 422, "invalid", "name"),
        ({"name": " "}, 422, "invalid", "name"),
        ({"kind": "greeet"}, 422, "unknown_kind", None),
        ({"input": 7}, 422, "invalid", "input"),
        ({"input": "a\x00b"}, 422, "invalid", "input"),
        ({"queue": "nowhere"}, 422, "unknown_queue", "queue"),
        ({"crom": "* * * * *"}, 422, "invalid", "crom"),
    ],
)
async def test_a_refusal_names_the_field(
    served: Served, change: dict[str, Any], status: int, code: str, field: str | None
):
    """`422` and no word which of sixteen fields; or a schedule that never runs."""
    answer = await ask(served, "POST", "", NIGHTLY | change)
    problem = answer.json()
    assert (answer.status_code, problem["code"], problem.get("field")) == (status, code, field), problem
    assert (await ask(served, "GET")).json() == {"schedules": []}


async def test_a_body_that_is_none(served: Served):
    """A broken client would be told that the server is broken."""
    assert (await served.client.post("/v1/schedules", content=b"{")).status_code == 400
    assert (await served.client.post("/v1/schedules", content=b"x" * 200_000)).status_code == 413


async def test_what_is_somebody_elses_is_not_there(served: Served):
    """Anybody who learns an id could stop another customer's work."""
    mine = (await made(served))["id"]
    calls = [("GET", ""), ("DELETE", ""), ("POST", "/pause"), ("POST", "/resume"), ("POST", "/trigger")]
    for method, act in calls:
        for path, owner in ((f"/{mine}", "eve"), (f"/{NOBODY}", "anonymous"), ("/x", "anonymous")):
            answer = await ask(served, method, path + act, X_Streamjobs_Owner=owner)
            assert (answer.status_code, answer.json()["code"]) == (404, "not_found"), (method, path, act)
    after = (await ask(served, "GET", f"/{mine}")).json()
    assert (after["paused"], after["runs"]) == (False, 0)


# --- act


async def test_pause_resume_delete(served: Served):
    """What does harm at three in the morning could not be stopped."""
    schedule_id = (await made(served))["id"]
    for _ in range(2):
        paused = (await ask(served, "POST", f"/{schedule_id}/pause")).json()
        assert (paused["paused"], paused["next_ms"], paused["coming_ms"]) == (True, None, [])
    for _ in range(2):
        resumed = (await ask(served, "POST", f"/{schedule_id}/resume")).json()
        assert (resumed["paused"], len(resumed["coming_ms"])) == (False, 5)
    assert (await ask(served, "DELETE", f"/{schedule_id}")).json() == {"id": schedule_id, "deleted": True}
    assert (await ask(served, "DELETE", f"/{schedule_id}")).status_code == 404


async def test_trigger(served: Served):
    """Whoever wrote a nightly report would have to wait for the night to see it."""
    schedule_id = (await made(served))["id"]
    answer = await ask(served, "POST", f"/{schedule_id}/trigger", Idempotency_Key="now")
    job = answer.json()
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}" == job["links"]["self"]
    assert (job["kind"], job["status"]) == ("greet", "queued")
    again = await ask(served, "POST", f"/{schedule_id}/trigger", Idempotency_Key="now")
    assert (again.json()["id"], again.headers["idempotent-replayed"]) == (job["id"], "true")
    page = await served.store.log.page(job["id"])
    assert json.loads(page.entries[0].data)["schedule"] == schedule_id


async def test_the_gateway_makes_the_ticks(served: Served):
    """With the workers scaled to zero nothing would be filed for them."""
    record = await made(served, HOURLY | {"every": 1})

    async def has_run() -> bool:
        return (await ask(served, "GET", f"/{record['id']}")).json()["runs"] >= 2

    await wait_until(has_run, 60, "two ticks")
    await ask(served, "DELETE", f"/{record['id']}")


# --- the client and the command line


async def test_the_client(served: Served):
    """The same would have to be written again in every program."""
    async with Client(served.url, owner="ann") as client:
        api = client.schedules
        when = {"cron": "0 3 * * *", "timezone": BERLIN}
        made = await api.create("nightly", "greet", "ann", key="k", **when)
        assert await api.create("nightly", "greet", "ann", key="k", **when) == made
        assert [one["id"] for one in await api.list()] == [made["id"]]
        assert (await api.pause(made["id"]))["paused"]
        assert not (await api.resume(made["id"]))["paused"]
        job = await api.trigger(made["id"], key="now")
        assert (await api.trigger(made["id"], key="now"))["id"] == job["id"]
        assert (await api.get(made["id"]))["last_job"] == job["id"]
        await api.delete(made["id"])
        with pytest.raises(GatewayError, match="no such schedule"):
            await api.get(made["id"])


@pytest.fixture
def shell(served: Served, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`streamjobs schedules …` against the gateway; its output, or with `fails` its error.

    What succeeds runs in this process: a new one for each command would take a busy machine a minute.
    """
    monkeypatch.setattr(options, "run", asyncio.run)  # which leaves this process's garbage collection alone

    async def run(*words: str, fails: bool = False, stdin: str = "") -> str:
        args = ["schedules", *words, "--url", served.url]
        if fails:
            return await refused(args)
        result = await asyncio.to_thread(CliRunner().invoke, cli, args, input=stdin, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        lines = result.stdout.splitlines(keepends=True)
        return "".join(line for line in lines if "[debug " not in line)  # the gateway's, in this process

    return run


async def refused(args: list[str]) -> str:
    """What the program says at its end, in a process of its own."""
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "streamjobs", *args, stderr=PIPE)
    _, errors = await process.communicate()
    assert process.returncode != 0, errors
    return errors.decode()


async def test_a_day_at_the_command_line(served: Served, shell: Any):
    """An operator at night has a terminal and nothing else."""
    words = ("create", "nightly", "greet", "--input", '"ann"', "--cron", "0 3 * * *", "--timezone", BERLIN)
    schedule_id = (await shell(*words, "--missed", "once", "--overlap", "skip")).strip()
    pulse = json.loads(await shell("create", "pulse", "--every", "90", "--prompt", "Hi", "--json"))
    assert (pulse["kind"], pulse["input"], pulse["every"]) == ("chat", {"prompt": "Hi"}, 90)
    head, nightly, _ = (await shell("list")).splitlines()
    assert head.split() == ["ID", "NAME", "KIND", "WHEN", "NEXT", "RUNS", "SKIPPED", "STATE"]
    assert nightly.startswith(f"{schedule_id}  nightly  greet  0 3 * * * {BERLIN}  ")
    assert " 03:00:00+0" in nightly and nightly.endswith("active")
    assert len(json.loads(await shell("list", "--json"))) == 2
    shown = await shell("show", schedule_id)
    assert "missed: once; overlap: skip" in shown
    assert shown.count("coming") == 5
    assert (await shell("pause", schedule_id)).strip() == f"{schedule_id}  paused"
    assert (await shell("list")).splitlines()[1].endswith("paused")
    job_id = (await shell("trigger", schedule_id, "--key", "k")).strip()
    assert (await served.store.jobs.get(job_id)).kind == "greet"
    assert (await shell("resume", schedule_id)).startswith(f"{schedule_id}  resumed, next at ")
    assert f"last     -  {job_id}" in await shell("show", schedule_id)
    assert (await shell("delete", schedule_id)).strip() == f"{schedule_id}  deleted"
    assert json.loads(await shell("delete", pulse["id"], "--json")) == {"id": pulse["id"], "deleted": True}
    assert await shell("list", "--json") == "[]\n"


async def test_what_the_command_line_refuses(shell: Any):
    """A typo in a cron would be found the next morning."""
    wrong = ("create", "nightly", "greet", "--input", '"ann"', "--cron", "0 25 * * *")
    assert "cron: '0 25 * * *' does not parse: Bad hour" in await shell(*wrong, fails=True)
    assert "--input is not JSON" in await shell("create", "x", "greet", "--input", "{", fails=True)
    assert "no such schedule" in await shell("show", NOBODY, fails=True)


async def test_input_from_a_pipe(shell: Any):
    """Longer inputs do not fit on a command line."""
    words = ("create", "nightly", "greet", "--input", "-", "--every", "60", "--json")
    assert json.loads(await shell(*words, stdin='"ben"'))["input"] == "ben"
