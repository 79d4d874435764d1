"""Clients per purpose: read and write; one connection for each blocking loop; one for pub/sub.

Retries are allowed on `rw` only because every script may be sent twice; a blocking read is never
retried behind its loop's back. TCP_USER_TIMEOUT finds half-open links that keepalive and PING do not.
"""

from __future__ import annotations

import socket
from typing import Any
from urllib.parse import urlsplit

import hiredis
from redis.asyncio import BlockingConnectionPool, Connection, Redis, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff, NoBackoff
from redis.exceptions import ConnectionError, TimeoutError

from streamjobs.config import Settings
from streamjobs.errors import ConfigError

_TCP_USER_TIMEOUT = 18  # socket.TCP_USER_TIMEOUT is missing on some platforms
USER_TIMEOUT = 5.0


class _Packed:
    """Packs commands in C. redis-py's own loop over a batch's thousands of arguments costs more than all the rest."""

    def pack_command(self, *arguments: Any) -> list[bytes]:
        return [hiredis.pack_command(arguments)]  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType, reportAttributeAccessIssue]


class _PackedTcp(_Packed, Connection): ...


class _PackedTls(_Packed, SSLConnection): ...


class _PackedUnix(_Packed, UnixDomainSocketConnection): ...


_CONNECTIONS = {"redis": _PackedTcp, "rediss": _PackedTls, "unix": _PackedUnix}


def rw_client(settings: Settings) -> Redis:
    """The client for scripts and reads: pooled, waits for a connection, sends again after a lost reply.

    Raises `ConfigError` for a URL that is none of Redis's.
    """
    options = common_options(settings)
    pool = BlockingConnectionPool.from_url(
        settings.redis_url,
        connection_class=_CONNECTIONS[urlsplit(settings.redis_url).scheme],
        max_connections=settings.redis_max_connections,
        timeout=settings.redis_timeout,
        socket_timeout=settings.redis_timeout,
        retry=Retry(ExponentialWithJitterBackoff(base=0.01, cap=0.5), 3),
        retry_on_error=[ConnectionError, TimeoutError],
        **options,
    )
    return Redis(connection_pool=pool)


def blocking_client(settings: Settings, block: float) -> Redis:
    """A client with one connection, for a loop that blocks up to `block` seconds; never retries."""
    pool = BlockingConnectionPool.from_url(
        settings.redis_url,
        max_connections=1,
        timeout=settings.redis_timeout,
        socket_timeout=block + 3.0,
        retry=Retry(NoBackoff(), 0),
        **common_options(settings),
    )
    return Redis(connection_pool=pool)


def subscriber_client(settings: Settings) -> Redis:
    """The client whose connections carry subscriptions; reconnecting is the subscriber's own work."""
    pool = BlockingConnectionPool.from_url(
        settings.redis_url,
        max_connections=2,
        timeout=settings.redis_timeout,
        socket_timeout=None,
        retry=Retry(NoBackoff(), 0),
        **common_options(settings),
    )
    return Redis(connection_pool=pool)


def common_options(settings: Settings) -> dict[str, Any]:
    """What every client has in common.

    Raises `ConfigError` for a URL that is none of Redis's.
    """
    parts = urlsplit(settings.redis_url)
    if parts.scheme not in {"redis", "rediss", "unix"}:
        raise ConfigError(
            f"setting 'redis_url': expected redis://, rediss:// or unix://, not {parts.scheme or 'nothing'!r}"
        )
    options: dict[str, Any] = {
        "protocol": 2,
        "decode_responses": False,
        "socket_connect_timeout": settings.redis_connect_timeout,
    }
    if parts.scheme != "unix":
        options |= {"socket_keepalive": True, "socket_keepalive_options": _keepalive()}
    return options


def _keepalive() -> dict[int, int]:
    options = {getattr(socket, "TCP_USER_TIMEOUT", _TCP_USER_TIMEOUT): round(USER_TIMEOUT * 1000)}
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            options[getattr(socket, name)] = value
    return options
