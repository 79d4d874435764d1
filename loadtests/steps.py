"""Steps: workflows of ten recorded steps each, through one worker process; streamjobs beside its peers.

A round of a system has two parts, on one store and one worker that have warmed up. *Drain*: the worker is
frozen, all workflows are submitted, it is thawed, and the clock runs until the system's own record of the
last end. *Half load*: workflows arrive at half of the rate that was just drained, each at its time whatever
has become of the ones before it; latencies count from the call that submits.

Started is when the workflow's own code begins, as it marks itself; done is what the system has recorded.
All clocks are this machine's.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from loadtests.bench import Bench, Scenario
from loadtests.marks import VARIABLE, Marks
from loadtests.measure import CpuClock, median_ratio, percentile
from loadtests.pacing import Plan, Submitted
from loadtests.peers.dbos_steps import DbosSteps
from loadtests.peers.restate_steps import RestateSteps
from loadtests.processes import Child, RunError, run_to_end, running
from loadtests.report import NOTHING, Section, Table, ratio, summary
from loadtests.step_system import STEPS, Outcome, Site, StepSystem
from loadtests.streamjobs_steps import StreamjobsSteps

POLL_INTERVAL = 0.01
START_TIMEOUT = 30.0
SLOWEST = 5.0
"""Workflows a second below which a part is given up."""
RECORD_TIMEOUT = 10.0
"""How long the last outcomes may take to be found after the last workflow's code has ended."""
FEWEST, MOST = 20, 5_000
"""Workflows at half load."""

OURS = StreamjobsSteps()
SYSTEMS: tuple[StepSystem, ...] = (OURS, DbosSteps(), RestateSteps())


@dataclass(frozen=True)
class Drain:
    """What was seen while a worker ran all that waited; CPU in seconds, None where it is not measured."""

    workflows: int
    seconds: float
    worker_cpu: float | None
    store_cpu: float | None

    def __add__(self, other: Drain) -> Drain:
        return Drain(
            self.workflows + other.workflows,
            self.seconds + other.seconds,
            _both(self.worker_cpu, other.worker_cpu),
            _both(self.store_cpu, other.store_cpu),
        )

    @property
    def rate(self) -> float:
        """Steps a second."""
        return STEPS * self.workflows / self.seconds

    @property
    def per_core_second(self) -> float | None:
        """Steps for a second of CPU, worker's and store's together; None where it is not measured."""
        used = _both(self.worker_cpu, self.store_cpu)
        return STEPS * self.workflows / used if used else None


