"""What callers do to jobs: submit, cancel, signal, pause, resume, look up.

Rule 1: a submission is answered once it is in the log; its id is made before the call: it may be sent twice.
Rule 2: what scripts splice into JSON is encoded here; names that become parts of keys are checked here.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import msgspec
from redis.asyncio import Redis

from streamjobs import confidential
from streamjobs.config import Settings
from streamjobs.cursor import Cursor
from streamjobs.encryption import Cipher
from streamjobs.errors import (
    IdempotencyMismatch,
    Invalid,
    JobEnded,
    JobNotEnded,
    JobNotFound,
    LimitExceeded,
    Overlapping,
    ScheduleNotFound,
    StreamjobsError,
    TickTaken,
    TooDeep,
    TooManyChildren,
    TooManyWaiting,
    UnknownQueue,
)
from streamjobs.events import UNENCODABLE, JobQueued, Json, decode_event, encode_event, encode_json
from streamjobs.store import keys
from streamjobs.store.dead import Dead, DeadFilter
from streamjobs.store.log import Log, stored_cursor
from streamjobs.store.scripts import Scripts, flatten, ms, text, translated
from streamjobs.store.vault import Vault

_OWNER = re.compile(r"[A-Za-z0-9._@:+/=-]{1,128}", re.ASCII)
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
_BATCH = 500
_EVENT = 12
"""The place of `job.queued` in a row of submit."""
_HEAD = ("status", "owner", "kind", "queue", "last", "cancel", "created", "ended", "archived")


class Tick(msgspec.Struct, frozen=True):
    """What a submission is to a schedule: accepted only while the schedule waits for `due_ms`.

    `next_ms` is what it waits for afterwards. Without `due_ms` the job comes out of turn, and only needs the
    schedule to be there.
    """

    schedule_id: str
    due_ms: int = 0
    next_ms: int = 0

    def guard(self) -> str:
        """Its part of a submission's row."""
        return f"{self.schedule_id} {self.due_ms or '-'} {self.next_ms or '-'}"


class Submission(msgspec.Struct, frozen=True, kw_only=True):
    """A job to be. `input` is JSON as bytes; durations in seconds, 0 for none or the default.

    `timeout` runs from first start to end, `start_timeout` from submission to first start.
    `body` is what an Idempotency-Key is compared by; empty: the submission itself.
    """

    kind: str
    owner: str = "anonymous"
    input: bytes = b"null"
    queue: str = "default"
    priority: str = "default"
    thread_id: str = ""
    message_id: str = ""
    metadata: dict[str, Json] = {}
    delay: float = 0.0
    timeout: float | None = None
    start_timeout: float = 0.0
    max_attempts: int = 0
    concurrency_key: str = ""
    idempotency_key: str = ""
    body: bytes = b""
    job_id: str = ""
    parent: str = ""
    rerun_of: str = ""
    rerun_by: str = ""
    tick: Tick | None = None


class Receipt(NamedTuple):
    """What a submitter gets: `repeated` when this submission had come before."""

    job_id: str
    cursor: Cursor
    repeated: bool


class JobRecord(NamedTuple):
    """The head of a job, as its hash has it."""

    job_id: str
    status: str
    owner: str
    kind: str
    queue: str
    last: Cursor
    cancel_requested: bool
    created_ms: int = 0
    ended_ms: int = 0
    is_archived: bool = False

    @property
    def is_ended(self) -> bool:
        """Whether nothing more will come."""
        return self.status in {"completed", "failed", "cancelled"}


