"""What several commands share: settings from the command line, the gateway's address, JSON output."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from streamjobs.errors import BadRequest, ConfigError

if TYPE_CHECKING:
    from streamjobs.client import Client
    from streamjobs.config import Settings

Command = TypeVar("Command", bound=Callable[..., Any])
Result = TypeVar("Result")


def settings_options(command: Command) -> Command:
    """Add --redis-url, --config and --set."""
    for option in (
        click.option(
            "--set", "assignments", multiple=True, metavar="NAME=VALUE", help="Any setting; may be repeated."
        ),
        click.option("--config", type=click.Path(path_type=Path), help="A YAML or JSON file of settings."),
        click.option("--redis-url", help="redis://, rediss:// or unix://; default: $STREAMJOBS_REDIS_URL."),
    ):
        command = option(command)
    return command


def gateway_options(command: Command) -> Command:
    """Add --url and --owner, for commands that talk to a gateway."""
    for option in (
        click.option("--owner", default="", help="Act as this owner; $STREAMJOBS_TOKEN says who asks."),
        click.option(
            "--url",
            envvar="STREAMJOBS_URL",
            default="http://127.0.0.1:8400",
            show_default=True,
            help="The gateway.",
        ),
    ):
        command = option(command)
    return command


json_option = click.option("--json", "as_json", is_flag=True, help="Print the gateway's answer.")
"""Add --json."""


def ask(url: str, owner: str, call: Callable[[Client], Awaitable[Result]]) -> Result:
    """Connect to a gateway, make the call and leave."""
    return run(_asked(url, owner, call))


async def _asked(url: str, owner: str, call: Callable[[Client], Awaitable[Result]]) -> Result:
    from streamjobs.client import Client

    async with Client(url, owner=owner, token=gateway_token()) as client:
        return await call(client)


def gateway_token() -> str:
    """The credential for the gateway; a variable, since command lines are seen by others."""
    return os.environ.get("STREAMJOBS_TOKEN", "")


def json_value(option: str, text: str) -> Any:
    """An option's JSON; `-` is what standard input holds. Raises `BadRequest`."""
    import msgspec

    from streamjobs.events import UNENCODABLE

    try:
        return msgspec.json.decode(sys.stdin.read() if text == "-" else text)
    except UNENCODABLE as error:
        raise BadRequest(f"{option} is not JSON: {error}") from error


def read_settings(
    redis_url: str | None, config: Path | None, assignments: tuple[str, ...], **more: Any
) -> Settings:
    """Settings as the options say, with logs set up by them. Raises `ConfigError`."""
    from streamjobs.config import from_text, load_settings
    from streamjobs.logs import set_up_logs

    overrides: dict[str, Any] = {"redis_url": redis_url, **more}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise ConfigError("--set: expected NAME=VALUE")
        overrides[name.strip()] = from_text(name.strip(), value)
    settings = load_settings(file=config, **overrides)
    set_up_logs(settings)
    return settings


def require_redis(settings: Settings) -> Settings:
    """The settings, if they say where Redis is. Raises `ConfigError`."""
    if not settings.redis_url:
        raise ConfigError(
            "where is Redis? Give --redis-url or set STREAMJOBS_REDIS_URL (streamjobs dev brings its own)"
        )
    return settings


def run(main: Coroutine[Any, Any, Result]) -> Result:
    """Run a command's coroutine, on uvloop where there is one."""
    _tune_garbage_collection()
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    return uvloop.run(main)


def _tune_garbage_collection() -> None:
    """Let collections be rare, and leave what was imported out of them.

    A worker or gateway makes tens of thousands of short-lived objects a second; with Python's defaults a
    third of its time goes into looking for cycles among them and all modules.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)
