"""The processes below this one: finding, ending and burying them.

Rule: a process that adopts orphans (`confinement.adopt_orphans`) finds all that came of its children, also
what tried to get away by sessions of its own or by forking twice. Elsewhere than on Linux it finds none of
those; their process group is ended by whoever made it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from pathlib import Path
from typing import NamedTuple

from streamjobs.worker.isolation.confinement import IS_LINUX

_LOOK_AGAIN = 0.01


class ChildNews:
    """A file descriptor that is readable when a child has ended."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, _note_nothing)  # a signal without any handler wakes nobody up

    def fileno(self) -> int:
        """What to poll."""
        return self._read

    def clear(self) -> None:
        """Forget the news so far; look at the children after this, not before."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self._read, 4096):
                pass

    def wait(self, seconds: float) -> None:
        """Wait for news, or so long."""
        select.select([self._read], [], [], seconds)
        self.clear()

    def close(self) -> None:
        """Listen no longer, in a process that was forked."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.close(self._read)
        os.close(self._write)


def _note_nothing(_number: int, _frame: object) -> None:
    pass


class Buried(NamedTuple):
    """Children that have ended, by process id, with their exit status (negative: a signal)."""

    dead: dict[int, int]
    is_alone: bool
    """Whether no other child is left."""


def bury() -> Buried:
    """Collect the children that have ended."""
    dead: dict[int, int] = {}
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return Buried(dead, is_alone=False)
            dead[pid] = os.waitstatus_to_exitcode(status)
    return Buried(dead, is_alone=True)


def children() -> set[int]:
    """The children of this process, zombies too; none where there is no /proc."""
    own = os.getpid()
    names = os.listdir("/proc") if IS_LINUX else ()  # noqa: PTH208 - a hot path
    return {int(name) for name in names if name.isdecimal() and parent_of(int(name)) == own}


def parent_of(pid: int) -> int:
    """The parent of a process; 0 for one that has ended."""
    try:
        _, _, rest = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")
    except OSError:
        return 0
    return int(rest.split(None, 2)[1])


def kill(pid: int) -> None:
    """Kill a child that was not buried yet, or none."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)


def kill_group(leader: int) -> None:
    """Kill a child and all that is still in its process group, at one blow."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def end_all(news: ChildNews, seconds: float) -> Buried:
    """Kill children, and the orphans among theirs, until there are none, or for so long."""
    deadline = time.monotonic() + seconds
    dead: dict[int, int] = {}
    while True:
        buried = bury()
        dead |= buried.dead
        if buried.is_alone or time.monotonic() > deadline:
            return Buried(dead, buried.is_alone)
        for pid in children():
            kill(pid)
        news.wait(_LOOK_AGAIN)
