"""The `schedules` commands: jobs that recur."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, tzinfo
from typing import TYPE_CHECKING, Any, TypeVar

import click

from streamjobs.cli.options import gateway_options, gateway_token, run
from streamjobs.errors import BadRequest

if TYPE_CHECKING:
    from streamjobs.client.schedules import SchedulesClient

Result = TypeVar("Result")

_JSON = click.option("--json", "as_json", is_flag=True, help="Print the gateway's answer.")


@click.group()
def schedules() -> None:
    """Jobs that recur: by cron in a time zone, or at an interval.

    Each tick gives exactly one job, however many gateways and workers run.

    \b
    streamjobs schedules list
    """


@schedules.command("list")
@_JSON
@gateway_options
def list_(as_json: bool, url: str, owner: str) -> None:
    """List the owner's schedules; what an App's code declares is owner `system`'s unless it says otherwise.

    \b
    streamjobs schedules list
    streamjobs schedules list --owner system --json | jq '.[].next_ms'
    """
    records = _ask(url, owner, lambda api: api.list())
    if as_json:
        _print_json(records)
    elif records:
        _print_table(records)
    else:
        click.echo("no schedules", err=True)


@schedules.command()
@click.argument("name")
@click.argument("kind", default="chat")
@click.option("--cron", help="Five fields, or @hourly, @daily, @weekly, @monthly, @yearly.")
@click.option("--timezone", help="The time zone of --cron, as Europe/Berlin. Default: UTC.")
@click.option("--every", type=float, help="Seconds, in place of --cron.")
@click.option("--offset", type=float, help="Seconds by which the ticks of --every are later.")
@click.option("--input", "input_json", help="The job's input as JSON; - reads it from standard input.")
@click.option("--prompt", help="For chat: what to ask.")
@click.option("--queue", help="Which queue. Default: default.")
@click.option("--priority", type=click.Choice(["high", "default", "low"]), help="Which of its classes.")
@click.option(
    "--missed", type=click.Choice(["skip", "once", "all"]), help="Ticks while nothing ran. Default: skip."
)
@click.option(
    "--overlap", type=click.Choice(["allow", "skip"]), help="While its last job is live. Default: allow."
)
@click.option("--key", default="", help="Idempotency key: the same key makes the same schedule.")
@_JSON
@gateway_options
def create(
    name: str, kind: str, input_json: str | None, prompt: str | None, key: str, as_json: bool, url: str,
    owner: str, **fields: Any,
) -> None:  # fmt: skip
    """Make a schedule and print its id.

    \b
    streamjobs schedules create nightly nightly_report --cron "0 3 * * *" --timezone Europe/Berlin
    streamjobs schedules create pulse chat --every 3600 --prompt "Anything new?" --overlap skip
    """
    given = {"prompt": prompt} if prompt is not None and input_json is None else _decoded(input_json)
    said = {field: value for field, value in fields.items() if value is not None}
    record = _ask(url, owner, lambda api: api.create(name, kind, given, key=key, **said))
    if as_json:
        _print_json(record)
    else:
        click.echo(record["id"])


@schedules.command()
@click.argument("schedule_id")
@_JSON
@gateway_options
def show(schedule_id: str, as_json: bool, url: str, owner: str) -> None:
    """Show a schedule and when it comes due next.

    \b
    streamjobs schedules show SCHEDULE_ID
    """
    record = _ask(url, owner, lambda api: api.get(schedule_id))
    if as_json:
        _print_json(record)
    else:
        _print_one(record)


@schedules.command()
@click.argument("schedule_id")
@_JSON
@gateway_options
def pause(schedule_id: str, as_json: bool, url: str, owner: str) -> None:
    """Let a schedule's ticks pass without jobs.

    \b
    streamjobs schedules pause SCHEDULE_ID
    """
    _report(_ask(url, owner, lambda api: api.pause(schedule_id)), "paused", as_json)


@schedules.command()
@click.argument("schedule_id")
@_JSON
@gateway_options
def resume(schedule_id: str, as_json: bool, url: str, owner: str) -> None:
    """Let a paused schedule go on with its next tick.

    \b
    streamjobs schedules resume SCHEDULE_ID
    """
    record = _ask(url, owner, lambda api: api.resume(schedule_id))
    _report(record, f"resumed, next at {_when(record['next_ms'], _zone_of(record))}", as_json)


@schedules.command()
@click.argument("schedule_id")
@click.option("--key", default="", help="Idempotency key: the same key is the same job.")
@_JSON
@gateway_options
def trigger(schedule_id: str, key: str, as_json: bool, url: str, owner: str) -> None:
    """Submit a schedule's job now, also while it is paused, and print the job's id.

    \b
    streamjobs watch $(streamjobs schedules trigger SCHEDULE_ID)
    """
    job = _ask(url, owner, lambda api: api.trigger(schedule_id, key=key))
    if as_json:
        _print_json(job)
    else:
        click.echo(job["id"])


@schedules.command()
@click.argument("schedule_id")
@_JSON
@gateway_options
def delete(schedule_id: str, as_json: bool, url: str, owner: str) -> None:
    """Delete a schedule; jobs that it made live on. One that code declares comes back with the next worker.

    \b
    streamjobs schedules delete SCHEDULE_ID
    """
    _ask(url, owner, lambda api: api.delete(schedule_id))
    _report({"id": schedule_id, "deleted": True}, "deleted", as_json)


# --- what they share


def _ask(url: str, owner: str, act: Callable[[SchedulesClient], Awaitable[Result]]) -> Result:
    from streamjobs.client import Client

    async def ask() -> Result:
        async with Client(url, owner=owner, token=gateway_token()) as client:
            return await act(client.schedules)

    return run(ask())


def _decoded(text: str | None) -> Any:
    import msgspec

    from streamjobs.events import UNENCODABLE

    if text is None:
        return None
    try:
        return msgspec.json.decode(sys.stdin.read() if text == "-" else text)
    except UNENCODABLE as error:
        raise BadRequest(f"--input is not JSON: {error}") from error


def _report(record: dict[str, Any], what: str, as_json: bool) -> None:
    if as_json:
        _print_json(record)
    else:
        click.echo(f"{record['id']}  {what}")


def _print_table(records: list[dict[str, Any]]) -> None:
    rows = [("ID", "NAME", "KIND", "WHEN", "NEXT", "RUNS", "SKIPPED", "STATE")]
    rows += [
        (
            record["id"], record["name"], record["kind"], _rule_of(record),
            _when(record["next_ms"], _zone_of(record)), str(record["runs"]), str(record["skipped"]),
            _state_of(record),
        )
        for record in records
    ]  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo("  ".join(cells).rstrip())


def _print_one(record: dict[str, Any]) -> None:
    from streamjobs.cli.show import printable

    zone = _zone_of(record)
    lines = [
        f"{record['id']}  {record['name']}  {record['kind']}  {_state_of(record)}",
        f"  when     {_rule_of(record)}; missed: {record['missed']}; overlap: {record['overlap']}",
        f"  runs     {record['runs']}, skipped {record['skipped']}",
        f"  last     {_when(record['last_tick_ms'], zone)}  {record['last_job']}".rstrip(),
    ]
    if record["declared_by"]:
        lines.append(f"  declared by {record['declared_by']}, {_when(record['declared_ms'], zone)}")
    if record["error"]:
        lines.append(f"  error    {record['error']}")
    lines += [f"  coming   {_when(tick, zone)}" for tick in record["coming_ms"]]
    click.echo(printable("\n".join(lines)))


def _state_of(record: dict[str, Any]) -> str:
    if record["paused"]:
        return "paused"
    return "failing" if record["error"] else "active"


def _rule_of(record: dict[str, Any]) -> str:
    if "cron" in record:
        return f"{record['cron']} {record['timezone']}"
    return f"every {record['every']:g} s" + (f" + {record['offset']:g} s" if record["offset"] else "")


def _zone_of(record: dict[str, Any]) -> tzinfo:
    """The schedule's own, where this machine knows it."""
    from zoneinfo import ZoneInfo

    try:
        return ZoneInfo(record.get("timezone", "UTC"))
    except (KeyError, ValueError, OSError):
        return UTC


def _when(ms: int | None, zone: tzinfo) -> str:
    if ms is None:
        return "-"
    return datetime.fromtimestamp(ms / 1000, zone).isoformat(sep=" ", timespec="seconds")


def _print_json(value: Any) -> None:
    import msgspec

    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")
    sys.stdout.flush()
