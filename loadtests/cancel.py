"""Cancel: how long after an accepted cancel a streaming job is silent, in the log and at the provider.

Chats stream through one worker; once all of them do, they are cancelled through the store: *one by one*,
and *all at once*. For each job three times are taken from its `job.cancel_requested`, which the script that
accepts a cancel writes by Redis's clock: until the provider sees its connection closed (by the provider's
clock, which is the same machine's), until `job.cancelled`, and until the log is silent: nothing where no
delta follows the request in the log, else `job.cancelled` at the latest, because nothing follows that.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from loadtests import streamjobs_peer
from loadtests.bench import Bench, Scenario
from loadtests.measure import percentile
from loadtests.processes import Child, RunError, python, run_to_end, running
from loadtests.provider import Provider, running_provider
from loadtests.redis_server import Server, fresh_server
from loadtests.report import Section, Table, number, summary
from loadtests.token_systems import Load, StreamjobsChat, entries_of

STREAMING = 25
"""Entries in a log that show that its job streams."""
START_TIMEOUT = 30.0
END_TIMEOUT = 15.0
POLL_INTERVAL = 0.05
LONGEST = 60.0
"""Seconds of tokens that each stream has: none may end by itself."""


@dataclass(frozen=True)
class Mode:
    """How the cancels come: one every `interval` seconds, 0 for all at once."""

    name: str
    interval: float


@dataclass(frozen=True)
class Ending:
    """One job's end, in seconds from its accepted cancel."""

    silent: float
    closed: float
    cancelled: float
    deltas_after: int


@dataclass(frozen=True)
class Run:
    """One round of one mode."""

    mode: str
    round: int
    endings: list[Ending]


def modes(options: argparse.Namespace) -> list[Mode]:
    return [Mode("one by one", options.cancel_interval), Mode("all at once", 0.0)]


# --- one measurement


def measure(mode: Mode, round_number: int, bench: Bench) -> Run:
    """Cancel all streams once, on a server and a provider of their own."""
    options, system = bench.options, StreamjobsChat()
    load = Load(options.streams, round(options.rate * LONGEST))
    bench.sample_noise()
    with running_provider(options.rate, load.tokens) as provider, fresh_server(bench.binary) as server:
        env = system.env(server.url, provider)
        with running("streamjobs worker", system.worker_command(load), env) as worker:
            system.begin(server, load, env)
            wait_until_streaming(server, worker, system.ids)
            cancel_all(system.ids, mode, env)
            wait_until_silent(server, worker, provider, load.streams)
            logs = [log_of(server, job_id) for job_id in system.ids]
            closed = provider.closed.read().ended
    bench.sample_noise()
    return Run(mode.name, round_number, [ending(log, closed[n]) for n, log in enumerate(logs)])


def wait_until_streaming(server: Server, worker: Child, ids: Sequence[str]) -> None:
    """Wait until every job's log grows by tokens."""
    deadline = time.monotonic() + START_TIMEOUT
    while True:
        worker.require_alive()
        pipeline = server.client.pipeline(transaction=False)
        for job_id in ids:
            pipeline.xlen(streamjobs_peer.events_key(job_id))
        shortest = min(pipeline.execute())
        if shortest >= STREAMING:
            return
        if time.monotonic() > deadline:
            raise RunError(f"a stream has only {shortest} events: {worker.tail()}")
        time.sleep(POLL_INTERVAL)


def cancel_all(ids: Sequence[str], mode: Mode, env: dict[str, str]) -> None:
    """Cancel through the store, from another process; raise `RunError` unless each was told to its worker."""
    argv = python("-m", "loadtests.streamjobs_peer", "cancel", str(mode.interval), *ids)
    answers = run_to_end("streamjobs cancel", argv, env, timeout=START_TIMEOUT + mode.interval * len(ids))
    if set(answers["answers"]) != {"requested"}:
        raise RunError(f"cancels were answered {sorted(set(answers['answers']))}")


def wait_until_silent(server: Server, worker: Child, provider: Provider, streams: int) -> None:
    """Wait until all jobs have ended and the provider has no connection left."""
    deadline = time.monotonic() + END_TIMEOUT
    while True:
        worker.require_alive()
        unended, closed = streamjobs_peer.unended(server.client), len(provider.closed.read().ended)
        if unended == 0 and closed == streams:
            return
        if time.monotonic() > deadline:
            raise RunError(f"{unended} jobs have not ended, {closed} of {streams} connections are closed")
        time.sleep(POLL_INTERVAL)


