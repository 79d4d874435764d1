"""Chat completions: every habit of the compatible servers, as bytes, and what must come of it."""

from __future__ import annotations

import json
from typing import Any

import httpx
import msgspec
import pytest

from streamjobs.config import Settings
from streamjobs.errors import ProviderError
from streamjobs.events import ToolCallRequest, Usage
from streamjobs.llm import Answer, Message, ModelRequest, OpenAI, ReasoningPiece, TextPiece, ToolSpec
from streamjobs.llm.openai import ChatDecoder, chat_body
from streamjobs.llm.sse import EventParser
from streamjobs.llm.toolcalls import Arguments

REQUEST = ModelRequest("m", [Message("user", "hi")])
DONE = "[DONE]"
STOP = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}


def say(**delta: Any) -> dict[str, Any]:
    return {
        "id": "c",
        "object": "chat.completion.chunk",
        "choices": [{"index": 0, "delta": delta, "finish_reason": None}],
    }


def call(
    index: int | None = None, call_id: str | None = None, name: str | None = None, args: Any = None
) -> dict[str, Any]:
    """A delta of a tool call; None leaves the field out."""
    function = {key: value for key, value in (("name", name), ("arguments", args)) if value is not None}
    fields = {"index": index, "id": call_id, "function": function}
    return {key: value for key, value in fields.items() if value is not None}


def finish(reason: str | None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}


def decode(*chunks: Any, request: ModelRequest = REQUEST) -> list[Any]:
    """Feed chunks (objects, or the text of a data line) through parser and decoder."""
    texts = [chunk if isinstance(chunk, str) else json.dumps(chunk) for chunk in chunks]
    return decode_bytes("".join(f"data: {text}\n\n" for text in texts).encode(), request)


def decode_bytes(stream: bytes, request: ModelRequest = REQUEST) -> list[Any]:
    parser, decoder = EventParser(), ChatDecoder(request)
    events = [*parser.feed(stream), *parser.close()]
    return [*(piece for event in events for piece in decoder.feed(event)), *decoder.end()]


def answer(*chunks: Any, request: ModelRequest = REQUEST) -> Answer:
    *pieces, last = decode(*chunks, request=request)
    assert isinstance(last, Answer)
    assert last.text == "".join(piece.text for piece in pieces if isinstance(piece, TextPiece))
    assert all(piece.text for piece in pieces)
    return last


def calls_of(*deltas: Any, reason: str = "tool_calls") -> list[tuple[str, str]]:
    """(tool, arguments) of what the deltas amount to; a list is several calls in one chunk."""
    chunks = [say(tool_calls=delta if isinstance(delta, list) else [delta]) for delta in deltas]
    found = answer(*chunks, finish(reason), DONE).calls
    assert len({c.call_id for c in found}) == len(found) and all(c.call_id for c in found)
    return [(c.tool, c.arguments) for c in found]


# --- text --------------------------------------------------------------------------------------------


def test_a_plain_answer() -> None:
    """The case that everybody has."""
    usage = {
        "prompt_tokens": 9,
        "completion_tokens": 4,
        "prompt_tokens_details": {"cached_tokens": 3},
        "completion_tokens_details": {"reasoning_tokens": 2},
    }
    pieces = decode(
        say(role="assistant", content=""),
        say(content="Hel"),
        say(content="lo"),
        STOP,
        {"choices": [], "usage": usage},
        DONE,
    )
    assert pieces == [TextPiece("Hel"), TextPiece("lo"), Answer("Hello", usage=Usage(9, 4, 2, 3))]


ODD_CHUNKS = {
    "null delta": {"choices": [{"delta": None}]},
    "no delta": {"choices": [{"index": 0}]},
    "null content": say(content=None),
    "empty role": say(role="", content=""),
    "no choices": {"id": None, "created": None, "model": None},
    "null choices": {"choices": None},
    "azure's filter chunk": {"choices": [], "prompt_filter_results": [{"prompt_index": 0}]},
    "another choice": {"choices": [{"index": 1, "delta": {"content": "other"}}]},
    "null usage": {"choices": [], "usage": None},
    "empty usage": {"choices": [], "usage": {}},
    "null numbers": {"choices": [], "usage": {"prompt_tokens": None, "completion_tokens_details": None}},
    "null calls": say(tool_calls=None),
}