class Jobs:
    """Submits jobs and acts on them from outside."""

    def __init__(
        self, client: Redis, scripts: Scripts, settings: Settings, vault: Vault | None = None
    ) -> None:
        self._client: Any = client
        self._scripts = scripts
        self._settings = settings
        self._vault = vault
        self._log = Log(client, scripts, vault)
        self._dead = Dead(client, self._log, settings, vault)

    async def submit(self, submission: Submission) -> Receipt:
        """Submit one job.

        Raises `Invalid`, `UnknownQueue`, `IdempotencyMismatch`, `TooManyWaiting`, `StoreFull`,
        `StoreUnavailable`; of a child
        also `JobNotFound` (its owner has no such parent), `JobEnded`, `TooDeep`, `TooManyChildren`;
        with a `tick` also `ScheduleNotFound`, `TickTaken`, `Overlapping`.
        """
        return (await self.submit_many([submission]))[0]

    def check(self, submission: Submission) -> None:
        """Raise what `submit` would raise before it asks Redis."""
        self._row(submission)

    async def submit_many(self, submissions: Iterable[Submission]) -> list[Receipt]:
        """Submit many, in one call for each partition and 500 jobs; same order, errors as `submit`.

        Where one is refused, those of its call that were accepted stay: with keys, all may be sent again.
        """
        own = None if self._vault is None else await self._vault.own()
        rows = [self._row(submission, own) for submission in submissions]
        receipts: list[Receipt | None] = [None] * len(rows)
        for partition, indexes in _by_partition(rows).items():
            for start in range(0, len(indexes), _BATCH):
                part = indexes[start : start + _BATCH]
                arguments = [rows[i][1] for i in part]
                records = [] if self._vault is None else list(_encrypted(self._vault, arguments))
                answers = await self._scripts.call(
                    Scripts.SUBMIT, partition, len(part), *flatten(arguments), *records
                )
                for i, answer in zip(part, answers, strict=True):
                    receipts[i] = _receipt(answer)
        return [receipt for receipt in receipts if receipt is not None]

    def _row(self, sub: Submission, own: Cipher | None = None) -> tuple[int, list[str | bytes | int]]:
        self._check(sub)
        partition = keys.partition_of_owner(sub.owner, self._settings.partitions)
        timeout = self._settings.job_timeout if sub.timeout is None else sub.timeout
        try:
            event = encode_event(_queued(sub, ms(timeout)))
        except UNENCODABLE as error:
            raise Invalid(f"the submission cannot be stored as JSON: {error}") from error
        row: list[str | bytes | int] = [
            sub.job_id or keys.new_job_id(partition),
            sub.owner,
            sub.kind,
            sub.queue,
            sub.priority,
            ms(sub.delay),
            ms(sub.start_timeout),
            ms(timeout),
            keys.scoped_digest(sub.owner, sub.concurrency_key) if sub.concurrency_key else "",
            keys.scoped_digest(sub.owner, sub.idempotency_key) if sub.idempotency_key else "",
            _body_digest(sub.body or event, own) if sub.idempotency_key else "",
            sub.parent,
            event,
            sub.tick.guard() if sub.tick else "",
        ]
        return partition, row

    def _check(self, sub: Submission) -> None:
        if not _OWNER.fullmatch(sub.owner):
            raise Invalid("owner: 1 to 128 of letters, digits and ._@:+/=-")
        if not _NAME.fullmatch(sub.kind):
            raise Invalid("kind: 1 to 64 of letters, digits and ._-")
        if sub.queue not in self._settings.queues:
            raise UnknownQueue(f"queue: {sub.queue!r} is not one of {', '.join(self._settings.queues)}")
        if sub.priority not in {"high", "default", "low"}:
            raise Invalid("priority: high, default or low")
        for name in ("delay", "start_timeout"):
            if not 0 <= getattr(sub, name) <= 10 * 365 * 86400:
                raise Invalid(f"{name}: seconds, at least 0")
        if sub.timeout is not None and not 0 <= sub.timeout <= 10 * 365 * 86400:
            raise Invalid("timeout: seconds, at least 0")

    async def get(self, job_id: str) -> JobRecord:
        """The head of a job.

        Raises `JobNotFound`.
        """
        with translated():
            head: list[Any] = await self._client.hmget(keys.job_key(job_id), _HEAD)
        if head[0] is None:
            raise JobNotFound("no such job")
        return _record(job_id, head)

    async def cancel(self, job_id: str, *, by: str = "", reason: str = "") -> str:
        """Ask for a job's end; its children's too.

        Returns `cancelled` (nobody ran it, or it was cancelled before) or `requested` (its worker is told).
        Raises `JobNotFound`, `JobEnded` where it completed or failed.
        """
        answer = await self._act(Scripts.CANCEL, job_id, _fields(by=by, reason=reason))
        if answer[0] == "already" and answer[1] != "cancelled":
            raise JobEnded(f"the job has already {answer[1]}", state=answer[1])
        return "requested" if answer[0] == "requested" else "cancelled"

    async def signal(
        self, job_id: str, name: str, payload: Json = None, *, key: str = "", by: str = ""
    ) -> bool:
        """Send a live job a value; False where `key` was used before, and nothing was done.

        Raises `JobNotFound`, `JobEnded`, `LimitExceeded`, `Shredded`, `Invalid` for what is not JSON.
        """
        key = key or secrets.token_hex(8)
        fields: dict[str, Json] = {"name": name, "payload": payload, "key": key} | ({"by": by} if by else {})
        given = _fields(**fields)
        if self._vault is not None:
            cipher = await self._vault.ensure(job_id)
            given = given if cipher is None else confidential.encrypt_fields(cipher, "signal.received", given)
        answer = await self._act(Scripts.SIGNAL, job_id, key, given)
        if answer[0] == "already":
            raise JobEnded(f"the job has already {answer[1]}", state=answer[1])
        if answer[0] == "limit":
            raise LimitExceeded("the job's log is full")
        return answer[0] == "ok"

    async def pause(self, job_id: str, *, by: str = "", reason: str = "", key: str = "") -> str:
        """Park a job until it is resumed; a running one at its next recorded point.

        Returns `paused` or `requested`. Raises `JobNotFound`, `JobEnded`, `LimitExceeded`.
        """
        return await self._toggle(Scripts.PAUSE, job_id, by, reason, key)

    async def resume(self, job_id: str, *, by: str = "", reason: str = "", key: str = "") -> str:
        """Let a paused job go on; returns `resumed`, or the status of one that was not paused.

        Raises `JobNotFound`, `JobEnded`.
        """
        return await self._toggle(Scripts.RESUME, job_id, by, reason, key)

    async def rerun(self, job_id: str, *, key: str = "", by: str = "") -> Receipt:
        """Submit an ended job once more, as a new job; it is nobody's child and starts without delay.

        The same `key` is the same new job; an empty one is random.
        Raises `JobNotFound`, `JobNotEnded`, and what `submit` raises.
        """
        queued = await self._ended(job_id)
        new_id = keys.rerun_job_id(job_id, key or secrets.token_hex(16))
        receipt = await self.submit(_again(job_id, queued, new_id, by))
        await self._scripts.call(Scripts.RERUN, keys.partition_of_job(job_id), job_id, new_id)
        return receipt

    async def rerun_many(
        self, where: DeadFilter, *, key: str, by: str = "", limit: int = 1000
    ) -> list[tuple[str, str]]:
        """Run failed jobs again, newest first; returns the id of each and of the new job.

        With the same `key` it may be called again after an error: what it has run already, it leaves out.
        Raises `Invalid` without a key, and what `rerun` raises but for jobs that are gone.
        """
        if not key:
            raise Invalid("key: at least one character")
        done: list[tuple[str, str]] = []
        before = ""
        while len(done) < limit:
            jobs, before = await self._dead.page(where, limit=min(limit - len(done), 500), before=before)
            for job in jobs:
                with suppress(JobNotFound):
                    done += await self._rerun_once(job.id, key, by)
            if not before:
                break
        return done

    async def _rerun_once(self, job_id: str, key: str, by: str) -> list[tuple[str, str]]:
        """Nothing where the job is itself what this key made."""
        queued = await self._ended(job_id)
        if queued.rerun_of and keys.rerun_job_id(queued.rerun_of, key) == job_id:
            return []
        return [(job_id, (await self.rerun(job_id, key=key, by=by)).job_id)]

    async def _ended(self, job_id: str) -> JobQueued:
        """How an ended job was submitted."""
        page = await self._log.page(job_id, limit=1)
        if page.status not in {"completed", "failed", "cancelled"}:
            raise JobNotEnded(f"the job is {page.status}")
        event = decode_event(page.entries[0].type, page.entries[0].data)
        if not isinstance(event, JobQueued):
            raise JobNotFound("the job's log has no beginning")
        return event

    async def _toggle(self, script: Any, job_id: str, by: str, reason: str, key: str) -> str:
        answer = await self._act(script, job_id, key or secrets.token_hex(8), _fields(by=by, reason=reason))
        if answer[0] == "limit":
            raise LimitExceeded("the job's log is full")
        if answer[0] != "already":
            return answer[0]
        if answer[1] in {"completed", "failed", "cancelled"}:
            raise JobEnded(f"the job has already {answer[1]}", state=answer[1])
        return answer[1]

    async def _act(self, script: Any, job_id: str, *arguments: str | bytes) -> list[str]:
        answer = await self._scripts.call(script, keys.partition_of_job(job_id), job_id, *arguments)
        words = [text(word) if isinstance(word, bytes) else str(word) for word in answer]
        if words[0] == "gone":
            raise JobNotFound("no such job")
        return words


