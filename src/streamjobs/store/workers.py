"""Who works: each worker's registration, kept alive by its heartbeat."""

from __future__ import annotations

from typing import Any

import msgspec
from redis.asyncio import Redis

from streamjobs.config import Settings
from streamjobs.store import keys
from streamjobs.store.scripts import ms, text, translated


class WorkerInfo(msgspec.Struct, frozen=True):
    """A worker as it last described itself; `heartbeat_ms` is Redis's clock."""

    id: str
    host: str
    pid: int
    queues: list[str]
    concurrency: int
    running: int
    processed: int
    started_ms: int
    heartbeat_ms: int
    draining: bool = False


class Workers:
    """The registry, in partition 0."""

    def __init__(self, client: Redis, settings: Settings) -> None:
        self._client: Any = client
        self._ttl = ms(settings.worker_ttl)
        self._prefix = keys.prefix(0)

    async def beat(self, info: WorkerInfo) -> None:
        """Register, or say again that this worker is alive."""
        with translated():
            async with self._client.pipeline(transaction=False) as pipe:
                pipe.set(f"{self._prefix}worker:{info.id}", msgspec.json.encode(info), px=self._ttl)
                pipe.zadd(f"{self._prefix}workers", {info.id: info.heartbeat_ms})
                pipe.zremrangebyscore(f"{self._prefix}workers", "-inf", info.heartbeat_ms - self._ttl)
                await pipe.execute()

    async def leave(self, worker_id: str) -> None:
        """Remove a worker that ends in order."""
        with translated():
            async with self._client.pipeline(transaction=False) as pipe:
                pipe.delete(f"{self._prefix}worker:{worker_id}")
                pipe.zrem(f"{self._prefix}workers", worker_id)
                await pipe.execute()

    async def all(self) -> list[WorkerInfo]:
        """Every worker whose heartbeat is recent."""
        with translated():
            ids: list[Any] = await self._client.zrange(f"{self._prefix}workers", 0, -1)
            if not ids:
                return []
            found: list[Any] = await self._client.mget([f"{self._prefix}worker:{text(one)}" for one in ids])
        return [msgspec.json.decode(one, type=WorkerInfo) for one in found if one is not None]
