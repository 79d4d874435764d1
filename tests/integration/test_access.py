"""Who may see and do what, over every route and transport, with the credentials of others and with none."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import jwt
import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from streamjobs.config import Settings
from streamjobs.errors import ConfigError, JobNotFound, StoreUnavailable
from streamjobs.gateway.access import RULES
from streamjobs.gateway.authenticators import Asking, KeyAuthenticator, authenticators_of
from streamjobs.gateway.server import listen
from streamjobs.identity.principal import DEFAULT_SCOPES, Principal
from streamjobs.projections.index import IndexProjection
from streamjobs.projections.retention import RetentionProjection
from streamjobs.projections.snapshot import SnapshotProjection
from streamjobs.schedule import Schedule, Timing
from streamjobs.store import JobRecord, Store
from streamjobs.webhook import Webhook
from tests.conftest import RedisProcess, unrestricted, wait_until
from tests.integration.gateway import Script, Served, serving

CANARY = "canary-of-anna"
SECRET = "a shared secret of thirty-two characters"
STREAMS = {"/v1/jobs/{id}/events", "/v1/events"}


class World(NamedTuple):
    """A gateway that asks for keys, with things of acme/anna, and the keys of others."""

    served: Served
    job: str
    schedule: str
    webhook: str
    keys: dict[str, str]

    def path(self, template: str) -> str:
        """A route's path, with anna's ids."""
        owned = {"jobs": self.job, "schedules": self.schedule, "webhooks": self.webhook}
        kind = template.split("/")[2] if template.count("/") > 1 else ""
        known = {"{id}": owned.get(kind, ""), "{name}": "thing", "{scope}": "kind"}
        for placeholder, value in known.items():
            template = template.replace(placeholder, value)
        assert "{" not in template, f"no case for {template}"
        return template

    async def ask(
        self, method: str, template: str, headers: dict[str, str], query: str = ""
    ) -> httpx.Response:
        """The answer, or the head of it where it streams."""
        client, path = self.served.client, self.path(template) + query
        request = client.build_request(
            method, path, headers=headers, content=b"{}" if method != "GET" else None
        )
        response = await client.send(request, stream=True)
        if response.status_code == 200 and template in STREAMS:
            await response.aclose()
        else:
            await response.aread()
        return response

    def bearer(self, who: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self.keys[who]}"}


async def key_of(store: Store, tenant: str, subject: str, *scopes: str) -> str:
    _, text = await store.api_keys.create(
        tenant=tenant, subject=subject, scopes=frozenset(scopes) or DEFAULT_SCOPES
    )
    return text


@contextlib.asynccontextmanager
async def made_world(url: str, **changes: Any) -> AsyncIterator[World]:
    settings = {"auth": ("keys", "jwt"), "jwt_secrets": (SECRET,), "auth_cache": 0.0} | changes
    async with serving(url, **settings) as served:
        store, owner = served.store, "acme/anna"
        given = json.dumps({"prompt": CANARY}).encode()
        script = await served.script(owner=owner, input=given)
        await script.open_turn()
        await script.say(CANARY)
        await script.keep("thing", "text/plain", CANARY.encode())
        timing = Timing(every=3600.0)
        schedule, _ = await store.schedules.create(
            Schedule(name=CANARY, kind="chat", timing=timing, owner=owner, input=msgspec.Raw(given))
        )
        webhook, _ = await store.webhooks.create(owner, Webhook(url=f"https://example.org/{CANARY}"))
        await IndexProjection(store).advance(script.id)
        keys = {
            "anna": await key_of(store, "acme", "anna"),
            "bert": await key_of(store, "acme", "bert"),
            "anna of globex": await key_of(store, "globex", "anna"),
            "reader": await key_of(store, "acme", "anna", "jobs:read"),
            "writer": await key_of(store, "acme", "anna", "jobs:write"),
            "backend": await key_of(store, "acme", "backend", "jobs:read", "jobs:write", "act-as"),
            "admin": await key_of(store, "ops", "olga", "jobs:read", "jobs:write", "admin"),
        }
        yield World(served, script.id, schedule.id, webhook.id, keys)


@pytest.fixture
async def world(redis: RedisProcess) -> AsyncIterator[World]:
    async with made_world(redis.url) as made:
        yield made


async def until(texts: AsyncIterator[str], mark: str) -> str:
    """What a stream says up to something."""
    seen = ""
    async for text in texts:
        seen += text
        if mark in seen:
            return seen
    raise AssertionError(f"the stream ended before {mark!r}: {seen}")


def routes_of(served: Served) -> set[tuple[str, str]]:
    app: Any = served.gateway.asgi
    while not hasattr(app, "routes"):
        app = app._app if hasattr(app, "_app") else app.app
    return {
        (method, route.path)
        for route in app.routes
        for method in (getattr(route, "methods", None) or ())
        if method != "HEAD"
    }


async def test_every_route_has_a_rule_and_every_rule_a_route(world: World):
    """A route that was added in a hurry would be open to everybody."""
    assert routes_of(world.served) == set(RULES)


async def test_nobody_gets_nothing(world: World):
    """Whoever finds the port could read all jobs."""
    for (method, template), rule in RULES.items():
        for headers in (
            {},
            {"authorization": "Bearer sjk_no"},
            {"authorization": "Basic YTpi"},
            {"x-api-key": "x"},
        ):
            answer = await world.ask(method, template, headers)
            expected = {401} if rule.need else {200}
            assert answer.status_code in expected, (method, template, headers)
            if rule.need:
                assert (answer.json()["code"], answer.headers["www-authenticate"]) == (
                    "unauthenticated",
                    "Bearer",
                )


@pytest.mark.parametrize("who", ["bert", "anna of globex"])
async def test_what_is_somebody_elses_is_not_there(world: World, who: str):
    """One customer would read, cancel or delete what another one's users wrote."""
    for (method, template), rule in RULES.items():
        answer = await world.ask(method, template, world.bearer(who))
        where = (method, template)
        if rule.need is None:
            assert answer.status_code == 200, where
        elif rule.need == "admin":
            assert answer.status_code == 403, where
        elif "{id}" in template:
            assert answer.status_code == 404, where
            assert answer.json()["code"] == "not_found", where
        if not (answer.status_code == 200 and template in STREAMS):
            assert CANARY not in answer.text, where
            assert world.job not in answer.text.replace(world.path(template), ""), where
    lists = [
        await world.served.client.get(path, headers=world.bearer(who))
        for path in ("/v1/jobs", "/v1/schedules")
    ]
    assert [answer.json()[name] for answer, name in zip(lists, ("jobs", "schedules"), strict=True)] == [
        [],
        [],
    ]


