"""Tokens: many provider streams into the log through one worker process; beside it the usual way.

Three modes. *paced*: streams at the rate of a model, where CPU per token is the figure. *crowded*: twice as
many of them, where it shows who keeps up. *flat out*: the provider sends as fast as it is read, many
tokens a write, which measures parsing and coalescing more than committing.

A measurement ends when every stream has ended. What was committed is then read back from Redis and
counted: a system that lost a token has failed. The clock runs from the first token in the logs until the
poll that sees the last stream ended, by the clock of Redis; CPU is counted from just before the streams
start until then.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from loadtests.bench import Bench, Scenario
from loadtests.latency import LatencyProbe
from loadtests.measure import CpuClock, median_ratio
from loadtests.processes import Child, RunError, running
from loadtests.provider import running_provider
from loadtests.redis_server import Server, fresh_server
from loadtests.report import NOTHING, Section, Table, percent, ratio, summary
from loadtests.token_systems import SYSTEMS, Load, StreamjobsChat, TokenSystem, Transcript

POLL_INTERVAL = 0.02
START_TIMEOUT = 30.0
SLOWEST = 800.0
"""Tokens a second below which a measurement is given up."""


@dataclass(frozen=True)
class Mode:
    """How the provider sends: `rate` in tokens a second for each stream, 0 for as fast as it is read."""

    name: str
    streams: int
    rate: float
    tokens: int

    @property
    def nominal(self) -> float:
        """Seconds from a stream's first token to its last one, 0 without a rate."""
        return (self.tokens - 1) / self.rate if self.rate else 0.0


@dataclass(frozen=True)
class Run:
    """One round of one system in one mode; CPU in seconds, None where it is not measured."""

    system: str
    mode: str
    round: int
    nominal: float
    transcript: Transcript
    seconds: float
    """From the first token to the end of the last stream."""
    span: float
    """What `cpu` is counted over: from before the first stream began."""
    cpu: dict[str, float | None]
    kept_bytes: float
    delay: dict[str, float]
    """Seconds from a token's arrival at the worker to a subscriber (`p50`, `p99`), where it is known."""

    @property
    def rate(self) -> float:
        return self.transcript.tokens / self.seconds

    @property
    def behind(self) -> float | None:
        """Seconds that the last token came later than its stream's rate says; None without a rate."""
        return max(0.0, self.seconds - self.nominal) if self.nominal else None


def modes(options: argparse.Namespace) -> list[Mode]:
    tokens = round(options.rate * options.seconds)
    return [
        Mode("paced", options.streams, options.rate, tokens),
        Mode("crowded", 2 * options.streams, options.rate, tokens),
        Mode("flat out", options.streams, 0.0, options.flat_tokens),
    ]


# --- one measurement


def measure(system: TokenSystem, mode: Mode, number_of_round: int, bench: Bench) -> Run:
    """Run one system once, on a server and a provider of its own."""
    bench.sample_noise()
    load = Load(mode.streams, mode.tokens)
    with running_provider(mode.rate, mode.tokens) as provider, fresh_server(bench.binary) as server:
        env = system.env(server.url, provider)
        with running(f"{system.name} worker", system.worker_command(load), env) as worker:
            system.warm_up(server, worker, env)
            empty = server.used_memory()
            processes = {"worker": worker, "redis": server.child, "provider": provider.child}
            clocks = {name: CpuClock(child.pid) for name, child in processes.items()}
            before = {name: clock.seconds() for name, clock in clocks.items()}
            started = time.perf_counter()
            system.begin(server, load, env)
            with LatencyProbe(server.url, system.live_channels()) as probe:
                wait_for_end(system, server, worker, mode, bench)
            ended_ms, span = server.now_ms(), time.perf_counter() - started
            cpu = {name: _difference(clock.seconds(), before[name]) for name, clock in clocks.items()}
            kept = (server.used_memory() - empty) / load.total
            transcript = system.read(server.client)
    bench.sample_noise()
    if transcript.tokens != load.total:
        raise RunError(f"{transcript.tokens:,} of {load.total:,} tokens are in the logs")
    seconds = max(0.001, (ended_ms - transcript.first_ms) / 1000)
    return Run(
        system.name,
        mode.name,
        number_of_round,
        mode.nominal,
        transcript,
        seconds,
        span,
        cpu,
        kept,
        probe.quantiles(),
    )


def wait_for_end(system: TokenSystem, server: Server, worker: Child, mode: Mode, bench: Bench) -> None:
    """Wait until every stream has ended; raise `RunError` when the worker dies or is far too slow."""
    load = Load(mode.streams, mode.tokens)
    started = time.monotonic()
    deadline = started + START_TIMEOUT + mode.nominal + load.total / SLOWEST
    while (ended := system.ended(server.client, load)) < load.streams:
        worker.require_alive()
        now = time.monotonic()
        if now > deadline:
            raise RunError(f"{ended} of {load.streams} streams ended in time: {worker.tail()}")
        bench.progress.tick(f"{now - started:.0f} s, {ended} of {load.streams} streams ended")
        time.sleep(POLL_INTERVAL)


def _difference(now: float | None, then: float | None) -> float | None:
    return None if now is None or then is None else now - then


# --- all of them


def run(bench: Bench) -> Section:
    """Measure both systems in both modes `repeat` times, interleaved."""
    runs: list[Run] = []
    failed: dict[str, str] = {}
    for number_of_round in range(1, bench.options.repeat + 1):
        for mode in modes(bench.options):
            for system in SYSTEMS:
                bench.progress.step(f"tokens, round {number_of_round}, {mode.name}: {system.name}")
                try:
                    runs.append(measure(system, mode, number_of_round, bench))
                except RunError as error:
                    failed[f"{system.name}, {mode.name}"] = f"failed: {error}"
                    bench.progress.say(f"    failed: {error}")
                else:
                    bench.progress.say(f"    {_spoken(runs[-1])}")
    return section(bench.options, runs, failed)