@pytest.mark.parametrize("odd", ODD_CHUNKS.values(), ids=ODD_CHUNKS.keys())
def test_chunks_that_say_nothing_are_accepted(odd: Any) -> None:
    """Each comes from a server in use; failing on one loses every answer of that server."""
    assert answer(odd, say(content="a"), odd, STOP, odd, DONE) == Answer("a")


def test_content_may_be_a_list_of_parts() -> None:
    """Mistral-like servers; their text would be missing, their thinking shown as text."""
    thinking = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}
    pieces = decode(
        say(content=[thinking, {"type": "text", "text": "a"}, "b", None, {"type": "image"}]), STOP
    )
    assert pieces == [ReasoningPiece("hm"), TextPiece("ab"), Answer("ab")]


def test_a_refusal_is_shown() -> None:
    """Otherwise a refused question has an empty answer."""
    assert answer(say(refusal="I cannot.", content=None), STOP).text == "I cannot."


@pytest.mark.parametrize(
    "framing",
    [
        b": OPENROUTER PROCESSING\n\ndata: %s\n\n: keep-alive\n\ndata: %s\n\ndata: [DONE]\n\n",
        b"event: ping\ndata: alive\n\ndata:%s\n\ndata:\n\ndata:%s\n\ndata:[DONE]\n\n",
        b"data: %s\r\n\r\ndata: %s\r\n\r\ndata: [DONE]\r\n\r\n",
        b"data: %s\n\ndata: %s\n\n",
        b"data: %s\n\ndata: %s\n\ndata:  [DONE] ",
    ],
)
def test_framing_habits(framing: bytes) -> None:
    """Comments, pings, missing spaces, CRLF, a missing or unfinished `[DONE]`: one server or another each."""
    one = json.dumps(say(content="a\u2028b"), ensure_ascii=False).encode()
    assert decode_bytes(framing % (one, json.dumps(STOP).encode()))[-1] == Answer("a\u2028b")


def test_nothing_counts_after_done() -> None:
    """What a proxy appends is not the model's."""
    assert answer(say(content="a"), STOP, DONE, say(content="b"), "not json").text == "a"


def test_a_pair_split_over_two_chunks_is_one_character() -> None:
    """An emoji cut in half would reach browsers as two boxes, or break the log's JSON."""
    pieces = decode(
        '{"choices":[{"delta":{"content":"a\\ud83d"}}]}',
        '{"choices":[{"delta":{"content":"\\uDE00b"}}]}',
        STOP,
    )
    assert pieces == [TextPiece("a"), TextPiece("\U0001f600b"), Answer("a\U0001f600b")]


def test_halves_that_stay_alone_are_replaced() -> None:
    """A lone half cannot be stored; the job would fail at its last token."""
    pieces = decode('{"choices":[{"delta":{"content":"x\\ude00y\\ud83d"}}]}', STOP)
    assert pieces == [TextPiece("x\ufffdy"), TextPiece("\ufffd"), Answer("x\ufffdy\ufffd")]
    msgspec.json.encode(pieces)


def test_halves_elsewhere_in_a_chunk_do_no_harm() -> None:
    """The same half in a field that is kept for the provider would fail the job when it is recorded."""
    half = r"\ud83d"
    function = f'{{"name":"t","arguments":"{{\\"a\\":\\"{half}\\"}}"}}'
    calls = f'[{{"id":"{half}","function":{function},"extra_content":{{"s":"{half}"}}}}]'
    chunk = f'{{"choices":[{{"delta":{{"reasoning_content":"r{half}","tool_calls":{calls}}}}}]}}'
    msgspec.json.encode(answer(chunk, STOP))


# --- usage and ends ----------------------------------------------------------------------------------


