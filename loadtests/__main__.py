"""`python -m loadtests [SCENARIO ...]`: run the scenarios, print one Markdown page, keep it in results/."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from loadtests import cancel, fanout, idle, jobs, join, many, reconnect, redis_server, retained, steps, tokens
from loadtests.bench import Bench, Scenario
from loadtests.measure import describe_machine
from loadtests.plots import draw
from loadtests.processes import RunError, raise_on_signals
from loadtests.progress import Progress
from loadtests.report import Report, Section, chart_file, markdown
from loadtests.streamjobs_peer import ENCRYPT

SCENARIOS: tuple[Scenario, ...] = (
    jobs.SCENARIO,
    tokens.SCENARIO,
    steps.SCENARIO,
    cancel.SCENARIO,
    join.SCENARIO,
    retained.SCENARIO,
    fanout.SCENARIO,
    many.SCENARIO,
    idle.SCENARIO,
    reconnect.SCENARIO,
)
RESULTS = Path(__file__).parent / "results"


def make_parser() -> argparse.ArgumentParser:
    """Return the command line: common options, then those of each scenario."""
    known = ", ".join(f"{scenario.name} ({scenario.summary})" for scenario in SCENARIOS)
    parser = argparse.ArgumentParser(prog="python -m loadtests", description=f"Scenarios: {known}.")
    names = [scenario.name for scenario in SCENARIOS]
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=f"{', '.join(names)} (all)")
    parser.add_argument("--repeat", type=int, default=3, help="interleaved rounds (3)")
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, one round: does it work? (< 120 s)"
    )
    parser.add_argument(
        "--encrypt", action="store_true", help="encrypt streamjobs' jobs (see docs/operations.md)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all numbers as JSON")
    for scenario in SCENARIOS:
        scenario.add_options(parser)
    return parser


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.encrypt:
        os.environ[ENCRYPT] = "1"
    unknown = set(options.scenarios) - {scenario.name for scenario in SCENARIOS}
    if unknown:
        parser.error(f"unknown scenario: {', '.join(sorted(unknown))}")
    if options.quick:
        options.repeat = 1
        for scenario in SCENARIOS:
            scenario.quicken(options)
    return options


def run_all(chosen: list[Scenario], bench: Bench) -> list[Section]:
    bench.progress.total = sum(scenario.steps(bench.options) for scenario in chosen)
    return [scenario.run(bench) for scenario in chosen]


def write(report: Report, options: argparse.Namespace) -> Path:
    """Write the page (and the JSON, if asked for); return the page's path."""
    RESULTS.mkdir(exist_ok=True)
    name = report.started_at.replace(":", "").replace(" ", "T")
    page = RESULTS / f"{name}.md"
    page.write_text(markdown(report, name), encoding="utf-8")
    for chart in (chart for section in report.sections for chart in section.charts):
        draw(chart, RESULTS / chart_file(name, chart))
    if options.json is not None:
        options.json.write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
    return page


def main(arguments: list[str]) -> int:
    """Return 0 when everything that was asked for and is installed has run."""
    options = parse(arguments)
    raise_on_signals()
    load, now = os.getloadavg(), datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%SZ")
    try:
        binary = redis_server.find_binary()
    except RunError as error:
        print(error, file=sys.stderr)
        return 1
    bench = Bench(options, binary, Progress())
    chosen = [s for s in SCENARIOS if s.name in (options.scenarios or [s.name])]
    sections = run_all(chosen, bench)
    command = " ".join(["python -m loadtests", *arguments])
    machine, version = describe_machine(), redis_server.version(binary)
    report = Report(now, command, machine, version, bench.calibration, load, sections)
    print(markdown(report))
    bench.progress.say(f"written to {write(report, options).relative_to(RESULTS.parent.parent)}")
    failures = [failure for section in sections for failure in section.failures]
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    if platform.system() == "Windows":
        sys.exit("the load tests need a Unix: they account CPU time and end children by session")
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
