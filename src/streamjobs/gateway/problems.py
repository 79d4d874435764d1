"""Errors as problem documents (RFC 9457).

Rule 1: `code` is stable and clients may branch on it; `title` and `detail` are for people.
Rule 2: an error that nobody raised on purpose is logged, and its answer says nothing about the inside.
Rule 3: `Invalid` begins its message with the field at fault and a colon; that field is a member of its own.
Rule 4: how a job has ended is `job_status`; `status` is the answer's own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import structlog
from starlette.exceptions import HTTPException
from starlette.responses import Response

from streamjobs.errors import BadRequest, Invalid, JobEnded, StreamjobsError
from streamjobs.events import clean_text, encode_json

log = structlog.get_logger(__name__)

_FIELD = re.compile(r"([A-Za-z_][A-Za-z0-9_.\[\]-]*): ")
_CODES = {404: "not_found", 405: "method_not_allowed", 426: "upgrade_required"}
_DETAILS = {
    404: "There is nothing at this path.",
    405: "This path has other methods.",
    426: "This path is for WebSockets, version 13.",
}
_RETRY_AFTER = {HTTPStatus.SERVICE_UNAVAILABLE: "1", HTTPStatus.TOO_MANY_REQUESTS: "10"}
"""Seconds: what is away is back soon; what there is too much of takes a while to become less."""

Headers = Mapping[str, str]


class Problem(Response):
    """A problem document as an answer."""

    media_type = "application/problem+json"

    def __init__(self, document: Mapping[str, Any], headers: Headers | None = None) -> None:
        super().__init__(encode_json(document), document["status"], headers)


def problem_of(error: StreamjobsError) -> dict[str, Any]:
    """The document for an error that was raised on purpose."""
    detail = clean_text(str(error))
    document = _document(error.http_status, error.code, detail)
    field = _FIELD.match(detail) if isinstance(error, Invalid | BadRequest) else None
    if field is not None:
        document["field"] = field[1]
    if isinstance(error, JobEnded) and error.state:
        document["job_status"] = error.state
    return document


def answer_to(error: Exception) -> Problem:
    """The answer for anything that a route raises."""
    if isinstance(error, StreamjobsError) and error.http_status != StreamjobsError.http_status:
        return Problem(problem_of(error), _headers(error))
    if isinstance(error, HTTPException):
        return unrouted(error.status_code, error.headers)
    log.error("request.failed", error=type(error).__name__, exc_info=error)
    return Problem(_document(500, "internal", "The server met an error that is none of your doing."))


def unrouted(status: int, headers: Headers | None = None) -> Problem:
    """The answer for a path that is no route, or a method that the route does not have."""
    code = _CODES.get(status, "bad_request" if status < 500 else "internal")
    detail = _DETAILS.get(status, "")
    return Problem(_document(status, code, detail), headers)


def _headers(error: StreamjobsError) -> Headers | None:
    if error.retryable and error.http_status in _RETRY_AFTER:
        return {"Retry-After": _RETRY_AFTER[HTTPStatus(error.http_status)]}
    if error.http_status == HTTPStatus.UNAUTHORIZED:
        return {"WWW-Authenticate": "Bearer"}
    return {"Connection": "close"} if error.http_status in {408, 413} else None


def _document(status: int, code: str, detail: str) -> dict[str, Any]:
    return {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "code": code,
        "detail": detail,
    }
