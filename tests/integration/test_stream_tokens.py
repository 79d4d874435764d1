"""Stream tokens, for browsers whose EventSource sends no headers."""

from __future__ import annotations

import json
from typing import Any

import pytest
from websockets.asyncio.client import connect

from streamjobs.gateway import edge
from streamjobs.gateway.access import RULES
from tests.conftest import RedisProcess
from tests.integration.gateway import Script
from tests.integration.test_access import CANARY, World, made_world, until

KEYS = ("one:" + "k" * 32,)


async def token_of(world: World, who: str = "anna", path: str = "") -> dict[str, Any]:
    path = path or f"/v1/jobs/{world.job}/token"
    answer = await world.served.client.post(path, headers=world.bearer(who))
    assert answer.status_code == 200, answer.text
    assert answer.headers["cache-control"] == "no-store"
    return answer.json()


async def test_a_browser_watches_with_a_token(redis: RedisProcess):
    """EventSource cannot send a key, and a key does not belong into a URL."""
    async with made_world(redis.url) as world:
        given = await token_of(world)
        async with world.served.client.stream("GET", given["links"]["events"] + "&after=0") as stream:
            assert stream.status_code == 200
            await until(stream.aiter_text(), CANARY)
        assert (await world.served.client.get(f"/v1/jobs/{world.job}?token={given['token']}")).json()[
            "text"
        ] == CANARY


async def test_a_token_of_somebody_who_sees_every_job(redis: RedisProcess):
    """An operator's page, and everybody's while nobody is asked who he is, would show nothing."""
    async with made_world(redis.url) as world:
        given = await token_of(world, "admin")
        assert (
            await world.served.client.get(f"/v1/jobs/{world.job}?token={given['token']}")
        ).status_code == 200
    async with made_world(redis.url, auth=()) as world:
        given = (await world.served.client.post(f"/v1/jobs/{world.job}/token")).json()
        answer = await world.served.client.get(f"/v1/jobs/{world.job}?token={given['token']}")
        assert answer.json()["text"] == CANARY


async def test_a_token_opens_nothing_else(redis: RedisProcess):
    """A link that somebody passed on would give away all jobs, or let others cancel this one."""
    async with made_world(redis.url) as world:
        token = (await token_of(world))["token"]
        other = await Script.start(world.served.store, owner="acme/anna")
        elsewhere = world._replace(job=other.id)
        for (method, template), rule in RULES.items():
            if rule.need is None:
                continue
            for headers, query in (({}, f"?token={token}"), ({"authorization": f"Bearer {token}"}, "")):
                answer = await elsewhere.ask(method, template, headers, query)
                allowed = {401, 403} if rule.of != "job" or not rule.takes_token else {404}
                if template == "/v1/ws":
                    allowed = {403, 426}  # the handshake is what counts, and subscriptions: see below
                assert answer.status_code in allowed, (method, template, answer.status_code)
                assert CANARY not in answer.text
        ws = world.served.url.replace("http", "ws") + f"/v1/ws?token={token}"
        async with connect(ws) as socket:
            for job, op in ((other.id, "error"), (world.job, "subscribed")):
                await socket.send(json.dumps({"op": "subscribe", "job": job}))
                assert json.loads(await socket.recv())["op"] == op
        for wrong in (token[:-2], "", "sjt_x.y", world.keys["anna"]):
            answer = await world.served.client.get(f"/v1/jobs/{world.job}/events?token={wrong}")
            assert answer.status_code == 401


async def test_a_token_for_everything_of_an_owner(redis: RedisProcess):
    """A task panel needs one connection for all jobs, and no key either."""
    async with made_world(redis.url) as world:
        given = await token_of(world, path="/v1/events/token")
        async with world.served.client.stream(
            "GET", given["links"]["events"] + f"&watch={world.job}"
        ) as stream:
            await until(stream.aiter_text(), CANARY)
        foreign = await token_of(world, "anna of globex", "/v1/events/token")
        answer = await world.served.client.get(f"/v1/jobs/{world.job}?token={foreign['token']}")
        assert answer.status_code == 404


@pytest.mark.parametrize("who", ["bert", "anna of globex", "writer"])
async def test_no_token_for_what_one_may_not_see(redis: RedisProcess, who: str):
    """The token would be a way around the rules."""
    async with made_world(redis.url) as world:
        answer = await world.served.client.post(f"/v1/jobs/{world.job}/token", headers=world.bearer(who))
        assert answer.status_code in {403, 404}
        assert "sjt_" not in answer.text


async def test_a_stream_survives_its_token(redis: RedisProcess):
    """An answer of ten minutes would end after five, and its browser could not come back."""
    async with made_world(redis.url, token_ttl=2.0, token_keys=KEYS) as world:
        given = await token_of(world)
        client = world.served.client
        async with client.stream("GET", given["links"]["events"]) as stream:
            texts = stream.aiter_text()
            seen = await until(texts, "event: token\n")
            while not seen.endswith("\n\n"):
                seen += await anext(texts)
            data = next(line for line in seen.split("event: token\ndata: ")[1].splitlines())
            renewed = json.loads(data)
            assert renewed["token"] != given["token"]
            await until(texts, "event: token\n")
        ws = world.served.url.replace("http", "ws") + f"/v1/ws?token={(await token_of(world))['token']}"
        async with connect(ws) as socket:
            assert json.loads(await socket.recv())["op"] == "token"


async def test_a_token_ends_with_the_key_that_asked_for_it(redis: RedisProcess):
    """Whose key was revoked would go on reading for hours."""
    async with made_world(redis.url, token_ttl=2.0) as world:
        given = await token_of(world)
        store = world.served.store
        key_id = world.keys["anna"].split("_")[1]
        async with world.served.client.stream("GET", given["links"]["events"]) as stream:
            texts = stream.aiter_text()
            await until(texts, CANARY)
            await store.api_keys.revoke(key_id)
            assert (await world.served.client.get(given["links"]["events"])).status_code == 401
        assert (await store.api_keys.get(key_id)).revoked_ms


async def test_gateways_believe_each_others_tokens(redis: RedisProcess):
    """Behind a load balancer every second connection would fail."""
    async with made_world(redis.url) as one, made_world(redis.url) as other:
        token = (await token_of(one))["token"]
        answer = await other.served.client.get(f"/v1/jobs/{one.job}?token={token}")
        assert answer.status_code == 200


class _Log:
    """Takes what is logged."""

    def __init__(self) -> None:
        self.said = ""

    def info(self, event: str, **fields: Any) -> None:
        self.said += f"{event} {fields}\n"


async def test_the_access_log_has_no_tokens(redis: RedisProcess, monkeypatch: pytest.MonkeyPatch):
    """Who reads the logs could watch every job."""
    log = _Log()
    monkeypatch.setattr(edge, "log", log)
    async with made_world(redis.url, access_log=True) as world:
        token = (await token_of(world))["token"]
        assert (await world.served.client.get(f"/v1/jobs/{world.job}?token={token}")).status_code == 200
        await world.served.client.get(f"/v1/jobs/{world.job}?token={token[:-1]}x")
    assert "'route': '/v1/jobs/{id}', 'status': 200" in log.said
    assert "'status': 401" in log.said
    assert f"'credential': 'key:{world.keys['anna'].split('_')[1]}'" in log.said
    assert token[4:40] not in log.said
    assert world.keys["anna"].split("_")[2] not in log.said
