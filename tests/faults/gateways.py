"""Gateways in processes of their own, to be killed, drained and measured from outside."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx

from streamjobs.config import Settings
from streamjobs.store import Store
from tests.conftest import fast_settings, free_port, wait_until
from tests.harness import ROOT, environment

READY = 90.0
"""Seconds that a gateway may take to be there on a busy machine."""


class GatewayProcess:
    """A gateway as `streamjobs serve` starts it; it keeps its port when it is started again."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.port = settings.port
        self.process = self._spawn()

    def _spawn(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "streamjobs", "serve"], env=environment(self.settings), cwd=ROOT
        )

    def restart(self) -> None:
        assert self.process.poll() is not None
        self.process = self._spawn()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(20)

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    async def ready(self) -> None:
        await wait_until(self._answers, READY, "a gateway that is ready")

    async def _answers(self) -> bool:
        assert self.process.poll() is None, f"the gateway ended with {self.process.returncode}"
        try:
            async with httpx.AsyncClient() as client:
                return (await client.get(f"{self._ops}/readyz")).status_code == 200
        except httpx.TransportError:
            return False

    async def metric(self, name: str) -> float:
        """The value of a metric, as `streamjobs_viewers` or `streamjobs_streams_closed_total{why="slow"}`."""
        async with httpx.AsyncClient(timeout=20) as client:
            text = (await client.get(f"{self._ops}/metrics")).text
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    async def viewers(self, count: int, timeout: float = READY) -> None:
        """Wait until exactly so many streams are open."""

        async def are_there() -> bool:
            return await self.metric("streamjobs_viewers") == count

        await wait_until(are_there, timeout, f"{count} open streams")

    async def ended(self, timeout: float = 30.0) -> int:
        """Wait for the process's end; its exit status."""
        await wait_until(lambda: self.process.poll() is not None, timeout, "the end of the gateway")
        return self.process.returncode

    @property
    def memory(self) -> int:
        """Its resident memory, in bytes."""
        return memory_of(self.process.pid)

    @property
    def _ops(self) -> str:
        return f"http://{self.settings.host}:{self.settings.ops_port}"


@contextlib.asynccontextmanager
async def gateway_process(redis_url: str, **changes: Any) -> AsyncIterator[GatewayProcess]:
    """A gateway that answers; it is gone, whatever happened to it, when the block ends."""
    values = {"lease": 600.0, "flush_interval": 0.02, "port": free_port(), "ops_port": free_port()}
    values |= {"owner_streams": 0}
    gateway = GatewayProcess(fast_settings(redis_url, **(values | changes)))
    try:
        await gateway.ready()
        yield gateway
    finally:
        if gateway.process.poll() is None:
            gateway.kill()


@contextlib.asynccontextmanager
async def store_beside(gateway: GatewayProcess) -> AsyncIterator[Store]:
    """A store of the test's own, to write what the gateway shows."""
    store = await Store.open(gateway.settings)
    try:
        yield store
    finally:
        await store.aclose()


def memory_of(pid: int) -> int:
    """The resident memory of a process, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


# --- what the kernel holds

_DIAG_REQUEST = struct.Struct("=BBBBIHH16s16sI8s")
_DIAG_ANSWER = struct.Struct("=BBBBHH16s16sI8sIIIII")
_HEADER = struct.Struct("=IHHII")
_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY, _DUMP = 4, 20, 0x301
_ERROR, _DONE = 2, 3
_SKMEMINFO = 7
_QUEUED, _FORWARD = 5, 4
_ESTABLISHED = 1 << 1


def send_queues(port: int) -> list[int]:
    """Bytes of kernel memory behind each established connection of a listening port, as `ss -tm` has them.

    It is what is charged, whole buffers with their heads, not only what they hold.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as diag:
        diag.bind((0, 0))
        body = _DIAG_REQUEST.pack(
            socket.AF_INET, socket.IPPROTO_TCP, 1 << (_SKMEMINFO - 1), 0, _ESTABLISHED, 0, 0, b"", b"", 0, b""
        )
        diag.send(_HEADER.pack(_HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, _DUMP, 1, 0) + body)
        found: list[int] = []
        while _read_answers(diag.recv(1 << 20), port, found.append):
            pass
    return found


def _read_answers(data: bytes, port: int, found: Callable[[int], None]) -> bool:
    """Take what one datagram says; False when it was the last one."""
    while data:
        length, kind, *_ = _HEADER.unpack_from(data)
        assert kind != _ERROR, "the kernel refuses to describe its sockets"
        if kind == _DONE:
            return False
        answer = _DIAG_ANSWER.unpack_from(data, _HEADER.size)
        if socket.ntohs(answer[4]) == port:
            found(_held(data[_HEADER.size + _DIAG_ANSWER.size : length]))
        data = data[(length + 3) & ~3 :]
    return True


def _held(attributes: bytes) -> int:
    while attributes:
        length, kind = struct.unpack_from("=HH", attributes)
        if kind == _SKMEMINFO:
            numbers = struct.unpack_from(f"={(length - 4) // 4}I", attributes, 4)
            return numbers[_QUEUED] + numbers[_FORWARD]
        attributes = attributes[(length + 3) & ~3 :]
    raise AssertionError("a socket without its memory")
