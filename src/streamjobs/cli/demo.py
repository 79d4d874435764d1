"""`streamjobs demo`: the whole system on this machine, hurt on purpose, and a proof that nothing was lost."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from streamjobs.cli.options import read_settings, run, settings_options

PROMPT = "What is in this folder, and what is this project about?"


@click.command()
@click.option("--once", is_flag=True, help="Exit after the proof: 0 if everything held.")
@click.option("--folder", type=click.Path(path_type=Path, exists=True, file_okay=False), default=Path(),
              help="The folder whose files the chat lists and reads. Default: the current one.")  # fmt: skip
@click.option("--prompt", default=PROMPT, show_default=True, help="What the chat is asked.")
@click.option("--model", default="", help="Default: default_model, or the scripted one without an API key.")
@click.option("--port", type=int, help="Port of the gateway. Default: 8400, or a free one.")
@settings_options
def demo(
    once: bool, folder: Path, prompt: str, model: str, port: int | None, redis_url: str | None,
    config: Path | None, assignments: tuple[str, ...],
) -> None:  # fmt: skip
    """Run a chat, hurt it, and prove that nothing was lost.

    Starts a Redis, a gateway and a worker. A chat with tools runs; its viewer leaves and comes back; its
    worker is killed in the middle of a sentence. What the viewer saw is then compared with the log.
    Afterwards it goes on serving, and prints what to try with curl.

    \b
    streamjobs demo --once                          the proof alone; exit status 0 if everything held
    OPENAI_API_KEY=… streamjobs demo --model gpt-5  with a real model
    """
    from streamjobs.cli.showcase import Showcase

    settings = read_settings(
        redis_url,
        config,
        assignments,
        port=port,
        files_root=str(folder.resolve()),
        default_model=model or None,
        log_level="error",
    )
    sys.exit(run(Showcase(settings, prompt, once=once, any_port=port is None).run()))
