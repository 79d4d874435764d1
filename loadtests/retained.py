"""Retained: what finished chats leave in Redis, and how fast the projector gets them there.

Chats are written in waves while the projector is frozen; then it is thawed, and timed until it has nothing
left to do. What is kept is what Redis holds more than before, once the feed has been trimmed too. Beside it
the same events in plain streams, their texts alone in plain streams (an entry for each delta), and the texts
compressed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from loadtests.bench import Bench, Scenario
from loadtests.measure import CpuClock
from loadtests.processes import Child, RunError, python, run_to_end, running
from loadtests.redis_server import Server, fresh_server
from loadtests.report import NOTHING, Section, Table, number, ratio, summary
from loadtests.streamjobs_peer import FEED, job_kinds, settings_env

WAVE = 500
WAVE_TIMEOUT = 300.0
SETTLE_TIMEOUT = 300.0
POLL_INTERVAL = 0.01
TRIM_TIMEOUT = 15.0
PLAIN_JOBS = 300
"""Jobs that are also written to plain streams, at most: each takes the same."""
ALL = ("snapshot", "index", "stats")


@dataclass(frozen=True)
class Folding:
    """One wave's way through the projector; CPU in seconds, None where it is not measured."""

    events: int
    seconds: float
    cpu: float | None


@dataclass(frozen=True)
class Kept:
    """Of all jobs: bytes of text, of it compressed, and in Redis; of one job, bytes by kind of key."""

    jobs: int
    text: int
    compressed: int
    held: int
    kinds: dict[str, float]


@dataclass(frozen=True)
class Plain:
    """Bytes of one job in plain streams: the same events, and the texts alone."""

    events: float
    texts: float


@dataclass(frozen=True)
class Run:
    """The whole measurement."""

    kept: Kept
    plain: Plain
    folded: list[Folding]
    snapshots: list[Folding]
    curve: list[dict[str, int]]


# --- what is kept


def measure(bench: Bench) -> Run:
    """Write all waves through all projections; then one wave through the snapshot projection alone."""
    options = bench.options
    with fresh_server(bench.binary) as server, projector(server, ALL) as child:
        warm_up(server, child, options.retained_tokens)
        empty, curve, folded = settled_memory(server, child), list[dict[str, int]](), list[Folding]()
        text = compressed = done = 0
        while done < options.retained_jobs:
            count = min(WAVE, options.retained_jobs - done)
            bench.sample_noise()
            folding, wave, before = one_wave(server, child, done + 1, count, options.retained_tokens)
            folded.append(folding)
            done, text, compressed = done + count, text + wave["text"], compressed + wave["compressed"]
            held = settled_memory(server, child) - empty
            curve.append({"jobs": done, "unsealed": before - empty, "sealed": held})
            bench.progress.tick(f"{done:,} jobs, {held / done:,.0f} bytes each")
        kept = Kept(done, text, compressed, held, job_kinds(server.client))
    return Run(kept, plain(bench), folded, snapshots(bench), curve)


@contextmanager
def projector(server: Server, projections: Sequence[str]) -> Iterator[Child]:
    env = settings_env(server.url, projections=",".join(projections))
    with running("streamjobs projector", python("-m", "streamjobs", "projector"), env) as child:
        yield child


def warm_up(server: Server, child: Child, tokens: int) -> None:
    """Let a few jobs through, so that groups, scripts and buffers are there."""
    write(server, 10**6, 20, tokens)
    wait_until_level(server, child)


def write(server: Server, seed: int, jobs: int, tokens: int) -> dict[str, Any]:
    argv = python("-m", "loadtests.streamjobs_history", "wave", str(seed), str(jobs), str(tokens))
    return run_to_end("streamjobs wave", argv, settings_env(server.url), timeout=WAVE_TIMEOUT)


def one_wave(
    server: Server, child: Child, seed: int, jobs: int, tokens: int
) -> tuple[Folding, dict[str, Any], int]:
    """Write jobs while the projector is frozen, then time it; also returns what was held in between."""
    child.freeze()
    try:
        wave = write(server, seed, jobs, tokens)
        before, clock = server.used_memory(), CpuClock(child.pid)
        used, started = clock.seconds(), time.perf_counter()
    finally:
        child.thaw()
    wait_until_level(server, child)
    seconds, spent = time.perf_counter() - started, clock.seconds()
    cpu = spent - used if spent is not None and used is not None else None
    return Folding(wave["events"], seconds, cpu), wave, before


def wait_until_level(server: Server, child: Child) -> None:
    """Wait until every group has read and acknowledged the whole feed."""
    deadline = time.monotonic() + SETTLE_TIMEOUT
    while not _is_level(server.client):
        child.require_alive()
        if time.monotonic() > deadline:
            raise RunError(f"the projector does not get level: {child.tail()}")
        time.sleep(POLL_INTERVAL)


def _is_level(client: Any) -> bool:
    if not client.exists(FEED):
        return False
    end, groups = client.xinfo_stream(FEED)["last-generated-id"], client.xinfo_groups(FEED)
    return bool(groups) and all(g["last-delivered-id"] == end and not g["pending"] for g in groups)


def settled_memory(server: Server, child: Child) -> int:
    """Return what Redis holds once the feed is trimmed, which is done about once a second."""
    deadline = time.monotonic() + TRIM_TIMEOUT
    client: Any = server.client
    while client.xlen(FEED) > 1:
        child.require_alive()
        if time.monotonic() > deadline:
            raise RunError("the feed is not trimmed")
        time.sleep(POLL_INTERVAL)
    return server.used_memory()


