"""Secrets that are easy to find again go through a system that is made to fail; then everything that it
wrote, answered and stored is searched for them."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import secrets
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import zstandard
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router

from streamjobs.config import Settings
from streamjobs.gateway.app import url_of
from streamjobs.gateway.server import Server, listen
from tests import acl
from tests.conftest import RedisProcess, fast_settings, free_port, wait_until
from tests.harness import ROOT, environment

TOKENS = (
    "provider key", "redis password", "wrong redis password", "key in a base URL",
    "foreign key", "sent authorization", "sent cookie", "sent api key", "token in a URL",
    "webhook URL", "secret of a tool",
)  # fmt: skip
CANARIES = {name: f"Canary{n}x{secrets.token_hex(12)}" for n, name in enumerate(TOKENS)}
HOSTILE = "owner\x85\u2028\u2029\x1b[31m\x7f{}\"'\\"
AT_HOME = {("webhook URL", "webhooks"), ("webhook secret", "webhooks")}
"""What is kept where, because it is used: a canary, and the kind of key that holds it."""


class Outside:
    """A provider that refuses, and says too much, and a receiver of webhooks that fails."""

    def __init__(self) -> None:
        self.url = ""
        self.keys: list[str] = []
        self.deliveries = 0

    async def complete(self, request: Request) -> Response:
        self.keys.append(request.headers["authorization"])
        said = (
            f"Incorrect API key provided: {self.keys[-1]}. Ours is sk-{CANARIES['foreign key']}; "
            f"see https://a:{CANARIES['foreign key']}@docs.example/?key={self.keys[-1][7:]}"
        )
        return JSONResponse({"error": {"message": said, "code": "invalid_api_key"}}, 401)

    async def deliver(self, _request: Request) -> Response:
        self.deliveries += 1
        return Response("no", 500)


@contextlib.asynccontextmanager
async def outside() -> AsyncIterator[Outside]:
    made = Outside()
    routes = [Route("/v1/chat/completions", made.complete, methods=["POST"])]
    routes += [Route("/hook", made.deliver, methods=["POST"])]
    listener = listen(Settings(), 0)
    server = Server(Router(routes), Settings())
    task = asyncio.create_task(server.serve([listener]))
    made.url = url_of(listener)
    try:
        yield made
    finally:
        server.should_exit = True
        await task


@pytest.fixture
def guarded_redis() -> Iterator[RedisProcess]:
    """A server whose password is one of the canaries."""
    digest = hashlib.sha256(acl.PASSWORD.encode()).hexdigest()
    users = acl.users_and_tester().replace(
        digest, hashlib.sha256(CANARIES["redis password"].encode()).hexdigest()
    )
    with tempfile.TemporaryDirectory(prefix="sj-") as folder:
        server = RedisProcess(Path(folder), users=users)
        server.start()
        yield server
        server.stop()


class Fleet:
    """Processes as an operator starts them, each with a file for what it writes."""

    def __init__(self, folder: Path, env: Mapping[str, str]) -> None:
        self.folder = folder
        self.env = dict(env)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *words: str, **env: str) -> None:
        with (self.folder / f"{name}.log").open("wb") as output:
            command = [sys.executable, "-m", "streamjobs", *words]
            self.processes[name] = subprocess.Popen(
                command, env=self.env | env, cwd=ROOT, stdout=output, stderr=output
            )

    def output(self, name: str) -> bytes:
        return (self.folder / f"{name}.log").read_bytes()

    def has_said(self, name: str, *events: str) -> bool:
        assert name == "refused" or self.processes[name].poll() is None, self.output(name)
        return all(event.encode() in self.output(name) for event in events)

    def command_lines(self) -> dict[str, bytes]:
        running = {name: one for name, one in self.processes.items() if one.poll() is None}
        return {name: Path(f"/proc/{one.pid}/cmdline").read_bytes() for name, one in running.items()}

    def stop(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait(20)


class Story:
    """Clients that send secrets along, and what they were answered."""

    def __init__(self, url: str) -> None:
        token = CANARIES["token in a URL"]
        headers = {
            "authorization": f"Bearer {CANARIES['sent authorization']}",
            "cookie": f"session={CANARIES['sent cookie']}",
            "x-api-key": CANARIES["sent api key"],
        }
        self.client = httpx.AsyncClient(base_url=url, headers=headers, params={"token": token}, timeout=30)
        self.answers: dict[str, bytes] = {}

    async def ask(self, method: str, path: str, body: Any = None, **headers: Any) -> httpx.Response:
        answer = await self.client.request(method, path, json=body, headers=headers)
        self.answers[f"{method} {path} {len(self.answers)}"] = answer.content + repr(answer.headers).encode()
        return answer

    async def submit(self, **fields: Any) -> str:
        answer = await self.ask("POST", "/v1/jobs", fields)
        assert answer.status_code == 202, answer.text
        return answer.json()["id"]

    async def failed(self, job_id: str) -> dict[str, Any]:
        """A job that has failed, read in every way there is."""
        await wait_until(lambda: self._is_failed(job_id), 60.0, f"the end of {job_id}")
        for kind in ("text/event-stream", "application/json", "application/x-ndjson"):
            await self.ask("GET", f"/v1/jobs/{job_id}/events?after=0", accept=kind)
        for path in ("", "/result", "/log", "/effects"):
            await self.ask("GET", f"/v1/jobs/{job_id}{path}")
        return (await self.ask("GET", f"/v1/jobs/{job_id}")).json()

    async def _is_failed(self, job_id: str) -> bool:
        return (await self.client.get(f"/v1/jobs/{job_id}")).json()["status"] == "failed"

    async def misbehave(self) -> None:
        """Requests that are refused, with names that would break a line."""
        for path in ("/nowhere", "/v1/jobs/j0-%0d%0a%1b%5b31m%00", "/v1/jobs?cursor=%0d%0ax", "/v1/ws"):
            assert (await self.ask("GET", path)).status_code >= 400
        kind = f"\r\n{HOSTILE}\x00"
        assert (await self.ask("POST", "/v1/jobs", {"kind": kind, "input": None})).status_code == 422
        owner = (
            HOSTILE.encode().replace(b"\x1b", b"").replace(b"\x7f", b"")
        )  # which our client would not send
        await self.ask("POST", "/v1/jobs", {"kind": "leaky", "input": None}, **{"x-streamjobs-owner": owner})


def everything_in(redis: RedisProcess) -> dict[str, bytes]:
    """Every key's value, and the names of all."""
    found: dict[str, bytes] = {}
    with redis.client() as client:
        for key in client.scan_iter(count=1000):
            read = {
                b"string": lambda k: client.get(k),
                b"hash": lambda k: client.hgetall(k),
                b"stream": lambda k: client.xrange(k),
                b"zset": lambda k: client.zrange(k, 0, -1, withscores=True),
                b"set": lambda k: client.smembers(k),
            }[client.type(key)]
            found[key.decode()] = key + repr(read(key)).encode()
    return found


