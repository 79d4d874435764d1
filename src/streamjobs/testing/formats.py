"""The two wire formats from the provider's side: requests read, answers written.

Both give the same three things: a `Conversation` from a body, frames for a streamed answer, and one JSON
document for an answer that is not streamed. Nothing here knows of sockets, pace or faults.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple, Protocol, cast

import msgspec

from streamjobs.testing.scenario import Conversation, ScriptedCall, ScriptedUsage, Turn

Body = dict[str, Any]

_TOKEN = re.compile(r"\s*\S{1,6}|\s+")
_CHARACTERS_PER_TOKEN = 4


class Frame(NamedTuple):
    """Bytes of an answer, and what they are: only tokens are paced and counted."""

    data: bytes
    kind: Literal["head", "token", "tail"]


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """An answer about to be written. The pieces of text may have no end."""

    model: str
    reasoning: list[str]
    text: Iterable[str]
    calls: list[ScriptedCall]
    finish_reason: str
    usage: ScriptedUsage
    has_usage: bool = True


class Format(Protocol):
    """One API: where it lives, and how it reads and writes."""

    path: str

    def conversation(self, body: Body) -> Conversation:
        """What a request says about its conversation."""
        ...

    def frames(self, reply: Reply) -> Iterator[Frame]:
        """The answer as a stream."""
        ...

    def text_frame(self, text: str) -> bytes:
        """One piece of text."""
        ...

    def document(self, reply: Reply) -> Body:
        """The answer in one piece."""
        ...

    def error(self, kind: str, message: str) -> Body:
        """The body of an error."""
        ...

    def error_frame(self, kind: str, message: str) -> bytes:
        """An error inside a stream."""
        ...


def reply_to(body: Body, conversation: Conversation, turn: Turn, text: Iterable[str] | None = None) -> Reply:
    """The reply of a turn; `text` in place of the turn's own pieces."""
    pieces = text_pieces(turn)
    calls = [_numbered(call, place, conversation) for place, call in enumerate(turn.tool_calls)]
    options = body.get("stream_options")
    return Reply(
        model=conversation.model,
        reasoning=_TOKEN.findall(turn.reasoning),
        text=pieces if text is None else text,
        calls=calls,
        finish_reason=turn.finish_reason or ("tool_calls" if calls else "stop"),
        usage=turn.usage or _counted(body, turn, len(pieces)),
        has_usage=isinstance(options, dict) and bool(cast("Body", options).get("include_usage")),
    )


def text_pieces(turn: Turn) -> list[str]:
    """A turn's text as it is streamed: the given pieces, else about as long as tokens are."""
    return turn.text if isinstance(turn.text, list) else _TOKEN.findall(turn.text)


def arguments_of(call: ScriptedCall) -> str:
    """A call's arguments as text."""
    if isinstance(call.arguments, str):
        return call.arguments
    return msgspec.json.encode(call.arguments).decode()


def _numbered(call: ScriptedCall, place: int, conversation: Conversation) -> ScriptedCall:
    made = f"call_{conversation.key[:8]}_{conversation.turn}_{place}"
    return msgspec.structs.replace(call, id=call.id or made)


def _counted(body: Body, turn: Turn, pieces: int) -> ScriptedUsage:
    reasoning = len(_TOKEN.findall(turn.reasoning))
    said = len(msgspec.json.encode(body.get("messages"))) // _CHARACTERS_PER_TOKEN
    return ScriptedUsage(input_tokens=said, output_tokens=pieces + reasoning, reasoning_tokens=reasoning)


def _pieces_of_arguments(call: ScriptedCall) -> list[str]:
    text = arguments_of(call)
    return [text[start : start + 8] for start in range(0, len(text), 8)]


# --- reading -----------------------------------------------------------------------------------------


def _conversation(body: Body, users: list[str], turn: int, since_user: int, tools: list[str]) -> Conversation:
    metadata = body.get("metadata")
    who = body.get("user") or (cast("Body", metadata).get("user_id") if isinstance(metadata, dict) else "")
    identity = f"{who}\n{users[0] if users else ''}".encode("utf-8", "replace")
    return Conversation(
        model=str(body.get("model", "")),
        key=hashlib.sha256(identity).hexdigest(),
        turn=turn,
        round=since_user,
        user=users[-1] if users else "",
        tools=tools,
    )


