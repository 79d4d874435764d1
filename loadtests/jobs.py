"""Jobs: pre-enqueued no-op jobs, drained by one worker process; streamjobs beside its peers.

Each queue gets `warmup + jobs` jobs and then its worker. The clock runs from the poll that sees the
warm-up done to the poll that sees everything done: starting a process, connecting and warming up are
not in it, for nobody. Rounds are interleaved (A B C D A B C D), so that noise hits all alike.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import redis

from loadtests.bench import Bench, Scenario
from loadtests.measure import CpuClock, median_ratio
from loadtests.peers.bullmq import BullMQ
from loadtests.peers.peer import Peer
from loadtests.peers.python_queues import Saq, TaskiqStreams
from loadtests.processes import Child, RunError, run_to_end, running
from loadtests.redis_server import Server, fresh_server
from loadtests.report import NOTHING, Section, Table, percent, ratio, summary
from loadtests.streamjobs_peer import Streamjobs

POLL_INTERVAL = 0.005
START_TIMEOUT = 30.0
SLOWEST = 150.0
"""Jobs a second below which a drain is given up."""
STALL_TIMEOUT = 15.0

OURS = Streamjobs()
PEERS: tuple[Peer, ...] = (OURS, BullMQ(), TaskiqStreams(), Saq())


@dataclass(frozen=True)
class Drain:
    """What was seen while a worker emptied its queue; CPU in seconds, None where it is not measured."""

    jobs: int
    seconds: float
    worker_cpu: float | None
    redis_cpu: float | None

    @property
    def rate(self) -> float:
        return self.jobs / self.seconds


@dataclass(frozen=True)
class Run:
    """One round of one queue."""

    peer: str
    round: int
    drain: Drain
    enqueue_rate: float
    kept_bytes: float
    """Redis memory that a finished job leaves behind."""


# --- one measurement


class Watch:
    """Polls a count of finished jobs and keeps the samples at the ends of the measured window."""

    def __init__(self, worker: Child, server: Server, warmup: int, total: int) -> None:
        self._worker = worker
        self._server = server
        self._warmup = warmup
        self._total = total

    def drain(self, peer: Peer, bench: Bench) -> Drain:
        """Wait for the last job; raise `RunError` when the worker dies, stalls or is far too slow."""
        begun = self._wait_for(self._warmup, peer, START_TIMEOUT + self._warmup / SLOWEST, bench)
        clocks = CpuClock(self._worker.pid), CpuClock(self._server.child.pid)
        before = [clock.seconds() for clock in clocks]
        started, first = time.perf_counter(), self._done(peer)
        if first >= self._total:
            raise RunError("all jobs were done before the clock started: give it more --jobs")
        timeout = START_TIMEOUT + (self._total - begun) / SLOWEST
        self._wait_for(self._total, peer, timeout, bench)
        seconds = time.perf_counter() - started
        worker, server = (
            _difference(clock.seconds(), then) for clock, then in zip(clocks, before, strict=True)
        )
        return Drain(self._total - first, seconds, worker, server)

    def _wait_for(self, wanted: int, peer: Peer, timeout: float, bench: Bench) -> int:
        deadline = time.monotonic() + timeout
        best, moved = 0, time.monotonic()
        while (done := self._done(peer)) < wanted:
            now = time.monotonic()
            self._worker.require_alive()
            if done > best:
                best, moved = done, now
            if now > deadline or now - moved > max(STALL_TIMEOUT, START_TIMEOUT if best == 0 else 0):
                raise RunError(f"{done:,} of {self._total:,} jobs done, then no more: {self._worker.tail()}")
            bench.progress.tick(f"{done:,} of {self._total:,} jobs done")
            time.sleep(POLL_INTERVAL)
        return done

    def _done(self, peer: Peer) -> int:
        try:
            return peer.done(self._server.client, self._total)
        except redis.ResponseError:
            return 0  # the worker has not made its keys yet


def _difference(now: float | None, then: float | None) -> float | None:
    return None if now is None or then is None else now - then


def measure(peer: Peer, number: int, bench: Bench) -> Run:
    """Run one queue once on a server of its own."""
    jobs, warmup = bench.options.jobs, bench.options.warmup
    bench.sample_noise()
    with fresh_server(bench.binary) as server:
        env = peer.env(server.url)
        empty = server.used_memory()
        timeout = START_TIMEOUT + (jobs + warmup) / SLOWEST
        added = run_to_end(f"{peer.name} enqueue", peer.enqueue_command(warmup, jobs), env, timeout=timeout)
        with running(f"{peer.name} worker", peer.worker_command(), env) as worker:
            drain = Watch(worker, server, warmup, warmup + jobs).drain(peer, bench)
            kept = (server.used_memory() - empty) / (warmup + jobs)
            require_success(peer, server, worker, warmup + jobs)
    bench.sample_noise()
    return Run(peer.name, number, drain, added["jobs"] / added["seconds"], kept)


def require_success(peer: Peer, server: Server, worker: Child, total: int) -> None:
    """Raise `RunError` unless every job is recorded as a success and the worker printed no traceback."""
    succeeded = peer.succeeded(server.client, total)
    if succeeded != total or "Traceback" in worker.output():
        raise RunError(f"only {succeeded:,} of {total:,} jobs succeeded: {worker.tail()}")


# --- all of them


def run(bench: Bench) -> Section:
    """Measure every chosen queue `repeat` times, interleaved."""
    peers = [peer for peer in PEERS if _chosen(peer, bench.options)]
    absent: dict[str, str] = {}
    for peer in peers:
        why = peer.prepare()
        if why is not None:
            absent[peer.name] = f"not run: {why}"
    runs: list[Run] = []
    failed: dict[str, str] = {}
    for number in range(1, bench.options.repeat + 1):
        for peer in peers:
            bench.progress.step(f"jobs, round {number}: {peer.name}")
            if peer.name in absent:
                bench.progress.say(f"    {absent[peer.name]}")
                continue
            try:
                runs.append(measure(peer, number, bench))
            except RunError as error:
                failed[peer.name] = f"failed: {error}"
                bench.progress.say(f"    {failed[peer.name]}")
            else:
                bench.progress.say(f"    {_spoken(runs[-1])}")
    return section(bench.options, peers, runs, absent | failed, failed)


def _chosen(peer: Peer, options: argparse.Namespace) -> bool:
    wanted = [name.strip().lower() for name in options.peers.split(",") if name.strip()]
    return not wanted or any(name in peer.name.lower() for name in wanted)


def _spoken(run: Run) -> str:
    return f"{run.drain.rate:,.0f} jobs/s, enqueued at {run.enqueue_rate:,.0f}/s"


# --- its part of the report


def section(
    options: argparse.Namespace,
    peers: Sequence[Peer],
    runs: Sequence[Run],
    reasons: dict[str, str],
    failed: dict[str, str],
) -> Section:
    """Lay out the section; a peer without numbers keeps its row, with the reason."""
    rates = {peer.name: {r.round: r.drain.rate for r in runs if r.peer == peer.name} for peer in peers}
    rows = [_row(peer, [r for r in runs if r.peer == peer.name], rates, reasons) for peer in peers]
    kept = [_kept_row(peer, [r for r in runs if r.peer == peer.name], reasons) for peer in peers]
    return Section(
        title="Jobs: no-ops through one worker process",
        intro=f"{options.jobs:,} jobs enqueued first, after {options.warmup:,} uncounted ones to warm up. "
        f"Interleaved rounds: {options.repeat}; median (minimum-maximum). CPU is user + system of the "
        "worker's processes and of redis-server while the worker drains. The ratio is the median of the "
        "rounds' ratios.",
        tables=[Table(HEADERS, rows), Table(KEPT_HEADERS, kept)],
        notes=[f"{name}: {why}" for name, why in reasons.items()],
        data={
            "jobs": options.jobs,
            "warmup": options.warmup,
            "runs": [asdict(r) for r in runs],
            "reasons": reasons,
        },
        failures=[f"jobs, {name}: {why}" for name, why in failed.items()],
    )


HEADERS = (
    "queue", "jobs/s", "streamjobs / it", "worker CPU µs/job", "redis CPU µs/job", "busy: worker, redis",
    "enqueue/s",
)  # fmt: skip
KEPT_HEADERS = ("queue", "version", "set up", "kept of a finished job", "Redis bytes/job")


def _row(
    peer: Peer, runs: Sequence[Run], rates: dict[str, dict[int, float]], reasons: dict[str, str]
) -> list[str]:
    if not runs:
        return [peer.name, reasons.get(peer.name, NOTHING), *[NOTHING] * 5]
    ours = rates.get(OURS.name, {})
    busy = [_share(runs, "worker_cpu"), _share(runs, "redis_cpu")]
    return [
        peer.name,
        summary([r.drain.rate for r in runs]),
        ratio(median_ratio(ours, rates[peer.name])) if peer is not OURS else NOTHING,
        summary(_micros(runs, "worker_cpu")),
        summary(_micros(runs, "redis_cpu")),
        ", ".join(busy),
        summary([r.enqueue_rate for r in runs]),
    ]


def _micros(runs: Sequence[Run], field: str) -> list[float]:
    used = [(getattr(r.drain, field), r.drain.jobs) for r in runs]
    return [1e6 * seconds / jobs for seconds, jobs in used if seconds is not None]


def _share(runs: Sequence[Run], field: str) -> str:
    """Say which part of a core was busy, over all rounds."""
    used = [getattr(r.drain, field) for r in runs]
    if any(seconds is None for seconds in used):
        return NOTHING
    return percent(sum(used) / sum(r.drain.seconds for r in runs))


def _kept_row(peer: Peer, runs: Sequence[Run], reasons: dict[str, str]) -> list[str]:
    if peer.name in reasons and not runs:
        return [peer.name, *[NOTHING] * 4]
    return [peer.name, peer.version(), peer.tuning, peer.recorded, summary([r.kept_bytes for r in runs])]


# --- its options


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("jobs")
    group.add_argument("--jobs", type=int, default=20_000, help="measured jobs for each queue (20000)")
    group.add_argument(
        "--warmup", type=int, default=2_000, help="jobs drained before the clock starts (2000)"
    )
    group.add_argument(
        "--peers", default="", help="only queues with one of these in the name, comma separated"
    )


def quicken(options: argparse.Namespace) -> None:
    options.jobs = min(options.jobs, 2_000)
    options.warmup = min(options.warmup, 500)


def steps(options: argparse.Namespace) -> int:
    return options.repeat * sum(_chosen(peer, options) for peer in PEERS)


SCENARIO = Scenario("jobs", "no-op jobs through one worker", add_options, quicken, steps, run)