def _record(job_id: str, head: list[Any]) -> JobRecord:
    status, owner, kind, queue, last = (text(value) for value in head[:5])
    cancelled, created = bool(head[5]), int(head[6] or 0)
    ended, is_archived = int(head[7] or 0), bool(head[8])
    return JobRecord(
        job_id, status, owner, kind, queue, stored_cursor(last), cancelled, created, ended, is_archived
    )


def _queued(sub: Submission, timeout_ms: int) -> JobQueued:
    return JobQueued(
        kind=sub.kind,
        owner=sub.owner,
        queue=sub.queue,
        priority=sub.priority,
        thread_id=sub.thread_id,
        message_id=sub.message_id,
        metadata=sub.metadata,
        delay_ms=ms(sub.delay),
        timeout_ms=timeout_ms,
        start_timeout_ms=ms(sub.start_timeout),
        max_attempts=sub.max_attempts,
        concurrency_key=sub.concurrency_key,
        parent=sub.parent,
        rerun_of=sub.rerun_of,
        rerun_by=sub.rerun_by,
        schedule=sub.tick.schedule_id if sub.tick else "",
        tick_ms=sub.tick.due_ms if sub.tick else 0,
        input=msgspec.Raw(_one_line_json(sub.input)),
    )


def _again(job_id: str, queued: JobQueued, new_id: str, by: str) -> Submission:
    return Submission(
        kind=queued.kind,
        owner=queued.owner,
        input=bytes(queued.input),
        queue=queued.queue,
        priority=queued.priority,
        thread_id=queued.thread_id,
        message_id=queued.message_id,
        metadata=queued.metadata,
        timeout=queued.timeout_ms / 1000,
        start_timeout=queued.start_timeout_ms / 1000,
        max_attempts=queued.max_attempts,
        concurrency_key=queued.concurrency_key,
        job_id=new_id,
        rerun_of=job_id,
        rerun_by=by,
    )


