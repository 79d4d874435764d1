"""One job under one lease: load, run, record, and end, park or hand back.

Rule 1: the lease lost (`fenced`) stops the job at once and quietly; the next holder goes on from the log.
Rule 2: whatever the workflow's code does, the job gets exactly one outcome, or none where the lease is lost.
Rule 3: a cancel closes what the job has open (the provider's connection, its tools) before it is recorded.
Rule 4: code that ignores its cancellation is left behind after `cancel_timeout`; it cannot write any more.

The job's code runs in a task of its own, under a guard that catches everything. So a stop never hits the
commit of an outcome, whenever it comes, and a `SystemExit` or a foreign `CancelledError` in a workflow is a
failed attempt, not the end of the worker.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import msgspec
import structlog

from streamjobs import metrics
from streamjobs.app import CHAT, App
from streamjobs.config import Settings
from streamjobs.cursor import START, Cursor
from streamjobs.errors import (
    Fenced,
    HeartbeatTimeout,
    JobNotFound,
    LimitExceeded,
    ProviderError,
    Shredded,
    StoreUnavailable,
    StreamjobsError,
)
from streamjobs.events import (
    UNENCODABLE,
    ErrorInfo,
    Event,
    JobCompleted,
    JobFailed,
    JobRetrying,
    clean_text,
)
from streamjobs.faults import fault
from streamjobs.llm import Providers
from streamjobs.retry import Backoff, Retry
from streamjobs.store import Clock, Entry, Lease, Outcome, Store
from streamjobs.worker.chat import chat
from streamjobs.worker.context import Context, Surroundings
from streamjobs.worker.described import MAX_MESSAGE, clean_message, describe, leaves
from streamjobs.worker.history import History
from streamjobs.worker.isolation.processes import ToolProcesses
from streamjobs.worker.news import News
from streamjobs.worker.parking import Parking
from streamjobs.worker.recorder import Committer, Journal
from streamjobs.worker.replay import Replay
from streamjobs.worker.values import encode_clean

log = structlog.get_logger(__name__)

_UNWIND_TIMEOUT = 1.0
"""Seconds that code has to clean up when the worker drops everything."""

Stop = Literal["cancel", "fenced", "timeout", "heartbeat", "yield", "parked", "refused"]


class Services(NamedTuple):
    """What every execution of a worker shares; `left_behind` collects code that ignores its cancellation."""

    store: Store
    app: App
    settings: Settings
    providers: Providers
    clock: Clock
    committers: dict[int, Committer]
    is_draining: Callable[[], bool]
    left_behind: set[asyncio.Task[Any]]
    is_struck: Callable[[str], bool] = lambda _: False
    processes: ToolProcesses | None = None


class _Ending(NamedTuple):
    """What becomes of the job."""

    outcome: Outcome
    event: Event | None = None
    delay_ms: int = 0


class Execution:
    """Runs one leased job: its code in one task, and around it whoever decides what becomes of the job."""

    def __init__(self, lease: Lease, services: Services, committer: Committer) -> None:
        self.lease = lease
        self.journal = Journal(lease, committer, self._on_change)
        self.is_ending = False
        self._services = services
        self._stopped: Stop | None = None
        self._max_attempts = services.settings.max_attempts
        self._retry: Retry | None = None
        self._replay: Replay | None = None
        self._news: News | None = None
        self._reading: asyncio.Task[None] | None = None
        self._heartbeat_timeout = 0.0
        self._parking = Parking(
            self.journal,
            services.settings.park_after,
            is_wanted_back=lambda: services.is_draining() or self.journal.asked == "pause",
            on_decided=self.stop,
            now_ms=services.clock.now_ms,
        )
        self._loop = committer.loop
        self._code: asyncio.Task[_Ending | None] | None = None
        self._settled: asyncio.Future[None] = self._loop.create_future()
        self._timers: list[asyncio.TimerHandle] = []

    async def run(self) -> None:
        """Advance the job until it has an outcome or the lease is lost. Never raises for the job's faults."""
        started = time.monotonic()
        fault("after_take")
        self._watch_timeout()
        try:
            outcome = await self._conclude(await self._advance())
        except Fenced:
            outcome = "fenced"
        finally:
            self._clean_up()
        metrics.JOBS_DONE.labels(outcome).inc()
        metrics.JOB_SECONDS.observe(time.monotonic() - started)

    def _clean_up(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self._parking.close()
        if self._reading is not None:
            self._reading.cancel()
        if self._replay is not None:
            self._replay.close(Fenced("the run is over"))

    async def _conclude(self, ending: _Ending | None) -> str:
        """Record what becomes of the job, unless it was parked."""
        parked = await self._parking.outcome()
        return parked or await self._end(ending)

    def stop(self, why: Stop) -> None:
        """Interrupt the job's code; what becomes of the job follows from the first `why`."""
        if self._stopped is not None or self.is_ending:
            return
        if self._parking.is_deciding:
            self._parking.postpone(why)
            return
        self._stopped = why
        if why == "fenced":
            self.journal.close(Fenced("the lease is lost"))
        if self._code is not None and not self._code.done():
            self._code.cancel()
            timeout = self._services.settings.cancel_timeout
            # on Python 3.11 `wait_for` may swallow the first one
            self._timers.append(self._loop.call_later(timeout / 2, self._code.cancel))
            self._timers.append(self._loop.call_later(timeout, self._settle))

    def _on_change(self, journal: Journal) -> None:
        if journal.closed is not None:
            self.stop("fenced")
        elif journal.asked == "cancel":
            self.stop("cancel")
        elif self._news is not None and self._news.is_behind and not self.is_ending:
            self._read_news(self._news)

    def _read_news(self, news: News) -> None:
        """Read what came in; what goes wrong there stops the code."""
        if self._reading is None or self._reading.done():
            self._reading = self._loop.create_task(self._catch_up(news), name="news")
        self.nudge()

    async def _catch_up(self, news: News) -> None:
        try:
            await news.catch_up()
        except Fenced:
            self.stop("fenced")
        except StreamjobsError as error:
            log.warning("news.unread", job_id=self.lease.job_id, error=str(error))

    def nudge(self) -> None:
        """Something outside may want this job back: let it be parked where it only waits."""
        if self._replay is not None:
            self._replay.nudge()

    def _watch_timeout(self) -> None:
        if self.lease.ms_left >= 0:
            self._timers.append(self._loop.call_later(self.lease.ms_left / 1000, self.stop, "timeout"))

    # --- running

    async def _advance(self) -> _Ending | None:
        """Run the job's code to its end, or until it is stopped; None where the lease was lost meanwhile."""
        if self._services.is_draining():
            self.stop("yield")  # nothing was begun: another worker takes it at once
        if self._stopped is not None:
            return self._stopped_ending()
        self._code = asyncio.create_task(self._guarded(), name=self.lease.job_id)
        self._code.add_done_callback(self._settle)
        try:
            await self._settled
        except asyncio.CancelledError:
            await self._drop(self._code)
            raise
        return self._ending_of(self._code)

    def _settle(self, *_: object) -> None:
        """The code has ended, or had its time to."""
        if not self._settled.done():
            self._settled.set_result(None)

    async def _drop(self, code: asyncio.Task[Any]) -> None:
        """The worker drops everything: let the code close what it has open."""
        self._stopped = self._stopped or "fenced"
        self._leave_behind(code)
        code.cancel()
        await asyncio.wait({code}, timeout=_UNWIND_TIMEOUT)

    def _leave_behind(self, code: asyncio.Task[Any]) -> None:
        self._services.left_behind.add(code)
        code.add_done_callback(self._services.left_behind.discard)

    def _ending_of(self, code: asyncio.Task[_Ending | None]) -> _Ending | None:
        if not code.done():
            log.error("job.ignores_cancellation", job_id=self.lease.job_id, kind=self.lease.kind)
            self._leave_behind(code)
            return self._stopped_ending()
        if self._stopped is None:
            return code.result()
        if self._stopped == "yield" and not code.cancelled():
            ending = code.result()
            if ending is not None and ending.outcome == "completed":
                return ending
        return self._stopped_ending()

    async def _guarded(self) -> _Ending | None:
        """The job's code and all that it may raise. What it raised is not looked at where it was stopped."""
        try:
            history = await self._load()
            if history.was_lost:
                await self.journal.begin()  # code that crashes at once must count, too
            if self._stopped is not None:
                return self._stopped_ending()
            fault("after_load")
            self._max_attempts = history.submission.max_attempts or self._max_attempts
            return await self._run(history)
        except BaseException as error:  # noqa: BLE001 - anything that users' code raises ends or retries the job
            return self._raised_ending(error)

    async def _load(self) -> History:
        """The log without deltas; for a fresh job it came along with the lease."""
        history = History()
        if self.lease.queued:
            history.add(Entry(Cursor(1, 0), "job.queued", self.lease.queued))
            return history
        delay = 0.05
        while True:
            try:
                if await self._load_rest(history):
                    return history
                history = History()  # the log is not the one it was: begin again
            except StoreUnavailable:
                await asyncio.sleep(delay * random.uniform(0.5, 1.0))
                delay = min(1.0, delay * 2)
            except Shredded:
                raise  # it is there, and has to end
            except JobNotFound as error:
                raise Fenced("the job is gone") from error

    async def _load_rest(self, history: History) -> bool:
        """Read on from where the history ends; False where the log does not hold that place any more."""
        async for page in self._services.store.log.pages(self.lease.job_id, history.cursor):
            if not page.found and history.cursor != START:
                return False
            for entry in page.entries:
                history.add(entry)
        return True

    async def _run(self, history: History) -> _Ending:
        services = self._services
        replay = Replay(history, timeout=services.settings.replay_timeout, on_idle=self._parking.consider)
        news = News(services.store.log, self.journal, replay, history.cursor)
        self._replay, self._news = replay, news
        self._parking.replay = replay
        surroundings = Surroundings(
            app=services.app,
            store=services.store,
            settings=services.settings,
            providers=services.providers,
            clock=services.clock,
            should_stop=services.is_draining,
            is_stopped_for_good=lambda: self._stopped in {"cancel", "timeout"},
            is_struck=services.is_struck,
            processes=services.processes,
        )
        context = Context(self.lease, history, self.journal, replay, news, surroundings)
        if news.is_behind:
            self._read_news(news)
        result = await self._call(context)
        replay.require_complete()
        return await self._completed(context, result)

    async def _call(self, context: Context) -> Any:
        if self.lease.kind == CHAT:
            return await chat(context)
        workflow = self._services.app.find_workflow(self.lease.kind)
        submission = context.history.submission
        self._retry = workflow.retry
        self._max_attempts = submission.max_attempts or workflow.max_attempts or self._max_attempts
        if workflow.heartbeat_timeout is not None:
            self._watch_heartbeat(workflow.heartbeat_timeout)
        return await workflow.function(context, *workflow.arguments(submission.input))

    def _watch_heartbeat(self, timeout: float) -> None:
        """Stop code that works, and gives no sign of life, for too long."""
        silent = time.monotonic() - self.journal.touched
        if self._replay is not None and not self._replay.active and self._replay.waits:
            silent = 0.0
        if silent >= timeout:
            self._heartbeat_timeout = timeout
            self.stop("heartbeat")
        else:
            self._timers.append(
                self._loop.call_later(max(0.01, timeout - silent), self._watch_heartbeat, timeout)
            )

    async def _completed(self, context: Context, result: Any) -> _Ending:
        """The end of code that returned; a result too large for an event is an artifact."""
        settings, artifact, encoded = self._services.settings, "", b""
        try:
            encoded = encode_clean(result)
            if len(encoded) > settings.inline_output:
                artifact = "result"
                await context.store_artifact(artifact, encoded, "application/json")
        except LimitExceeded as error:
            why = f"the result has {len(encoded)} bytes: {error}"
            return self._failed_for_good(ErrorInfo("result_too_large", clean_message(why)))
        except UNENCODABLE as error:
            why = f"the result cannot be written as JSON: {error}"
            return self._failed_for_good(ErrorInfo("invalid_result", clean_message(why)))
        event = JobCompleted(
            ts=self._services.clock.now_ms(),
            result=msgspec.Raw(b"null" if artifact else encoded),
            summary=clean_text(context.summary)[:MAX_MESSAGE],
            artifact=artifact,
        )
        return _Ending("completed", event)

    def _failed_for_good(self, error: ErrorInfo) -> _Ending:
        return _Ending("failed", JobFailed(ts=self._services.clock.now_ms(), error=error))

    # --- what becomes of it

    def _stopped_ending(self) -> _Ending | None:
        match self._stopped:
            case "cancel":
                return _Ending("cancelled")
            case "timeout":
                return self._failed_for_good(ErrorInfo("timeout", "the job did not end within its timeout"))
            case "heartbeat":
                why = f"no sign of life for {self._heartbeat_timeout:g} s"
                return self._failed_ending(HeartbeatTimeout(why))
            case "yield":
                return _Ending("yield")
            case "refused":
                return self._raised_ending(LimitExceeded("the job is over its budget"))
            case _:
                return None

    def _raised_ending(self, error: BaseException) -> _Ending | None:
        error = self.journal.refused or error
        if any(isinstance(leaf, Fenced) for leaf in leaves(error)):
            return None
        return self._failed_ending(error)

    def _failed_ending(self, error: BaseException) -> _Ending:
        info, lease, settings = describe(error), self.lease, self._services.settings
        if self._stopped is None:
            log.info(
                "job.attempt_failed",
                job_id=lease.job_id,
                attempt=lease.attempt,
                code=info.code,
                exc_info=error if info.code == "exception" else None,
            )
        found = list(leaves(error))
        is_forbidden = self._retry is not None and any(self._retry.forbids(leaf, info.code) for leaf in found)
        if not info.retryable or is_forbidden or lease.attempt >= self._max_attempts:
            return self._failed_for_good(info)
        wish = max(
            (leaf.retry_after or 0.0 for leaf in found if isinstance(leaf, ProviderError)), default=0.0
        )
        own = Backoff(settings.retry_base, settings.retry_cap)
        delay = (self._retry.backoff if self._retry else own).delay(lease.attempt, at_least=wish)
        delay_ms, now = round(delay * 1000), self._services.clock.now_ms()
        event = JobRetrying(ts=now, attempt=lease.attempt, error=info, delay_ms=delay_ms)
        return _Ending("retry", event, delay_ms)

    async def _end(self, ending: _Ending | None) -> str:
        """Record what becomes of the job; decide again where something came in first."""
        if ending is None:
            return "fenced"
        self.is_ending = True
        fault("before_finish")
        while True:
            ending = self._within_budget(ending)
            if ending.outcome == "cancelled":
                self.journal.drop_deltas()
            try:
                answer = await self.journal.finish(ending.outcome, ending.event, delay_ms=ending.delay_ms)
            except LimitExceeded:
                continue
            if answer.verdict != "inbox":
                fault("after_finish")
                return ending.outcome
            if answer.asked == "cancel":
                ending = _Ending("cancelled")

    def _within_budget(self, ending: _Ending) -> _Ending:
        """A job over its budget fails, also where its code went on as if nothing had been refused."""
        refused = self.journal.refused
        if refused is None or ending.outcome not in {"completed", "retry"}:
            return ending
        error = ErrorInfo(refused.code, str(refused))
        return _Ending("failed", JobFailed(ts=self._services.clock.now_ms(), error=error))
