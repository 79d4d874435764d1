"""The gateway role: routes over one store and one hub, served until a signal, then drained.

SIGTERM: readiness turns false, streams end at random moments of the grace with a jittered `retry:`, then
the server stops, then the store closes. SIGINT does the same almost at once, as does a second signal.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version

import structlog
import uvloop
from starlette.exceptions import HTTPException
from starlette.routing import Route, Router, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from streamjobs.archive import Archive
from streamjobs.config import Settings
from streamjobs.gateway.access import Access
from streamjobs.gateway.act import ActRoutes
from streamjobs.gateway.archived import Archived
from streamjobs.gateway.catalog import CatalogRoutes
from streamjobs.gateway.edge import Edge
from streamjobs.gateway.events import Events
from streamjobs.gateway.hub import Hub
from streamjobs.gateway.jobs import JobRoutes, Registry
from streamjobs.gateway.look import LookRoutes
from streamjobs.gateway.notices import NoticeRoutes
from streamjobs.gateway.openapi import OpenApi
from streamjobs.gateway.operate import OperateRoutes
from streamjobs.gateway.origin import with_cors
from streamjobs.gateway.owner_stream import OwnerEvents
from streamjobs.gateway.probes import Probes
from streamjobs.gateway.schedules import ScheduleRoutes
from streamjobs.gateway.server import Server, listen
from streamjobs.gateway.stop import Stop
from streamjobs.gateway.tokens import TokenRoutes
from streamjobs.gateway.ws import SocketRoutes
from streamjobs.store import Store
from streamjobs.store.sweeper import Sweeper

log = structlog.get_logger(__name__)

QUICK_GRACE = 0.2
"""Seconds that streams get after SIGINT: somebody is waiting at a terminal."""


class Gateway:
    """`asgi` is the API, `ops` the probes and metrics; both are ASGI apps. The store stays its maker's."""

    def __init__(self, store: Store, registry: Registry, settings: Settings) -> None:
        self.settings = settings
        self.hub = Hub(store, settings)
        self._sweeper = Sweeper(store)
        self._sweeping: asyncio.Task[None] | None = None
        archive = Archive.of(settings.archive_url, settings.archive_timeout, store.vault)
        archived = Archived(archive, settings, store.snapshots.caps)
        probes = Probes(store, self.hub, settings.ready_timeout).routes()
        access = Access(store, self.hub, archived, settings)
        sockets = SocketRoutes(self.hub, archived, access)
        api = [
            *JobRoutes(store, self.hub, registry, settings).routes(),
            *LookRoutes(store, self.hub, archived, settings).routes(),
            Route("/v1/jobs/{id}/events", Events(self.hub, archived, access), methods=["GET"]),
            Route("/v1/events", OwnerEvents(self.hub, access), methods=["GET"]),
            *TokenRoutes(access).routes(),
            *sockets.routes(),
            *ActRoutes(store, self.hub.snapshots, archived, settings).routes(),
            *ScheduleRoutes(store, registry, settings).routes(),
            *NoticeRoutes(store, settings).routes(),
            *CatalogRoutes(registry).routes(),
            *OperateRoutes(store, settings).routes(),
        ]
        self.ops: ASGIApp = routed(probes, is_logged=settings.access_log)
        self.routes = [*api, *([] if settings.ops_port else probes)]
        self.routes += OpenApi(self.routes, version("streamjobs")).routes()
        guarded = routed(
            access.guarded(self.routes),
            map(access.guarded_socket, sockets.sockets()),
            is_logged=settings.access_log,
        )
        self.asgi: ASGIApp = with_cors(guarded, settings)

    async def start(self) -> None:
        """Start the loops."""
        self.hub.start()
        self._sweeping = asyncio.create_task(self._sweeper.run(), name="sweeper")

    async def drain(self, grace: float) -> None:
        """Turn readiness false and end every stream within `grace` seconds."""
        await self.hub.drain(grace)

    async def aclose(self) -> None:
        """Stop the loops and free every channel."""
        if self._sweeping is not None:
            self._sweeping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sweeping
        await self.hub.aclose()