def test_usage_is_taken_wherever_it_stands_and_the_last_wins() -> None:
    """DeepSeek puts it on the last content chunk, vLLM on every chunk; bills would be wrong."""
    last_content = {
        **STOP,
        "usage": {"prompt_tokens": 5, "completion_tokens": 2, "prompt_cache_hit_tokens": 4},
    }
    assert answer(say(content="a"), last_content).usage == Usage(5, 2, 0, 4)
    early = {**say(content="a"), "usage": {"prompt_tokens": 1, "completion_tokens": 1}}
    assert answer(early, {**STOP, "usage": {"prompt_tokens": 5, "completion_tokens": 9}}).usage == Usage(5, 9)
    assert answer(early, STOP, {"choices": [], "usage": None}).usage == Usage(1, 1)


def test_reading_goes_on_after_the_finish_reason() -> None:
    """Usage comes after it."""
    assert answer(STOP, {"choices": [], "usage": {"prompt_tokens": 5}}, DONE).usage == Usage(5)


@pytest.mark.parametrize(
    ("chunks", "reason"),
    [
        ([finish("stop")], "stop"),
        ([DONE], "stop"),
        ([finish(None), DONE], "stop"),
        ([finish(""), DONE], "stop"),
        ([finish("length"), DONE], "length"),
        ([finish("content_filter")], "content_filter"),
        ([finish("eos")], "eos"),
    ],
)
def test_what_ends_an_answer(chunks: list[Any], reason: str) -> None:
    """Ollama never says why it ended; others never say `[DONE]`. Both are whole answers."""
    assert answer(say(content="a"), *chunks).finish_reason == reason


@pytest.mark.parametrize(
    "chunks", [[], [say(content="half a sent")], [say(tool_calls=[call(0, "a", "t", "{}")])]]
)
def test_an_end_with_neither_reason_nor_done_is_truncated(chunks: list[Any]) -> None:
    """A dropped connection would pass for a short answer, or run a call that was not finished."""
    with pytest.raises(ProviderError, match="ends in the middle") as caught:
        decode(*chunks)
    assert caught.value.is_retryable


@pytest.mark.parametrize("reason", ["error", "insufficient_system_resource"])
def test_a_finish_reason_can_be_a_failure(reason: str) -> None:
    """Half an answer of an overloaded server would pass for a whole one."""
    with pytest.raises(ProviderError, match=reason) as caught:
        decode(say(content="half"), finish(reason))
    assert caught.value.is_retryable


def test_broken_json_is_a_retryable_error_unless_the_answer_is_whole() -> None:
    """A garbled line must neither crash the worker nor be skipped, with the words in it."""
    with pytest.raises(ProviderError, match="malformed") as caught:
        decode(say(content="a"), '{"choices": [tru}', STOP)
    assert caught.value.is_retryable
    assert answer(say(content="a"), STOP, '{"choices": [], "us').text == "a"


@pytest.mark.parametrize(
    "bomb",
    [
        "[" * 100_000,
        '{"x":' * 100_000,
        '{"choices": 5}',
        '"text"',
        "9" * 6000,
        '{"choices":[{"delta":{"content":"\\ud83d"}}',
        "\udcff",
    ],
)
def test_hostile_json_is_an_error_and_nothing_else(bomb: str) -> None:
    """Deep nesting raises RecursionError, bad UTF-8 UnicodeDecodeError: either would end the worker."""
    with pytest.raises(ProviderError, match="malformed"):
        decode_bytes(b"data: " + bomb.encode("utf-8", "surrogateescape") + b"\n\n")


# --- errors on HTTP 200 ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chunk", "retryable", "status"),
    [
        ({"error": {"message": "boom", "type": "server_error", "code": None}}, True, None),
        (
            {
                "error": {"message": "boom", "code": 502},
                "choices": [{"delta": {"content": ""}, "finish_reason": "error"}],
            },
            True,
            502,
        ),
        ({"error": {"message": "boom", "code": "429"}}, True, 429),
        ({"error": {"message": "boom", "code": 402}}, False, 402),
        ({"error": {"message": "boom", "type": "invalid_request_error"}}, False, None),
        ({"error": {"message": "boom", "code": "context_length_exceeded"}}, False, None),
        ({"object": "error", "message": "boom", "type": "BadRequestError", "code": 400}, False, 400),
        ({"error": "boom"}, True, None),
    ],
)
def test_errors_inside_a_stream(chunk: Any, retryable: bool, status: int | None) -> None:
    """Looked for in choices only, an error is an empty answer; a final one that is retried is paid again."""
    for before in ([], [say(content="a")]):
        with pytest.raises(ProviderError, match="boom") as caught:
            decode(*before, chunk)
        assert (caught.value.is_retryable, caught.value.status) == (retryable, status)


