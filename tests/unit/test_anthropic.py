"""Messages: the events of Anthropic's API, as bytes, and what must come of them."""

from __future__ import annotations

import json
from typing import Any

import httpx
import msgspec
import pytest

from streamjobs.config import Settings
from streamjobs.errors import ProviderError
from streamjobs.events import ToolCallRequest, Usage
from streamjobs.llm import Answer, Anthropic, Message, ModelRequest, ReasoningPiece, TextPiece, ToolSpec
from streamjobs.llm.anthropic import MessagesDecoder, messages_body
from streamjobs.llm.sse import EventParser

REQUEST = ModelRequest("claude", [Message("user", "hi")])
START = {"type": "message_start", "message": {"usage": {"input_tokens": 9, "output_tokens": 1}}}
STOP = {"type": "message_stop"}


def block(index: int, head: dict[str, Any], *deltas: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"type": "content_block_start", "index": index, "content_block": head},
        *({"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas),
        {"type": "content_block_stop", "index": index},
    ]


def text(index: int, *pieces: str) -> list[dict[str, Any]]:
    return block(
        index, {"type": "text", "text": ""}, *({"type": "text_delta", "text": piece} for piece in pieces)
    )


def tool(index: int, call_id: str, name: str, *pieces: str) -> list[dict[str, Any]]:
    head = {"type": "tool_use", "id": call_id, "name": name, "input": {}}
    return block(index, head, *({"type": "input_json_delta", "partial_json": piece} for piece in pieces))


THINKING = block(
    0,
    {"type": "thinking", "thinking": "", "signature": ""},
    {"type": "thinking_delta", "thinking": "let me "},
    {"type": "thinking_delta", "thinking": "see"},
    {"type": "signature_delta", "signature": "sig=="},
)


def ended(reason: str | None = "end_turn", **usage: Any) -> list[dict[str, Any]]:
    return [
        {"type": "message_delta", "delta": {"stop_reason": reason}, "usage": usage or {"output_tokens": 5}},
        STOP,
    ]


def encoded(*events: Any) -> bytes:
    flat = [event for item in events for event in (item if isinstance(item, list) else [item])]
    return b"".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode() for event in flat)


def decode_bytes(stream: bytes, request: ModelRequest = REQUEST) -> list[Any]:
    parser, decoder = EventParser(), MessagesDecoder(request)
    events = [*parser.feed(stream), *parser.close()]
    return [*(piece for event in events for piece in decoder.feed(event)), *decoder.end()]


def answer(*events: Any, request: ModelRequest = REQUEST) -> Answer:
    *pieces, last = decode_bytes(encoded(*events), request)
    assert isinstance(last, Answer)
    assert last.text == "".join(piece.text for piece in pieces if isinstance(piece, TextPiece))
    return last


# --- what comes --------------------------------------------------------------------------------------


def test_a_plain_answer() -> None:
    """The case that everybody has; usage is split over the first and the last event."""
    stream = encoded(START, {"type": "ping"}, text(0, "Hel", "lo"), ended(output_tokens=7))
    assert decode_bytes(stream) == [TextPiece("Hel"), TextPiece("lo"), Answer("Hello", usage=Usage(9, 7))]


def test_what_is_not_known_is_skipped() -> None:
    """The API adds event and delta types without notice."""
    odd = [
        {"type": "message_sparkle", "x": 1},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "citations_delta", "citation": {}}},
        {"type": "content_block_delta", "index": 7, "delta": {"type": "sparkle_delta"}},
        {"type": "content_block_delta", "index": 0, "delta": None},
    ]
    assert answer(START, odd, text(0, "a"), odd, ended()).text == "a"
    assert decode_bytes(b": ping\n\nevent: ping\ndata:\n\n" + encoded(text(0, "a"), ended()))[-1].text == "a"


def test_calls_are_joined_and_empty_input_is_an_object() -> None:
    """Arguments come in pieces that are no JSON by themselves; a tool without arguments gets none."""
    whole = answer(
        START, text(0, "ok"), tool(1, "a", "f", "", '{"x"', ":1}"), tool(2, "b", "g", ""), ended("tool_use")
    )
    assert whole.calls == [ToolCallRequest("a", "f", '{"x":1}'), ToolCallRequest("b", "g", "{}")]
    assert (whole.finish_reason, whole.extra) == ("tool_calls", {})


