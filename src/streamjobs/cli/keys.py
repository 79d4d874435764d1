"""The group of commands about keys: who may use the gateway, and what jobs are encrypted with."""

from __future__ import annotations

import click

from streamjobs.cli import apikeys
from streamjobs.cli.rotate import rotate, shred


@click.group()
def keys() -> None:
    """Look after API keys, and after the keys that jobs are encrypted with.

    \b
    streamjobs keys create --tenant acme --subject anna
    streamjobs keys list
    streamjobs keys rotate
    """


for command in (apikeys.create, apikeys.list_keys, apikeys.revoke, apikeys.forget, rotate, shred):
    keys.add_command(command)
