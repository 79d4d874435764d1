"""Is it alive, is it ready, how is it: for orchestrators and Prometheus.

Rule 1: liveness is the event loop answering, never Redis: an outage would restart the whole fleet.
Rule 2: ready from the first time Redis was reached until the drain. An outage later does not end it: all
gateways would go at once, and browsers whose streams break then meet the 503 that stops them for good.
With `ready_timeout` set, readiness ends once Redis has been away for that long.
"""

from __future__ import annotations

import asyncio
import contextlib
import time

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from streamjobs import metrics
from streamjobs.errors import StoreUnavailable, StreamjobsError
from streamjobs.gateway.hub import Hub
from streamjobs.store import Store

PING_TIMEOUT = 1.0


class Probes:
    """The routes, and when Redis was last reached."""

    def __init__(self, store: Store, hub: Hub, ready_timeout: float) -> None:
        self._store = store
        self._hub = hub
        self._timeout = ready_timeout
        self._reached_at: float | None = None

    def routes(self) -> list[Route]:
        """What a router needs."""
        return [
            Route("/livez", self.livez, methods=["GET"]),
            Route("/readyz", self.readyz, methods=["GET"]),
            Route("/metrics", self.metrics, methods=["GET"]),
        ]

    async def livez(self, _request: Request) -> Response:
        """The event loop answers."""
        return PlainTextResponse("ok\n")

    async def readyz(self, _request: Request) -> Response:
        """Whether new clients should come here."""
        if self._hub.is_draining:
            return PlainTextResponse("draining\n", 503)
        is_reached = await self._reach()
        if self._is_ready():
            return PlainTextResponse("ok\n" if is_reached else "ok, Redis is away\n")
        return PlainTextResponse("Redis is away\n", 503)

    async def metrics(self, _request: Request) -> Response:
        """Everything in `streamjobs.metrics`; how far projections are as of now, or as last known."""
        with contextlib.suppress(StreamjobsError, TimeoutError):
            async with asyncio.timeout(PING_TIMEOUT):
                await self._store.feed.report()
        return Response(await _exposition(), media_type=CONTENT_TYPE_LATEST)

    async def _reach(self) -> bool:
        try:
            async with asyncio.timeout(PING_TIMEOUT):
                await self._store.ping()
        except (StoreUnavailable, TimeoutError):
            return False
        self._reached_at = time.monotonic()
        return True

    def _is_ready(self) -> bool:
        if self._reached_at is None:
            return False
        return not self._timeout or time.monotonic() - self._reached_at <= self._timeout


async def _exposition() -> bytes:
    if not metrics.IS_SHARED:
        return metrics.exposition()
    metrics.publish()
    return await asyncio.to_thread(metrics.exposition)  # files of many processes: some 20 ms for four of them
