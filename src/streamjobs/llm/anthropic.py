"""The messages API of Anthropic, streamed.

Rule 1: an answer is whole if `message_stop` was seen; nothing else ends one.
Rule 2: blocks that are not plain text or calls (signed thinking, what the provider's own tools said) go
back untouched and in their order: `Answer.extra["content"]` holds all blocks when there are such.
Rule 3: `pause_turn` is not an end: the content so far is sent back and the same answer goes on.
Rule 4: results of calls form one user message, directly after the calls.
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
from streamjobs.llm.wire import (
    MAX_CALLS,
    CallIds,
    Characters,
    clean_json,
    decoder_of,
    encode_body,
    error_from,
    finished_arguments,
    sendable_arguments,
    sendable_id,
    sendable_name,
)

VERSION = "2023-06-01"
DEFAULT_MAX_TOKENS = 8192
_MAX_PAUSES = 8
_MAX_BLOCKS = 4 * MAX_CALLS
_FINISH = {
    "": "stop",
    "end_turn": "stop",
    "stop_sequence": "stop",
    "tool_use": "tool_calls",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "refusal": "content_filter",
}
_CUT_SHORT = frozenset({"length", "content_filter"})

# What a delta adds to, and the kind of block it implies where `content_block_start` was left out.
_DELTAS = {
    "text_delta": ("text", "text"),
    "thinking_delta": ("thinking", "thinking"),
    "signature_delta": ("thinking", "signature"),
    "input_json_delta": ("tool_use", "partial_json"),
}


# --- what comes --------------------------------------------------------------------------------------


class _Event(msgspec.Struct):
    type: Json = None
    index: Json = None
    delta: dict[str, Json] | None = None
    content_block: dict[str, Json] | None = None
    message: Json = None
    usage: dict[str, Json] | None = None
    error: Json = None


_decode = decoder_of(_Event)


class Block:
    """One block of the content while it is being streamed."""

    def __init__(self, head: dict[str, Json]) -> None:
        self.kind = _string(head.get("type"))
        self.head = head
        self.parts: dict[str, list[str]] = {}

    def add(self, field: str, piece: str) -> None:
        """Append a piece of a field."""
        self.parts.setdefault(field, []).append(piece)

    def text(self, field: str) -> str:
        """A field as far as it came: what the head said, and the pieces."""
        return _string(self.head.get(field)) + "".join(self.parts.get(field, ()))

    def arguments(self) -> str:
        """The input of a call as JSON text, from pieces or, whole, from the head."""
        head = self.head.get("input")
        return self.text("partial_json") or (msgspec.json.encode(clean_json(head)).decode() if head else "")

    def finished(self) -> dict[str, Json]:
        """The block as it is sent back."""
        fields: dict[str, Json] = {field: self.text(field) for field in self.parts if field != "partial_json"}
        if self.kind.endswith("tool_use"):
            fields["input"] = sendable_arguments(self.arguments())
        return clean_json({**self.head, **fields})


class MessagesDecoder:
    """Folds the events of one answer, over as many responses as it takes."""

    def __init__(self, request: ModelRequest) -> None:
        self.is_done = False
        self._request = request
        self._ids = CallIds(request.messages)
        self._blocks: dict[int, Block] = {}
        self._earlier: list[Block] = []
        self._text: list[str] = []
        self._characters = Characters()
        self._reasoning_characters = Characters()
        self._stop_reason = ""
        self._usage: dict[str, Json] = {}
        self._earlier_usage = Usage()
        self._pauses = 0

    @property
    def is_complete(self) -> bool:
        """`message_stop` was seen."""
        return self.is_done

    def feed(self, event: ServerSentEvent) -> list[Piece]:
        """Take one event; unknown types are skipped, as the API asks of its readers."""
        if self.is_done or not event.is_progress:
            return []
        content = _decode(event.data)
        if content.error or "error" in (content.type, event.event):
            raise error_from(content.error or content.message)
        return self._event(content)

    def end(self) -> list[Piece]:
        """The last pieces, and the `Answer` unless the provider paused."""
        if not self.is_done:
            raise ProviderError("the answer ends in the middle", retryable=True)
        last = self._flush()
        self._earlier += [self._blocks[index] for index in sorted(self._blocks)]
        self._blocks = {}
        self._earlier_usage += _usage(self._usage)
        self._usage = {}
        return last if self._is_paused else [*last, self._answer()]

    def resume(self) -> bytes | None:
        """After a pause, the request with the content so far."""
        if not self._is_paused:
            return None
        self._pauses += 1
        self.is_done = False
        self._stop_reason = ""
        body = messages_body(self._request)
        body["messages"] = [*body["messages"], {"role": "assistant", "content": self._content()}]
        return encode_body(body)

    @property
    def _is_paused(self) -> bool:
        return self._stop_reason == "pause_turn" and self._pauses < _MAX_PAUSES

    def _event(self, event: _Event) -> list[Piece]:
        if event.usage:
            self._add_usage(event.usage)
        if event.type == "content_block_start":
            return self._start(_index(event), event.content_block or {})
        if event.type == "content_block_delta":
            return self._delta(_index(event), event.delta or {})
        if event.type == "content_block_stop":
            return self._flush()
        if event.type == "message_start":
            self._add_usage(_object(_object(event.message).get("usage")))
        elif event.type == "message_delta":
            self._stop_reason = _string((event.delta or {}).get("stop_reason")) or self._stop_reason
        elif event.type == "message_stop":
            self.is_done = True
        elif event.type == "message":
            raise ProviderError("the server answers without streaming", retryable=False)
        return []

    def _start(self, index: int, head: dict[str, Json]) -> list[Piece]:
        if len(self._blocks) >= _MAX_BLOCKS:
            raise ProviderError(f"the answer has over {_MAX_BLOCKS} blocks")
        self._blocks[index] = block = Block(head)
        if block.kind == "tool_use":
            head["id"] = self._ids.claim(_string(head.get("id")))
        return self._pieces(_string(head.get("text")), _string(head.get("thinking")))

    def _delta(self, index: int, delta: dict[str, Json]) -> list[Piece]:
        known = _DELTAS.get(_string(delta.get("type")))
        if known is None:
            return []
        kind, field = known
        if index not in self._blocks:
            self._start(index, {"type": kind})
        piece = _string(delta.get(field))
        self._blocks[index].add(field, piece)
        return self._pieces(piece if field == "text" else "", piece if field == "thinking" else "")

    def _pieces(self, text: str, thinking: str) -> list[Piece]:
        return self._shown(self._characters.feed(text), self._reasoning_characters.feed(thinking))

    def _flush(self) -> list[Piece]:
        return self._shown(self._characters.flush(), self._reasoning_characters.flush())

    def _shown(self, text: str, thinking: str) -> list[Piece]:
        pieces: list[Piece] = []
        if thinking:
            pieces.append(ReasoningPiece(thinking))
        if text:
            self._text.append(text)
            pieces.append(TextPiece(text))
        return pieces

    def _add_usage(self, fields: dict[str, Json]) -> None:
        self._usage |= {name: value for name, value in fields.items() if value is not None}

    def _answer(self) -> Answer:
        finish_reason = _FINISH.get(self._stop_reason, self._stop_reason)
        calls = self._calls(is_cut=finish_reason in _CUT_SHORT)
        is_plain = all(block.kind in {"text", "tool_use"} for block in self._earlier)
        extra: dict[str, Json] = {} if is_plain else {"content": self._content()}
        if calls and finish_reason not in _CUT_SHORT:
            finish_reason = "tool_calls"
        return Answer("".join(self._text), calls, finish_reason, self._earlier_usage, extra)

    def _calls(self, *, is_cut: bool) -> list[ToolCallRequest]:
        blocks = [block for block in self._earlier if block.kind == "tool_use"]
        return [
            ToolCallRequest(
                _string(block.head.get("id")),
                _string(clean_json(block.head.get("name"))),
                finished_arguments(block.arguments(), is_cut=is_cut and block is blocks[-1]),
            )
            for block in blocks
        ]

    def _content(self) -> list[Json]:
        return [
            block.finished() for block in self._earlier if block.kind != "text" or block.text("text").strip()
        ]


def _index(event: _Event) -> int:
    return event.index if isinstance(event.index, int) else 0


def _usage(fields: dict[str, Json]) -> Usage:
    """Tokens as the others count them: the input includes what was read from, or written to, a cache."""
    cached = _count(fields.get("cache_read_input_tokens"))
    written = _count(fields.get("cache_creation_input_tokens"))
    return Usage(
        input_tokens=_count(fields.get("input_tokens")) + cached + written,
        output_tokens=_count(fields.get("output_tokens")),
        cached_tokens=cached,
    )


def _string(value: Json) -> str:
    return value if isinstance(value, str) else ""


def _count(value: Json) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def _object(value: Json) -> dict[str, Json]:
    return cast("dict[str, Json]", value) if isinstance(value, dict) else {}


# --- what goes ---------------------------------------------------------------------------------------


def messages_body(request: ModelRequest) -> dict[str, Json]:
    """The body of a request. System messages, wherever they stand, become the `system` field."""
    system = "\n\n".join(m.content for m in request.messages if m.role == "system" and m.content.strip())
    tools = [*map(_tool, request.tools), *(request.parameters.get("tools") or ())]
    body: dict[str, Json] = {"max_tokens": DEFAULT_MAX_TOKENS, **request.parameters}
    body |= {
        "model": request.model,
        "system": system or request.parameters.get("system"),
        "messages": _merged(request.messages),
        "stream": True,
        "tools": tools or None,
    }
    return {key: value for key, value in body.items() if value is not None}


def _tool(spec: ToolSpec) -> dict[str, Json]:
    return {"name": spec.name, "description": spec.description, "input_schema": spec.parameters}


def _merged(messages: list[Message]) -> list[Json]:
    """User and assistant messages in turn: neighbours of one role are one message."""
    merged: list[dict[str, Json]] = []
    for message in messages:
        blocks = _blocks(message)
        if not blocks:
            continue
        role = "assistant" if message.role == "assistant" else "user"
        if merged and merged[-1]["role"] == role:
            merged[-1]["content"].extend(blocks)
        else:
            merged.append({"role": role, "content": blocks})
    return cast("list[Json]", merged)


def _blocks(message: Message) -> list[Json]:
    if message.role == "system":
        return []
    if message.role == "tool":
        return [_result(message)]
    content = message.extra.get("content")
    if isinstance(content, list):
        return [_sendable_block(block) for block in cast("list[Json]", content)]
    # Blank text blocks are refused by the API.
    text: list[Json] = [{"type": "text", "text": message.content}] if message.content.strip() else []
    return [*text, *map(_call, message.calls)]


def _call(call: ToolCallRequest) -> dict[str, Json]:
    return {
        "type": "tool_use",
        "id": sendable_id(call.call_id),
        "name": sendable_name(call.tool),
        "input": sendable_arguments(call.arguments),
    }


def _sendable_block(block: Json) -> Json:
    fields = _object(block)
    if fields.get("type") != "tool_use":
        return block
    names = {"id": sendable_id(_string(fields.get("id"))), "name": sendable_name(_string(fields.get("name")))}
    return {**fields, **names}


def _result(message: Message) -> dict[str, Json]:
    result: dict[str, Json] = {
        "type": "tool_result",
        "tool_use_id": sendable_id(message.call_id),
        "content": message.content,
    }
    return {**result, "is_error": True} if message.is_error else result


class Anthropic:
    """The provider for Anthropic's API, and for servers that speak it."""

    def __init__(self, settings: Settings, *, transport: httpx.AsyncBaseTransport | None = None) -> None:
        key = settings.anthropic_api_key.strip()
        base = settings.anthropic_base_url.strip().rstrip("/")
        self._endpoint = Endpoint(
            settings,
            name="anthropic",
            url=endpoint_url(base, "/messages" if base.endswith("/v1") else "/v1/messages"),
            key=key,
            headers={"anthropic-version": VERSION, **({"x-api-key": key} if key else {})},
            transport=transport,
        )

    def stream(self, request: ModelRequest) -> AsyncGenerator[Piece, None]:
        """Call the model and yield its answer as it comes; see `streamjobs.llm.base.Provider`."""
        return self._endpoint.stream(encode_body(messages_body(request)), lambda: MessagesDecoder(request))

    async def aclose(self) -> None:
        """Close all connections."""
        await self._endpoint.aclose()