def test_an_error_event_is_an_error() -> None:
    """Some gateways name the event and send only the message."""
    with pytest.raises(ProviderError, match="boom"):
        decode_bytes(b'event: error\ndata: {"message": "boom"}\n\n')


# --- reasoning ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "delta",
    [
        {"reasoning_content": "why"},
        {"reasoning": "why"},
        {"reasoning": "why", "reasoning_content": None},
        {"reasoning": "why", "reasoning_content": "why"},
        {"reasoning_details": [{"type": "reasoning.text", "text": "why"}]},
        {"reasoning": "why", "reasoning_details": [{"type": "reasoning.text", "text": "why"}]},
    ],
)
def test_reasoning_by_any_name_is_shown_once(delta: Any) -> None:
    """DeepSeek, OpenRouter, Ollama and vLLM name it differently, some twice at once."""
    assert decode(say(content="", **delta), say(content="a"), STOP) == [
        ReasoningPiece("why"),
        TextPiece("a"),
        Answer("a"),
    ]


def test_reasoning_content_goes_back_with_the_calls() -> None:
    """DeepSeek refuses the next turn with HTTP 400 otherwise; even an empty one must go back."""
    chunks = [
        say(reasoning_content="I "),
        say(reasoning_content="see"),
        say(tool_calls=[call(0, "a", "t", "{}")]),
        STOP,
    ]
    whole = answer(*chunks)
    assert whole.extra == {"reasoning_content": "I see"}
    assert answer(say(reasoning_content=""), chunks[2], STOP).extra == {"reasoning_content": ""}
    assert answer(say(reasoning_content=None), chunks[2], STOP).extra == {}
    sent = chat_body(ModelRequest("m", [Message("assistant", "", whole.calls, extra=whole.extra)]))[
        "messages"
    ]
    assert sent[0]["reasoning_content"] == "I see"


def test_reasoning_details_are_joined_and_go_back() -> None:
    """OpenRouter wants them back; kept one by one they would fill the log with a record for each token."""
    parts = [
        {"type": "reasoning.text", "index": 0, "text": "a", "signature": None},
        {"type": "reasoning.text", "index": 0, "text": "b", "signature": "s"},
        {"type": "reasoning.encrypted", "index": 1, "data": "x"},
        {"type": "reasoning.encrypted", "index": 1, "data": "y"},
    ]
    whole = answer(
        *[say(reasoning_details=[part]) for part in parts], say(tool_calls=[call(0, "a", "t", "{}")]), STOP
    )
    assert whole.extra["reasoning_details"] == [
        {"type": "reasoning.text", "index": 0, "text": "ab", "signature": "s"},
        *parts[2:],
    ]
    sent = chat_body(ModelRequest("m", [Message("assistant", "", whole.calls, extra=whole.extra)]))[
        "messages"
    ]
    assert sent[0]["reasoning_details"] == whole.extra["reasoning_details"]


def test_extra_content_of_a_call_goes_back_with_it() -> None:
    """Gemini's thought signature must make the round trip."""
    extra = {"google": {"thought_signature": "sig"}}
    whole = answer(say(tool_calls=[{**call(0, "a", "t", "{}"), "extra_content": extra}]), STOP)
    assert whole.calls == [ToolCallRequest("a", "t", "{}", {"extra_content": extra})]
    sent = chat_body(ModelRequest("m", [Message("assistant", "", whole.calls)]))["messages"]
    assert sent[0]["tool_calls"][0]["extra_content"] == extra


# --- tool calls --------------------------------------------------------------------------------------

A, B = '{"a":1}', '{"b":{"c":2}}'

