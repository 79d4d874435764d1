"""Schedules: made, listed, paused, resumed, triggered, deleted. `ticks.py` makes their jobs.

Rule 1: a schedule is in its owner's partition, as its jobs are: one script can do both.
Rule 2: it waits for exactly one tick, its score in `schedules`, or is paused and waits for none.
Rule 3: what code declares has an id made from its name: declaring it again, everywhere, is declaring it once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, NamedTuple

import msgspec
import structlog
from redis.asyncio import Redis

from streamjobs import confidential
from streamjobs.confidential import SCHEDULE
from streamjobs.config import Settings
from streamjobs.errors import (
    IdempotencyMismatch,
    Invalid,
    ScheduleNotFound,
    StreamjobsError,
    TooManySchedules,
    UnreadableSchedule,
)
from streamjobs.events import UNENCODABLE, encode_json
from streamjobs.schedule import Schedule
from streamjobs.store import keys
from streamjobs.store.jobs import Jobs, Receipt, Submission, Tick
from streamjobs.store.scripts import Script, Scripts, text, translated
from streamjobs.store.vault import Vault

log = structlog.get_logger(__name__)

MAX_SCHEDULES = 1000
"""How many schedules an owner may have."""

_DECODER = msgspec.json.Decoder(Schedule)


class ScheduleRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A schedule as it stands.

    `next_ms` is the tick it waits for, None while it is paused. `app` and `declared_ms` say whose code
    declared it, and when a worker last did; both are empty for one that was made by a call. `last_job` may
    have come out of turn. `error` says why the last tick gave no job, where the definition was at fault.
    """

    id: str
    schedule: Schedule
    digest: str
    created_ms: int
    next_ms: int | None = None
    app: str = ""
    declared_ms: int | None = None
    last_tick_ms: int | None = None
    last_job: str = ""
    runs: int = 0
    skipped: int = 0
    error: str = ""

    @property
    def is_paused(self) -> bool:
        """Whether its ticks give no jobs until it is resumed."""
        return self.next_ms is None

    def coming(self, count: int) -> list[int]:
        """The next ticks, in ms; none while it is paused."""
        ticks: list[int] = [] if self.next_ms is None else [self.next_ms]
        while ticks and len(ticks) < count:
            ticks.append(self.schedule.timing.next_after(ticks[-1]))
        return ticks


class Waiting(NamedTuple):
    """A schedule and the tick it waits for."""

    schedule_id: str
    due_ms: int


