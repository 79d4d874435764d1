"""The client's calls about notices and webhooks: `client.notifications.list()`, `client.webhooks.list()`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any
from urllib.parse import quote

from streamjobs.client.schedules import Call


class NotificationsClient:
    """What the owner is told. Every call raises `GatewayError`, `GatewayUnreachable`."""

    def __init__(self, call: Call) -> None:
        self._call = call

    async def list(self, *, unread: bool = False, limit: int = 50, cursor: str = "") -> dict[str, Any]:
        """One page, newest first: `notifications`, how many are `unread`, the `cursor` of the next page."""
        asked: dict[str, Any] = {"limit": limit} | ({"unread": 1} if unread else {})
        return await self._call(
            "GET", "/v1/notifications", params=asked | ({"cursor": cursor} if cursor else {})
        )

    async def all(self, *, unread: bool = False) -> AsyncIterator[dict[str, Any]]:
        """Every notice, newest first, page by page."""
        cursor = ""
        while True:
            page = await self.list(unread=unread, limit=500, cursor=cursor)
            for notice in page["notifications"]:
                yield notice
            cursor = page["cursor"]
            if not cursor:
                return

    async def read(self, *ids: str, until: str = "") -> int:
        """Mark some as read, or all up to and with `until`; how many were not before."""
        body: dict[str, Any] = {"ids": ids} if ids else {}
        answer = await self._call(
            "POST", "/v1/notifications/read", json=body | ({"until": until} if until else {})
        )
        return answer["marked"]


class WebhooksClient:
    """Acts on the owner's webhooks. Every call raises `GatewayError`, `GatewayUnreachable`."""

    def __init__(self, call: Call) -> None:
        self._call = call

    async def create(
        self, url: str, *, events: Sequence[str] | None = None, kinds: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Make a webhook; the answer, and no later one, has its `secret`."""
        chosen = {} if events is None else {"events": list(events)}
        return await self._call("POST", "/v1/webhooks", json={"url": url, "kinds": list(kinds), **chosen})

    async def list(self) -> list[dict[str, Any]]:
        """All of them, oldest first."""
        return (await self._call("GET", "/v1/webhooks"))["webhooks"]

    async def get(self, webhook_id: str) -> dict[str, Any]:
        """One of them."""
        return await self._call("GET", _path(webhook_id))

    async def delete(self, webhook_id: str) -> None:
        """Forget it, and what it did not take."""
        await self._call("DELETE", _path(webhook_id))

    async def rotate(self, webhook_id: str) -> str:
        """Give it another secret, and return that; for a while the one before signs too."""
        return (await self._call("POST", f"{_path(webhook_id)}/rotate"))["secret"]

    async def enable(self, webhook_id: str) -> dict[str, Any]:
        """Send to it again."""
        return await self._call("POST", f"{_path(webhook_id)}/enable")

    async def disable(self, webhook_id: str) -> dict[str, Any]:
        """Send nothing to it."""
        return await self._call("POST", f"{_path(webhook_id)}/disable")

    async def undelivered(self, webhook_id: str, limit: int = 100) -> list[dict[str, Any]]:
        """What it did not take, newest first."""
        path = f"{_path(webhook_id)}/undelivered"
        return (await self._call("GET", path, params={"limit": limit}))["undelivered"]

    async def rerun(self, webhook_id: str, *ids: str) -> int:
        """Send some of that again; how many there were."""
        path = f"{_path(webhook_id)}/undelivered/rerun"
        return (await self._call("POST", path, json={"ids": ids}))["count"]


def _path(webhook_id: str) -> str:
    return f"/v1/webhooks/{quote(webhook_id, safe='')}"
