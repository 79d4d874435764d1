"""Commands for people and scripts that use a gateway: submit, watch, status, cancel."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

import click

from streamjobs.cli.look import print_result, result_of
from streamjobs.cli.options import ask, gateway_options, json_option, json_value
from streamjobs.cli.output import in_line, print_json, printable

if TYPE_CHECKING:
    from streamjobs.client import Client

_FAILED = 2


@click.command()
@click.argument("kind", default="chat")
@click.option("--prompt", help="For chat: what to ask.")
@click.option(
    "--model", default="", help="For chat: which model; openai:<name> and anthropic:<name> name the provider."
)
@click.option("--agent", default="", help="For chat: which agent answers.")
@click.option("--tool", "tools", multiple=True, help="For chat: a tool the model may use; may be repeated.")
@click.option(
    "--input", "input_json", help="For other kinds: the input as JSON; - reads it from standard input."
)
@click.option("--queue", default="", help="Which queue. Default: the workflow's own.")
@click.option("--priority", type=click.Choice(["high", "default", "low"]), help="Which of its classes.")
@click.option("--delay", type=float, help="Seconds before it may start.")
@click.option("--timeout", type=float, help="Seconds that it may take, from its first start; 0: any time.")
@click.option("--start-timeout", type=float, help="Seconds within which it must have started.")
@click.option("--concurrency-key", default="", help="Of the jobs with one key, one runs at a time.")
@click.option("--key", default="", help="Idempotency key: the same key and input is the same job.")
@click.option("--watch", "follow", is_flag=True, help="Watch it to its end.")
@click.option("--wait", is_flag=True, help="Wait for its end and print what came of it.")
@json_option
@gateway_options
def submit(
    kind: str, prompt: str | None, model: str, agent: str, tools: tuple[str, ...], input_json: str | None,
    key: str, follow: bool, wait: bool, as_json: bool, url: str, owner: str, **options: Any,
) -> None:  # fmt: skip
    """Submit a job and print its id.

    With --watch or --wait the exit status is 0 when it completed, 2 when it failed or was cancelled.

    \b
    streamjobs submit --prompt "What is in this folder?" --tool list_files --watch
    streamjobs submit security-review --input '{"path": "src"}' --timeout 600 --wait
    """
    if follow and wait:
        raise click.UsageError("either --watch or --wait")
    body: dict[str, Any] = {"kind": kind, "input": _input(prompt, model, agent, tools, input_json)}
    body |= {name: value for name, value in options.items() if value not in {"", None}}
    sys.exit(ask(url, owner, lambda client: _submit(client, body, key, follow, wait, as_json)))


@click.command()
@click.argument("job_id")
@click.option(
    "--after", help="A cursor to go on behind; 0 replays from the first event. Default: a snapshot first."
)
@click.option("--json", "as_json", is_flag=True, help="One event a line: {id, type, data}.")
@gateway_options
def watch(job_id: str, after: str | None, as_json: bool, url: str, owner: str) -> None:
    """Watch a job to its end; resumes by itself.

    Exit status 0 when it completed, 2 when it failed or was cancelled.

    \b
    streamjobs watch JOB_ID                  what is there so far, then what comes
    streamjobs watch JOB_ID --after 0        from the first event
    streamjobs watch JOB_ID --json | jq .type
    """
    sys.exit(ask(url, owner, lambda client: _watch(client, job_id, after, as_json)))


@click.command()
@click.argument("job_id")
@click.option("--json", "as_json", is_flag=True, help="The whole view.")
@gateway_options
def status(job_id: str, as_json: bool, url: str, owner: str) -> None:
    """Show where a job is.

    \b
    streamjobs status JOB_ID
    streamjobs status JOB_ID --json | jq .result
    """
    view = ask(url, owner, lambda client: client.get(job_id))
    if as_json:
        print_json(view)
        return
    click.echo(
        f"{view['id']}  {view['kind']}  {view['status']}  attempt {view['attempt']}  cursor {view['cursor']}"
    )
    for line in _details(view):
        click.echo(f"  {line}")
    if view["text"]:
        click.echo(printable(view["text"]))
    if view["error"]:
        click.echo(printable(f"{view['error']['code']}: {view['error']['message']}"))


@click.command()
@click.argument("job_id")
@click.option("--reason", default="", help="Why, for the log.")
@json_option
@gateway_options
def cancel(job_id: str, reason: str, as_json: bool, url: str, owner: str) -> None:
    """Ask a job to stop. Asking twice is asking once.

    \b
    streamjobs cancel JOB_ID --reason "no longer needed"
    """
    answer = ask(url, owner, lambda client: client.cancel(job_id, reason))
    if as_json:
        print_json(answer)
    else:
        click.echo(f"{job_id}  cancel requested")


def _input(prompt: str | None, model: str, agent: str, tools: tuple[str, ...], input_json: str | None) -> Any:
    if input_json is not None:
        return json_value("--input", input_json)
    if prompt is None:
        return None
    chat: dict[str, Any] = {"prompt": prompt, "model": model, "agent": agent, "tools": list(tools)}
    return {name: value for name, value in chat.items() if value}


def _details(view: dict[str, Any]) -> list[str]:
    """What a job waits for, does and has done, a line each."""
    lines = [f"waits for {in_line(view['waiting_for'])}"] if view.get("waiting_for") else []
    lines += [f"held: {in_line(view['held'])}"] if view.get("held") else []
    lines += [
        f"asks ({in_line(one['key'])}): {in_line(one['message'])}"
        for one in view.get("approvals", [])
        if one["state"] == "pending"
    ]
    lines += [f"{in_line(call['tool'])}  {call['state']}" for call in view["tool_calls"]]
    lines += [
        f"{in_line(step.get('name') or step['key'])}  {step['state']}" for step in view.get("steps", [])
    ]
    return lines


async def _submit(
    client: Client, body: dict[str, Any], key: str, follow: bool, wait: bool, as_json: bool
) -> int:  # fmt: skip
    answer = await client.submit(body, idempotency_key=key)
    if wait:
        click.echo(answer["id"], err=True)
        return print_result(await result_of(client, answer["id"], math.inf), as_json)
    print_json(answer) if as_json else click.echo(answer["id"])
    return await _watch(client, answer["id"], "0", as_json) if follow else 0


async def _watch(client: Client, job_id: str, after: str | None, as_json: bool) -> int:
    import msgspec

    from streamjobs.cli.show import Screen

    screen = Screen()
    last = ""
    async for event in client.watch(job_id, after):
        last = _end_of(event.type, event.data) or last
        if as_json:
            print_json({"id": event.id, "type": event.type, "data": msgspec.Raw(event.raw)})
        else:
            screen.show(event)
    # a watcher that came after the end gets a snapshot, or nothing at all, and no terminal event
    last = last or (await client.get(job_id))["status"]
    return 0 if last == "completed" else _FAILED


def _end_of(kind: str, data: Any) -> str:
    if kind == "snapshot":
        return data["status"] if data["status"] in {"completed", "failed", "cancelled"} else ""
    return kind.removeprefix("job.") if kind in {"job.completed", "job.failed", "job.cancelled"} else ""