class Schedules:
    """Acts on the schedules of one store."""

    def __init__(
        self,
        client: Redis,
        scripts: Scripts,
        settings: Settings,
        jobs: Jobs,
        clock: Callable[[], Awaitable[int]],
        vault: Vault | None = None,
    ) -> None:
        self._vault = vault
        self._client: Any = client
        self._scripts = scripts
        self._settings = settings
        self._jobs = jobs
        self._clock = clock

    # --- make

    async def create(self, schedule: Schedule, *, key: str = "") -> tuple[ScheduleRecord, bool]:
        """Make a schedule; returns it, and whether it was there: the same `key` and owner is the same one.

        Raises `Invalid`, `UnknownQueue`, `TooManySchedules`, `StoreFull`, `StoreUnavailable`, and
        `IdempotencyMismatch` where the key came before with another definition.
        """
        names = ("key", schedule.owner, key) if key else ()
        schedule_id = keys.new_schedule_id(self._partition_of(schedule), *names)
        verdict = await self._define("new", schedule_id, schedule)
        if verdict == "mismatch":
            raise IdempotencyMismatch("this Idempotency-Key was used with another schedule")
        # without a key "same" is this very call, which redis-py sent twice
        return await self.get(schedule_id), bool(key) and verdict == "same"

    async def declare(self, app: str, schedules: Iterable[Schedule]) -> None:
        """Make an App's schedules what its code says, wherever they differ.

        One that is the same keeps its next tick; one that is paused stays so; what the code no longer
        declares stays as it is: an older release, or another program of the same name, may be running beside
        this one. Raises as `create`.
        """
        for schedule in schedules:
            schedule_id = keys.new_schedule_id(
                self._partition_of(schedule), "app", schedule.owner, app, schedule.name
            )
            await self._define("declare", schedule_id, schedule, app)

    async def _define(self, what: str, schedule_id: str, schedule: Schedule, app: str = "") -> str:
        self._jobs.check(self.submission(schedule))
        try:
            definition = encode_json(schedule)
        except UNENCODABLE as error:
            raise Invalid(f"the schedule cannot be stored as JSON: {error}") from error
        definition, digest = await self._encrypted(schedule_id, definition)
        answer = await self._call(
            Scripts.SCHEDULE,
            what,
            schedule_id,
            schedule.owner,
            definition,
            digest,
            schedule.overlap,
            app,
            schedule.timing.next_after(await self._clock()),
            MAX_SCHEDULES,
        )
        if answer == "limit":
            raise TooManySchedules(f"owner: has {MAX_SCHEDULES} schedules, no more are taken")
        return answer

    async def _encrypted(self, schedule_id: str, definition: bytes) -> tuple[bytes, str]:
        """A definition as it is stored, and what it is compared by."""
        own = None if self._vault is None else await self._vault.own()
        if own is None:
            return definition, hashlib.blake2b(definition, digest_size=16).hexdigest()
        digest = own.digest(definition)
        return confidential.encrypt(own.of(schedule_id), SCHEDULE, definition), digest

    async def _opened(self, schedule_id: str, fields: dict[str, str]) -> dict[str, str]:
        """A schedule's fields with its definition as it was given."""
        own = None if self._vault is None else await self._vault.own()
        if own is None or "definition" not in fields:
            return fields
        definition = confidential.decrypt(own.of(schedule_id), SCHEDULE, fields["definition"].encode())
        return fields | {"definition": definition.decode()}

    # --- look

    async def get(self, schedule_id: str) -> ScheduleRecord:
        """One schedule. Raises `ScheduleNotFound`, `UnreadableSchedule`."""
        partition = keys.partition_of_schedule(schedule_id)
        with translated():
            async with self._client.pipeline(transaction=True) as pipe:
                pipe.hgetall(keys.schedule_key(schedule_id))
                pipe.zscore(_waiting(partition), schedule_id)
                fields, due = await pipe.execute()
        if not fields:
            raise ScheduleNotFound("no such schedule")
        known = {text(name): text(value) for name, value in fields.items()}
        return _record(schedule_id, await self._opened(schedule_id, known), due)

    async def owner_of(self, schedule_id: str) -> str:
        """Whose schedule it is. Raises `ScheduleNotFound`."""
        with translated():
            owner = await self._client.hget(keys.schedule_key(schedule_id), "owner")
        if owner is None:
            raise ScheduleNotFound("no such schedule")
        return text(owner)

    async def of_owner(self, owner: str) -> list[ScheduleRecord]:
        """All of an owner's schedules that this release can read, oldest first."""
        partition = keys.partition_of_owner(owner, self._settings.partitions)
        with translated():
            ids = await self._client.zrange(f"{keys.prefix(partition)}owner:{owner}:schedules", 0, -1)
        records: list[ScheduleRecord] = []
        for schedule_id in map(text, ids):
            try:
                records.append(await self.get(schedule_id))
            except ScheduleNotFound:  # deleted meanwhile
                continue
            except UnreadableSchedule as error:
                log.error("schedule.unreadable", schedule=schedule_id, error=str(error))
        return records

    # --- act

    async def pause(self, schedule_id: str) -> None:
        """Let ticks pass without a job until it is resumed. Raises `ScheduleNotFound`."""
        await self._act(schedule_id, "pause")

    async def resume(self, schedule_id: str) -> None:
        """Wait for the next tick again; those that passed meanwhile were not missed.

        Raises `ScheduleNotFound`.
        """
        answer = "changed"
        while answer == "changed":
            record = await self.get(schedule_id)
            after = record.schedule.timing.next_after(await self._clock())
            answer = await self._act(schedule_id, "resume", record.digest, after)

    async def trigger(self, schedule_id: str, *, key: str = "") -> Receipt:
        """Submit its job now, also while it is paused; the same `key` gives the same job.

        Raises `ScheduleNotFound`, `StoreFull`, `StoreUnavailable`.
        """
        record = await self.get(schedule_id)
        submission = self.submission(record.schedule, Tick(schedule_id))
        if key:
            body = f"trigger {schedule_id}".encode()
            submission = msgspec.structs.replace(submission, idempotency_key=key, body=body)
        return await self._jobs.submit(submission)

    async def delete(self, schedule_id: str) -> None:
        """Forget a schedule; jobs that it made live on. Raises `ScheduleNotFound`."""
        await self._act(schedule_id, "delete")

    async def advance(self, waiting: Waiting, next_ms: int, *, skipped: int = 0, error: str = "") -> bool:
        """Pass over ticks that give no job; False where the schedule waits for another tick, or is gone."""
        return await self._call(
            Scripts.SCHEDULE_ALWAYS, "advance", waiting.schedule_id, waiting.due_ms, next_ms, skipped, error
        ) == "advanced"  # fmt: skip

    async def _act(self, schedule_id: str, what: str, *arguments: str | int) -> str:
        answer = await self._call(Scripts.SCHEDULE_ALWAYS, what, schedule_id, *arguments)
        if answer == "gone":
            raise ScheduleNotFound("no such schedule")
        return answer

    async def _call(self, script: Script, what: str, schedule_id: str, *arguments: str | bytes | int) -> str:
        partition = keys.partition_of_schedule(schedule_id)
        return text((await self._scripts.call(script, partition, what, schedule_id, *arguments))[0])

    # --- ticks

    async def next_due(self, partition: int, after_ms: int = -1) -> int:
        """The earliest tick later than `after_ms` that a schedule waits for; -1 for none."""
        with translated():
            found = await self._client.zrangebyscore(
                _waiting(partition), f"({after_ms}", "+inf", start=0, num=1, withscores=True
            )
        return int(found[0][1]) if found else -1

    async def due(self, partition: int, now_ms: int, limit: int) -> list[Waiting]:
        """Schedules that wait for a tick that has come, at most `limit`."""
        with translated():
            found = await self._client.zrangebyscore(
                _waiting(partition), "-inf", now_ms, start=0, num=limit, withscores=True
            )
        return [Waiting(text(schedule_id), int(due)) for schedule_id, due in found]

    def submission(self, schedule: Schedule, tick: Tick | None = None) -> Submission:
        """The job that a tick of this schedule gives."""
        queues = self._settings.queues
        return Submission(
            kind=schedule.kind,
            owner=schedule.owner,
            input=bytes(schedule.input),
            queue=schedule.queue or ("default" if "default" in queues else queues[0]),
            priority=schedule.priority,
            thread_id=schedule.thread_id,
            metadata=schedule.metadata,
            timeout=schedule.timeout,
            max_attempts=schedule.max_attempts,
            concurrency_key=schedule.concurrency_key,
            job_id=keys.tick_job_id(tick.schedule_id, tick.due_ms) if tick and tick.due_ms else "",
            tick=tick,
        )

    def _partition_of(self, schedule: Schedule) -> int:
        return keys.partition_of_owner(schedule.owner, self._settings.partitions)


def _waiting(partition: int) -> str:
    return f"{keys.prefix(partition)}schedules"


def _record(schedule_id: str, fields: dict[str, str], due: float | None) -> ScheduleRecord:
    try:
        schedule = _DECODER.decode(fields["definition"])
    except (msgspec.MsgspecError, StreamjobsError) as error:
        raise UnreadableSchedule(f"this release cannot read schedule {schedule_id}: {error}") from error
    return ScheduleRecord(
        id=schedule_id,
        schedule=schedule,
        digest=fields["digest"],
        created_ms=int(fields["created"]),
        next_ms=None if due is None else int(due),
        app=fields.get("app", ""),
        declared_ms=_number(fields.get("declared")),
        last_tick_ms=_number(fields.get("last_tick")),
        last_job=fields.get("last_job", ""),
        runs=int(fields.get("runs", 0)),
        skipped=int(fields.get("skipped", 0)),
        error=fields.get("error", ""),
    )


def _number(value: str | None) -> int | None:
    return int(value) if value else None