def test_input_that_comes_whole_with_its_block_counts() -> None:
    """Compatible servers send no deltas."""
    head = {"type": "tool_use", "id": "a", "name": "f", "input": {"x": 1}}
    assert answer(block(0, head), ended("tool_use")).calls == [ToolCallRequest("a", "f", '{"x":1}')]


def test_missing_and_repeated_ids_are_made_up() -> None:
    """Two calls of one id would share one result."""
    earlier = ModelRequest("m", [Message("assistant", "", [ToolCallRequest("a", "f", "{}")])])
    whole = answer(
        tool(0, "a", "f"), tool(1, "b", "f"), tool(2, "b", "f"), tool(3, "", "f"), ended(), request=earlier
    )
    ids = [call.call_id for call in whole.calls]
    assert ids[1] == "b" and len({*ids, "a", ""}) == 6


@pytest.mark.parametrize("reason", ["max_tokens", "model_context_window_exceeded", "refusal"])
def test_a_call_cut_short_cannot_be_run(reason: str) -> None:
    """`{}` for arguments that never came would run the tool with defaults nobody asked for."""
    assert answer(tool(0, "a", "f", '{"x": "hal'), ended(reason)).calls[0].arguments == '{"x": "hal'
    first, last = answer(tool(0, "a", "f"), tool(1, "b", "f"), ended(reason)).calls
    assert (first.arguments, last.arguments) == ("{}", "{")


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("refusal", "content_filter"),
        ("something_new", "something_new"),
        (None, "stop"),
    ],
)
def test_reasons_are_said_in_the_same_words_for_every_provider(reason: str | None, said: str) -> None:
    """Callers would need to know which provider a job happened to use."""
    assert answer(text(0, "a"), ended(reason)).finish_reason == said


def test_usage_counts_cached_input_as_input() -> None:
    """As the others do; sums over providers would compare apples and pears."""
    usage = {
        "input_tokens": 1,
        "cache_read_input_tokens": 20,
        "cache_creation_input_tokens": 300,
        "output_tokens": 1,
    }
    start = {"type": "message_start", "message": {"usage": usage}}
    last = {"output_tokens": 5, "input_tokens": None}
    assert answer(start, text(0, "a"), ended("end_turn", **last)).usage == Usage(321, 5, 0, 20)


def test_thinking_is_shown_and_goes_back_signed_and_in_place() -> None:
    """The API refuses the turn after a tool call whose thinking came back changed, or not at all."""
    pieces = decode_bytes(
        encoded(START, THINKING, text(1, "ok"), tool(2, "a", "f", '{"x":1}'), ended("tool_use"))
    )
    assert pieces[:2] == [ReasoningPiece("let me "), ReasoningPiece("see")]
    whole = pieces[-1]
    content = [
        {"type": "thinking", "thinking": "let me see", "signature": "sig=="},
        {"type": "text", "text": "ok"},
        {"type": "tool_use", "id": "a", "name": "f", "input": {"x": 1}},
    ]
    messages = [
        Message("assistant", whole.text, whole.calls, extra=whole.extra),
        Message("tool", "out", call_id="a"),
    ]
    assert messages_body(ModelRequest("m", messages))["messages"][0] == {
        "role": "assistant",
        "content": content,
    }


def test_hidden_thinking_and_results_of_their_own_tools_go_back_untouched() -> None:
    """They are opaque to us and needed by them."""
    hidden = {"type": "redacted_thinking", "data": "x=="}
    search = {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}}
    found = {"type": "web_search_tool_result", "tool_use_id": "s", "content": [{"url": "u"}]}
    query = {"type": "input_json_delta", "partial_json": '{"query":"q"}'}
    whole = answer(block(0, hidden), block(1, search, query), block(2, found), text(3, "a"), ended())
    assert whole.extra["content"] == [
        hidden,
        {**search, "input": {"query": "q"}},
        found,
        {"type": "text", "text": "a"},
    ]
    assert whole.calls == []