async def test_what_is_ones_own_is_there(world: World):
    """The other tests would pass on a gateway that refuses everybody."""
    mine, admin = world.bearer("anna"), world.bearer("admin")
    for (method, template), rule in RULES.items():
        if method == "GET" and template != "/v1/ws":
            answer = await world.ask(method, template, admin if rule.need == "admin" else mine)
            assert answer.status_code == 200, template
    (listed,) = (await world.served.client.get("/v1/jobs", headers=mine)).json()["jobs"]
    assert listed["id"] == world.job
    assert (await world.ask("GET", "/v1/jobs/{id}", admin)).json()["text"] == CANARY
    assert (await world.ask("POST", "/v1/jobs/{id}/cancel", mine)).status_code == 200


async def test_scopes(world: World):
    """A key that was made for a dashboard could cancel jobs."""
    for (method, template), rule in RULES.items():
        reader = await world.ask(method, template, world.bearer("reader"))
        assert (reader.status_code == 403) == (rule.need in {"jobs:write", "admin"}), (method, template)
        if rule.need == "jobs:read":
            writer = await world.ask(method, template, world.bearer("writer"))
            assert writer.status_code == 403, (method, template)


async def test_acting_for_the_users_of_a_tenant(world: World):
    """A backend with one key could not keep its users apart; or any user could name another one."""
    as_anna = {"x-streamjobs-owner": "anna"}
    seen = await world.ask("GET", "/v1/jobs/{id}", world.bearer("backend") | as_anna)
    assert seen.json()["text"] == CANARY
    assert (await world.ask("GET", "/v1/jobs/{id}", world.bearer("backend"))).status_code == 404
    assert (await world.ask("GET", "/v1/jobs/{id}", world.bearer("bert") | as_anna)).status_code == 403
    for wrong in ("a|b", "../globex/anna" * 20):
        answer = await world.ask("GET", "/v1/jobs", world.bearer("backend") | {"x-streamjobs-owner": wrong})
        assert answer.status_code == 422


