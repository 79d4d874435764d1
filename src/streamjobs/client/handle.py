"""A handle on one job: where it is, what came of it, and everything that may be done to it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec

from streamjobs.errors import StreamjobsError
from streamjobs.events import Json

if TYPE_CHECKING:
    from streamjobs.client.client import Client, WatchedEvent

ENDED = frozenset({"completed", "failed", "cancelled"})


class JobFailed(StreamjobsError):  # noqa: N818 - named after what happened, as all of ours
    """The job failed; `error` is why (`code`, `message`, `retryable`), `view` all that is known of it."""

    code: ClassVar[str] = "job_failed"

    def __init__(self, view: dict[str, Any]) -> None:
        self.view = view
        self.error: dict[str, Any] = view.get("error") or {}
        super().__init__(f"{view['id']} failed: {self.error.get('code')}: {self.error.get('message')}")


class JobCancelled(StreamjobsError):  # noqa: N818 - named after what happened, as all of ours
    """The job was cancelled; `view` is all that is known of it."""

    code: ClassVar[str] = "job_cancelled"

    def __init__(self, view: dict[str, Any]) -> None:
        self.view = view
        super().__init__(f"{view['id']} was cancelled")


class Handle:
    """One job of a client. It holds nothing but the id: make as many as you like."""

    def __init__(self, client: Client, job_id: str, kind: str = "") -> None:
        self._client = client
        self.id = job_id
        self.kind = kind

    def __repr__(self) -> str:
        return f"<Handle {self.kind or 'job'} {self.id}>"

    # --- look

    async def status(self) -> str:
        """Where the job is."""
        return (await self.view())["status"]

    async def view(self) -> dict[str, Any]:
        """All that is known of the job."""
        return await self._client.get(self.id)

    async def result(self, timeout: float | None = None) -> Json:
        """Wait for the job's end and return its output.

        Raises `JobFailed` or `JobCancelled` with the view, `TimeoutError` after `timeout` seconds,
        `GatewayError`, `GatewayUnreachable`.
        """
        answer = await self._client.wait(self.id, timeout)
        if answer["status"] == "failed":
            raise JobFailed(await self.view())
        if answer["status"] == "cancelled":
            raise JobCancelled(await self.view())
        if answer.get("output_artifact"):
            return msgspec.json.decode(await self.artifact(answer["output_artifact"]))
        return answer["output"]

    def events(self, after: str | None = None) -> AsyncGenerator[WatchedEvent]:
        """The job's events until its end, as `Client.watch`."""
        return self._client.watch(self.id, after)

    def export(self) -> AsyncGenerator[bytes]:
        """The job's whole log as it stands, as `Client.export`."""
        return self._client.export(self.id)

    async def log(self, *, level: str = "debug", limit: int = 1000) -> list[dict[str, Any]]:
        """The newest lines of the job's log for people, from a level up, oldest first."""
        return await self._client.log(self.id, level=level, limit=limit)

    async def effects(self) -> list[dict[str, Any]]:
        """Every tool call and step, and how far it is known to be."""
        return await self._client.effects(self.id)

    async def artifact(self, name: str) -> bytes:
        """The content of something that the job made."""
        return await self._client.artifact(self.id, name)

    # --- act

    async def cancel(self, reason: str = "") -> None:
        """Ask for the job's end. Asking twice is asking once."""
        await self._client.cancel(self.id, reason)

    async def pause(self, reason: str = "") -> str:
        """Park the job until it is resumed; `paused`, or `requested` while it still runs."""
        return (await self._client.pause(self.id, reason))["status"]

    async def resume(self, reason: str = "") -> str:
        """Let the paused job go on; `resumed`, or the status of one that is not paused."""
        return (await self._client.resume(self.id, reason))["status"]

    async def signal(self, name: str, payload: object = None, *, key: str = "") -> bool:
        """Send the job a value; False where the `key` was used before, and nothing was done."""
        return await self._client.signal(self.id, name, payload, key=key)

    async def approve(self, comment: str = "", *, request: str = "") -> None:
        """Say yes to the approval of that `request` key, or to the oldest that waits."""
        await self._client.approve(self.id, comment, request=request)

    async def deny(self, comment: str = "", *, request: str = "") -> None:
        """Say no to the approval of that `request` key, or to the oldest that waits."""
        await self._client.deny(self.id, comment, request=request)

    async def delete(self) -> None:
        """Forget the ended job, and everything of it, now."""
        await self._client.delete(self.id)

    async def rerun(self, *, key: str = "") -> Handle:
        """Submit the ended job again, as a new one that is linked to it."""
        return await self._client.rerun(self.id, key=key)