def _spoken(run: Run) -> str:
    worker = _micros([run], "worker")
    cost = f", {worker[0]:.1f} µs CPU a token" if worker else ""
    return f"{run.rate:,.0f} tokens/s{cost}"


# --- its part of the report


HEADERS = (
    "mode", "system", "tokens/s", "s behind at the end", "worker CPU µs/token", "worker CPU: it / streamjobs",
    "redis CPU µs/token", "busy: worker, redis, provider", "tokens/s for a worker core",
)  # fmt: skip
KEPT_HEADERS = (
    "mode",
    "system",
    "tokens per log entry",
    "Redis bytes/token",
    "arrival to subscriber, p50 and p99 ms",
)


def section(options: argparse.Namespace, runs: Sequence[Run], failed: dict[str, str]) -> Section:
    """Lay out the section; a system without numbers keeps its row, with the reason."""
    rows, kept = [], []
    for mode in modes(options):
        of_mode = [r for r in runs if r.mode == mode.name]
        for system in SYSTEMS:
            reason = failed.get(f"{system.name}, {mode.name}", NOTHING)
            rows.append(_row(mode, system.name, of_mode, reason))
            kept.append(_kept_row(mode, system.name, [r for r in of_mode if r.system == system.name]))
    paced, crowded, flat = modes(options)
    return Section(
        title="Tokens: provider streams through one worker process into the log",
        intro=f"Paced: {paced.streams} streams of {paced.rate:g} tokens/s for {options.seconds:g} s "
        f"({paced.streams * paced.rate:,.0f} tokens/s offered); crowded: {crowded.streams} of them "
        f"({crowded.streams * crowded.rate:,.0f} offered); flat out: {flat.streams} streams of "
        f"{flat.tokens:,} tokens as fast as they are read, many tokens a write. Interleaved "
        f"rounds: {options.repeat}; median (minimum-maximum). The last column of the first table is 1 s "
        "divided by the worker's CPU time for a token.",
        tables=[Table(HEADERS, rows), Table(KEPT_HEADERS, kept)],
        notes=[f"{system.name}: {system.described}" for system in SYSTEMS]
        + [f"{name}: {why}" for name, why in failed.items()],
        data={"modes": [asdict(m) for m in modes(options)], "runs": _plain(runs)},
        failures=[f"tokens, {name}: {why}" for name, why in failed.items()],
    )


def _plain(runs: Sequence[Run]) -> list[dict[str, object]]:
    return [asdict(r) | {"tokens_per_second": r.rate} for r in runs]


def _row(mode: Mode, system: str, of_mode: Sequence[Run], reason: str) -> list[str]:
    runs = [r for r in of_mode if r.system == system]
    if not runs:
        return [mode.name, system, reason, *[NOTHING] * 6]
    worker = _micros(runs, "worker")
    return [
        mode.name,
        system,
        summary([r.rate for r in runs]),
        summary([r.behind for r in runs if r.behind is not None]),
        summary(worker),
        NOTHING if system == StreamjobsChat.name else ratio(_cpu_ratio(of_mode, system)),
        summary(_micros(runs, "redis")),
        ", ".join(_share(runs, name) for name in ("worker", "redis", "provider")),
        summary([1e6 / micros for micros in worker if micros > 0]),
    ]


def _cpu_ratio(of_mode: Sequence[Run], system: str) -> float | None:
    costs: dict[str, dict[int, float]] = {system: {}, StreamjobsChat.name: {}}
    for r in of_mode:
        for micros in _micros([r], "worker"):
            costs[r.system][r.round] = micros
    return median_ratio(costs[system], costs[StreamjobsChat.name])


def _micros(runs: Sequence[Run], process: str) -> list[float]:
    used = [(r.cpu[process], r.transcript.tokens) for r in runs]
    return [1e6 * seconds / tokens for seconds, tokens in used if seconds is not None]


def _share(runs: Sequence[Run], process: str) -> str:
    used = [r.cpu[process] for r in runs]
    known = [seconds for seconds in used if seconds is not None]
    if len(known) < len(used):
        return NOTHING
    return percent(sum(known) / sum(r.span for r in runs))


def _kept_row(mode: Mode, system: str, runs: Sequence[Run]) -> list[str]:
    if not runs:
        return [mode.name, system, *[NOTHING] * 3]
    entries = [r.transcript.tokens / r.transcript.entries for r in runs]
    return [mode.name, system, summary(entries), summary([r.kept_bytes for r in runs]), _latency(runs)]


def _latency(runs: Sequence[Run]) -> str:
    cells = [summary([1000 * r.delay[name] for r in runs if name in r.delay]) for name in ("p50", "p99")]
    return NOTHING if cells == [NOTHING, NOTHING] else ", ".join(cells)


# --- its options


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("tokens")
    group.add_argument("--streams", type=int, default=200, help="provider streams at once (200)")
    group.add_argument("--rate", type=float, default=50.0, help="tokens/s of a paced stream (50)")
    group.add_argument("--seconds", type=float, default=15.0, help="length of a paced stream (15)")
    group.add_argument(
        "--flat-tokens", type=int, default=400, help="tokens of a stream that is flat out (400)"
    )


def quicken(options: argparse.Namespace) -> None:
    options.streams = min(options.streams, 50)
    options.seconds = min(options.seconds, 1.0)
    options.flat_tokens = min(options.flat_tokens, 200)


def steps(options: argparse.Namespace) -> int:
    return options.repeat * len(modes(options)) * len(SYSTEMS)


SCENARIO = Scenario("tokens", "provider streams into the log", add_options, quicken, steps, run)
