"""Tickets and leases: which jobs need a worker, and who may advance them.

Rule 1: a job that has not ended is in exactly one place.
Rule 2: holding a ticket grants nothing; only the lease's epoch on append does.
Rule 3: every clock here is Redis's.

Rejected: the pending-entries list as the lease. Its idle time says when an entry was
delivered, not that its worker is alive, and a stale worker's renewal takes it back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import msgspec
import structlog
from redis.asyncio import Redis

from streamjobs import confidential
from streamjobs.config import Settings
from streamjobs.errors import DamagedCiphertext, EncryptionKeyMissing, Invalid, JobNotFound, Shredded
from streamjobs.store import keys
from streamjobs.store.scripts import Scripts, flatten, text, translated
from streamjobs.store.vault import Vault

log = structlog.get_logger(__name__)

Outcome = Literal["keep", "completed", "failed", "cancelled", "retry", "sleep", "wait", "yield"]


class Lease(NamedTuple):
    """A worker's right to advance a job, proved by the epoch.

    `ms_left` until the job's own timeout, -1 for none; `queued` is its first event where it came along.
    """

    job_id: str
    epoch: int
    seq: int
    attempt: int
    inbox: int
    crashes: int
    ms_left: int
    kind: str
    owner: str
    queue: str
    queued: bytes


class Taken(NamedTuple):
    """What a take brought; `ends` is where each stream ends, for `wait_for_tickets`."""

    now_ms: int
    leases: list[Lease]
    ends: dict[str, str]
    failures: list[str]


class Batch(msgspec.Struct, frozen=True):
    """Events of one job under one lease, and what becomes of it; frozen once sent.

    `timers` is JSON (key -> delay in ms, below 0 to take that timer back) or empty; `seen` the inbox count
    its sender has read. `stored` are its events as they are sent, once and for all, where they are encrypted.
    """

    job_id: str
    epoch: int
    number: int
    events: Sequence[tuple[str, bytes]]
    outcome: Outcome = "keep"
    seen: int = 0
    delay_ms: int = 0
    timers: bytes = b""
    stored: list[tuple[str, bytes]] = []

    def row(self) -> list[str | bytes | int]:
        """Its part of the append script's arguments."""
        head: list[str | bytes | int] = [
            self.job_id,
            self.epoch,
            self.number,
            self.seen,
            self.outcome,
            self.delay_ms,
            self.timers,
            len(self.events),
        ]
        for kind, data in self.stored or self.events:
            head.append(kind)
            head.append(data)
        return head


class Answer(NamedTuple):
    """What became of a batch.

    verdict: ok, dup (it was there already), fenced, gap, conflict, inbox (something came in that its
    sender has not read), limit (`detail` says which), bad, gone, error. `asked`: cancel, pause or nothing.
    """

    verdict: str
    seq: int = 0
    inbox: int = 0
    asked: str = ""
    detail: str = ""

    @property
    def is_written(self) -> bool:
        """Whether the batch is in the log."""
        return self.verdict in {"ok", "dup"}


class Renewal(NamedTuple):
    """What became of a lease: `held` or not, what came in, what is asked."""

    held: bool
    inbox: int = 0
    asked: str = ""


class Sweep(NamedTuple):
    """What `wake` did. `next_due_ms` is Redis time, -1 for never; `more` is due already."""

    now_ms: int
    next_due_ms: int
    more: bool
    changes: list[tuple[str, str]]


