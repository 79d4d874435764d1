"""What is measured and how: CPU time of process trees, the machine's noise, and plain statistics.

CPU time is read from /proc (clock ticks, mostly 10 ms), as the kernel accounts it for all threads.
Where there is no /proc it is not measured, and the report says so.
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
CALIBRATION_ROUNDS = 120_000


# --- statistics


@dataclass(frozen=True)
class Summary:
    """The middle and the ends of a few values."""

    median: float
    low: float
    high: float


def summarize(values: Sequence[float]) -> Summary | None:
    """Return median, minimum and maximum; None for no values."""
    if not values:
        return None
    return Summary(statistics.median(values), min(values), max(values))


def median_ratio(ours: dict[int, float], theirs: dict[int, float]) -> float | None:
    """Divide round by round, then take the median: noise that lasts a round cancels out.

    Rounds that only one side finished are left out; None if there is no common one.
    """
    ratios = [ours[number] / theirs[number] for number in ours if theirs.get(number)]
    return statistics.median(ratios) if ratios else None


def spread(values: Sequence[float]) -> float:
    """Return (max - min) / median; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    return (max(values) - min(values)) / statistics.median(values)


def percentile(values: Sequence[float], share: float) -> float | None:
    """Return the value that `share` of all values do not exceed (nearest rank); None for no values."""
    if not values:
        return None
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


# --- CPU time


@dataclass(frozen=True)
class ProcessTimes:
    """One line of /proc/<pid>/stat: the parent, and CPU ticks with those of children that were waited for."""

    parent: int
    ticks: int


def parse_stat(line: str) -> ProcessTimes:
    """Read a stat line; the name in it may hold spaces and parentheses."""
    fields = line.rpartition(")")[2].split()
    return ProcessTimes(parent=int(fields[1]), ticks=sum(int(field) for field in fields[11:15]))


def tree_of(root: int, parents: dict[int, int]) -> list[int]:
    """Return `root` and all below it, given each process's parent."""
    tree, found = [root], True
    while found:
        below = [pid for pid, parent in parents.items() if parent in tree and pid not in tree]
        tree += below
        found = bool(below)
    return tree


class CpuClock:
    """CPU seconds used by a process and its descendants; what has ended counts for whoever waited for it."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._tick = os.sysconf("SC_CLK_TCK")

    def seconds(self) -> float | None:
        """Return user and system seconds so far; None where /proc does not exist."""
        if not PROC.joinpath("self/stat").exists():
            return None
        alive = dict(_processes())
        tree = tree_of(self._root, {pid: times.parent for pid, times in alive.items()})
        return sum(alive[pid].ticks for pid in tree if pid in alive) / self._tick


def resident(root: int) -> int | None:
    """Return the bytes of memory that a process and its descendants hold; None where /proc does not exist."""
    if not PROC.joinpath("self/stat").exists():
        return None
    tree = tree_of(root, {pid: times.parent for pid, times in _processes()})
    return sum(map(_resident, tree))


def _resident(pid: int) -> int:
    try:
        pages = (PROC / str(pid) / "statm").read_text(encoding="utf-8").split()[1]
    except OSError:
        return 0  # it has exited meanwhile
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _processes() -> Iterable[tuple[int, ProcessTimes]]:
    for pid in [int(entry.name) for entry in PROC.glob("[0-9]*")]:
        try:
            yield pid, parse_stat((PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace"))
        except OSError:
            continue  # it has exited meanwhile


# --- the machine


def calibrate(rounds: int = CALIBRATION_ROUNDS) -> float:
    """Time a fixed chain of SHA-256: on a quiet machine this is a constant."""
    digest = b"streamjobs"
    started = time.perf_counter()
    for _ in range(rounds):
        digest = hashlib.sha256(digest).digest()
    return time.perf_counter() - started


@dataclass(frozen=True)
class Machine:
    """What the numbers were measured on."""

    processor: str
    cores: int
    memory_gib: float
    system: str
    python: str


def describe_machine() -> Machine:
    """Return processor, usable cores, memory, kernel and Python of this machine."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    system = f"{platform.system()} {platform.release()}"
    return Machine(_processor(), usable, round(memory, 1), system, platform.python_version())


def _processor() -> str:
    try:
        lines = (PROC / "cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