TRACKER = {
    "as OpenAI streams": (
        [call(0, "x", "f", ""), call(0, None, None, '{"a"'), call(0, None, None, ":1}")],
        [("f", A)],
    ),
    "two in parallel": (
        [call(0, "x", "f", ""), call(0, args=A), call(1, "y", "g", ""), call(1, args=B)],
        [("f", A), ("g", B)],
    ),
    "interleaved": (
        [
            call(0, "x", "f", '{"a"'),
            call(1, "y", "g", '{"b":'),
            call(0, args=":1}"),
            call(1, args='{"c":2}}'),
        ],
        [("f", A), ("g", B)],
    ),
    "two whole in one chunk": ([[call(0, "x", "f", A), call(1, "y", "g", B)]], [("f", A), ("g", B)]),
    "index 0 for all (Ollama)": ([call(0, "x", "f", A), call(0, "y", "g", B)], [("f", A), ("g", B)]),
    "index 0 for all, one tool": ([call(0, "x", "f", A), call(0, "y", "f", B)], [("f", A), ("f", B)]),
    "index 0 for all, no ids": ([call(0, None, "f", A), call(0, None, "f", B)], [("f", A), ("f", B)]),
    "index 0 for all, one chunk": ([[call(0, "x", "f", A), call(0, "y", "f", A)]], [("f", A), ("f", A)]),
    "index 0 for all, in pieces": (
        [call(0, "x", "f", ""), call(0, args=A), call(0, "y", "f", ""), call(0, args=B)],
        [("f", A), ("f", B)],
    ),
    "index 0 for all, the first broken": (
        [call(0, "x", "f", '{"a":'), call(0, "y", "f", B)],
        [("f", '{"a":'), ("f", B)],
    ),
    "index 0, another name": ([call(0, None, "f", ""), call(0, None, "g", "")], [("f", "{}"), ("g", "{}")]),
    "index 0, back to the first id": (
        [call(0, "x", "f", '{"a"'), call(0, "y", "g", B), call(0, "x", None, ":1}")],
        [("f", A), ("g", B)],
    ),
    "no index (Gemini)": ([call(None, "x", "f", A), call(None, "y", "g", B)], [("f", A), ("g", B)]),
    "no index, no ids": ([call(None, None, "f", A), call(None, None, "f", A)], [("f", A), ("f", A)]),
    "no index, in pieces": ([call(None, "x", "f", '{"a"'), call(None, None, None, ":1}")], [("f", A)]),
    "no index, pieces by id": (
        [
            call(None, "x", "f", '{"a"'),
            call(None, "y", "g", '{"b":'),
            call(None, "x", None, ":1}"),
            call(None, "y", None, '{"c":2}}'),
        ],
        [("f", A), ("g", B)],
    ),
    "no id at first": ([call(0, None, "f", '{"a"'), call(0, "x", None, ":1}")], [("f", A)]),
    "empty id": ([call(0, "", "f", A)], [("f", A)]),
    "arguments before the name": ([call(0, "x", None, '{"a"'), call(0, None, "f", ":1}")], [("f", A)]),
    "name repeated": ([call(0, "x", "f", '{"a"'), call(0, "x", "f", ":1}")], [("f", A)]),
    "name repeated, pieces open objects": (
        [call(0, "x", "f", '{"b":'), call(0, "x", "f", '{"c":2}'), call(0, "x", "f", "}")],
        [("f", B)],
    ),
    "name blank": ([call(0, "x", "f", '{"a"'), call(0, "x", " ", ":1}")], [("f", A)]),
    "id changes": ([call(0, "x", "f", '{"a"'), call(0, "y", None, ":1}")], [("f", A)]),
    "one id for two": ([call(0, "x", "f", A), call(1, "x", "g", B)], [("f", A), ("g", B)]),
    "null arguments": ([call(0, "x", "f", None)], [("f", "{}")]),
    "literal null": ([call(0, "x", "f", "null")], [("f", "{}")]),
    "empty arguments": ([call(0, "x", "f", "")], [("f", "{}")]),
    "arguments as an object": ([call(0, "x", "f", {"a": 1})], [("f", A)]),
    "braces inside strings": (
        [call(0, None, "f", '{"a":"}'), call(0, None, "f", '{\\"'), call(0, None, "f", '"}')],
        [("f", '{"a":"}{\\""}')],
    ),
    "broken JSON is not repaired": ([call(0, "x", "f", '{"a":')], [("f", '{"a":')]),
    "blank name, no call": ([call(None, None, "", "{}")], []),
    "never a name": ([call(0, "x", None, A), call(1, "y", "g", B)], [("g", B)]),
    "ambiguous piece": (
        [call(None, "x", "f", "{"), call(None, "y", "g", "{"), call(None, None, None, "}")],
        [("f", "{"), ("g", "{")],
    ),
}


