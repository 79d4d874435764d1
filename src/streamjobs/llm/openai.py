"""Chat completions, as OpenAI and the many compatible servers stream them.

Rule 1: an answer is whole if a `finish_reason` or `[DONE]` was seen; a clean end with neither is truncated.
Rule 2: tool calls count, not the `finish_reason` beside them.
Rule 3: look for an error before looking for choices: servers send errors with HTTP 200.
Rule 4: `reasoning_content`, `reasoning_details` and `extra_content` go back with the calls they came with;
DeepSeek, OpenRouter and Gemini refuse or forget otherwise.

Every field is optional and of any type until looked at: see the table of quirks in the tests.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import cast

import httpx
import msgspec

from streamjobs.config import Settings
from streamjobs.errors import ProviderError
from streamjobs.events import Json, ToolCallRequest, Usage
from streamjobs.llm.base import Answer, Message, ModelRequest, Piece, ReasoningPiece, TextPiece, ToolSpec
from streamjobs.llm.http import Endpoint, endpoint_url
from streamjobs.llm.sse import ServerSentEvent
from streamjobs.llm.toolcalls import CallDelta, ToolCallTracker
from streamjobs.llm.wire import (
    CallIds,
    Characters,
    clean_json,
    decoder_of,
    encode_body,
    error_from,
    sendable_arguments,
    sendable_name,
)

_CUT_SHORT = frozenset({"length", "content_filter"})
_FAILED = frozenset({"error", "insufficient_system_resource"})
_FINISH = {"": "stop", "function_call": "tool_calls", "max_tokens": "length"}


# --- what comes --------------------------------------------------------------------------------------


class _Function(msgspec.Struct):
    name: Json = None
    arguments: Json = None


class _CallDelta(msgspec.Struct):
    index: Json = None
    id: Json = None
    function: _Function | None = None
    extra_content: Json = None


class _Delta(msgspec.Struct):
    content: Json = None
    refusal: Json = None
    reasoning_content: Json = None
    reasoning: Json = None
    reasoning_details: Json = None
    tool_calls: list[_CallDelta] | None = None

    @property
    def has_more(self) -> bool:
        """Whether there is anything beside content: rarely, and a token must cost little."""
        return bool(
            self.reasoning_content is not None or self.reasoning or self.reasoning_details or self.refusal
        )


class _Choice(msgspec.Struct):
    index: Json = None
    delta: _Delta | None = None
    message: _Delta | None = None
    """In place of `delta`, from a server that does not stream."""
    finish_reason: Json = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: dict[str, Json] | None = None
    error: Json = None
    object: Json = None
    message: Json = None
    code: Json = None
    type: Json = None


_decode = decoder_of(_Chunk)


class ChatDecoder:
    """Folds the chunks of one answer."""

    def __init__(self, request: ModelRequest) -> None:
        self.is_done = False
        self._ids = CallIds(request.messages)
        self._calls = ToolCallTracker()
        self._text: list[str] = []
        self._characters = Characters()
        self._reasoning_characters = Characters()
        self._reasoning_content: list[str] | None = None
        self._details: list[dict[str, Json]] = []
        self._finish_reason = ""
        self._usage = Usage()

    @property
    def is_complete(self) -> bool:
        """A finish reason or `[DONE]` was seen."""
        return self.is_done or bool(self._finish_reason)

    def feed(self, event: ServerSentEvent) -> list[Piece]:
        """Take one chunk."""
        data = event.data.strip()
        if self.is_done or not data or event.event == "ping":
            return []
        if data == b"[DONE]":
            self.is_done = True
            return []
        chunk = self._chunk(data)
        _require_no_error(event, chunk)
        if chunk.usage:
            self._usage = _usage(chunk.usage)
        first = next((choice for choice in chunk.choices or () if choice.index in (None, 0)), None)
        return [] if first is None else self._choice(first)

    def end(self) -> list[Piece]:
        """The last pieces and the `Answer`."""
        if not self.is_complete:
            raise ProviderError("the answer ends in the middle", retryable=True)
        is_cut = self._finish_reason in _CUT_SHORT
        last = self._pieces(self._characters.flush(), self._reasoning_characters.flush())
        calls = self._calls.finish(self._ids, is_cut=is_cut)
        finish_reason = "tool_calls" if calls and not is_cut else self._finish_reason or "stop"
        extra = clean_json(self._extra()) if calls else {}
        return [*last, Answer("".join(self._text), calls, finish_reason, self._usage, extra)]

    def resume(self) -> bytes | None:
        """Nothing: one request is one answer."""
        return None

    def _chunk(self, data: bytes) -> _Chunk:
        """Read a chunk; what does not parse after a finish reason (half a usage chunk) costs no answer."""
        try:
            return _decode(data)
        except ProviderError:
            if self._finish_reason:
                return _Chunk()
            raise

    def _choice(self, choice: _Choice) -> list[Piece]:
        pieces: list[Piece] = []
        delta = choice.delta or choice.message
        if delta is not None:
            pieces = self._delta(delta)
        if isinstance(choice.finish_reason, str) and choice.finish_reason:
            self._finish(choice.finish_reason)
        return pieces

    def _finish(self, reason: str) -> None:
        if reason in _FAILED:
            raise ProviderError(f"the answer was broken off: {reason}", retryable=True)
        self._finish_reason = _FINISH.get(reason, reason)

    def _delta(self, delta: _Delta) -> list[Piece]:
        for call in delta.tool_calls or ():
            self._calls.add(_call_delta(call))
        if type(delta.content) is str and not delta.has_more:
            return self._pieces(self._characters.feed(delta.content), "")
        text = (_string(delta.content) or _text_of(delta.content)) + _string(delta.refusal)
        return self._pieces(self._characters.feed(text), self._reasoning(delta))

    def _reasoning(self, delta: _Delta) -> str:
        """The reasoning in a delta, whichever of its names it goes by; some send it under two."""
        _merge_details(self._details, _list(delta.reasoning_details))
        if isinstance(delta.reasoning_content, str):
            self._reasoning_content = self._reasoning_content or []
            self._reasoning_content.append(delta.reasoning_content)
        text = delta.reasoning_content or delta.reasoning or _text_of(delta.reasoning_details)
        text = text or _text_of(_thinking_in(delta.content))
        return self._reasoning_characters.feed(text) if isinstance(text, str) else ""

    def _pieces(self, text: str, reasoning: str) -> list[Piece]:
        pieces: list[Piece] = []
        if reasoning:
            pieces.append(ReasoningPiece(reasoning))
        if text:
            self._text.append(text)
            pieces.append(TextPiece(text))
        return pieces

    def _extra(self) -> dict[str, Json]:
        extra: dict[str, Json] = {}
        if self._reasoning_content is not None:
            extra["reasoning_content"] = "".join(self._reasoning_content)
        if self._details:
            extra["reasoning_details"] = self._details
        return extra


def _require_no_error(event: ServerSentEvent, chunk: _Chunk) -> None:
    if chunk.error:
        raise error_from(chunk.error)
    if event.event == "error" or chunk.object == "error":
        raise error_from({"message": chunk.message, "code": chunk.code, "type": chunk.type})


def _call_delta(delta: _CallDelta) -> CallDelta:
    function = delta.function or _Function()
    arguments = function.arguments
    return CallDelta(
        delta.index if isinstance(delta.index, int) else None,
        delta.id if isinstance(delta.id, str) else "",
        function.name.strip() if isinstance(function.name, str) else "",
        # Servers near to Ollama's own format send the arguments as an object.
        msgspec.json.encode(arguments).decode() if isinstance(arguments, dict) else _string(arguments),
        {"extra_content": clean_json(delta.extra_content)} if delta.extra_content else None,
    )


def _string(value: Json) -> str:
    return value if isinstance(value, str) else ""


def _list(value: Json) -> list[Json]:
    return cast("list[Json]", value) if isinstance(value, list) else []


def _text_of(parts: Json) -> str:
    """The text in a list of parts: `[{"type": "text", "text": …}, …]`, of content or of reasoning."""
    return "".join(_text_of_part(part) for part in _list(parts))


def _text_of_part(part: Json) -> str:
    fields = _object(part)
    return _string(part) or _string(fields.get("text")) or _string(fields.get("summary"))


def _thinking_in(content: Json) -> list[Json]:
    """The reasoning inside a list of content parts: Mistral nests text parts in a `thinking` part."""
    return [inner for part in _list(content) for inner in _list(_object(part).get("thinking"))]


def _merge_details(details: list[dict[str, Json]], parts: list[Json]) -> None:
    """Append OpenRouter's reasoning details; pieces of one detail become one."""
    for new in filter(None, map(_object, parts)):
        if details and _is_same_detail(details[-1], new):
            _extend_detail(details[-1], new)
        else:
            details.append(dict(new))