async def test_a_key_that_has_ended(world: World):
    """Who left the company would go on reading."""
    store, headers = world.served.store, world.bearer("bert")
    assert (await world.ask("GET", "/v1/jobs", headers)).status_code == 200
    key = next(key for key in await store.api_keys.all() if key.subject == "bert")
    assert await store.api_keys.revoke(key.id)
    assert not await store.api_keys.revoke(key.id)
    assert (await world.ask("GET", "/v1/jobs", headers)).status_code == 401
    _, short = await store.api_keys.create(tenant="acme", subject="anna", scopes=DEFAULT_SCOPES, ttl=0.001)
    await wait_until(lambda: _is_refused(world, short))


async def _is_refused(world: World, key: str) -> bool:
    answer = await world.served.client.get("/v1/jobs", headers={"x-api-key": key})
    return answer.status_code == 401


async def test_a_stream_opens_while_redis_is_away(own_redis: RedisProcess):
    """During an outage a stream would show anybody's job, or close browsers for good with a 503."""
    async with made_world(own_redis.url) as world:
        anna, bert = world.bearer("anna"), world.bearer("bert")
        for headers in (anna, bert):
            assert (await world.ask("GET", "/v1/jobs", headers)).status_code == 200
        unseen = await Script.start(world.served.store, owner="acme/anna")
        await unseen.open_turn()
        await unseen.say(CANARY)
        url = f"/v1/jobs/{unseen.id}/events?after=0"
        assert own_redis.process is not None
        own_redis.process.send_signal(signal.SIGSTOP)
        try:
            async with contextlib.AsyncExitStack() as stack:
                mine, foreign = [
                    await stack.enter_async_context(world.served.client.stream("GET", url, headers=headers))
                    for headers in (anna, bert)
                ]
                assert (mine.status_code, foreign.status_code) == (200, 200)
                own_redis.process.send_signal(signal.SIGCONT)
                await until(mine.aiter_text(), CANARY)
                refused = "".join([text async for text in foreign.aiter_text()])
        finally:
            own_redis.process.send_signal(signal.SIGCONT)
    assert "event: error" in refused
    assert '"code":"not_found"' in refused
    assert CANARY not in refused


@pytest.mark.parametrize(("who", "status"), [("anna", 200), ("bert", 404)])
async def test_an_archived_job_that_was_asked_for_in_an_outage(
    redis: RedisProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, who: str, status: int
):
    """What nobody could check while Redis was away would be read from the archive unchecked."""
    async with made_world(redis.url, archive_url=str(tmp_path)) as world:
        script = await Script.start(world.served.store, owner="acme/anna")
        await script.complete(CANARY)
        await SnapshotProjection(world.served.store).advance(script.id)
        await RetentionProjection(world.served.store).advance(script.id)
        async with unrestricted(world.served.store) as client:
            await client.delete(*await client.keys(f"*job:{script.id}*"))
        hub = world.served.gateway.hub
        head, asked = hub.head, itertools.count()

        async def away_at_first(job_id: str) -> JobRecord:
            if next(asked) == 0:
                raise StoreUnavailable("away")
            return await head(job_id)

        monkeypatch.setattr(hub, "head", away_at_first)
        answer = await world.served.client.get(
            f"/v1/jobs/{script.id}/events?after=0", headers=world.bearer(who)
        )
        assert answer.status_code == status
        assert (CANARY in answer.text) == (status == 200)
        assert next(asked) > 1