@pytest.mark.parametrize(("deltas", "expected"), TRACKER.values(), ids=TRACKER.keys())
def test_calls_are_put_together(deltas: list[Any], expected: list[tuple[str, str]]) -> None:
    """Wrong here means a tool runs with another call's arguments, twice, or not at all."""
    assert calls_of(*deltas) == expected


@pytest.mark.parametrize("reason", ["stop", "tool_calls", "function_call"])
def test_calls_count_not_the_reason_beside_them(reason: str) -> None:
    """With a named tool choice several servers say `stop`; the tools would not run."""
    whole = answer(say(tool_calls=[call(0, "x", "f", A)]), finish(reason))
    assert (len(whole.calls), whole.finish_reason) == (1, "tool_calls")


def test_whole_numbers_in_other_fields_do_not_disturb() -> None:
    """An id that is a number is no reason to lose the call."""
    assert calls_of({"index": "0", "id": 7, "function": {"name": "f", "arguments": A}}) == [("f", A)]


@pytest.mark.parametrize("reason", ["length", "content_filter"])
def test_a_call_cut_short_cannot_be_run(reason: str) -> None:
    """`{}` for arguments that never came would run the tool with defaults nobody asked for."""
    assert calls_of(call(0, "x", "f", ""), call(1, "y", "g", ""), reason=reason) == [("f", "{}"), ("g", "{")]
    assert calls_of(call(0, "x", "f", '{"a": "hal'), reason=reason) == [("f", '{"a": "hal')]
    assert answer(say(tool_calls=[call(0, "x", "f", A)]), finish(reason)).finish_reason == reason


def test_ids_are_unique_in_the_whole_conversation() -> None:
    """Servers number calls anew in each answer; two calls of one job would share one record."""
    earlier = ModelRequest("m", [Message("assistant", "", [ToolCallRequest("call_0", "f", "{}")])])
    deltas = [
        call(0, "call_0", "f", A),
        call(1, "fresh", "f", A),
        call(2, "fresh", "f", A),
        call(3, "", "f", A),
    ]
    ids = [c.call_id for c in answer(say(tool_calls=deltas), STOP, request=earlier).calls]
    assert ids[1] == "fresh" and len(set(ids)) == 4 and "call_0" not in ids


def test_too_many_calls_are_refused() -> None:
    """A model gone wild must not fill the worker's memory with calls."""
    with pytest.raises(ProviderError, match="tool calls"):
        calls_of([call(i, f"id{i}", "f", "{}") for i in range(300)])


@pytest.mark.parametrize(
    ("parts", "closed"),
    [
        (["{}"], True),
        (['{"a":', '{"b":1}'], False),
        (['{"a":', '{"b":1}', "}"], True),
        (['{"a":"\\"', '}"'], False),
        (['{"a":"\\', '"}'], False),
        (['{"a":"\\', '"}"}'], True),
        (["[{}]"], True),
        ([" "], False),
    ],
)
def test_arguments_know_when_they_have_ended(parts: list[str], closed: bool) -> None:
    """The tracker tells a next call from a next piece by it."""
    arguments = Arguments()
    for part in parts:
        arguments.add(part)
        _ = arguments.is_closed
    assert arguments.is_closed is closed


# --- requests ----------------------------------------------------------------------------------------


def test_a_request_on_the_wire() -> None:
    """The format that every compatible server reads."""
    calls = [ToolCallRequest("a", "f", "")]
    messages = [
        Message("system", "be kind"),
        Message("user", "hi"),
        Message("assistant", "", calls),
        Message("tool", "out", call_id="a"),
    ]
    body = chat_body(
        ModelRequest(
            "m", messages, [ToolSpec("f", "does", {"type": "object"})], {"temperature": 0, "stream": False}
        )
    )
    assert body == {
        "model": "m",
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
        "messages": [
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": "hi"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
            },
            {"role": "tool", "tool_call_id": "a", "content": "out"},
        ],
        "tools": [
            {
                "type": "function",
                "function": {"name": "f", "description": "does", "parameters": {"type": "object"}},
            }
        ],
    }


