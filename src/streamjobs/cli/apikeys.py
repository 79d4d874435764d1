"""`streamjobs keys create | list | revoke | forget`: API keys, made and ended where Redis is reached."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from streamjobs.cli.options import json_option, read_settings, require_redis, run, settings_options

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from streamjobs.identity.apikey import ApiKey
    from streamjobs.store import Store


@click.command()
@click.option("--tenant", default="default", show_default=True, help="Whose data it may reach.")
@click.option("--subject", required=True, help="Whom it stands for: owner of what is made with it.")
@click.option(
    "--scope", "scopes", multiple=True, help="jobs:read, jobs:write (both without this), act-as, admin."
)
@click.option("--days", type=click.FloatRange(min=0), default=0.0, help="Days until it expires; 0: never.")
@click.option("--label", default="", help="What it is for.")
@json_option
@settings_options
def create(
    tenant: str,
    subject: str,
    scopes: tuple[str, ...],
    days: float,
    label: str,
    as_json: bool,
    redis_url: str | None,
    config: Path | None,
    assignments: tuple[str, ...],
) -> None:
    """Make an API key and print it; it is shown this once.

    \b
    streamjobs keys create --tenant acme --subject backend --scope jobs:read --scope jobs:write --scope act-as
    """
    from streamjobs.identity.principal import DEFAULT_SCOPES, scopes_of, subject_of, tenant_of

    wanted: dict[str, Any] = {
        "tenant": tenant_of(tenant),
        "subject": subject_of(subject),
        "scopes": scopes_of(scopes) if scopes else DEFAULT_SCOPES,
        "label": label,
        "ttl": days * 86400,
    }

    async def make(store: Store) -> tuple[ApiKey, str]:
        return await store.api_keys.create(**wanted)

    key, text = _with_store(redis_url, config, assignments, make)
    if as_json:
        _print({**_described(key), "key": text})
        return
    click.echo(text)
    if sys.stderr.isatty():
        click.echo("Keep it: it is not shown again.", err=True)


@click.command("list")
@json_option
@settings_options
def list_keys(
    as_json: bool, redis_url: str | None, config: Path | None, assignments: tuple[str, ...]
) -> None:
    """List all API keys, oldest first; never what opens them."""

    async def read(store: Store) -> tuple[list[ApiKey], int]:
        return await store.api_keys.all(), await store.now_ms()

    found, now_ms = _with_store(redis_url, config, assignments, read)
    if as_json:
        _print([_described(key) for key in found])
        return
    for key in found:
        state = "good" if key.is_good(now_ms) else "revoked" if key.revoked_ms else "expired"
        scopes = " ".join(sorted(key.scopes))
        click.echo(f"{key.shown}  {state:<8} {key.tenant}/{key.subject}  {scopes}  {key.label}".rstrip())


@click.command()
@click.argument("key_id")
@settings_options
def revoke(key_id: str, redis_url: str | None, config: Path | None, assignments: tuple[str, ...]) -> None:
    """End an API key, named by its id or its first part; gateways hear of it within `auth_cache`."""
    was_good = _with_store(
        redis_url, config, assignments, lambda store: store.api_keys.revoke(_id_of(key_id))
    )
    click.echo("revoked" if was_good else "it was revoked before")


@click.command()
@click.argument("key_id")
@settings_options
def forget(key_id: str, redis_url: str | None, config: Path | None, assignments: tuple[str, ...]) -> None:
    """Remove an API key, which ends it, from the list."""
    was_there = _with_store(
        redis_url, config, assignments, lambda store: store.api_keys.forget(_id_of(key_id))
    )
    click.echo("forgotten" if was_there else "there is no such key")


def _with_store(
    redis_url: str | None,
    config: Path | None,
    assignments: tuple[str, ...],
    act: Callable[[Store], Awaitable[Any]],
) -> Any:
    settings = require_redis(read_settings(redis_url, config, assignments))

    async def main() -> Any:
        from streamjobs.store import Store

        store = await Store.open(settings)
        try:
            return await act(store)
        finally:
            await store.aclose()

    return run(main())


def _id_of(text: str) -> str:
    return text.removeprefix("sjk_").split("_", 1)[0]


def _described(key: ApiKey) -> dict[str, Any]:
    import msgspec

    fields = msgspec.structs.asdict(key)
    del fields["digest"]
    return {**fields, "scopes": sorted(key.scopes), "shown": key.shown}


def _print(value: Any) -> None:
    import msgspec

    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")
