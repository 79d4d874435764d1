"""Whatever strangers send, what reads it returns or refuses: it never breaks, and never loops.

Each target gets examples that are cut, repeated, joined and spoilt at random. The short form is the same in
every run, the long one prints its seed.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import secrets
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest

from streamjobs.config import Settings
from streamjobs.cursor import parse_cursor
from streamjobs.errors import BadRequest, Invalid, ProviderError, RefusedTarget, StreamjobsError, TooManyItems
from streamjobs.events import decode_event, encode_event, encode_json, one_line
from streamjobs.gateway import messages
from streamjobs.gateway.body import decode_body, fields_of, items_at_most
from streamjobs.gateway.forms import parts_of
from streamjobs.gateway.jobs import JobRequest
from streamjobs.gateway.owner_cursor import parse_owner_cursor
from streamjobs.gateway.schedules import ScheduleRequest
from streamjobs.gateway.sse import event_frame
from streamjobs.inputs import ChatInput
from streamjobs.llm.anthropic import MessagesDecoder
from streamjobs.llm.base import Message, ModelRequest, ToolSpec
from streamjobs.llm.openai import ChatDecoder
from streamjobs.llm.sse import EventParser
from streamjobs.outgoing import Policy
from streamjobs.store import Entry

SETTINGS = Settings(max_json_items=200, max_json_depth=30)
REQUEST = ModelRequest("m", [Message(role="user", content="Hi")], [ToolSpec("t", "", {})])
Target = Callable[[bytes], object]
"""Returns something, or None where it refused."""


# --- targets


def cursor(data: bytes) -> object:
    text = data.decode("latin-1")
    found = parse_cursor(text)
    assert str(found) == text or text == "0"
    return found


def owner_cursor(data: bytes) -> object:
    text = data.decode("latin-1")
    found = parse_owner_cursor(text)
    assert parse_owner_cursor(str(found)) == found
    return found


def event(data: bytes) -> object:
    kind, _, content = data.partition(b" ")
    found = decode_event(kind.decode("latin-1"), content)
    again = encode_event(found)
    assert encode_event(decode_event(kind.decode("latin-1"), again)) == again
    return found


def frame(data: bytes) -> object:
    """A frame is taken apart into what it was made of, whatever a log holds."""
    kind, _, content = data.partition(b" ")
    content = one_line(content)
    made = event_frame(Entry(parse_cursor("3-4"), kind.decode("latin-1"), content))
    (parts,) = parts_of(made)
    assert (parts.id, parts.data) == (b"3-4", content.replace(b"\r", b" ").replace(b"\n", b" "))
    assert made.count(b"\n") == 4
    return parts


def body(data: bytes) -> object:
    value = decode_body(data, SETTINGS)
    assert items_of(value) <= items_at_most(data, 0) + 1
    encode_json(value)
    return value


def items_of(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(map(items_of, inner))


def submission(data: bytes) -> object:
    return fields_of(decode_body(data, SETTINGS), JobRequest)


def schedule(data: bytes) -> object:
    return fields_of(decode_body(data, SETTINGS), ScheduleRequest)


def chat(data: bytes) -> object:
    return ChatInput.from_json(data)


def socket_message(data: bytes) -> object:
    found = messages.decode(data.decode("utf-8", "replace"))
    asked = messages.asked_of(found)
    return messages.pong(asked.data) if isinstance(asked, messages.Ping) else asked


def url(data: bytes) -> object:
    """What passes is understood by another parser as it is by ours."""
    text = data.decode("latin-1")
    target = Policy(http=True).target(text)
    other = urlsplit(text)
    assert (other.hostname or "").removesuffix(".") == target.host
    assert (other.port or {"https": 443, "http": 80}[other.scheme]) == target.port
    assert other.username is None
    assert target.url.raw_host.decode().lower().strip("[]").removesuffix(".") == target.host
    return target


def stream_of(make: Callable[[ModelRequest], Any]) -> Target:
    """A provider's stream, cut anywhere: the cuts change nothing."""

    def read(data: bytes, size: int) -> object:
        parser, decoder = EventParser(4096), make(REQUEST)
        pieces: list[Any] = []
        for start in range(0, len(data), size):
            for found in parser.feed(data[start : start + size]):
                pieces += decoder.feed(found)
        for found in parser.close():
            pieces += decoder.feed(found)
        return [*pieces, *decoder.end()]

    def target(data: bytes) -> object:
        outcomes = [outcome(lambda size=size: read(data, size)) for size in (len(data) or 1, 3)]
        assert type(outcomes[0]) is type(outcomes[1])
        if isinstance(outcomes[0], Exception):
            raise outcomes[0]
        assert _without_ids(outcomes[0]) == _without_ids(outcomes[1])
        return outcomes[0]

    return target