def archived_in(folder: Path) -> dict[str, bytes]:
    files = {path.name: path.read_bytes() for path in folder.rglob("*.zst")}
    return {
        name: zstandard.ZstdDecompressor().decompressobj().decompress(data) for name, data in files.items()
    }


def leaks(
    written: Mapping[str, Mapping[str, bytes]], canaries: Mapping[str, str]
) -> set[tuple[str, str, str]]:
    """(canary, where, in what) of every canary that was written, also where it is in Base64."""
    found: set[tuple[str, str, str]] = set()
    for where, texts in written.items():
        for name, text in texts.items():
            for canary, value in canaries.items():
                forms = (value.encode(), base64.b64encode(value.encode()).rstrip(b"="))
                if any(form in text for form in forms):
                    found.add((canary, where, name))
    return found


def is_at_home(leak: tuple[str, str, str]) -> bool:
    canary, where, name = leak
    return where == "redis" and (canary, name.split(":")[2]) in AT_HOME


def settings_for(redis: RedisProcess, world: Outside, folder: Path) -> Settings:
    return fast_settings(
        f"redis://{acl.USER}@127.0.0.1:{redis.port}",
        openai_base_url=f"{world.url}/v1",
        anthropic_base_url=f"http://127.0.0.1:1/?key={CANARIES['key in a base URL']}",
        anthropic_api_key="env:OTHER_KEY",
        provider_attempts=2,
        openai_api_key=f"file:{folder / 'key'}",
        redis_password=f"file:{folder / 'password'}",
        archive_url=str(folder / "archive"),
        webhook_http=True, webhook_allow=("127.0.0.1",),
        port=free_port(), log_level="debug", log_format="json", max_attempts=1, lease=60.0,
    )  # fmt: skip