class Work:
    """Takes, advances, renews and wakes jobs."""

    def __init__(
        self, client: Redis, scripts: Scripts, settings: Settings, vault: Vault | None = None
    ) -> None:
        self._client: Any = client
        self._scripts = scripts
        self._settings = settings
        self._vault = vault

    async def take(
        self, partition: int, worker: str, number: int, wanted: int, queues: Sequence[str]
    ) -> Taken:
        """Lease up to `wanted` jobs. `number` grows by one for each call that was answered."""
        weights = ",".join(str(weight) for weight in self._settings.priority_weights)
        reply = await self._scripts.call(Scripts.TAKE, partition, worker, number, wanted, weights, *queues)
        now_ms, jobs, ends, failures = reply
        pairs = iter([text(end) for end in ends])
        return Taken(
            now_ms,
            [self._opened(job) for job in jobs],
            dict(zip(pairs, pairs, strict=True)),
            [text(f) for f in failures],
        )

    async def append(self, partition: int, batches: Sequence[Batch], *, always: bool = False) -> list[Answer]:
        """Write many batches in one call; one answer each, in order.

        `always` writes even when Redis is full: for batches that end, park, or record a tool's outcome.
        Raises `StoreFull`, `StoreUnavailable`; the same batches may then be sent again.
        """
        script = Scripts.APPEND_ALWAYS if always else Scripts.APPEND
        refused = {} if self._vault is None else await self._encrypt(self._vault, batches)
        sent = [batch for batch in batches if id(batch) not in refused] if refused else batches
        answers: list[Any] = []
        if sent:
            answers = await self._scripts.call(script, partition, len(sent), *flatten(b.row() for b in sent))
        if not refused:
            return [_answer(answer) for answer in answers]
        written = map(_answer, answers)
        return [refused[id(batch)] if id(batch) in refused else next(written) for batch in batches]

    async def _encrypt(self, vault: Vault, batches: Sequence[Batch]) -> dict[int, Answer]:
        """Answers for batches that cannot be encrypted, and so must not be sent."""
        refused: dict[int, Answer] = {}
        for batch in batches:
            try:
                await vault.encrypt(batch)
            except (JobNotFound, EncryptionKeyMissing, DamagedCiphertext, Invalid) as error:
                verdict = "error" if error.code != JobNotFound.code else "gone"
                refused[id(batch)] = Answer(verdict, detail=str(error))
        return refused

    def _opened(self, row: list[Any]) -> Lease:
        """A lease with its first event as that was written; without it where it cannot be read."""
        lease = _lease(row)
        if self._vault is None:
            return lease
        try:
            cipher = self._vault.cipher(lease.job_id, row[11])
            if cipher is None or not lease.queued:
                return lease
            return lease._replace(queued=confidential.decrypt(cipher, "job.queued", lease.queued))
        except (Shredded, EncryptionKeyMissing, DamagedCiphertext) as error:
            log.error("job.unreadable", job_id=lease.job_id, error=str(error))
            return lease._replace(queued=b"")  # who runs it reads the log, and meets the same

    async def renew(self, partition: int, leases: Iterable[tuple[str, int]]) -> tuple[int, list[Renewal]]:
        """Extend leases given as (job id, epoch); returns Redis's clock and one renewal each, in order."""
        pairs = list(leases)
        now_ms, rows = await self._scripts.call(Scripts.RENEW, partition, len(pairs), *flatten(pairs))
        return now_ms, [parse_renewal(row) for row in rows]

    async def wake(self, partition: int, limit: int = 200) -> Sweep:
        """Do what is due: expired leases, timers, held jobs; at most `limit` of each."""
        now_ms, next_due, more, changes = await self._scripts.call(Scripts.WAKE, partition, limit)
        return Sweep(now_ms, next_due, bool(more), [(text(job), text(what)) for job, what in changes])

    async def inspect(self, job_id: str) -> list[Any]:
        """One job at one instant, as inspect.lua answers; empty where it is gone."""
        return await self._scripts.call(Scripts.INSPECT, keys.partition_of_job(job_id), job_id)

    async def wait_for_tickets(self, client: Any, ends: dict[str, str], block: float) -> bool:
        """Block on `client` until a stream grows past its end; False after `block` seconds."""
        with translated():
            reply = await client.xread(ends, count=1, block=max(1, round(block * 1000)))
        return bool(reply)

    async def backlog(self, partition: int) -> dict[str, int]:
        """The exact counts: `waiting:<queue>`, `held:<queue>`, `running:<queue>`."""
        with translated():
            counts: dict[bytes, bytes] = await self._client.hgetall(f"{keys.prefix(partition)}counts")
        return {text(field): int(n) for field, n in counts.items() if field != b"order"}


def _lease(row: list[Any]) -> Lease:
    return Lease(
        text(row[0]),
        row[1],
        row[2],
        row[3],
        row[4],
        row[5],
        row[6],
        text(row[7]),
        text(row[8]),
        text(row[9]),
        row[10],
    )


def _answer(row: list[Any]) -> Answer:
    verdict = text(row[0])
    if verdict in {"ok", "dup"}:
        return Answer(verdict, row[1], row[2], text(row[3]))
    if verdict == "inbox":
        return Answer(verdict, inbox=row[1], asked=text(row[2]))
    detail = row[1] if len(row) > 1 else ""
    return Answer(verdict, detail=text(detail) if isinstance(detail, bytes) else str(detail))


def parse_renewal(row: list[Any]) -> Renewal:
    """One row of the renew script's answer."""
    if text(row[0]) != "ok":
        return Renewal(held=False)
    return Renewal(True, row[1], text(row[2]))
