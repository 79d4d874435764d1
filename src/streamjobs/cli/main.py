"""The `streamjobs` command: its groups, and how errors look.

Rule 1: an error is one line on standard error and an exit status, never a traceback; `--debug` shows one.
Rule 2: standard output is for what was asked for: it can be piped.
"""

from __future__ import annotations

import sys
from importlib import metadata

import click

from streamjobs.cli.demo import demo
from streamjobs.cli.doctor import doctor
from streamjobs.cli.jobs import cancel, status, submit, watch
from streamjobs.cli.roles import dev, provider, serve, worker
from streamjobs.errors import StreamjobsError


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Settings come from --config FILE, STREAMJOBS_<NAME> variables, and --set NAME=VALUE, later ones winning.",
)
@click.version_option(metadata.version("streamjobs"), prog_name="streamjobs")
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


for command in (dev, demo, serve, worker, submit, watch, status, cancel, provider, doctor):
    cli.add_command(command)


def main() -> None:
    """Run the command; turn errors into one line."""
    try:
        cli(standalone_mode=False)
    except click.exceptions.Abort:
        _leave("stopped", 130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.exceptions.Exit as leaving:
        sys.exit(leaving.exit_code)
    except KeyboardInterrupt:
        _leave("stopped", 130)
    except StreamjobsError as error:
        if "--debug" in sys.argv:
            raise
        _leave(f"{error} ({error.code})", 1)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)


def _leave(message: str, status: int) -> None:
    click.secho(f"streamjobs: {message}", fg="red" if status == 1 else None, err=True)
    sys.exit(status)