def _both(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other


@dataclass(frozen=True)
class HalfLoad:
    """Latencies in seconds, by `p50` and `p99`, at a rate of workflows a second."""

    workflows: int
    rate: float
    started: dict[str, float]
    done: dict[str, float]


@dataclass(frozen=True)
class Run:
    """One round of one system."""

    system: str
    round: int
    drain: Drain
    half: HalfLoad


# --- one measurement


@dataclass
class Lab:
    """A running system: its store, its worker, and the marks of what the worker has run."""

    system: StepSystem
    site: Site
    worker: Child
    env: dict[str, str]
    marks: Marks
    bench: Bench
    _next: int = 0

    def drain(self, count: int) -> Drain:
        """Run workflows that all wait when the worker begins."""
        plan = self._plan(count, 0.0)
        self.worker.freeze()
        try:
            submitted = self._submit(plan)
            clocks = CpuClock(self.worker.pid), CpuClock(self.site.store.pid)
            before = [clock.seconds() for clock in clocks]
            thawed = time.time()
        finally:
            self.worker.thaw()
        self._wait_for_code(plan)
        used = [_difference(clock.seconds(), then) for clock, then in zip(clocks, before, strict=True)]
        outcomes = self._outcomes(submitted)
        seconds = max(outcome.ended for outcome in outcomes) - thawed
        return Drain(count, max(seconds, 0.001), used[0], used[1])

    def half_load(self, rate: float, count: int) -> HalfLoad:
        """Run workflows as they arrive, `rate` a second."""
        plan = self._plan(count, rate)
        submitted = self._submit(plan)
        self._wait_for_code(plan)
        outcomes = self._outcomes(submitted)
        begun = [self.marks.begun[plan.first + index] for index in range(count)]
        started = [then - at for then, at in zip(begun, submitted.at, strict=True)]
        done = [outcome.ended - at for outcome, at in zip(outcomes, submitted.at, strict=True)]
        return HalfLoad(count, rate, quantiles(started), quantiles(done))

    def _plan(self, count: int, rate: float) -> Plan:
        plan = Plan(self._next, count, rate)
        self._next += count
        return plan

    def _submit(self, plan: Plan) -> Submitted:
        timeout = START_TIMEOUT + plan.count / SLOWEST
        name = f"{self.system.name} submit"
        return Submitted(**run_to_end(name, self.system.submit_command(plan), self.env, timeout=timeout))

    def _wait_for_code(self, plan: Plan) -> None:
        """Wait until the code of every workflow has ended; raise `RunError` when that does not happen."""
        deadline = time.monotonic() + START_TIMEOUT + plan.count / SLOWEST
        total = plan.first + plan.count
        while (ended := len(self.marks.read().ended)) < total:
            self.worker.require_alive()
            if time.monotonic() > deadline:
                raise RunError(f"{ended:,} of {total:,} workflows ran, then no more: {self.worker.tail()}")
            self.bench.progress.tick(f"{ended:,} of {total:,} workflows run")
            time.sleep(POLL_INTERVAL)

    def _outcomes(self, submitted: Submitted) -> list[Outcome]:
        """Return what the system has recorded of each; raise `RunError` unless all is there."""
        deadline = time.monotonic() + RECORD_TIMEOUT
        while True:
            found = self.system.outcomes(self.site, submitted.ids)
            whole = [name for name in submitted.ids if name in found and found[name].steps == STEPS]
            if len(whole) == len(submitted.ids):
                return [found[name] for name in submitted.ids]
            if time.monotonic() > deadline:
                raise RunError(
                    f"only {len(whole):,} of {len(submitted.ids):,} workflows are recorded with their "
                    f"{STEPS} steps: {self.worker.tail()}"
                )
            time.sleep(0.1)


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Return `p50` and `p99`; empty for no values."""
    found = {"p50": percentile(values, 0.5), "p99": percentile(values, 0.99)}
    return {name: value for name, value in found.items() if value is not None}


def _difference(now: float | None, then: float | None) -> float | None:
    return None if now is None or then is None else now - then


@contextlib.contextmanager
def laboratory(system: StepSystem, bench: Bench) -> Iterator[Lab]:
    """Run a system's store and worker while the block lasts, ready to be submitted to."""
    with tempfile.TemporaryDirectory(prefix="loadtests-") as folder, system.opened(bench) as site:
        file = Path(folder) / "marks"
        env = system.env(site) | {VARIABLE: str(file)}
        with running(f"{system.name} worker", system.worker_command(), env) as worker:
            system.get_ready(site, worker)
            yield Lab(system, site, worker, env, Marks(file), bench)


def measure(system: StepSystem, number: int, bench: Bench) -> Run:
    """Run one system once, on a store and a worker of its own."""
    options = bench.options
    bench.sample_noise()
    with laboratory(system, bench) as lab:
        lab.half_load(options.steps_warmup, options.steps_warmup)
        lab.drain(options.steps_warmup)
        drain = lab.drain(options.workflows)
        while drain.seconds < options.drain_seconds:
            drain += lab.drain(options.workflows)
        rate = drain.rate / STEPS / 2
        count = min(MOST, max(FEWEST, round(rate * options.half_seconds)))
        half = lab.half_load(rate, count)
        if "Traceback" in lab.worker.output():
            raise RunError(f"the worker printed a traceback: {lab.worker.tail()}")
    bench.sample_noise()
    return Run(system.name, number, drain, half)


# --- all of them


def run(bench: Bench) -> Section:
    """Measure every chosen system `repeat` times, interleaved."""
    systems = [system for system in SYSTEMS if _chosen(system, bench.options)]
    absent: dict[str, str] = {}
    for system in systems:
        bench.progress.say(f"steps: looking for {system.name}, and installing it the first time")
        why = system.prepare()
        if why is not None:
            absent[system.name] = f"not run: {why}"
    runs: list[Run] = []
    failed: dict[str, str] = {}
    for number in range(1, bench.options.repeat + 1):
        for system in systems:
            bench.progress.step(f"steps, round {number}: {system.name}")
            if system.name in absent:
                bench.progress.say(f"    {absent[system.name]}")
                continue
            try:
                runs.append(measure(system, number, bench))
            except RunError as error:
                failed[system.name] = f"failed: {error}"
                bench.progress.say(f"    {failed[system.name]}")
            else:
                bench.progress.say(f"    {_spoken(runs[-1])}")
    return section(bench.options, systems, runs, absent | failed, failed)


def _chosen(system: StepSystem, options: argparse.Namespace) -> bool:
    wanted = [name.strip().lower() for name in options.systems.split(",") if name.strip()]
    return not wanted or any(name in system.name.lower() for name in wanted)


def _spoken(run: Run) -> str:
    started = 1000 * run.half.started["p99"]
    return f"{run.drain.rate:,.0f} steps/s; at half of it started within {started:,.1f} ms (p99)"


# --- its part of the report


DRAIN_HEADERS = (
    "system", "steps/s", "streamjobs / it", "worker CPU µs/step", "store CPU µs/step",
    "steps for a core-second", "streamjobs / it, for a core-second",
)  # fmt: skip
HALF_HEADERS = (
    "system", "offered workflows/s", "submit to started, p50 ms", "p99 ms", "submit to done, p50 ms",
    "p99 ms",
)  # fmt: skip
SETUP_HEADERS = ("system", "store", "version", "set up")


def section(
    options: argparse.Namespace,
    systems: Sequence[StepSystem],
    runs: Sequence[Run],
    reasons: dict[str, str],
    failed: dict[str, str],
) -> Section:
    """Lay out the section; a system without numbers keeps its row, with the reason."""
    by_name = {system.name: [r for r in runs if r.system == system.name] for system in systems}
    drains = [_drain_row(name, by_name, reasons) for name in by_name]
    halves = [_half_row(name, by_name[name], reasons) for name in by_name]
    setups = [_setup_row(system, reasons) for system in systems]
    return Section(
        title="Steps: workflows of ten recorded steps through one worker process",
        intro=f"Workflows of {STEPS} steps, one after another, each a no-op whose result is recorded before "
        f"the next step begins. First {options.workflows:,} at once, drained by a worker that was frozen "
        f"while they were submitted, again until {options.drain_seconds:g} s of draining are measured; then "
        f"arriving for about {options.half_seconds:g} s at half of the rate of that drain. Interleaved "
        f"rounds: {options.repeat}; median (minimum-maximum). CPU is user + system of the worker's and the "
        "store's processes during the drains; a core-second is a second of both together. The ratios are the "
        "medians of the rounds' ratios. No store waits for a disk.",
        tables=[
            Table(DRAIN_HEADERS, drains),
            Table(HALF_HEADERS, halves),
            Table(SETUP_HEADERS, setups),
        ],
        notes=[f"{name}: {why}" for name, why in reasons.items()],
        data={"workflows": options.workflows, "runs": [_plain(r) for r in runs], "reasons": reasons},
        failures=[f"steps, {name}: {why}" for name, why in failed.items()],
    )


def _plain(run: Run) -> dict[str, object]:
    return asdict(run) | {"steps_per_second": run.drain.rate}


def _drain_row(name: str, by_name: dict[str, list[Run]], reasons: dict[str, str]) -> list[str]:
    runs = by_name[name]
    if not runs:
        return [name, reasons.get(name, NOTHING), *[NOTHING] * 5]
    rates = {key: {r.round: r.drain.rate for r in of} for key, of in by_name.items()}
    cores = {
        key: {r.round: core for r in of if (core := r.drain.per_core_second) is not None}
        for key, of in by_name.items()
    }
    is_other = name != OURS.name
    return [
        name,
        summary([r.drain.rate for r in runs]),
        ratio(median_ratio(rates.get(OURS.name, {}), rates[name])) if is_other else NOTHING,
        summary(_micros(runs, "worker_cpu")),
        summary(_micros(runs, "store_cpu")),
        summary(list(cores[name].values())),
        ratio(median_ratio(cores.get(OURS.name, {}), cores[name])) if is_other else NOTHING,
    ]


def _micros(runs: Sequence[Run], field: str) -> list[float]:
    used = [(getattr(r.drain, field), STEPS * r.drain.workflows) for r in runs]
    return [1e6 * seconds / steps for seconds, steps in used if seconds is not None]


def _half_row(name: str, runs: Sequence[Run], reasons: dict[str, str]) -> list[str]:
    if not runs:
        return [name, reasons.get(name, NOTHING), *[NOTHING] * 4]
    cells = [
        summary([1000 * latencies[share] for latencies in found])
        for found in ([r.half.started for r in runs], [r.half.done for r in runs])
        for share in ("p50", "p99")
    ]
    return [name, summary([r.half.rate for r in runs]), *cells]


def _setup_row(system: StepSystem, reasons: dict[str, str]) -> list[str]:
    version = NOTHING if reasons.get(system.name, "").startswith("not run") else system.version()
    return [system.name, system.store, version, system.tuning]


# --- its options


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("steps")
    group.add_argument("--workflows", type=int, default=500, help="drained workflows of ten steps (500)")
    group.add_argument("--steps-warmup", type=int, default=100, help="workflows run twice before that (100)")
    group.add_argument("--drain-seconds", type=float, default=2.0, help="drains go on until then (2)")
    group.add_argument("--half-seconds", type=float, default=6.0, help="how long half load lasts, about (6)")
    group.add_argument(
        "--systems", default="", help="only systems with one of these in the name, comma separated"
    )


def quicken(options: argparse.Namespace) -> None:
    options.workflows = min(options.workflows, 60)
    options.steps_warmup = min(options.steps_warmup, 20)
    options.drain_seconds = 0.0
    options.half_seconds = min(options.half_seconds, 1.5)


def steps(options: argparse.Namespace) -> int:
    return options.repeat * sum(_chosen(system, options) for system in SYSTEMS)


SCENARIO = Scenario("steps", "workflows of recorded steps", add_options, quicken, steps, run)
