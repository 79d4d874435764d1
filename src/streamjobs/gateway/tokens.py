"""Give a client a stream token: for one job, or for everything of its owner. See `identity.streamtoken`."""

from __future__ import annotations

import time

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from streamjobs.gateway.access import Access
from streamjobs.gateway.answers import answer
from streamjobs.gateway.requests import principal_of


class TokenRoutes:
    """The routes that make tokens."""

    def __init__(self, access: Access) -> None:
        self._access = access

    def routes(self) -> list[Route]:
        """What a router needs."""
        return [
            Route("/v1/jobs/{id}/token", self.for_job, methods=["POST"]),
            Route("/v1/events/token", self.for_all, methods=["POST"]),
        ]

    async def for_job(self, request: Request) -> Response:
        """A token that reads this job, and nothing else."""
        return await self._issue(request, request.path_params["id"])

    async def for_all(self, request: Request) -> Response:
        """A token that reads what the caller may read."""
        return await self._issue(request, "")

    async def _issue(self, request: Request, job_id: str) -> Response:
        tokens = await self._access.tokens()
        token = tokens.issue(principal_of(request.scope), job_id, time.time())
        text = tokens.sign(token)
        path = f"/v1/jobs/{job_id}/events" if job_id else "/v1/events"
        body = {
            "token": text,
            "expires_ms": token.expires * 1000,
            "until_ms": token.until * 1000,
            "links": {"events": f"{path}?token={text}"},
        }
        return answer(body, {"Cache-Control": "no-store"})