def routed(
    routes: list[Route], sockets: Iterable[WebSocketRoute] = (), *, is_logged: bool = False
) -> ASGIApp:
    """An ASGI app of these routes; what they do not have and what goes wrong become problem documents."""
    router = Router([*routes, *sockets, *_other_methods(routes)], redirect_slashes=False)
    return Edge(router, is_logged=is_logged)


def _other_methods(routes: list[Route]) -> list[Route]:
    """For paths with several routes: by itself each would name its own methods only in `Allow`."""
    methods: dict[str, list[set[str]]] = {}
    for route in routes:
        methods.setdefault(route.path, []).append(route.methods or set())
    shared = {path: set[str]().union(*each) for path, each in methods.items() if len(each) > 1}
    return [Route(path, _Refusal(", ".join(sorted(allowed)))) for path, allowed in shared.items()]


class _Refusal:
    """An ASGI app; a plain function would get GET only."""

    def __init__(self, allow: str) -> None:
        self._allow = allow

    async def __call__(self, _scope: Scope, _receive: Receive, _send: Send) -> None:
        raise HTTPException(405, headers={"Allow": self._allow})


async def serve(
    settings: Settings,
    registry: Registry,
    *,
    store: Store | None = None,
    stop: Stop | None = None,
    on_ready: Callable[[str], None] | None = None,
    listeners: Sequence[socket.socket] = (),
) -> None:
    """Serve until told to stop, then drain.

    Without a `store` one is opened and closed here. Without a `stop` signals are heard here (main thread
    only). `on_ready` is called with the URL once requests are taken. Port 0 takes any free one. `listeners`
    are the API's socket, and that of an `ops_port`; without them they are made here.
    Raises `OSError` where a port is taken, and what `Store.open` raises.
    """
    listeners = listeners or _listeners(settings)
    async with contextlib.AsyncExitStack() as stack:
        for listener in listeners:
            stack.callback(listener.close)
        if store is None:
            store = await Store.open(settings)
            stack.push_async_callback(store.aclose)
        if stop is None:
            stop = Stop()
            stack.enter_context(stop.on_signals())
        gateway = Gateway(store, registry, settings)
        await gateway.start()
        stack.push_async_callback(gateway.aclose)
        await _serve(gateway, listeners, stop, on_ready or _report)


def _listeners(settings: Settings) -> list[socket.socket]:
    ports = [settings.port, *([settings.ops_port] if settings.ops_port else [])]
    with contextlib.ExitStack() as stack:
        listeners: list[socket.socket] = []
        for port in ports:
            listeners.append(listen(settings, port))
            stack.callback(listeners[-1].close)
        stack.pop_all()  # nothing failed: they stay open
    return listeners


async def _serve(
    gateway: Gateway, listeners: Sequence[socket.socket], stop: Stop, on_ready: Callable[[str], None]
) -> None:
    servers = [
        Server(asgi, gateway.settings)
        for asgi, _ in zip((gateway.asgi, gateway.ops), listeners, strict=False)
    ]
    running = [
        asyncio.create_task(server.serve([listener]), name="server")
        for server, listener in zip(servers, listeners, strict=True)
    ]
    on_ready(url_of(listeners[0]))
    asked = asyncio.create_task(stop.asked.wait())
    await asyncio.wait([*running, asked], return_when=asyncio.FIRST_COMPLETED)
    asked.cancel()
    await _drain(gateway, stop)
    for server in servers:
        server.should_exit = True
    await asyncio.gather(*running)


async def _drain(gateway: Gateway, stop: Stop) -> None:
    grace = QUICK_GRACE if stop.is_interactive else gateway.settings.drain_grace
    log.info("gateway.draining", streams=gateway.hub.viewers, grace=grace)
    draining = asyncio.create_task(gateway.drain(grace))
    hurried = asyncio.create_task(stop.hurried.wait())
    await asyncio.wait([draining, hurried], return_when=asyncio.FIRST_COMPLETED)
    for task in (draining, hurried):
        task.cancel()
    await asyncio.gather(draining, hurried, return_exceptions=True)
    if stop.hurried.is_set():
        await gateway.drain(0.0)


def url_of(listener: socket.socket) -> str:
    """Where a listening socket can be reached."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _report(url: str) -> None:
    log.info("gateway.ready", url=url)


def run(settings: Settings, registry: Registry) -> None:
    """Serve in this thread, on uvloop; returns after the drain."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(settings, registry))
