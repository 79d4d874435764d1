"""What this gateway's App offers: kinds of jobs with the schema of their input, and tools.

It is the App that the gateway was started with; a worker may have been started with another.
"""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from streamjobs.gateway.answers import answer
from streamjobs.gateway.jobs import Registry
from streamjobs.inputs import ChatInput
from streamjobs.workflow import Workflow

_CHAT: dict[str, Any] = {
    "kind": "chat",
    "description": "A model's answer to messages, with tools and any number of turns.",
    "input_schema": msgspec.json.schema(ChatInput),
    "queue": None,
}


class CatalogRoutes:
    """The routes that say what may be submitted."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def routes(self) -> list[Route]:
        """What a router needs."""
        return [
            Route("/v1/workflows", self.workflows, methods=["GET"]),
            Route("/v1/tools", self.tools, methods=["GET"]),
        ]

    async def workflows(self, _request: Request) -> Response:
        """Every kind of job; a `queue` of null is the default one."""
        own = (_described(workflow) for workflow in self._registry.workflows.values())
        return answer({"workflows": [_CHAT, *own]})

    async def tools(self, _request: Request) -> Response:
        """Every tool, as a model is told of it, and what becomes of a call after a crash (`effect`)."""
        names = ("name", "description", "parameters", "effect")
        tools = self._registry.tools.values()
        return answer({"tools": [{name: getattr(tool, name) for name in names} for tool in tools]})


def _described(workflow: Workflow) -> dict[str, Any]:
    names = ("kind", "description", "input_schema", "queue")
    return {name: getattr(workflow, name) for name in names}
