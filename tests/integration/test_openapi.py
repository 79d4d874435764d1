"""The API as a document: it names every route and no other, and what the gateway does is what it says."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any, NamedTuple

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from starlette.routing import Route

from streamjobs.app import App
from streamjobs.gateway.openapi import OPERATIONS, operations_of
from tests.conftest import RedisProcess
from tests.integration.gateway import Served, serving

NEVER_END = {"/v1/events"}
"""Streams that go on until the client leaves: tests of their own watch them."""
RIGHT = {
    "/v1/jobs": {"kind": "any"},
    "/v1/schedules": {"kind": "any", "every": 3600},
    "/v1/webhooks": {"url": "https://hooks.example/"},
}
"""What is valid, and not only of the right form."""
MEANINGFUL = {"queue", "delay", "run_at", "cron", "timezone", "every", "offset", "events", "url"}
PAGE = "application/json"
ACCEPTED = [PAGE, "application/x-ndjson", "text/event-stream"]
FEW = 100

LEFT_OUT = ["positive_data_acceptance", "negative_data_rejection"]
"""What a schema cannot say (a kind that exists, exactly one of two fields) may be refused; and what is only
another way to write the same (a space in place of a date's T) may be taken."""


@pytest.fixture
async def served(redis: RedisProcess) -> AsyncIterator[Served]:
    app = App()

    @app.workflow("any", queue="default")
    async def _any(ctx: Any, given: Any) -> None:
        pass

    async with serving(redis.url, app, max_wait=0.02) as gateway:
        yield gateway


async def document(served: Served) -> dict[str, Any]:
    answer = await served.client.get("/openapi.json")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    return answer.json()


def refs(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from (one for name, one in value.items() if name == "$ref")
        for one in value.values():
            yield from refs(one)
    elif isinstance(value, list):
        for one in value:
            yield from refs(one)


async def test_every_route_is_in_the_document_and_no_other(served: Served):
    """A client made from it would lack what the API has, or call what it has not."""
    routes = {
        (method, route.path)
        for route in served.gateway.routes
        for method in (route.methods or set())
        if method != "HEAD"
    }
    paths = (await document(served))["paths"]
    shown = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    assert shown == routes == set(OPERATIONS)
    assert len(shown) >= 50


async def test_a_route_without_a_description_is_noticed(served: Served):
    """The comparison above could never fail."""
    more = [*served.gateway.routes, Route("/v1/new", lambda _: None, methods=["POST"])]
    assert set(operations_of(more)) - set(OPERATIONS) == {("POST", "/v1/new")}


async def test_the_document_holds_together(served: Served):
    """Generators stop at the first reference that leads nowhere, and at two operations of one name."""
    found = await document(served)
    schemas = found["components"]["schemas"]
    used = set(refs(found))
    assert used == {f"#/components/schemas/{name}" for name in schemas}
    operations = [one for methods in found["paths"].values() for one in methods.values()]
    names = [one["operationId"] for one in operations]
    assert sorted(names) == sorted(set(names))
    assert [one["operationId"] for one in operations if not one["summary"].endswith(".")] == []
    assert "\\A" not in json.dumps(schemas)
    assert (found["openapi"], found["info"]["title"]) == ("3.1.0", "streamjobs")


async def test_probes_on_a_port_of_their_own_are_not_in_the_document(redis: RedisProcess):
    """A client would look for them where they are not."""
    async with serving(redis.url, ops_port=1) as served:
        paths = (await document(served))["paths"]
    assert not {"/livez", "/readyz", "/metrics"} & set(paths)
    assert "/v1/jobs" in paths


# --- what the gateway does is what it says


class Known(NamedTuple):
    """Ids of what is there, by the beginning of the paths that take them."""

    ids: dict[str, list[str]]

    def put_into(self, case: Any, which: int) -> None:
        """Have a case ask for what is there, but for one in `which` of 0."""
        for prefix, ids in self.ids.items():
            if which and case.path.startswith(prefix):
                case.path_parameters["id"] = ids[which % len(ids)]
        if which and case.path.startswith("/v1/projections/{name}"):
            case.path_parameters["name"] = "index"
        if which and case.path.endswith("/artifacts/{name}"):
            case.path_parameters["name"] = "report.md"
        if which > 2 and case.method == "POST" and case.path in RIGHT and isinstance(case.body, dict):
            others = {name: value for name, value in case.body.items() if name not in MEANINGFUL}
            case.body = others | RIGHT[case.path]


async def filled(served: Served) -> Known:
    """A store in which there is one of everything."""
    live, ended, failed = [await served.script() for _ in range(3)]
    await live.open_turn()
    await live.say("some ", "words")
    await ended.open_turn()
    await ended.keep("report.md", "text/markdown", b"# Report")
    await ended.complete()
    await failed.complete()
    ids = [live.id, ended.id, failed.id]
    for job_id in ids:
        await served.store.index.put(job_id, "", "")
    schedule = {"name": "n", "kind": "any", "every": 3600}
    schedules = [(await served.client.post("/v1/schedules", json=schedule)).json()["id"] for _ in range(2)]
    hook = {"url": "https://hooks.example/"}
    hooks = [(await served.client.post("/v1/webhooks", json=hook)).json()["id"] for _ in range(2)]
    return Known({"/v1/jobs/{id}": ids, "/v1/schedules/{id}": schedules, "/v1/webhooks/{id}": hooks})


class Fuzz:
    """Sends what the schema allows, or nearly, from a thread: the gateway runs in the test's loop."""

    def __init__(self, url: str, document: dict[str, Any], known: Known, examples: int) -> None:
        self.statuses = Counter[int]()
        self.asked = Counter[str]()
        self._url = url
        self._known = known
        self._examples = examples
        self._session = requests.Session()
        self._schema = schemathesis.openapi.from_dict(document)
        self._left_out = [schemathesis.checks.CHECKS.get_one(name) for name in LEFT_OUT]

    def run(self) -> None:
        with self._session:
            for found in self._schema.get_all_operations():
                operation = found.ok()
                if operation.path in NEVER_END:
                    continue
                self._ask(operation, GenerationMode.POSITIVE)
                if operation.body or operation.query or operation.headers:
                    self._ask(operation, GenerationMode.NEGATIVE)

    def _ask(self, operation: Any, mode: GenerationMode) -> None:
        @settings(
            max_examples=self._examples,
            derandomize=self._examples < FEW,  # what runs always runs the same
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(operation.as_strategy(generation_mode=mode), st.integers(0, 5), st.sampled_from(ACCEPTED))
        def ask(case: Any, which: int, accept: str) -> None:
            self._known.put_into(case, which)
            if case.path.endswith("/events"):
                if set(case.path_parameters["id"].lower()) <= set("./%2e"):
                    return  # `..` is resolved by the client: to the owner's stream, which does not end
                is_live = case.path_parameters["id"] == self._known.ids["/v1/jobs/{id}"][0]
                accept = PAGE if is_live else accept  # its stream would not end
            headers = {"Accept": accept}
            response = case.call(base_url=self._url, session=self._session, headers=headers, timeout=60)
            self.statuses[response.status_code] += 1
            self.asked[operation.label] += 1
            case.validate_response(response, excluded_checks=self._left_out)

        try:
            ask()
        except Unsatisfiable:
            assert mode is GenerationMode.NEGATIVE, operation.label  # nothing of it can be wrong


@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisDeprecationWarning")
@pytest.mark.parametrize("examples", [4, pytest.param(100, marks=pytest.mark.long)])
async def test_the_api_does_what_its_document_says(served: Served, examples: int):
    """A request that nobody thought of would be a 500, or an answer that no generated client can read."""
    fuzz = Fuzz(served.url, await document(served), await filled(served), examples)
    await asyncio.to_thread(fuzz.run)
    print(f"{fuzz.asked.total()} requests, {dict(fuzz.statuses)}")  # noqa: T201 - how much was tried
    assert max(fuzz.statuses) < 500
    assert {200, 400, 404, 422} <= set(fuzz.statuses)
    assert len(fuzz.asked) == len(OPERATIONS) - len(NEVER_END)
    assert (await served.client.get("/livez")).status_code == 200
