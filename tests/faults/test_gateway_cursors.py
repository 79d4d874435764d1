"""Whatever comes as a cursor gets the exact rest of the log, a `reset`, or a 400; all forms say the same."""

from __future__ import annotations

import asyncio
import contextlib
import re
import urllib.parse
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamjobs.events import one_line
from tests.conftest import RedisProcess
from tests.faults.crowd import Row, Unchunked
from tests.integration.gateway import Script, Served, frame_of, serving

WORDS = 30


@pytest.fixture
async def served(redis: RedisProcess) -> AsyncIterator[Served]:
    async with serving(redis.url) as gateway:
        yield gateway


async def finished(served: Served) -> tuple[str, list[Row]]:
    script = await served.script()
    await script.open_turn()
    await script.say(*(f"{n} " for n in range(WORDS)))
    await script.complete()
    return script.id, await script.log()


# --- one request, byte by byte

EVENTS = "text/event-stream"
FORMS = (EVENTS, "application/json", "application/x-ndjson")


class Answer:
    """What came for one request: its status and its content."""

    def __init__(self, status: int, content: bytes) -> None:
        self.status = status
        self.content = content


async def ask(served: Served, job_id: str, accept: str, header: bytes | None, after: str | None) -> Answer:
    """Ask as no client library would let us."""
    host, port = served.url.removeprefix("http://").split(":")
    query = "" if after is None else f"?after={after}"
    lines = [
        f"GET /v1/jobs/{job_id}/events{query} HTTP/1.1",
        "Host: a",
        f"Accept: {accept}",
        "Connection: close",
    ]
    head = "\r\n".join(lines).encode() + (b"" if header is None else b"\r\nLast-Event-ID: " + header)
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(head + b"\r\n\r\n")
        raw = await reader.read(-1)
    finally:
        writer.close()
    status, content = int(raw.split(b" ", 2)[1]), raw.partition(b"\r\n\r\n")[2]
    is_chunked = b"transfer-encoding: chunked" in raw.partition(b"\r\n\r\n")[0]
    return Answer(status, Unchunked().feed(raw) if is_chunked else content)


# --- what must come of it

_CURSOR = re.compile(r"(0|[1-9][0-9]{0,15})-(0|[1-9][0-9]{0,15})")


def expected(text: str, log: list[Row], accept: str) -> tuple[int, list[Row]]:
    """The status, and the events that follow; for a stream of a job that has ended."""
    ids = [event_id for event_id, _, _ in log]
    if text in {"", "0", "0-0"}:
        return 200, ([] if text == "" and accept == EVENTS else log)
    if text in ids:
        rest = log[ids.index(text) + 1 :]
        return (204 if accept == EVENTS and not rest else 200), rest
    if _CURSOR.fullmatch(text) is None:
        return 400, []
    return (200 if accept == EVENTS else 409), []


def events_of(answer: Answer, accept: str) -> list[Row]:
    """The events of an answer; views and resets are none."""
    if answer.status != 200:
        return []
    if accept == EVENTS:
        frames = [frame_of(block) for block in answer.content.decode().split("\n\n")[:-1]]
        assert not any(frame.event == "error" for frame in frames)
        return [frame.row for frame in frames if frame.event not in {"reset", "snapshot"}]
    if accept == "application/json":
        return [row_of(event) for event in msgspec.json.decode(answer.content)["events"]]
    return [row_of(msgspec.json.decode(line)) for line in answer.content.splitlines()]


def row_of(event: dict[str, Any]) -> Row:
    return event["id"], event["type"], msgspec.json.encode(event["data"]).decode()


