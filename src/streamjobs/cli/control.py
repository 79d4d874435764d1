"""Commands that steer jobs: pause, resume, signal, approve, deny, rerun."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Any

import click

from streamjobs.cli.options import ask, gateway_options, json_option, json_value
from streamjobs.cli.output import print_json, print_table

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_AGO = re.compile(r"(\d{1,6})([smhd])", re.ASCII)


@click.command()
@click.argument("job_id")
@click.option("--reason", default="", help="Why, for the log.")
@json_option
@gateway_options
def pause(job_id: str, reason: str, as_json: bool, url: str, owner: str) -> None:
    """Park a job until it is resumed; a running one at its next recorded point.

    \b
    streamjobs pause JOB_ID --reason "until the provider is back"
    """
    answer = ask(url, owner, lambda client: client.pause(job_id, reason))
    _say(answer, as_json, "pause requested" if answer["status"] == "requested" else answer["status"])


@click.command()
@click.argument("job_id")
@click.option("--reason", default="", help="Why, for the log.")
@json_option
@gateway_options
def resume(job_id: str, reason: str, as_json: bool, url: str, owner: str) -> None:
    """Let a paused job go on.

    \b
    streamjobs resume JOB_ID
    """
    answer = ask(url, owner, lambda client: client.resume(job_id, reason))
    status = answer["status"]
    _say(answer, as_json, status if status == "resumed" else f"was not paused: {status}")


@click.command()
@click.argument("job_id")
@json_option
@gateway_options
def delete(job_id: str, as_json: bool, url: str, owner: str) -> None:
    """Forget an ended job, and everything of it, now.

    \b
    streamjobs delete JOB_ID
    """
    ask(url, owner, lambda client: client.delete(job_id))
    _say({"id": job_id, "deleted": True}, as_json, "deleted")


@click.command()
@click.argument("job_id")
@click.argument("name")
@click.option("--payload", help="What to send, as JSON; - reads it from standard input.")
@click.option("--key", default="", help="The same key is the same signal: it may be sent again.")
@json_option
@gateway_options
def signal(
    job_id: str, name: str, payload: str | None, key: str, as_json: bool, url: str, owner: str
) -> None:  # fmt: skip
    """Send a live job a value, which its code may wait for.

    \b
    streamjobs signal JOB_ID ready
    streamjobs signal JOB_ID chosen --payload '{"option": 2}' --key choice-1
    """
    value = None if payload is None else json_value("--payload", payload)
    _send(url, owner, job_id, name, value, key, as_json)


@click.command()
@click.argument("job_id")
@click.option("--comment", default="", help="For the log, and for the job.")
@click.option("--request", default="", help="Which request, by its key. Default: the oldest that waits.")
@json_option
@gateway_options
def approve(job_id: str, comment: str, request: str, as_json: bool, url: str, owner: str) -> None:
    """Say yes to what a job asks; `status` shows what that is.

    \b
    streamjobs approve JOB_ID --comment "checked with finance"
    """
    _send(url, owner, job_id, "approve", {"comment": comment, "key": request}, "", as_json)


@click.command()
@click.argument("job_id")
@click.option("--comment", default="", help="Why not; the job, and the model, are told.")
@click.option("--request", default="", help="Which request, by its key. Default: the oldest that waits.")
@json_option
@gateway_options
def deny(job_id: str, comment: str, request: str, as_json: bool, url: str, owner: str) -> None:
    """Say no to what a job asks.

    \b
    streamjobs deny JOB_ID --comment "not on a Friday"
    """
    _send(url, owner, job_id, "deny", {"comment": comment, "key": request}, "", as_json)


@click.command()
@click.argument("job_ids", nargs=-1)
@click.option("--dead", is_flag=True, help="Failed jobs by filter, in place of ids.")
@click.option("--kind", default="", help="With --dead: of this kind.")
@click.option("--queue", default="", help="With --dead: of this queue.")
@click.option("--code", default="", help="With --dead: with this error code.")
@click.option("--of", default="", help="With --dead: of this owner.")
@click.option("--since", default="", help="With --dead: failed since then; 2h, 30m, 1d or an RFC 3339 time.")
@click.option("--limit", type=int, default=100, show_default=True, help="With --dead: at most so many.")
@click.option("--all", "everything", is_flag=True, help="With --dead: without any filter.")
@click.option("--key", default="", help="The same key is the same new job: it may be sent again.")
@json_option
@gateway_options
def rerun(
    job_ids: tuple[str, ...], dead: bool, kind: str, queue: str, code: str, of: str, since: str, limit: int,
    everything: bool, key: str, as_json: bool, url: str, owner: str,
) -> None:  # fmt: skip
    """Run ended jobs again, each as a new job that is linked to it.

    \b
    streamjobs rerun JOB_ID
    streamjobs rerun --dead --code provider_error --since 2h
    """
    where = {"kind": kind, "queue": queue, "code": code, "owner": of, "since": since_when(since)}
    if bool(job_ids) == dead:
        raise click.UsageError("either job ids, or --dead and which of them")
    if dead and not any(where.values()) and not everything:
        raise click.UsageError("--dead wants a filter, or --all")
    if not dead and (any(where.values()) or everything):
        raise click.UsageError("filters go with --dead")
    pairs = (
        ask(url, owner, lambda client: client.rerun_dead(key=key, limit=limit, **where))
        if dead
        else ask(url, owner, lambda client: _rerun(client, job_ids, key))
    )
    if as_json:
        print_json({"rerun": pairs, "count": len(pairs)})
    else:
        print_table(("JOB", "RUNS AGAIN AS"), [(pair["from"], pair["to"]) for pair in pairs], "no such job")


async def _rerun(client: Any, job_ids: tuple[str, ...], key: str) -> list[dict[str, str]]:
    return [{"from": job_id, "to": (await client.rerun(job_id, key=key)).id} for job_id in job_ids]


def since_when(text: str) -> str:
    """`2h` as an RFC 3339 time two hours ago; anything else as it is."""
    match = _AGO.fullmatch(text)
    if match is None:
        return text
    return (datetime.now(UTC) - timedelta(**{_UNITS[match[2]]: int(match[1])})).isoformat()


def _send(url: str, owner: str, job_id: str, name: str, payload: Any, key: str, as_json: bool) -> None:
    is_new = ask(url, owner, lambda client: client.signal(job_id, name, payload, key=key))
    answer = {"id": job_id, "signal": name, "repeated": not is_new}
    _say(answer, as_json, f"{name} sent" if is_new else f"{name} had been sent before")


def _say(answer: dict[str, Any], as_json: bool, words: str) -> None:
    if as_json:
        print_json(answer)
    else:
        click.echo(f"{answer['id']}  {words}")