def _is_same_detail(one: dict[str, Json], other: dict[str, Json]) -> bool:
    is_text = one.get("type") != "reasoning.encrypted"
    return is_text and all(one.get(key) == other.get(key) for key in ("type", "index"))


def _extend_detail(detail: dict[str, Json], new: dict[str, Json]) -> None:
    for key, value in new.items():
        if key in {"text", "summary"}:
            detail[key] = _string(detail.get(key)) + _string(value)
        elif value is not None:
            detail[key] = value


def _usage(fields: dict[str, Json]) -> Usage:
    completion = _object(fields.get("completion_tokens_details"))
    prompt = _object(fields.get("prompt_tokens_details"))
    return Usage(
        input_tokens=_count(fields.get("prompt_tokens")),
        output_tokens=_count(fields.get("completion_tokens")),
        reasoning_tokens=_count(completion.get("reasoning_tokens")),
        cached_tokens=_count(prompt.get("cached_tokens")) or _count(fields.get("prompt_cache_hit_tokens")),
    )


def _object(value: Json) -> dict[str, Json]:
    return cast("dict[str, Json]", value) if isinstance(value, dict) else {}


def _count(value: Json) -> int:
    return value if isinstance(value, int) and value > 0 else 0


# --- what goes ---------------------------------------------------------------------------------------