# --- other ways to be known


def token(**claims: Any) -> str:
    return jwt.encode({"sub": "anna", "tenant": "acme", "exp": time.time() + 60} | claims, SECRET, "HS256")


async def test_a_jwt_names_its_owner(world: World):
    """Users who have signed in elsewhere would need a key of ours as well."""
    seen = await world.ask("GET", "/v1/jobs/{id}", {"authorization": f"Bearer {token()}"})
    assert seen.json()["text"] == CANARY
    for wrong in (token(exp=time.time() - 60), token(sub="bert"), token(tenant="globex"), token() + "x"):
        answer = await world.ask("GET", "/v1/jobs/{id}", {"authorization": f"Bearer {wrong}"})
        assert answer.status_code in {401, 404}
        assert CANARY not in answer.text


async def test_a_jwt_of_somebody_elses_key(redis: RedisProcess):
    """Users of an identity provider, which shares no secret with anybody, could not sign in."""
    private = rsa.generate_private_key(65537, 2048)
    public = jwt.algorithms.RSAAlgorithm.to_jwk(private.public_key(), as_dict=True) | {"kid": "one"}
    body = json.dumps({"keys": [public]}).encode()

    async def publish(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        writer.close()

    claims = {"sub": "anna", "tenant": "acme", "exp": time.time() + 60, "iss": "us", "aud": "streamjobs"}
    async with await asyncio.start_server(publish, "127.0.0.1", 0) as issuer:
        url = f"http://127.0.0.1:{issuer.sockets[0].getsockname()[1]}/keys"
        settings = {"jwt_jwks_url": url, "jwt_issuer": "us", "jwt_audience": "streamjobs"}
        async with serving(redis.url, auth=("jwt",), **settings) as served:
            script = await served.script(owner="acme/anna")
            for change, status in (({}, 200), ({"sub": "bert"}, 404), ({"aud": "others"}, 401)):
                signed = jwt.encode(claims | change, private, "RS256", headers={"kid": "one"})
                answer = await served.client.get(
                    f"/v1/jobs/{script.id}", headers={"authorization": f"Bearer {signed}"}
                )
                assert answer.status_code == status


async def test_a_proxy_that_knows(redis: RedisProcess):
    """Installations behind a gateway that signs users in could not use its word."""
    async with serving(redis.url, auth=("proxy",)) as served:
        script = await served.script(owner="acme/anna")
        path = f"/v1/jobs/{script.id}"
        assert (await served.client.get(path)).status_code == 401
        headers = {"x-streamjobs-tenant": "acme", "x-streamjobs-owner": "anna"}
        assert (await served.client.get(path, headers=headers)).status_code == 200
        assert (
            await served.client.get(path, headers=headers | {"x-streamjobs-tenant": "globex"})
        ).status_code == 404
        assert (await served.client.get("/v1/queues", headers=headers)).status_code == 403
        admin = headers | {"x-streamjobs-scopes": "jobs:read admin"}
        assert (await served.client.get("/v1/queues", headers=admin)).status_code == 200


def by_header(asking: Asking) -> Principal | None:
    name = asking.headers.get("x-user")
    return Principal(tenant="acme", subject=name) if name else None


async def test_what_is_for_somebody_else_is_left_alone(redis: RedisProcess):
    """Behind a proxy that asks for a password, whose header it passes on, nothing would work."""
    basic = {"authorization": "Basic YW5uYTpwYXNz"}
    async with serving(redis.url) as served:
        assert (await served.client.get("/v1/jobs", headers=basic)).status_code == 200
    async with serving(redis.url, auth=("proxy",)) as served:
        answer = await served.client.get("/v1/jobs", headers=basic | {"x-streamjobs-owner": "anna"})
        assert answer.status_code == 200
        assert (await served.client.get("/v1/jobs", headers=basic)).status_code == 401


async def test_a_function_of_yours(redis: RedisProcess):
    """Whoever has sessions of his own could not use them."""
    async with serving(redis.url, auth=(f"{__name__}:by_header",)) as served:
        script = await served.script(owner="acme/anna")
        path = f"/v1/jobs/{script.id}"
        statuses = [
            (await served.client.get(path, headers=headers)).status_code
            for headers in ({}, {"x-user": "anna"}, {"x-user": "bert"})
        ]
        assert statuses == [401, 200, 404]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"auth": ("kees",)}, "'kees' is none of"),
        ({"auth": ("jwt",)}, "jwt_secrets"),
        ({"auth": ("jwt",), "jwt_secrets": ("short",)}, "at least 32"),
        ({"auth": ("jwt",), "jwt_jwks_url": "https://issuer.example/keys"}, "jwt_audience"),
        ({"auth": ("jwt",), "jwt_jwks_url": "http://issuer.example/keys"}, "https"),
        ({"auth": ("open", "keys")}, "stands alone"),
        ({"auth": ("no.such:thing",)}, "no.such"),
    ],
)
async def test_a_setting_that_cannot_work_is_told_at_the_start(
    store: Store, changes: dict[str, Any], said: str
):
    """A typo would leave the gateway open, or closed to everybody."""
    settings = msgspec.structs.replace(store.settings, **changes)
    with pytest.raises(ConfigError, match=said):
        authenticators_of(settings, KeyAuthenticator(store, settings))


