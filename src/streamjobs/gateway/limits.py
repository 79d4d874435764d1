"""What one request may bring, beside the size of its body, and what one owner may hold open.

Rule: a field over its limit is refused by name, before a job is made of it that would fail.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, cast

from streamjobs.config import Settings
from streamjobs.errors import InputTooLarge, TooManyStreams
from streamjobs.events import Json, encode_json


def require_size(field: str, size: int, most: int) -> None:
    """Raise `InputTooLarge` where a field has more bytes than it may."""
    if size > most:
        raise InputTooLarge(f"{field}: at most {most} bytes of JSON, not {size}")


def require_sizes(settings: Settings, raw_input: bytes, metadata: dict[str, Json]) -> None:
    """Raise `InputTooLarge` for what a job brings along, whatever its kind."""
    require_size("input", len(raw_input), settings.max_input)
    require_size("metadata", len(encode_json(metadata)) if metadata else 0, settings.max_metadata)


def require_short_chat(settings: Settings, given: Json) -> None:
    """Raise `InputTooLarge` for a chat, whose input is well-formed, that says too much."""
    chat = cast("dict[str, Any]", given)
    prompt: str = chat.get("prompt") or ""
    messages: list[dict[str, str]] = chat.get("messages") or []
    if len(messages) > settings.max_messages:
        raise InputTooLarge(f"input.messages: at most {settings.max_messages} of them")
    size = len(prompt.encode()) + sum(len(message["content"].encode()) for message in messages)
    if size > settings.max_prompt:
        field = "messages" if messages else "prompt"
        raise InputTooLarge(f"input.{field}: at most {settings.max_prompt} bytes of text, not {size}")


class OpenStreams:
    """How many streams each owner holds open in this process; `most` of 0 is no limit."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._open = Counter[str]()

    def enter(self, owner: str) -> None:
        """Count one more, to be given to `leave`. Raises `TooManyStreams`."""
        if self._most and self._open[owner] >= self._most:
            raise TooManyStreams(f"{self._most} streams are open already; close one")
        self._open[owner] += 1

    def leave(self, owner: str) -> None:
        """One is over."""
        self._open[owner] -= 1
        if not self._open[owner]:
            del self._open[owner]

    def __len__(self) -> int:
        return self._open.total()
