"""Deliveries to webhooks: a queue of their own, by when the next try is due.

Rule 1: what is due is claimed under a lease that counts as a try; a claim that is never settled comes due
again. So each is sent at least once, and never more often than its tries.
Rule 2: only the newest try settles; what an older one reports is too late.
Rule 3: what was given up stays on its webhook's list for a month, and can be sent again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import msgspec
from redis.asyncio import Redis

from streamjobs.config import Settings
from streamjobs.store import keys
from streamjobs.store.scripts import Scripts, ms, text, translated
from streamjobs.webhook import Webhook

TRIES = 8
DELIVERY_TTL = 8 * 86400.0
"""Seconds that a delivery is kept at most: its tries take about one day of them."""
UNDELIVERED_TTL = 30 * 86400.0
UNDELIVERED_CAP = 1000
"""Undelivered ones that are kept for each webhook."""

Verdict = Literal["done", "retry", "dead", "gone"]


class Claimed(NamedTuple):
    """A delivery that this process is to try: the `number` of the try, and what it needs for it.

    `secrets` are those that are good now, the newest first; `now_ms` is Redis's clock.
    """

    partition: int
    id: str
    number: int
    owner: str
    webhook_id: str
    webhook: Webhook
    secrets: tuple[str, ...]
    content: bytes
    now_ms: int


class Claims(NamedTuple):
    """What was due, and the seconds until something will be; None where nothing waits."""

    claimed: list[Claimed]
    next_due: float | None


class Undelivered(msgspec.Struct, frozen=True, kw_only=True):
    """A delivery that was given up: of which job, when, after how many tries and why."""

    id: str
    job: str
    tried: int
    error: str
    created_ms: int
    given_up_ms: int
    content: msgspec.Raw


class Deliveries:
    """Claims and settles deliveries, and lists what was given up."""

    def __init__(self, client: Redis, scripts: Scripts, settings: Settings) -> None:
        self._client: Any = client
        self._scripts = scripts
        self._partitions = settings.partitions
        self._lease = 2 * settings.webhook_timeout + 10.0

    async def claim(self, partition: int, limit: int) -> Claims:
        """Take up to `limit` of what is due. Raises `StoreUnavailable`."""
        now, next_due, rows = await self._scripts.call(
            Scripts.DELIVER, partition, "claim", limit, ms(self._lease), ms(UNDELIVERED_TTL), UNDELIVERED_CAP
        )
        claimed = [_claimed(partition, row, now) for row in rows]
        return Claims(claimed, None if next_due < 0 else max(0.0, (next_due - now) / 1000))

    async def settle(self, one: Claimed, verdict: Verdict, *, delay: float = 0.0, why: str = "") -> bool:
        """Record how a try went; False where another one has begun since. Raises `StoreUnavailable`."""
        answer = await self._scripts.call(
            Scripts.DELIVER, one.partition, "settle", one.id, one.number, verdict, ms(delay), why,
            ms(UNDELIVERED_TTL), UNDELIVERED_CAP,
        )  # fmt: skip
        return text(answer[0]) == "ok"

    async def undelivered(self, owner: str, webhook_id: str, limit: int = 100) -> list[Undelivered]:
        """What an owner's webhook did not take, newest first. The webhook must be the owner's."""
        prefix = self._prefix(owner)
        with translated():
            rows: list[Any] = await self._client.zrange(
                f"{prefix}undelivered:{webhook_id}", 0, limit - 1, desc=True, withscores=True
            )
            async with self._client.pipeline(transaction=False) as pipe:
                for one, _ in rows:
                    pipe.hgetall(f"{prefix}delivery:{text(one)}")
                found: list[dict[bytes, bytes]] = await pipe.execute() if rows else []
        return [
            _undelivered(text(one), int(at), fields)
            for (one, at), fields in zip(rows, found, strict=True)
            if fields
        ]

    async def rerun(self, owner: str, webhook_id: str, ids: Iterable[str]) -> int:
        """Send undelivered ones again, under the ids they had; how many there were."""
        return await self._scripts.call(
            Scripts.DELIVER, keys.partition_of_owner(owner, self._partitions), "rerun", owner, webhook_id,
            TRIES, ms(DELIVERY_TTL), *ids,
        )  # fmt: skip

    def _prefix(self, owner: str) -> str:
        return keys.prefix(keys.partition_of_owner(owner, self._partitions))


def _claimed(partition: int, row: list[Any], now: int) -> Claimed:
    delivery_id, number, owner, webhook_id, definition, secret, content = row
    webhook = msgspec.json.decode(definition, type=Webhook)
    current, _, before = text(secret).partition(" ")
    former, _, good_until = before.partition(" ")
    secrets = (current, former) if former and now < int(good_until) else (current,)
    return Claimed(
        partition, text(delivery_id), number, text(owner), text(webhook_id), webhook, secrets, content, now
    )


def _undelivered(delivery_id: str, at: int, fields: dict[bytes, bytes]) -> Undelivered:
    return Undelivered(
        id=delivery_id,
        job=text(fields[b"job"]),
        tried=int(fields[b"tried"]),
        error=text(fields.get(b"error", b"")),
        created_ms=int(fields[b"created"]),
        given_up_ms=at,
        content=msgspec.Raw(fields[b"content"]),
    )