def test_a_pair_split_over_two_deltas_is_one_character() -> None:
    """An emoji cut in half would break the log's JSON."""
    stream = encoded(text(0, "a\ud83d", "\ude00"), text(1, "b\ud83d"), ended())
    pieces = decode_bytes(stream)
    assert pieces[-1].text == "a\U0001f600b\ufffd"
    msgspec.json.encode(pieces)


@pytest.mark.parametrize(
    "stream", [b"", encoded(START, text(0, "half")), encoded(START, text(0, "a"), ended()[:1])]
)
def test_an_end_without_message_stop_is_truncated(stream: bytes) -> None:
    """A dropped connection would pass for a short answer."""
    with pytest.raises(ProviderError, match="ends in the middle") as caught:
        decode_bytes(stream)
    assert caught.value.is_retryable


@pytest.mark.parametrize(
    ("kind", "retryable"),
    [
        ("overloaded_error", True),
        ("api_error", True),
        ("rate_limit_error", True),
        ("invalid_request_error", False),
    ],
)
def test_errors_inside_a_stream(kind: str, retryable: bool) -> None:
    """After HTTP 200 an overload is an event; taken for nothing it is half an answer."""
    error = {"type": "error", "error": {"type": kind, "message": "boom"}}
    for before in ([], text(0, "half")):
        with pytest.raises(ProviderError, match="boom") as caught:
            decode_bytes(encoded(before, error))
        assert caught.value.is_retryable is retryable


@pytest.mark.parametrize("bomb", [b"{", b"[" * 100_000, b'{"type": "x", "delta": 5}', b"\xff"])
def test_hostile_json_is_an_error_and_nothing_else(bomb: bytes) -> None:
    """Anything but a `ProviderError` would take the worker along."""
    with pytest.raises(ProviderError, match="malformed") as caught:
        decode_bytes(b"data: " + bomb + b"\n\n")
    assert caught.value.is_retryable


def test_too_many_blocks_are_refused() -> None:
    """A server gone wild must not fill the worker's memory."""
    with pytest.raises(ProviderError, match="blocks"):
        answer([event for index in range(2000) for event in text(index, "")], ended())


def test_deltas_without_their_block_are_taken_as_they_are() -> None:
    """Compatible servers leave out `content_block_start`."""
    deltas = [
        {"type": "content_block_delta", "delta": {"type": "text_delta", "text": piece}} for piece in "ab"
    ]
    assert answer(deltas, ended()).text == "ab"


# --- what goes ---------------------------------------------------------------------------------------


def test_a_request_on_the_wire() -> None:
    """Roles alternate, system is apart, results of one turn are one user message: else it is a 400."""
    calls = [ToolCallRequest("a", "f", '{"x":1}'), ToolCallRequest("b.1", "g h", "broken")]
    messages = [
        Message("system", "be kind"),
        Message("user", "hi"),
        Message("assistant", "ok", calls),
        Message("tool", "out", call_id="a"),
        Message("tool", "no", call_id="b.1", is_error=True),
        Message("user", "and now?"),
        Message("system", "and brief"),
        Message("assistant", " "),
    ]
    body = messages_body(
        ModelRequest("m", messages, [ToolSpec("f", "does", {"type": "object"})], {"temperature": 0})
    )
    assert body == {
        "model": "m",
        "max_tokens": 8192,
        "temperature": 0,
        "stream": True,
        "system": "be kind\n\nand brief",
        "tools": [{"name": "f", "description": "does", "input_schema": {"type": "object"}}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "ok"},
                    {"type": "tool_use", "id": "a", "name": "f", "input": {"x": 1}},
                    {"type": "tool_use", "id": "b_1", "name": "g_h", "input": {"invalid_json": "broken"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "a", "content": "out"},
                    {"type": "tool_result", "tool_use_id": "b_1", "content": "no", "is_error": True},
                    {"type": "text", "text": "and now?"},
                ],
            },
        ],
    }


def test_parameters_of_the_request_win_over_our_defaults() -> None:
    """Longer answers, and the provider's own tools beside ours, must be possible."""
    search = {"type": "web_search", "name": "web_search"}
    request = ModelRequest(
        "m", [], [ToolSpec("f", "", {})], {"max_tokens": 5, "tools": [search], "stream": False}
    )
    body = messages_body(request)
    assert (body["max_tokens"], body["stream"]) == (5, True)
    assert [t["name"] for t in body["tools"]] == ["f", "web_search"]