def test_a_parameter_of_none_takes_its_key_out() -> None:
    """Old servers refuse `stream_options`; there must be a way to leave it out."""
    body = chat_body(ModelRequest("m", [], parameters={"stream_options": None}))
    assert set(body) == {"model", "messages", "stream"}


def test_what_a_model_made_up_does_not_spoil_the_next_request() -> None:
    """Servers parse the history too: one broken call would make every later turn a 400."""
    body = chat_body(
        ModelRequest("m", [Message("assistant", "", [ToolCallRequest("a", "no such.tool!", '{"a":')])])
    )
    function = body["messages"][0]["tool_calls"][0]["function"]
    assert function["name"] == "no_such_tool_"
    assert json.loads(function["arguments"]) == {"invalid_json": '{"a":'}


# --- over HTTP, without a network --------------------------------------------------------------------


def replying(status: int = 200, content: bytes = b"", **headers: str) -> httpx.MockTransport:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.MockTransport(lambda _: httpx.Response(status, content=content, headers=named))


async def ask(transport: httpx.AsyncBaseTransport, **settings: Any) -> list[Any]:
    provider = OpenAI(Settings(**{"provider_attempts": 1, **settings}), transport=transport)
    try:
        return [piece async for piece in provider.stream(REQUEST)]
    finally:
        await provider.aclose()


async def test_a_server_that_does_not_stream_is_read_all_the_same() -> None:
    """Small local servers ignore `stream` and answer with one document."""
    body = {
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}],
    }
    pieces = await ask(replying(content=json.dumps(body).encode(), content_type="application/json"))
    assert pieces == [TextPiece("hi"), Answer("hi")]


async def test_an_error_document_on_http_200_is_an_error() -> None:
    """Gateways wrap the upstream's error in a 200."""
    content = b'\n\n{"error": {"message": "upstream down", "code": 503}}'
    with pytest.raises(ProviderError, match="upstream down"):
        await ask(replying(content=content, content_type="application/json"))


async def test_the_key_and_the_query_are_never_in_a_message() -> None:
    """Messages go to the log, to viewers and to webhooks."""
    echo = b'{"error": {"message": "bad key sk-secret-1 for /x?token=hush-hush"}}'
    for transport in (replying(401, echo), replying(200, b"data: " + echo + b"\n\n")):
        with pytest.raises(ProviderError) as caught:
            await ask(
                transport,
                openai_api_key=" sk-secret-1\n",
                openai_base_url="https://x.example/v1?token=hush-hush",
            )
        assert "sk-secret" not in str(caught.value) and "hush" not in str(caught.value)
        assert "openai" in str(caught.value) and "bad key" in str(caught.value)


async def test_the_key_and_the_whole_base_url_are_used() -> None:
    """A trailing newline in a mounted secret, and Azure's query, are common; each would be a 4xx for ever."""
    seen: list[httpx.Request] = []

    def answering(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, content=b"data: [DONE]\n\n")

    await ask(
        httpx.MockTransport(answering),
        openai_api_key="k\n",
        openai_base_url="https://x.example/v1/?api-version=2",
    )
    assert str(seen[0].url) == "https://x.example/v1/chat/completions?api-version=2"
    assert seen[0].headers["authorization"] == "Bearer k"


@pytest.mark.parametrize(
    ("key", "base"),
    [
        ("sk-schlüssel", "http://x"),
        ("a\nb", "http://x"),
        ("k", "x.example/v1"),
        ("k", "ftp://x"),
        ("k", "http://"),
        ("k", "http://u:schl@x"),
    ],
)
def test_settings_that_cannot_work_say_so_without_the_key(key: str, base: str) -> None:
    """Otherwise each job fails with an exception from deep inside, and is tried again."""
    with pytest.raises(ProviderError) as caught:
        OpenAI(Settings(openai_api_key=key, openai_base_url=base), transport=replying())
    assert not caught.value.is_retryable and "schl" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "content", "retryable"),
    [
        (400, b'{"error": {"message": "bad"}}', False),
        (401, b"", False),
        (402, b'{"error": {"message": "no credits", "code": 402}}', False),
        (404, b"<html>not here</html>", False),
        (408, b"", True),
        (429, b'[{"error": {"message": "slow down"}}]', True),
        (429, b'{"error": {"message": "no money", "code": "insufficient_quota"}}', False),
        (500, b"\xff\xfe", True),
        (501, b"", False),
        (503, b'{"message": "asleep"}', True),
        (307, b"", False),
    ],
)
async def test_which_statuses_are_worth_another_try(status: int, content: bytes, retryable: bool) -> None:
    """Retrying a 400 wastes time; not retrying a 503 loses the job."""
    with pytest.raises(ProviderError, match=f"HTTP {status}") as caught:
        await ask(replying(status, content))
    assert (caught.value.is_retryable, caught.value.status) == (retryable, status)


