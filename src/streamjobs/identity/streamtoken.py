"""Stream tokens: what a browser's EventSource puts into its URL, for want of headers.

A token is `sjt_<payload>.<mac>`, both base64url; the mac is HMAC-SHA256 under the key that the payload names.

Rule 1: it reads one job, or what one owner has, and changes nothing.
Rule 2: it is good for minutes. A stream that was opened with one gets the next one in time, until `until`:
from then on somebody with a real credential has to ask for one.
Rule 3: it names the credential that asked for it first, so that it ends where that was revoked.
Rule 4: the first key signs; every key that is configured verifies, so keys can be replaced one at a time.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Mapping

import msgspec

from streamjobs.errors import ConfigError, Unauthenticated
from streamjobs.identity.principal import Principal

PREFIX = "sjt_"
MAX_LENGTH = 2048
_MIN_SECRET = 32

Keys = Mapping[str, bytes]
"""Secrets by name; the first signs."""


class StreamToken(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, rename={
    "key": "k", "tenant": "t", "subject": "s", "job": "j", "expires": "e", "until": "u", "credential": "c",
}):  # fmt: skip
    """What a token says. `job` is empty for an owner's everything; instants in s."""

    key: str
    subject: str
    expires: int
    until: int
    tenant: str = ""
    job: str = ""
    credential: str = ""

    @property
    def principal(self) -> Principal:
        """Whom it stands for."""
        return Principal(
            tenant=self.tenant,
            subject=self.subject,
            scopes=frozenset({"jobs:read"}),
            credential=self.credential,
            job=self.job,
        )

    def renewed(self, now: float, ttl: float) -> StreamToken:
        """The one that follows it."""
        return msgspec.structs.replace(self, expires=min(int(now + ttl), self.until))


class StreamTokens:
    """Signs and verifies."""

    def __init__(self, keys: Keys, ttl: float, max_age: float) -> None:
        if not keys:
            raise ConfigError("stream tokens need a key")
        self._keys = dict(keys)
        self._first = next(iter(self._keys))
        self.ttl = ttl
        self._max_age = max_age

    def issue(self, principal: Principal, job: str, now: float) -> StreamToken:
        """A token for a job of the principal's, or with an empty one for all that is its."""
        return StreamToken(
            key=self._first,
            tenant=principal.tenant,
            subject=principal.subject,
            job=job,
            expires=int(now + self.ttl),
            until=int(now + self._max_age),
            credential=principal.credential,
        )

    def sign(self, token: StreamToken) -> str:
        """A token as text."""
        payload = _encoded(msgspec.json.encode(msgspec.structs.replace(token, key=self._first)))
        return f"{PREFIX}{payload}.{_encoded(self._mac(self._first, payload))}"

    def verify(self, text: str, now: float) -> StreamToken:
        """Read a token. Raises `Unauthenticated` for one that is not ours, or not good any more."""
        payload, dot, mac = text.removeprefix(PREFIX).partition(".")
        if not text.startswith(PREFIX) or not dot or len(text) > MAX_LENGTH:
            raise Unauthenticated("this is no stream token")
        try:
            token = msgspec.json.decode(_decoded(payload), type=StreamToken, strict=True)
            given = _decoded(mac)
        except (msgspec.MsgspecError, binascii.Error, UnicodeError, ValueError):
            raise Unauthenticated("this is no stream token") from None
        if token.key not in self._keys or not hmac.compare_digest(given, self._mac(token.key, payload)):
            raise Unauthenticated("this stream token was not signed here")
        if now >= min(token.expires, token.until):
            raise Unauthenticated("this stream token has expired; ask for another one")
        return token

    def _mac(self, key: str, payload: str) -> bytes:
        return hmac.digest(self._keys[key], payload.encode(), hashlib.sha256)


def parse_keys(named: tuple[str, ...]) -> dict[str, bytes]:
    """Keys of `name:secret` texts. Raises `ConfigError`, which says nothing of the secret."""
    keys: dict[str, bytes] = {}
    for text in named:
        name, colon, secret = text.partition(":")
        if not colon or not name or len(secret) < _MIN_SECRET:
            raise ConfigError(
                f"setting 'token_keys': name:secret, a secret of {_MIN_SECRET} characters at least"
            )
        keys[name] = secret.encode()
    return keys


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _decoded(text: str) -> bytes:
    data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    if _encoded(data) != text:
        raise ValueError("one token has one form")
    return data
