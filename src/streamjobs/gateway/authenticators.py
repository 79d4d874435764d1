"""Ways to know who asks, as the setting `auth` names them: API keys, JWTs, a proxy's headers, your own code.

Rule 1: each takes what is its own and leaves the rest to the next one. What is its own and not good is
refused at once: nobody else may find it good.
Rule 2: what Redis said of a key is believed for `auth_cache` seconds, and as long as Redis is away: viewers
who come back during an outage are not turned off.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import Scope

from streamjobs.config import Settings
from streamjobs.errors import ConfigError, Invalid, KeyNotFound, StoreUnavailable, Unauthenticated
from streamjobs.gateway.credentials import OWNER_HEADER, SCOPES_HEADER, TENANT_HEADER, Credential
from streamjobs.gateway.origin import is_this_machine
from streamjobs.identity import apikey
from streamjobs.identity.apikey import ApiKey
from streamjobs.identity.jwt import DEFAULT_TENANT, JwtRules, JwtVerifier, KeySet, fetcher
from streamjobs.identity.principal import DEFAULT_SCOPES, Principal, scopes_of, subject_of, tenant_of
from streamjobs.store import Store

OPEN = "open"
"""In `auth`: nobody is asked who he is, on purpose."""

_CACHED = 10_000
_LOOKUP_TIMEOUT = 1.0
"""Seconds that Redis gets to say what it knows of a key; then what it said before holds."""


class Asking(NamedTuple):
    """A request, as your own authenticator gets it. `token`: the credential, empty without one."""

    method: str
    path: str
    headers: Mapping[str, str]
    token: str


class Authenticator(Protocol):
    """Says who asks, or None where that is for another one to say. Raises `Unauthenticated`."""

    async def __call__(self, scope: Scope, credential: Credential | None, /) -> Principal | None:
        """Look at a request and its credential."""
        ...


class KeyAuthenticator:
    """API keys."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._ttl = settings.auth_cache
        self._known: OrderedDict[str, tuple[ApiKey, float]] = OrderedDict()

    async def __call__(self, _scope: Scope, credential: Credential | None) -> Principal | None:
        """See `Authenticator`."""
        parsed = apikey.parse_key(credential.text) if credential else None
        if parsed is None:
            if credential and credential.text.startswith(apikey.PREFIX):
                raise Unauthenticated("this is no API key")
            return None
        key_id, secret = parsed
        key = await self._key(key_id)
        if key is None or not key.is_opened_by(secret):
            raise Unauthenticated("this API key is not known here")
        self._require_good(key)
        return key.principal

    async def require_live(self, principal: Principal) -> None:
        """Refuse who was let in by a key that has ended since. Raises `Unauthenticated`."""
        kind, _, key_id = principal.credential.partition(":")
        if kind == "key":
            key = await self._key(key_id)
            if key is None:
                raise Unauthenticated("the API key behind this is not known here")
            self._require_good(key)

    def _require_good(self, key: ApiKey) -> None:
        if not key.is_good(int(time.time() * 1000)):
            raise Unauthenticated("this API key has been revoked or has expired")

    async def _key(self, key_id: str) -> ApiKey | None:
        known = self._known.get(key_id)
        if known is not None and time.monotonic() < known[1]:
            return known[0]
        try:
            async with asyncio.timeout(_LOOKUP_TIMEOUT):
                key = await self._store.api_keys.get(key_id)
        except KeyNotFound:
            self._known.pop(key_id, None)  # and not remembered: made-up ids would push the real ones out
            return None
        except (StoreUnavailable, TimeoutError):
            if known is None:
                raise StoreUnavailable("Redis cannot be reached now") from None
            key = known[0]
        self._known[key_id] = key, time.monotonic() + self._ttl
        self._known.move_to_end(key_id)
        while len(self._known) > _CACHED:
            self._known.popitem(last=False)
        return key


