"""Between a worker and one isolated tool's process: starts it, passes on what it says, and ends it.

Rule 1: when the worker hangs up, for whatever reason, the tool and all that came of it is killed.
Rule 2: the same at the timeout, after the tool's own end, and when it has sent too much.
Rule 3: its last message is sent when nothing of the call runs any more.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import socket
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec

from streamjobs.worker.isolation import confinement, descendants
from streamjobs.worker.isolation.call import Pipe, run
from streamjobs.worker.isolation.descendants import ChildNews
from streamjobs.worker.isolation.messages import (
    ENDED,
    HEAD,
    REQUEST,
    SAID,
    STARTED,
    End,
    EndReason,
    Request,
    frame,
)

_CHUNK = 64 * 1024
_END_TIMEOUT = 5.0
"""Seconds to end what a tool started, and to tell the worker."""


def supervise(channel: socket.socket, folder: Path) -> bool:
    """Run the one call that the worker names on the channel, in a folder that is made for it.

    False where some of it could not be ended.
    """
    request = _read_request(channel)
    if request is None or _has_hung_up(channel):
        return True
    confinement.adopt_orphans()
    try:
        return Supervisor(channel, request, folder).run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _read_request(channel: socket.socket) -> Request | None:
    """What the worker asks for; None where it is gone."""
    kind, size = HEAD.unpack(_read(channel, HEAD.size) or HEAD.pack(b"?", 0))
    return msgspec.json.decode(_read(channel, size), type=Request) if kind == REQUEST else None


def _read(channel: socket.socket, size: int) -> bytes:
    """So many bytes, or none at all."""
    read = bytearray()
    while len(read) < size:
        some = channel.recv(size - len(read))
        if not some:
            return b""
        read += some
    return bytes(read)


def _has_hung_up(channel: socket.socket) -> bool:
    """Whether the worker has given the call up before it began."""
    try:
        return not channel.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False


class Supervisor:
    """One call, from the fork to the last message."""

    def __init__(self, channel: socket.socket, request: Request, folder: Path) -> None:
        self._channel = channel
        self._request = request
        self._folder = folder
        self._pending = bytearray()
        self._heard = 0
        self._status: int | None = None
        self._news = ChildNews()
        self._pipe = -1
        self._tool = 0

    def run(self) -> bool:
        """Start the tool, watch it, end it and say how it ended; False where some of it still runs."""
        self._pending += frame(STARTED, str(os.getpid()).encode())
        try:
            self._start()
        except OSError as error:  # no more processes, files or disk
            self._finish(End("not_started", error=str(error)))
            return True
        reason = self._watch()
        is_over = self._end_tool()
        if reason == "exited":
            self._drain()
        os.close(self._pipe)
        self._finish(End(reason, self._status or 0))
        return is_over

    def _start(self) -> None:
        with contextlib.suppress(FileExistsError):  # it is there, unless somebody has tidied up
            self._folder.parent.mkdir(mode=0o700)
        self._folder.mkdir(mode=0o700)
        self._pipe, write = os.pipe()
        os.set_blocking(self._pipe, False)
        self._tool = os.fork()
        if self._tool == 0:
            self._become_tool(write)
        os.close(write)
        with contextlib.suppress(OSError):  # it has done so itself, or is gone
            os.setpgid(self._tool, self._tool)

    def _become_tool(self, write: int) -> None:
        """Be the tool's process; never returns."""
        try:
            supervisor = os.getppid()
            os.setpgid(0, 0)
            self._news.close()
            os.close(self._pipe)
            self._channel.close()
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            confinement.die_with_parent()
            if os.getppid() == supervisor:
                run(self._request, Pipe(write), self._folder)
        finally:
            os._exit(0)

    # --- watching

    def _watch(self) -> EndReason:
        deadline = time.monotonic() + self._request.limits.timeout
        poll = select.poll()
        poll.register(self._news, select.POLLIN)
        poll.register(self._pipe, select.POLLIN)
        while True:
            poll.register(self._channel, select.POLLIN | (select.POLLOUT if self._pending else 0))
            left = deadline - time.monotonic()
            if left <= 0:
                return "timeout"
            ready = {descriptor for descriptor, _ in poll.poll(left * 1000)}
            if not self._talk(ready):
                return "cancelled"
            if self._pipe in ready and not self._listen():
                poll.unregister(self._pipe)
            if self._heard > self._request.limits.output:
                return "too_much"
            if self._news.fileno() in ready and self._has_ended():
                return "exited"

    def _talk(self, ready: set[int]) -> bool:
        """Send what is pending; False where the worker has hung up."""
        if self._channel.fileno() not in ready:
            return True
        try:
            if not self._channel.recv(_CHUNK, socket.MSG_DONTWAIT):
                return False
        except BlockingIOError:
            pass
        except OSError:
            return False
        with contextlib.suppress(OSError):
            del self._pending[: self._channel.send(self._pending, socket.MSG_DONTWAIT)]
        return True

    def _listen(self) -> bool:
        """Take what the tool says; False at the end of its pipe."""
        try:
            said = os.read(self._pipe, _CHUNK)
        except BlockingIOError:
            return True
        self._heard += len(said)
        if said and self._heard <= self._request.limits.output:
            self._pending += frame(SAID, said)
        return bool(said)

    def _has_ended(self) -> bool:
        self._news.clear()
        self._note(descendants.bury().dead)
        return self._status is not None

    def _note(self, dead: Mapping[int, int]) -> None:
        if self._tool in dead:
            self._status = dead[self._tool]
            descendants.kill_group(self._tool)  # at once: the number may soon be somebody else's

    # --- ending

    def _end_tool(self) -> bool:
        """Kill what is left of the call; False where some of it withstands."""
        if self._status is None:
            descendants.kill(self._tool)
            descendants.kill_group(self._tool)
        dead, is_alone = descendants.end_all(self._news, _END_TIMEOUT)
        self._status = dead.get(self._tool, self._status)
        return is_alone

    def _drain(self) -> None:
        """What the tool had said before it ended."""
        with contextlib.suppress(OSError):
            while self._heard <= self._request.limits.output and self._listen():
                if not select.select([self._pipe], [], [], 0)[0]:
                    return

    def _finish(self, end: End) -> None:
        self._channel.settimeout(_END_TIMEOUT)
        with contextlib.suppress(OSError):  # the worker is gone
            self._channel.sendall(self._pending + frame(ENDED, msgspec.json.encode(end)))
