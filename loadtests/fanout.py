"""Fan-out: one text, spoken at a steady rate, to many viewers at once.

One process serves; what it spends is accounted from the first token to the last. Viewers are one process that
counts tokens (`crowd`), the text is written by another (`speaker`). A viewer that misses a token fails the
run.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

from loadtests.bench import Bench, Scenario
from loadtests.crowd import READY
from loadtests.fanout_systems import SYSTEMS, FanoutSystem, Ours
from loadtests.measure import CpuClock, median_ratio, resident
from loadtests.processes import Child, RunError, last_json, python, running
from loadtests.redis_server import fresh_server
from loadtests.report import NOTHING, Chart, Line, Section, Table, number, percent, ratio, summary

CONNECT_TIMEOUT = 60.0
MARGIN = 40.0
POLL = 0.05
HEAVY = 50_000
"""Tokens a second in all, more than which are given only to systems that may be able to deliver them."""


@dataclass(frozen=True)
class Size:
    """How many viewers, and tokens a second for each."""

    viewers: int
    rate: float


@dataclass(frozen=True)
class Run:
    """One round of one system at one size; `cpu` in seconds, `memory` in bytes a viewer, delays in ms."""

    system: str
    viewers: int
    rate: float
    round: int
    tokens: int
    seconds: float
    cpu: float | None
    memory: float | None
    delays: dict[str, float]
    received: int
    reads: int
    crowd_cpu: float
    late: float

    @property
    def delivered(self) -> float:
        return self.tokens / self.seconds

    @property
    def micros(self) -> float | None:
        return None if self.cpu is None else 1e6 * self.cpu / self.tokens


def sizes(options: argparse.Namespace) -> list[Size]:
    few = [Size(options.fan_viewers, rate) for rate in options.fan_rates]
    return [*few, *([Size(options.fan_crowd, options.fan_rates[0])] if options.fan_crowd else [])]


# --- one measurement


def measure(system: FanoutSystem, size: Size, round_number: int, bench: Bench) -> Run:
    """Serve one text to a crowd."""
    bench.sample_noise()
    tokens = round(size.rate * bench.options.fan_seconds)
    with fresh_server(bench.binary) as server, system.stage(server, tokens, size.rate) as stage:
        empty = resident(stage.child.pid)
        plan = {"port": stage.port, "paths": [stage.path], "viewers": size.viewers, "tokens": tokens}
        plan["timeout"] = CONNECT_TIMEOUT + bench.options.fan_seconds + MARGIN
        with running("viewers", python("-m", "loadtests.crowd", json.dumps(plan))) as crowd:
            wait_until_open(crowd)
            full, clock = resident(stage.child.pid), CpuClock(stage.child.pid)
            used = clock.seconds()
            late = stage.speak(tokens, size.rate)
            crowd.wait(bench.options.fan_seconds + MARGIN)
            spent = clock.seconds()
            seen = last_json(crowd)
    bench.sample_noise()
    if seen["short"] or seen["holes"]:
        raise RunError(f"{seen['short']} viewers missed tokens, {seen['holes']} holes")
    return Run(
        system.name, size.viewers, size.rate, round_number, seen["tokens"], seen["seconds"],
        None if spent is None or used is None else spent - used,
        None if full is None or empty is None else (full - empty) / size.viewers,
        seen["delays"], seen["received"], seen["reads"], seen["cpu"], late,
    )  # fmt: skip


def wait_until_open(crowd: Child) -> None:
    """Wait until every viewer has had its answer."""
    deadline = time.monotonic() + CONNECT_TIMEOUT
    while READY not in crowd.output().split():
        crowd.require_alive()
        if time.monotonic() > deadline:
            raise RunError(f"the viewers could not all connect: {crowd.tail()}")
        time.sleep(POLL)


# --- all of them


def run(bench: Bench) -> Section:
    """Measure every system at every size it is given, `repeat` times, interleaved."""
    runs: list[Run] = []
    failed: dict[str, str] = {}
    for round_number in range(1, bench.options.repeat + 1):
        for size in sizes(bench.options):
            for system in SYSTEMS:
                label = f"{system.name}, {size.viewers:,} x {size.rate:g}/s"
                bench.progress.step(f"fanout, round {round_number}: {label}")
                if (why := excused(system, size) or system.missing()) is not None:
                    failed[label] = why
                    continue
                runs += bench.attempt(
                    label, partial(measure, system, size, round_number, bench), _spoken, failed
                )
    return section(bench.options, runs, failed)


def excused(system: FanoutSystem, size: Size) -> str | None:
    """Why a system is not given this size: the text would take many times its length."""
    if isinstance(system, Ours) or system.name == "nchan" or size.viewers * size.rate <= HEAVY:
        return None
    return f"not given: more than {HEAVY:,} tokens/s in all"


def _spoken(run: Run) -> str:
    cost = f", {run.micros:.2f} µs CPU a token" if run.micros is not None else ""
    return f"{run.delivered:,.0f} tokens/s delivered{cost}, p99 {run.delays['p99']:,.0f} ms"


# --- its part of the report


CORES = "cores used by the serving process"
HEADERS = (
    "viewers", "tokens/s each", "system", "tokens/s delivered", "CPU µs/token", "it / streamjobs",
    "of a core", "p50 ms", "p99 ms", "bytes/token", "reads/s a viewer", "KB a viewer", "viewers' CPU",
)  # fmt: skip


def section(options: argparse.Namespace, runs: Sequence[Run], failed: dict[str, str]) -> Section:
    """Lay out the section; a system without numbers keeps its row, with the reason."""
    rows = [_row(size, system.name, runs, failed) for size in sizes(options) for system in SYSTEMS]
    broken = {label: why for label, why in failed.items() if why.startswith("failed")}
    return Section(
        title="Fan-out: one text to many viewers",
        intro=f"{options.fan_seconds:g} s of text at a steady rate, all viewers connected before. Delays are "
        "from a token's being written (our recorder's 20 ms are before that) until a viewer has read it, of "
        "one in 25. "
        "CPU is the serving process's; of a core: that time by the length of the text. KB a viewer: its "
        f"resident memory while connected, without kernel buffers. Rounds: {options.repeat}.",
        tables=[Table(HEADERS, rows)],
        notes=[f"{system.name}: {system.described}" for system in SYSTEMS]
        + [f"{label}: {why}" for label, why in failed.items()],
        data={"runs": [asdict(run) for run in runs]},
        failures=[f"fanout, {label}: {why}" for label, why in broken.items()],
        charts=[_rate_chart(options, runs), _viewer_chart(options, runs)],
    )


def _row(size: Size, system: str, runs: Sequence[Run], failed: dict[str, str]) -> list[str]:
    of_size = [run for run in runs if (run.viewers, run.rate) == (size.viewers, size.rate)]
    mine = [run for run in of_size if run.system == system]
    start = [number(size.viewers), f"{size.rate:g}", system]
    if not mine:
        reason = failed.get(f"{system}, {size.viewers:,} x {size.rate:g}/s", NOTHING)
        return [*start, reason, *[NOTHING] * (len(HEADERS) - 4)]
    micros = {run.round: run.micros for run in mine if run.micros is not None}
    ours = {run.round: run.micros for run in of_size if run.system == SYSTEMS[0].name and run.micros}
    cores = [run.cpu / run.seconds for run in mine if run.cpu is not None]
    return [
        *start,
        summary([run.delivered for run in mine]),
        summary(list(micros.values())),
        NOTHING if system == SYSTEMS[0].name else ratio(median_ratio(micros, ours)),
        percent(sum(cores) / len(cores)) if cores else NOTHING,
        summary([run.delays["p50"] for run in mine]),
        summary([run.delays["p99"] for run in mine]),
        summary([run.received / run.tokens for run in mine]),
        summary([run.reads / run.viewers / run.seconds for run in mine]),
        summary([run.memory / 1024 for run in mine if run.memory is not None]),
        percent(sum(run.crowd_cpu / run.seconds for run in mine) / len(mine)),
    ]


def _rate_chart(options: argparse.Namespace, runs: Sequence[Run]) -> Chart:
    """CPU of the serving process against the rate, at the first number of viewers."""
    few = [run for run in runs if run.viewers == options.fan_viewers]
    title = f"{options.fan_viewers:,} viewers of one text"
    return Chart(
        "fanout",
        title,
        "tokens/s offered to all viewers",
        CORES,
        _lines(few, lambda run: run.viewers * run.rate),
    )


def _viewer_chart(options: argparse.Namespace, runs: Sequence[Run]) -> Chart:
    """CPU of the serving process against the viewers, at the first rate."""
    slow = [run for run in runs if run.rate == options.fan_rates[0]]
    title = f"A text of {options.fan_rates[0]:g} tokens/s"
    return Chart("fanout-viewers", title, "viewers", CORES, _lines(slow, lambda run: run.viewers))


def _lines(runs: Sequence[Run], x: Callable[[Run], float]) -> list[Line]:
    """For each system the cores that it used, the mean of the rounds."""
    lines: list[Line] = []
    for system in SYSTEMS:
        points: dict[float, list[float]] = {}
        for run in runs:
            if run.system == system.name and run.cpu is not None:
                points.setdefault(x(run), []).append(run.cpu / run.seconds)
        lines.append(Line(system.name, [(at, sum(of) / len(of)) for at, of in sorted(points.items())]))
    return lines


# --- its options


def _rates(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("fanout")
    group.add_argument("--fan-viewers", type=int, default=1000, help="viewers (1,000)")
    group.add_argument("--fan-rates", type=_rates, default=[20.0, 100.0, 400.0], help="tokens/s (20,100,400)")
    group.add_argument(
        "--fan-crowd", type=int, default=5000, help="viewers at the first rate, as well (5,000); 0: none"
    )
    group.add_argument("--fan-seconds", type=float, default=10.0, help="length of the text (10)")


def quicken(options: argparse.Namespace) -> None:
    options.fan_viewers = min(options.fan_viewers, 50)
    options.fan_crowd = 0
    options.fan_rates = options.fan_rates[:1]
    options.fan_seconds = min(options.fan_seconds, 1.0)


def steps(options: argparse.Namespace) -> int:
    return options.repeat * len(sizes(options)) * len(SYSTEMS)


SCENARIO = Scenario("fanout", "one text to many viewers", add_options, quicken, steps, run)
