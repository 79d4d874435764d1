"""The `streamjobs` command: its groups, and how errors look.

Rule 1: an error is one line on standard error and an exit status, never a traceback; `--debug` shows one.
Rule 2: standard output is for what was asked for: it can be piped.
Rule 3: a command imports what it needs when it runs: help is there at once.
"""

from __future__ import annotations

import sys

import click

from streamjobs.cli import control, look, operate
from streamjobs.cli.canary import canary
from streamjobs.cli.demo import demo
from streamjobs.cli.doctor import doctor
from streamjobs.cli.export import export
from streamjobs.cli.jobs import cancel, status, submit, watch
from streamjobs.cli.keys import keys
from streamjobs.cli.notices import notifications, webhooks
from streamjobs.cli.projections import projections, stats
from streamjobs.cli.roles import dev, gateway_process, projector, provider, serve, worker
from streamjobs.cli.schedules import schedules
from streamjobs.errors import StreamjobsError


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Settings: --config FILE, STREAMJOBS_<NAME> variables, --set NAME=VALUE; later ones win.",
)
@click.version_option(package_name="streamjobs", prog_name="streamjobs")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.pass_context
def cli(context: click.Context, debug: bool) -> None:
    """Durable AI jobs over Redis Streams.

    A job is submitted, runs in the background, and survives its worker; anybody may watch it, leave, and come
    back to exactly where they were.

    \b
    Try it:
      streamjobs demo                   everything at once, with a worker killed on the way
      streamjobs dev                    a gateway, a worker and a private Redis, in one process
      streamjobs submit --prompt Hi     then: streamjobs watch <job id>
    """
    context.obj = {"debug": debug}


for command in (
    dev, demo, serve, gateway_process, worker, projector, provider, doctor, canary,
    schedules, projections, stats, notifications, webhooks, keys,
    submit, watch, status, cancel, export,
    look.list_jobs, look.result, look.log, look.effects,
    control.pause, control.resume, control.signal, control.approve, control.deny, control.rerun,
    control.delete,
    operate.queues, operate.workers, operate.dead, operate.strike, operate.unstrike, operate.strikes,
):  # fmt: skip
    cli.add_command(command)


def main() -> None:
    """Run the command; turn errors into one line."""
    try:
        sys.exit(cli(standalone_mode=False))  # None, or the status of an `Exit`
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        _leave(_wrong_use(error), error.exit_code)
    except (click.exceptions.Abort, KeyboardInterrupt):
        _leave("stopped", 130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        _leave(_what_happened(error), 1)


def _wrong_use(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    hint = f" (see {context.command_path} --help)" if isinstance(context, click.Context) else ""
    return error.format_message().rstrip(".") + hint


def _what_happened(error: Exception) -> str:
    if isinstance(error, StreamjobsError):
        return f"{error} ({error.code})"
    if isinstance(error, OSError):
        return str(error)
    return f"unexpected {type(error).__name__}: {error} (streamjobs --debug … shows where)"


def _leave(message: str, status: int) -> None:
    one_line = " ".join(message.split())
    click.secho(f"streamjobs: {one_line}", fg="red" if status in {1, 2} else None, err=True)
    sys.exit(status)
