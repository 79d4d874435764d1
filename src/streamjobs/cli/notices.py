"""The `notifications` and `webhooks` commands: what an owner is told, and where it is sent."""

from __future__ import annotations

from typing import Any

import click

from streamjobs.cli.options import ask, gateway_options, json_option
from streamjobs.cli.output import in_line, print_json, print_table, when

_HOOK = click.argument("webhook_id")


@click.group()
def notifications() -> None:
    """What you are told of your jobs: ended, failed, waiting for an approval.

    \b
    streamjobs notifications list
    """


@notifications.command("list")
@click.option("--unread", is_flag=True, help="Only those that are not read.")
@click.option("--limit", type=int, default=50, show_default=True, help="At most so many.")
@click.option("--cursor", default="", help="Go on behind an earlier answer's cursor.")
@json_option
@gateway_options
def list_notices(unread: bool, limit: int, cursor: str, as_json: bool, url: str, owner: str) -> None:
    """List notices, newest first; `*` marks what is not read.

    \b
    streamjobs notifications list --unread
    """
    answer = ask(
        url, owner, lambda client: client.notifications.list(unread=unread, limit=limit, cursor=cursor)
    )
    if as_json:
        print_json(answer)
        return
    rows = [("" if one["read"] else "*", one["id"], when(one["about"].get("ts")), one["type"], one["job"],
             one["about"].get("kind"), one["about"].get("message"))
            for one in answer["notifications"]]  # fmt: skip
    print_table(("", "ID", "WHEN", "WHAT", "JOB", "KIND", "MESSAGE"), rows, "no notices")
    if answer["cursor"]:
        click.echo(f"more: --cursor {answer['cursor']}", err=True)


@notifications.command()
@click.argument("ids", nargs=-1)
@click.option("--until", default="", metavar="ID", help="That one, and all that are older.")
@json_option
@gateway_options
def read(ids: tuple[str, ...], until: str, as_json: bool, url: str, owner: str) -> None:
    """Mark notices as read.

    \b
    streamjobs notifications read 1795308028216
    streamjobs notifications read --until 1795308028216
    """
    if not ids and not until:
        raise click.UsageError("which? Give ids, or --until ID")
    marked = ask(url, owner, lambda client: client.notifications.read(*ids, until=until))
    if as_json:
        print_json({"marked": marked})
    else:
        click.echo(f"{marked} marked as read")


@click.group()
def webhooks() -> None:
    """Where what happens to your jobs is sent: an https address, or mailto:.

    \b
    streamjobs webhooks create https://example.org/hook
    """


@webhooks.command()
@click.argument("target")
@click.option(
    "--event", "events", multiple=True, help="job.completed, x.*, …; may be repeated. Default: all ours."
)
@click.option("--kind", "kinds", multiple=True, help="Only jobs of this kind; may be repeated.")
@json_option
@gateway_options
def create(
    target: str, events: tuple[str, ...], kinds: tuple[str, ...], as_json: bool, url: str, owner: str
) -> None:
    """Make a webhook and print its id and its secret, which is not shown again.

    \b
    streamjobs webhooks create https://example.org/hook --event job.completed --kind nightly_report
    """
    record = ask(
        url, owner, lambda client: client.webhooks.create(target, events=events or None, kinds=kinds)
    )
    if as_json:
        print_json(record)
    else:
        click.echo(f"{record['id']}  {record['secret']}")


@webhooks.command("list")
@json_option
@gateway_options
def list_webhooks(as_json: bool, url: str, owner: str) -> None:
    """List webhooks, oldest first.

    \b
    streamjobs webhooks list
    """
    found = ask(url, owner, lambda client: client.webhooks.list())
    if as_json:
        print_json(found)
        return
    rows = [(one["id"], one["url"], ",".join(one["events"]), ",".join(one["kinds"]), _state_of(one))
            for one in found]  # fmt: skip
    print_table(("ID", "URL", "EVENTS", "KINDS", "STATE"), rows, "no webhooks")


@webhooks.command()
@_HOOK
@json_option
@gateway_options
def delete(webhook_id: str, as_json: bool, url: str, owner: str) -> None:
    """Delete a webhook, and what it did not take.

    \b
    streamjobs webhooks delete WEBHOOK_ID
    """
    ask(url, owner, lambda client: client.webhooks.delete(webhook_id))
    _report({"id": webhook_id, "deleted": True}, "deleted", as_json)


@webhooks.command()
@_HOOK
@json_option
@gateway_options
def rotate(webhook_id: str, as_json: bool, url: str, owner: str) -> None:
    """Give a webhook another secret and print it; for a day the one before signs too.

    \b
    streamjobs webhooks rotate WEBHOOK_ID
    """
    secret = ask(url, owner, lambda client: client.webhooks.rotate(webhook_id))
    _report({"id": webhook_id, "secret": secret}, secret, as_json)


@webhooks.command()
@_HOOK
@json_option
@gateway_options
def enable(webhook_id: str, as_json: bool, url: str, owner: str) -> None:
    """Send to a webhook again.

    \b
    streamjobs webhooks enable WEBHOOK_ID
    """
    _report(ask(url, owner, lambda client: client.webhooks.enable(webhook_id)), "enabled", as_json)


@webhooks.command()
@_HOOK
@json_option
@gateway_options
def disable(webhook_id: str, as_json: bool, url: str, owner: str) -> None:
    """Send nothing to a webhook until it is enabled.

    \b
    streamjobs webhooks disable WEBHOOK_ID
    """
    _report(ask(url, owner, lambda client: client.webhooks.disable(webhook_id)), "disabled", as_json)


@webhooks.command()
@_HOOK
@click.option("--limit", type=int, default=100, show_default=True, help="At most so many.")
@json_option
@gateway_options
def undelivered(webhook_id: str, limit: int, as_json: bool, url: str, owner: str) -> None:
    """List what a webhook did not take, newest first, and why.

    \b
    streamjobs webhooks undelivered WEBHOOK_ID
    """
    found = ask(url, owner, lambda client: client.webhooks.undelivered(webhook_id, limit))
    if as_json:
        print_json(found)
        return
    rows = [(one["id"], one["job"], one["content"]["type"], when(one["given_up_ms"]), one["tried"],
             one["error"])
            for one in found]  # fmt: skip
    print_table(("ID", "JOB", "WHAT", "GIVEN UP", "TRIES", "WHY"), rows, "nothing is undelivered")


@webhooks.command()
@_HOOK
@click.argument("ids", nargs=-1, required=True)
@json_option
@gateway_options
def rerun(webhook_id: str, ids: tuple[str, ...], as_json: bool, url: str, owner: str) -> None:
    """Send again what a webhook did not take, under the same ids.

    \b
    streamjobs webhooks rerun WEBHOOK_ID DELIVERY_ID
    """
    count = ask(url, owner, lambda client: client.webhooks.rerun(webhook_id, *ids))
    _report({"id": webhook_id, "count": count}, f"{count} sent again", as_json)


def _state_of(record: dict[str, Any]) -> str:
    return f"disabled: {record['disabled_why']}" if record["disabled"] else "active"


def _report(record: dict[str, Any], what: str, as_json: bool) -> None:
    if as_json:
        print_json(record)
    else:
        click.echo(f"{in_line(record['id'])}  {what}")
