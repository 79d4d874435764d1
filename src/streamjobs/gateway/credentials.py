"""What a request brings to prove who asks: read, not judged."""

from __future__ import annotations

from http.cookies import CookieError, SimpleCookie
from typing import Literal, NamedTuple

from starlette.datastructures import Headers, QueryParams
from starlette.types import Scope

from streamjobs.errors import Unauthenticated

OWNER_HEADER = "x-streamjobs-owner"
TENANT_HEADER = "x-streamjobs-tenant"
SCOPES_HEADER = "x-streamjobs-scopes"

_BEARER = "bearer "


class Credential(NamedTuple):
    """A text, and where it was: a `cookie` is sent by browsers without being asked."""

    text: str
    source: Literal["header", "cookie", "query"]


def credential_of(scope: Scope, cookie: str, *, from_query: bool) -> Credential | None:
    """The request's credential; None without one that is ours. Raises `Unauthenticated` for several.

    A header wins over a `?token=`, which counts where `from_query` says so, and that over the cookie.
    """
    headers = Headers(scope=scope)
    if len(headers.getlist("authorization")) > 1:
        raise Unauthenticated("Authorization: one is what is understood here")
    given = headers.get("authorization", "")
    if given.lower().startswith(_BEARER):
        return Credential(given[len(_BEARER) :].strip(), "header")
    if "x-api-key" in headers:
        return Credential(headers["x-api-key"], "header")
    if from_query and (token := QueryParams(scope["query_string"]).get("token")):
        return Credential(token, "query")
    text = _cookie_in(headers, cookie) if cookie else ""
    return Credential(text, "cookie") if text else None


def _cookie_in(headers: Headers, name: str) -> str:
    jar: SimpleCookie = SimpleCookie()
    try:
        jar.load(headers.get("cookie", ""))
    except CookieError:
        return ""
    return jar[name].value if name in jar else ""
