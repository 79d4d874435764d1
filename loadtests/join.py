"""Join: viewers who open one long job while it runs, all at once and one by one.

streamjobs answers with the job's view, folded once and compressed once for all; beside it the events read
for each viewer from the first on (XRANGE), as streams are often served. The gateways are one process each,
the job is the same. Viewers count bytes; afterwards each is checked to have got the job's last event.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import redis

from loadtests.bench import Bench, Scenario
from loadtests.measure import CpuClock, median_ratio, percentile
from loadtests.peers import xrange_join
from loadtests.processes import Child, RunError, python, run_to_end, running
from loadtests.redis_server import Server, free_port, fresh_server, wait_for_port
from loadtests.report import NOTHING, Chart, Line, Section, Table, number, ratio, summary
from loadtests.streamjobs_peer import settings_env

WRITE_TIMEOUT = 300.0
JOIN_TIMEOUT = 600.0
STREAM = "peer"
LEASE = 86400.0
"""Seconds that nobody has to renew the job's lease: it must still run when viewers come."""


@dataclass(frozen=True)
class Way:
    """One way to bring a viewer up to date: what the client accepts, and how much of the load it is given."""

    name: str
    encoding: str
    share: float = 1.0
    is_ours: bool = True


WAYS = (
    Way("streamjobs, zstd", "zstd"),
    Way("streamjobs, plain", ""),
    Way("XRANGE everything", "", 0.04, is_ours=False),
)
OURS = WAYS[0]


@dataclass(frozen=True)
class Crowd:
    """How many viewers come."""

    at_once: int
    one_by_one: int


@dataclass(frozen=True)
class Run:
    """One round of one way: seconds of each viewer, bytes each got; of those at once, commands and CPU."""

    way: str
    round: int
    viewers: int
    at_once: list[float]
    one_by_one: list[float]
    received: int
    commands: int
    cpu: float | None

    @property
    def seconds_each(self) -> float:
        """Seconds from the first of those at once to the last one's being up to date, for each of them."""
        return max(self.at_once) / self.viewers


@dataclass(frozen=True)
class Job:
    """The job that is joined, as the history module has written it."""

    written: dict[str, Any]
    last: dict[str, str]
    """Of each way's stream, the id of the last event."""


# --- one measurement


@contextlib.contextmanager
def stage(bench: Bench, events: int) -> Iterator[tuple[Server, Job, dict[str, int]]]:
    """A running job whose history is sealed, and the same events in a plain stream."""
    with fresh_server(bench.binary) as server:
        env = settings_env(server.url, lease=str(LEASE))
        with running("streamjobs projector", python("-m", "streamjobs", "projector"), env):
            written = history("long", events, env=env)
            copy = copy_plainly(server, written)
            last = {way.name: written["last"] if way.is_ours else copy["last"] for way in WAYS}
            ended: dict[str, int] = {}
            yield server, Job(written, last), ended
            given = (written["job_id"], written["epoch"], written["batches"], events)
            ended |= history("end", *given, env=env) | {"plain": copy["held"]}


def history(*arguments: object, env: dict[str, str]) -> dict[str, Any]:
    argv = python("-m", "loadtests.streamjobs_history", *map(str, arguments))
    return run_to_end(f"streamjobs {arguments[0]}", argv, env, timeout=WRITE_TIMEOUT)


def copy_plainly(server: Server, written: dict[str, Any]) -> dict[str, Any]:
    """Write the job's events to a stream of their own; returns its last id and its bytes."""
    argv = python("-m", "loadtests.streamjobs_history", "copy", written["job_id"], STREAM)
    run_to_end("copy", argv, settings_env(server.url), timeout=WRITE_TIMEOUT)
    client: Any = server.client
    last = client.xinfo_stream(STREAM)["last-generated-id"].decode()
    return {"last": last, "held": client.memory_usage(STREAM, samples=0)}


def measure(way: Way, round_number: int, server: Server, job: Job, bench: Bench) -> Run:
    """Let viewers join one by one, then all at once, through a gateway of their own."""
    options = bench.options
    bench.sample_noise()
    crowd = Crowd(
        max(1, round(options.join_viewers * way.share)), max(1, round(options.join_singles * way.share))
    )
    with gateway(way, server) as (child, port):
        path = f"/v1/jobs/{job.written['job_id']}/events" if way.is_ours else f"/{STREAM}"
        argv = python("-m", "loadtests.viewers", str(port), path, way.encoding, job.last[way.name])
        singles = _join(argv, Crowd(0, crowd.one_by_one))
        before, clock = commands(server.client), CpuClock(child.pid)
        used = clock.seconds()
        crowded = _join(argv, Crowd(crowd.at_once, 0))
        spent = clock.seconds()
        sent = commands(server.client) - before
    bench.sample_noise()
    cpu = spent - used if spent is not None and used is not None else None
    return Run(
        way.name, round_number, crowd.at_once, crowded["at_once"], singles["one_by_one"],
        crowded["received"], sent, cpu,
    )  # fmt: skip


