"""Roles in this process: a worker; or everything, with a private Redis and a model or a script for one."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from pathlib import Path

import click
import msgspec

from streamjobs.app import App, load_app
from streamjobs.config import Settings
from streamjobs.gateway.app import serve
from streamjobs.gateway.stop import Stop
from streamjobs.projections import build
from streamjobs.projections.runner import Runner
from streamjobs.store import Store
from streamjobs.store.embedded import RedisServer, embedded_redis
from streamjobs.store.sweeper import Sweeper
from streamjobs.testing import ScriptedProvider
from streamjobs.worker.worker import Worker

_DEFAULTS = Settings()
_DROPPED = 130
"""Exit status of a worker that was told twice."""
SCRIPTED_MODEL = "openai:scripted"


def chosen_app(target: str | None) -> App:
    """The App that the command line names, or one with the included tools. Raises `ConfigError`."""
    return App() if target is None else load_app(target)


async def run_worker(settings: Settings, app: App, queues: Sequence[str]) -> None:
    """Run a worker until it is told to drain; a second signal makes it drop everything, as kill -9 would."""
    store = await Store.open(settings)
    try:
        worker = Worker(store, app, queues=queues)
        working = asyncio.create_task(worker.run(), name="worker")
        with _two_signals(worker.drain, working.cancel):
            await working
    except asyncio.CancelledError:
        raise click.exceptions.Exit(_DROPPED) from None
    finally:
        await store.aclose()


async def run_projector(settings: Settings) -> None:
    """Run the settings' projections, and sweep, until told to drain; a second signal drops everything."""
    store = await Store.open(settings)
    try:
        runner = Runner(store, build(settings.projections, store))
        running = asyncio.create_task(runner.run(), name="projector")
        sweeping = asyncio.create_task(Sweeper(store).run(), name="sweep")
        with _two_signals(runner.drain, running.cancel):
            try:
                await running
            finally:
                sweeping.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await sweeping
    except asyncio.CancelledError:
        raise click.exceptions.Exit(_DROPPED) from None
    finally:
        await store.aclose()


@contextlib.asynccontextmanager
async def projecting(store: Store, on_end: Callable[[], object]) -> AsyncGenerator[None]:
    """Run the store's projections within this process; `on_end` hears of their end, whatever it is."""
    runner = Runner(store, build(store.settings.projections, store))
    running = asyncio.create_task(runner.run(), name="projector")
    running.add_done_callback(lambda _: on_end())
    try:
        yield
    finally:
        runner.drain()
        await running


@contextlib.contextmanager
def _two_signals(first: Callable[[], object], second: Callable[[], object]) -> Generator[None, None, None]:
    """Call `first` on the first SIGTERM or SIGINT, `second` on any further one."""
    loop = asyncio.get_running_loop()
    left = [first]

    def heard() -> None:
        (left.pop() if left else second)()

    numbers = (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        loop.add_signal_handler(number, heard)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


async def run_dev(settings: Settings, target: str | None) -> None:
    """Run gateway, worker and projector over a private Redis until told to stop."""
    app = chosen_app(target)
    async with local_redis(settings) as (settings, redis), local_provider(settings) as settings:
        store = await Store.open(settings)
        worker, stop = Worker(store, app), Stop()
        with stop.on_signals():
            working = asyncio.create_task(worker.run(), name="worker")
            working.add_done_callback(lambda _: stop.asked.set())
            try:
                async with projecting(store, stop.asked.set):
                    await serve(
                        settings, app, store=store, stop=stop, on_ready=lambda url: _greet(url, redis)
                    )
            finally:
                worker.drain()
                await working
                await store.aclose()


@contextlib.asynccontextmanager
async def local_redis(settings: Settings) -> AsyncGenerator[tuple[Settings, RedisServer]]:
    """Yield settings that name a running Redis, and what it is."""
    async with embedded_redis(Path(settings.data_dir), redis_url=settings.redis_url) as redis:
        yield msgspec.structs.replace(settings, redis_url=redis.url), redis


@contextlib.asynccontextmanager
async def local_provider(settings: Settings) -> AsyncGenerator[Settings]:
    """Yield settings with which a model answers: a scripted one where neither a key nor a server is set."""
    if has_provider(settings):
        yield settings
        return
    click.secho("no API key is set: a scripted provider answers, no model does", fg="yellow", err=True)
    async with ScriptedProvider() as provider:
        yield msgspec.structs.replace(
            settings,
            openai_base_url=provider.openai_url,
            provider="openai",
            default_model=settings.default_model or SCRIPTED_MODEL,
        )


def has_provider(settings: Settings) -> bool:
    """Whether the settings name a provider of their own."""
    return bool(settings.openai_api_key or settings.anthropic_api_key) or (
        settings.openai_base_url != _DEFAULTS.openai_base_url
        or settings.anthropic_base_url != _DEFAULTS.anthropic_base_url
    )


def _greet(url: str, redis: RedisServer) -> None:
    click.echo(f"Redis    {redis.description}", err=True)
    click.echo(f"gateway  {url}", err=True)
    click.echo(f"try      streamjobs submit --url {url} --prompt 'Hi' --watch", err=True)
