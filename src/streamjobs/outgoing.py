"""Requests to addresses that strangers chose (webhooks, tools), so that none reaches a network of ours.

Rule 1: a name is resolved once; every address that it has must be public, and the connection goes to such
an address, never to the name: what the name means a moment later does not matter. `Host`, SNI and the
certificate's check are those of the name.
Rule 2: https only, on ports of the web; no credentials in the URL, no proxy of the environment, no
redirects, one connection a request, so that none is shared by names of one address.
Rule 3: the answer is read up to a cap, uncompressed, and all together takes a bounded time.
Rule 4: what frames a message, or names its receiver, is ours: no caller's header replaces it.

`allow` names hosts and networks that an operator lets through: their names, addresses and ports are free.

Rejected: a check of the URL before an ordinary request. The second resolution may answer otherwise.
"""

from __future__ import annotations

import asyncio
import functools
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import NamedTuple

import httpx
import msgspec

from streamjobs.errors import ConfigError, RefusedTarget

Address = IPv4Address | IPv6Address
Resolver = Callable[[str, int], Awaitable[list[str]]]
"""Gives every address of a host, as text; raises `OSError` where it has none."""

MAX_ANSWER = 4096
"""Bytes that are read of an answer's body."""
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_OURS = frozenset({
    "host", "connection", "keep-alive", "content-length", "transfer-encoding", "te", "trailer", "upgrade",
    "expect", "accept-encoding", "proxy-authorization", "proxy-connection",
})  # fmt: skip
_FIELD_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}", re.ASCII)
_FIELD_VALUE = re.compile(r"[\x20-\x7e\t]{0,4096}", re.ASCII)
_MAX_URL = 2000
_MAX_ADDRESSES = 4
"""Addresses of one name that are tried in turn."""
_PORTS = {"https": frozenset({443, 8443}), "http": frozenset({80, 8080})}
_DEFAULT_PORTS = {"https": 443, "http": 80}
_HOST = re.compile(
    r"(?=.{1,253}\Z)[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*", re.ASCII
)
_AUTHORITY = re.compile(
    r"https?://(\[[0-9a-f:.]+\]|[^\[\]@:/?#]+)(:[0-9]{1,5})?(?=[/?#]|\Z)",
    re.IGNORECASE | re.ASCII,
)
"""What all parsers read alike: httpx takes `[::1]443` for host and port, `@host` for no user."""
_NUMERIC_END = re.compile(r"(?:^|\.)(?:\d+|0x[0-9a-f]*)$", re.ASCII)

