"""`GET /openapi.json`: the API as an OpenAPI 3.1 document.

Rule 1: what a request may hold comes from the structs that requests are read with; its summary is the first
paragraph of the handler's docstring. What answers look like is in `shapes`.
Rule 2: `OPERATIONS` names every route, a test compares it with the router.
Rule 3: everything that is not listed is a problem document.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, cast

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from streamjobs.events import encode_json
from streamjobs.gateway import shapes
from streamjobs.gateway.act import ReasonRequest, SignalRequest
from streamjobs.gateway.answers import encoded
from streamjobs.gateway.jobs import JobRequest
from streamjobs.gateway.look import JobsQuery, LogQuery
from streamjobs.gateway.notices import (
    AgainRequest,
    NoticesQuery,
    ReadRequest,
    UndeliveredQuery,
    WebhookRequest,
)
from streamjobs.gateway.operate import DeadQuery, DeadRequest, StatsQuery, StrikeRequest
from streamjobs.gateway.schedules import ScheduleRequest
from streamjobs.job import JobView

PATH = "/openapi.json"
REF = "#/components/schemas/{name}"
Struct = type[msgspec.Struct]
Json = dict[str, Any]

TEXT, EVENTS, NDJSON, ANY = "text/plain", "text/event-stream", "application/x-ndjson", "*/*"


class Operation(NamedTuple):
    """One method of one path.

    `answers` are structs or media types by status; `also` are media types that `Accept` may ask for.
    `query` is a struct or the names in `PARAMETERS`, as `headers` are.
    """

    answers: Mapping[int, Struct | str | None]
    body: Struct | None = None
    needs_body: bool = True
    query: Struct | tuple[str, ...] = ()
    headers: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    summary: str = ""


def _text(pattern: str = "", **more: Any) -> Json:
    return {"type": "string", **({"pattern": pattern} if pattern else {}), **more}


PARAMETERS: dict[str, tuple[Json, str]] = {
    "Idempotency-Key": (_text(r"^[\x20-\x7e]{1,255}$"), "the same key is the same request"),
    "Prefer": (_text(), "`wait=N`: answer when the job has ended, after N seconds at most"),
    "Last-Event-ID": (_text(), "a cursor: what follows it; wins over `after`"),
    "If-None-Match": (_text(), "an `ETag`: 304 where it still stands"),
    "at": (_text(r"^[1-9][0-9]{0,15}$"), "the number of an event: the view as it was after it"),
    "wait": (_text(r"^[0-9]{1,6}(\.[0-9]{1,3})?$"), "seconds to wait for the job's end"),
    "after": (_text(), "a cursor; with `wait`: or for anything behind it"),
    "limit": (_text(r"^[1-9][0-9]{0,5}$"), "events in the page"),
    "merge": ({"enum": ["0", "1"]}, "1: consecutive deltas of a write are one event"),
    "flush": (_text(r"^[0-9]{1,6}$"), "milliseconds between writes"),
    "watch": (_text(), "jobs, with commas between, of which all events are sent"),
}

_KEY = ("Idempotency-Key",)
_WATCHING = ("merge", "flush")
_STRIKE = {"scope": {"enum": ["queue", "kind", "tool"]}}
_REASON: dict[str, Any] = {"body": ReasonRequest, "needs_body": False}

OPERATIONS: dict[tuple[str, str], Operation] = {
    ("POST", "/v1/jobs"): Operation(
        {202: shapes.AcceptedJob, 200: JobView}, JobRequest, headers=(*_KEY, "Prefer")
    ),
    ("GET", "/v1/jobs"): Operation({200: shapes.JobsPage}, query=JobsQuery),
    ("GET", "/v1/jobs/{id}"): Operation(
        {200: JobView, 304: None}, query=("at", "wait", "after"), headers=("If-None-Match",)
    ),
    ("DELETE", "/v1/jobs/{id}"): Operation({200: shapes.Deleted}),
    ("GET", "/v1/jobs/{id}/result"): Operation({200: shapes.JobResult}, query=("wait", "after")),
    ("GET", "/v1/jobs/{id}/log"): Operation({200: shapes.JobLogPage}, query=LogQuery),
    ("GET", "/v1/jobs/{id}/effects"): Operation({200: shapes.JobEffects}),
    ("GET", "/v1/jobs/{id}/artifacts/{name}"): Operation({200: ANY}),
    ("GET", "/v1/jobs/{id}/events"): Operation(
        {200: shapes.EventsPage, 204: None}, query=("after", "limit", *_WATCHING), headers=("Last-Event-ID",),
        also=(EVENTS, NDJSON), summary="A job's log: live, a page of JSON, or all of it, by `Accept`.",
    ),
    ("GET", "/v1/events"): Operation(
        {200: EVENTS}, query=("after", "watch", *_WATCHING), headers=("Last-Event-ID",),
        summary="Everything of the owner as one live stream.",
    ),
    ("GET", "/v1/ws"): Operation({}, summary="A WebSocket for many jobs; anything else is 426."),
    ("POST", "/v1/jobs/{id}/token"): Operation({200: shapes.TokenGiven}),
    ("POST", "/v1/events/token"): Operation({200: shapes.TokenGiven}),
    ("POST", "/v1/jobs/{id}/cancel"): Operation({200: shapes.CancelRequested}, **_REASON),
    ("POST", "/v1/jobs/{id}/signal"): Operation({200: shapes.SignalTaken}, SignalRequest),
    ("POST", "/v1/jobs/{id}/pause"): Operation({200: shapes.PauseTaken}, headers=_KEY, **_REASON),
    ("POST", "/v1/jobs/{id}/resume"): Operation({200: shapes.PauseTaken}, headers=_KEY, **_REASON),
    ("POST", "/v1/jobs/{id}/rerun"): Operation({202: shapes.AcceptedJob}, headers=_KEY),
    ("POST", "/v1/schedules"): Operation({201: shapes.ShownSchedule}, ScheduleRequest, headers=_KEY),
    ("GET", "/v1/schedules"): Operation({200: shapes.SchedulesList}),
    ("GET", "/v1/schedules/{id}"): Operation({200: shapes.ShownSchedule}),
    ("DELETE", "/v1/schedules/{id}"): Operation({200: shapes.Deleted}),
    ("POST", "/v1/schedules/{id}/pause"): Operation({200: shapes.ShownSchedule}),
    ("POST", "/v1/schedules/{id}/resume"): Operation({200: shapes.ShownSchedule}),
    ("POST", "/v1/schedules/{id}/trigger"): Operation({202: shapes.AcceptedJob}, headers=_KEY),
    ("GET", "/v1/notifications"): Operation({200: shapes.NoticesPage}, query=NoticesQuery),
    ("POST", "/v1/notifications/read"): Operation({200: shapes.NoticesRead}, ReadRequest),
    ("POST", "/v1/webhooks"): Operation({201: shapes.ShownWebhook}, WebhookRequest),
    ("GET", "/v1/webhooks"): Operation({200: shapes.WebhooksList}),
    ("GET", "/v1/webhooks/{id}"): Operation({200: shapes.ShownWebhook}),
    ("DELETE", "/v1/webhooks/{id}"): Operation({200: shapes.Deleted}),
    ("POST", "/v1/webhooks/{id}/rotate"): Operation({200: shapes.SecretRotated}),
    ("POST", "/v1/webhooks/{id}/enable"): Operation({200: shapes.ShownWebhook}),
    ("POST", "/v1/webhooks/{id}/disable"): Operation({200: shapes.ShownWebhook}),
    ("GET", "/v1/webhooks/{id}/undelivered"): Operation(
        {200: shapes.UndeliveredList}, query=UndeliveredQuery
    ),
    ("POST", "/v1/webhooks/{id}/undelivered/rerun"): Operation({200: shapes.Count}, AgainRequest),
    ("GET", "/v1/workflows"): Operation({200: shapes.KindsList}),
    ("GET", "/v1/tools"): Operation({200: shapes.ToolsList}),
    ("GET", "/v1/workers"): Operation({200: shapes.WorkersList}),
    ("GET", "/v1/queues"): Operation({200: shapes.QueuesList}),
    ("GET", "/v1/stats"): Operation({200: shapes.StatsHistory}, query=StatsQuery),
    ("GET", "/v1/projections"): Operation({200: shapes.ProjectionsList}),
    ("POST", "/v1/projections/{name}/rebuild"): Operation({200: shapes.RebuildAsked}),
    ("POST", "/v1/projections/{name}/retry"): Operation({200: shapes.ProjectionRetried}),
    ("GET", "/v1/dead"): Operation({200: shapes.DeadPage}, query=DeadQuery),
    ("POST", "/v1/dead/rerun"): Operation({200: shapes.DeadRerun}, DeadRequest, headers=_KEY),
    ("GET", "/v1/strikes"): Operation({200: shapes.StrikesList}),
    ("PUT", "/v1/strikes/{scope}/{name}"): Operation(
        {200: shapes.StrikeChanged}, StrikeRequest, needs_body=False
    ),
    ("DELETE", "/v1/strikes/{scope}/{name}"): Operation({200: shapes.StrikeChanged}),
    ("GET", "/livez"): Operation({200: TEXT}),
    ("GET", "/readyz"): Operation({200: TEXT, 503: TEXT}),
    ("GET", "/metrics"): Operation({200: TEXT}),
    ("GET", PATH): Operation({200: ANY}),
}  # fmt: skip


def operations_of(routes: Iterable[Route]) -> dict[tuple[str, str], Route]:
    """The methods and paths of routes, but for `HEAD`, which every `GET` has."""
    return {
        (method, route.path): route
        for route in routes
        for method in (route.methods or ())
        if method != "HEAD"
    }


class OpenApi:
    """The route, and the document of the routes beside it."""

    def __init__(self, routes: Iterable[Route], version: str) -> None:
        self._routes = [*routes, *self.routes()]
        self._version = version
        self._encoded = b""

    def routes(self) -> list[Route]:
        """What a router needs."""
        return [Route(PATH, self.show, methods=["GET"])]

    async def show(self, _request: Request) -> Response:
        """This document."""
        self._encoded = self._encoded or encode_json(document(self._routes, self._version))
        return encoded(self._encoded)


def document(routes: Iterable[Route], version: str) -> Json:
    """The document of those routes that are in `OPERATIONS`."""
    shown = {key: route for key, route in operations_of(routes).items() if key in OPERATIONS}
    schemas = _schemas(OPERATIONS[key] for key in shown)
    paths: dict[str, Json] = {}
    for (method, path), route in sorted(shown.items()):
        operation = OPERATIONS[method, path]
        paths.setdefault(path, {})[method.lower()] = _described(operation, path, route, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "streamjobs",
            "version": version,
            "description": "Durable jobs as event logs. What the fields mean is in docs/api.md.",
        },
        "paths": paths,
        "components": {
            "schemas": {name: schema for name, schema in schemas.items() if not name.endswith("Query")}
        },
    }


def _schemas(operations: Iterable[Operation]) -> dict[str, Json]:
    types: dict[Struct, None] = {shapes.Problem: None}
    for operation in operations:
        found = (operation.body, operation.query, *operation.answers.values())
        types |= dict.fromkeys(one for one in found if isinstance(one, type))
    _, schemas = msgspec.json.schema_components(types, ref_template=REF)
    return cast("dict[str, Json]", _portable(schemas))


def _portable(value: Any) -> Any:
    """Patterns as ECMA 262 has them, which JSON Schema asks for."""
    if isinstance(value, dict):
        value = cast("Json", value)
        return {
            name: _pattern(one) if name == "pattern" and isinstance(one, str) else _portable(one)
            for name, one in value.items()
        }
    return [_portable(one) for one in cast("list[Any]", value)] if isinstance(value, list) else value


def _pattern(python: str) -> str:
    return python.replace(r"\A", "^").replace(r"\Z", "$")


def _described(operation: Operation, path: str, route: Route, schemas: dict[str, Json]) -> Json:
    said = operation.summary or (inspect.getdoc(route.endpoint) or "").split("\n\n")[0]
    return {
        "summary": " ".join(said.split()),
        "operationId": _name_of(operation, path, route),
        "parameters": [*_path_parameters(path), *_query(operation, schemas), *_headers(operation)],
        **({"requestBody": _body(operation)} if operation.body else {}),
        "responses": _responses(operation),
    }


def _name_of(operation: Operation, path: str, route: Route) -> str:
    words = [word for word in re.split(r"[^a-z]+", path.removeprefix("/v1")) if word not in {"", "id"}]
    acts = getattr(route.endpoint, "__name__", "")
    return "_".join([*words, acts] if acts not in words and not operation.summary else words)


def _path_parameters(path: str) -> list[Json]:
    return [
        {"name": name, "in": "path", "required": True, "schema": _STRIKE.get(name, {"type": "string"})}
        for name in re.findall(r"{(\w+)}", path)
    ]


def _query(operation: Operation, schemas: dict[str, Json]) -> list[Json]:
    if isinstance(operation.query, tuple):
        return [_parameter(name, "query") for name in operation.query]
    fields = schemas[operation.query.__name__]["properties"]
    return [{"name": name, "in": "query", "schema": _of_text(schema)} for name, schema in fields.items()]


def _of_text(schema: Json) -> Json:
    """A field's schema where null cannot be said, since a parameter that is absent says so."""
    choices = [one for one in schema.get("anyOf", ()) if one != {"type": "null"}]
    return choices[0] if len(choices) == 1 else {key: one for key, one in schema.items() if key != "default"}