async def live_through(
    fleet: Fleet, story: Story, redis: RedisProcess, world: Outside, folder: Path
) -> dict[str, Mapping[str, bytes]]:
    """Everything that was written, by where, of a system that meets every fault there is."""
    fleet.start("gateway", "serve", "tests.integration.leaky_app:app")
    fleet.start("worker", "worker", "tests.integration.leaky_app:app")
    fleet.start("projector", "projector")
    wrong = CANARIES["wrong redis password"]
    fleet.start("refused", "--debug", "worker", STREAMJOBS_REDIS_PASSWORD=wrong)
    await wait_until(lambda: fleet.has_said("gateway", "gateway.ready"), 60.0, "the gateway")
    told = (
        '"notify", "partition": 0, "event": "projection.rebuilt"'  # from now on; what ended before is history
    )
    await wait_until(lambda: fleet.has_said("projector", told), 60.0, "the projector")
    hook = {"url": f"{world.url}/hook?token={CANARIES['webhook URL']}"}
    secret = (await story.client.post("/v1/webhooks", json=hook)).json()["secret"]
    CANARIES["webhook secret"] = secret.removeprefix("whsec_")
    await story.misbehave()
    refused = await story.failed(await story.submit(kind="chat", input={"prompt": "a", "model": "openai:m"}))
    away = await story.failed(await story.submit(kind="chat", input={"prompt": "b", "model": "anthropic:m"}))
    leaky = await story.failed(await story.submit(kind="leaky", input=None))
    check_told(refused, away, leaky)
    await wait_until(lambda: world.deliveries >= 3, 60.0, "deliveries")
    assert world.keys == [f"Bearer {CANARIES['provider key']}"]
    await wait_until(lambda: fleet.processes["refused"].poll() is not None, 60.0, "the refused worker")
    assert b"it refuses the user name or the password" in fleet.output("refused")
    await wait_until(lambda: len(archived_in(folder)) >= 3, 60.0, "archived jobs")
    await wait_until(lambda: fleet.has_said("projector", "delivery.not_taken"), 60.0, "a failed delivery")
    metrics = (await story.ask("GET", "/metrics")).content
    stored, lines = everything_in(redis), fleet.command_lines()
    redis.kill()
    await wait_until(lambda: fleet.has_said("worker", "take.failed"), 60.0, "a worker without Redis")
    assert (await story.ask("GET", "/v1/jobs/j0-" + "a" * 26)).status_code == 503
    logs = {name: fleet.output(name) for name in fleet.processes}
    return {
        "redis": stored, "log": logs, "answer": story.answers, "metrics": {"": metrics},
        "archive": archived_in(folder), "command line": lines,
    }  # fmt: skip


def check_told(refused: dict[str, Any], away: dict[str, Any], leaky: dict[str, Any]) -> None:
    """What failed is told, without what it must not say: else nothing here proves anything."""
    assert "Incorrect API key provided: Bearer [hidden]" in refused["error"]["message"]
    assert "Connection refused" in away["error"]["message"]
    told = [step["error"]["message"] for step in (*leaky["steps"], *leaky["tool_calls"])] + [
        leaky["error"]["message"]
    ]
    assert len(told) == 4
    for message in told:
        assert "401 Unauthorized" in message
        assert message.count("[hidden]") >= 3, message


async def test_no_secret_is_written_anywhere(guarded_redis: RedisProcess, tmp_path: Path):
    """A key in a log is a key in a search index, a backup, a screenshot, and in whoever sees them."""
    (tmp_path / "key").write_text(CANARIES["provider key"] + "\n")
    (tmp_path / "password").write_text(CANARIES["redis password"] + "\n")
    async with outside() as world:
        settings = settings_for(guarded_redis, world, tmp_path)
        leaked = {"LEAKED": CANARIES["secret of a tool"], "OTHER_KEY": CANARIES["provider key"]}
        fleet = Fleet(tmp_path, environment(settings) | leaked)
        story = Story(f"http://127.0.0.1:{settings.port}")
        try:
            written = await live_through(fleet, story, guarded_redis, world, tmp_path)
        finally:
            fleet.stop()
            await story.client.aclose()
    found = leaks(written, CANARIES)
    assert {leak for leak in found if not is_at_home(leak)} == set()
    assert {(canary, name.split(":")[2]) for canary, _, name in found} == AT_HOME, (
        "the search finds what is there"
    )
    for name in ("gateway", "worker", "projector"):
        for line in written["log"][name].rstrip(b"\n").split(b"\n"):
            assert len(line.decode("ascii").splitlines()) == 1
            assert {"event", "level", "timestamp"} <= set(json.loads(line)), line
