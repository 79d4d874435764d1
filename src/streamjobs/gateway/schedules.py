"""Schedules: make, list, look, pause, resume, trigger, delete.

Rule 1: a schedule is its owner's: for anybody else there is none.
Rule 2: what its jobs could not run is refused when it is made, as a submission would be.
Rule 3: each call may be sent again: make and trigger with an `Idempotency-Key`, the others by their nature.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from streamjobs.app import CHAT
from streamjobs.config import Settings
from streamjobs.cron import Timing
from streamjobs.errors import ScheduleNotFound
from streamjobs.events import Json
from streamjobs.gateway.answers import accepted, answer
from streamjobs.gateway.body import decode_body, fields_of, read_body
from streamjobs.gateway.jobs import MAX_METADATA, Registry, without_nul
from streamjobs.gateway.limits import require_short_chat, require_sizes
from streamjobs.gateway.requests import Label, Seconds, idempotency_key, owner_of
from streamjobs.schedule import Missed, Overlap, Priority, Schedule
from streamjobs.store import ScheduleRecord, Store

SHOWN = 5
"""Coming ticks that are shown."""


class ScheduleRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A schedule: when (`cron` and `timezone`, or `every` in seconds), and the job as in a submission."""

    name: Annotated[Label, msgspec.Meta(min_length=1)]
    kind: Label
    cron: Label = ""
    timezone: Label = "UTC"
    every: float = 0.0
    offset: float = 0.0
    input: Json = None
    queue: Label = ""
    priority: Priority = "default"
    thread_id: Label = ""
    metadata: Annotated[dict[Label, Json], msgspec.Meta(max_length=MAX_METADATA)] = {}
    timeout: Seconds | None = None
    max_attempts: Annotated[int, msgspec.Meta(ge=1, le=100)] | None = None
    concurrency_key: Label = ""
    missed: Missed = "skip"
    overlap: Overlap = "allow"


