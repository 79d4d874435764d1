"""Commands about what projections keep: projections list, lag, rebuild, retry; stats."""

from __future__ import annotations

from typing import Any

import click

from streamjobs.cli.control import since_when
from streamjobs.cli.options import ask, gateway_options, json_option
from streamjobs.cli.output import duration, in_line, print_json, print_table, when

_QUANTILES = (0.5, 0.95)


@click.group()
def projections() -> None:
    """Look after what is folded from the logs: lists, statistics.

    \b
    streamjobs projections list
    streamjobs projections rebuild index
    """


@projections.command("list")
@json_option
@gateway_options
def list_projections(as_json: bool, url: str, owner: str) -> None:
    """Show every projection: how far it is behind, who runs it, and where it failed.

    \b
    streamjobs projections list
    """
    found = ask(url, owner, lambda client: client.projections())
    if as_json:
        print_json(found)
        return
    rows = [(one["name"], one["notes"], duration(one["seconds"]), one["consumers"], one["quarantined"],
             one["rebuild"])
            for one in found]  # fmt: skip
    print_table(("PROJECTION", "BEHIND", "AGE", "PROJECTORS", "QUARANTINED", "REBUILD"), rows, "none")
    for one in found:
        for error in one["errors"]:
            what = in_line(error["error"])
            click.echo(f"{one['name']}  {error['job']} at {error['seq']}: {what}", err=True)


@projections.command()
@json_option
@gateway_options
def lag(as_json: bool, url: str, owner: str) -> None:
    """Show how many notes each projection has yet to read, and how old the oldest is, in seconds.

    \b
    streamjobs projections lag
    """
    found = ask(url, owner, lambda client: client.projections())
    if as_json:
        print_json({one["name"]: {"notes": one["notes"], "seconds": one["seconds"]} for one in found})
        return
    for one in found:
        click.echo(f"{one['name']}  {one['notes']} notes  {one['seconds']:.3f} s")


@projections.command()
@click.argument("name")
@json_option
@gateway_options
def rebuild(name: str, as_json: bool, url: str, owner: str) -> None:
    """Make a projection anew from the logs, while everything runs on; a projector does it.

    Until it is done (`projections list` says so), lists and statistics lack what it has not come to yet.

    \b
    streamjobs projections rebuild index
    """
    answer = ask(url, owner, lambda client: client.rebuild_projection(name))
    print_json(answer) if as_json else click.echo(f"{name}  a projector will rebuild it")


@projections.command()
@click.argument("name")
@json_option
@gateway_options
def retry(name: str, as_json: bool, url: str, owner: str) -> None:
    """Let a projection look again at the jobs on which it failed.

    \b
    streamjobs projections retry stats
    """
    answer = ask(url, owner, lambda client: client.retry_projection(name))
    print_json(answer) if as_json else click.echo(f"{name}  {answer['retried']} jobs are looked at again")


@click.command()
@click.option("--kind", default="", help="Only this kind.")
@click.option("--queue", default="", help="Only this queue.")
@click.option("--history", type=click.Choice(["5m", "1h"]), help="In steps: a day of 5m, two weeks of 1h.")
@click.option("--since", default="", help="With --history: from then on; 2h, 30m, 1d or an RFC 3339 time.")
@json_option
@gateway_options
def stats(
    kind: str, queue: str, history: str | None, since: str, as_json: bool, url: str, owner: str
) -> None:
    """Show how many jobs there were of each kind and queue, what became of them, and how long they took.

    WAIT, RUN and TOKEN (the first of a turn) are medians and, behind the slash, what 95 of 100 stay below.

    \b
    streamjobs stats
    streamjobs stats --kind chat --history 5m --since 2h
    """
    where = {"kind": kind, "queue": queue, "history": history, "since": since_when(since)}
    answer = ask(url, owner, lambda client: client.stats(**where))
    if as_json:
        print_json(answer)
        return
    steps: list[dict[str, Any]] = answer["history"] if history else [{"stats": answer["stats"]}]
    rows = [(*((when(step["at_ms"]),) if history else ()), *_row(one))
            for step in steps for one in step["stats"]]  # fmt: skip
    columns = ("KIND", "QUEUE", "NEW", "NOW", "DONE", "FAILED", "CANCELLED", "RETRIES", "CRASHES", "WAIT",
               "RUN", "TOKEN", "TOKENS")  # fmt: skip
    print_table((*(("FROM",) if history else ()), *columns), rows, "nothing was counted")


def _row(one: dict[str, Any]) -> tuple[Any, ...]:
    return (one["kind"], one["queue"], one["submitted"], sum(one["now"].values()), one["completed"],
            one["failed"], one["cancelled"], one["retries"], one["crashes"], _spread(one["wait_seconds"]),
            _spread(one["run_seconds"]), _spread(one["first_token_seconds"]),
            one["input_tokens"] + one["output_tokens"])  # fmt: skip


def _spread(histogram: dict[str, Any]) -> str:
    """The bounds that hold the median and 95 of 100."""
    if not histogram["count"]:
        return ""
    return "/".join(_bound(histogram, quantile) for quantile in _QUANTILES)


def _bound(histogram: dict[str, Any], quantile: float) -> str:
    enough = quantile * histogram["count"]
    bounds = (bound for bound, size in histogram["buckets"].items() if size >= enough)
    bound = next(bounds, None)
    return "more" if bound is None else f"{bound}s"
