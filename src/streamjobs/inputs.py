"""What a client submits, and how JSON of strangers is read: shallow, named, bounded.

Rule: what a client sent raises `Invalid` that begins with the path of the field at fault.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Iterable, Mapping
from typing import Literal, TypeVar

import msgspec

from streamjobs.errors import Invalid
from streamjobs.events import UNENCODABLE, Json, clean_text

MAX_DEPTH = 100
"""How deep JSON may nest: far below where a decoder gives up, since the log wraps it once more."""

MAX_MESSAGE = 500
"""Characters of an error's message: it may quote what a stranger wrote."""

OURS = frozenset({"model", "messages", "tools", "stream", "stream_options", "system"})
"""What chat itself puts in a provider's request; `parameters` may not replace it."""

Decoded = TypeVar("Decoded")


class ChatMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One message of a conversation that a client brings along."""

    role: Literal["system", "user", "assistant"]
    content: str

    def __post_init__(self) -> None:
        _refuse_if(not self.content.strip(), "`content` must not be empty")


class ChatInput(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The input of `chat`: a prompt or a conversation, and how to answer it.

    `tools` of None leaves the choice to the agent, [] offers none; `parameters` go to the provider.
    """

    prompt: str | None = None
    messages: list[ChatMessage] = []
    agent: str = ""
    model: str = ""
    tools: list[str] | None = None
    parameters: dict[str, Json] = {}

    def __post_init__(self) -> None:
        has_prompt = self.prompt is not None
        has_user = any(message.role == "user" for message in self.messages)
        _refuse_if(has_prompt == bool(self.messages), "exactly one of `prompt` and `messages` is needed")
        _refuse_if(has_prompt and not str(self.prompt).strip(), "`prompt` must not be empty")
        _refuse_if(not has_prompt and not has_user, "`messages` must have one of role `user`")
        for field, names in (("agent", [self.agent]), ("model", [self.model]), ("tools", self.tools or [])):
            _refuse_if(
                any(map(_is_no_name, names)), f"`{field}`: over 200 characters, or a control character"
            )
        require_no_ours(self.parameters)

    @classmethod
    def from_json(cls, raw: bytes | msgspec.Raw) -> ChatInput:
        """Read a submitted input. Raises `Invalid` that names the field."""
        return decode_shallow(_CHAT_DECODER, bytes(raw), "input")


def _refuse_if(is_wrong: bool, message: str) -> None:
    if is_wrong:
        raise ValueError(message)


def require_no_ours(parameters: Mapping[str, Json]) -> None:
    """Raise `ValueError` where parameters name what chat itself sets."""
    _refuse_if(
        not OURS.isdisjoint(parameters), f"`parameters` must not have any of {', '.join(sorted(OURS))}"
    )


def _is_no_name(text: str) -> bool:
    return len(text) > 200 or re.search(r"[\x00-\x1f\x7f]", text) is not None


_CHAT_DECODER = msgspec.json.Decoder(ChatInput)


def decode_shallow(decoder: msgspec.json.Decoder[Decoded], text: bytes, root: str = "") -> Decoded:
    """Decode foreign JSON, refusing what nests deeper than `MAX_DEPTH`.

    Raises `Invalid`; its message begins with the path of the field at fault, under the name `root`.
    """
    try:
        if text.count(b"[") + text.count(b"{") > MAX_DEPTH and is_too_deep(msgspec.json.decode(text)):
            raise RecursionError
        return decoder.decode(text)
    except RecursionError as error:
        reason = f"nested deeper than {MAX_DEPTH} levels"
        raise Invalid(_at(root, reason)) from error
    except msgspec.ValidationError as error:
        reason, has_path, path = str(error).rpartition(" - at `$")
        where = root + path.removesuffix("`") if has_path else root
        raise Invalid(_at(where, reason if has_path else path)) from error
    except UNENCODABLE as error:
        raise Invalid(_at(root, f"not JSON: {error}")) from error


def _at(path: str, reason: str) -> str:
    path = path.removeprefix(".")
    return bounded(f"{path}: {reason}" if path else reason)


def is_too_deep(value: Json, levels: int = MAX_DEPTH) -> bool:
    """Whether a JSON value nests lists and objects more than `levels` deep."""
    inner: Iterable[Json]
    if isinstance(value, dict):
        inner = typing.cast("dict[str, Json]", value).values()
    elif isinstance(value, list):
        inner = typing.cast("list[Json]", value)
    else:
        return False
    return levels == 0 or any(is_too_deep(one, levels - 1) for one in inner)


def bounded(text: str) -> str:
    """Clean a message that may quote foreign text, and cut it to `MAX_MESSAGE` characters."""
    text = clean_text(text)
    return text if len(text) <= MAX_MESSAGE else text[: MAX_MESSAGE - 1] + "…"
