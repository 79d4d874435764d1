"""One step of a workflow: run, tried again, recorded once; on a replay told from the log.

Rule 1: a completed step never runs again. One that failed for good fails again until the job's next attempt.
Rule 2: a `once` step is in the log before it runs; one that was started and never recorded is `step.unknown`.
Rule 3: what the code gets is what the log holds, in the first run as in a replay.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import msgspec

from streamjobs import events as ev
from streamjobs import metrics
from streamjobs.errors import (
    Denied,
    Fenced,
    Invalid,
    LimitExceeded,
    OutcomeUnknown,
    Permanent,
    StepError,
    StepTimeout,
)
from streamjobs.events import ErrorInfo, Event
from streamjobs.faults import fault
from streamjobs.retry import Retry
from streamjobs.tool import Effect
from streamjobs.worker.calls import Raised, Returned, TimedOut, call
from streamjobs.worker.described import describe
from streamjobs.worker.history import pause_key
from streamjobs.worker.values import UNENCODABLE, decode_as, encode_clean, returned_type, seen_again
from streamjobs.worker.waits import approve, pause

if TYPE_CHECKING:
    from streamjobs.worker.context import Context

ONCE = Retry(attempts=1)
"""The policy of steps that name none: the job's own attempts try them again."""

WITHIN: contextvars.ContextVar[str] = contextvars.ContextVar("step", default="")
"""The step whose function runs, in its task and its threads."""

_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._:@#=-]")
_UNKNOWN = "the step was started and its outcome was never recorded: it may or may not have taken effect"


