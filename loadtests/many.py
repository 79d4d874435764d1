"""Many: jobs with a few viewers each, all the way: provider, worker, Redis, gateway, viewers, on one machine.

Each token carries the instant at which the provider sent it; viewers say how old it was when they read it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial

from loadtests.bench import Bench, Scenario
from loadtests.fanout import wait_until_open
from loadtests.fanout_systems import gateway
from loadtests.measure import CpuClock
from loadtests.processes import RunError, last_json, python, run_to_end, running
from loadtests.redis_server import free_port, fresh_server, wait_for_port
from loadtests.report import NOTHING, Chart, Line, Section, Table, number, percent, summary
from loadtests.streamjobs_peer import settings_env, worker_command

TIMEOUT = 120.0


@dataclass(frozen=True)
class Run:
    """One round: delays in ms, seconds from the first token to the last, cores used by each process."""

    jobs: int
    round: int
    delays: dict[str, float]
    seconds: float
    tokens: int
    cores: dict[str, float]


def sizes(options: argparse.Namespace) -> list[int]:
    """A line through the sizes: how cost grows with the jobs."""
    return sorted({max(1, options.many_jobs // part) for part in options.many_parts})


def measure(jobs: int, round_number: int, bench: Bench) -> Run:
    """Submit chats, let viewers in, then start the worker."""
    options = bench.options
    tokens = round(options.many_rate * options.many_seconds)
    bench.sample_noise()
    provider_port = free_port()
    provider_argv = python(
        "-m", "loadtests.clock_provider", str(provider_port), str(tokens), str(options.many_rate)
    )
    with fresh_server(bench.binary) as server, running("provider", provider_argv) as provider:
        wait_for_port(provider_port, provider)
        url = f"http://127.0.0.1:{provider_port}/v1"
        env = settings_env(
            server.url,
            provider="openai",
            openai_base_url=url,
            openai_api_key="load",
            provider_connections="5000",
        )
        submit = python("-m", "loadtests.streamjobs_peer", "chat", str(jobs), "long")
        ids = run_to_end("submit", submit, env, timeout=TIMEOUT)["ids"]
        with gateway(env) as (serving, port):
            plan = {
                "port": port,
                "paths": [f"/v1/jobs/{job}/events?after=0" for job in ids],
                "viewers": options.many_viewers,
                "tokens": tokens,
                "timeout": 2 * TIMEOUT + options.many_seconds,
                "is_timed_in_text": True,
            }
            with running("viewers", python("-m", "loadtests.crowd", json.dumps(plan))) as crowd:
                wait_until_open(crowd)
                with running("worker", worker_command("loadtests.noop_app:app", jobs), env) as worker:
                    children = {
                        "worker": worker, "redis": server.child, "gateway": serving, "provider": provider,
                        "viewers": crowd,
                    }  # fmt: skip
                    clocks = {name: CpuClock(child.pid) for name, child in children.items()}
                    before = {name: clock.seconds() or 0.0 for name, clock in clocks.items()}
                    crowd.wait(2 * TIMEOUT + options.many_seconds)
                    after = {name: clock.seconds() or 0.0 for name, clock in clocks.items()}
                    seen = last_json(crowd)
    bench.sample_noise()
    if seen["short"] or seen["holes"]:
        raise RunError(f"{seen['short']} viewers missed tokens, {seen['holes']} holes")
    after["viewers"] = before["viewers"] + seen["cpu"]
    cores = {name: (after[name] - before[name]) / seen["seconds"] for name in clocks}
    return Run(jobs, round_number, seen["delays"], seen["seconds"], seen["tokens"], cores)


def run(bench: Bench) -> Section:
    """Measure each size `repeat` times."""
    runs: list[Run] = []
    failed: dict[str, str] = {}
    for round_number in range(1, bench.options.repeat + 1):
        for jobs in sizes(bench.options):
            bench.progress.step(f"many, round {round_number}: {jobs:,} jobs")
            measured = partial(measure, jobs, round_number, bench)
            runs += bench.attempt(str(jobs), measured, lambda run: f"p99 {run.delays['p99']:,.0f} ms", failed)
    return section(bench.options, runs, failed)


HEADERS = (
    "jobs",
    "viewers",
    "p50 ms",
    "p99 ms",
    "s, first token to last",
    "cores: worker, redis, gateway, provider, viewers",
)


def section(options: argparse.Namespace, runs: Sequence[Run], failed: dict[str, str]) -> Section:
    """Lay out the section."""
    points = {jobs: [run.delays["p99"] for run in runs if run.jobs == jobs] for jobs in sizes(options)}
    line = Line("p99", [(jobs, sum(of) / len(of)) for jobs, of in points.items() if of])
    return Section(
        title="Many: provider to viewers, many jobs",
        intro=f"{options.many_rate:g} tokens/s for {options.many_seconds:g} s a job, {options.many_viewers} "
        "viewers each; from the provider's sending a token until a viewer has read it, of one viewer in 25. "
        "All processes share this machine; one worker, one gateway. The worker's CPU is from its start on. "
        f"Rounds: {options.repeat}.",
        tables=[Table(HEADERS, [_row(jobs, options, runs, failed) for jobs in sizes(options)])],
        data={"runs": [asdict(run) for run in runs]},
        failures=[f"many, {jobs} jobs: {why}" for jobs, why in failed.items()],
        charts=[Chart("many", "Provider to viewers", "jobs", "p99, ms", [line])],
    )


def _row(jobs: int, options: argparse.Namespace, runs: Sequence[Run], failed: dict[str, str]) -> list[str]:
    mine = [run for run in runs if run.jobs == jobs]
    if not mine:
        return [number(jobs), failed.get(str(jobs), NOTHING), *[NOTHING] * (len(HEADERS) - 2)]
    cores = ", ".join(percent(sum(run.cores[name] for run in mine) / len(mine)) for name in mine[0].cores)
    return [
        number(jobs),
        number(jobs * options.many_viewers),
        summary([run.delays["p50"] for run in mine]),
        summary([run.delays["p99"] for run in mine]),
        summary([run.seconds for run in mine]),
        cores,
    ]


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("many")
    group.add_argument("--many-jobs", type=int, default=1000, help="jobs at once (1,000)")
    group.add_argument("--many-viewers", type=int, default=5, help="viewers of each (5)")
    group.add_argument("--many-rate", type=float, default=20.0, help="tokens/s of each (20)")
    group.set_defaults(many_parts=(10, 4, 2, 1))
    group.add_argument("--many-seconds", type=float, default=10.0, help="length of each (10)")


def quicken(options: argparse.Namespace) -> None:
    options.many_parts = (1,)
    options.many_jobs = min(options.many_jobs, 20)
    options.many_seconds = min(options.many_seconds, 1.0)


def steps(options: argparse.Namespace) -> int:
    return options.repeat * len(sizes(options))


SCENARIO = Scenario("many", "many jobs, a few viewers each", add_options, quicken, steps, run)
