"""One of several gateway processes: what it hears from its supervisor, and what it says.

Rule: without its supervisor it ends, as fast as for a person who waits: the next supervisor needs the port.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
from collections.abc import Callable, Generator

import msgspec
import structlog

from streamjobs import metrics
from streamjobs.gateway.app import serve
from streamjobs.gateway.jobs import Registry
from streamjobs.gateway.stop import Stop
from streamjobs.gateway.supervisor import BEAT, BEAT_INTERVAL, READY, Orders

log = structlog.get_logger(__name__)


class Channel:
    """This process's end of the channel, which it got as file descriptor `number`."""

    def __init__(self, number: int) -> None:
        self._socket = _inherited(number)

    def orders(self) -> Orders:
        """What the supervisor says first; waits for it."""
        with self._socket.makefile("rb") as lines:
            return msgspec.json.decode(lines.readline(), type=Orders)

    def say(self, word: bytes) -> None:
        """Tell the supervisor; one that does not read, or is no more, misses nothing that matters."""
        with contextlib.suppress(BlockingIOError, ConnectionError):
            self._socket.send(word)

    @contextlib.contextmanager
    def when_broken(self, act: Callable[[], None]) -> Generator[None]:
        """Call `act` once when the supervisor is gone, however it ended."""
        loop = asyncio.get_running_loop()

        def hear() -> None:
            with contextlib.suppress(ConnectionError):
                if self._socket.recv(64):
                    return
            loop.remove_reader(self._socket)
            act()

        self._socket.setblocking(False)
        loop.add_reader(self._socket, hear)
        try:
            yield
        finally:
            loop.remove_reader(self._socket)


async def serve_as_member(channel: Channel, orders: Orders, registry: Registry) -> None:
    """Serve on the sockets of the orders until told to stop or left alone, then drain."""
    structlog.contextvars.bind_contextvars(slot=int(os.environ[metrics.SLOT_VARIABLE]))
    stop = Stop()

    def leave() -> None:
        log.error("gateway.supervisor_gone")
        stop(signal.SIGINT)
        shutil.rmtree(os.environ[metrics.FOLDER_VARIABLE], ignore_errors=True)  # nobody else will

    beating = asyncio.create_task(_beat(channel), name="beat")
    try:
        with stop.on_signals(), channel.when_broken(leave):
            await serve(
                orders.settings, registry, stop=stop, on_ready=lambda _: channel.say(READY),
                listeners=[_inherited(number) for number in orders.listeners],
            )  # fmt: skip
    finally:
        beating.cancel()


async def _beat(channel: Channel) -> None:
    while True:
        metrics.publish()
        channel.say(BEAT)
        await asyncio.sleep(BEAT_INTERVAL)


def _inherited(number: int) -> socket.socket:
    os.set_inheritable(number, False)
    return socket.socket(fileno=number)
