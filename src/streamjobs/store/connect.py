"""Clients per purpose: read and write; one connection for each blocking loop; one for pub/sub.

Retries are allowed on `rw` only because every script may be sent twice; a blocking read is never
retried behind its loop's back. TCP_USER_TIMEOUT finds half-open links that keepalive and PING do not.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import hiredis
from redis import exceptions
from redis.asyncio import BlockingConnectionPool, Connection, Redis, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff, NoBackoff

from streamjobs.config import Settings
from streamjobs.errors import ConfigError

_TCP_USER_TIMEOUT = 18  # socket.TCP_USER_TIMEOUT is missing on some platforms
USER_TIMEOUT = 5.0


class _Packed:
    """Packs commands in C: redis-py's own loop over thousands of arguments costs more than all the rest."""

    def pack_command(self, *arguments: Any) -> list[bytes]:
        name, *rest = arguments
        words = name.split() if isinstance(name, str) else [name]  # redis-py says "CONFIG SET" in one piece
        pack: Any = hiredis.pack_command  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType, reportAttributeAccessIssue]
        return [pack((*words, *rest))]


class _PackedTcp(_Packed, Connection): ...


class _PackedTls(_Packed, SSLConnection): ...


class _PackedUnix(_Packed, UnixDomainSocketConnection): ...


_CONNECTIONS = {"redis": _PackedTcp, "rediss": _PackedTls, "unix": _PackedUnix}
_FORMS = "redis://, rediss:// or unix://"


def rw_client(settings: Settings) -> Redis:
    """The client for scripts and reads: pooled, waits for a connection, sends again after a lost reply.

    Raises `ConfigError` for a URL that is none of Redis's.
    """
    return _client(
        settings,
        max_connections=settings.redis_max_connections,
        socket_timeout=settings.redis_timeout,
        retry=Retry(ExponentialWithJitterBackoff(base=0.01, cap=0.5), 3),
        retry_on_error=[exceptions.ConnectionError, exceptions.TimeoutError],
    )


def blocking_client(settings: Settings, block: float) -> Redis:
    """A client with one connection, for a loop that blocks up to `block` seconds; never retries."""
    return _client(settings, max_connections=1, socket_timeout=block + 3.0, retry=Retry(NoBackoff(), 0))


def subscriber_client(settings: Settings) -> Redis:
    """The client whose connections carry subscriptions; reconnecting is the subscriber's own work."""
    return _client(settings, max_connections=2, socket_timeout=None, retry=Retry(NoBackoff(), 0))


def _client(settings: Settings, **options: Any) -> Redis:
    pools: Any = BlockingConnectionPool
    known = common_options(settings)
    try:
        pool = pools.from_url(settings.redis_url, timeout=settings.redis_timeout, **known, **options)
        pool.connection_class = _CONNECTIONS[_scheme(settings.redis_url)]  # from_url lets the URL decide
        pool.make_connection()  # not connected: it only says what of the URL no connection understands
    except (ValueError, TypeError) as error:
        raise ConfigError(f"setting 'redis_url': {error}") from error
    return Redis.from_pool(pool)  # which it closes, unlike one that it is given as `connection_pool`


def common_options(settings: Settings) -> dict[str, Any]:
    """What every client has in common.

    Raises `ConfigError` for a URL that is none of Redis's.
    """
    scheme = _scheme(settings.redis_url)
    options: dict[str, Any] = {
        "protocol": 2,
        "decode_responses": False,
        "socket_connect_timeout": settings.redis_connect_timeout,
        "password": settings.redis_password or None,  # what the URL says wins
        "driver_info": None,  # what we are called is no command that an ACL need allow
    }
    if scheme != "unix":
        options |= {"socket_keepalive": True, "socket_keepalive_options": _keepalive()}
    return options | _tls(settings, scheme)


def _tls(settings: Settings, scheme: str) -> dict[str, str]:
    """What a connection is told of certificates. They are read here to be sure that they can be."""
    files = {
        "ssl_ca_certs": settings.redis_tls_ca,
        "ssl_certfile": settings.redis_tls_cert,
        "ssl_keyfile": settings.redis_tls_key,
    }
    named = {option: file for option, file in files.items() if file}
    if named and scheme != "rediss":
        raise ConfigError("setting 'redis_url': certificates are for rediss://, this connection has no TLS")
    if settings.redis_tls_key and not settings.redis_tls_cert:
        raise ConfigError("setting 'redis_tls_key': without redis_tls_cert")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _read("redis_tls_ca", settings.redis_tls_ca, context.load_verify_locations)
    _read("redis_tls_cert", settings.redis_tls_cert, context.load_cert_chain, settings.redis_tls_key or None)
    return named


def _read(setting: str, file: str, load: Callable[..., None], *more: str | None) -> None:
    if not file:
        return
    try:
        load(file, *more)
    except OSError as error:  # an `SSLError` is one too
        raise ConfigError(f"setting {setting!r}: {file}: {error.strerror or error}") from error


def _scheme(url: str) -> str:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:  # its message quotes what may be the password
        raise ConfigError(
            "setting 'redis_url': no URL; a password's special characters are written as %40 for @"
        ) from None
    scheme = parts.scheme
    if scheme not in _CONNECTIONS:
        raise ConfigError(f"setting 'redis_url': expected {_FORMS}, not {scheme or 'nothing'!r}")
    return scheme


def _keepalive() -> dict[int, int]:
    options = {getattr(socket, "TCP_USER_TIMEOUT", _TCP_USER_TIMEOUT): round(USER_TIMEOUT * 1000)}
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            options[getattr(socket, name)] = value
    return options
