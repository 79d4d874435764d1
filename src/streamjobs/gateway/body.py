"""Reading a request's body: bounded in bytes, time and depth, counted as it comes.

Rule 1: a body over the limit is refused before it is held; what still comes is thrown away, a while.
Rule 2: JSON of strangers is decoded once, generically, and refused with 400 where it is not JSON that we
can store; what does not fit our fields is refused with 422 and names the field.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any, TypeVar

import msgspec
from starlette.types import Receive, Scope

from streamjobs.errors import BadRequest, Invalid, TooLarge, TooSlow
from streamjobs.events import UNENCODABLE, Json
from streamjobs.inputs import MAX_DEPTH, bounded, is_too_deep

BODY_TIMEOUT = 30.0
DISCARD_TIMEOUT = 2.0

_PATH = re.compile(r" - at (?:`key` in )?`\$(.*)`$")
_UNKNOWN = re.compile(r"unknown field `([^`]*)`")

Fields = TypeVar("Fields")


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """The whole body.

    Raises `TooLarge` over `limit` bytes, `TooSlow`, `BadRequest` where the client went away.
    """
    try:
        async with asyncio.timeout(BODY_TIMEOUT):
            return await _read(scope, receive, limit)
    except TimeoutError:
        raise TooSlow(f"the body took longer than {BODY_TIMEOUT:.0f} s") from None


async def _read(scope: Scope, receive: Receive, limit: int) -> bytes:
    body = bytearray()
    is_over = _declared_length(scope) > limit
    while not is_over:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise BadRequest("the body is incomplete")
        body += message.get("body", b"")
        if not message.get("more_body", False):
            break
        is_over = len(body) > limit
    if is_over or len(body) > limit:
        await _discard(receive)
        raise TooLarge(f"the body is over {limit} bytes")
    return bytes(body)


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


def decode_body(body: bytes) -> Json:
    """Decode JSON of strangers.

    Raises `BadRequest` for what is no JSON, or JSON that cannot be stored: too deep, lone surrogates,
    numbers out of range.
    """
    try:
        value: Json = msgspec.json.decode(body)
    except RecursionError:
        raise BadRequest(f"the body nests deeper than {MAX_DEPTH} levels") from None
    except UNENCODABLE as error:
        raise BadRequest(bounded(f"the body is not JSON: {error}")) from None
    if is_too_deep(value):
        raise BadRequest(f"the body nests deeper than {MAX_DEPTH} levels")
    return value


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
