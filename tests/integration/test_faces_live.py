"""Every command, and the Python client's handles, against `streamjobs dev` with an App."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner, Result

from streamjobs.cli import options
from streamjobs.cli.main import cli
from streamjobs.client import Client, GatewayError, JobCancelled, JobFailed
from tests.conftest import wait_until
from tests.integration.dev import running_dev

ROLES = {"demo", "dev", "doctor", "keys", "projector", "provider", "schedules", "serve", "worker"}
"""Commands that talk to no gateway, and the group that has tests of its own."""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_dev(tmp_path_factory.mktemp("dev"), "tests.integration.cli_app:app") as (_, url):
        yield url


@pytest.fixture(autouse=True)
def plain_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands tune the garbage collection of their process; this one is not theirs."""
    monkeypatch.setattr(options, "run", asyncio.run)


class Shell:
    """Somebody at a terminal, with a gateway and a name."""

    def __init__(self, url: str, owner: str) -> None:
        self._where = ("--url", url, "--owner", owner)
        self.used: set[str] = set()

    def __call__(self, *words: str, status: int = 0) -> Result:
        self.used.add(words[0])
        result = CliRunner().invoke(cli, [*words, *self._where], catch_exceptions=False)
        assert result.exit_code == status, result.output
        return result

    def json(self, *words: str, status: int = 0) -> Any:
        return json.loads(self(*words, "--json", status=status).stdout)

    def until(self, job_id: str, status: str) -> dict[str, Any]:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            view = self.json("status", job_id)
            if view["status"] == status:
                return view
            time.sleep(0.05)
        raise TimeoutError(f"{job_id} is {view['status']}, not {status}")

    def listed(self, job_id: str, *filters: str) -> None:
        """Wait until a list shows a job: lists are a moment behind."""
        deadline = time.monotonic() + 60
        while job_id not in self("list", *filters).stdout:
            assert time.monotonic() < deadline, "the list does not show the job"
            time.sleep(0.05)


def test_every_command_does_its_work(url: str):
    """The help promises a command that no gateway answers, or a table that no answer fits."""
    shell = Shell(url, "olga")
    looks_at_a_job(shell)
    steers_jobs(shell)
    operates(shell)
    assert shell.used == {name for name, command in cli.commands.items() if not command.hidden} - ROLES


def looks_at_a_job(shell: Shell) -> None:
    job_id = shell("submit", "report", "--input", '"one two"').stdout.strip()
    assert shell.json("result", job_id, "--wait", "30")["output"] == {"words": 2}
    assert shell("result", job_id).stdout == '{"words":2}\n'
    assert "completed" in shell("status", job_id).stdout
    assert "job.completed" in shell("watch", job_id, "--after", "0").stdout
    assert shell("log", job_id, "--level", "warning").stdout.rstrip().endswith('counted  {"words":2}')
    (effect,) = shell.json("effects", job_id)
    assert (effect["kind"], effect["name"], effect["state"]) == ("step", "count", "confirmed")
    assert "confirmed" in shell("effects", job_id).stdout
    shell.listed(job_id, "--kind", "report", "--status", "completed")
    assert "report" in shell("stats").stdout
    assert "index" in shell("projections", "lag").stdout
    assert "will rebuild" in shell("projections", "rebuild", "stats").stdout
    assert len(json.loads(shell("submit", "large", "--wait", "--json").stdout)["output"]) == 200_000


def steers_jobs(shell: Shell) -> None:
    asks = shell("submit", "ask").stdout.strip()
    shell.until(asks, "waiting")
    assert "go on?" in shell("status", asks).stdout
    assert shell("pause", asks).stdout == f"{asks}  paused\n"
    assert shell("resume", asks).stdout == f"{asks}  resumed\n"
    shell("approve", asks, "--comment", "fine")
    assert shell.json("result", asks, "--wait", "30")["output"] == {
        "approved": True,
        "comment": "fine",
        "by": "olga",
    }
    refused = shell("submit", "ask").stdout.strip()
    shell("deny", refused, "--comment", "no")
    assert shell.json("result", refused, "--wait", "30")["output"]["approved"] is False
    listens = shell("submit", "listen").stdout.strip()
    shell("signal", listens, "go", "--payload", "[1]")
    assert shell("result", listens, "--wait", "30").stdout == "[1]\n"
    waits = shell("submit", "listen", "--delay", "600").stdout.strip()
    assert shell("result", waits, status=3).stderr == "streamjobs: scheduled\n"
    shell("cancel", waits)
    assert "cancelled" in shell("result", waits, status=2).stderr


