"""Commands for operators: queues, workers, dead, strike, unstrike, strikes."""

from __future__ import annotations

from typing import Any

import click

from streamjobs.cli.control import since_when
from streamjobs.cli.options import ask, gateway_options, json_option
from streamjobs.cli.output import duration, print_json, print_table, when

_SCOPE = click.Choice(["queue", "kind", "tool"])


@click.command()
@json_option
@gateway_options
def queues(as_json: bool, url: str, owner: str) -> None:
    """Show what waits and runs in each queue.

    \b
    streamjobs queues
    """
    found = ask(url, owner, lambda client: client.queues())
    if as_json:
        print_json(found)
        return
    rows = [(queue["name"], queue["waiting"], queue["held"], queue["running"],
             duration(queue["oldest_wait"]), "struck" if queue["struck"] else "")
            for queue in found]  # fmt: skip
    print_table(("QUEUE", "WAITING", "HELD", "RUNNING", "OLDEST WAIT", "STRUCK"), rows, "no queues")


@click.command()
@json_option
@gateway_options
def workers(as_json: bool, url: str, owner: str) -> None:
    """Show who works, on what, and how much.

    \b
    streamjobs workers
    """
    found = ask(url, owner, lambda client: client.workers())
    if as_json:
        print_json(found)
        return
    rows = [(worker["id"], worker["host"], worker["pid"], ",".join(worker["queues"]),
             f"{worker['running']}/{worker['concurrency']}", worker["processed"],
             when(worker["started_ms"]), "draining" if worker["draining"] else "")
            for worker in found]  # fmt: skip
    columns = ("WORKER", "HOST", "PID", "QUEUES", "RUNNING", "DONE", "SINCE", "STATE")
    print_table(columns, rows, "no workers")


@click.command()
@click.option("--kind", default="", help="Of this kind.")
@click.option("--queue", default="", help="Of this queue.")
@click.option("--code", default="", help="With this error code.")
@click.option("--of", default="", help="Of this owner.")
@click.option("--since", default="", help="Failed since then; 2h, 30m, 1d or an RFC 3339 time.")
@click.option("--limit", type=int, default=50, show_default=True, help="At most so many.")
@click.option("--cursor", default="", help="Go on behind an earlier answer's cursor.")
@json_option
@gateway_options
def dead(
    kind: str, queue: str, code: str, of: str, since: str, limit: int, cursor: str, as_json: bool, url: str,
    owner: str,
) -> None:  # fmt: skip
    """List failed jobs that nobody ran again, newest first, and why they failed.

    \b
    streamjobs dead --code timeout --since 2h     then: streamjobs rerun --dead --code timeout --since 2h
    """
    where: dict[str, Any] = {
        "kind": kind, "queue": queue, "code": code, "owner": of, "since": since_when(since), "limit": limit,
        "cursor": cursor,
    }  # fmt: skip
    answer = ask(url, owner, lambda client: client.dead(**where))
    if as_json:
        print_json(answer)
        return
    rows = [(job["id"], job["kind"], job["owner"], when(job["ended_ms"]), job["attempts"], job["crashes"],
             job["code"], job["message"])
            for job in answer["dead"]]  # fmt: skip
    columns = ("JOB", "KIND", "OWNER", "FAILED", "TRIES", "CRASHES", "CODE", "MESSAGE")
    print_table(columns, rows, "no dead jobs")
    if answer["cursor"]:
        click.echo(f"more: --cursor {answer['cursor']}", err=True)


@click.command()
@click.argument("scope", type=_SCOPE)
@click.argument("name")
@click.option("--reason", default="", help="Why, for whoever looks.")
@json_option
@gateway_options
def strike(scope: str, name: str, reason: str, as_json: bool, url: str, owner: str) -> None:
    """Stop a queue, a kind of job or a tool for the whole fleet; what runs runs on.

    \b
    streamjobs strike kind nightly_report --reason "the database is being moved"
    streamjobs strike tool send_mail
    """
    is_new = ask(url, owner, lambda client: client.strike(scope, name, reason))
    _say(scope, name, as_json, is_new, "struck" if is_new else "was struck already")


@click.command()
@click.argument("scope", type=_SCOPE)
@click.argument("name")
@json_option
@gateway_options
def unstrike(scope: str, name: str, as_json: bool, url: str, owner: str) -> None:
    """Let go on what was struck.

    \b
    streamjobs unstrike kind nightly_report
    """
    was_struck = ask(url, owner, lambda client: client.unstrike(scope, name))
    _say(scope, name, as_json, was_struck, "goes on" if was_struck else "was not struck")


@click.command()
@json_option
@gateway_options
def strikes(as_json: bool, url: str, owner: str) -> None:
    """Show what is stopped, by whom, why and since when.

    \b
    streamjobs strikes
    """
    found = ask(url, owner, lambda client: client.strikes())
    if as_json:
        print_json(found)
        return
    rows = [(one["scope"], one["name"], when(one["since_ms"]), one["by"], one["reason"]) for one in found]
    print_table(("SCOPE", "NAME", "SINCE", "BY", "REASON"), rows, "nothing is struck")


def _say(scope: str, name: str, as_json: bool, has_changed: bool, words: str) -> None:
    if as_json:
        print_json({"scope": scope, "name": name, "changed": has_changed})
    else:
        click.echo(f"{scope} {name}  {words}")
