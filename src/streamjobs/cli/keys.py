"""The group of commands about keys: keys rotate, shred."""

from __future__ import annotations

import click

from streamjobs.cli.rotate import rotate, shred


@click.group()
def keys() -> None:
    """Look after the keys that jobs are encrypted with.

    \b
    streamjobs keys rotate
    """


keys.add_command(rotate)
keys.add_command(shred)
