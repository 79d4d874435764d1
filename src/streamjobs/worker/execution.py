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
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import msgspec
import structlog

from streamjobs import metrics
from streamjobs.app import CHAT, App
from streamjobs.config import Settings
from streamjobs.cursor import START, Cursor
from streamjobs.errors import (
    Fenced,
    JobNotFound,
    LimitExceeded,
    ProviderError,
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
    encode_json,
)
from streamjobs.faults import fault
from streamjobs.llm import Providers
from streamjobs.retry import Backoff
from streamjobs.store import Entry, Lease, Outcome, Store
from streamjobs.worker.chat import chat
from streamjobs.worker.context import Clock, Context, HandBack
from streamjobs.worker.history import History
from streamjobs.worker.recorder import Committer, Journal

log = structlog.get_logger(__name__)

_MAX_MESSAGE = 2000
_UNWIND_TIMEOUT = 1.0
"""Seconds that code has to clean up when the worker drops everything."""

Stop = Literal["cancel", "fenced", "timeout", "yield"]


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
            outcome = await self._end(await self._advance())
        except Fenced:
            outcome = "fenced"
        finally:
            for timer in self._timers:
                timer.cancel()
        metrics.JOBS_DONE.labels(outcome).inc()
        metrics.JOB_SECONDS.observe(time.monotonic() - started)

    def stop(self, why: Stop) -> None:
        """Interrupt the job's code; what becomes of the job follows from the first `why`."""
        if self._stopped is not None or self.is_ending:
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
            return _completed(await self._run(history), self._services)
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

    async def _run(self, history: History) -> Any:
        services = self._services
        context = Context(
            self.lease,
            history,
            self.journal,
            app=services.app,
            settings=services.settings,
            providers=services.providers,
            clock=services.clock,
            should_stop=services.is_draining,
            is_stopped_for_good=lambda: self._stopped in {"cancel", "timeout"},
        )
        if self.lease.kind == CHAT:
            return await chat(context)
        workflow = services.app.find_workflow(self.lease.kind)
        self._max_attempts = history.submission.max_attempts or workflow.max_attempts or self._max_attempts
        return await workflow.function(context, *workflow.arguments(history.submission.input))

    # --- what becomes of it

    def _stopped_ending(self) -> _Ending | None:
        now = self._services.clock.now_ms()
        match self._stopped:
            case "cancel":
                return _Ending("cancelled")
            case "timeout":
                error = ErrorInfo("timeout", "the job did not end within its timeout")
                return _Ending("failed", JobFailed(ts=now, error=error))
            case "yield":
                return _Ending("yield")
            case _:
                return None

    def _raised_ending(self, error: BaseException) -> _Ending | None:
        error = self.journal.refused or error
        leaves = list(_leaves(error))
        if any(isinstance(leaf, Fenced) for leaf in leaves):
            return None
        if any(isinstance(leaf, HandBack) for leaf in leaves):
            return _Ending("yield")
        return self._failed_ending(error, leaves)

    def _failed_ending(self, error: BaseException, leaves: list[BaseException]) -> _Ending:
        info = _describe(error, leaves)
        now, settings = self._services.clock.now_ms(), self._services.settings
        if self._stopped is None:
            trace = error if info.code == "exception" else None
            lease = self.lease
            log.info(
                "job.attempt_failed",
                job_id=lease.job_id,
                attempt=lease.attempt,
                code=info.code,
                exc_info=trace,
            )
        if not info.retryable or self.lease.attempt >= self._max_attempts:
            return _Ending("failed", JobFailed(ts=now, error=info))
        wish = max(
            (leaf.retry_after or 0.0 for leaf in leaves if isinstance(leaf, ProviderError)), default=0.0
        )
        delay = Backoff(settings.retry_base, settings.retry_cap).delay(self.lease.attempt, at_least=wish)
        delay_ms = round(delay * 1000)
        event = JobRetrying(ts=now, attempt=self.lease.attempt, error=info, delay_ms=delay_ms)
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


def _completed(result: Any, services: Services) -> _Ending:
    now = services.clock.now_ms()
    try:
        encoded = encode_json(result)
    except UNENCODABLE as error:
        info = ErrorInfo("invalid_result", _clean(f"the result cannot be written as JSON: {error}"))
        return _Ending("failed", JobFailed(ts=now, error=info))
    if len(encoded) > services.settings.max_event_bytes:
        info = ErrorInfo(
            "result_too_large", f"the result has {len(encoded)} bytes; max_event_bytes allows fewer"
        )
        return _Ending("failed", JobFailed(ts=now, error=info))
    return _Ending("completed", JobCompleted(ts=now, result=msgspec.Raw(encoded)))


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """An error, or all that a group of them holds."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
            yield from _leaves(inner)  # pyright: ignore[reportUnknownArgumentType]
    else:
        yield error


def _describe(error: BaseException, leaves: list[BaseException]) -> ErrorInfo:
    """What is told of an error; a group of several is as its first, and retryable if all are."""
    infos = [_describe_one(leaf) for leaf in leaves]
    if len(infos) == 1:
        return infos[0]
    message = _clean(f"{_text(error)}: {'; '.join(info.message for info in infos[:5])}")
    return ErrorInfo(infos[0].code, message, all(info.retryable for info in infos))


def _describe_one(error: BaseException) -> ErrorInfo:
    text = _text(error)
    if isinstance(error, StreamjobsError):
        retryable = error.is_retryable if isinstance(error, ProviderError) else error.retryable
        return ErrorInfo(error.code, _clean(text), retryable)
    name = type(error).__name__
    return ErrorInfo("exception", _clean(f"{name}: {text}" if text else name), retryable=True)


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - the text of a foreign exception is foreign code
        return ""


def _clean(message: str) -> str:
    return clean_text(message)[:_MAX_MESSAGE]
