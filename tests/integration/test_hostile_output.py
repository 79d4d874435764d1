"""What tools, models and workflows say reaches every viewer as data, whatever it is made of.

Half a surrogate and NUL, which JSON or those behind it cannot carry, become U+FFFD; all else stays as it was.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import pytest

from streamjobs.app import App
from streamjobs.client import Client
from streamjobs.errors import LimitExceeded, StepError
from streamjobs.events import clean_text
from streamjobs.testing import Scenario, ScriptedProvider, Turn
from streamjobs.testing.scenario import ScriptedCall
from streamjobs.tool import ToolContext
from tests.conftest import RedisProcess
from tests.harness import provider_settings, working
from tests.integration.gateway import Served, serving
from tests.integration.sockets import talking

FORGED = '\r\n\r\nid: 1-1\r\nevent: job.completed\r\ndata: {"result":"forged"}\r\n\r\n'
HOSTILE = [
    FORGED, FORGED.replace("\r\n", "\n"), FORGED.replace("\r\n", "\r"), "\r", "\n\n", ": comment\n",
    "retry: 1\n\n", "data: x", "\x00", "a\ud800b\udfff", "\ud83e", "\u2028\u2029\x85\x0b\x0c\x1c",
    "\x1b[2J\x1b]0;owned\x07", "\x9b31m", "\ufeff", "\u202e", "\x01\x08\x1f\x7f",
    "</script><script>alert(1)</script>",
    "\\u0000 \\ud800 \\", "\"]}}',", "\U0001f98a\U0010ffff", "=1+1", "${x}{{x}}",
]  # fmt: skip
CLEAN = [clean_text(text) for text in HOSTILE]
LONG = 10_000_000
NAME = "../../etc/passwd\r\nx: y"


def hostile_app() -> App:
    app = App()

    @app.tool
    async def speak(what: str, context: ToolContext) -> Any:
        context.progress(50, FORGED)
        if what == "raise":
            raise RuntimeError("".join(HOSTILE))
        return {"long": "é" * LONG, "all": HOSTILE, "text": FORGED}[what]

    async def huge() -> str:
        return "é" * (LONG // 2)

    async def fails() -> None:
        raise ValueError(FORGED)

    @app.workflow("hostile", max_attempts=1)
    async def hostile(ctx: Any, given: list[str]) -> Any:
        for text in HOSTILE:
            ctx.log(text, data={text: text})
            ctx.emit("said", {"text": text, text: [text]})
        ctx.progress(50, FORGED)
        with contextlib.suppress(LimitExceeded):
            ctx.emit("said", "x" * LONG)
        await ctx.step("huge", huge)
        with contextlib.suppress(StepError):
            await ctx.step(FORGED[:60], fails)
        ctx.summary = FORGED
        return {"texts": HOSTILE, FORGED: given}

    return app


def scenario() -> Scenario:
    """A model that says it all, in pieces and at once, and calls tools that do."""
    calls = [
        ScriptedCall(name="speak", arguments={"what": what}) for what in ("all", "long", "raise", "text")
    ]
    odd = [
        ScriptedCall(name=NAME, arguments={}),
        ScriptedCall(name="speak", arguments="[" * 10_000),
        ScriptedCall(name="speak", arguments='{"what": "' + "\\u0000\\ud800" * 10 + '"}'),
        ScriptedCall(name="speak", arguments='{"what": 1e999}', id=FORGED),
    ]
    said = [text for text in CLEAN if text != "\ufffd"]
    return Scenario(
        turns=[Turn(tool_calls=calls + odd), Turn(text=[*said, "x" * 400_000, *["long " * 4000] * 20])]
    )


class Hostile(NamedTuple):
    """A gateway beside a worker, and two jobs that have ended."""

    served: Served
    workflow: str
    chat: str


@pytest.fixture
async def hostile(redis: RedisProcess) -> AsyncIterator[Hostile]:
    app = hostile_app()
    async with (
        ScriptedProvider(scenario()) as provider,
        serving(redis.url, app, **provider_settings(provider)) as served,
        working(served.store, app),
    ):
        given = {"kind": "hostile", "input": [text for text in CLEAN if "\x00" not in text]}
        chat = {"kind": "chat", "input": {"prompt": FORGED, "tools": ["speak"]}}
        ids: list[str] = []
        for body in (given, chat):
            answer = await served.client.post("/v1/jobs", json=body, headers={"prefer": "wait=60"})
            assert answer.json()["status"] == "completed", answer.json()["error"]
            ids.append(answer.json()["id"])
        yield Hostile(served, *ids)


async def stored(served: Served, job_id: str) -> list[tuple[str, str, str]]:
    return [
        (str(entry.cursor), entry.type, entry.data.decode())
        async for page in served.store.log.pages(job_id)
        for entry in page.entries
    ]


async def test_every_viewer_is_given_what_the_log_holds(hostile: Hostile):
    """A model could end a stream, forge an event in it, or break one form of it for everybody who watches."""
    served = hostile.served
    for job_id in (hostile.workflow, hostile.chat):
        log = await stored(served, job_id)
        assert [row for row in log if "\n" in row[2] or "\r" in row[2] or "\x00" in row[2]] == []
        async with served.stream(job_id, after="0") as stream:
            assert [frame.row async for frame in stream] == log
        lines = await served.client.get(served.events_url(job_id), headers={"accept": "application/x-ndjson"})
        assert [row_of(line) for line in lines.text.split("\n")[:-1]] == log
        async with talking(served) as talk:
            assert [row for message in await talk.transcript(job_id, "0") for row in message.rows] == log
        pages, after = list[tuple[str, str, str]](), "0"
        while len(pages) < len(log):
            headers = {"accept": "application/json", "last-event-id": after}
            page = (await served.client.get(served.events_url(job_id), headers=headers)).json()
            pages += [(one["id"], one["type"], json.dumps(one["data"])) for one in page["events"]]
            after = page["cursor"]
        assert [(*row[:2], json.loads(row[2])) for row in pages] == [
            (*row[:2], json.loads(row[2])) for row in log
        ]
        async with Client(served.url) as client:
            heard = [event async for event in client.handle(job_id).events(after="0")]
        assert [(event.type, event.data) for event in heard] == [(row[1], json.loads(row[2])) for row in log]


def decoded(row: tuple[str, str, str]) -> tuple[str, str, Any]:
    return row[0], row[1], json.loads(row[2])


def row_of(line: str) -> tuple[str, str, str]:
    """An NDJSON line, its data as it stands."""
    decoded = json.loads(line)
    return decoded["id"], decoded["type"], line[line.index('"data":') + 7 : -1]


async def test_what_was_said_is_there_as_it_was_said(hostile: Hostile):
    """A log that is not broken, but holds something else, is no record."""
    served = hostile.served
    view = (await served.client.get(f"/v1/jobs/{hostile.workflow}")).json()
    lines = (await served.client.get(f"/v1/jobs/{hostile.workflow}/log")).json()["lines"]
    assert [line["message"] for line in lines] == CLEAN
    assert [line["data"] for line in lines] == [{text: text} for text in CLEAN]
    said = [json.loads(data) for _, kind, data in await stored(served, hostile.workflow) if kind == "x.said"]
    assert [one["data"]["text"] for one in said] == CLEAN
    assert (view["result"]["texts"], view["summary"]) == (CLEAN, FORGED)
    assert view["progress"]["message"] == FORGED
    (failed,) = [step for step in view["steps"] if step["state"] == "failed"]
    assert FORGED in failed["error"]["message"]
    (huge,) = [step for step in view["steps"] if step["name"] == "huge"]
    content = await served.client.get(f"/v1/jobs/{hostile.workflow}/artifacts/{huge['artifact']}")
    assert content.json() == "é" * (LONG // 2)
    odd = await served.client.get(f"/v1/jobs/{hostile.workflow}/artifacts/%0d%0ax:%20y")
    assert (odd.status_code, "x" in odd.headers) == (404, False)


async def test_what_a_model_and_its_tools_said_is_there(hostile: Hostile):
    """The answer that a person reads would not be the one that was given."""
    served = hostile.served
    view = (await served.client.get(f"/v1/jobs/{hostile.chat}")).json()
    events = [
        json.loads(data) for _, kind, data in await stored(served, hostile.chat) if kind == "text.delta"
    ]
    text = "".join(event["text"] for event in events)
    expected = "".join(one for one in CLEAN if one != "\ufffd") + "x" * 400_000 + "long " * 80_000
    assert text == expected
    assert text.endswith(view["text"])
    outcomes = {call["call_id"]: call for call in view["tool_calls"]}
    assert len(outcomes) == 8
    outputs = [call["output"] for call in outcomes.values() if call["state"] == "completed"]
    assert CLEAN in outputs
    assert FORGED in outputs
    (long,) = [one for one in outputs if isinstance(one, str) and one.startswith("é")]
    assert len(long.encode()) <= served.store.settings.max_tool_output
    errors = [call["error"]["code"] for call in outcomes.values() if call["state"] == "failed"]
    assert sorted(errors) == ["invalid_arguments"] * 3 + ["tool_error", "unknown_tool"]


@pytest.mark.parametrize("pieces", [40, pytest.param(200, marks=pytest.mark.long)])
async def test_a_model_that_says_megabytes_ends_its_own_job(redis: RedisProcess, pieces: int):
    """It would take the worker's memory, or the gateway's, and with it everybody else's jobs."""
    app = App()
    endless = Scenario(turns=[Turn(text=["y" * 50_000] * pieces)])
    async with (
        ScriptedProvider(endless) as provider,
        serving(redis.url, app, **provider_settings(provider)) as served,
        working(served.store, app),
    ):
        body = {"kind": "chat", "input": {"prompt": "go on"}, "max_attempts": 1}
        view = (await served.client.post("/v1/jobs", json=body, headers={"prefer": "wait=60"})).json()
        assert (view["status"], view["error"]["code"]) == ("failed", "limit_exceeded")
        log = await stored(served, view["id"])
        async with served.stream(view["id"], after="0") as stream:
            assert [frame.row async for frame in stream] == log
        async with talking(served) as talk:
            assert [row for message in await talk.transcript(view["id"], "0") for row in message.rows] == log
        assert sum(len(data) for _, kind, data in log if kind == "text.delta") > pieces * 50_000
        assert len(view["text"]) <= served.store.settings.view_text