class ScheduleRoutes:
    """The routes of schedules."""

    def __init__(self, store: Store, registry: Registry, settings: Settings) -> None:
        self._store = store
        self._registry = registry
        self._settings = settings

    def routes(self) -> list[Route]:
        """What a router needs."""
        one = "/v1/schedules/{id}"
        acts = (self.pause, self.resume, self.trigger)
        return [
            Route("/v1/schedules", self.create, methods=["POST"]),
            Route("/v1/schedules", self.list, methods=["GET"]),
            Route(one, self.view, methods=["GET"]),
            Route(one, self.delete, methods=["DELETE"]),
            *(Route(f"{one}/{act.__name__}", act, methods=["POST"]) for act in acts),
        ]

    async def create(self, request: Request) -> Response:
        """Make a schedule: 201 and what it is."""
        key = idempotency_key(request)
        body = await read_body(request.scope, request.receive, self._settings)
        schedule = self._schedule(
            fields_of(decode_body(body, self._settings), ScheduleRequest), owner_of(request)
        )
        record, was_there = await self._store.schedules.create(schedule, key=key)
        headers = {"Location": f"/v1/schedules/{record.id}"}
        if was_there:
            headers["Idempotent-Replayed"] = "true"
        return answer(_shown(record), headers, status_code=201)

    def _schedule(self, asked: ScheduleRequest, owner: str) -> Schedule:
        raw_input = without_nul("input", asked.input)
        without_nul("metadata", asked.metadata)
        timing = Timing(cron=asked.cron, timezone=asked.timezone, every=asked.every, offset=asked.offset)
        require_sizes(self._settings, raw_input, asked.metadata)
        self._registry.check_submission(asked.kind, raw_input)
        if asked.kind == CHAT:
            require_short_chat(self._settings, asked.input)
        workflow = self._registry.workflows.get(asked.kind)
        return Schedule(
            name=asked.name,
            kind=asked.kind,
            timing=timing,
            owner=owner,
            input=msgspec.Raw(raw_input),
            queue=asked.queue or (workflow and workflow.queue) or "",
            priority=asked.priority,
            thread_id=asked.thread_id,
            metadata=asked.metadata,
            timeout=asked.timeout if asked.timeout is not None else workflow and workflow.timeout,
            max_attempts=asked.max_attempts or (workflow and workflow.max_attempts) or 0,
            concurrency_key=asked.concurrency_key,
            missed=asked.missed,
            overlap=asked.overlap,
        )

    async def list(self, request: Request) -> Response:
        """All of the owner's schedules, oldest first."""
        records = await self._store.schedules.of_owner(owner_of(request))
        return answer({"schedules": [described(record) for record in records]})

    async def view(self, request: Request) -> Response:
        """One schedule, and when it comes due next."""
        return answer(_shown(await self._store.schedules.get(await self._own(request))))

    async def pause(self, request: Request) -> Response:
        """Let its ticks pass without jobs."""
        schedule_id = await self._own(request)
        await self._store.schedules.pause(schedule_id)
        return answer(_shown(await self._store.schedules.get(schedule_id)))

    async def resume(self, request: Request) -> Response:
        """Wait for the next tick again."""
        schedule_id = await self._own(request)
        await self._store.schedules.resume(schedule_id)
        return answer(_shown(await self._store.schedules.get(schedule_id)))

    async def trigger(self, request: Request) -> Response:
        """Submit its job now: 202, as a submission."""
        key = idempotency_key(request)
        receipt = await self._store.schedules.trigger(await self._own(request), key=key)
        headers = {"Location": f"/v1/jobs/{receipt.job_id}"}
        if key and receipt.repeated:
            headers["Idempotent-Replayed"] = "true"
        job = await self._store.jobs.get(receipt.job_id)
        return accepted(job.job_id, job.kind, job.status, job.last, headers)

    async def delete(self, request: Request) -> Response:
        """Forget it; jobs that it made live on."""
        schedule_id = await self._own(request)
        await self._store.schedules.delete(schedule_id)
        return answer({"id": schedule_id, "deleted": True})

    async def _own(self, request: Request) -> str:
        """The schedule in the path, if it is the asker's. Raises `ScheduleNotFound`."""
        schedule_id: str = request.path_params["id"]
        if await self._store.schedules.owner_of(schedule_id) != owner_of(request):
            raise ScheduleNotFound("no such schedule")
        return schedule_id


def described(record: ScheduleRecord) -> dict[str, Any]:
    """A schedule as JSON; an interval has no `cron` and `timezone`, a cron no `every` and `offset`."""
    schedule = record.schedule
    timing = schedule.timing
    when: dict[str, Any] = (
        {"cron": timing.cron, "timezone": timing.timezone}
        if timing.cron
        else {"every": timing.every, "offset": timing.offset}
    )
    return {
        "id": record.id,
        "name": schedule.name,
        "owner": schedule.owner,
        "kind": schedule.kind,
        **when,
        "missed": schedule.missed,
        "overlap": schedule.overlap,
        "paused": record.is_paused,
        "next_ms": record.next_ms,
        "last_tick_ms": record.last_tick_ms,
        "last_job": record.last_job,
        "runs": record.runs,
        "skipped": record.skipped,
        "error": record.error,
        "input": schedule.input,
        "queue": schedule.queue,
        "priority": schedule.priority,
        "thread_id": schedule.thread_id,
        "metadata": schedule.metadata,
        "timeout": schedule.timeout,
        "max_attempts": schedule.max_attempts,
        "concurrency_key": schedule.concurrency_key,
        "declared_by": record.app,
        "declared_ms": record.declared_ms,
        "created_ms": record.created_ms,
    }


def _shown(record: ScheduleRecord) -> dict[str, Any]:
    here = f"/v1/schedules/{record.id}"
    links = {"self": here, "pause": f"{here}/pause", "resume": f"{here}/resume", "trigger": f"{here}/trigger"}
    return described(record) | {"coming_ms": record.coming(SHOWN), "links": links}