def _fold(body: Body, tools: list[str]) -> Conversation:
    """Count assistant messages, in all and since the last message in which the user says something."""
    users: list[str] = []
    turn = since_user = 0
    for message in cast("list[Body]", body["messages"]):
        if message.get("role") == "assistant":
            turn, since_user = turn + 1, since_user + 1
        elif message.get("role") == "user" and (text := _text_of(message.get("content"))):
            users.append(text)
            since_user = 0
    return _conversation(body, users, turn, since_user, tools)


def _text_of(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = cast("list[Any]", content) if isinstance(content, list) else []
    texts = [cast("Body", part).get("text") for part in parts if isinstance(part, dict)]
    return "".join(text for text in texts if isinstance(text, str))


def _offered(body: Body) -> list[Body]:
    tools = body.get("tools")
    return (
        [tool for tool in cast("list[Any]", tools) if isinstance(tool, dict)]
        if isinstance(tools, list)
        else []
    )


# --- chat completions --------------------------------------------------------------------------------


class ChatCompletions:
    """The format of OpenAI's chat completions."""

    path = "/v1/chat/completions"
    _id = "chatcmpl-scripted"

    def conversation(self, body: Body) -> Conversation:
        """What a request says about its conversation."""
        functions = [tool.get("function") for tool in _offered(body)]
        return _fold(body, [str(cast("Body", f).get("name")) for f in functions if isinstance(f, dict)])

    def frames(self, reply: Reply) -> Iterator[Frame]:
        """Chunks, the usage chunk if it was asked for, `[DONE]`."""
        model = reply.model
        yield Frame(self._chunk(model, {"role": "assistant", "content": ""}), "head")
        for piece in reply.reasoning:
            yield Frame(self._chunk(model, {"reasoning_content": piece}), "token")
        for piece in reply.text:
            yield Frame(self._chunk(model, {"content": piece}), "token")
        for index, call in enumerate(reply.calls):
            yield from self._call_frames(model, index, call)
        yield Frame(self._chunk(model, {}, reply.finish_reason), "tail")
        if reply.has_usage:
            yield Frame(
                _data({**self._head(model), "choices": [], "usage": self._usage(reply.usage)}), "tail"
            )
        yield Frame(b"data: [DONE]\n\n", "tail")

    def text_frame(self, text: str) -> bytes:
        """One piece of text."""
        return self._chunk("", {"content": text})

    def document(self, reply: Reply) -> Body:
        """A `chat.completion`."""
        calls = [self._call(call, arguments_of(call)) for call in reply.calls]
        message: Body = {"role": "assistant", "content": "".join(reply.text) or None}
        message |= {"tool_calls": calls} if calls else {}
        choice = {"index": 0, "message": message, "finish_reason": reply.finish_reason}
        head = {**self._head(reply.model), "object": "chat.completion"}
        return {**head, "choices": [choice], "usage": self._usage(reply.usage)}

    def error(self, kind: str, message: str) -> Body:
        """The body of an error."""
        return {"error": {"message": message, "type": kind, "param": None, "code": None}}

    def error_frame(self, kind: str, message: str) -> bytes:
        """An error inside a stream."""
        return _data(self.error(kind, message))

    def _call_frames(self, model: str, index: int, call: ScriptedCall) -> Iterator[Frame]:
        first = {"index": index, **self._call(call, "")}
        yield Frame(self._chunk(model, {"tool_calls": [first]}), "head")
        for piece in _pieces_of_arguments(call):
            delta = {"tool_calls": [{"index": index, "function": {"arguments": piece}}]}
            yield Frame(self._chunk(model, delta), "token")

    def _call(self, call: ScriptedCall, arguments: str) -> Body:
        return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}

    def _chunk(self, model: str, delta: Body, finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return _data({**self._head(model), "choices": [choice]})

    def _head(self, model: str) -> Body:
        return {"id": self._id, "object": "chat.completion.chunk", "created": 1700000000, "model": model}

    def _usage(self, usage: ScriptedUsage) -> Body:
        return {
            "prompt_tokens": usage.input_tokens,
            "completion_tokens": usage.output_tokens,
            "total_tokens": usage.input_tokens + usage.output_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        }


# --- messages ----------------------------------------------------------------------------------------

_STOP_REASONS = {
    "stop": "end_turn",
    "tool_calls": "tool_use",
    "length": "max_tokens",
    "content_filter": "refusal",
}


class Messages:
    """The format of Anthropic's messages."""

    path = "/v1/messages"
    _id = "msg_scripted"
    _signature = "c2NyaXB0ZWQ="

    def conversation(self, body: Body) -> Conversation:
        """What a request says about its conversation."""
        return _fold(body, [str(tool.get("name")) for tool in _offered(body)])

    def frames(self, reply: Reply) -> Iterator[Frame]:
        """`message_start`, the blocks with their deltas, `message_delta`, `message_stop`."""
        yield Frame(self._start(reply), "head")
        yield Frame(_event({"type": "ping"}), "head")
        index = 0
        if reply.reasoning:
            yield from self._thinking(index, reply.reasoning)
            index += 1
        if reply.text or not reply.calls:
            yield from self._block(index, {"type": "text", "text": ""}, "text", reply.text)
            index += 1
        for place, call in enumerate(reply.calls, index):
            head: Body = {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}
            yield from self._block(place, head, "partial_json", _pieces_of_arguments(call))
        yield Frame(self._end(reply), "tail")
        yield Frame(_event({"type": "message_stop"}), "tail")

    def text_frame(self, text: str) -> bytes:
        """One piece of text."""
        return self._delta(0, {"type": "text_delta", "text": text})

    def document(self, reply: Reply) -> Body:
        """A `message`."""
        text = "".join(reply.text)
        content: list[Body] = [{"type": "text", "text": text}] if text else []
        for call in reply.calls:
            arguments = call.arguments if isinstance(call.arguments, dict) else {}
            content.append({"type": "tool_use", "id": call.id, "name": call.name, "input": arguments})
        return {**self._message(reply), "content": content, "stop_reason": self._stop_reason(reply)}

    def error(self, kind: str, message: str) -> Body:
        """The body of an error."""
        return {"type": "error", "error": {"type": kind, "message": message}}

    def error_frame(self, kind: str, message: str) -> bytes:
        """An error inside a stream."""
        return _event(self.error(kind, message))

    def _start(self, reply: Reply) -> bytes:
        return _event({"type": "message_start", "message": self._message(reply)})

    def _message(self, reply: Reply) -> Body:
        usage = {
            "input_tokens": max(0, reply.usage.input_tokens - reply.usage.cached_tokens),
            "cache_read_input_tokens": reply.usage.cached_tokens,
            "output_tokens": 1,
        }
        fixed = {"id": self._id, "type": "message", "role": "assistant", "model": reply.model}
        return {**fixed, "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}

    def _end(self, reply: Reply) -> bytes:
        delta = {"stop_reason": self._stop_reason(reply), "stop_sequence": None}
        usage = {"output_tokens": reply.usage.output_tokens}
        return _event({"type": "message_delta", "delta": delta, "usage": usage})

    def _stop_reason(self, reply: Reply) -> str:
        return _STOP_REASONS.get(reply.finish_reason, reply.finish_reason)

    def _thinking(self, index: int, pieces: Iterable[str]) -> Iterator[Frame]:
        *block, stop = self._block(
            index, {"type": "thinking", "thinking": "", "signature": ""}, "thinking", pieces
        )
        yield from block
        yield Frame(self._delta(index, {"type": "signature_delta", "signature": self._signature}), "head")
        yield stop

    def _block(self, index: int, head: Body, field: str, pieces: Iterable[str]) -> Iterator[Frame]:
        yield Frame(_event({"type": "content_block_start", "index": index, "content_block": head}), "head")
        kind = "input_json_delta" if field == "partial_json" else f"{field}_delta"
        for piece in pieces:
            yield Frame(self._delta(index, {"type": kind, field: piece}), "token")
        yield Frame(_event({"type": "content_block_stop", "index": index}), "head")

    def _delta(self, index: int, delta: Body) -> bytes:
        return _event({"type": "content_block_delta", "index": index, "delta": delta})


def _data(content: Body) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


def _event(content: Body) -> bytes:
    return b"event: " + str(content["type"]).encode() + b"\n" + _data(content)
