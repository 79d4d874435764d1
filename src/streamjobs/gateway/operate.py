"""For operators: who works, what waits, what died, what is struck.

None of it belongs to one owner. There is no authentication yet: whoever reaches the gateway may do this. All
of these routes are here, so that a check of scopes has one place.

Rule 1: striking and lifting say whether anything changed; asking twice is asking once.
Rule 2: running dead jobs again may be sent again with its key: what it has run already, it leaves out.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from streamjobs.config import Settings
from streamjobs.errors import ProjectionNotFound
from streamjobs.gateway.answers import answer
from streamjobs.gateway.body import decode_body, fields_of, read_body
from streamjobs.gateway.requests import (
    Instant,
    Label,
    Reason,
    idempotency_key,
    ms_of,
    owner_of,
    parameters_of,
)
from streamjobs.gateway.statistics import described
from streamjobs.store import Step, Store
from streamjobs.store.dead import DeadFilter

_MAX_DEAD = 1000

Count = Annotated[int, msgspec.Meta(ge=1, le=_MAX_DEAD)]


class DeadRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which failed jobs; they ended from `since` to before `until` (RFC 3339), `limit` of them at most."""

    owner: Label = ""
    kind: Label = ""
    queue: Label = ""
    code: Label = ""
    since: Instant | None = None
    until: Instant | None = None
    limit: Count = 100

    def where(self) -> DeadFilter:
        """The filter as the store takes it."""
        return DeadFilter(
            owner=self.owner,
            kind=self.kind,
            queue=self.queue,
            code=self.code,
            since_ms=ms_of(self.since),
            until_ms=ms_of(self.until),
        )


class DeadQuery(DeadRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The same for one page of the list, behind `cursor`."""

    cursor: Label = ""


class StatsQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which statistics: of a kind, of a queue, and as they came about, from `since` on."""

    kind: Label = ""
    queue: Label = ""
    history: Step | None = None
    since: Instant | None = None


class StrikeName(msgspec.Struct, frozen=True):
    """What a path strikes."""

    scope: Literal["queue", "kind", "tool"]
    name: Label


class StrikeRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A strike's body, which may be absent."""

    reason: Reason = ""


class OperateRoutes:
    """The routes that are no owner's."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._settings = settings

    def routes(self) -> list[Route]:
        """What a router needs."""
        strike = "/v1/strikes/{scope}/{name}"
        return [
            Route("/v1/workers", self.workers, methods=["GET"]),
            Route("/v1/queues", self.queues, methods=["GET"]),
            Route("/v1/stats", self.stats, methods=["GET"]),
            Route("/v1/projections", self.projections, methods=["GET"]),
            Route("/v1/projections/{name}/rebuild", self.rebuild, methods=["POST"]),
            Route("/v1/projections/{name}/retry", self.retry, methods=["POST"]),
            Route("/v1/dead", self.dead, methods=["GET"]),
            Route("/v1/dead/rerun", self.rerun_dead, methods=["POST"]),
            Route("/v1/strikes", self.strikes, methods=["GET"]),
            Route(strike, self.strike, methods=["PUT"]),
            Route(strike, self.lift, methods=["DELETE"]),
        ]

    # --- look

    async def workers(self, _request: Request) -> Response:
        """Every worker whose heartbeat is recent, as it last described itself."""
        return answer({"workers": await self._store.workers.all(), "now_ms": await self._store.now_ms()})

    async def queues(self, _request: Request) -> Response:
        """What waits, is held and runs in each queue; `oldest_wait` in seconds."""
        return answer({"queues": await self._store.queues.all()})

    async def stats(self, request: Request) -> Response:
        """What was counted for each kind and queue; with `?history=` step by step."""
        asked = parameters_of(request, StatsQuery)
        if asked.history is None:
            return answer({"stats": described(await self._store.stats.totals(), asked.kind, asked.queue)})
        steps = await self._store.stats.history(asked.history, ms_of(asked.since))
        history = [
            {"at_ms": at_ms, "stats": described(totals, asked.kind, asked.queue)} for at_ms, totals in steps
        ]
        return answer({"step": asked.history, "history": [step for step in history if step["stats"]]})

    async def projections(self, _request: Request) -> Response:
        """How far each projection is behind, and on which jobs it failed."""
        return answer({"projections": await self._store.feed.all()})

    async def dead(self, request: Request) -> Response:
        """Failed jobs that nobody ran again, newest first. A page may be short; the last has no cursor."""
        asked = parameters_of(request, DeadQuery)
        jobs, cursor = await self._store.dead.page(asked.where(), limit=asked.limit, before=asked.cursor)
        return answer({"dead": jobs, "cursor": cursor})

    async def strikes(self, _request: Request) -> Response:
        """What is stopped, by whom, why and since when."""
        return answer({"strikes": await self._store.strikes.all()})

    # --- act

    async def rerun_dead(self, request: Request) -> Response:
        """Submit failed jobs again, each as a new job that is linked to it."""
        asked = fields_of(decode_body(await self._body(request), self._settings), DeadRequest)
        key = idempotency_key(request) or secrets.token_hex(16)
        pairs = await self._store.jobs.rerun_many(
            asked.where(), key=key, by=owner_of(request), limit=asked.limit
        )
        rerun = [{"from": old, "to": new} for old, new in pairs]
        return answer({"rerun": rerun, "count": len(rerun)})

    async def rebuild(self, request: Request) -> Response:
        """Have a projection made anew from the logs; a projector does it, soon."""
        name = await self._projection(request)
        await self._store.feed.ask_rebuild(name)
        return answer({"projection": name, "rebuild": "asked"})

    async def retry(self, request: Request) -> Response:
        """Let a projection look again at the jobs on which it failed."""
        name = await self._projection(request)
        return answer({"projection": name, "retried": len(await self._store.feed.retry(name))})

    async def _projection(self, request: Request) -> str:
        name: str = request.path_params["name"]
        if name not in {info.name for info in await self._store.feed.all()}:
            raise ProjectionNotFound("no such projection")
        return name

    async def strike(self, request: Request) -> Response:
        """Stop a queue, a kind or a tool for the whole fleet."""
        what = fields_of(request.path_params, StrikeName)
        body = await self._body(request)
        asked = fields_of(decode_body(body, self._settings), StrikeRequest) if body else StrikeRequest()
        is_new = await self._store.strikes.strike(
            what.scope, what.name, by=owner_of(request), reason=asked.reason
        )
        return answer({"scope": what.scope, "name": what.name, "struck": True, "changed": is_new})

    async def lift(self, request: Request) -> Response:
        """Let it go on."""
        what = fields_of(request.path_params, StrikeName)
        was_struck = await self._store.strikes.lift(what.scope, what.name)
        return answer({"scope": what.scope, "name": what.name, "struck": False, "changed": was_struck})

    async def _body(self, request: Request) -> bytes:
        return await read_body(request.scope, request.receive, self._settings)