def log_of(server: Server, job_id: str) -> list[tuple[str, dict[str, Any]]]:
    """Return a job's events: type and content."""
    entries = entries_of(server.client, [streamjobs_peer.events_key(job_id)])
    return [(fields[b"t"].decode(), json.loads(fields[b"d"])) for _, fields in entries]


def ending(log: Sequence[tuple[str, dict[str, Any]]], closed: float) -> Ending:
    """Measure one job; raise `RunError` where its log contradicts what its last event says."""
    types = [kind for kind, _ in log]
    if types[-1] != "job.cancelled":
        raise RunError(f"a cancelled job's log ends with {types[-1]}")
    asked = types.index("job.cancel_requested")
    deltas = sum(kind.endswith(".delta") for kind in types[asked:])
    request, last = log[asked][1], log[-1][1]
    if deltas != last["deltas_after"]:
        raise RunError(f"{deltas} deltas follow the cancel, job.cancelled says {last['deltas_after']}")
    took = (last["ts"] - request["ts"]) / 1000
    return Ending(took if deltas else 0.0, max(0.0, closed - request["ts"] / 1000), took, deltas)


# --- all of them


def run(bench: Bench) -> Section:
    """Measure both modes `repeat` times, interleaved."""
    runs: list[Run] = []
    failed: dict[str, str] = {}
    for round_number in range(1, bench.options.repeat + 1):
        for mode in modes(bench.options):
            bench.progress.step(f"cancel, round {round_number}: {mode.name}")
            try:
                runs.append(measure(mode, round_number, bench))
            except RunError as error:
                failed[mode.name] = f"failed: {error}"
                bench.progress.say(f"    {failed[mode.name]}")
            else:
                cells = _cells([runs[-1]], "cancelled")
                bench.progress.say(f"    cancelled within {cells[0]} ms (p50), {cells[1]} ms (p99)")
    return section(bench.options, runs, failed)


# --- its part of the report


MEASURES = {
    "silent": "no delta follows in the log",
    "closed": "the provider's connection is closed",
    "cancelled": "job.cancelled",
}
HEADERS = (
    "cancels",
    "until",
    "p50 ms",
    "p99 ms",
    "most ms",
    "deltas after the cancel: all jobs, most of one",
)


def section(options: argparse.Namespace, runs: Sequence[Run], failed: dict[str, str]) -> Section:
    """Lay out the section; a mode without numbers keeps its row, with the reason."""
    rows: list[list[str]] = []
    for mode in modes(options):
        of_mode = [r for r in runs if r.mode == mode.name]
        if of_mode:
            rows += [_row(mode.name, of_mode, name) for name in MEASURES]
        else:
            rows.append([mode.name, failed.get(mode.name, "-"), "-", "-", "-", "-"])
    return Section(
        title="Cancel: from an accepted cancel to silence",
        intro=f"{options.streams} chats of {options.rate:g} tokens/s through one worker, cancelled through "
        f"the store: one every {1000 * options.cancel_interval:g} ms, and all at once. Rounds: "
        f"{options.repeat}; median (minimum-maximum) of the rounds' p50, p99 and longest. Times count from "
        "`job.cancel_requested` in the log; the log is silent at once where no delta follows it, else by "
        "`job.cancelled` at the latest.",
        tables=[Table(HEADERS, rows)],
        notes=[f"{name}: {why}" for name, why in failed.items()],
        data={"streams": options.streams, "rate": options.rate, "runs": [asdict(r) for r in runs]},
        failures=[f"cancel, {name}: {why}" for name, why in failed.items()],
    )


def _row(mode: str, runs: Sequence[Run], measure: str) -> list[str]:
    deltas = [sum(e.deltas_after for e in r.endings) for r in runs]
    most = max(e.deltas_after for r in runs for e in r.endings)
    after = f"{summary(deltas)}, {number(most)}" if measure == "silent" else ""
    return [mode, MEASURES[measure], *_cells(runs, measure), after]


def _cells(runs: Sequence[Run], measure: str) -> list[str]:
    """Format p50, p99 and the longest, in ms."""
    return [
        summary([1000 * (percentile([getattr(e, measure) for e in r.endings], share) or 0.0) for r in runs])
        for share in (0.5, 0.99, 1.0)
    ]


# --- its options


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("cancel", "with --streams and --rate of the tokens scenario")
    group.add_argument(
        "--cancel-interval", type=float, default=0.02, help="seconds between cancels, one by one (0.02)"
    )


def quicken(options: argparse.Namespace) -> None:
    options.cancel_interval = min(options.cancel_interval, 0.02)


def steps(options: argparse.Namespace) -> int:
    return options.repeat * len(modes(options))


SCENARIO = Scenario("cancel", "from a cancel to silence", add_options, quicken, steps, run)
