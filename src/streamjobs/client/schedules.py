"""The client's calls about schedules: `client.schedules.create(…)`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import quote

from streamjobs.events import Json

Call = Callable[..., Awaitable[dict[str, Any]]]


class SchedulesClient:
    """Acts on the owner's schedules. Every call raises `GatewayError`, `GatewayUnreachable`."""

    def __init__(self, call: Call) -> None:
        self._call = call

    async def create(
        self,
        name: str,
        kind: str,
        input: Json = None,  # noqa: A002 - what it is called everywhere
        *,
        key: str = "",
        **fields: Json,
    ) -> dict[str, Any]:
        """Make a schedule; `fields` are those of `POST /v1/schedules`: `cron` and `timezone`, or `every`, …

        The same `key` makes the same one: it may be sent again.
        """
        body = {"name": name, "kind": kind, "input": input, **fields}
        return await self._call("POST", "/v1/schedules", json=body, headers=_key(key))

    async def list(self) -> list[dict[str, Any]]:
        """All of them, oldest first."""
        return (await self._call("GET", "/v1/schedules"))["schedules"]

    async def get(self, schedule_id: str) -> dict[str, Any]:
        """One of them; `coming_ms` has its next ticks."""
        return await self._call("GET", _path(schedule_id))

    async def pause(self, schedule_id: str) -> dict[str, Any]:
        """Let its ticks pass without jobs."""
        return await self._call("POST", f"{_path(schedule_id)}/pause")

    async def resume(self, schedule_id: str) -> dict[str, Any]:
        """Wait for the next tick again."""
        return await self._call("POST", f"{_path(schedule_id)}/resume")

    async def trigger(self, schedule_id: str, *, key: str = "") -> dict[str, Any]:
        """Submit its job now; returns what `submit` does."""
        return await self._call("POST", f"{_path(schedule_id)}/trigger", headers=_key(key))

    async def delete(self, schedule_id: str) -> None:
        """Forget it; jobs that it made live on."""
        await self._call("DELETE", _path(schedule_id))


def _key(key: str) -> dict[str, str]:
    return {"idempotency-key": key} if key else {}


def _path(schedule_id: str) -> str:
    return f"/v1/schedules/{quote(schedule_id, safe='')}"