def looks_like_cursors(log: list[Row]) -> st.SearchStrategy[str]:
    """From what is in the log to what nearly could be."""
    numbers = st.integers(-3, 50) | st.integers() | st.sampled_from([10**15, 10**16, 2**63, 2**64])
    pairs = st.tuples(numbers, numbers).map(lambda pair: f"{pair[0]}-{pair[1]}")
    known = st.sampled_from([event_id for event_id, _, _ in log])
    spoilt = st.tuples(known, st.text(max_size=3), st.integers(0, 4)).map(
        lambda parts: parts[0][: parts[2]] + parts[1] + parts[0][parts[2] :]
    )
    return st.one_of(
        known, pairs, spoilt, st.text(max_size=40), st.sampled_from(["0", "0-0", "", "-", "\u0663-\u0661"])
    )


@pytest.mark.parametrize("examples", [150, pytest.param(5000, marks=pytest.mark.long)])
async def test_no_cursor_breaks_the_gateway(served: Served, examples: int):
    """Whoever can make a gateway fail with a header can take it away from everybody."""
    job_id, log = await finished(served)
    for header, after, accept in drawn(log, examples):
        answer = await ask(
            served, job_id, accept, header, None if after is None else urllib.parse.quote(after)
        )
        seen = (header, after, accept, answer.status, answer.content[:200])
        if header is not None and not is_sendable(header):
            assert answer.status == 400, seen
            continue
        text = (header or b"").decode("latin-1").strip(" \t") or (after or b"").decode("utf-8", "replace")
        status, rows = expected(text, log, accept)
        assert (answer.status, events_of(answer, accept)) == (status, rows), seen
    assert (await served.client.get("/livez")).status_code == 200


def is_sendable(header: bytes) -> bool:
    """Whether HTTP allows these bytes in a header at all."""
    return not any((byte < 0x20 and byte != 0x09) or byte == 0x7F for byte in header)


def drawn(log: list[Row], examples: int) -> list[tuple[bytes | None, bytes | None, str]]:
    """What Hypothesis comes up with; collected, so that one loop asks for all of it."""
    found: list[tuple[bytes | None, bytes | None, str]] = []
    cursors = looks_like_cursors(log).map(str.encode) | st.binary(max_size=40)
    in_line = cursors.map(lambda raw: raw.replace(b"\r", b"\x0b").replace(b"\n", b"\x0c"))

    @settings(max_examples=examples, database=None)
    @given(st.none() | in_line, st.none() | cursors, st.sampled_from(FORMS))
    def collect(header: bytes | None, after: bytes | None, accept: str) -> None:
        found.append((header, after, accept))

    collect()
    return found


async def test_a_cursor_of_another_job_is_a_reset_or_its_own(served: Served):
    """Ids are positions, not secrets: one of a longer job must neither jump nor show anything of that job."""
    (longer, log), short = await finished(served), await served.script()
    await short.open_turn()
    await short.complete()
    own = await short.log()
    for event_id, _, _ in log:
        for accept in FORMS:
            answer = await ask(served, short.id, accept, event_id.encode(), None)
            assert (answer.status, events_of(answer, accept)) == expected(event_id, own, accept)
            assert longer.encode() not in answer.content


@pytest.mark.parametrize("size", [70_000, 1 << 20, 20 << 20])
@pytest.mark.parametrize("place", ["header", "query"])
async def test_a_cursor_of_megabytes_is_refused(served: Served, size: int, place: str):
    """Gathered in memory, a few of them would take all of it, and hold everybody up meanwhile."""
    job_id, _ = await finished(served)
    header, after = (b"1" * size, None) if place == "header" else (None, "1" * size)
    with contextlib.suppress(ConnectionError):  # the answer may be lost where the rest is not read
        assert (await ask(served, job_id, EVENTS, header, after)).status in {400, 414, 431}
    assert (await served.client.get("/livez")).status_code == 200


async def test_a_head_without_an_end_is_not_gathered(served: Served):
    """A stranger could fill the gateway's memory, header by header."""
    host, port = served.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET /livez HTTP/1.1\r\nHost: a\r\n")
    sent = 0
    with pytest.raises(ConnectionError):
        while sent < 50 << 20:
            writer.write(b"X-Header: " + b"x" * 10_000 + b"\r\n")
            await writer.drain()
            sent += 10_000
    assert sent < 20 << 20
    writer.close()


