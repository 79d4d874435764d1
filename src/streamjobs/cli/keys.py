"""The group of commands about keys."""

from __future__ import annotations

import click

from streamjobs.cli import apikeys


@click.group()
def keys() -> None:
    """Look after API keys: who may use the gateway.

    \b
    streamjobs keys create --tenant acme --subject anna
    streamjobs keys list
    """


for command in (apikeys.create, apikeys.list_keys, apikeys.revoke, apikeys.forget):
    keys.add_command(command)