def _body_digest(body: bytes, own: Cipher | None) -> str:
    """What a repeated submission is compared by."""
    return hashlib.blake2b(body, digest_size=16).hexdigest() if own is None else own.digest(body)


def _encrypted(vault: Vault, rows: list[list[str | bytes | int]]) -> Iterator[str]:
    """Encrypt what is submitted, in its row, under new data keys; the record of each."""
    for row in rows:
        made = vault.new(str(row[0]))
        if made is not None:
            event = row[_EVENT]
            assert isinstance(event, bytes)
            row[_EVENT] = confidential.encrypt(made[1], "job.queued", event)
        yield made[0] if made is not None else ""


def _one_line_json(text: bytes) -> bytes:
    """JSON without line ends, which are legal between its tokens and would end an event's line."""
    if text == b"null":
        return text
    text.decode()
    msgspec.json.decode(text)  # whole: what is only skipped may hold numbers that no fold can read
    return text.replace(b"\n", b" ").replace(b"\r", b" ")


def _by_partition(rows: list[tuple[int, list[str | bytes | int]]]) -> dict[int, list[int]]:
    indexes: dict[int, list[int]] = {}
    for i, (partition, _) in enumerate(rows):
        indexes.setdefault(partition, []).append(i)
    return indexes


def _receipt(answer: list[Any]) -> Receipt:
    verdict, *rest = (text(word) if isinstance(word, bytes) else str(word) for word in answer)
    if verdict in {"ok", "same"}:
        return Receipt(rest[0], stored_cursor(rest[1]), verdict == "same")
    if verdict == "mismatch":
        raise IdempotencyMismatch("this Idempotency-Key was used with another body")
    if verdict == "waiting":
        raise TooManyWaiting(f"{rest[0]} jobs of this owner wait already")
    if verdict == "depth":
        raise TooDeep(f"children may be {rest[0]} deep")
    if verdict == "children":
        raise TooManyChildren(f"the parent has {rest[0]} children, more it may not have")
    if verdict == "parent" and rest[0] in {"gone", "foreign"}:
        raise JobNotFound("no such parent")
    if verdict == "parent":
        raise JobEnded(f"the parent takes no more children: {rest[0]}")
    if verdict == "tick":
        raise _refused_tick(rest[0])
    raise StreamjobsError(f"submit: {rest[0]}")


def _refused_tick(why: str) -> StreamjobsError:
    if why == "gone":
        return ScheduleNotFound("no such schedule")
    if why == "overlap":
        return Overlapping("the job of an earlier tick is live, so this one gives none")
    return TickTaken("the schedule does not wait for this tick")


def _fields(**values: Json) -> bytes:
    """JSON fields without the braces, for a script to put behind its `ts`."""
    try:
        return encode_json(values)[1:-1]
    except UNENCODABLE as error:
        raise Invalid(f"cannot be stored as JSON: {error}") from error
