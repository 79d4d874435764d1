"""What jobs make: named content that is too large for an event, kept as long as the job.

Rule 1: only the holder of the lease stores any; what it means stands in the log (`artifact.created`).
Rule 2: the same name replaces: a step that runs again after a crash leaves no second copy.
"""

from __future__ import annotations

import re
from typing import Any

from redis.asyncio import Redis

from streamjobs.config import Settings
from streamjobs.encryption import MAGIC, OVERHEAD
from streamjobs.errors import ArtifactNotFound, Fenced, Invalid, JobNotFound, LimitExceeded, Shredded
from streamjobs.store import keys
from streamjobs.store.scripts import Scripts, text, translated
from streamjobs.store.vault import Vault

_NAME = re.compile(r"[A-Za-z0-9._:@#=-]{1,200}", re.ASCII)
_SEALED = "\0"
"""What a media type begins with in Redis where the content is encrypted: none that is given can."""
_MEDIA_TYPE = re.compile(r"[ -~]{1,200}", re.ASCII)


class Artifacts:
    """Stores and reads the artifacts of jobs."""

    def __init__(
        self, client: Redis, scripts: Scripts, settings: Settings, vault: Vault | None = None
    ) -> None:
        self._vault = vault
        self._client: Any = client
        self._scripts = scripts
        self._max_one = settings.max_artifact
        self._max_all = settings.max_artifacts

    async def put(self, job_id: str, epoch: int, name: str, media_type: str, data: bytes) -> None:
        """Store an artifact under a lease; one of the same name is replaced.

        Raises `Fenced`, `LimitExceeded`, `Invalid` for a name or media type that does not fit, `JobNotFound`,
        `StoreFull`, `StoreUnavailable`.
        """
        if not _NAME.fullmatch(name):
            raise Invalid("artifact: its name has 1 to 200 of letters, digits and ._:@#=-")
        if not _MEDIA_TYPE.fullmatch(media_type):
            raise Invalid("artifact: its media type has 1 to 200 printable characters")
        if len(data) > self._max_one:
            raise _over_limit("one", self._max_one)
        partition = keys.partition_of_job(job_id)
        cipher = None if self._vault is None else await self._vault.ensure(job_id)
        if cipher is not None:
            data, media_type = cipher.seal_blob(data, _place(name)), _SEALED + media_type
        limits = (self._max_one + (len(MAGIC) + OVERHEAD if cipher is not None else 0), self._max_all)
        answer = await self._scripts.call(
            Scripts.ARTIFACT, partition, job_id, epoch, name, media_type, data, *limits
        )
        verdict = text(answer[0])
        if verdict == "gone":
            raise JobNotFound("no such job")
        if verdict == "fenced":
            raise Fenced("the lease is lost")
        if verdict == "limit":
            raise _over_limit("all", self._max_all)

    async def get(self, job_id: str, name: str) -> tuple[str, bytes]:
        """An artifact's media type and content.

        Raises `JobNotFound`; `ArtifactNotFound` where the job has none of that name.
        """
        key = _key(job_id)
        if _NAME.fullmatch(name):
            with translated():
                content, media_type = await self._client.hmget(key, [name, f"{name}/"])
            if content is not None:
                return await self._opened(job_id, name, text(media_type), content)
        await self._require_job(job_id)
        raise ArtifactNotFound("the job has no artifact of that name")

    async def names(self, job_id: str) -> dict[str, int]:
        """The names of a job's artifacts and their sizes in bytes.

        Raises `JobNotFound`.
        """
        key = _key(job_id)
        with translated():
            fields: list[Any] = await self._client.hkeys(key)
            names = sorted(name for name in map(text, fields) if not name.endswith("/"))
            if not names:
                await self._require_job(job_id)
                return {}
            async with self._client.pipeline(transaction=False) as pipe:
                for name in names:
                    pipe.hstrlen(key, name)
                pipe.hmget(key, [f"{name}/" for name in names])
                *sizes, media_types = await pipe.execute()
        return {
            name: size - (len(MAGIC) + OVERHEAD if text(media_type or b"").startswith(_SEALED) else 0)
            for name, size, media_type in zip(names, sizes, media_types, strict=True)
        }

    async def _opened(self, job_id: str, name: str, media_type: str, content: bytes) -> tuple[str, bytes]:
        """An artifact as it was stored. What is encrypted says so beside its media type."""
        if not media_type.startswith(_SEALED):
            return media_type, content
        cipher = None if self._vault is None else await self._vault.current(job_id)
        if cipher is None:
            raise Shredded("the job's data key is gone")
        return media_type.removeprefix(_SEALED), cipher.open_blob(content, _place(name))

    async def _require_job(self, job_id: str) -> None:
        with translated():
            if not await self._client.exists(keys.job_key(job_id)):
                raise JobNotFound("no such job")


def _place(name: str) -> bytes:
    return b"artifact\0" + name.encode()


def _key(job_id: str) -> str:
    return f"{keys.job_key(job_id)}:artifacts"


def _over_limit(which: str, most: int) -> LimitExceeded:
    what = "one artifact" if which == "one" else "all artifacts of a job"
    return LimitExceeded(f"{what} may have {most} bytes")