def _join(argv: list[str], crowd: Crowd) -> dict[str, Any]:
    whole = [*argv, str(crowd.at_once), str(crowd.one_by_one)]
    return run_to_end("viewers", whole, timeout=JOIN_TIMEOUT)


@contextlib.contextmanager
def gateway(way: Way, server: Server) -> Iterator[tuple[Child, int]]:
    """A process that answers on a port."""
    port = free_port()
    if way.is_ours:
        argv = python("-m", "streamjobs", "serve", "--port", str(port))
    else:
        argv = python("-m", xrange_join.__name__, str(port))
    env = settings_env(server.url, lease=str(LEASE)) | {"LOADTEST_REDIS_URL": server.url}
    with running(way.name.partition(",")[0], argv, env) as child:
        wait_for_port(port, child)
        yield child, port


def commands(client: redis.Redis) -> int:
    """Count the requests that Redis has read; a pipeline may be one, those of idle loops are in it."""
    stats: Any = client.info("stats")
    return int(stats["total_reads_processed"])


# --- all of them


def run(bench: Bench) -> Section:
    """Write the job once, then measure each way `repeat` times, interleaved."""
    runs: list[Run] = []
    failed: dict[str, str] = {}
    growth: list[tuple[int, Run]] = []
    try:
        for events in shorter(bench.options):
            bench.progress.step(f"join: a job of {events:,} deltas")
            with stage(bench, events) as (server, job, _):
                growth.append((events, measure(OURS, 1, server, job, bench)))
        bench.progress.step(f"join: writing a job of {bench.options.join_events:,} deltas")
        with stage(bench, bench.options.join_events) as (server, job, ended):
            for round_number in range(1, bench.options.repeat + 1):
                for way in WAYS:
                    bench.progress.step(f"join, round {round_number}: {way.name}")
                    _measure_into(runs, failed, way, round_number, server, job, bench)
        memory = [*job.written["curve"], {"deltas": "ended", "text": job.written["text"]} | ended]
    except RunError as error:
        failed |= {way.name: f"failed: {error}" for way in WAYS if way.name not in {r.way for r in runs}}
        memory = []
        bench.progress.say(f"    failed: {error}")
    growth += [(bench.options.join_events, run) for run in runs if run.way == OURS.name][:1]
    return section(bench.options, runs, failed, memory, growth)