# --- beside it


def plain(bench: Bench) -> Plain:
    """Write jobs to plain streams, without a projector that would seal them."""
    options = bench.options
    jobs = min(PLAIN_JOBS, options.retained_jobs)
    with fresh_server(bench.binary) as server:
        write(server, 1, jobs, options.retained_tokens)
        argv = python("-m", "loadtests.streamjobs_history", "plain")
        sizes = run_to_end("plain streams", argv, settings_env(server.url), timeout=WAVE_TIMEOUT)
    return Plain(sizes["events"] / jobs, sizes["texts"] / jobs)


def snapshots(bench: Bench) -> list[Folding]:
    """Time the projection that folds and seals, by itself, on up to two waves."""
    options = bench.options
    with fresh_server(bench.binary) as server, projector(server, ALL[:1]) as child:
        warm_up(server, child, options.retained_tokens)
        count = min(WAVE, options.retained_jobs)
        waves = min(2, -(-options.retained_jobs // WAVE))
        return [
            one_wave(server, child, n * WAVE + 1, count, options.retained_tokens)[0] for n in range(waves)
        ]


# --- its part of the report


def run(bench: Bench) -> Section:
    """Measure once: memory does not depend on noise."""
    options = bench.options
    bench.progress.step(f"retained: {options.retained_jobs:,} finished jobs")
    try:
        return section(options, measure(bench), "")
    except RunError as error:
        bench.progress.say(f"    failed: {error}")
        return section(options, None, f"failed: {error}")


KEPT_HEADERS = ("what is kept of a job", "bytes a job", "of its text", "of its text compressed")
KIND_HEADERS = ("keys of a job", "bytes a job")
FOLD_HEADERS = ("projections", "events", "events/s", "projector CPU µs/event")
CURVE_HEADERS = ("jobs", "before sealing, MB", "after, MB", "bytes a job")


def section(options: argparse.Namespace, run: Run | None, why: str) -> Section:
    """Lay out the section; without numbers it is the reason."""
    return Section(
        title=f"Retained: finished chats of {options.retained_tokens:,} tokens",
        intro=f"{options.retained_jobs:,} chats in waves of {WAVE}. Each is its deltas, then its text whole, "
        "once in `turn.completed` and once as the result. Bytes are what Redis uses more than before, but "
        "for clients' buffers; of plain streams and kinds of keys, what MEMORY USAGE says. Compressed is "
        "zstd, level 6, each text by itself. Events are written while the projector is frozen; it is "
        "timed from its thawing until it has acknowledged all. Each projection reads every event.",
        tables=[] if run is None else tables(run),
        notes=[why] if why else [],
        data={} if run is None else asdict(run),
        failures=[f"retained: {why}"] if why else [],
    )


def tables(run: Run) -> list[Table]:
    kept = run.kept
    text, compressed = kept.text / kept.jobs, kept.compressed / kept.jobs
    held = kept.held / kept.jobs
    rows = [
        ("streamjobs: all that Redis holds for it", held),
        ("the aim: 1.2 times the compressed text and 900 bytes", 1.2 * compressed + 900),
        ("the same events in a plain stream", run.plain.events),
        ("its deltas' texts alone in a plain stream", run.plain.texts),
        ("the text", text),
        ("the text, compressed", compressed),
    ]
    kinds = [[name, number(size)] for name, size in run.kept.kinds.items()]
    curve = [_curve_row(point) for point in _thinned(run.curve)]
    return [
        Table(KEPT_HEADERS, [[n, number(v), ratio(v / text), ratio(v / compressed)] for n, v in rows]),
        Table(KIND_HEADERS, kinds),
        Table(FOLD_HEADERS, [_fold_row(", ".join(ALL), run.folded), _fold_row(ALL[0], run.snapshots)]),
        Table(CURVE_HEADERS, curve),
    ]


def _fold_row(name: str, folded: Sequence[Folding]) -> list[str]:
    cpus = [1e6 * f.cpu / f.events for f in folded if f.cpu is not None]
    rates = [f.events / f.seconds for f in folded]
    return [name, number(sum(f.events for f in folded)), summary(rates), summary(cpus) if cpus else NOTHING]


def _curve_row(point: dict[str, int]) -> list[str]:
    megabytes = [number(point[name] / 1e6, 1) for name in ("unsealed", "sealed")]
    return [number(point["jobs"]), *megabytes, number(point["sealed"] / point["jobs"])]


def _thinned(curve: Sequence[dict[str, int]]) -> Sequence[dict[str, int]]:
    """About ten points, the last one among them."""
    step = -(-len(curve) // 10)
    return curve[::-1][::step][::-1]


# --- its options


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("retained", "measured once, whatever --repeat says")
    group.add_argument("--retained-jobs", type=int, default=10_000, help="finished jobs (10,000)")
    group.add_argument("--retained-tokens", type=int, default=1000, help="tokens of each (1,000)")


def quicken(options: argparse.Namespace) -> None:
    options.retained_jobs = min(options.retained_jobs, 50)


def steps(options: argparse.Namespace) -> int:
    return 1


SCENARIO = Scenario("retained", "what finished jobs leave", add_options, quicken, steps, run)