_NOT_PUBLIC_4 = tuple(map(IPv4Network, (
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12",
    "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24",
    "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
)))  # fmt: skip
# Of IPv6 only what is handed out for use (2000::/3) is public at all: no mapped, translated (64:ff9b::/96),
# local or multicast address is in it. Of that, not: protocol assignments with Teredo, documentation, 6to4.
_PUBLIC_6 = IPv6Network("2000::/3")
_NOT_PUBLIC_6 = tuple(map(IPv6Network, ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")))


class Target(NamedTuple):
    """A URL that has passed: what to ask for, from which host and port."""

    url: httpx.URL
    host: str
    port: int


class Policy(msgspec.Struct, frozen=True):
    """What is let through beside public https. `allow` is hosts and networks."""

    http: bool = False
    hosts: frozenset[str] = frozenset()
    networks: tuple[IPv4Network | IPv6Network, ...] = ()

    @classmethod
    def of(cls, allow: tuple[str, ...], *, http: bool, setting: str = "webhook_allow") -> Policy:
        """The policy that settings mean; `setting` is where `allow` stands. Raises `ConfigError`."""
        hosts, networks = set[str](), list[IPv4Network | IPv6Network]()
        for one in allow:
            try:
                networks.append(ip_network(one))
            except ValueError:
                host = one.lower()
                if "/" in one or _NUMERIC_END.search(host) or not _HOST.fullmatch(host):
                    raise ConfigError(f"setting {setting!r}: {one!r} is no host and no network") from None
                hosts.add(host)
        return cls(http, frozenset(hosts), tuple(networks))

    def target(self, url: str) -> Target:
        """Check what can be checked without asking anybody. Raises `RefusedTarget`."""
        parsed = _parsed(url)
        allowed_schemes = {"https", "http"} if self.http else {"https"}
        if parsed.scheme not in allowed_schemes:
            raise RefusedTarget(f"url: must be {' or '.join(sorted(allowed_schemes))}")
        if parsed.userinfo:
            raise RefusedTarget("url: must have no user and password")
        if not _AUTHORITY.match(url):
            raise RefusedTarget("url: its host and port are not well-formed")
        host = _checked_host(parsed)
        port = _DEFAULT_PORTS[parsed.scheme] if parsed.port is None else parsed.port
        literal = _literal(host)
        if literal is not None:
            self.require_public([literal], host)
        is_known = host in self.hosts or (literal is not None and self._lets_through(literal))
        if not is_known and not self.networks and port not in _PORTS[parsed.scheme]:
            raise RefusedTarget(f"url: port {port} is none of the web's")
        return Target(parsed, host, port)

    def require_public(self, addresses: list[Address], host: str) -> None:
        """Raise `RefusedTarget` unless all addresses are public, or the host or its network is allowed."""
        if host in self.hosts:
            return
        if not addresses or not all(is_public(one) or self._lets_through(one) for one in addresses):
            raise RefusedTarget("url: its host is not at a public address")

    def require_port(self, target: Target, addresses: list[Address]) -> None:
        """Raise `RefusedTarget` where a port is not the web's and the address is not allowed."""
        if target.port in _PORTS[target.url.scheme] or target.host in self.hosts:
            return
        if not all(map(self._lets_through, addresses)):
            raise RefusedTarget(f"url: port {target.port} is none of the web's")

    def _lets_through(self, address: Address) -> bool:
        return any(address in network for network in self.networks)


class Answer(NamedTuple):
    """What came back: the status, and the beginning of the body for people."""

    status: int
    text: str


class Received(NamedTuple):
    """What came back, up to the cap; `is_whole`: there was no more."""

    status: int
    headers: httpx.Headers
    content: bytes
    is_whole: bool


class Outgoing:
    """Sends to strangers' addresses under a policy, one exchange a call.

    `max_bytes` caps what is read of an answer's body. `resolve` and `trust` are for tests.
    """

    def __init__(
        self,
        policy: Policy,
        timeout: float,
        *,
        max_bytes: int = MAX_ANSWER,
        resolve: Resolver | None = None,
        trust: ssl.SSLContext | None = None,
    ) -> None:
        self._policy = policy
        self._timeout = timeout
        self._max_bytes = max_bytes
        self._resolve = resolve or resolve_by_system
        self._trust = trust

    async def post(self, url: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """Send a body; raises as `send`."""
        received = await self.send("POST", url, headers, body)
        return Answer(received.status, received.content.decode(errors="replace"))

    async def send(self, method: str, url: str, headers: Mapping[str, str], body: bytes) -> Received:
        """Send a request.

        Raises `RefusedTarget` before anything is sent; `OSError` (as `TimeoutError`) or `httpx.HTTPError`
        where no answer came.
        """
        if method not in METHODS:
            raise RefusedTarget(f"method: one of {', '.join(sorted(METHODS))}")
        target = self._policy.target(url)
        fields = _checked_headers(headers) | {"host": target.url.netloc.decode("ascii")}
        asked = httpx.Request(method, target.url, headers=fields, content=body or None)
        self._trust = self._trust or _public_authorities()  # reads files: not within the time
        async with asyncio.timeout(self._timeout):
            addresses = await self._addresses(target)
            for address in addresses[:-1]:
                try:
                    return await self._send_to(address, target, asked)
                except (httpx.ConnectError, httpx.ConnectTimeout):
                    continue
            return await self._send_to(addresses[-1], target, asked)

    async def _addresses(self, target: Target) -> list[Address]:
        literal = _literal(target.host)
        texts = [target.host] if literal else await self._resolve(target.host, target.port)
        addresses = [literal] if literal else [_address(one) for one in texts]
        self._policy.require_public(addresses, target.host)
        self._policy.require_port(target, addresses)
        if not addresses:
            raise RefusedTarget("url: its host has no address")
        return addresses[:_MAX_ADDRESSES]

    async def _send_to(self, address: Address, target: Target, asked: httpx.Request) -> Received:
        pinned = httpx.Request(
            asked.method,
            target.url.copy_with(host=str(address), fragment=None),
            headers=asked.headers,
            content=asked.content or None,
            extensions={"sni_hostname": target.host, "timeout": httpx.Timeout(self._timeout).as_dict()},
        )
        async with httpx.AsyncHTTPTransport(
            verify=self._trust or True, trust_env=False, retries=0
        ) as transport:
            response = await transport.handle_async_request(pinned)
            try:
                content = await _beginning(response, self._max_bytes + 1)
            finally:
                await response.aclose()
        is_whole = len(content) <= self._max_bytes
        return Received(response.status_code, response.headers, content[: self._max_bytes], is_whole)


def is_public(address: Address) -> bool:
    """Whether an address is one of the Internet's, not of somebody's own network."""
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _NOT_PUBLIC_4)
    return address in _PUBLIC_6 and not any(address in network for network in _NOT_PUBLIC_6)


async def resolve_by_system(host: str, port: int) -> list[str]:
    """Every address of a host, as the system knows them."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(row[4][0]) for row in found))


@functools.cache
def _public_authorities() -> ssl.SSLContext:
    return ssl.create_default_context()


async def _beginning(response: httpx.Response, size: int) -> bytes:
    head = bytearray()
    async for chunk in response.aiter_raw():
        head += chunk
        if len(head) >= size:
            break
    return bytes(head[:size])


def _checked_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """The caller's headers but for those that are ours, lower case. Raises `RefusedTarget`."""
    checked = {"accept-encoding": "identity"}
    for name, value in headers.items():
        if not _FIELD_NAME.fullmatch(name) or not _FIELD_VALUE.fullmatch(value):
            raise RefusedTarget("headers: a name or a value that HTTP does not know, or a long one")
        if name.lower() not in _OURS:
            checked[name.lower()] = value
    return checked


def _parsed(url: str) -> httpx.URL:
    if len(url) > _MAX_URL or not url.isascii() or re.search(r"[\x00-\x20\x7f\\]", url):
        raise RefusedTarget(f"url: up to {_MAX_URL} characters of ASCII, without spaces and backslashes")
    try:
        return httpx.URL(url)
    except (httpx.InvalidURL, ValueError) as error:
        raise RefusedTarget(f"url: {error}") from None


def _checked_host(url: httpx.URL) -> str:
    """The host, lower case. One that ends like a number must be an address as everybody writes it."""
    host = url.raw_host.decode("ascii").lower().strip("[]")
    if _literal(host) is not None:
        return host
    name = host.removesuffix(".")
    if not _HOST.fullmatch(name) or _NUMERIC_END.search(name):
        raise RefusedTarget("url: its host is no name and no address")
    return name


def _literal(host: str) -> Address | None:
    """The address that a host is; one with a zone (`fe80::1%eth0`) means another thing on each machine."""
    try:
        return None if "%" in host else ip_address(host)
    except ValueError:
        return None


def _address(text: str) -> Address:
    literal = _literal(text)
    if literal is None:
        raise RefusedTarget("url: its host is not at a public address")
    return literal
