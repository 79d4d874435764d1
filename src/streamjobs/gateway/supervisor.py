"""Several gateway processes on one port, and the process that starts, watches and ends them.

A process is our own command, executed anew: it finds its sockets and a channel under the numbers that its
command line and the `Orders` on the channel name. On the channel it says `READY` once it serves, and `BEAT`
every second. When the channel breaks its supervisor is gone, and it ends.

Rule 1: a process that ends is replaced, at once the first time, later after a pause. Its sockets wait for the
next one, but not through a pause: the kernel must not give connections to nobody.
Rule 2: one that ends before it serves, while no other one does, ends all: the next one would end as well. So
the first one starts alone, and what is wrong with the settings or Redis is said once.
Rule 3: signals are passed on, and nothing is replaced any more; a process that has drained gives up its
sockets, and what connects then goes to those that still drain.

Rejected: `multiprocessing`. It imports the command's main module again, and keeps a process for itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import msgspec
import structlog

from streamjobs import metrics
from streamjobs.config import Settings
from streamjobs.gateway.ports import Port
from streamjobs.gateway.stop import Stop
from streamjobs.retry import Backoff

log = structlog.get_logger(__name__)

READY = b"r"
BEAT = b"."
BEAT_INTERVAL = 1.0
_PAUSE = 0.5
"""Seconds before a process is replaced that ended soon, as the one before it had; doubles with each."""
_CALM = 60.0
"""A process that lived this long has not ended soon."""


class Orders(msgspec.Struct, frozen=True):
    """What a process is told first: its settings, its app, and the file descriptors of its sockets."""

    settings: Settings
    app: str | None
    listeners: tuple[int, ...]


class Process:
    """One gateway process, from outside. `on_ready` is called once it serves."""

    def __init__(self, process: asyncio.subprocess.Process, on_ready: Callable[[], None]) -> None:
        self._process = process
        self._on_ready = on_ready
        self._born = time.monotonic()
        self._missed = 0
        self._has_beaten = False
        self.is_serving = False
        self.pid = process.pid

    @property
    def age(self) -> float:
        """Seconds since it was started."""
        return time.monotonic() - self._born

    async def ended(self, channel: asyncio.StreamReader) -> int:
        """Listen until it ends; its exit status, negative for a signal."""
        with contextlib.suppress(ConnectionError):
            while heard := await channel.read(64):
                self._missed, self._has_beaten = 0, True
                if READY in heard:
                    self.is_serving = True
                    self._on_ready()
        return await self._process.wait()

    def miss(self) -> int:
        """Count one beat more as missed; how many are, since the last one that was heard."""
        self._missed += self._has_beaten
        return self._missed

    def send(self, number: int) -> None:
        """Pass a signal on; one that does not serve yet just ends."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number if self.is_serving else signal.SIGTERM)

    async def kill(self) -> None:
        """Kill it, if it has not ended, and wait for its end."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()

    def ended_well(self, status: int) -> bool:
        """Whether this is how one ends that was told to."""
        return status == 0 or (status == -signal.SIGTERM and not self.is_serving)


class Slot:
    """One process after another, on the same sockets and the same metrics."""

    def __init__(self, number: int, fleet: Fleet) -> None:
        self._number = number
        self._fleet = fleet
        self._sockets: list[socket.socket] = []
        self._early = 0
        self.process: Process | None = None
        self.served = asyncio.Event()
        """Set once any process of this slot has served."""

    @property
    def is_serving(self) -> bool:
        """Whether there is a process that serves."""
        return self.process is not None and self.process.is_serving

    @property
    def listens(self) -> bool:
        """Whether the kernel gives it connections; what comes between two processes waits."""
        return bool(self._sockets)

    async def run(self) -> int:
        """Run processes until told to stop, or until one cannot start while no other serves; a status."""
        status: int | None = None
        try:
            while status is None:
                status = await self._run_one()
        finally:
            self._close()
        return status

    async def _run_one(self) -> int | None:
        stop = self._fleet.stop.asked
        try:
            process, status = await self._process_and_status()
        except OSError as error:  # no more processes, files or memory
            if not self._fleet.is_serving:
                raise
            self._close()  # perhaps one of two could be opened
            await self._pause(0.0, error=str(error))
            return 0 if stop.is_set() else None
        if stop.is_set():
            return 0 if process.ended_well(status) else status
        if not process.is_serving and not self._fleet.is_serving:
            return status or 1
        await self._pause(process.age, pid=process.pid, status=status)
        return 0 if stop.is_set() else None

    async def _process_and_status(self) -> tuple[Process, int]:
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=ours)
        try:
            with theirs:
                process = self.process = await self._start(theirs, writer)
            try:
                return process, await process.ended(reader)
            finally:
                self.process = None
                await process.kill()
                metrics.forget(self._number, self._fleet.folder)
        finally:
            writer.close()

    async def _start(self, channel: socket.socket, orders: asyncio.StreamWriter) -> Process:
        fleet = self._fleet
        if not self._sockets:
            self._sockets.extend(port.open() for port in fleet.ports)
        listeners = tuple(listener.fileno() for listener in self._sockets)
        orders.write(msgspec.json.encode(Orders(fleet.settings, fleet.app, listeners)) + b"\n")
        started = await asyncio.create_subprocess_exec(
            *fleet.command, str(channel.fileno()),
            stdin=asyncio.subprocess.DEVNULL,
            pass_fds=(*listeners, channel.fileno()),
            env={
                **os.environ, metrics.FOLDER_VARIABLE: fleet.folder, metrics.SLOT_VARIABLE: str(self._number)
            },
            start_new_session=True,  # a terminal's Ctrl-C is for the supervisor, which passes it on
        )  # fmt: skip
        process = Process(started, self._note_ready)
        if fleet.stop.asked.is_set():
            process.send(signal.SIGTERM)
        return process

    def _note_ready(self) -> None:
        assert self.process is not None
        log.info("gateway.process_ready", slot=self._number, pid=self.process.pid)
        self.served.set()

    async def _pause(self, age: float, **why: object) -> None:
        self._early = self._early + 1 if age < _CALM else 1
        backoff = Backoff(_PAUSE, self._fleet.settings.serve_restart_cap)
        pause = 0.0 if self._early == 1 else backoff.delay(self._early - 1)
        log.warning(
            "gateway.process_ended", slot=self._number, **why, age=round(age, 1), pause=round(pause, 1)
        )
        if pause:
            self._close()
            await _within(pause, self._fleet.stop.asked.wait())

    def _close(self) -> None:
        for listener in self._sockets:
            listener.close()
        self._sockets.clear()


class Fleet:
    """All slots. `command` starts a process, with its channel's number as one more argument."""

    def __init__(
        self, settings: Settings, app: str | None, command: Sequence[str], ports: Sequence[Port], folder: str
    ) -> None:
        self.settings = settings
        self.app = app
        self.command = command
        self.ports = ports
        self.folder = folder
        self.slots = [Slot(number, self) for number in range(settings.serve_workers)]
        self.stop = _Relay(self.slots)
        self._running: list[asyncio.Task[int]] = []

    @property
    def is_serving(self) -> bool:
        """Whether any process serves."""
        return any(slot.is_serving for slot in self.slots)

    async def run(self) -> int:
        """Run all slots until a signal, or until nothing can start; 0, or the first other status."""
        watching = asyncio.create_task(self._watch(), name="watch")
        try:
            if await self._serve(self.slots[:1]) and await self._serve(self.slots[1:]):
                log.info("gateway.ready", url=self.ports[0].url, processes=len(self.slots))
            await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
            if not self.stop.asked.is_set():
                self.stop(signal.SIGTERM)  # one has given up
            return next((status for status in await asyncio.gather(*self._running) if status), 0)
        finally:
            for task in (watching, *self._running):
                task.cancel()
            await asyncio.gather(watching, *self._running, return_exceptions=True)

    async def _serve(self, slots: Sequence[Slot]) -> bool:
        """Start these slots and wait until all have served; False when all is to end before that."""
        started = [asyncio.create_task(slot.run(), name="slot") for slot in slots]
        self._running += started
        served = asyncio.gather(*(slot.served.wait() for slot in slots))
        asked = asyncio.create_task(self.stop.asked.wait())
        await asyncio.wait([served, asked, *self._running], return_when=asyncio.FIRST_COMPLETED)
        has_served = served.done()
        for waiting in (served, asked):
            waiting.cancel()
        await asyncio.gather(served, asked, return_exceptions=True)
        return has_served and not any(task.done() for task in self._running)

    async def _watch(self) -> None:
        """Kill processes whose event loop stands still: their share of the connections waits for them."""
        patience = self.settings.serve_hang_timeout / BEAT_INTERVAL
        while patience:
            await asyncio.sleep(BEAT_INTERVAL)
            for process in (slot.process for slot in self.slots):
                if process is not None and process.miss() > patience:
                    log.error("gateway.process_hangs", pid=process.pid)
                    await process.kill()


class _Relay(Stop):
    """Passes signals on."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        super().__init__()
        self._slots = slots

    def __call__(self, number: int) -> None:
        super().__call__(number)
        for slot in self._slots:
            if slot.process is not None:
                slot.process.send(number)


async def supervise(settings: Settings, app: str | None, command: Sequence[str]) -> int:
    """Run `serve_workers` processes until told to stop, or until they cannot start; the status to exit with.

    Raises `OSError` where a port is taken.
    """
    with contextlib.ExitStack() as stack:
        ports: list[Port] = []
        for number in (settings.port, *([settings.ops_port] if settings.ops_port else [])):
            ports.append(Port(settings, number))
            stack.callback(ports[-1].close)
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="streamjobs-metrics-"))
        fleet = Fleet(settings, app, command, ports, folder)
        stack.enter_context(fleet.stop.on_signals())
        return await fleet.run()


async def _within(seconds: float, waiting: Coroutine[Any, Any, object]) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await waiting
