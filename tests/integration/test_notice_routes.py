"""Notifications and webhooks over HTTP, by the client and by commands: everything is the asker's own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from click.testing import CliRunner

from streamjobs.cli import options
from streamjobs.cli.main import cli
from streamjobs.client import Client
from streamjobs.client.client import GatewayError
from streamjobs.projections.notify import NotifyProjection
from streamjobs.store import Submission
from streamjobs.store.webhooks import MAX_WEBHOOKS
from tests.conftest import RedisProcess
from tests.integration.gateway import Served, serving

HOOK = "https://hooks.example/in"


@pytest.fixture(autouse=True)
def plain_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands tune the garbage collection of their process; this one is not theirs."""
    monkeypatch.setattr(options, "run", asyncio.run)


@pytest.fixture
async def served(redis: RedisProcess) -> AsyncIterator[Served]:
    async with serving(redis.url) as opened:
        yield opened


@pytest.fixture
async def anna(served: Served) -> AsyncIterator[Client]:
    async with Client(served.url, owner="anna") as client:
        yield client


async def ended(served: Served, count: int = 1, owner: str = "anna") -> list[str]:
    jobs = []
    for _ in range(count):
        jobs.append((await served.store.jobs.submit(Submission(kind="chat", owner=owner))).job_id)
        await served.store.jobs.cancel(jobs[-1], reason="enough")
        await NotifyProjection(served.store).advance(jobs[-1])
    return jobs


async def command(served: Served, *words: str) -> str:
    """What a command prints; it must succeed."""
    args = [*words, "--url", served.url, "--owner", "anna"]
    result = await asyncio.to_thread(CliRunner().invoke, cli, args, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines(keepends=True)
    return "".join(line for line in lines if "[debug " not in line)  # the gateway's, in this process


async def test_notices_are_listed_and_read(served: Served, anna: Client):
    """The bell of every application on top of this."""
    jobs = await ended(served, 3)
    await ended(served, 1, owner="bob")
    page = await anna.notifications.list(limit=2)
    assert [one["job"] for one in page["notifications"]] == jobs[:0:-1]
    assert page["unread"] == 3
    rest = await anna.notifications.list(limit=2, cursor=page["cursor"])
    (oldest,) = rest["notifications"]
    assert (oldest["job"], oldest["type"], oldest["read"], rest["cursor"]) == (
        jobs[0],
        "job.cancelled",
        False,
        "",
    )
    assert oldest["about"]["message"] == "enough"
    assert await anna.notifications.read(oldest["id"]) == 1
    assert [one["job"] async for one in anna.notifications.all(unread=True)] == jobs[:0:-1]
    assert await anna.notifications.read(until=page["notifications"][0]["id"]) == 2
    assert (await anna.notifications.list(unread=True))["notifications"] == []
    async with Client(served.url, owner="bob") as bob:
        assert (await bob.notifications.list())["unread"] == 1


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/v1/notifications?cursor=x", None, 400),
        ("GET", "/v1/notifications?limit=0", None, 422),
        ("GET", "/v1/notifications?colour=red", None, 422),
        ("GET", "/v1/notifications?unread=perhaps", None, 422),
        ("POST", "/v1/notifications/read", {}, 422),
        ("POST", "/v1/notifications/read", {"ids": ["x"]}, 422),
        ("POST", "/v1/notifications/read", {"until": "-1"}, 422),
        ("POST", "/v1/notifications/read", {"ids": ["1"] * 1001}, 422),
        ("POST", "/v1/webhooks", {}, 422),
        ("POST", "/v1/webhooks", {"url": HOOK, "events": ["job.started"]}, 422),
        ("POST", "/v1/webhooks", {"url": HOOK, "kinds": [""]}, 422),
        ("POST", "/v1/webhooks", {"url": HOOK, "secret": "whsec_mine"}, 422),
        ("POST", "/v1/webhooks", {"url": "http://hooks.example/"}, 422),
        ("POST", "/v1/webhooks", {"url": "https://127.0.0.1/"}, 422),
        ("POST", "/v1/webhooks", {"url": "https://[::1]:6379/"}, 422),
        ("POST", "/v1/webhooks", {"url": "mailto:anna@a.example"}, 422),
        ("GET", "/v1/webhooks/wh_none", None, 404),
        ("DELETE", "/v1/webhooks/wh_none", None, 404),
        ("POST", "/v1/webhooks/wh_none/rotate", None, 404),
        ("POST", "/v1/webhooks/wh_none/enable", None, 404),
        ("POST", "/v1/webhooks/wh_none/disable", None, 404),
        ("GET", "/v1/webhooks/wh_none/undelivered", None, 404),
        ("POST", "/v1/webhooks/wh_none/undelivered/rerun", {"ids": ["msg_x"]}, 404),
    ],
)
async def test_what_does_not_fit_is_refused(served: Served, method: str, path: str, body: Any, status: int):
    """A typo would be answered with something else than was asked for."""
    response = await served.client.request(method, path, json=body)
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"


