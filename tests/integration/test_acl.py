"""The users of `deploy/redis/users.acl`, enough to live under, and no more."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis.exceptions import AuthenticationError, NoPermissionError, ResponseError

from streamjobs import App, Context
from streamjobs.client import Client
from streamjobs.cron import Timing
from streamjobs.errors import MissingPermission, StoreUnavailable
from streamjobs.projections import build
from streamjobs.schedule import Schedule
from streamjobs.store import Store, Submission, permissions
from streamjobs.store.doctor import Doctor
from streamjobs.testing import ScriptedProvider
from streamjobs.webhook import Webhook
from tests import acl
from tests.conftest import RedisProcess, fast_settings, wait_until
from tests.harness import ROOT, provider_settings, says, working
from tests.integration.gateway import serving
from tests.integration.test_delivery import HTTP
from tests.projections.bench import projecting

SOURCE = ROOT / "src" / "streamjobs" / "store"
REFUSED = """
    KEYS * · FLUSHALL · FLUSHDB · CONFIG GET * · CONFIG SET dir /tmp · DEBUG SLEEP 0 · SHUTDOWN · SAVE
    MONITOR · ACL LIST · ACL WHOAMI · CLIENT LIST · CLIENT KILL TYPE pubsub · SCRIPT FLUSH · FUNCTION LIST
    MODULE LIST
    SLAVEOF no one · MIGRATE h 1 sj:x 0 1 · RESTORE sj:x 0 y · DUMP sj:x · SWAPDB 0 1 · SELECT 1 · SORT sj:x
    RENAME sj:x sj:y · XGROUP DESTROY sj:x g · PSUBSCRIBE * · SUBSCRIBE other:x · PUBLISH other:x 1
    SET other:x 1 · GET other:x · SET sjx 1 · MGET sj:{0}:x other:x · XREAD STREAMS other:x 0
"""
REFUSED_TO_METRICS = """
    XRANGE sj:{0}:work:default:default - + · XREAD STREAMS sj:{0}:feed 0 · XINFO STREAM sj:{0}:feed
    XADD sj:{0}:feed * a b · DEL sj:{0}:feed · XLEN sj:{0}:owner:anonymous:events · XLEN other · SCAN 0
    GET sj:meta · HGETALL sj:{0}:counts · EVAL return 0 · PUBLISH sj:x y · SUBSCRIBE sj:x
