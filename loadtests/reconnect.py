"""Reconnect: all viewers of a running job lose their connections, or their gateway, and come back at once."""

from __future__ import annotations

import argparse
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from loadtests.bench import Bench, Scenario
from loadtests.fanout_systems import begun_jobs, gateway
from loadtests.join import commands
from loadtests.measure import percentile
from loadtests.processes import Child, RunError, last_json, python, run_to_end, running
from loadtests.redis_server import fresh_server
from loadtests.report import NOTHING, Section, Table, number, summary
from loadtests.streamjobs_peer import settings_env

WAYS = {"abort": "the clients' network breaks", "wait": "the gateway is killed (-9) and started again"}
RATE = 20.0
LEASE = 86400.0
TIMEOUT = 180.0
POLL = 0.01


@dataclass(frozen=True)
class Run:
    """One round: seconds until each viewer had gone on, attempts to connect, Redis requests meanwhile."""

    way: str
    round: int
    viewers: int
    seconds: list[float]
    knocks: int
    requests: int


def measure(way: str, round_number: int, bench: Bench) -> Run:
    """Speak to viewers who lose everything in the middle."""
    viewers, tokens = bench.options.back_viewers, round(RATE * bench.options.back_seconds)
    bench.sample_noise()
    with fresh_server(bench.binary) as server:
        env = settings_env(server.url, lease=str(LEASE))
        (job,) = begun_jobs(1, env)
        path = f"/v1/jobs/{job.partition(':')[0]}/events"
        with gateway(env) as (serving, port):
            argv = python("-m", "loadtests.returning", str(port), path, str(viewers), str(tokens), way)
            with running("viewers", argv) as crowd:
                await_word(crowd, "ready")
                speaking = threading.Thread(target=_speak, args=(job, tokens, env))
                speaking.start()
                try:
                    requests = _break(way, crowd, serving, port, env, server.client)
                    crowd.wait(TIMEOUT)
                finally:
                    speaking.join()
                came = last_json(crowd)
    bench.sample_noise()
    if came["wrong"] or came["short"]:
        raise RunError(f"{came['wrong']} tokens missed or repeated, {came['short']} viewers short")
    return Run(way, round_number, viewers, came["seconds"], came["knocks"], requests)


def _speak(job: str, tokens: int, env: dict[str, str]) -> None:
    argv = python("-m", "loadtests.speaker", "log", job, str(tokens), str(RATE))
    run_to_end("speaker", argv, env, timeout=tokens / RATE + TIMEOUT)


def _break(way: str, crowd: Child, serving: Child, port: int, env: dict[str, str], client: Any) -> int:
    """See to it that all lose their connections; returns Redis's requests until all have gone on."""
    await_word(crowd, "half")
    before = commands(client)
    if way == "abort":
        await_word(crowd, "exact")
        return commands(client) - before
    os.kill(serving.pid, signal.SIGKILL)
    with gateway(env, port=port):
        await_word(crowd, "exact")
        requests = commands(client) - before
        crowd.wait(TIMEOUT)
    return requests


def await_word(child: Child, word: str) -> None:
    """Wait until a child has printed a word."""
    deadline = time.monotonic() + TIMEOUT
    while word not in child.output().split():
        child.require_alive()
        if time.monotonic() > deadline:
            raise RunError(f"{child.name} did not say {word}: {child.tail()}")
        time.sleep(POLL)


def run(bench: Bench) -> Section:
    """Measure both ways `repeat` times."""
    runs: list[Run] = []
    failed: dict[str, str] = {}
    for round_number in range(1, bench.options.repeat + 1):
        for way, meaning in WAYS.items():
            bench.progress.step(f"reconnect, round {round_number}: {meaning}")
            runs += bench.attempt(way, partial(measure, way, round_number, bench), _spoken, failed)
    return section(bench.options, runs, failed)


def _spoken(run: Run) -> str:
    return f"all have gone on after {1000 * max(run.seconds):,.0f} ms"


HEADERS = (
    "what happens",
    "viewers",
    "p50 ms",
    "p99 ms",
    "all have gone on, ms",
    "attempts",
    "Redis requests",
)


def section(options: argparse.Namespace, runs: Sequence[Run], failed: dict[str, str]) -> Section:
    """Lay out the section."""
    return Section(
        title="Reconnect: everybody comes back at once",
        intro=f"Viewers of one job at {RATE:g} tokens/s. From the first lost connection until a viewer has "
        "read the token that it lacked, with none missed or repeated. Clients knock every 0.1 s, without a "
        "browser's `retry:`. The second row has the gateway's start in it. Redis requests are of all "
        f"processes, from the break until all have gone on. Rounds: {options.repeat}.",
        tables=[Table(HEADERS, [_row(way, runs, failed) for way in WAYS])],
        data={"runs": [asdict(run) for run in runs]},
        failures=[f"reconnect, {way}: {why}" for way, why in failed.items()],
    )


def _row(way: str, runs: Sequence[Run], failed: dict[str, str]) -> list[str]:
    mine = [run for run in runs if run.way == way]
    if not mine:
        return [WAYS[way], failed.get(way, NOTHING), *[NOTHING] * (len(HEADERS) - 2)]
    shares = [[1000 * (percentile(run.seconds, share) or 0.0) for run in mine] for share in (0.5, 0.99, 1.0)]
    return [
        WAYS[way],
        number(mine[0].viewers),
        *map(summary, shares),
        summary([run.knocks for run in mine]),
        summary([run.requests for run in mine]),
    ]


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("reconnect")
    group.add_argument("--back-viewers", type=int, default=1000, help="viewers who come back (1,000)")
    group.add_argument("--back-seconds", type=float, default=16.0, help="length of the text (16)")


def quicken(options: argparse.Namespace) -> None:
    options.back_viewers = min(options.back_viewers, 50)
    options.back_seconds = min(options.back_seconds, 2.0)


def steps(options: argparse.Namespace) -> int:
    return options.repeat * len(WAYS)


SCENARIO = Scenario("reconnect", "all viewers come back at once", add_options, quicken, steps, run)