def test_strangers_cannot_reach_what_asks_nobody():
    """A gateway in a container would be open to its whole network from the first day."""
    with pytest.raises(ConfigError, match="nobody is asked who he is"):
        listen(Settings(host="0.0.0.0"), 0)
    for settings in (Settings(), Settings(host="localhost"), Settings(host="0.0.0.0", auth=("open",))):
        listen(settings, 0).close()


# --- browsers


async def test_pages_of_other_sites(redis: RedisProcess):
    """Any page that a user visits could submit jobs, or read streams, with that user's cookie."""
    ours, theirs = "https://app.example", "https://evil.example"
    async with serving(
        redis.url, auth=("jwt",), jwt_secrets=(SECRET,), auth_cookie="session", cors_origins=(ours,)
    ) as served:
        cookie = {"cookie": f"session={token()}"}
        body = {"kind": "chat", "input": {"prompt": "hi", "model": "m"}}
        for origin, status in ((None, 202), (ours, 202), (theirs, 403), ("null", 403), (served.url, 202)):
            headers = cookie | ({} if origin is None else {"origin": origin})
            answer = await served.client.post("/v1/jobs", json=body, headers=headers)
            assert answer.status_code == status, origin
            allowed = answer.headers.get("access-control-allow-origin")
            assert allowed == (ours if origin == ours else None)
        assert answer.json()["id"]
        asked = {
            "origin": ours,
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization",
        }
        preflight = await served.client.options("/v1/jobs", headers=asked)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-credentials"] == "true"
        refused = await served.client.options("/v1/jobs", headers=asked | {"origin": theirs})
        assert "access-control-allow-origin" not in refused.headers
        ws = served.url.replace("http", "ws") + "/v1/ws"
        async with connect(ws, additional_headers=cookie | {"origin": ours}):
            pass
        with pytest.raises(InvalidStatus) as error:
            async with connect(ws, additional_headers=cookie | {"origin": theirs}):
                pass
        assert error.value.response.status_code == 403


