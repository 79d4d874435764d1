"""HTTP for tools and steps: a model, or whoever wrote what it read, chooses the address.

Rule 1: every request, and every redirect, goes through `outgoing`: public addresses only, resolved once and
pinned, https, ports of the web, no proxy, unless a setting opens it.
Rule 2: headers of the caller may be secrets: what is sent on to another origin has none but harmless ones.
A body is not sent on to another origin at all.
Rule 3: all together takes a bounded time and memory. An answer over the cap is an error: half a document
would be taken for a whole one.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from typing import Any, NamedTuple

import httpx
import msgspec

from streamjobs.config import Settings
from streamjobs.errors import RefusedTarget, ResponseTooLarge
from streamjobs.events import encode_json
from streamjobs.outgoing import Outgoing, Policy, Received, Resolver

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_HARMLESS = frozenset({"accept", "accept-language", "user-agent"})


class Reply(NamedTuple):
    """An answer, and where it came from in the end. Any status is one: nothing is raised for a 404."""

    status: int
    headers: httpx.Headers
    content: bytes
    url: str

    @property
    def text(self) -> str:
        """The content as UTF-8; what is none is replaced."""
        return self.content.decode(errors="replace")

    def json(self) -> Any:
        """The content as JSON. Raises `msgspec.DecodeError`."""
        return msgspec.json.decode(self.content)


class _Hop(NamedTuple):
    """One request of a chain."""

    method: str
    url: str
    headers: dict[str, str]
    body: bytes


class SafeClient:
    """Requests under the settings `fetch_*`. `resolve` and `trust` are for tests."""

    def __init__(
        self, settings: Settings, *, resolve: Resolver | None = None, trust: ssl.SSLContext | None = None
    ) -> None:
        self._settings = settings
        self._outgoing = Outgoing(
            Policy.of(settings.fetch_allow, http=settings.fetch_http, setting="fetch_allow"),
            settings.fetch_timeout,
            max_bytes=settings.fetch_max_bytes,
            resolve=resolve,
            trust=trust,
        )

    async def get(self, url: str, *, headers: Mapping[str, str] | None = None) -> Reply:
        """Get; raises as `request`."""
        return await self.request("GET", url, headers=headers)

    async def post(
        self, url: str, *, json: Any = None, content: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> Reply:
        """Post JSON, or bytes; raises as `request`."""
        return await self.request("POST", url, json=json, content=content, headers=headers)

    async def request(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        json: Any = None,
        content: bytes = b"",
    ) -> Reply:
        """Send a request, and go where redirects say.

        Raises `RefusedTarget` where it may not go, `ResponseTooLarge`, `OSError` (as `TimeoutError`) or
        `httpx.HTTPError` where no answer came.
        """
        fields = {name.lower(): value for name, value in (headers or {}).items()}
        if json is not None:
            content = encode_json(json)
            fields = {"content-type": "application/json"} | fields
        async with asyncio.timeout(self._settings.fetch_timeout):
            return await self._follow(_Hop(method, url, fields, content))

    async def _follow(self, hop: _Hop) -> Reply:
        for _ in range(self._settings.fetch_max_redirects + 1):
            received = await self._outgoing.send(*hop)
            location = received.headers.get("location", "")
            if received.status not in _REDIRECTS or not location:
                return self._reply(received, hop.url)
            hop = _next(hop, received.status, location)
        raise RefusedTarget(f"url: more than {self._settings.fetch_max_redirects} redirects")

    def _reply(self, received: Received, url: str) -> Reply:
        if not received.is_whole:
            raise ResponseTooLarge(f"the answer is over {self._settings.fetch_max_bytes} bytes")
        return Reply(received.status, received.headers, received.content, url)


def _next(hop: _Hop, status: int, location: str) -> _Hop:
    """Where a redirect leads, with what may go there. Raises `RefusedTarget`."""
    try:
        here, there = httpx.URL(hop.url), httpx.URL(hop.url).join(location)
    except (httpx.InvalidURL, ValueError) as error:
        raise RefusedTarget(f"url: a redirect to no address: {error}") from None
    method, headers, body = hop.method, hop.headers, hop.body
    if (status == 303 and method != "HEAD") or (status in {301, 302} and method == "POST"):
        method, body = "GET", b""
        headers = {name: value for name, value in headers.items() if name != "content-type"}
    if _origin(here) != _origin(there):
        if body:
            raise RefusedTarget("url: a redirect that would send the body to another origin")
        headers = {name: value for name, value in headers.items() if name in _HARMLESS}
    return _Hop(method, str(there), headers, body)


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port