async def test_a_huge_error_body_is_not_read() -> None:
    """An error page of a gigabyte, times every job that meets it."""
    read = 0

    class Endless(httpx.AsyncByteStream):
        async def __aiter__(self) -> Any:
            nonlocal read
            while True:
                read += 1000
                yield b"\x1b[31m line\n " * 77

    with pytest.raises(ProviderError) as caught:
        await ask(httpx.MockTransport(lambda _: httpx.Response(500, stream=Endless())))
    assert read < 10_000
    assert len(str(caught.value)) < 400 and "\x1b" not in str(caught.value) and "\n" not in str(caught.value)


async def test_a_compressed_answer_is_read_and_a_bomb_is_not() -> None:
    """Proxies compress whatever we ask for; a megabyte that unpacks to a gigabyte must stop at the bound."""
    import gzip

    stream = b"data: " + json.dumps(say(content="hi")).encode() + b"\n\ndata: [DONE]\n\n"
    kind = {"content_encoding": "gzip", "content_type": "text/event-stream"}
    assert (await ask(replying(content=gzip.compress(stream), **kind)))[-1].text == "hi"
    with pytest.raises(ProviderError, match="over"):
        await ask(replying(content=gzip.compress(b": x\n" * 1_000_000), **kind), provider_max_bytes=100_000)
    with pytest.raises(ProviderError, match="decompress"):
        await ask(
            httpx.MockTransport(
                lambda _: httpx.Response(200, stream=Plain(b"no gzip"), headers={"content-encoding": "gzip"})
            )
        )


class Plain(httpx.AsyncByteStream):
    def __init__(self, content: bytes) -> None:
        self._content = content

    async def __aiter__(self) -> Any:
        yield self._content


async def test_an_answer_over_the_bound_ends() -> None:
    """An endless answer must not become an endless job."""
    stream = b"".join(b"data: " + json.dumps(say(content="x" * 50)).encode() + b"\n\n" for _ in range(100))
    transport = httpx.MockTransport(lambda _: httpx.Response(200, stream=Plain(stream)))
    with pytest.raises(ProviderError, match="over 5000 bytes") as caught:
        await ask(transport, provider_max_bytes=5000)
    assert not caught.value.is_retryable


class Breaking(httpx.AsyncByteStream):
    """A body whose connection breaks at its end."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    async def __aiter__(self) -> Any:
        yield self._content
        raise httpx.ReadError("reset")


async def test_a_connection_that_breaks_after_the_whole_answer_does_no_harm() -> None:
    """Some servers end by closing the socket; their answers would all be thrown away."""
    stream = b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in (say(content="hi"), STOP))
    transport = httpx.MockTransport(lambda _: httpx.Response(200, stream=Breaking(stream)))
    assert (await ask(transport))[-1] == Answer("hi")
    half = httpx.MockTransport(lambda _: httpx.Response(200, stream=Breaking(b"data: {}\n\n")))
    with pytest.raises(ProviderError, match="connection failed") as caught:
        await ask(half)
    assert caught.value.is_retryable


async def test_a_page_in_place_of_a_stream_says_so() -> None:
    """A login page of a proxy is a common answer; "truncated" would send people off the wrong way."""
    with pytest.raises(ProviderError, match="text/html") as caught:
        await ask(replying(200, b"<!doctype html>", content_type="text/html; charset=utf-8"))
    assert caught.value.is_retryable