async def test_a_name_that_was_made_to_point_here(redis: RedisProcess):
    """A page of any site, whose name changes its address, could submit jobs on its visitor's machine."""
    body = {"kind": "chat", "input": {"prompt": "hi", "model": "m"}}
    names = {
        "127.0.0.1:1": 202,
        "localhost": 202,
        "[::1]:80": 202,
        "app.localhost": 202,
        "evil.example:1": 403,
    }
    async with serving(redis.url) as served:
        for name, status in (names | {"127.0.0.1.evil.example": 403, "10.0.0.1": 403}).items():
            headers = {"host": name, "origin": f"http://{name}"}
            answer = await served.client.post("/v1/jobs", json=body, headers=headers)
            assert answer.status_code == status, name
        assert (await served.client.post("/v1/jobs", json=body, headers={"host": "any"})).status_code == 202
    async with serving(redis.url, auth=("open",)) as served:
        headers = {"host": "jobs.example", "origin": "http://jobs.example"}
        assert (await served.client.post("/v1/jobs", json=body, headers=headers)).status_code == 202


# --- WebSockets


async def test_a_websocket_shows_ones_own_jobs_only(world: World):
    """Isolation would end where the protocol changes."""
    ws = world.served.url.replace("http", "ws") + "/v1/ws"
    with pytest.raises(InvalidStatus) as error:
        async with connect(ws):
            pass
    assert error.value.response.status_code == 401
    for who, expected in (
        ("anna", "subscribed"),
        ("bert", "error"),
        ("anna of globex", "error"),
        ("admin", "subscribed"),
    ):
        async with connect(ws, additional_headers=world.bearer(who)) as socket:
            await socket.send(json.dumps({"op": "subscribe", "job": world.job, "after": "0"}))
            message = json.loads(await socket.recv())
            assert message["op"] == expected, who
            if expected == "error":
                assert (message["code"], message["job"]) == ("not_found", world.job)


# --- what others share


async def test_two_tenants_share_nothing(world: World):
    """Two companies that both have a user anna and a key "1" would get one job between them."""
    body = {"kind": "chat", "input": {"prompt": "hi", "model": "m"}}
    answers = [
        await world.served.client.post(
            "/v1/jobs", json=body, headers=world.bearer(who) | {"idempotency-key": "1"}
        )
        for who in ("anna", "anna of globex", "anna")
    ]
    ids = [answer.json()["id"] for answer in answers]
    assert ids[0] == ids[2] != ids[1]
    owners = [(await world.served.store.jobs.get(job)).owner for job in ids[:2]]
    assert owners == ["acme/anna", "globex/anna"]


async def test_the_stream_of_everything_is_ones_own(world: World):
    """The feed is the one place where jobs of many lie together."""
    client, url = world.served.client, f"/v1/events?watch={world.job}"
    async with client.stream("GET", url, headers=world.bearer("anna of globex")) as stream:
        texts = stream.aiter_text()
        seen = await until(texts, "event: error")
        script = await Script.start(world.served.store, owner="globex/anna")
        await script.complete(CANARY.upper())
        seen += await until(texts, CANARY.upper())
    assert CANARY not in seen
    assert '"code":"not_found"' in seen


async def test_the_job_of_an_owner_that_was_deleted_stays_gone(world: World):
    """What is remembered of owners must not bring a deleted job back."""
    script = await Script.start(world.served.store, owner="acme/anna")
    await script.complete()
    path = f"/v1/jobs/{script.id}"
    assert (await world.served.client.get(path, headers=world.bearer("anna"))).status_code == 200
    assert (await world.served.client.delete(path, headers=world.bearer("anna"))).status_code == 200
    assert (await world.served.client.get(path, headers=world.bearer("anna"))).status_code == 404
    with pytest.raises(JobNotFound):
        await world.served.store.jobs.get(script.id)


async def test_submissions_belong_to_who_sends_them(world: World):
    """A body or a header that names somebody else would write into his list."""
    body = {"kind": "chat", "input": {"prompt": "hi", "model": "m"}}
    forged = world.bearer("bert") | {"x-streamjobs-tenant": "globex", "x-streamjobs-scopes": "admin"}
    answer = await world.served.client.post("/v1/jobs", json=body, headers=forged)
    assert (await world.served.store.jobs.get(answer.json()["id"])).owner == "acme/bert"
    assert (await world.served.client.get("/v1/queues", headers=forged)).status_code == 403
