"""What every model provider is to the rest: messages in, pieces of an answer out.

Rule 1: a stream yields any number of `TextPiece` and `ReasoningPiece`, then exactly one `Answer`, then ends.
Rule 2: anything else raises `ProviderError`; a stream that stops early is an error, never an end.
Rule 3: retries inside a provider happen only while it has yielded nothing; after that it raises,
and the caller decides, visibly.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Literal, Protocol

import msgspec

from streamjobs.events import Json, ToolCallRequest, Usage


class Message(msgspec.Struct, frozen=True):
    """One message of a conversation.

    `calls` and `extra` belong to assistant messages (`extra` is the provider's own, given back untouched);
    `call_id` names the call that a tool message answers, `is_error` that it failed.
    """

    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    calls: list[ToolCallRequest] = []
    call_id: str = ""
    is_error: bool = False
    extra: dict[str, Json] = {}


class ToolSpec(msgspec.Struct, frozen=True):
    """A tool as the model sees it; `parameters` is a JSON schema of type object."""

    name: str
    description: str
    parameters: dict[str, Json]


class ModelRequest(msgspec.Struct, frozen=True):
    """One call of a model. `parameters` (temperature, max_tokens, …) go to the provider as they are."""

    model: str
    messages: list[Message]
    tools: list[ToolSpec] = []
    parameters: dict[str, Json] = {}


class TextPiece(msgspec.Struct, frozen=True):
    """A piece of the answer's text; never empty, never half a character."""

    text: str


class ReasoningPiece(msgspec.Struct, frozen=True):
    """A piece of the model's reasoning."""

    text: str


class Answer(msgspec.Struct, frozen=True):
    """The whole answer. `calls` decides whether tools run, not `finish_reason`."""

    text: str
    calls: list[ToolCallRequest] = []
    finish_reason: str = "stop"
    usage: Usage = Usage()
    extra: dict[str, Json] = {}


Piece = TextPiece | ReasoningPiece | Answer


class Provider(Protocol):
    """A way to call models. One instance serves many jobs at once."""

    def stream(self, request: ModelRequest) -> AsyncGenerator[Piece, None]:
        """Call the model and yield its answer as it comes.

        Closing the generator closes the connection. Raises `ProviderError`: `is_retryable` and `retry_after`
        say what the caller may do.
        """
        ...

    async def aclose(self) -> None:
        """Close all connections."""
        ...
