"""An owner's webhooks: where what happens to their jobs is sent.

Rule 1: a webhook is looked for among its owner's only: for anybody else there is none.
Rule 2: its secret is shown once, when it is made; after a rotation the one before stays good for a while.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec
from redis.asyncio import Redis

from streamjobs.config import Settings
from streamjobs.errors import TooManyWebhooks, WebhookNotFound
from streamjobs.events import encode_json
from streamjobs.store import keys
from streamjobs.store.scripts import Scripts, ms, text, translated
from streamjobs.webhook import Webhook, new_secret

MAX_WEBHOOKS = 10
"""Webhooks that an owner may have."""


class WebhookRecord(NamedTuple):
    """A webhook as it is stored; `disabled_ms` is 0 where it is not."""

    id: str
    webhook: Webhook
    disabled_ms: int = 0
    disabled_why: str = ""

    @property
    def is_disabled(self) -> bool:
        """Whether nothing is sent to it until it is enabled."""
        return self.disabled_ms > 0


class Webhooks:
    """Makes, reads and changes the webhooks of owners."""

    def __init__(self, client: Redis, scripts: Scripts, settings: Settings) -> None:
        self._client: Any = client
        self._scripts = scripts
        self._settings = settings

    async def create(self, owner: str, webhook: Webhook) -> tuple[WebhookRecord, str]:
        """Make a webhook; returns it and its secret. Raises `TooManyWebhooks`, `StoreFull`."""
        webhook_id, secret = keys.new_webhook_id(), new_secret()
        verdict = await self._act("create", owner, webhook_id, encode_json(webhook), secret, MAX_WEBHOOKS)
        if verdict == "limit":
            raise TooManyWebhooks(f"url: an owner may have {MAX_WEBHOOKS} webhooks")
        return WebhookRecord(webhook_id, webhook), secret

    async def of_owner(self, owner: str) -> list[WebhookRecord]:
        """All of an owner's webhooks, oldest first."""
        with translated():
            found: dict[Any, Any] = await self._client.hgetall(self._key(owner))
        fields = {text(name): value for name, value in found.items()}
        records = [
            _record(name, value, fields.get(f"{name}/disabled"))
            for name, value in fields.items()
            if "/" not in name
        ]
        return sorted(records, key=lambda record: (record.webhook.created_ms, record.id))

    async def get(self, owner: str, webhook_id: str) -> WebhookRecord:
        """One of an owner's webhooks. Raises `WebhookNotFound`."""
        found = {record.id: record for record in await self.of_owner(owner)}
        if webhook_id not in found:
            raise WebhookNotFound("no such webhook")
        return found[webhook_id]

    async def delete(self, owner: str, webhook_id: str) -> None:
        """Forget it and what it did not take. Raises `WebhookNotFound`."""
        await self.get(owner, webhook_id)
        await self._act("delete", owner, webhook_id)

    async def disable(self, owner: str, webhook_id: str, why: str) -> None:
        """Send nothing to it; what comes due meanwhile is undelivered. Raises `WebhookNotFound`."""
        await self._act("disable", owner, webhook_id, why)

    async def enable(self, owner: str, webhook_id: str) -> None:
        """Send to it again. Raises `WebhookNotFound`."""
        await self._act("enable", owner, webhook_id)

    async def rotate(self, owner: str, webhook_id: str) -> str:
        """Give it another secret and return that; for `webhook_grace` both sign.

        Raises `WebhookNotFound`.
        """
        secret = new_secret()
        await self._act("rotate", owner, webhook_id, secret, ms(self._settings.webhook_grace))
        return secret

    async def _act(self, act: str, owner: str, webhook_id: str, *arguments: str | bytes | int) -> str:
        partition = keys.partition_of_owner(owner, self._settings.partitions)
        answer = await self._scripts.call(Scripts.WEBHOOK, partition, act, owner, webhook_id, *arguments)
        if text(answer[0]) == "gone":
            raise WebhookNotFound("no such webhook")
        return text(answer[0])

    def _key(self, owner: str) -> str:
        return f"{keys.prefix(keys.partition_of_owner(owner, self._settings.partitions))}webhooks:{owner}"


def _record(webhook_id: str, definition: bytes, disabled: bytes | None) -> WebhookRecord:
    webhook = msgspec.json.decode(definition, type=Webhook)
    at, _, why = text(disabled or b"0").partition(" ")
    return WebhookRecord(webhook_id, webhook, int(at), why)