async def test_a_webhooks_life(served: Served, anna: Client):
    """Its owner could not make, see, change or end it."""
    made = await anna.webhooks.create(HOOK, events=["job.failed", "x.*"], kinds=["chat"])
    assert made["secret"].startswith("whsec_")
    shown = await anna.webhooks.get(made["id"])
    assert shown == {name: value for name, value in made.items() if name != "secret"}
    assert (shown["events"], shown["kinds"], shown["disabled"]) == (["job.failed", "x.*"], ["chat"], False)
    secret = await anna.webhooks.rotate(made["id"])
    assert secret.startswith("whsec_")
    assert secret != made["secret"]
    disabled = await anna.webhooks.disable(made["id"])
    assert (disabled["disabled"], disabled["disabled_why"]) == (True, "by its owner")
    assert (await anna.webhooks.enable(made["id"]))["disabled"] is False
    text = str(await anna.webhooks.list())
    assert made["id"] in text
    assert secret not in text
    await anna.webhooks.delete(made["id"])
    assert await anna.webhooks.list() == []


async def test_what_was_not_taken_can_be_sent_again(served: Served, anna: Client):
    """After an outage its owner could not catch up."""
    made = await anna.webhooks.create(HOOK)
    (job_id,) = await ended(served)
    (claimed,) = (await served.store.deliveries.claim(0, 10)).claimed
    await served.store.deliveries.settle(claimed, "dead", why="answered 500")
    (lost,) = await anna.webhooks.undelivered(made["id"])
    assert (lost["job"], lost["error"], lost["content"]["type"]) == (job_id, "answered 500", "job.cancelled")
    assert await anna.webhooks.rerun(made["id"], lost["id"]) == 1
    assert [one.id for one in (await served.store.deliveries.claim(0, 10)).claimed] == [claimed.id]


async def test_a_webhook_is_its_owners_only(served: Served, anna: Client):
    """Anybody could read where somebody's news goes, or take it away."""
    made = await anna.webhooks.create(HOOK)
    async with Client(served.url, owner="bob") as bob:
        assert await bob.webhooks.list() == []
        acts = (bob.webhooks.get, bob.webhooks.delete, bob.webhooks.rotate, bob.webhooks.disable,
                bob.webhooks.enable, bob.webhooks.undelivered)  # fmt: skip
        for act in acts:
            with pytest.raises(GatewayError) as refusal:
                await act(made["id"])
            assert refusal.value.http_status == 404
    assert (await anna.webhooks.get(made["id"]))["disabled"] is False


async def test_an_owner_has_a_handful_at_most(served: Served, anna: Client):
    """One owner could make every event of theirs a thousand requests of ours."""
    for _ in range(MAX_WEBHOOKS):
        await anna.webhooks.create(HOOK)
    with pytest.raises(GatewayError) as refusal:
        await anna.webhooks.create(HOOK)
    assert refusal.value.code == "too_many_webhooks"


async def test_mail_can_be_asked_for_where_it_is_set_up(redis: RedisProcess):
    """The setting would do nothing; or a webhook would be a form letter to anybody's list."""
    settings = {"smtp_url": "smtp://127.0.0.1:1", "notify_from": "jobs@s.example"}
    async with serving(redis.url, **settings) as served, Client(served.url) as client:
        assert (await client.webhooks.create("mailto:anna@a.example"))["url"] == "mailto:anna@a.example"
        with pytest.raises(GatewayError, match="address"):
            await client.webhooks.create("mailto:anna@a.example,bob@b.example")


async def test_commands_do_the_same(served: Served, anna: Client):
    """At a terminal none of this would be there."""
    (job_id,) = await ended(served)
    listed = await command(served, "notifications", "list", "--unread")
    assert job_id in listed
    assert "job.cancelled" in listed
    notice_id = (await anna.notifications.list())["notifications"][0]["id"]
    assert await command(served, "notifications", "read", notice_id) == "1 marked as read\n"
    assert await command(served, "notifications", "read", "--until", notice_id) == "0 marked as read\n"
    webhook_id, secret = (await command(served, "webhooks", "create", HOOK, "--event", "job.failed")).split()
    assert secret.startswith("whsec_")
    assert HOOK in await command(served, "webhooks", "list")
    assert "disabled" in await command(served, "webhooks", "disable", webhook_id)
    assert "disabled: by its owner" in await command(served, "webhooks", "list")
    assert "enabled" in await command(served, "webhooks", "enable", webhook_id)
    assert "whsec_" in await command(served, "webhooks", "rotate", webhook_id)
    await command(served, "webhooks", "undelivered", webhook_id)
    assert "0 sent again" in await command(served, "webhooks", "rerun", webhook_id, "msg_x")
    assert "deleted" in await command(served, "webhooks", "delete", webhook_id)
    assert await command(served, "webhooks", "list", "--json") == "[]\n"
