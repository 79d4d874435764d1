"""For operators: who works, what waits, what died, what is struck.

None of it belongs to one owner. There is no authentication yet: whoever reaches the gateway may do this. All
of these routes are here, so that a check of scopes has one place.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from streamjobs.gateway.answers import answer
from streamjobs.store import Store


class OperateRoutes:
    """The routes that are no owner's."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def routes(self) -> list[Route]:
        """What a router needs."""
        return [Route("/v1/workers", self.workers, methods=["GET"])]

    async def workers(self, _request: Request) -> Response:
        """Every worker whose heartbeat is recent, as it last described itself."""
        return answer({"workers": await self._store.workers.all(), "now_ms": await self._store.now_ms()})
