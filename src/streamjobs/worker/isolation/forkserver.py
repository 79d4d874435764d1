"""The process that forks a supervisor for each call: `python -m streamjobs.worker.isolation.forkserver`.

It is started by the worker with a socket, a folder for the calls, and the names of the modules of isolated
tools. Each byte on the socket comes with the channel of one call.

Rule 1: it holds no secret and reads no channel, so nothing that is forked from it knows of another call.
Rule 2: it ends with its worker. It has one thread.
Rule 3: when a supervisor did not end well, children that are no supervisors are its orphans, and are killed;
its folder is removed.
Rule 4: it goes last: when the calls have ended, the folder of all is removed.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import select
import shutil
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# it is imported here, once: what is forked has it
from streamjobs.worker.isolation import confinement, descendants
from streamjobs.worker.isolation.descendants import ChildNews
from streamjobs.worker.isolation.supervisor import supervise

_LEAVE_TIMEOUT = 10.0
"""Seconds for the calls to end when the worker is gone."""


class ForkServer:
    """Forks until the worker is gone."""

    def __init__(self, orders: socket.socket, folder: Path) -> None:
        self._orders = orders
        self._folder = folder
        self._news = ChildNews()
        self._supervisors: set[int] = set()

    def run(self) -> None:
        """Serve."""
        is_wanted = True
        while is_wanted:
            ready, _, _ = select.select([self._orders, self._news], [], [])
            if self._news in ready:
                self._bury()
            if self._orders in ready:
                is_wanted = self._serve()
        self._leave()

    def _leave(self) -> None:
        """Each supervisor has heard of the worker's end as well."""
        deadline = time.monotonic() + _LEAVE_TIMEOUT
        while self._supervisors and time.monotonic() < deadline:
            self._news.wait(_LEAVE_TIMEOUT)
            self._bury()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _serve(self) -> bool:
        """Fork for one call; False where the worker is gone."""
        order, channels, _, _ = socket.recv_fds(self._orders, 1, 1)
        for channel in channels:
            with socket.socket(fileno=channel) as opened, contextlib.suppress(OSError):  # no more processes
                self._fork(opened)
        return bool(order)

    def _fork(self, channel: socket.socket) -> None:
        pid = os.fork()
        if pid:
            self._supervisors.add(pid)
            return
        status = 1
        try:
            self._orders.close()
            self._news.close()
            status = 0 if supervise(channel, self._folder / str(os.getpid())) else 1
        finally:
            os._exit(status)

    def _bury(self) -> None:
        self._news.clear()
        dead = descendants.bury().dead
        unwell = [pid for pid, status in dead.items() if status or pid not in self._supervisors]
        self._supervisors -= dead.keys()
        if unwell:
            for orphan in descendants.children() - self._supervisors:
                descendants.kill(orphan)
        for pid in unwell:
            shutil.rmtree(self._folder / str(pid), ignore_errors=True)


def main(arguments: Sequence[str]) -> None:
    """Be the fork server on the socket of that number, with that folder, for tools of these modules."""
    descriptor, folder, *modules = arguments
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the worker decides, also where all get the signal
    confinement.die_with_parent()  # an import may hang
    confinement.be_first_to_go()
    confinement.hide_memory()
    confinement.adopt_orphans()
    for module in modules:
        with contextlib.suppress(BaseException):  # the call fails in its own process, and says why
            importlib.import_module(module)
    confinement.outlive_parent()
    gc.collect()
    gc.freeze()  # collections in what is forked leave shared pages alone
    ForkServer(socket.socket(fileno=int(descriptor)), Path(folder)).run()


if __name__ == "__main__":
    main(sys.argv[1:])