def chat_body(request: ModelRequest) -> dict[str, Json]:
    """The body of a request. A parameter of None takes its key out (`stream_options`, for old servers)."""
    body: dict[str, Json] = {"stream_options": {"include_usage": True}, **request.parameters}
    tools = [*map(_tool, request.tools), *(request.parameters.get("tools") or ())]
    body |= {
        "model": request.model,
        "messages": [_message(message) for message in request.messages],
        "stream": True,
        "tools": tools or None,
    }
    return {key: value for key, value in body.items() if value is not None}


def _tool(spec: ToolSpec) -> dict[str, Json]:
    function = {"name": spec.name, "description": spec.description, "parameters": spec.parameters}
    return {"type": "function", "function": function}


def _message(message: Message) -> dict[str, Json]:
    if message.role == "tool":
        return {"role": "tool", "tool_call_id": message.call_id, "content": message.content}
    if message.role == "assistant" and message.calls:
        return {
            "role": "assistant",
            "content": message.content or None,
            "tool_calls": [_call(call) for call in message.calls],
            **_returned(message.extra, "reasoning_content", "reasoning_details"),
        }
    return {"role": message.role, "content": message.content}


def _call(call: ToolCallRequest) -> dict[str, Json]:
    arguments = msgspec.json.encode(sendable_arguments(call.arguments)).decode()
    function = {"name": sendable_name(call.tool), "arguments": arguments}
    return {
        "id": call.call_id,
        "type": "function",
        "function": function,
        **_returned(call.extra, "extra_content"),
    }


def _returned(extra: dict[str, Json], *keys: str) -> dict[str, Json]:
    return {key: extra[key] for key in keys if key in extra}


class OpenAI:
    """The provider for every server that speaks chat completions."""

    def __init__(self, settings: Settings, *, transport: httpx.AsyncBaseTransport | None = None) -> None:
        key = settings.openai_api_key.strip()
        self._endpoint = Endpoint(
            settings,
            name="openai",
            url=endpoint_url(settings.openai_base_url, "/chat/completions"),
            key=key,
            headers={"authorization": f"Bearer {key}"} if key else {},
            transport=transport,
        )

    def stream(self, request: ModelRequest) -> AsyncGenerator[Piece, None]:
        """Call the model and yield its answer as it comes; see `streamjobs.llm.base.Provider`."""
        return self._endpoint.stream(encode_body(chat_body(request)), lambda: ChatDecoder(request))

    async def aclose(self) -> None:
        """Close all connections."""
        await self._endpoint.aclose()
