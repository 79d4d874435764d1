"""JSON Web Tokens of somebody else's making, verified by PyJWT.

Rule 1: the key decides the algorithm, never the token: a shared secret verifies HS256 and nothing else, a
public key only what fits its type. There is no `none`.
Rule 2: a token must end (`exp`), name a subject, and be meant for us where an audience is configured; with a
key set of somebody who issues for many, it must be configured.
Rule 3: keys are fetched when they are needed: again after a while, and at once, but seldom, for a key id
that nobody knows. While they cannot be fetched the ones from before hold.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import httpx
import jwt
import msgspec
import structlog

from streamjobs.errors import ConfigError, IdentityUnavailable, Invalid, Unauthenticated
from streamjobs.identity.principal import DEFAULT_SCOPES, SCOPES, Principal, subject_of, tenant_of

log = structlog.get_logger(__name__)

DEFAULT_TENANT = "default"
"""Of principals whose credentials name none."""
MAX_LENGTH = 8192

_SHARED = "HS256"
_KEY_TYPES = {"RS256": "RSA", "ES256": "EC"}
_MAX_KEYS = 100
_MAX_KEY_SET = 256 * 1024
_FETCH_TIMEOUT = 5.0
_COOLDOWN = 10.0
"""Seconds between fetches that strangers' key ids, or failures, bring about."""
_MIN_SECRET = 32

Fetch = Callable[[], Awaitable[bytes]]


class JwtRules(msgspec.Struct, frozen=True, kw_only=True):
    """What a token must be, and where in it to look."""

    secrets: tuple[str, ...] = ()
    issuer: str = ""
    audience: str = ""
    leeway: float = 30.0
    tenant_claim: str = "tenant"
    scope_claim: str = "scope"


class KeySet:
    """Public keys by id, from a URL."""

    def __init__(self, fetch: Fetch, ttl: float) -> None:
        self._fetch = fetch
        self._ttl = ttl
        self._keys: dict[str, jwt.PyJWK] = {}
        self._fresh_until = self._rests_until = 0.0
        self._lock = asyncio.Lock()

    async def key(self, key_id: str, algorithm: str) -> Any:
        """The key of that id, if it is one for this algorithm.

        Raises `Unauthenticated`, `IdentityUnavailable` where no key was ever fetched.
        """
        now = time.monotonic()
        if (now >= self._fresh_until or key_id not in self._keys) and now >= self._rests_until:
            await self._refresh()
        if not self._keys:
            raise IdentityUnavailable("the keys that tokens are checked with cannot be fetched now")
        key = self._keys.get(key_id)
        if key is None or key.key_type != _KEY_TYPES[algorithm]:
            raise Unauthenticated("the token was signed with a key that is not known here")
        return key.key

    async def _refresh(self) -> None:
        async with self._lock:
            if time.monotonic() < self._rests_until:
                return  # somebody else just did
            try:
                self._keys = _keys_of(await self._fetch())
                self._fresh_until = time.monotonic() + self._ttl
            except (httpx.HTTPError, ValueError, jwt.PyJWTError) as error:
                log.warning("jwks.unavailable", error=type(error).__name__)
            self._rests_until = time.monotonic() + _COOLDOWN


