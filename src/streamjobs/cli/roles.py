"""Commands that run a role: dev (all of them), serve, worker, projector, provider."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from streamjobs.cli.options import read_settings, require_redis, run, settings_options

if TYPE_CHECKING:
    from streamjobs.config import Settings

_APP = click.argument("app", required=False, metavar="[MODULE:APP]")


@click.command()
@_APP
@click.option("--host", help="Address to listen on.")
@click.option("--port", type=int, help="Port of the API.")
@settings_options
def dev(
    app: str | None, host: str | None, port: int | None, redis_url: str | None, config: Path | None,
    assignments: tuple[str, ...],
) -> None:  # fmt: skip
    """Run everything in one process, with a private Redis.

    The Redis is the one at --redis-url, or a redis-server started for this process with its data in data_dir,
    or, where there is none, fakeredis (and then nothing survives). Without an API key a scripted provider
    answers.

    \b
    streamjobs dev                                  then: streamjobs submit --prompt Hi --watch
    streamjobs dev mypackage.jobs:app --port 9000   with your own workflows and tools
    """
    from streamjobs.cli.local import run_dev

    settings = read_settings(redis_url, config, assignments, host=host, port=port)
    run(run_dev(settings, app))


@click.command()
@_APP
@click.option("--host", help="Address to listen on.")
@click.option("--port", type=int, help="Port of the API.")
@click.option("--ops-port", type=int, help="Probes and metrics on a port of their own.")
@click.option("--workers", type=int, help="Processes that share the port; one that dies is replaced.")
@settings_options
@click.pass_context
def serve(
    context: click.Context, app: str | None, host: str | None, port: int | None, ops_port: int | None,
    workers: int | None, redis_url: str | None, config: Path | None, assignments: tuple[str, ...],
) -> None:  # fmt: skip
    """Run the gateway: the API, and SSE for any number of viewers.

    MODULE:APP names your App: submissions are checked against its workflows, agents and tools.

    \b
    streamjobs serve --redis-url redis://redis:6379 --host 0.0.0.0 --set auth=keys
    streamjobs serve mypackage.jobs:app --ops-port 9090
    streamjobs serve mypackage.jobs:app --workers 4
    """
    settings = require_redis(
        read_settings(
            redis_url, config, assignments, host=host, port=port, ops_port=ops_port, serve_workers=workers
        )
    )
    if settings.serve_workers > 1:
        _supervise(context, settings, app)
        return
    from streamjobs.cli.local import chosen_app
    from streamjobs.gateway.app import serve as serve_gateway

    run(serve_gateway(settings, chosen_app(app)))


def _supervise(context: click.Context, settings: Settings, app: str | None) -> None:
    from streamjobs.gateway.supervisor import supervise

    flags = ["--debug"] if context.obj["debug"] else []
    # -P: a file of the current folder that is named like one of ours, or of Python's, must not hide it
    command = [sys.executable, "-P", "-m", "streamjobs", *flags, gateway_process.name or ""]
    status = run(supervise(settings, app, command))
    if status:
        raise click.exceptions.Exit(status if status > 0 else 128 - status)


@click.command(hidden=True)
@click.argument("channel", type=int)
def gateway_process(channel: int) -> None:
    """Be one of several gateway processes, as told by the supervisor at the other end of the channel."""
    from streamjobs.cli.local import chosen_app
    from streamjobs.gateway.member import Channel, serve_as_member
    from streamjobs.logs import set_up_logs

    heard = Channel(channel)
    orders = heard.orders()
    set_up_logs(orders.settings)
    run(serve_as_member(heard, orders, chosen_app(orders.app)))


@click.command()
@_APP
@click.option(
    "--queue", "queues", multiple=True, help="A queue to work on; may be repeated. Default: all of them."
)
@click.option("--concurrency", type=int, help="Jobs at once.")
@settings_options
def worker(
    app: str | None, queues: tuple[str, ...], concurrency: int | None, redis_url: str | None,
    config: Path | None, assignments: tuple[str, ...],
) -> None:  # fmt: skip
    """Run a worker until SIGTERM, which drains it.

    What cannot end within drain_grace is handed back, and goes on elsewhere. MODULE:APP names your App;
    without one it runs the built-in chat.

    \b
    streamjobs worker --redis-url redis://redis:6379
    streamjobs worker mypackage.jobs:app --queue bulk --concurrency 50
    """
    from streamjobs.cli.local import chosen_app, run_worker

    settings = require_redis(read_settings(redis_url, config, assignments, concurrency=concurrency))
    unknown = sorted(set(queues) - set(settings.queues))
    if unknown:
        raise click.UsageError(
            f"not a declared queue: {', '.join(unknown)} (setting queues: {', '.join(settings.queues)})"
        )
    run(run_worker(settings, chosen_app(app), queues))


@click.command()
@click.option(
    "--projection", "names", multiple=True, help="A projection to run; may be repeated. Default: the setting."
)
@settings_options
def projector(
    names: tuple[str, ...], redis_url: str | None, config: Path | None, assignments: tuple[str, ...]
) -> None:
    """Run projections until SIGTERM: what lists, statistics and notifications show.

    Any number of projectors share the work; what one leaves behind, another takes over.

    \b
    streamjobs projector --redis-url redis://redis:6379
    streamjobs projector --projection index --projection stats
    """
    from streamjobs.cli.local import run_projector

    settings = read_settings(redis_url, config, assignments, projections=list(names) or None)
    run(run_projector(require_redis(settings)))


@click.command()
@click.option("--scenario", type=click.Path(path_type=Path), help="A YAML or JSON file; default: the demo's.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=int, default=8500, show_default=True, help="Port to listen on.")
def provider(scenario: Path | None, host: str, port: int) -> None:
    """Run the scripted provider: a model server for tests.

    It follows a scenario, faults included, and speaks OpenAI's chat completions and Anthropic's messages.

    \b
    streamjobs provider --port 8500
    streamjobs worker --set openai_base_url=http://127.0.0.1:8500/v1
    streamjobs worker --set anthropic_base_url=http://127.0.0.1:8500
    """
    from streamjobs.testing import DEMO, load_scenario
    from streamjobs.testing import serve as serve_provider

    script = DEMO if scenario is None else load_scenario(scenario)
    click.echo(f"scripted provider on http://{host}:{port} (no model answers here)", err=True)
    serve_provider(script, host, port)
