"""Where a browser's request comes from. Browsers say so, and a page cannot make them lie; nobody else must.

Rule 1: what changes something, and a WebSocket, is refused to pages of other sites than our own, unless their
origin is in `cors_origins`: a browser sends cookies along, and reaches what listens on its own machine.
Rule 2: while nobody is asked who he is, our own pages are those under a name of this machine: a name of
somebody else's can be made to point here, and its pages are then, for their browser, ours.
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


def require_own_origin(scope: Scope, settings: Settings) -> None:
    """Refuse pages of other sites what changes something. Raises `ForeignOrigin`."""
    if scope["type"] == "http" and scope["method"] in _SAFE:
        return
    headers = Headers(scope=scope)
    origin = headers.get("origin")
    if origin is None or origin in settings.cors_origins or "*" in settings.cors_origins:
        return
    parts = urlsplit(origin)
    is_own = parts.scheme in {"http", "https"} and parts.netloc == headers.get("host")
    if not is_own or not (settings.auth or is_this_machine(parts.hostname or "")):
        raise ForeignOrigin("pages of other origins may not do this; see the setting cors_origins")


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