"""
PROJECTIONS = ("snapshot", "index", "stats", "notify", "retention")


@pytest.fixture
def strict_redis() -> Iterator[RedisProcess]:
    """A server that lets in the two users of the file and nobody else."""
    with tempfile.TemporaryDirectory(prefix="sj-") as folder:
        server = RedisProcess(Path(folder), users=acl.users())
        server.start()
        yield server
        server.stop()


def line_of(name: str, users: str) -> str:
    return next(line for line in users.splitlines() if line.startswith(f"user {name} "))


def test_the_file_grants_what_the_store_needs():
    """An operator would grant what some release before needed."""
    words = line_of(acl.USER, acl.FILE.read_text()).split()
    assert [word[1:] for word in words if word.startswith("+")] == list(permissions.COMMANDS)


def test_nothing_is_granted_that_nobody_sends():
    """Each command more is one more that a stolen password may use."""
    lua = "".join(path.read_text() for path in SOURCE.rglob("*.lua"))
    python = "".join(path.read_text() for path in SOURCE.glob("*.py") if path.stem != "permissions")
    pairs = re.findall(r"'([A-Z]+)', '([A-Z]+)'", lua)
    sent = {word.lower() for word in re.findall(r"['\"]([A-Z]+)['\"]", lua + python)}
    sent |= {"|".join(pair).lower() for pair in pairs} | set(re.findall(r"\.(\w+)\(", python))
    by_method = {"del": "delete", "exec": "execute", "hscan": "hscan_iter", "multi": "pipeline"}
    assert [one for one in permissions.COMMANDS if by_method.get(one, one) not in sent] == []


async def test_a_system_lives_under_the_shipped_users(strict_redis: RedisProcess):
    """Whoever installs the file as it is would find out in production what is missing in it."""
    app = App()

    @app.tool(effect="once")
    def publish(text: str) -> str:
        """Publish a text."""
        return text

    @app.workflow("review")
    async def review(ctx: Context, name: str) -> str:
        await ctx.artifact("notes", b"x" * 100)
        decision = await ctx.approve("May I?")
        await ctx.sleep(0.05)
        child = await ctx.spawn("chat", {"prompt": name})
        await ctx.tool(publish, text=name)
        return f"{decision.approved} {await child.result()}"

    async with (
        ScriptedProvider(says("fine")) as provider,
        serving(strict_redis.url, app, **HTTP, **provider_settings(provider)) as served,
        working(served.store, app),
        projecting(served.store, *build(PROJECTIONS, served.store)),
    ):
        store, client = served.store, served.client
        await store.webhooks.create("anonymous", Webhook(url="http://127.0.0.1:1/hook"))
        every = Schedule(name="s", kind="chat", owner="anonymous", timing=Timing(every=3600.0))
        await store.schedules.create(every)
        job = (await client.post("/v1/jobs", json={"kind": "review", "input": "notes"})).json()["id"]
        async with served.stream(job, after="0") as stream, served.everything("anonymous") as everything:
            await anext(everything)
            await stream.until("approval.requested")
            async with Client(served.url) as python:
                await python.handle(job).approve()
            assert (await stream.until("job.completed"))[-1].event == "job.completed"
        for path in ("jobs", "stats", "queues", "workers", "schedules", "notifications"):
            assert (await client.get(f"/v1/{path}")).status_code == 200, path

        async def is_listed() -> bool:
            found = (await client.get("/v1/jobs?status=completed")).json()["jobs"]
            return job in {one["id"] for one in found}

        await wait_until(is_listed)
        assert (await Doctor(store).examine()).is_healthy


def test_all_else_is_refused(redis: RedisProcess):
    """Who steals the password of one worker would own the server, and what others keep on it."""
    check_refused(redis, acl.USER, acl.PASSWORD, REFUSED)


def check_refused(server: RedisProcess, user: str, password: str, commands: str) -> None:
    for command in filter(None, map(str.strip, re.split(r"[·\n]", commands))):
        with server.client(user, password) as client, pytest.raises(NoPermissionError):
            client.execute_command(*command.split())
            pytest.fail(f"{command} was not refused")


@pytest.mark.parametrize(
    "call", ["'KEYS', '*'", "'SET', 'other:x', '1'", "'CONFIG', 'GET', '*'", "'FLUSHALL'"]
)
def test_a_script_may_no_more_than_its_user(redis: RedisProcess, call: str):
    """EVAL would be the door that the list of commands leaves open."""
    refused = pytest.raises(ResponseError, match=r"ACL failure in script|not allowed from script")
    with redis.client(acl.USER, acl.PASSWORD) as client, refused:
        client.eval(f"return redis.call({call})", 0)


def test_who_gives_no_name_or_a_wrong_password_is_refused(strict_redis: RedisProcess):
    """The default user of a server would be the way round the others."""
    for name, password in (("default", ""), (acl.USER, "wrong"), (acl.METRICS, acl.PASSWORD)):
        with strict_redis.client(name, password) as client, pytest.raises(AuthenticationError):
            client.ping()


async def test_the_password_may_be_given_apart(strict_redis: RedisProcess):
    """Kubernetes keeps a password in a secret of its own, and nothing that would make a URL of it."""
    url = strict_redis.url.replace(f":{acl.PASSWORD}", "")
    store = await Store.open(fast_settings(url, redis_password=acl.PASSWORD))
    await store.aclose()
    with pytest.raises(StoreUnavailable, match="it refuses the user name or the password"):
        await Store.open(fast_settings(url, redis_password="wrong-canary"))


async def test_the_exporter_reads_how_much_waits_and_nothing_of_it(redis: RedisProcess, store: Store):
    """A dashboard's password would show every prompt that is in a queue."""
    await store.jobs.submit(Submission(kind="chat", input=b'{"prompt":"confidential"}'))
    await store.work.take(0, "w", 1, 1, ["default"])
    await store.jobs.submit(Submission(kind="chat", input=b'{"prompt":"confidential too"}'))
    work = "sj:{0}:work:default:default"
    with redis.client(acl.METRICS, acl.METRICS_PASSWORD) as client:
        assert client.info("memory")["used_memory"]
        assert client.xlen(work) == 1
        assert client.xinfo_groups(work)[0]["lag"] == 1
        assert client.xpending(work, "workers")["pending"] == 0
    check_refused(redis, acl.METRICS, acl.METRICS_PASSWORD, REFUSED + REFUSED_TO_METRICS)


LACKING = {
    r"grant it \+xadd \+xgroup\|setid$": ("-xadd", "-xgroup|setid"),
    r"grant it &sj:\* \+publish \+subscribe$": ("resetchannels",),
    "does not allow its user a key;": ("resetkeys",),
    "does not allow its user the command info;": ("-info",),
    "does not allow its user the command eval;": ("-eval",),
}
"""What the doctor says of a user -> what was taken from it."""


@pytest.mark.parametrize("said", LACKING)
async def test_the_doctor_names_what_the_user_lacks(redis: RedisProcess, said: str):
    """`NOPERM`, from one of fifty commands in a script, at three in the morning."""
    rules = line_of(acl.USER, acl.users()).split()[2:]
    with redis.client() as client:
        client.execute_command("ACL", "SETUSER", "lacking", *rules, *LACKING[said])
        try:
            with pytest.raises(MissingPermission, match=said):
                await examine(redis.url.replace(acl.USER, "lacking"))
        finally:
            client.execute_command("ACL", "DELUSER", "lacking")


async def examine(url: str) -> None:
    store = await Store.open(fast_settings(url))
    try:
        await Doctor(store).examine()
    finally:
        await store.aclose()