def shorter(options: argparse.Namespace) -> list[int]:
    """Lengths of other jobs, to see how the cost grows with it."""
    return [options.join_events // part for part in options.join_parts]


def _measure_into(
    runs: list[Run],
    failed: dict[str, str],
    way: Way,
    round_number: int,
    server: Server,
    job: Job,
    bench: Bench,
) -> None:
    try:
        runs.append(measure(way, round_number, server, job, bench))
    except RunError as error:
        failed[way.name] = f"failed: {error}"
        bench.progress.say(f"    {failed[way.name]}")
    else:
        p99 = 1000 * (percentile(runs[-1].at_once, 0.99) or 0.0)
        bench.progress.say(f"    {runs[-1].viewers} at once: {p99:,.0f} ms (p99)")


# --- its part of the report


HEADERS = (
    "way", "one joins, p50 ms", "p99 ms", "viewers at once", "up to date, p50 ms", "p99 ms",
    "ms for each of them", "it / streamjobs, zstd", "bytes for each", "of the text", "Redis requests",
    "gateway CPU ms for each",
)  # fmt: skip
GROWTH_HEADERS = (
    "deltas of the job", "one joins, p50 ms", "p99 ms", "all at once, p50 ms", "p99 ms", "bytes for each",
)  # fmt: skip
MEMORY_HEADERS = ("deltas so far", "text, bytes", "the job's keys, bytes", "of the text")


def section(
    options: argparse.Namespace,
    runs: Sequence[Run],
    failed: dict[str, str],
    memory: Sequence[dict[str, Any]],
    growth: Sequence[tuple[int, Run]] = (),
) -> Section:
    """Lay out the section; a way without numbers keeps its row, with the reason."""
    by_name = {way.name: [r for r in runs if r.way == way.name] for way in WAYS}
    text = memory[-1]["text"] if memory else 0
    return Section(
        title=f"Join: viewers of one running job of {options.join_events:,} deltas",
        intro="Times are from connecting until a viewer has everything: of streamjobs the view, which covers "
        "the job's last event; of XRANGE all events. One by one, then all at once, through a fresh gateway "
        f"process. Interleaved rounds: {options.repeat}; median (minimum-maximum) of the rounds' values. "
        "Viewers and Redis share the machine with the gateway. XRANGE gets fewer viewers: compare by viewer. "
        "Redis requests are of all processes, those of loops that always run too.",
        tables=[
            Table(HEADERS, [_row(name, by_name, failed, text) for name in by_name]),
            Table(MEMORY_HEADERS, [_memory_row(sample) for sample in memory] + _plain_row(memory)),
            Table(GROWTH_HEADERS, [_growth_row(events, run) for events, run in growth]),
        ],
        notes=[f"{name}: {why}" for name, why in failed.items()],
        data={"events": options.join_events, "runs": [asdict(r) for r in runs], "memory": list(memory)},
        failures=[f"join, {name}: {why}" for name, why in failed.items()],
        charts=[_growth_chart(growth)],
    )


def _growth_row(events: int, run: Run) -> list[str]:
    return [number(events), *_cells([run.one_by_one]), *_cells([run.at_once]), number(run.received)]


def _growth_chart(growth: Sequence[tuple[int, Run]]) -> Chart:
    points = [(events, 1000 * (percentile(run.one_by_one, 0.5) or 0.0)) for events, run in growth]
    return Chart("join", "One viewer joins a job", "deltas of the job", "p50, ms", [Line(OURS.name, points)])


def _row(name: str, by_name: dict[str, list[Run]], failed: dict[str, str], text: int) -> list[str]:
    runs = by_name[name]
    if not runs:
        return [name, failed.get(name, NOTHING), *[NOTHING] * (len(HEADERS) - 2)]
    each = {key: {r.round: r.seconds_each for r in of} for key, of in by_name.items()}
    cpus = [1000 * r.cpu / (r.viewers + 1) for r in runs if r.cpu is not None]  # one more finds out the size
    return [
        name,
        *_cells([r.one_by_one for r in runs]),
        number(runs[0].viewers),
        *_cells([r.at_once for r in runs]),
        summary([1000 * seconds for seconds in each[name].values()]),
        NOTHING if name == OURS.name else ratio(median_ratio(each[name], each[OURS.name])),
        number(runs[-1].received),
        ratio(runs[-1].received / text) if text else NOTHING,
        summary([r.commands for r in runs]),
        summary(cpus),
    ]


def _cells(rounds: Sequence[Sequence[float]]) -> list[str]:
    """Format p50 and p99, in ms."""
    return [
        summary([1000 * (percentile(values, share) or 0.0) for values in rounds]) for share in (0.5, 0.99)
    ]


def _memory_row(sample: dict[str, Any]) -> list[str]:
    deltas = sample["deltas"]
    name = deltas if isinstance(deltas, str) else number(deltas)
    return [name, number(sample["text"]), number(sample["held"]), ratio(sample["held"] / sample["text"])]


def _plain_row(memory: Sequence[dict[str, Any]]) -> list[list[str]]:
    if not memory:
        return []
    text, plain = memory[-1]["text"], memory[-1]["plain"]
    return [["the same events in a plain stream", number(text), number(plain), ratio(plain / text)]]


# --- its options


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("join")
    group.add_argument("--join-events", type=int, default=100_000, help="deltas of the job (100,000)")
    group.set_defaults(join_parts=(100, 10))
    group.add_argument("--join-viewers", type=int, default=500, help="viewers at once (500)")
    group.add_argument("--join-singles", type=int, default=100, help="viewers one by one (100)")


def quicken(options: argparse.Namespace) -> None:
    options.join_parts = ()
    options.join_events = min(options.join_events, 10_000)
    options.join_viewers = min(options.join_viewers, 50)
    options.join_singles = min(options.join_singles, 5)


def steps(options: argparse.Namespace) -> int:
    return len(shorter(options)) + 1 + options.repeat * len(WAYS)


SCENARIO = Scenario("join", "viewers join a long job", add_options, quicken, steps, run)