def _headers(operation: Operation) -> list[Json]:
    return [_parameter(name, "header") for name in operation.headers]


def _parameter(name: str, where: str) -> Json:
    schema, description = PARAMETERS[name]
    return {"name": name, "in": where, "schema": schema, "description": description}


def _body(operation: Operation) -> Json:
    return {"required": operation.needs_body, "content": {"application/json": _content(operation.body)}}


def _responses(operation: Operation) -> Json:
    responses: Json = {
        str(status): _response(status, what, operation.also if status == 200 else ())
        for status, what in operation.answers.items()
    }
    problem = {"application/problem+json": _content(shapes.Problem)}
    return responses | {"default": {"description": "A problem document.", "content": problem}}


def _response(status: int, what: Struct | str | None, also: tuple[str, ...]) -> Json:
    if what is None:
        said = "Nothing more will come." if status == 204 else "It still stands."
        return {"description": said}
    if isinstance(what, str):
        return {"description": "As it is.", "content": {what: {}}}
    content = {"application/json": _content(what)} | {media: {} for media in also}
    return {"description": (inspect.getdoc(what) or "").split("\n\n")[0], "content": content}


def _content(struct: Struct | None) -> Json:
    return {} if struct is None else {"schema": {"$ref": REF.format(name=struct.__name__)}}