# --- all forms

ODD = [
    ("text.delta", b'{"turn":1,"text":"\\u2028 and raw \xe2\x80\xa8, \xf0\x9f\xa6\x8a, \\ud83e\\udd8a"}'),
    ("text.delta", b'{"turn":1,"text":"\\r\\n\\r\\nid: 1-1\\nevent: job.completed\\ndata: {}\\u0000"}'),
    ("custom.Event_1", b'{ "spaces" : [ 1.0, 1e3, -0, 123456789012345678901234567890 ],\t"tab":1 }'),
    ("name with: colon", b'{"twice":1,"twice":2,"":null}'),
    ("custom.empty", b"{}"),
    ("custom.list", b'["not","an","object"]'),
    ("custom.text", b'"only text"'),
]  # fmt: skip
"""Events as strange as JSON allows, as they might come from a workflow or an older version."""


class _Event(msgspec.Struct):
    id: str
    type: str
    data: msgspec.Raw


class _Page(msgspec.Struct):
    events: list[_Event]


async def test_all_forms_carry_the_same_bytes(served: Served):
    """Who changes from one form to another, or compares two, must not see another content."""
    script = await served.script()
    await script.open_turn()
    written = [(kind, one_line(data)) for kind, data in ODD]  # as whoever writes does
    await script.write_raw(*written)
    await script.complete()
    stored = await served.store.client.xrange(f"sj:{{0}}:job:{script.id}:events")
    log = [(fields[b"d"], entry_id.decode()) for entry_id, fields in stored]
    assert [data for data, _ in log[3:-1]] == [data for _, data in written]
    url = served.events_url(script.id)

    async def content(accept: str) -> bytes:
        return (await served.client.get(url, params={"after": "0"}, headers={"accept": accept})).content

    assert sse_data(await content(EVENTS)) == log
    lines = (await content("application/x-ndjson")).split(b"\n")[:-1]
    assert [pair_of(msgspec.json.decode(line, type=_Event)) for line in lines] == log
    page = msgspec.json.decode(await content("application/json"), type=_Page)
    assert [pair_of(event) for event in page.events] == log


def pair_of(event: _Event) -> tuple[bytes, str]:
    return bytes(event.data), event.id


def sse_data(content: bytes) -> list[tuple[bytes, str]]:
    """Data and id of each block."""
    blocks = [block.split(b"\n") for block in content.removeprefix(b":\n").split(b"\n\n")[:-1]]
    fields = [dict(line.split(b": ", 1) for line in block if not line.startswith(b":")) for block in blocks]
    return [(block[b"data"], block[b"id"].decode()) for block in fields]


async def test_a_long_poll_and_a_stream_show_the_same_view(served: Served):
    """A page that polls and one that streams would show two states of one job."""
    script = await served.script()
    await script.open_turn()
    for word in ("one ", "two ", "end"):
        cursor = (await script.log())[-1][0]
        async with asyncio.TaskGroup() as group:
            polling = group.create_task(poll(served, script, cursor))
            await script.say(word)
        assert polling.result() == await first_view(served, script)
    await script.complete()
    assert await poll(served, script, cursor) == await first_view(served, script)


async def poll(served: Served, script: Script, cursor: str) -> bytes:
    answer = await served.client.get(f"/v1/jobs/{script.id}", params={"wait": "10", "after": cursor})
    return answer.content


async def first_view(served: Served, script: Script) -> bytes:
    headers = {"accept": EVENTS, "accept-encoding": "identity"}
    async with served.client.stream("GET", served.events_url(script.id), headers=headers) as response:
        return await snapshot_of(response)


async def snapshot_of(response: httpx.Response) -> bytes:
    content = b""
    async for part in response.aiter_raw():
        content += part
        if b"\n\n" in content:
            break
    ((data, _),) = sse_data(content.partition(b"\n\n")[0] + b"\n\n")
    return data
