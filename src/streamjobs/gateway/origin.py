"""Where a browser's request comes from. Browsers say so, and a page cannot make them lie; nobody else must.

Rule 1: what changes something, and a WebSocket, is refused to pages of other sites than our own, unless their
origin is in `cors_origins`: a browser sends cookies along, and reaches what listens on its own machine.
Rule 2: while nobody is asked who he is, requests must name this machine.
Rule 3: reading across sites is stopped by the browser, which looks at our CORS headers for that.
"""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Scope

from streamjobs.config import Settings
from streamjobs.errors import ForeignOrigin

_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_EXPOSED = (
    "ETag", "Location", "Retry-After", "Idempotent-Replayed", "Preference-Applied", "X-Streamjobs-Archived",
)  # fmt: skip
_SENT = (
    "Authorization",
    "Content-Type",
    "Idempotency-Key",
    "If-None-Match",
    "Last-Event-ID",
    "Prefer",
    "X-API-Key",
    "X-Streamjobs-Owner",
)
_METHODS = ("GET", "POST", "PUT", "DELETE")


def require_own_origin(scope: Scope, allowed: tuple[str, ...]) -> None:
    """Refuse pages of other sites than ours and `allowed` what changes something. Raises `ForeignOrigin`."""
    if scope["type"] == "http" and scope["method"] in _SAFE:
        return
    headers = Headers(scope=scope)
    origin = headers.get("origin")
    if origin is None or origin in allowed or "*" in allowed:
        return
    if not origin.startswith(("http://", "https://")) or urlsplit(origin).netloc != headers.get("host"):
        raise ForeignOrigin("pages of other origins may not do this; see the setting cors_origins")


def require_local_name(scope: Scope) -> None:
    """Refuse what was asked for under a name that is not this machine's. Raises `ForeignOrigin`.

    While nobody is asked who he is, only this machine can connect; but a page whose name was made to point
    here is, for its browser, a page of ours.
    """
    host = Headers(scope=scope).get("host")
    if host and not is_this_machine(urlsplit(f"//{host}").hostname or ""):
        raise ForeignOrigin(
            f"Host: {host[:100]} is not this machine, and nobody is asked who he is; see `auth`"
        )


def is_this_machine(host: str) -> bool:
    """Whether a host, as in a URL, is a loopback address or a name of one."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def with_cors(app: ASGIApp, settings: Settings) -> ASGIApp:
    """Let pages of `cors_origins` read answers; with cookies where we take them."""
    if not settings.cors_origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=settings.cors_origins,
        allow_methods=_METHODS,
        allow_headers=_SENT,
        allow_credentials=bool(settings.auth_cookie),
        expose_headers=_EXPOSED,
    )
