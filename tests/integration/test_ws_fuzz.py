"""Whatever a stranger sends over a WebSocket: an answer or a close, never a fault of ours."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from tests.conftest import RedisProcess, wait_until
from tests.integration.gateway import Script, Served, serving
from tests.integration.sockets import Talk, talking
from tests.integration.test_ws import handshake, is_idle

CLOSES = {1000, 1002, 1003, 1007, 1008, 1009}
"""Codes that say that it was the client's doing."""

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=10
)
JOBS = st.sampled_from(["the job", "j0-" + "a" * 26, "j9999-" + "b" * 26, "", "\x00"]) | VALUES
CURSORS = st.sampled_from(["0", "0-0", "1-1", "3", "999-1", "-1", "1-" + "9" * 17]) | VALUES
NEARLY = st.fixed_dictionaries(
    {"op": st.sampled_from(["subscribe", "unsubscribe", "ping"]) | VALUES},
    optional={
        "job": JOBS,
        "after": CURSORS,
        "merge": st.booleans() | VALUES,
        "flush": st.integers() | VALUES,
        "data": VALUES,
        "events": VALUES,
    },
)
SENT = st.one_of(NEARLY.map(json.dumps), VALUES.map(json.dumps), st.text(), st.binary())


def frame(first: int, mask: bytes, payload: bytes, lie: int) -> bytes:
    """A frame as a client may send it: masked or not, its length true or not."""
    size = max(0, len(payload) + lie)
    length = bytes((size,)) if size < 126 else b"\x7e" + size.to_bytes(2)
    length = bytes((length[0] | (0x80 if mask else 0), *length[1:]))
    hidden = bytes(byte ^ mask[n % 4] for n, byte in enumerate(payload)) if mask else payload
    return bytes((first,)) + length + mask + hidden


OPCODES = st.sampled_from([0x81, 0x01, 0x00, 0x80, 0x82, 0x88, 0x89, 0x8A]) | st.integers(0, 255)
MASKS = st.binary(min_size=4, max_size=4) | st.just(b"")
PAYLOADS = st.binary(max_size=300) | NEARLY.map(lambda message: json.dumps(message).encode())
WHOLE = st.builds(frame, OPCODES, MASKS, PAYLOADS, st.just(0) | st.integers(-3, 300))
FRAMES = st.lists(WHOLE | st.binary(max_size=300), min_size=1, max_size=6)


@pytest.fixture
async def served(redis: RedisProcess) -> AsyncIterator[Served]:
    async with serving(redis.url, ws_message_rate=10_000) as gateway:
        yield gateway


@contextlib.contextmanager
def no_faults(caplog: pytest.LogCaptureFixture) -> Any:
    """Nothing was raised where nobody catches it, and nothing was logged as a fault."""
    loop = asyncio.get_running_loop()
    unhandled: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: unhandled.append(context))
    try:
        with capture_logs() as logs:
            yield
    finally:
        loop.set_exception_handler(None)
    assert unhandled == []
    assert [entry for entry in logs if entry["log_level"] in {"warning", "error", "critical"}] == []
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@settings(max_examples=60)
@example([json.dumps({"op": "ping", "data": "\ud800"})])
@example(['{"op":"ping","data":' + "9" * 3000 + "}"])
@example(['{"op":"ping","data":1e999}'])
@example(['{"op":"subscribe","job":"the job","flush":' + "9" * 3000 + "}"])
@given(st.lists(SENT, min_size=1, max_size=8))
async def test_every_message_is_answered_or_ends_the_connection(
    served: Served, caplog: pytest.LogCaptureFixture, sent: list[str | bytes]
):
    """A client that is wrong, or means harm, must neither break the gateway nor be left without a word."""
    script = await served.script()
    with no_faults(caplog):
        async with talking(served) as talk:
            for message in sent:
                if not await is_answered(talk, script, message):
                    assert (await talk.end())[0] in CLOSES
                    break
            else:
                await works(talk, script)
        await script.complete()
        await wait_until(lambda: is_idle(served))


async def is_answered(talk: Talk, script: Script, message: str | bytes) -> bool:
    """Whether a message is answered before a ping behind it is; False where the connection ends instead."""
    if isinstance(message, bytes):
        await talk.connection.send(message, text=not is_text(message))  # no text, or no text frame
        return False
    message = message.replace("the job", script.id)
    await talk.connection.send(message)
    await talk.say("ping", data="behind it")
    answers = 0
    while answers < 1 + (not asks_to_subscribe(message)):
        answers += (await talk.hear()).op in {"error", "pong", "unsubscribed"}
    return True


def is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def asks_to_subscribe(message: str) -> bool:
    """Whether the answer may take a while, as Redis is asked."""
    with contextlib.suppress(ValueError, RecursionError):
        decoded = json.loads(message)
        return isinstance(decoded, dict) and decoded.get("op") == "subscribe"
    return False


async def works(talk: Talk, script: Script) -> None:
    """A subscription to a job that is there goes as ever."""
    await talk.say("unsubscribe", job=script.id)
    await talk.subscribe(script.id)
    assert (await talk.until("snapshot", script.id))[-1].json["id"] == script.id


@settings(max_examples=150)
@given(FRAMES)
async def test_bytes_of_any_kind_break_nothing(
    served: Served, caplog: pytest.LogCaptureFixture, sent: list[bytes]
):
    """Who speaks no WebSocket at all, or a broken one, is sent away; everybody else goes on."""
    host, port = served.url.removeprefix("http://").split(":")
    with no_faults(caplog):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(handshake())
        assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
        for data in sent:
            writer.write(data)
            await asyncio.sleep(0)
        writer.write_eof()
        async with asyncio.timeout(90):
            with contextlib.suppress(ConnectionError):
                await reader.read()
        writer.close()
        await wait_until(lambda: is_idle(served))