class JwtAuthenticator:
    """JSON Web Tokens."""

    def __init__(self, settings: Settings) -> None:
        url = settings.jwt_jwks_url
        _require_safe(url)
        keys = KeySet(fetcher(url), settings.jwt_jwks_ttl) if url else None
        self._verifier = JwtVerifier(
            JwtRules(
                secrets=settings.jwt_secrets,
                issuer=settings.jwt_issuer,
                audience=settings.jwt_audience,
                leeway=settings.jwt_leeway,
                tenant_claim=settings.jwt_tenant_claim,
                scope_claim=settings.jwt_scope_claim,
            ),
            keys,
        )

    async def __call__(self, _scope: Scope, credential: Credential | None) -> Principal | None:
        """See `Authenticator`."""
        if credential is None or credential.text.count(".") != 2:
            return None
        return await self._verifier.verify(credential.text)


async def by_proxy(scope: Scope, _credential: Credential | None) -> Principal | None:
    """Believe the headers of a proxy that knows who asks, and that nobody can go around."""
    headers = Headers(scope=scope)
    if OWNER_HEADER not in headers:
        return None
    try:
        return Principal(
            tenant=tenant_of(headers.get(TENANT_HEADER, DEFAULT_TENANT)),
            subject=subject_of(headers[OWNER_HEADER]),
            scopes=scopes_of(headers[SCOPES_HEADER]) if SCOPES_HEADER in headers else DEFAULT_SCOPES,
            credential="proxy",
        )
    except Invalid as error:
        raise Unauthenticated(str(error)) from None


class OwnAuthenticator:
    """A function of yours, plain or async: takes an `Asking`, returns a `Principal` or None."""

    def __init__(self, function: Callable[[Asking], Any]) -> None:
        self._function = function

    @classmethod
    def named(cls, path: str) -> OwnAuthenticator:
        """The one at `module:attribute`. Raises `ConfigError`."""
        module, _, attribute = path.partition(":")
        try:
            function = getattr(import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"setting 'auth': {path}: {error}") from error
        if not callable(function):
            raise ConfigError(f"setting 'auth': {path} cannot be called")
        return cls(function)

    async def __call__(self, scope: Scope, credential: Credential | None) -> Principal | None:
        """See `Authenticator`."""
        asking = Asking(
            scope.get("method", "GET"),
            scope["path"],
            Headers(scope=scope),
            credential.text if credential else "",
        )
        found = self._function(asking)
        principal = await found if inspect.isawaitable(found) else found
        if principal is None:
            return None
        if not isinstance(principal, Principal):
            raise TypeError("an authenticator gives a Principal or None")
        try:
            subject_of(principal.subject)
            tenant_of(principal.tenant)
            scopes_of(principal.scopes)
        except Invalid as error:
            raise ConfigError(
                f"setting 'auth': your authenticator gave a principal that cannot be: {error}"
            ) from None
        return principal


def _require_safe(url: str) -> None:
    parts = urlsplit(url)
    if url and parts.scheme != "https" and not is_this_machine(parts.hostname or ""):
        raise ConfigError("setting 'jwt_jwks_url': https, or whoever is between can sign for everybody")


def authenticators_of(settings: Settings, keys: KeyAuthenticator) -> list[Authenticator]:
    """Those that the setting `auth` names; none where nobody is asked who he is. Raises `ConfigError`."""
    if OPEN in settings.auth and len(settings.auth) > 1:
        raise ConfigError("setting 'auth': 'open' stands alone")
    made: list[Authenticator] = []
    for name in settings.auth:
        if name == "keys":
            made.append(keys)
        elif name == "jwt":
            made.append(JwtAuthenticator(settings))
        elif name == "proxy":
            made.append(by_proxy)
        elif ":" in name:
            made.append(OwnAuthenticator.named(name))
        elif name != OPEN:
            raise ConfigError(f"setting 'auth': {name!r} is none of keys, jwt, proxy, open, module:function")
    return made