class Step:
    """One step, from what the code asks for to what it gets."""

    def __init__(
        self,
        ctx: Context,
        key: str,
        name: str,
        function: Callable[..., Any],
        arguments: Sequence[Any],
        *,
        retry: Retry = ONCE,
        timeout: float | None = None,
        effect: Effect = "idempotent",
        approval: str = "",
    ) -> None:
        self._ctx = ctx
        self._key = key
        self._name = name
        self._function = function
        self._arguments = arguments
        self._retry = retry
        self._timeout = timeout
        self._effect = effect
        self._approval = approval
        self._op = ("step", key)
        self._hint = returned_type(function)

    async def run(self) -> Any:
        """The step's output. Raises `StepError`, `OutcomeUnknown`, `Denied`."""
        replay = self._ctx.replay
        is_known = replay.is_known(self._op)
        outcome = replay.begin(self._op)
        if replay.has_outcome(self._op):
            return await self._told((await outcome).event)
        was_asked = replay.is_known(("approval", self._key))
        if was_asked or (self._approval and not self._ctx.history.step(self._key).attempt):
            await self._ask()
        if not is_known:
            await self._ctx.begin_new()
        return await self._attempts()

    async def _told(self, event: Event) -> Any:
        """What the log says came of it."""
        match event:
            case ev.StepCompleted(artifact=""):
                return self._decoded(encode_clean(event.output))
            case ev.StepCompleted(artifact=artifact):
                return self._decoded(await self._ctx.read_artifact(self._ctx.job_id, artifact))
            case ev.StepFailed(error=error):
                raise self._failure(error)
            case ev.StepUnknown(message=message):
                raise OutcomeUnknown(f"step {self._name!r}: {message}")
            case _:
                raise AssertionError(event)

    def _decoded(self, encoded: bytes) -> Any:
        try:
            return decode_as(self._hint, encoded)
        except msgspec.ValidationError as error:
            raise Invalid(
                f"step {self._name!r}: what is recorded of it is no {self._hint}: {error}"
            ) from error

    def _failure(self, error: ErrorInfo) -> Exception:
        if error.code == Denied.code:
            return Denied(error.message)
        return StepError(
            f"step {self._name!r}: {error.message}", step_code=error.code, is_retryable=error.retryable
        )

    # --- running it

    async def _attempts(self) -> Any:
        record = self._ctx.history.step(self._key)
        await self._pass_recorded_pauses(record.failed_attempt)
        is_open = record.attempt > record.failed_attempt
        if is_open and "once" in {self._effect, record.effect}:
            await self._give_up(ev.StepUnknown(key=self._key, message=_UNKNOWN))
            raise OutcomeUnknown(f"step {self._name!r}: {_UNKNOWN}")
        attempt = record.failed_attempt + 1
        while True:
            failed = await self._attempt(attempt)
            if isinstance(failed, _Output):
                return failed.value
            if failed.delay is None:
                raise self._failure(failed.info) from failed.cause
            await self._pause_before(attempt, failed.delay)
            attempt += 1

    async def _attempt(self, attempt: int) -> _Output | _Failed:
        """Run it once and record what came of it."""
        started = time.monotonic()
        with self._ctx.replay.working():
            await self._start(attempt)
            try:
                result = await self._call()
            except asyncio.CancelledError:
                self._abandon()
                raise
            fault("after_step_effect")
            ms = int((time.monotonic() - started) * 1000)
            if isinstance(result, Returned):
                output = await self._complete(result.value, attempt, ms)
                if isinstance(output, _Output):
                    metrics.STEPS.labels("completed").inc()
                    return output
                result = Raised(output)
            metrics.STEPS.labels("failed").inc()
            return await self._fail(result, attempt, ms)

    async def _start(self, attempt: int) -> None:
        ctx = self._ctx
        event = ev.StepStarted(
            ts=ctx.clock.now_ms(),
            key=self._key,
            attempt=attempt,
            name=self._name,
            effect=self._effect,
            idempotency_key=ctx.step_key(self._key),
        )
        if self._effect == "once":
            ctx.journal.emit(event)
            await ctx.journal.commit()
        else:
            ctx.journal.emit_soon(event)
        fault("after_step_started")

    async def _call(self) -> Returned | Raised | TimedOut:
        token = WITHIN.set(self._key)
        try:
            return await self._called()
        finally:
            WITHIN.reset(token)

    async def _called(self) -> Returned | Raised | TimedOut:
        function = functools.partial(self._function, *self._arguments)
        is_async = inspect.iscoroutinefunction(self._function)
        if not is_async or self._timeout is not None:
            return await call(function, is_async=is_async, timeout=self._timeout)
        try:
            return Returned(await function())
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return Raised(error)
        except BaseException as error:  # noqa: BLE001 - whatever users' code raises is the step's failure
            return Raised(error)

    def _abandon(self) -> None:
        """The run is stopped while the step runs: if no other run follows, its outcome is unknown."""
        if self._effect == "once" and self._ctx.is_stopped_for_good:
            with suppress(Fenced, LimitExceeded):
                message = "the job was stopped while the step ran"
                event = ev.StepUnknown(ts=self._ctx.clock.now_ms(), key=self._key, message=message)
                self._ctx.journal.emit(event)

    async def _complete(self, value: object, attempt: int, ms: int) -> _Output | Exception:
        """Record the output; an error where it is none that could be recorded."""
        ctx, artifact = self._ctx, ""
        try:
            encoded = encode_clean(value)
            output = seen_again(self._hint, value, encoded)
            if len(encoded) > ctx.settings.inline_output:
                artifact = _NOT_IN_NAMES.sub("_", f"step-{self._key}")[:200]
                await ctx.store_artifact(artifact, encoded, "application/json")
        except LimitExceeded as error:
            return Permanent(f"its output of {len(encoded)} bytes is too large: {error}")  # pyright: ignore[reportPossiblyUnboundVariable]
        except UNENCODABLE as error:
            return Permanent(f"its output cannot be recorded as JSON: {error}")
        shown = None if artifact else msgspec.Raw(encoded)
        event = ev.StepCompleted(
            ts=ctx.clock.now_ms(), key=self._key, attempt=attempt, output=shown, ms=ms, artifact=artifact
        )
        await ctx.record(self._op, event)
        fault("after_step_recorded")
        return _Output(output)

    async def _fail(self, result: Raised | TimedOut, attempt: int, ms: int) -> _Failed:
        if isinstance(result, TimedOut):
            error: BaseException = StepTimeout(f"it did not end within {self._timeout:g} s{result.why}")
        else:
            error = result.error
        if self._ctx.journal.refused is not None or isinstance(error, Fenced):
            raise error
        info = describe(error)
        may_retry = info.retryable and not self._retry.forbids(error, info.code)
        delay = None
        if may_retry and attempt < self._retry.attempts and self._effect != "once":
            delay = self._retry.backoff.delay(attempt)
        event = ev.StepFailed(
            ts=self._ctx.clock.now_ms(),
            key=self._key,
            error=msgspec.structs.replace(info, retryable=may_retry),
            attempt=attempt,
            ms=ms,
            will_retry=delay is not None,
            delay_ms=round((delay or 0) * 1000),
        )
        if delay is None:
            await self._ctx.record(self._op, event)
        else:
            self._ctx.journal.emit(event)
        return _Failed(event.error, delay, error)

    async def _give_up(self, event: ev.StepUnknown | ev.StepFailed) -> None:
        with self._ctx.replay.working():
            stamped = msgspec.structs.replace(event, ts=self._ctx.clock.now_ms())
            await self._ctx.record(self._op, stamped)

    # --- waiting for it

    async def _ask(self) -> None:
        shown = {"step": self._name, "arguments": _shown(self._arguments)}
        decision = await approve(self._ctx, self._key, subject="step", message=self._approval, detail=shown)
        if not decision.approved:
            message = decision.comment or "denied"
            error = ErrorInfo(Denied.code, message)
            await self._give_up(ev.StepFailed(key=self._key, error=error))
            raise Denied(message)

    async def _pause_before(self, failed_attempt: int, delay: float) -> None:
        await pause(self._ctx, self._pause_key(failed_attempt), delay)

    async def _pass_recorded_pauses(self, failed_attempts: int) -> None:
        """Ask again for the pauses between earlier attempts, as far as they were recorded."""
        for attempt in range(1, failed_attempts + 1):
            key = self._pause_key(attempt)
            if self._ctx.replay.is_known(("timer", key)):
                await pause(self._ctx, key, 0.0)

    def _pause_key(self, attempt: int) -> str:
        return pause_key(self._key, attempt, self._ctx.attempt)


class _Output(msgspec.Struct):
    value: Any


class _Failed(msgspec.Struct):
    """A failed attempt; None in `delay` where it was the last."""

    info: ErrorInfo
    delay: float | None
    cause: BaseException


def _shown(arguments: Sequence[Any]) -> Any:
    try:
        return msgspec.to_builtins(list(arguments), str_keys=True)
    except UNENCODABLE:
        return [repr(argument)[:200] for argument in arguments]
