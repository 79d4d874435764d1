"""Commands about encryption at rest, of the group `keys`: rotate, shred."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from streamjobs.cli.options import read_settings, require_redis, run, settings_options

if TYPE_CHECKING:
    from streamjobs.config import Settings
    from streamjobs.store import Rotated, Store, Vault


@click.command()
@click.option("--batch", default=500, show_default=True, help="Data keys that are looked at in one call.")
@settings_options
def rotate(batch: int, redis_url: str | None, config: Path | None, assignments: tuple[str, ...]) -> None:
    """Wrap all data keys with the first of `encryption_keys`, so that the others may go.

    The system runs on meanwhile. What was stopped is begun again: what is done is passed over. Exit status 1
    where a data key could not be unwrapped.

    \b
    1. Give every process the new key behind the old one:  old:…,new:…
    2. Give every process the new key in front:            new:…,old:…
    3. streamjobs keys rotate
    4. Take the old key away:                              new:…
    """
    settings = require_redis(read_settings(redis_url, config, assignments))
    done = run(_rotate(settings, batch, show_progress=sys.stderr.isatty()))
    for error in done.errors:
        click.echo(error, err=True)
    click.echo(f"{done.seen} data keys, {done.changed} wrapped anew, {done.failed} could not be unwrapped")
    sys.exit(1 if done.failed else 0)


@click.command()
@click.argument("job_ids", nargs=-1, required=True, metavar="JOB_ID…")
@settings_options
def shred(
    job_ids: tuple[str, ...], redis_url: str | None, config: Path | None, assignments: tuple[str, ...]
) -> None:
    """Delete the data keys of ended jobs: nobody can read them again, in Redis, the archive or a copy.

    The files of archived jobs stay where they are. `streamjobs delete` removes those as well.

    \b
    streamjobs keys shred JOB_ID
    """
    settings = require_redis(read_settings(redis_url, config, assignments))
    for job_id, was_there in run(_shred(settings, job_ids)).items():
        click.echo(f"{job_id} {'shredded' if was_there else 'has no data key'}")


async def _rotate(settings: Settings, batch: int, *, show_progress: bool) -> Rotated:
    from streamjobs.store import Rotated, Store

    def progress(done: Rotated) -> None:
        if show_progress:
            click.echo(f"\r{done.seen} data keys, {done.changed} wrapped anew …", nl=False, err=True)

    store = await Store.open(settings)
    try:
        vault, done = _vault_of(store), Rotated()
        await vault.rotate_own()
        for partition in store.partitions:
            done = done.plus(await vault.rotate(partition, on_progress=progress, batch=batch))
        return done
    finally:
        await store.aclose()


async def _shred(settings: Settings, job_ids: tuple[str, ...]) -> dict[str, bool]:
    from streamjobs.store import Store

    store = await Store.open(settings)
    try:
        vault = _vault_of(store)
        return {job_id: await vault.shred(job_id) for job_id in job_ids}
    finally:
        await store.aclose()


def _vault_of(store: Store) -> Vault:
    if store.vault is None:
        raise click.UsageError("set 'encryption_keys': without one nothing is encrypted")
    return store.vault
