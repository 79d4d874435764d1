"""The command that probes a gateway and all behind it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import click

from streamjobs.cli import options
from streamjobs.cli.options import gateway_options, gateway_token

if TYPE_CHECKING:
    from streamjobs.client.canary import Song


@click.command()
@click.option("--interval", default=30.0, show_default=True, help="Seconds between runs.")
@click.option("--timeout", default=30.0, show_default=True, help="Seconds that a run may take.")
@click.option("--port", default=9464, show_default=True, help="Where /metrics is.")
@click.option("--once", is_flag=True, help="Run once, say how it went, and exit with 0 or 1.")
@gateway_options
def canary(interval: float, timeout: float, port: int, once: bool, url: str, owner: str) -> None:
    """Probe a gateway, Redis and the workers with a job of our own, and see that nothing of it is lost.

    A viewer is cut off in the middle and comes back, another comes late; both must have seen the log.

    \b
    streamjobs canary --once
    streamjobs canary --url http://gateway:8400 --interval 30 --port 9464
    """
    if not once:
        from prometheus_client import start_http_server

        from streamjobs import metrics

        start_http_server(port, registry=metrics.REGISTRY)
        click.echo(f"metrics on port {port}", err=True)
    options.run(_sing(url, owner, interval, timeout, once))


async def _sing(url: str, owner: str, interval: float, timeout: float, once: bool) -> None:
    import httpx

    from streamjobs.client.canary import OWNER, Canary, Flaw

    limits = httpx.Timeout(timeout)
    token = gateway_token()
    headers = {"authorization": f"Bearer {token}"} if token else {}
    if owner or not token:
        headers["x-streamjobs-owner"] = owner or OWNER
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=limits, trust_env=False) as http:
        singer = Canary(http, timeout=timeout)
        while True:
            try:
                song = await singer.sing()
            except Flaw as flaw:
                click.echo(f"{flaw.outcome}: {flaw}", err=True)
                if once:
                    raise SystemExit(1) from None
            else:
                click.echo(f"ok: {_told(song)}")
                if once:
                    return
            await asyncio.sleep(interval)


def _told(song: Song) -> str:
    first, latest = 1000 * song.first, 1000 * max(song.late)
    return f"first event after {first:.0f} ms, end after {song.whole:.2f} s, none later than {latest:.0f} ms"
