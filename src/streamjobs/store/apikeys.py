"""API keys at rest: a digest, whose they are, what they may do. All in one hash of partition 0.

Rule 1: what is kept opens nothing: the text of a key is known to its bearer alone.
Rule 2: a revoked key stays listed, so that what it did can be traced; `forget` removes it.
"""

from __future__ import annotations

from typing import Any

import msgspec
from redis.asyncio import Redis

from streamjobs.errors import KeyNotFound, TooManyKeys
from streamjobs.identity.apikey import ApiKey, digest_of, new_key
from streamjobs.store import keys
from streamjobs.store.scripts import text, translated

MAX_KEYS = 10_000

_decode = msgspec.json.Decoder(ApiKey)


class ApiKeys:
    """Makes, finds, lists and revokes API keys."""

    def __init__(self, client: Redis, now_ms: Any) -> None:
        self._client: Any = client
        self._now_ms = now_ms
        self._key = f"{keys.prefix(0)}apikeys"

    async def create(
        self, *, tenant: str, subject: str, scopes: frozenset[str], label: str = "", ttl: float = 0.0
    ) -> tuple[ApiKey, str]:
        """Make a key; returns it and the text that is shown once. Raises `TooManyKeys`."""
        key_id, secret, shown = new_key()
        now = await self._now_ms()
        key = ApiKey(
            id=key_id,
            digest=digest_of(secret),
            tenant=tenant,
            subject=subject,
            scopes=scopes,
            label=label,
            created_ms=now,
            expires_ms=now + round(ttl * 1000) if ttl else 0,
        )
        with translated():
            if await self._client.hlen(self._key) >= MAX_KEYS:
                raise TooManyKeys(f"there are {MAX_KEYS} keys; forget some that are revoked")
            await self._client.hset(self._key, key_id, msgspec.json.encode(key))
        return key, shown

    async def get(self, key_id: str) -> ApiKey:
        """One key. Raises `KeyNotFound`."""
        with translated():
            raw = await self._client.hget(self._key, key_id)
        if raw is None:
            raise KeyNotFound("no such key")
        return _decode.decode(raw)

    async def all(self) -> list[ApiKey]:
        """Every key, oldest first."""
        with translated():
            found: dict[Any, Any] = await self._client.hgetall(self._key)
        return sorted(map(_decode.decode, found.values()), key=lambda key: (key.created_ms, key.id))

    async def revoke(self, key_id: str) -> bool:
        """End a key; False where that was done before. Raises `KeyNotFound`."""
        key = await self.get(key_id)
        if key.revoked_ms:
            return False
        revoked = msgspec.structs.replace(key, revoked_ms=await self._now_ms())
        with translated():
            await self._client.hset(self._key, key_id, msgspec.json.encode(revoked))
        return True

    async def forget(self, key_id: str) -> bool:
        """Remove a key from the list, which ends it too; False where there is none."""
        with translated():
            return bool(await self._client.hdel(self._key, key_id))

    async def signing_secret(self, fresh: str) -> str:
        """The installation's own secret for stream tokens; `fresh` becomes it where there is none."""
        with translated():
            await self._client.hsetnx(keys.META, "token_secret", fresh)
            return text(await self._client.hget(keys.META, "token_secret"))
