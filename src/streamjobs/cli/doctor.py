"""`streamjobs doctor`: checks the invariants on a live store."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from streamjobs.cli.options import read_settings, require_redis, run, settings_options

if TYPE_CHECKING:
    from streamjobs.config import Settings
    from streamjobs.store.doctor import Report

_SHOWN = 20


@click.command()
@click.option("--json", "as_json", is_flag=True, help="The whole report as JSON.")
@settings_options
def doctor(as_json: bool, redis_url: str | None, config: Path | None, assignments: tuple[str, ...]) -> None:
    """Check every job's log, place and keys, while the system runs.

    Exit status 0 when every invariant holds, 1 when one does not. It only reads.

    \b
    streamjobs doctor --redis-url redis://localhost:6379
    streamjobs doctor --json | jq .violations
    """
    import msgspec

    settings = require_redis(read_settings(redis_url, config, assignments))
    report = run(_examine(settings, show_progress=sys.stderr.isatty() and not as_json))
    if as_json:
        sys.stdout.write(msgspec.json.encode(report).decode() + "\n")
    else:
        print_report(report)
    sys.exit(0 if report.is_healthy else 1)


def print_report(report: Report) -> None:
    """A line for each check, then what was found."""
    from streamjobs.store.doctor import CHECKS

    failed = {violation.check for violation in report.violations}
    for check, meaning in CHECKS.items():
        mark, color = ("FAILED", "red") if check in failed else ("ok", "green")
        click.echo(f"  {click.style(f'{mark:<7}', fg=color)} {check:<22} {meaning}")
    for violation in report.violations[:_SHOWN]:
        click.echo(f"  {violation.check}: {violation.subject}: {violation.found}")
    if len(report.violations) > _SHOWN:
        click.echo(f"  … and {len(report.violations) - _SHOWN} more (--json shows all)")
    for note in report.notes:
        click.echo(f"  note: {note}")
    statuses = ", ".join(f"{n} {status}" for status, n in sorted(report.statuses.items())) or "none"
    click.echo(f"{report.jobs} jobs ({statuses}), {report.events} events, {report.keys} keys, "
               f"{len(report.violations)} violations")  # fmt: skip


async def _examine(settings: Settings, *, show_progress: bool) -> Report:
    from streamjobs.store import Store
    from streamjobs.store.doctor import Doctor

    def progress(jobs: int) -> None:
        if show_progress and jobs % 100 == 0:
            click.echo(f"\r{jobs} jobs …", nl=False, err=True)

    store = await Store.open(settings)
    try:
        return await Doctor(store, progress).examine()
    finally:
        await store.aclose()