def operates(shell: Shell) -> None:
    assert shell("canary", "--once").stdout.startswith("ok: first event after ")
    fails = shell("submit", "broken").stdout.strip()
    assert "it cannot work" in shell("result", fails, "--wait", "30", status=2).stderr
    assert fails in shell("dead", "--kind", "broken", "--since", "1h").stdout
    again = shell.json("rerun", fails)["rerun"][0]["to"]
    assert shell.json("status", again)["rerun_of"] == fails
    shell("result", again, "--wait", "30", status=2)
    assert shell.json("rerun", "--dead", "--kind", "broken", "--of", "olga")["rerun"][0]["from"] == again
    assert shell("strike", "kind", "listen", "--reason", "moving").stdout == "kind listen  struck\n"
    assert "moving" in shell("strikes").stdout
    assert shell("unstrike", "kind", "listen").stdout == "kind listen  goes on\n"
    assert "default" in shell("queues").stdout
    assert len(shell.json("workers")) == 1
    assert "default" in shell("workers").stdout
    is_told_and_forgets(shell, again)


def is_told_and_forgets(shell: Shell, failed: str) -> None:
    hook = shell.json("webhooks", "create", "https://example.org/hook", "--event", "job.failed")
    assert hook["secret"].startswith("whsec_")
    assert hook["id"] in shell("webhooks", "list").stdout
    shell("webhooks", "delete", hook["id"])
    deadline = time.monotonic() + 60
    while failed not in shell("notifications", "list").stdout:
        assert time.monotonic() < deadline, "nobody was told"
        time.sleep(0.05)
    assert "job.failed" in shell("export", failed).stdout
    assert failed in shell("delete", failed).stdout
    with pytest.raises(GatewayError, match="no such job"):
        shell("status", failed)


# --- handles


async def test_a_handle_goes_from_start_to_result(url: str):
    """A program would have to know the routes by heart."""
    async with Client(url, owner="bo") as client:
        handle = await client.start("report", "a b", key="k1", metadata={"n": 1})
        assert await handle.result(timeout=30) == {"words": 2}
        assert (await client.start("report", "a b", key="k1", metadata={"n": 1})).id == handle.id
        assert await handle.status() == "completed"
        assert [line["message"] for line in await handle.log(level="info")] == ["counted"]
        assert await handle.artifact("words.txt") == b"a b"
        assert [event.type async for event in handle.events("0")][-1] == "job.completed"
        view = await handle.view()
        assert (view["metadata"], view["metrics"]["steps"]) == ({"n": 1}, 1)

        async def listed() -> list[str]:
            return [job["id"] for job in (await client.jobs(kind="report"))["jobs"]]

        assert await wait_until(listed) == [handle.id]
        assert len(await (await client.start("large")).result(timeout=30)) == 200_000


async def test_a_handle_asks_and_steers(url: str):
    """A program that approves for people would do it by hand."""
    async with Client(url, owner="bo") as client:
        handle = await client.start("ask", start_timeout=60, timeout=60)
        await handle.approve("by machine")
        assert (await handle.result(timeout=30))["comment"] == "by machine"
        listening = await client.start("listen")
        with pytest.raises(TimeoutError):
            await listening.result(timeout=0.2)
        assert await listening.signal("go", {"n": 1}, key="once") is True
        assert await listening.result(timeout=30) == {"n": 1}
        with pytest.raises(GatewayError) as refused:
            await listening.signal("go")
        assert (refused.value.code, refused.value.http_status) == ("job_ended", 409)


async def test_what_went_wrong_is_raised(url: str):
    """A program would go on with the None of a job that failed."""
    async with Client(url, owner="bo") as client:
        with pytest.raises(JobFailed, match="it cannot work") as failed:
            await (await client.start("broken")).result(timeout=30)
        assert failed.value.error["code"] == "permanent"
        waiting = await client.start("listen", delay=600)
        await waiting.cancel("enough")
        with pytest.raises(JobCancelled):
            await waiting.result(timeout=30)


async def test_the_fleet_is_seen_and_steered(url: str):
    """An operator's own dashboard could not be written with the client."""
    async with Client(url, owner="fay") as client:
        assert {one["kind"] for one in await client.workflows()} >= {"chat", "ask", "report"}
        assert {"name", "description", "parameters", "effect"} <= set((await client.tools())[0])
        assert [queue["name"] for queue in await client.queues()] == ["default"]
        assert await client.strike("tool", "http_get", "leaks") is True
        assert [one["name"] for one in await client.strikes()] == ["http_get"]
        assert await client.unstrike("tool", "http_get") is True
        assert await client.unstrike("tool", "http_get") is False
        failed = await client.start("broken")
        with pytest.raises(JobFailed):
            await failed.result(timeout=30)
        assert failed.id in [dead["id"] for dead in (await client.dead(owner="fay"))["dead"]]
        (pair,) = [p for p in await client.rerun_dead(owner="fay", key="k") if p["from"] == failed.id]
        assert (await client.get(pair["to"]))["rerun_of"] == failed.id
