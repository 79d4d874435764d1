"""Runs a workflow in the caller: no Redis, no gateway, no other process; for tests and small scripts.

Rule 1: it is the same code that a worker runs: the same recording, the same replay after a sleep or a retry.
Rule 2: nothing survives the process; a job that waits for a signal that nobody gave fails, it does not hang.

The log is a list, and the store's few scripts are a few lines each.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import msgspec

from streamjobs import events as ev
from streamjobs.config import Settings, load_settings
from streamjobs.cursor import START, Cursor
from streamjobs.errors import ArtifactNotFound, JobEnded, StreamjobsError
from streamjobs.events import Event, Json, encode_event, encode_json
from streamjobs.job import Fold, JobView
from streamjobs.llm import Providers
from streamjobs.store import (
    Answer,
    Batch,
    Clock,
    Entry,
    Lease,
    Outcome,
    Page,
    Permit,
    Receipt,
    Store,
    Submission,
)
from streamjobs.store.keys import new_job_id
from streamjobs.worker.execution import Execution, Services
from streamjobs.worker.isolation.processes import ToolProcesses
from streamjobs.worker.recorder import Committer

if TYPE_CHECKING:
    from streamjobs.app import App

OnEvent = Callable[[str, Event], None]
Result = TypeVar("Result")

_ENDED = {"job.completed": "completed", "job.failed": "failed", "job.cancelled": "cancelled"}
_PARKED: dict[Outcome, str] = {
    "sleep": "scheduled",
    "wait": "waiting",
    "retry": "scheduled",
    "yield": "queued",
}


class InlineJobFailed(StreamjobsError):  # noqa: N818 - named after what happened, as all of ours
    """The job failed or was cancelled; `view` is how it ended."""

    code, http_status = "job_failed", 422

    def __init__(self, message: str, view: JobView) -> None:
        super().__init__(message)
        self.view = view


class _Job:
    """One job: its log, where it is, and what wakes it."""

    def __init__(self, submission: Submission, on_event: OnEvent) -> None:
        self.id = submission.job_id
        self.submission = submission
        self.log: list[Entry] = []
        self.status = "queued"
        self.attempt = 1
        self.epoch = 0
        self.inbox = 0
        self.asked = ""
        self.by: dict[str, str] = {"by": "", "reason": ""}
        self.timers: dict[str, asyncio.TimerHandle] = {}
        self.artifacts: dict[str, tuple[str, bytes]] = {}
        self.deadline: float | None = None
        self.execution: Execution | None = None
        self.woken = asyncio.Event()
        self.ended = asyncio.Event()
        self._on_event = on_event

    @property
    def is_ended(self) -> bool:
        return self.status in _ENDED.values()

    def write(self, kind: str, data: bytes) -> None:
        self.log.append(Entry(Cursor(len(self.log) + 1, self.epoch), kind, data))
        self.status = _ENDED.get(kind, self.status)
        self._on_event(self.id, ev.decode_event(kind, data))
        if kind in _ENDED:
            for timer in self.timers.values():
                timer.cancel()
            self.ended.set()

    def say(self, event: Event) -> None:
        self.write(event.type, encode_event(event))

    def hear(self, event: Event) -> None:
        """Something from outside: written, counted, and a reason to go on."""
        self.say(event)
        self.inbox += 1
        if self.execution is not None:
            self.execution.journal.note(self.inbox, self.asked)
        self.woken.set()

    def view(self) -> JobView:
        fold = Fold(self.id)
        fold.apply_all(self.log)
        return fold.view()


class _Log:
    def __init__(self, jobs: Mapping[str, _Job]) -> None:
        self._jobs = jobs

    async def pages(self, job_id: str, after: Cursor = START) -> AsyncGenerator[Page]:
        job = self._jobs[job_id]
        yield Page(True, job.status, job.log[-1].cursor, job.log[after.seq :])


class _Artifacts:
    def __init__(self, jobs: Mapping[str, _Job]) -> None:
        self._jobs = jobs

    async def put(self, job_id: str, _epoch: int, name: str, media_type: str, data: bytes) -> None:
        self._jobs[job_id].artifacts[name] = (media_type, data)

    async def get(self, job_id: str, name: str) -> tuple[str, bytes]:
        try:
            return self._jobs[job_id].artifacts[name]
        except KeyError as error:
            raise ArtifactNotFound(f"the job has no artifact {name!r}") from error


class _Permits:
    async def acquire(self, _name: str, *, rate: float, burst: int, max_wait: float) -> Permit:
        del rate, burst, max_wait
        return Permit(granted=True, wait=0.0)


class _Engine:
    """The store and the worker of all jobs of one call."""

    def __init__(self, app: App, settings: Settings, on_event: OnEvent) -> None:
        self.jobs: dict[str, _Job] = {}
        self.log = _Log(self.jobs)
        self.artifacts = _Artifacts(self.jobs)
        self.permits = _Permits()
        self._app = app
        self._settings = settings
        self._on_event = on_event
        self._loop = asyncio.get_running_loop()
        self._clock = Clock(lambda: time.time_ns() // 1_000_000)
        self._providers = Providers(settings)
        self._processes = ToolProcesses(app.tools, settings)
        self._committer = Committer(cast("Any", self), 0, settings)
        self._committing = asyncio.create_task(self._committer.run(), name="commit")
        self._running: set[asyncio.Task[None]] = set()

    async def aclose(self) -> None:
        for task in (*self._running, self._committing):
            task.cancel()
        await asyncio.gather(*self._running, self._committing, return_exceptions=True)
        await self._providers.aclose()
        await self._processes.aclose()

    # --- what a workflow finds as `store.jobs`

    async def submit(self, submission: Submission) -> Receipt:
        known = self.jobs.get(submission.job_id)
        if known is None:
            known = self.jobs[submission.job_id] = _Job(submission, self._on_event)
            known.say(
                ev.JobQueued(
                    ts=self._clock.now_ms(),
                    kind=submission.kind,
                    owner=submission.owner,
                    queue=submission.queue,
                    priority=submission.priority,
                    metadata=submission.metadata,
                    max_attempts=submission.max_attempts,
                    parent=submission.parent,
                    input=msgspec.Raw(submission.input),
                )
            )
            task = asyncio.create_task(self._run(known), name=known.id)
            self._running.add(task)
            task.add_done_callback(self._running.discard)
        return Receipt(known.id, known.log[-1].cursor, repeated=False)

    async def cancel(self, job_id: str, *, by: str = "", reason: str = "") -> str:
        job = self.jobs[job_id]
        if job.is_ended:
            raise JobEnded(f"the job has already {job.status}")
        job.asked, job.by = "cancel", {"by": by, "reason": reason}
        job.hear(ev.JobCancelRequested(ts=self._clock.now_ms(), by=by, reason=reason))
        return "requested"

    def signal(self, job: _Job, name: str, payload: Json) -> None:
        job.hear(ev.SignalReceived(ts=self._clock.now_ms(), name=name, payload=payload))

    # --- running

    async def _run(self, job: _Job) -> None:
        """Lease the job, run it, and again whenever it was parked, until it has ended."""
        while not job.is_ended:
            await self._lease(job)
            if job.status in {"scheduled", "waiting"}:
                await self._until_woken(job)
        await self._tell_parent(job)

    async def _lease(self, job: _Job) -> None:
        job.epoch += 1
        job.status = "running"
        job.woken.clear()
        job.say(ev.JobStarted(ts=self._clock.now_ms(), attempt=job.attempt, worker="inline"))
        sub = job.submission
        lease = Lease(
            job.id, job.epoch, len(job.log), job.attempt, job.inbox, 0, self._ms_left(job), sub.kind,
            sub.owner, sub.queue, b"",
        )  # fmt: skip
        job.execution = Execution(lease, self._services(), self._committer)
        try:
            await job.execution.run()
        finally:
            job.execution = None
        if job.status == "running":
            raise StreamjobsError(f"{sub.kind}: its run ended, the job did not")

    def _ms_left(self, job: _Job) -> int:
        if not job.submission.timeout:
            return -1
        if job.deadline is None:
            job.deadline = self._loop.time() + job.submission.timeout
        return max(0, round((job.deadline - self._loop.time()) * 1000))

    def _services(self) -> Services:
        return Services(
            cast("Store", _Facade(self)),
            self._app,
            self._settings,
            self._providers,
            self._clock,
            {0: self._committer},
            lambda: False,
            set(),
            processes=self._processes,
        )

    async def _until_woken(self, job: _Job) -> None:
        waiting = job.status == "waiting"
        if waiting and not job.timers and not self._has_live_child(job) and not job.woken.is_set():
            self._fail(job, "nobody sends what the job waits for")
            return
        await job.woken.wait()
        if job.asked == "cancel":
            job.say(self._cancelled(job))
        elif not job.is_ended:
            job.say(ev.JobRequeued(ts=self._clock.now_ms(), why="timer"))

    def _cancelled(self, job: _Job) -> ev.JobCancelled:
        return ev.JobCancelled(ts=self._clock.now_ms(), by=job.by["by"], reason=job.by["reason"])

    def _has_live_child(self, job: _Job) -> bool:
        return any(one.submission.parent == job.id and not one.is_ended for one in self.jobs.values())

    def _fail(self, job: _Job, message: str) -> None:
        error = ev.ErrorInfo("no_signal", message)
        job.say(ev.JobFailed(ts=self._clock.now_ms(), error=error))

    async def _tell_parent(self, job: _Job) -> None:
        parent = self.jobs.get(job.submission.parent)
        if parent is None or parent.is_ended:
            return
        view = job.view()
        parent.hear(
            ev.ChildEnded(
                ts=self._clock.now_ms(),
                job=job.id,
                status=job.status,
                result=view.result,
                error=view.error,
                summary=view.summary,
                artifact=view.result_artifact,
            )
        )

    # --- what a worker finds as `store.work`

    async def append(
        self, _partition: int, batches: Sequence[Batch], *, always: bool = False
    ) -> list[Answer]:
        del always
        return [self._append(self.jobs[batch.job_id], batch) for batch in batches]

    def _append(self, job: _Job, batch: Batch) -> Answer:
        if batch.outcome in _PARKED and batch.seen != job.inbox:
            return Answer("inbox", inbox=job.inbox, asked=job.asked)
        for kind, data in batch.events:
            job.write(kind, data)
        for key, delay in msgspec.json.decode(batch.timers or b"{}", type=dict[str, int]).items():
            self._set_timer(job, key, delay)
        if batch.outcome == "cancelled":
            job.say(self._cancelled(job))
        elif batch.outcome in _PARKED:
            self._park(job, batch)
        return Answer("ok", len(job.log), job.inbox, job.asked)

    def _park(self, job: _Job, batch: Batch) -> None:
        job.status = _PARKED[batch.outcome]
        if batch.outcome == "retry":
            job.attempt += 1
            self._loop.call_later(batch.delay_ms / 1000, job.woken.set)

    def _set_timer(self, job: _Job, key: str, delay_ms: int) -> None:
        if delay_ms < 0:
            handle = job.timers.pop(key, None)
            if handle is not None:
                handle.cancel()
        elif key not in job.timers:
            job.timers[key] = self._loop.call_later(delay_ms / 1000, self._fire, job, key)

    def _fire(self, job: _Job, key: str) -> None:
        del job.timers[key]
        if not job.is_ended:
            job.hear(ev.TimerFired(ts=self._clock.now_ms(), key=key))


class _Facade:
    """The parts of a `Store` that a run uses."""

    def __init__(self, engine: _Engine) -> None:
        self.jobs = engine
        self.log = engine.log
        self.artifacts = engine.artifacts
        self.permits = engine.permits


async def run(
    app: App,
    kind: str,
    given: object = None,
    *,
    settings: Settings | None = None,
    owner: str = "inline",
    timeout: float | None = None,
    signals: Mapping[str, Json | list[Json]] | None = None,
    on_event: OnEvent | None = None,
) -> Any:
    """Run a job of this kind to its end, as `App.run_inline` says."""
    settings = settings or load_settings()
    raw = encode_json(given)
    app.check_submission(kind, raw)
    workflow = app.workflows.get(kind)
    limit = timeout if timeout is not None else workflow and workflow.timeout
    engine = _Engine(app, settings, on_event or (lambda _job_id, _event: None))
    try:
        job_id = new_job_id(0)
        submission = Submission(kind=kind, owner=owner, input=raw, job_id=job_id, timeout=limit)
        await engine.submit(submission)
        job = engine.jobs[job_id]
        for name, payloads in (signals or {}).items():
            for payload in cast("list[Json]", payloads) if isinstance(payloads, list) else [payloads]:
                engine.signal(job, name, payload)
        await _ended(engine, job)
        return _result_of(job)
    finally:
        await engine.aclose()


async def _ended(engine: _Engine, job: _Job) -> None:
    """Wait for the job's end; a fault of ours ends the wait, too."""
    while not job.is_ended:
        ended = asyncio.ensure_future(job.ended.wait())
        running: set[asyncio.Task[Any]] = {ended, *engine._running}  # pyright: ignore[reportPrivateUsage]
        done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
        for task in done:
            if task is not ended:
                task.result()


def _result_of(job: _Job) -> Any:
    view = job.view()
    if view.status != "completed":
        why = f"{view.error.code}: {view.error.message}" if view.error else "it was cancelled"
        raise InlineJobFailed(f"{view.kind} {view.status} ({why})", view)
    if view.result_artifact:
        return msgspec.json.decode(job.artifacts[view.result_artifact][1])
    return view.result


def run_here(work: Coroutine[Any, Any, Result]) -> Result | Coroutine[Any, Any, Result]:
    """Run it now where no event loop runs; else hand it back, to be awaited."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    return work
