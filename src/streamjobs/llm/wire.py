"""What both wire formats share: reading JSON, joining characters, call arguments, errors in a body.

Rule 1: nothing a provider sends raises anything but `ProviderError`.
Rule 2: text leaves here whole: no half of a surrogate pair, no NUL.
Rule 3: arguments of a call are never repaired in silence. Nothing at all means `{}`; what does not
parse stays as it is, and whoever runs the tool tells the model.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar, cast

import msgspec

from streamjobs.errors import ProviderError
from streamjobs.events import UNENCODABLE, Json, clean_text
from streamjobs.llm.base import Message

T = TypeVar("T")

MAX_CALLS = 256
_MAX_ID = 1000
_MAX_NAME = 64

# Sending the same request again does not help with these (error types and codes of both APIs).
_PERMANENT = frozenset(
    {
        "authentication_error",
        "billing_error",
        "content_filter",
        "content_policy_violation",
        "context_length_exceeded",
        "insufficient_quota",
        "invalid_api_key",
        "invalid_prompt",
        "invalid_request_error",
        "model_not_found",
        "not_found_error",
        "permission_error",
        "request_too_large",
    }
)
_SPLIT_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_FOREIGN = re.compile(r"[^a-zA-Z0-9_-]")


def is_retryable_status(status: int) -> bool:
    """Whether the same request may succeed later: 408, 429, and 5xx but for 501."""
    return status in {408, 429} or (status >= 500 and status != 501)


def encode_body(body: Mapping[str, Json]) -> bytes:
    """Encode a request. Raises `ProviderError` for what JSON cannot say."""
    try:
        return msgspec.json.encode(body)
    except UNENCODABLE as error:
        raise ProviderError(f"the request does not encode: {error}") from error


def decoder_of(kind: type[T]) -> Callable[[bytes], T]:
    """Make a function that reads one `kind` from JSON; it raises a retryable `ProviderError`."""
    strict = msgspec.json.Decoder(kind)

    def decode(data: bytes) -> T:
        try:
            return strict.decode(data)
        except UNENCODABLE as error:
            if not _SPLIT_SURROGATE.search(data):
                raise _malformed(error) from error
        return _decode_surrogates(data, kind)

    return decode


def _decode_surrogates(data: bytes, kind: type[T]) -> T:
    """Read JSON with half a surrogate pair in it, which msgspec refuses; `Characters` joins the halves."""
    try:
        return msgspec.convert(json.loads(data), kind)
    except UNENCODABLE as error:
        raise _malformed(error) from error


def _malformed(error: Exception) -> ProviderError:
    return ProviderError(f"malformed data in the stream: {clean_text(str(error))[:200]}", retryable=True)


class Characters:
    """Joins surrogate pairs that were cut between two pieces of one text."""

    def __init__(self) -> None:
        self._half = ""

    def feed(self, text: str) -> str:
        """Take a piece; returns what can be shown of it, perhaps nothing."""
        if not text:
            return ""
        if self._half:
            text, self._half = self._half + text, ""
        if "\ud800" <= text[-1:] <= "\udbff":
            text, self._half = text[:-1], text[-1]
        return clean_text(text)

    def flush(self) -> str:
        """Take the end; a half that was left alone becomes U+FFFD."""
        text, self._half = self._half, ""
        return clean_text(text)


def clean_json(value: T) -> T:
    """The same JSON value without halves of surrogate pairs, which could not be written down again."""
    try:
        msgspec.json.encode(value)
    except UNENCODABLE:
        return cast("T", json.loads(clean_text(json.dumps(value, ensure_ascii=False))))
    return value


# --- calls -------------------------------------------------------------------------------------------


def finished_arguments(text: str, *, is_cut: bool) -> str:
    """The arguments of a call as JSON text: nothing and `null` are `{}`.

    `is_cut` says that the answer was cut short in this call: nothing is then an open `{`, which
    no tool layer can take for a call without arguments.
    """
    text = clean_text(text)
    if text.strip() in {"", "null"}:
        return "{" if is_cut else "{}"
    return text


def sendable_arguments(text: str) -> dict[str, Json]:
    """The arguments as the object that providers want back; broken ones are quoted inside one."""
    try:
        value: Json = msgspec.json.decode(text or "{}")
    except UNENCODABLE:
        value = None
    return cast("dict[str, Json]", value) if isinstance(value, dict) else {"invalid_json": text}


def sendable_name(text: str) -> str:
    """A tool's name in the alphabet that providers accept; models make up others."""
    return sendable_id(text)[:_MAX_NAME]


def sendable_id(text: str) -> str:
    """A call's id in the same alphabet; a conversation may have begun with another provider."""
    return _FOREIGN.sub("_", text) or "unnamed"


class CallIds:
    """Ids of calls, unique in the whole conversation; made up where the provider gave none or one twice."""

    def __init__(self, messages: Iterable[Message]) -> None:
        self._taken = {call.call_id for message in messages for call in message.calls}

    def claim(self, wanted: str) -> str:
        """The wanted id, or a new one where that is empty, overlong or taken."""
        call_id = clean_text(wanted)
        if not call_id or len(call_id) > _MAX_ID or call_id in self._taken:
            call_id = f"call_{secrets.token_hex(8)}"
        self._taken.add(call_id)
        return call_id


# --- errors ------------------------------------------------------------------------------------------


def error_from(
    payload: Json, *, status: int | None = None, retry_after: float | None = None
) -> ProviderError:
    """Make the exception for an error that a provider described.

    `payload` is the error as decoded: an object with `message`, `type`, `code`, or a string. `status` is
    the HTTP status; without one (an error inside a stream) a numeric code takes its place, and
    an error of no known kind is retryable.
    """
    fields = cast("dict[str, Json]", payload) if isinstance(payload, dict) else {"message": payload}
    code = status or _status_in(fields.get("code")) or _status_in(fields.get("status"))
    is_permanent = not _PERMANENT.isdisjoint(_names_in(fields))
    is_retryable = not is_permanent and (code is None or is_retryable_status(code))
    heading = f"HTTP {status}" if status else "error in the stream"
    return ProviderError(
        f"{heading}: {_message_in(fields)}", retryable=is_retryable, retry_after=retry_after, status=code
    )


def _status_in(value: Json) -> int | None:
    if isinstance(value, str) and len(value) == 3 and value.isdecimal():
        value = int(value)
    return value if isinstance(value, int) and 400 <= value <= 599 else None


def _names_in(fields: dict[str, Json]) -> set[str]:
    return {value for key in ("type", "code") if isinstance(value := fields.get(key), str)}


def _message_in(fields: dict[str, Json]) -> str:
    named = (fields.get(key) for key in ("message", "detail", "type", "code"))
    text = next((value for value in named if isinstance(value, str) and value.strip()), "no message")
    return one_line(text)


def one_line(text: str, limit: int = 300) -> str:
    """Words from outside, fit for a message: one line, printable, short."""
    text = " ".join(clean_text(text).split())
    return "".join(character for character in text if character.isprintable())[:limit]