def _without_ids(pieces: object) -> str:
    """Pieces without the ids that calls get which have none."""
    return re.sub(r"call_[0-9a-f]{16}", "call_", repr(pieces))


def outcome(act: Callable[[], object]) -> object:
    try:
        return act()
    except ProviderError as error:
        return error


# --- what they are given


def sse(*chunks: Any) -> bytes:
    lines = [f"event: {chunk['type']}\n" if "type" in chunk else "" for chunk in chunks]
    return b"".join(
        f"{line}data: {json.dumps(chunk)}\n\n".encode() for line, chunk in zip(lines, chunks, strict=True)
    )


def delta(**fields: Any) -> dict[str, Any]:
    return {"id": "c", "choices": [{"index": 0, "delta": fields}]}


TOOL = {"type": "tool_use", "id": "c", "name": "t", "input": {}}
ARGUMENTS = {"type": "input_json_delta", "partial_json": '{"a":1}'}
CALL = {"index": 0, "id": "c1", "function": {"name": "t", "arguments": '{"a"'}}
OPENAI = [
    sse(delta(role="assistant"), delta(content="Hé🦊"), delta(reasoning_content="hm"))
    + sse(delta(tool_calls=[CALL]))
    + sse(delta(tool_calls=[{"index": 0, "function": {"arguments": ":1}"}}]))
    + sse({"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}], "usage": {}})
    + b"data: [DONE]\n\n",
    sse({"error": {"message": "no", "code": 429}}),
    b": ping\n\n",
    b"\xef\xbb\xbfdata: {}\r\n\r\n",
    b"\xff\xfe\xf0\x9f",
]
ANTHROPIC = [
    sse(
        {"type": "message_start", "message": {"usage": {"input_tokens": 3}}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hé🦊"}},
        {"type": "content_block_stop", "index": 0},
        {"type": "content_block_start", "index": 1, "content_block": TOOL},
        {"type": "content_block_delta", "index": 1, "delta": ARGUMENTS},
        {"type": "content_block_stop", "index": 1},
        {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 5}},
        {"type": "message_stop"},
    ),
    sse({"type": "error", "error": {"type": "overloaded_error", "message": "busy"}}),
    sse({"type": "ping"}),
    b"\xf0\x9f\xa6",
]
JSON = [
    b'{"kind":"chat","input":{"prompt":"Hi \\ud83e\\udd8a"},"metadata":{"a":[1,2.5,null,true]},"delay":5}',
    b'{"name":"n","kind":"chat","cron":"*/5 * * * *","timezone":"Europe/Paris","every":60,"overlap":"skip"}',
    b'{"prompt":"Hi","tools":["t"],"model":"m"}',
    b'{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}],"agent":"a"}',
    b'{"prompt":"Hi","messages":[{"role":"user","content":"a"}],"tools":["t"],"parameters":{"temperature":1e3}}',
    b'{"op":"subscribe","job":"j0-aaaaaaaaaaaaaaaaaaaaaaaaaa","after":"17-1795308028216","merge":true,"flush":250}',
    b'{"op":"ping","data":{"a":["\\u0000",1]}}',
    b'{"op":"unsubscribe","job":"j"}',
    b"[[[[]]]]",
    b'"\\ud800"',
    b"1e999",
    b"-0.0",
    b"9" * 400,
    b'{"run_at":"2026-01-01T00:00:00+02:00","kind":"a","input":"[,{\\\\\\"","queue":"b"}',
    b"[" * 40,
    b'{"a":1,"a":2,"":{}}',
    b"\xef\xbb\xbf{}",
    b"null",
    b"",
]
CURSORS = [
    b"0",
    b"0-0",
    b"17-1795308028216",
    b"1795308028216-0.3:aaaaaaaa.17-1795308028216:bbbbbbbb.1-1",
    b"1-1.0",
]
URLS = [
    b"https://hooks.example/a?b=c#d",
    b"http://93.184.216.34:8080/",
    b"https://[2606:4700::1111]:8443/x",
    b"https://u:p@h.example/",
    b"https://127.0.0.1/",
    b"http://0x7f.1/",
    b"https://xn--bcher-kva.example./",
    b"https://h.example:0443/%2e%2e/",
    b"//h.example/",
    b"https://h.example\\@127.0.0.1/",
    b"https:/\\h.example",
    b"https://[::ffff:127.0.0.1]/",
    b"https://h.example%00.x/",
]
GOLDEN = Path(__file__).parents[1] / "golden" / "events-1.jsonl"
RECORDED = [json.loads(line) for line in GOLDEN.read_text().splitlines()]
EVENTS = [f"{one['type']} {json.dumps(one['data'])}".encode() for one in RECORDED]

SPECIAL = [
    b"\x00",
    b"\r\n",
    b"\n\n",
    b"\r",
    b"\xff",
    b"\xed\xa0\x80",
    b"\xe2\x80\xa8",
    b"\\ud800",
    b"\\u0000",
    b'"',
    b"\\",
    b"[",
    b"]",
    b"{",
    b"}",
    b":",
    b",",
    b"-",
    b".",
    b"0",
    b"9999999999999999999",
    b"-1",
    b"1e400",
    b"NaN",
    b"null",
    b"true",
    b"@",
    b"/",
    b"#",
    b"%",
    b"?",
    b"data: ",
    b"event: ",
    b"id: ",
    b"retry: 1\n",
    b"\xef\xbb\xbf",
    b"\xd9\xa3",
]


class Fuzzed(NamedTuple):
    """A reader, what it is given, and what it may raise."""

    target: Target
    seeds: list[bytes]
    refuses: tuple[type[Exception], ...] = (BadRequest, Invalid, TooManyItems)


TARGETS = {
    "cursor": Fuzzed(cursor, CURSORS),
    "owner_cursor": Fuzzed(owner_cursor, CURSORS),
    "event": Fuzzed(event, EVENTS),
    "frame": Fuzzed(frame, EVENTS, ()),
    "body": Fuzzed(body, JSON),
    "submission": Fuzzed(submission, JSON),
    "schedule": Fuzzed(schedule, JSON),
    "chat": Fuzzed(chat, JSON),
    "socket_message": Fuzzed(socket_message, JSON),
    "url": Fuzzed(url, URLS, (RefusedTarget,)),
    "openai": Fuzzed(stream_of(ChatDecoder), OPENAI, (ProviderError,)),
    "anthropic": Fuzzed(stream_of(MessagesDecoder), ANTHROPIC, (ProviderError,)),
}


def spoilt(data: bytes, seeds: list[bytes], chance: random.Random) -> bytes:
    """Some bytes like those, changed in a few places."""
    changed = bytearray(data)
    for _ in range(chance.choice([0, 1, 1, 2, 3, 8])):
        at = chance.randrange(len(changed) + 1)
        until = min(len(changed), at + chance.choice([1, 1, 2, 5, 20]))
        match chance.randrange(6):
            case 0:
                del changed[at:until]
            case 1:
                changed[at:at] = chance.choice(SPECIAL)
            case 2:
                changed[at:until] = chance.choice(SPECIAL)
            case 3:
                changed[at:at] = changed[at:until] * chance.choice([1, 2, 30])
            case 4:
                changed[at:until] = chance.randbytes(until - at)
            case _:
                other = chance.choice(seeds)
                changed[at:] = other[chance.randrange(len(other) + 1) :]
    return bytes(changed[:5000])


@pytest.mark.parametrize("executions", [600, pytest.param(60_000, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", TARGETS)
def test_no_input_breaks_a_reader(name: str, executions: int):
    """One message that nobody thought of would end a stream, a worker's job, or a gateway's loop."""
    target, seeds, refuses = TARGETS[name]
    seed = 6 if executions < 1000 else secrets.randbits(32)
    chance = random.Random(seed)
    outcomes = Counter[str]()
    for number in range(executions):
        data = seeds[number] if number < len(seeds) else spoilt(chance.choice(seeds), seeds, chance)
        try:
            target(data)
        except refuses as error:
            assert isinstance(error, StreamjobsError)
            str(error).encode()  # it goes into an answer
            outcomes[type(error).__name__] += 1
        except Exception as error:
            raise AssertionError(f"{name}, seed {seed}: {data!r}") from error
        else:
            outcomes["taken"] += 1
    print(f"{name}: {executions} executions, seed {seed}, {dict(outcomes)}")  # noqa: T201 - how much was tried
    assert outcomes["taken"] > executions / 100
    assert not refuses or outcomes.total() - outcomes["taken"] > executions / 100


def test_the_mutations_differ():
    """The same few inputs again and again would find nothing."""
    chance = random.Random(6)
    for fuzzed in TARGETS.values():
        made = {spoilt(chance.choice(fuzzed.seeds), fuzzed.seeds, chance) for _ in range(1000)}
        assert len(made) > 300
    assert len(list(itertools.chain(*(fuzzed.seeds for fuzzed in TARGETS.values())))) > 100
