"""Idle: many viewers of one running job that says nothing, then one token to show that all are there."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from loadtests.bench import Bench, Scenario
from loadtests.crowd import Plan
from loadtests.fanout import wait_until_open
from loadtests.fanout_systems import SYSTEMS, FanoutSystem
from loadtests.measure import CpuClock, resident
from loadtests.processes import RunError, last_json, python, running
from loadtests.redis_server import fresh_server
from loadtests.report import NOTHING, Section, Table, number, summary

NAMES = ("streamjobs", "nchan")
TIMEOUT = 120.0
SOCKSTAT = Path("/proc/net/sockstat")
PAGE = 4096


@dataclass(frozen=True)
class Run:
    """One round: bytes a viewer of the process and of all TCP buffers, CPU in ms a second, delay in ms."""

    system: str
    round: int
    viewers: int
    connecting: float
    memory: float | None
    kernel: float | None
    busy: float | None
    last: float


def measure(system: FanoutSystem, viewers: int, round_number: int, bench: Bench) -> Run:
    """Connect viewers, leave them alone, then say one token."""
    bench.sample_noise()
    quiet = bench.options.idle_seconds
    with fresh_server(bench.binary) as server, system.stage(server, 1, 1.0) as stage:
        empty, before = resident(stage.child.pid), tcp_memory()
        plan = Plan(stage.port, [stage.path], viewers, 1, TIMEOUT + quiet)
        argv = python("-m", "loadtests.crowd", json.dumps(_fields(plan)))
        started = time.perf_counter()
        with running("viewers", argv) as crowd:
            wait_until_open(crowd)
            connecting = time.perf_counter() - started
            clock = CpuClock(stage.child.pid)
            used = clock.seconds()
            time.sleep(quiet)
            spent = clock.seconds()
            full, after = resident(stage.child.pid), tcp_memory()
            stage.speak(1, 1.0)
            crowd.wait(TIMEOUT)
            seen = last_json(crowd)
    bench.sample_noise()
    if seen["short"]:
        raise RunError(f"{seen['short']} viewers did not get the token")
    return Run(
        system.name, round_number, viewers, connecting,
        None if full is None or empty is None else (full - empty) / viewers,
        None if after is None or before is None else (after - before) / viewers,
        None if spent is None or used is None else 1000 * (spent - used) / quiet,
        seen["delays"]["p99"],
    )  # fmt: skip


def _fields(plan: Plan) -> dict[str, object]:
    return {
        "port": plan.port,
        "paths": plan.paths,
        "viewers": plan.viewers,
        "tokens": 1,
        "timeout": plan.timeout,
    }


def tcp_memory() -> int | None:
    """Return the bytes of all TCP buffers of this machine; None where the kernel does not say."""
    try:
        lines = SOCKSTAT.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    tcp = next(line.split() for line in lines if line.startswith("TCP:"))
    return PAGE * int(tcp[tcp.index("mem") + 1])


def sizes(options: argparse.Namespace) -> list[int]:
    return [options.idle_viewers // part for part in options.idle_parts]


def run(bench: Bench) -> Section:
    """Measure each system at a tenth of the viewers and at all of them, `repeat` times."""
    systems = [system for system in SYSTEMS if system.name in NAMES]
    runs: list[Run] = []
    failed: dict[str, str] = {}
    for round_number in range(1, bench.options.repeat + 1):
        for viewers in sizes(bench.options):
            for system in systems:
                bench.progress.step(f"idle, round {round_number}: {system.name}, {viewers:,} viewers")
                if (why := system.missing()) is not None:
                    failed[f"{system.name}, {viewers:,}"] = why
                    continue
                measured = partial(measure, system, viewers, round_number, bench)
                runs += bench.attempt(f"{system.name}, {viewers:,}", measured, _spoken, failed)
    return section(bench.options, runs, failed)


def _spoken(run: Run) -> str:
    return f"{run.memory / 1024:.1f} KB a viewer" if run.memory is not None else "memory is not known here"


HEADERS = (
    "viewers", "system", "s until all were in", "KB a viewer", "and kernel buffers, KB",
    "CPU ms/s while idle", "a token to all, p99 ms",
)  # fmt: skip


def section(options: argparse.Namespace, runs: Sequence[Run], failed: dict[str, str]) -> Section:
    """Lay out the section."""
    rows = [_row(viewers, name, runs, failed) for viewers in sizes(options) for name in NAMES]
    broken = [f"idle, {name}: {why}" for name, why in failed.items() if why.startswith("failed")]
    return Section(
        title="Idle: viewers of a job that says nothing",
        intro=f"All connect at once, then nothing is said for {options.idle_seconds:g} s. Memory is the "
        f"serving process's while they wait, beyond what it held before. Rounds: {options.repeat}.",
        tables=[Table(HEADERS, rows)],
        notes=[f"{name}: {why}" for name, why in failed.items()],
        data={"runs": [asdict(run) for run in runs]},
        failures=broken,
    )


def _row(viewers: int, name: str, runs: Sequence[Run], failed: dict[str, str]) -> list[str]:
    mine = [run for run in runs if (run.viewers, run.system) == (viewers, name)]
    if not mine:
        reason = failed.get(f"{name}, {viewers:,}", NOTHING)
        return [number(viewers), name, reason, *[NOTHING] * (len(HEADERS) - 3)]
    return [
        number(viewers),
        name,
        summary([run.connecting for run in mine]),
        summary([run.memory / 1024 for run in mine if run.memory is not None]),
        summary([run.kernel / 1024 for run in mine if run.kernel is not None]),
        summary([run.busy for run in mine if run.busy is not None]),
        summary([run.last for run in mine]),
    ]


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("idle")
    group.add_argument("--idle-viewers", type=int, default=10_000, help="viewers (10,000)")
    group.set_defaults(idle_parts=(10, 1))
    group.add_argument("--idle-seconds", type=float, default=10.0, help="how long nothing is said (10)")


def quicken(options: argparse.Namespace) -> None:
    options.idle_parts = (1,)
    options.idle_viewers = min(options.idle_viewers, 200)
    options.idle_seconds = min(options.idle_seconds, 0.5)


def steps(options: argparse.Namespace) -> int:
    return options.repeat * len(sizes(options)) * len(NAMES)


SCENARIO = Scenario("idle", "viewers of a quiet job", add_options, quicken, steps, run)
