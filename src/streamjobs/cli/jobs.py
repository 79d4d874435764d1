"""Commands for people and scripts that use a gateway: submit, watch, status, cancel."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from streamjobs.cli.options import gateway_options, run
from streamjobs.errors import BadRequest

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
@click.option("--queue", default="", help="Which queue. Default: default.")
@click.option("--priority", type=click.Choice(["high", "default", "low"]), help="Which of its classes.")
@click.option("--key", default="", help="Idempotency key: the same key and input is the same job.")
@click.option("--watch", "follow", is_flag=True, help="Watch it to its end.")
@click.option("--json", "as_json", is_flag=True, help="Print the gateway's answer.")
@gateway_options
def submit(
    kind: str, prompt: str | None, model: str, agent: str, tools: tuple[str, ...], input_json: str | None,
    queue: str, priority: str | None, key: str, follow: bool, as_json: bool, url: str, owner: str,
) -> None:  # fmt: skip
    """Submit a job and print its id.

    \b
    streamjobs submit --prompt "What is in this folder?" --tool list_files --watch
    streamjobs submit security-review --input '{"path": "src"}'
    """
    body: dict[str, Any] = {"kind": kind, "input": _input(prompt, model, agent, tools, input_json)}
    body |= {name: value for name, value in (("queue", queue), ("priority", priority)) if value}
    run(_submit(url, owner, body, key, follow, as_json))


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
    sys.exit(run(_watch(url, owner, job_id, after, as_json)))


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
    from streamjobs.cli.show import printable

    view = run(_get(url, owner, job_id))
    if as_json:
        _print_json(view)
        return
    click.echo(
        f"{view['id']}  {view['kind']}  {view['status']}  attempt {view['attempt']}  cursor {view['cursor']}"
    )
    for call in view["tool_calls"]:
        click.echo(f"  {call['tool']}  {call['state']}")
    if view["text"]:
        click.echo(printable(view["text"]))
    if view["error"]:
        click.echo(printable(f"{view['error']['code']}: {view['error']['message']}"))


@click.command()
@click.argument("job_id")
@click.option("--reason", default="", help="Why, for the log.")
@click.option("--json", "as_json", is_flag=True, help="Print the gateway's answer.")
@gateway_options
def cancel(job_id: str, reason: str, as_json: bool, url: str, owner: str) -> None:
    """Ask a job to stop. Asking twice is asking once.

    \b
    streamjobs cancel JOB_ID --reason "no longer needed"
    """
    answer = run(_cancel(url, owner, job_id, reason))
    if as_json:
        _print_json(answer)
    else:
        click.echo(f"{job_id}  cancel requested")


def _input(prompt: str | None, model: str, agent: str, tools: tuple[str, ...], input_json: str | None) -> Any:
    if input_json is not None:
        return _decoded(sys.stdin.read() if input_json == "-" else input_json)
    if prompt is None:
        return None
    chat: dict[str, Any] = {"prompt": prompt, "model": model, "agent": agent, "tools": list(tools)}
    return {name: value for name, value in chat.items() if value}


def _decoded(text: str) -> Any:
    import msgspec

    from streamjobs.events import UNENCODABLE

    try:
        return msgspec.json.decode(text)
    except UNENCODABLE as error:
        raise BadRequest(f"--input is not JSON: {error}") from error


def _client(url: str, owner: str) -> Client:
    from streamjobs.client import Client

    return Client(url, owner=owner)


async def _submit(url: str, owner: str, body: dict[str, Any], key: str, follow: bool, as_json: bool) -> None:
    async with _client(url, owner) as client:
        answer = await client.submit(body, idempotency_key=key)
    if as_json:
        _print_json(answer)
    else:
        click.echo(answer["id"])
    if follow:
        sys.exit(await _watch(url, owner, answer["id"], "0", as_json))


async def _watch(url: str, owner: str, job_id: str, after: str | None, as_json: bool) -> int:
    import msgspec

    from streamjobs.cli.show import Screen

    screen = Screen()
    last = ""
    async with _client(url, owner) as client:
        async for event in client.watch(job_id, after):
            last = _end_of(event.type, event.data) or last
            if as_json:
                _print_json({"id": event.id, "type": event.type, "data": msgspec.Raw(event.raw)})
            else:
                screen.show(event)
        # a watcher that came after the end gets a snapshot, or nothing at all, and no terminal event
        last = last or (await client.get(job_id))["status"]
    return 0 if last == "completed" else _FAILED


def _end_of(kind: str, data: Any) -> str:
    if kind == "snapshot":
        return data["status"] if data["status"] in {"completed", "failed", "cancelled"} else ""
    return kind.removeprefix("job.") if kind in {"job.completed", "job.failed", "job.cancelled"} else ""


async def _get(url: str, owner: str, job_id: str) -> dict[str, Any]:
    async with _client(url, owner) as client:
        return await client.get(job_id)


async def _cancel(url: str, owner: str, job_id: str, reason: str) -> dict[str, Any]:
    async with _client(url, owner) as client:
        return await client.cancel(job_id, reason)


def _print_json(value: Any) -> None:
    import msgspec

    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")
    sys.stdout.flush()
