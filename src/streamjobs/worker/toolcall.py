"""One tool call, from what was asked for to what is told of it.

Rule 1: `tool.started` is in the log before the tool's effect; a `once` tool that was started and never
recorded does not run again by itself.
Rule 2: every failure of a tool is an outcome; none fails the job.
Rule 3: a person is asked, and limits are waited for, before `tool.started`.
Rule 4: an isolated `once` tool whose process died is one that was started and never recorded.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import msgspec

from streamjobs import events as ev
from streamjobs import metrics
from streamjobs.config import without_secrets
from streamjobs.errors import Denied, Fenced, LimitExceeded, OutcomeUnknown
from streamjobs.events import ErrorInfo, Json, ToolCallRequest, clean_text
from streamjobs.faults import fault
from streamjobs.inputs import is_too_deep
from streamjobs.store import Permit
from streamjobs.tool import Rate, Tool, ToolContext
from streamjobs.worker.calls import Raised, Returned, call
from streamjobs.worker.outcomes import ToolOutcome, outcome_of
from streamjobs.worker.patience import patiently
from streamjobs.worker.tools import call_tool, idempotency_key
from streamjobs.worker.waits import approve, wait_while

if TYPE_CHECKING:
    from streamjobs.worker.context import Context

_UNKNOWN_OUTCOME = (
    "the tool was started and its outcome was never recorded: it may or may not have taken effect"
)


def _patience(times: int) -> float:
    """Seconds until a job that waits for a struck tool looks again."""
    return min(300.0, 15.0 * 2 ** min(times, 10))


class ToolCall:
    """One tool call, from what the model asked to what it is told."""

    def __init__(self, ctx: Context, tool: Tool | None, turn: int, call: ToolCallRequest) -> None:
        self._ctx = ctx
        self._tool = tool
        self._turn = turn
        self._call = call
        self._record = ctx.history.tool(call.call_id)
        self._was_recovered = False
        self.recorded: tuple[asyncio.Future[int], ev.Event] | None = None

    async def run(self, *, is_refused: bool = False) -> ToolOutcome:
        """The call's outcome: what is recorded of it, or what comes of it now."""
        outcome = self._recorded()
        if outcome is None:
            outcome = await self._fresh(is_refused)
            metrics.TOOL_CALLS.labels("failed" if outcome.error else "completed").inc()
        return outcome

    def _recorded(self) -> ToolOutcome | None:
        match self._record.outcome:
            case ev.ToolCompleted(output=output, ms=ms):
                return ToolOutcome(output=output, ms=ms)
            case ev.ToolFailed(error=error, ms=ms):
                return ToolOutcome(error=error, ms=ms)
            case ev.ToolUnknown(message=message):
                return ToolOutcome(error=ErrorInfo(OutcomeUnknown.code, message))
            case None:
                return None

    async def _fresh(self, is_refused: bool) -> ToolOutcome:
        if is_refused:
            limit = self._ctx.settings.max_tool_calls
            return self._failed(
                ErrorInfo("too_many_tool_calls", f"only {limit} tool calls are run in one round")
            )
        if self._tool is None:
            return self._failed(
                ErrorInfo("unknown_tool", f"there is no tool {clean_text(self._call.tool)!r}")
            )
        is_open = self._record.starts > 0 and "once" in {self._tool.effect, self._record.effect}
        was_asked = self._ctx.replay.is_known(("approval", self._call.call_id))
        if was_asked or (self._tool.approval and not is_open):
            denied = await self._approve(self._tool, "tool", self._tool.approval, self._call.call_id)
            if denied is not None:
                return self._failed(denied)
        if is_open:
            recovered = await self._recover(self._tool)
            if recovered is not None:
                return recovered
        await self._admission(self._tool)
        return await self._run(self._tool)

    async def _run(self, tool: Tool) -> ToolOutcome:
        with self._ctx.replay.working():
            async with self._place(tool):
                outcome = await self._attempt(tool)
            fault("after_tool_effect")
            if not outcome.is_lost or tool.effect != "once":
                self._finish(outcome)
                fault("after_tool_completed")
                return outcome
        return await self._after_loss(tool, outcome)

    def _place(self, tool: Tool) -> contextlib.AbstractAsyncContextManager[None]:
        processes = self._ctx.processes
        return contextlib.nullcontext() if processes is None else processes.place(tool)

    async def _attempt(self, tool: Tool) -> ToolOutcome:
        await self._start(tool)
        ctx, context = self._ctx, self._context()
        try:
            return await call_tool(
                ctx.app, ctx.settings, tool.name, self._call.arguments, context, ctx.processes
            )
        except asyncio.CancelledError:
            self._abandon()
            raise

    async def _after_loss(self, tool: Tool, outcome: ToolOutcome) -> ToolOutcome:
        """A `once` call whose process died: recovered as after a crash of the worker, but only one time."""
        assert outcome.error is not None
        why = f"{outcome.error.message}; it may or may not have taken effect"
        if self._was_recovered:
            return self._unknown(why)
        return await self._recover(tool, why) or await self._run(tool)

    # --- may it run

    async def _recover(self, tool: Tool, why: str = _UNKNOWN_OUTCOME) -> ToolOutcome | None:
        """A `once` call that was started and never recorded.

        What is known of it, None where it may run again.
        """
        self._was_recovered = True
        if tool.lookup is not None:
            return await self._look_up(tool, tool.lookup)
        if tool.recovery == "ask":
            question = f"{tool.name} was started and its outcome is not known. Run it again?"
            denied = await self._approve(tool, "recovery", question, f"{self._call.call_id}:again")
            if denied is None:
                return None
        return self._unknown(why)

    async def _look_up(self, tool: Tool, lookup: Callable[[str], Any]) -> ToolOutcome | None:
        """Ask the tool's own probe; `LookupError` says that nothing happened."""
        probe = functools.partial(lookup, self._key())
        timeout = tool.timeout or self._ctx.settings.tool_timeout
        with self._ctx.replay.working():
            result = await call(probe, is_async=inspect.iscoroutinefunction(lookup), timeout=timeout)
        if isinstance(result, Raised) and isinstance(result.error, LookupError):
            return None
        if not isinstance(result, Returned):
            return self._unknown()
        outcome = outcome_of(result.value, self._ctx.settings.max_tool_output)
        self._finish(outcome)
        return outcome

    async def _approve(self, tool: Tool, subject: str, question: str, key: str) -> ErrorInfo | None:
        """Ask a person; None where the call may run."""
        detail = {"tool": tool.name, "arguments": shown_arguments(self._call.arguments)}
        decision = await approve(self._ctx, key, subject=subject, message=question, detail=detail)
        if decision.approved:
            return None
        return ErrorInfo(Denied.code, clean_text(decision.comment) or "a person denied this call")

    async def _admission(self, tool: Tool) -> None:
        """Wait while the tool is struck, and until its rate limit has room."""
        ctx = self._ctx
        again = f"strike:{tool.name}"
        await wait_while(ctx, lambda: ctx.is_struck(tool.name), again, _patience(ctx.history.fired[again]))
        while tool.rate is not None:
            permit = await self._permit(tool.name, tool.rate)
            if permit.granted:
                with ctx.replay.working():
                    await asyncio.sleep(permit.wait)
                return
            until = ctx.loop.time() + permit.wait
            await wait_while(
                ctx, lambda until=until: ctx.loop.time() < until, f"rate:{tool.name}", permit.wait
            )

    async def _permit(self, name: str, rate: Rate) -> Permit:
        with self._ctx.replay.working():
            acquire = self._ctx.store.permits.acquire
            return await patiently(
                lambda: acquire(
                    f"tool:{name}",
                    rate=rate.calls / rate.seconds,
                    burst=rate.calls,
                    max_wait=self._ctx.settings.park_after,
                )
            )

    async def _start(self, tool: Tool) -> None:
        fault("before_tool_started")
        self._record.starts += 1
        self._ctx.journal.emit(
            ev.ToolStarted(
                ts=self._ctx.clock.now_ms(),
                call_id=self._call.call_id,
                idempotency_key=self._key(),
                effect=tool.effect,
                attempt=self._record.starts,
            )
        )
        await self._ctx.journal.commit()
        fault("after_tool_started")

    def _key(self) -> str:
        return idempotency_key(self._ctx.job_id, self._turn, self._call.call_id)

    def _context(self) -> ToolContext:
        return ToolContext(
            job_id=self._ctx.job_id,
            owner=self._ctx.owner,
            call_id=self._call.call_id,
            idempotency_key=self._key(),
            attempt=self._record.starts,
            settings=without_secrets(self._ctx.settings),
            on_progress=self._on_progress,
            cancelled=lambda: self._ctx.is_cancelled or self._ctx.journal.closed is not None,
        )

    def _on_progress(self, percent: float | None, message: str) -> None:
        """Record progress; it comes on the event loop, and only while the call runs."""
        event = ev.ToolProgress(
            ts=self._ctx.clock.now_ms(), call_id=self._call.call_id, percent=percent, message=message
        )
        # a job that is stopped or over its budget hears of it elsewhere
        with suppress(Fenced, LimitExceeded):
            self._ctx.journal.emit(event)

    def _finish(self, outcome: ToolOutcome) -> None:
        now = self._ctx.clock.now_ms()
        if outcome.error is not None:
            self._emit(ev.ToolFailed(ts=now, call_id=self._call.call_id, error=outcome.error, ms=outcome.ms))
        else:
            self._emit(
                ev.ToolCompleted(ts=now, call_id=self._call.call_id, output=outcome.output, ms=outcome.ms)
            )

    def _failed(self, error: ErrorInfo) -> ToolOutcome:
        outcome = ToolOutcome(error=error)
        self._finish(outcome)
        return outcome

    def _unknown(self, why: str = _UNKNOWN_OUTCOME) -> ToolOutcome:
        self._emit_unknown(why)
        return ToolOutcome(error=ErrorInfo(OutcomeUnknown.code, why))

    def _abandon(self) -> None:
        """The run is stopped while the tool runs: if no other run follows, its outcome is unknown."""
        if self._ctx.is_stopped_for_good:
            with suppress(Fenced, LimitExceeded):
                self._emit_unknown("the job was stopped while the tool ran")

    def _emit_unknown(self, message: str) -> None:
        self._emit(ev.ToolUnknown(ts=self._ctx.clock.now_ms(), call_id=self._call.call_id, message=message))

    def _emit(self, event: ev.Event) -> None:
        self.recorded = self._ctx.journal.emit_tracked(event), event


def shown_arguments(arguments: str) -> Json:
    """A call's arguments as people and folds see them: decoded where that is sane, else the text."""
    try:
        shown: Json = msgspec.json.decode(arguments.strip() or "{}")
    except ev.UNENCODABLE:
        return arguments
    return arguments if is_too_deep(shown) else shown
