"""How long ended jobs are kept: by policy, until they are deleted, or until memory is short.

Rule 1: everything of a job goes at the same instant; only ended jobs go.
Rule 2: when memory is short, the jobs go first that would go first anyway; one that ended just now stays.
"""

from __future__ import annotations

from typing import Any, Literal

from redis.asyncio import Redis

from streamjobs.errors import JobNotEnded, JobNotFound
from streamjobs.store import keys
from streamjobs.store.scripts import Scripts, ms, text, translated
from streamjobs.store.vault import Vault

_FRESH = 60.0
"""Seconds after its end for which a job is not taken back."""


class Retention:
    """Sets and brings forward the end of what is kept."""

    def __init__(self, client: Redis, scripts: Scripts, *, plain: bool, vault: Vault | None = None) -> None:
        self._client: Any = client
        self._vault = vault
        self._scripts = scripts
        self._plain = plain

    async def keep(
        self, job_id: str, seconds: float, *, archive: Literal["", "archived", "held"] = ""
    ) -> None:
        """Keep an ended job so long after its end.

        `archived`: its file is in the archive. `held`: its file is yet to be, so short memory does not take
        the job. Raises `JobNotFound`, `JobNotEnded`.
        """
        await self._act("keep", job_id, ms(seconds), archive)

    async def delete(self, job_id: str) -> None:
        """Forget an ended job now, its data key too. Raises `JobNotFound`, `JobNotEnded`."""
        await self._act("delete", job_id)
        if self._vault is not None:
            self._vault.forget(job_id)

    async def fullness(self) -> float:
        """How much of Redis's memory limit is used, as a share; 0 without a limit."""
        if self._plain:
            return 0.0
        with translated():
            info: dict[str, Any] = await self._client.info("memory")
        limit = int(info.get("maxmemory", 0))
        return int(info["used_memory"]) / limit if limit else 0.0

    async def relieve(self, partition: int, count: int, *, fresh: float = _FRESH) -> int:
        """Forget up to `count` ended jobs before their time; returns how many went."""
        return await self._scripts.call(Scripts.RETAIN, partition, "relieve", count, ms(fresh))

    async def _act(self, act: str, job_id: str, *arguments: int | str) -> None:
        partition = keys.partition_of_job(job_id)
        verdict, *rest = await self._scripts.call(Scripts.RETAIN, partition, act, job_id, *arguments)
        if text(verdict) == "gone":
            raise JobNotFound("no such job")
        if text(verdict) == "live":
            raise JobNotEnded(f"the job is {text(rest[0])}")