class JwtVerifier:
    """Turns tokens into principals."""

    def __init__(self, rules: JwtRules, keys: KeySet | None) -> None:
        if not rules.secrets and keys is None:
            raise ConfigError("auth by jwt needs the setting 'jwt_secrets' or 'jwt_jwks_url'")
        if any(len(secret) < _MIN_SECRET for secret in rules.secrets):
            raise ConfigError(f"setting 'jwt_secrets': at least {_MIN_SECRET} characters each")
        if keys is not None and not (rules.audience and rules.issuer):
            raise ConfigError(
                "setting 'jwt_jwks_url' needs 'jwt_audience' and 'jwt_issuer': its keys sign for others too"
            )
        self._rules = rules
        self._keys = keys

    async def verify(self, token: str) -> Principal:
        """Whom a token stands for. Raises `Unauthenticated`, `IdentityUnavailable`."""
        algorithm, key_id = _header_of(token)
        if algorithm == _SHARED and self._rules.secrets:
            return self._principal(self._by_secret(token))
        if algorithm in _KEY_TYPES and self._keys is not None:
            key = await self._keys.key(key_id, algorithm)
            return self._principal(self._claims(token, key, algorithm))
        raise Unauthenticated("the token's algorithm is not accepted here")

    def _by_secret(self, token: str) -> dict[str, Any]:
        """Try each: while they are being replaced there are two."""
        *others, last = self._rules.secrets
        for secret in others:
            try:
                return self._claims(token, secret, _SHARED)
            except _WrongKey:
                continue
        return self._claims(token, last, _SHARED)

    def _claims(self, token: str, key: Any, algorithm: str) -> dict[str, Any]:
        try:
            return jwt.decode(
                token,
                key,
                algorithms=[algorithm],
                audience=self._rules.audience or None,
                issuer=self._rules.issuer or None,
                leeway=self._rules.leeway,
                options={"require": ["exp", "sub"], "verify_aud": bool(self._rules.audience)},
            )
        except jwt.ExpiredSignatureError:
            raise Unauthenticated("the token has expired") from None
        except jwt.InvalidSignatureError:
            raise _WrongKey("the token's signature does not fit") from None
        except jwt.PyJWTError as error:
            raise Unauthenticated(f"the token is not valid ({type(error).__name__})") from None

    def _principal(self, claims: Mapping[str, Any]) -> Principal:
        try:
            return Principal(
                tenant=tenant_of(claims.get(self._rules.tenant_claim, DEFAULT_TENANT)),
                subject=subject_of(claims["sub"]),
                scopes=_scopes_in(claims.get(self._rules.scope_claim)),
                credential="jwt",
            )
        except Invalid as error:
            raise Unauthenticated(f"the token's claims do not fit: {error}") from None


class _WrongKey(Unauthenticated):
    """Another key may be the right one."""


def fetcher(url: str) -> Fetch:
    """Fetch a key set from a URL; neither redirects nor the environment's proxies are followed."""

    async def fetch() -> bytes:
        async with (
            httpx.AsyncClient(timeout=_FETCH_TIMEOUT, trust_env=False) as client,
            client.stream("GET", url) as response,
        ):
            response.raise_for_status()
            body = bytearray()
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) > _MAX_KEY_SET:
                    raise ValueError("a key set of this size is none")
            return bytes(body)

    return fetch


def _header_of(token: str) -> tuple[str, str]:
    if len(token) > MAX_LENGTH:
        raise Unauthenticated("the token is too long")
    try:
        header = jwt.get_unverified_header(token)
    except jwt.PyJWTError:
        raise Unauthenticated("this is no token") from None
    return str(header.get("alg")), str(header.get("kid", ""))


def _keys_of(body: bytes) -> dict[str, jwt.PyJWK]:
    """Those that sign and that we know how to use. Raises `ValueError` for what is no key set."""
    try:
        listed = msgspec.json.decode(body, type=dict[str, Any]).get("keys")
    except msgspec.MsgspecError as error:
        raise ValueError("no key set") from error
    if not isinstance(listed, list):
        raise ValueError("no key set")
    keys: dict[str, jwt.PyJWK] = {}
    for raw in listed[:_MAX_KEYS]:  # pyright: ignore[reportUnknownVariableType]
        key = _key_of(raw)
        if key is not None:
            keys[str(key.key_id or "")] = key
    if not keys:
        raise ValueError("a key set without a key for us")
    return keys


def _key_of(raw: Any) -> jwt.PyJWK | None:
    if not isinstance(raw, dict) or raw.get("use", "sig") != "sig":  # pyright: ignore[reportUnknownMemberType]
        return None
    algorithms = [name for name, kind in _KEY_TYPES.items() if kind == raw.get("kty")]  # pyright: ignore[reportUnknownMemberType]
    if not algorithms or raw.get("alg", algorithms[0]) != algorithms[0]:  # pyright: ignore[reportUnknownMemberType]
        return None
    try:
        return jwt.PyJWK(raw, algorithm=algorithms[0])  # pyright: ignore[reportUnknownArgumentType]
    except jwt.PyJWTError:
        return None


def _scopes_in(claim: object) -> frozenset[str]:
    """Those of ours among what the issuer grants; without the claim the default ones."""
    if claim is None:
        return DEFAULT_SCOPES
    words = claim.split() if isinstance(claim, str) else claim
    if not isinstance(words, list):
        raise Invalid("scope: a list of names, or names with spaces between")
    return SCOPES & {word for word in words if isinstance(word, str)}  # pyright: ignore[reportUnknownVariableType]
