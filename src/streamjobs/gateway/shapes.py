"""What answers look like, where they are no struct of their own: for the OpenAPI document only.

Rule: a field without a default is in every answer; tests compare answers with these.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from streamjobs.effects import Effect
from streamjobs.events import ErrorInfo, Json
from streamjobs.job import ArtifactView, Metrics, Status
from streamjobs.store import (
    ListedJob,
    Notice,
    ProjectionInfo,
    QueueInfo,
    Strike,
    Undelivered,
    WorkerInfo,
)
from streamjobs.store.dead import DeadJob


class Problem(msgspec.Struct):
    """A problem document (RFC 9457). `code` is stable; `field` names what does not fit."""

    type: str
    title: str
    status: int
    code: str
    detail: str
    field: str = ""
    job_status: Status | None = None


class JobLinks(msgspec.Struct):
    """Where to go on from a job."""

    self: str
    events: str
    cancel: str


class AcceptedJob(msgspec.Struct):
    """A job that was submitted."""

    id: str
    kind: str
    status: Status
    cursor: str
    links: JobLinks
    rerun_of: str = ""


class JobsPage(msgspec.Struct):
    """Jobs, newest first; `cursor` is empty on the last page."""

    jobs: list[ListedJob]
    cursor: str
    counts: dict[str, int] = {}


class JobResult(msgspec.Struct):
    """What came of a job."""

    id: str
    kind: str
    status: Status
    summary: str
    artifacts: list[ArtifactView]
    metrics: Metrics
    error: ErrorInfo | None
    output: Json
    output_artifact: str


class JobLogLine(msgspec.Struct):
    """A line for people."""

    cursor: str
    ts: int
    level: str
    message: str
    data: Json


class JobLogPage(msgspec.Struct):
    """The newest lines, oldest first."""

    job: str
    lines: list[JobLogLine]
    cursor: str


class JobEffects(msgspec.Struct):
    """The effect ledger."""

    job: str
    effects: list[Effect]
    cursor: str


class LoggedEvent(msgspec.Struct):
    """An event; its `id` is a cursor."""

    id: str
    type: str
    data: Json


class EventsPage(msgspec.Struct):
    """A page of a job's log."""

    events: list[LoggedEvent]
    cursor: str
    last: str
    status: Status
    more: bool


class TokenGiven(msgspec.Struct):
    """A stream token, until when it opens a stream, and until when it is renewed."""

    token: str
    expires_ms: int
    until_ms: int
    links: dict[str, str]


class CancelRequested(msgspec.Struct):
    """A cancel."""

    id: str
    cancel_requested: bool
    links: JobLinks


class SignalTaken(msgspec.Struct):
    """A signal; `repeated` where its key had come before."""

    id: str
    signal: str
    repeated: bool


class PauseTaken(msgspec.Struct):
    """A pause or a resume."""

    id: str
    status: str
    repeated: bool
    links: JobLinks


class Deleted(msgspec.Struct):
    """What is no more."""

    id: str
    deleted: bool


class ScheduleLinks(msgspec.Struct):
    """Where to go on from a schedule."""

    self: str
    pause: str
    resume: str
    trigger: str


class ListedSchedule(msgspec.Struct, kw_only=True):
    """A schedule: `cron` and `timezone`, or `every` and `offset`."""

    id: str
    name: str
    owner: str
    kind: str
    cron: str = ""
    timezone: str = ""
    every: float = 0.0
    offset: float = 0.0
    missed: Literal["skip", "once", "all"]
    overlap: Literal["allow", "skip"]
    paused: bool
    next_ms: int | None
    last_tick_ms: int | None
    last_job: str
    runs: int
    skipped: int
    error: str
    input: Json
    queue: str
    priority: str
    thread_id: str
    metadata: dict[str, Json]
    timeout: float | None
    max_attempts: int
    concurrency_key: str
    declared_by: str
    declared_ms: int | None
    created_ms: int


class ShownSchedule(ListedSchedule, kw_only=True):
    """A schedule, with the ticks that come next."""

    coming_ms: list[int]
    links: ScheduleLinks


class SchedulesList(msgspec.Struct):
    """All of the owner's schedules, oldest first."""

    schedules: list[ListedSchedule]


class NoticesPage(msgspec.Struct):
    """Notices, newest first."""

    notifications: list[Notice]
    unread: int
    cursor: str


class NoticesRead(msgspec.Struct):
    """How many were marked, and how many are unread."""

    marked: int
    unread: int


class WebhookLinks(msgspec.Struct):
    """Where to go on from a webhook."""

    self: str
    undelivered: str


class ShownWebhook(msgspec.Struct):
    """A webhook; `secret` is in the answer that makes it, and in no other."""

    id: str
    url: str
    events: list[str]
    kinds: list[str]
    disabled: bool
    disabled_ms: int | None
    disabled_why: str
    created_ms: int
    links: WebhookLinks
    secret: str = ""


class WebhooksList(msgspec.Struct):
    """All of the owner's webhooks, oldest first."""

    webhooks: list[ShownWebhook]


class SecretRotated(msgspec.Struct):
    """Another secret; the one before signs too for `grace` seconds."""

    id: str
    secret: str
    grace: float


class UndeliveredList(msgspec.Struct):
    """What a webhook did not take, newest first."""

    undelivered: list[Undelivered]


class Count(msgspec.Struct):
    """How many."""

    count: int


class KindShown(msgspec.Struct):
    """A kind of job."""

    kind: str
    description: str
    input_schema: dict[str, Json]
    queue: str | None


class KindsList(msgspec.Struct):
    """What may be submitted."""

    workflows: list[KindShown]


class ToolShown(msgspec.Struct):
    """A tool, as a model is told of it."""

    name: str
    description: str
    parameters: dict[str, Json]
    effect: Literal["pure", "idempotent", "once"]


class ToolsList(msgspec.Struct):
    """What a model may be given."""

    tools: list[ToolShown]


class WorkersList(msgspec.Struct):
    """Who works."""

    workers: list[WorkerInfo]
    now_ms: int


class QueuesList(msgspec.Struct):
    """What waits."""

    queues: list[QueueInfo]


class StatsHistory(msgspec.Struct):
    """What was counted; with `history`, step by step."""

    stats: list[dict[str, Json]] = []
    step: str = ""
    history: list[dict[str, Json]] = []


class ProjectionsList(msgspec.Struct):
    """How far each projection is behind."""

    projections: list[ProjectionInfo]


class RebuildAsked(msgspec.Struct):
    """A projection that will be made anew."""

    projection: str
    rebuild: str


class ProjectionRetried(msgspec.Struct):
    """How many jobs a projection looks at again."""

    projection: str
    retried: int


class DeadPage(msgspec.Struct):
    """Failed jobs, newest first."""

    dead: list[DeadJob]
    cursor: str


class RerunPair(msgspec.Struct, rename={"from_": "from"}):
    """A job, and the one that runs it again."""

    from_: str
    to: str


class DeadRerun(msgspec.Struct):
    """What was run again."""

    rerun: list[RerunPair]
    count: int


class StrikesList(msgspec.Struct):
    """What is stopped."""

    strikes: list[Strike]


class StrikeChanged(msgspec.Struct):
    """A strike that was made or lifted; `changed` is false where it was so before."""

    scope: Literal["queue", "kind", "tool"]
    name: str
    struck: bool
    changed: bool
