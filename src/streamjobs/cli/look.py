"""Commands that look at jobs: list, result, log, effects."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from streamjobs.cli.control import since_when
from streamjobs.cli.options import ask, gateway_options, json_option
from streamjobs.cli.output import in_line, json_text, print_json, print_table, printable, when, why

if TYPE_CHECKING:
    from streamjobs.client import Client

_FAILED, _NOT_ENDED = 2, 3
_STATUSES = (
    "queued", "running", "scheduled", "waiting", "paused", "completed", "failed", "cancelled",
)  # fmt: skip


@click.command("list")
@click.option("--status", default="", type=click.Choice(("", *_STATUSES)), help="Only those.")
@click.option("--kind", default="", help="Only those.")
@click.option("--queue", default="", help="Only those.")
@click.option("--thread", default="", help="Only those of this thread.")
@click.option("--message", default="", help="Only those of this message.")
@click.option("--since", default="", help="Submitted since then; 2h, 30m, 1d or an RFC 3339 time.")
@click.option("--until", default="", help="Submitted before then.")
@click.option("--counts", is_flag=True, help="Also say how many of all the owner's jobs are where.")
@click.option("--limit", type=int, default=20, show_default=True, help="At most so many.")
@click.option("--cursor", default="", help="Go on behind an earlier answer's cursor.")
@json_option
@gateway_options
def list_jobs(as_json: bool, url: str, owner: str, counts: bool, **where: Any) -> None:
    """List the owner's jobs, newest first.

    \b
    streamjobs list --status failed --limit 50
    streamjobs list --thread t-17 --since 1d
    streamjobs list --owner alice --json | jq .jobs[].id
    """
    where |= {name: since_when(where[name]) for name in ("since", "until")}
    answer = ask(url, owner, lambda client: client.jobs(**where, counts=int(counts) or None))
    if as_json:
        print_json(answer)
        return
    rows = [(job["id"], job["kind"], job["status"], job["queue"], when(job["created_ms"]))
            for job in answer["jobs"]]  # fmt: skip
    print_table(("JOB", "KIND", "STATUS", "QUEUE", "SUBMITTED"), rows, "no jobs")
    if counts:
        click.echo("  ".join(f"{status} {n}" for status, n in answer["counts"].items()), err=True)
    if answer["cursor"]:
        click.echo(f"more: --cursor {answer['cursor']}", err=True)


@click.command()
@click.argument("job_id")
@click.option("--wait", type=float, help="Wait up to so many seconds for its end.")
@click.option("--json", "as_json", is_flag=True, help="Summary, artifacts, metrics and error too.")
@gateway_options
def result(job_id: str, wait: float | None, as_json: bool, url: str, owner: str) -> None:
    """Print what came of a job: text as it is, anything else as JSON.

    Exit status 0 when it completed, 2 when it failed or was cancelled, 3 when it has not ended.

    \b
    streamjobs result JOB_ID --wait 60
    streamjobs result JOB_ID --json | jq .metrics
    """
    sys.exit(print_result(ask(url, owner, lambda client: result_of(client, job_id, wait)), as_json))


async def result_of(client: Client, job_id: str, wait: float | None) -> dict[str, Any]:
    """What came of a job; an output that is kept as an artifact is fetched."""
    import msgspec

    answer = await (client.result(job_id) if wait is None else client.wait(job_id, wait))
    if answer["output_artifact"]:
        content = await client.artifact(job_id, answer["output_artifact"])
        answer["output"] = msgspec.json.decode(content)
    return answer


def print_result(answer: dict[str, Any], as_json: bool) -> int:
    """Print what came of a job; returns the exit status."""
    status = answer["status"]
    if as_json:
        print_json(answer)
    elif status == "completed":
        output = answer["output"]
        click.echo(printable(output)) if isinstance(output, str) else print_json(output)
    else:
        click.echo(f"streamjobs: {status}  {why(answer['error'])}".rstrip(" -"), err=True)
    if status == "completed":
        return 0
    return _FAILED if status in {"failed", "cancelled"} else _NOT_ENDED


@click.command()
@click.argument("job_id")
@click.option(
    "--level", default="debug", type=click.Choice(["debug", "info", "warning", "error", "critical"]),
    show_default=True, help="From this level up.",
)  # fmt: skip
@click.option("--limit", type=int, default=1000, show_default=True, help="The newest so many.")
@json_option
@gateway_options
def log(job_id: str, level: str, limit: int, as_json: bool, url: str, owner: str) -> None:
    """Show what a job's code has written for people.

    \b
    streamjobs log JOB_ID --level warning
    """
    lines = ask(url, owner, lambda client: client.log(job_id, level=level, limit=limit))
    if as_json:
        print_json(lines)
        return
    for line in lines:
        data = "" if line["data"] is None else f"  {in_line(json_text(line['data']))}"
        click.echo(f"{when(line['ts'])}  {in_line(line['level']):<8} {in_line(line['message'])}{data}")


@click.command()
@click.argument("job_id")
@json_option
@gateway_options
def effects(job_id: str, as_json: bool, url: str, owner: str) -> None:
    """Show every tool call and step of a job, and how far it is known to be.

    `unknown` was started and lost its worker: it may have taken effect.

    \b
    streamjobs effects JOB_ID
    """
    found = ask(url, owner, lambda client: client.effects(job_id))
    if as_json:
        print_json(found)
        return
    columns = ("KIND", "NAME", "KEY", "STATE", "EFFECT", "TRIES", "MS", "APPROVAL", "ERROR")
    rows = [
        (row["kind"], row["name"], row["key"], row["state"], row["effect"], row["attempts"], row["ms"],
         row["approval"], why(row["error"]))
        for row in found
    ]  # fmt: skip
    print_table(columns, rows, "no effects")
