"""What requests say outside their bodies: whose they are, keys, waits, numbers, filters.

Rule 1: a parameter that does not parse is refused and named; a preference (RFC 7240) is ignored then.
Rule 2: who asks was found out before: see `access`.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, TypeVar

import msgspec
from starlette.requests import HTTPConnection, Request
from starlette.types import Scope

from streamjobs.cursor import Cursor
from streamjobs.errors import BadRequest, Invalid
from streamjobs.gateway.body import fields_of
from streamjobs.identity.principal import Principal

PRINCIPAL = "streamjobs.principal"
"""Where a request's scope has it."""

Seconds = Annotated[float, msgspec.Meta(ge=0, le=10 * 365 * 86400)]
Label = Annotated[str, msgspec.Meta(max_length=200, pattern=r"\A[^\x00-\x1f\x7f]*\Z")]
Instant = Annotated[datetime, msgspec.Meta(tz=True)]
"""RFC 3339, with a zone."""
Reason = Annotated[str, msgspec.Meta(max_length=1000)]

Fields = TypeVar("Fields")

_KEY = re.compile(r"[\x20-\x7e]{1,255}", re.ASCII)
_WAIT = re.compile(r"\d{1,6}(\.\d{1,3})?", re.ASCII)
_SEQ = re.compile(r"[1-9][0-9]{0,15}", re.ASCII)
_PREFER_WAIT = re.compile(r"(?:^|[,;])\s*wait\s*=\s*\"?(\d{1,6})\"?\s*(?=$|[,;])", re.IGNORECASE | re.ASCII)


def principal_of(scope: Scope) -> Principal:
    """Who asks."""
    principal: Principal = scope[PRINCIPAL]
    return principal


def owner_of(request: HTTPConnection) -> str:
    """Whose things a request is about."""
    return principal_of(request.scope).owner


def idempotency_key(request: Request) -> str:
    """The `Idempotency-Key`, empty without one. Raises `BadRequest`."""
    key = request.headers.get("idempotency-key")
    if key is None:
        return ""
    if not _KEY.fullmatch(key):
        raise BadRequest("Idempotency-Key: 1 to 255 printable ASCII characters")
    return key


def preferred_wait(request: Request) -> float | None:
    """N of `Prefer: wait=N`."""
    match = _PREFER_WAIT.search(request.headers.get("prefer", ""))
    return float(match[1]) if match else None


def parameters_of(request: Request, kind: type[Fields]) -> Fields:
    """The query as a struct. Raises `Invalid` that names the parameter, one that nobody knows as well."""
    return fields_of(dict(request.query_params), kind, strict=False)


def seconds_of(field: str, text: str) -> float:
    """A duration in a query. Raises `Invalid`."""
    if not _WAIT.fullmatch(text):
        raise Invalid(f"{field}: seconds, at least 0")
    return float(text)


def seq_of(field: str, text: str) -> int:
    """The number of an event in a query. Raises `Invalid`."""
    if not _SEQ.fullmatch(text):
        raise Invalid(f"{field}: the number of an event, at least 1")
    return int(text)


def ms_of(instant: datetime | None) -> int:
    """An instant in ms, 0 for none."""
    return 0 if instant is None else max(0, round(instant.timestamp() * 1000))


def is_known(if_none_match: str, cursor: Cursor) -> bool:
    """Whether an `If-None-Match` names what a job's view would be."""
    tags = (tag.strip().removeprefix("W/") for tag in if_none_match.split(","))
    return any(tag in {f'"{cursor}"', "*"} for tag in tags)