# --- over HTTP, without a network --------------------------------------------------------------------


async def ask(transport: httpx.AsyncBaseTransport, **settings: Any) -> list[Any]:
    provider = Anthropic(
        Settings(**{"provider_attempts": 2, "retry_base": 0.001, **settings}), transport=transport
    )
    try:
        return [piece async for piece in provider.stream(REQUEST)]
    finally:
        await provider.aclose()


class Replies:
    """Answers each request with the next stream, and keeps the bodies."""

    def __init__(self, *streams: bytes) -> None:
        self.streams = list(streams)
        self.requests: list[httpx.Request] = []
        self.transport = httpx.MockTransport(self.reply)

    def reply(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        return httpx.Response(200, content=self.streams.pop(0), headers={"content-type": "text/event-stream"})

    def body(self, place: int) -> dict[str, Any]:
        return json.loads(self.requests[place].content)


async def test_a_pause_is_not_an_end() -> None:
    """An answer with long searches would stop in its middle, and look finished."""
    search = block(0, {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}})
    replies = Replies(
        encoded(START, search, text(1, "so "), ended("pause_turn", output_tokens=3)),
        encoded(START, text(0, "far"), ended("end_turn", output_tokens=4)),
    )
    pieces = await ask(replies.transport)
    assert pieces[:-1] == [TextPiece("so "), TextPiece("far")]
    assert (pieces[-1].text, pieces[-1].finish_reason, pieces[-1].usage) == ("so far", "stop", Usage(18, 7))
    assert replies.body(0)["messages"] == replies.body(1)["messages"][:1]
    so_far = [
        {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
        {"type": "text", "text": "so "},
    ]
    assert replies.body(1)["messages"][1:] == [{"role": "assistant", "content": so_far}]
    assert pieces[-1].extra["content"] == [*so_far, {"type": "text", "text": "far"}]


async def test_pauses_come_to_an_end() -> None:
    """A server that always pauses would be called, and paid, for ever."""
    replies = Replies(*[encoded(text(0, "a"), ended("pause_turn"))] * 50)
    pieces = await ask(replies.transport)
    assert (pieces[-1].finish_reason, len(replies.requests)) == ("pause_turn", 9)


async def test_a_failure_after_a_pause_is_not_repeated_in_secret() -> None:
    """The viewer has seen the first half already; a second one would be spliced onto it."""
    replies = Replies(
        encoded(text(0, "a"), ended("pause_turn")), encoded(START), encoded(text(0, "b"), ended())
    )
    with pytest.raises(ProviderError, match="ends in the middle"):
        await ask(replies.transport)
    assert len(replies.requests) == 2


async def test_an_error_before_any_text_is_tried_again() -> None:
    """Overload on HTTP 200 is common, and passes."""
    error = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    replies = Replies(encoded(START, error), encoded(text(0, "a"), ended()))
    assert (await ask(replies.transport))[-1].text == "a"


@pytest.mark.parametrize(
    "base", ["https://x.example", "https://x.example/", "https://x.example/v1", "https://x.example/v1/"]
)
async def test_the_address_and_the_headers(base: str) -> None:
    """People write the base URL both ways; the wrong one would be a 404 for every job."""
    replies = Replies(encoded(text(0, "a"), ended()))
    await ask(replies.transport, anthropic_base_url=base, anthropic_api_key="k\n")
    (request,) = replies.requests
    assert str(request.url) == "https://x.example/v1/messages"
    assert request.headers["x-api-key"] == "k"
    assert request.headers["anthropic-version"] == "2023-06-01"


async def test_an_answer_that_is_not_streamed_says_so() -> None:
    """Rather than a truncated one, which nobody would understand."""
    body = json.dumps({"type": "message", "content": [{"type": "text", "text": "a"}]}).encode()
    transport = httpx.MockTransport(
        lambda _: httpx.Response(200, content=body, headers={"content-type": "application/json"})
    )
    with pytest.raises(ProviderError, match="without streaming"):
        await ask(transport)
