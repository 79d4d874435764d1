"""What a process may still do: limits, privileges, and whom it may touch. It is applied to oneself.

Linux has all of it; other systems have the limits that `setrlimit` keeps.

Rule 1: what is given up cannot be taken back, by whatever runs here later.
Rule 2: a kernel without a feature (Landlock's scopes came with Linux 6.12) goes without it; the manual says
what is missing then.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import resource
import signal
import sys
from pathlib import Path

from streamjobs.worker.isolation.messages import Limits

IS_LINUX = sys.platform == "linux"

REPORT_ROOM = 16 * 1024 * 1024
"""Bytes beyond the memory limit, for telling that it was reached."""

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_CAPABILITY_VERSION_3 = 0x20080522
_LANDLOCK_CREATE_RULESET = 444
_LANDLOCK_RESTRICT_SELF = 446
_LANDLOCK_VERSION = 1
_LANDLOCK_SCOPES_SINCE = 6
_LANDLOCK_SCOPE_ABSTRACT_SOCKETS_AND_SIGNALS = 3


def hide_memory() -> None:
    """Keep other processes of this user from reading this one's memory and environment."""
    _prctl(_PR_SET_DUMPABLE, 0)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends: they cannot slip away."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent() -> None:
    """Be killed when the thread that started this process ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def outlive_parent() -> None:
    """Be killed for that no longer."""
    _prctl(_PR_SET_PDEATHSIG, 0)


def be_first_to_go() -> None:
    """Where the machine's memory is short, let the kernel choose this process and what it forks."""
    with contextlib.suppress(OSError):  # no Linux, or a /proc that is not ours to write
        Path("/proc/self/oom_score_adj").write_text("1000")


def drop_privileges() -> None:
    """Give up every capability, also those that a program that is executed would bring."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if IS_LINUX:
        head = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
        _require(_libc().capset(head, (ctypes.c_uint32 * 6)()))


def leave_others_alone() -> bool:
    """Signal no process outside, and trace none: Landlock's scopes. False where the kernel has none."""
    if not IS_LINUX:
        return False
    syscall = _libc().syscall
    if (
        syscall(_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), _LANDLOCK_VERSION)
        < _LANDLOCK_SCOPES_SINCE
    ):
        return False
    rules = (ctypes.c_uint64 * 3)(0, 0, _LANDLOCK_SCOPE_ABSTRACT_SOCKETS_AND_SIGNALS)
    ruleset = syscall(_LANDLOCK_CREATE_RULESET, rules, ctypes.c_size_t(ctypes.sizeof(rules)), 0)
    _require(ruleset)
    try:
        _require(syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0))
    finally:
        os.close(ruleset)
    return True


def limit(limits: Limits) -> None:
    """Bound memory, processor time, files and core dumps, for this process and each that it starts."""
    seconds = math.ceil(limits.timeout) + 1
    _set(resource.RLIMIT_CPU, seconds, seconds + 1)
    _set(resource.RLIMIT_FSIZE, limits.file)
    _set(resource.RLIMIT_NOFILE, limits.files)
    _set(resource.RLIMIT_CORE, 0)
    if IS_LINUX:
        most = _address_space() + limits.memory
        _set(resource.RLIMIT_AS, most, most + REPORT_ROOM)


def make_room() -> None:
    """Allow what is needed to tell that memory has run out."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def _set(which: int, soft: int, hard: int | None = None) -> None:
    """Set a limit, or leave a lower one as it is."""
    _, most = resource.getrlimit(which)
    wanted = soft if hard is None else hard
    hard = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
    resource.setrlimit(which, (min(soft, hard), hard))


def _address_space() -> int:
    """Bytes that this process has mapped."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _prctl(option: int, value: int) -> None:
    if IS_LINUX:
        _require(_libc().prctl(option, ctypes.c_ulong(value), 0, 0, 0))


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _require(result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
