"""API keys: what they look like, and what is kept of them.

A key is `sjk_<id>_<secret>`. The id is public, so that a key can be named in a list, a log and a search for
leaked ones. The secret is 200 random bits: a fast digest of it is all that is kept, as there is nothing
to guess.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets

import msgspec

from streamjobs.identity.principal import Principal

PREFIX = "sjk_"
_KEY = re.compile(r"sjk_([a-z2-7]{12})_([a-z2-7]{40})", re.ASCII)


class ApiKey(msgspec.Struct, frozen=True, kw_only=True):
    """A key as it is kept; instants in ms, 0: never."""

    id: str
    digest: str
    tenant: str
    subject: str
    scopes: frozenset[str]
    label: str = ""
    created_ms: int = 0
    expires_ms: int = 0
    revoked_ms: int = 0

    @property
    def shown(self) -> str:
        """Its first part, by which people recognise it."""
        return f"{PREFIX}{self.id}_…"

    @property
    def principal(self) -> Principal:
        """Whom it stands for."""
        return Principal(
            tenant=self.tenant, subject=self.subject, scopes=self.scopes, credential=f"key:{self.id}"
        )

    def is_good(self, now_ms: int) -> bool:
        """Whether it is neither revoked nor expired."""
        return not self.revoked_ms and (not self.expires_ms or now_ms < self.expires_ms)

    def is_opened_by(self, secret: str) -> bool:
        """Whether this is its secret."""
        return hmac.compare_digest(self.digest, digest_of(secret))


def new_key() -> tuple[str, str, str]:
    """A fresh key: its id, its secret, and the text that its bearer gets."""
    key_id, secret = _random(60), _random(200)
    return key_id, secret, f"{PREFIX}{key_id}_{secret}"


def parse_key(text: str) -> tuple[str, str] | None:
    """A key's id and secret; None where it is none."""
    match = _KEY.fullmatch(text)
    return None if match is None else (match[1], match[2])


def digest_of(secret: str) -> str:
    """What is kept of a secret."""
    return hashlib.sha256(secret.encode()).hexdigest()


def _random(bits: int) -> str:
    return base64.b32encode(secrets.token_bytes(bits // 8 + 1)).decode().lower()[: bits // 5]
