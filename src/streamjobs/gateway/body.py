"""Reading a request's body: bounded in bytes, time, depth and items, counted as it comes.

Rule 1: a body over the limit is refused before it is held; what still comes is thrown away, a while. One that
is compressed is refused: what it would unpack to is not counted by what comes.
Rule 2: JSON of strangers is decoded once, generically, and refused with 400 where it is not JSON that we
can store; what does not fit our fields is refused with 422 and names the field.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any, TypeVar

import msgspec
from starlette.types import Receive, Scope

from streamjobs.config import Settings
from streamjobs.errors import BadRequest, Compressed, Invalid, TooLarge, TooManyItems, TooSlow
from streamjobs.events import UNENCODABLE, Json
from streamjobs.inputs import bounded, is_too_deep

DISCARD_TIMEOUT = 2.0

_PATH = re.compile(r" - at (?:`key` in )?`\$(.*)`$")
_UNKNOWN = re.compile(r"unknown field `([^`]*)`")
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
"""Possessive: it never goes back, so that it takes time and memory in proportion."""

Fields = TypeVar("Fields")


async def read_body(scope: Scope, receive: Receive, settings: Settings) -> bytes:
    """The whole body.

    Raises `TooLarge` over `max_body`, `TooSlow`, `Compressed`, `BadRequest` where the client went away.
    """
    if not _is_plain(scope):
        raise Compressed("Content-Encoding: send the body as it is")
    try:
        async with asyncio.timeout(settings.body_timeout):
            body, more = await _read(scope, receive, settings.max_body)
    except TimeoutError:
        raise TooSlow(f"the body took longer than {settings.body_timeout:.0f} s") from None
    if body is not None:
        return body
    if more:
        await _discard(receive)
    raise TooLarge(f"the body is over {settings.max_body} bytes")


def _is_plain(scope: Scope) -> bool:
    codings = (value for name, value in scope["headers"] if name == b"content-encoding")
    return all(coding.strip().lower() in {b"", b"identity"} for coding in codings)


async def _read(scope: Scope, receive: Receive, limit: int) -> tuple[bytes | None, bool]:
    """The body, None where it is over the limit, and whether there is more of it."""
    body, more = bytearray(), True
    is_over = _declared_length(scope) > limit
    while more and not is_over:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise BadRequest("the body is incomplete")
        body += message.get("body", b"")
        more = message.get("more_body", False)
        is_over = len(body) > limit
    return (None if is_over else bytes(body)), more


async def _discard(receive: Receive) -> None:
    """Read on for a moment: a client that is still sending would not see the answer."""
    try:
        async with asyncio.timeout(DISCARD_TIMEOUT):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
    except TimeoutError:
        return


def _declared_length(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value[:18])
    return 0


def decode_body(body: bytes, settings: Settings) -> Json:
    """Decode JSON of strangers.

    Raises `TooManyItems`; `BadRequest` for what is no JSON, or JSON that cannot be stored: too deep, lone
    surrogates, numbers out of range.
    """
    if items_at_most(body, settings.max_json_items) > settings.max_json_items:
        raise TooManyItems(f"the body has more than {settings.max_json_items} values")
    too_deep = f"the body nests deeper than {settings.max_json_depth} levels"
    try:
        value: Json = msgspec.json.decode(body)
    except RecursionError:
        raise BadRequest(too_deep) from None
    except UNENCODABLE as error:
        raise BadRequest(bounded(f"the body is not JSON: {error}")) from None
    if is_too_deep(value, settings.max_json_depth):
        raise BadRequest(too_deep)
    return value


def items_at_most(body: bytes, enough: int) -> int:
    """How many members and elements JSON may have, before it is decoded: each would take 50 to 100 bytes.

    What is in strings is counted too, unless that alone would be more than `enough`.
    """
    count = _opened(body)
    return count if count <= enough else _opened(_STRING.sub(b"", body))


def _opened(text: bytes) -> int:
    return text.count(b",") + text.count(b"[") + text.count(b"{")


def fields_of(value: Any, kind: type[Fields], *, strict: bool = True) -> Fields:
    """The body's fields as a struct; not `strict`, numbers may be text. Raises `Invalid` naming the field."""
    try:
        return msgspec.convert(value, kind, strict=strict)
    except msgspec.ValidationError as error:
        raise Invalid(bounded(_named(str(error)))) from None


def _named(message: str) -> str:
    """msgspec's words with the field in front."""
    unknown = _UNKNOWN.search(message)
    if unknown:
        return f"{unknown[1]}: unknown field"
    match = _PATH.search(message)
    if match is None or not match[1]:
        return message
    return f"{match[1].lstrip('.')}: {message[: match.start()]}"
