"""What a workflow waits for.

Time, signals, approvals. Each survives the worker; a long wait gives its slot up.

Rule 1: a wait that has a timeout is in the log before it waits (`timer.set`), so that a replay can tell which
came first, the signal or the end of the time.
Rule 2: time is the store's: its sweep fires the timers, also of jobs that run.
Rule 3: an answer that came before it was asked for is read only when the question itself has been told: its
place in the log is that of the later of the two.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from streamjobs import events as ev
from streamjobs.approvals import Decision
from streamjobs.errors import WaitTimeout
from streamjobs.events import Json
from streamjobs.faults import fault
from streamjobs.worker.history import Occurrence, OpKey
from streamjobs.worker.questions import TIMEOUT as APPROVAL_TIMEOUT
from streamjobs.worker.replay import Wait

if TYPE_CHECKING:
    from streamjobs.worker.context import Context

_POLL = 0.25


async def sleep(ctx: Context, key: str, seconds: float) -> None:
    """Wait for `seconds`, by a timer of the store; a short while in memory, recorded all the same.

    Otherwise a replay, which does not wait, would go on before what came first in the first run.
    """
    op = ("timer", key)
    known = ctx.history.timers.get(key) if ctx.replay.is_known(op) else None
    is_short = seconds <= ctx.settings.park_after if known is None else known.in_worker
    if is_short:
        await _doze(ctx, op, seconds)
    else:
        await _wait_for_timer(ctx, key, seconds)


async def _doze(ctx: Context, op: OpKey, seconds: float) -> None:
    is_known = ctx.replay.is_known(op)
    told = ctx.replay.begin(op)
    if ctx.replay.has_outcome(op):
        await told
        return
    if not is_known:
        await ctx.begin_new()
        delay = max(0, round(seconds * 1000))
        ctx.journal.emit_soon(ev.TimerSet(ts=ctx.clock.now_ms(), key=op[1], delay_ms=delay, in_worker=True))
    with ctx.replay.working():
        await asyncio.sleep(seconds)
        await ctx.record(op, ev.TimerFired(ts=ctx.clock.now_ms(), key=op[1]))


async def pause(ctx: Context, key: str, seconds: float) -> None:
    """Wait for `seconds` within an operation: a short while is not recorded, as its outcome will be."""
    if seconds > ctx.settings.park_after or ctx.replay.is_known(("timer", key)):
        await _wait_for_timer(ctx, key, seconds)
    elif not ctx.replay.is_replaying:
        with ctx.replay.working():
            await asyncio.sleep(seconds)


async def _wait_for_timer(ctx: Context, key: str, seconds: float) -> None:
    timer, wait = await begin_timer(ctx, key, seconds)
    await ctx.replay.wait(wait, timer)


async def begin_timer(
    ctx: Context, key: str, seconds: float, *, asks: bool = False
) -> tuple[asyncio.Future[Occurrence], Wait]:
    """Set a timer, unless the log has it; the future becomes its firing. With `asks`, return in its turn."""
    op = ("timer", key)
    is_known = ctx.replay.is_known(op)
    fired = ctx.replay.begin(op)
    known = ctx.history.timers.get(key)
    if is_known and known is not None:
        if asks:
            await _asked_before(ctx, key)
        return fired, Wait("timer", until=known.ts + known.delay_ms, is_timer=True)
    await ctx.begin_new()
    event = ev.TimerSet(ts=ctx.clock.now_ms(), key=key, delay_ms=max(0, round(seconds * 1000)))
    ctx.journal.set_timer(key, event.delay_ms)
    committed = ctx.journal.emit_tracked(event)
    fault("after_timer_set")
    if asks:
        await _asked_now(ctx, key, committed, event)
    return fired, Wait("timer", until=event.ts + event.delay_ms, is_timer=True)


async def _asked_before(ctx: Context, key: str) -> None:
    op = ("asked", key)
    if ctx.replay.has_outcome(op):
        await ctx.replay.begin(op)


async def _asked_now(ctx: Context, key: str, committed: asyncio.Future[int], event: ev.Event) -> None:
    with ctx.replay.working():
        await ctx.tell_in_turn(("asked", key), committed, event)


async def wait_for(ctx: Context, name: str, key: str, timeout: float | None) -> Json:
    """The payload of the next signal of that name that nobody read. Raises `WaitTimeout`."""
    reason = f"signal:{name}"
    if timeout is None:
        letter: Occurrence = await ctx.replay.wait(Wait(reason), ctx.replay.read(name))
        return _payload(letter)
    timer, wait = await begin_timer(ctx, key, timeout, asks=True)
    reader = ctx.replay.read(name)
    first = await ctx.replay.wait(wait._replace(reason=reason, is_timer=False), reader, timer)
    if first.op[0] == "timer":
        if reader.done():
            ctx.replay.put_back(reader.result())
        reader.cancel()
        raise WaitTimeout(f"no signal {name!r} came within {timeout:g} s")
    _clear(ctx, key, timer)
    return _payload(first)


async def approve(
    ctx: Context,
    key: str,
    *,
    subject: str,
    message: str,
    detail: Json = None,
    timeout: float | None = None,
) -> Decision:
    """Ask a person, and wait for the answer; one of an earlier attempt of the job stands.

    Raises `WaitTimeout`.
    """
    decided = ctx.history.decisions.get(key)
    if decided is not None:
        return decided
    await _request(
        ctx,
        ev.ApprovalRequested(
            key=key,
            subject=subject,
            message=message,
            detail=detail,
            timeout_ms=round((timeout or 0) * 1000),
        ),
    )
    reason = f"{APPROVAL_TIMEOUT}{key}"
    if timeout is None:
        return (await ctx.replay.wait(Wait(reason), ctx.replay.ask_for_decision(key))).decision
    timer, wait = await begin_timer(ctx, reason, timeout, asks=True)
    decision = ctx.replay.ask_for_decision(key)
    first = await ctx.replay.wait(wait._replace(reason=reason, is_timer=False), decision, timer)
    if first.op[0] == "timer":
        decision.cancel()
        raise WaitTimeout(f"nobody approved or denied {message!r} within {timeout:g} s")
    _clear(ctx, reason, timer)
    return first.decision


async def _request(ctx: Context, request: ev.ApprovalRequested) -> None:
    """Write the request, unless the log has it, and return in its turn."""
    op, asked = ("approval", request.key), f"request:{request.key}"
    is_known = ctx.replay.is_known(op)
    ctx.replay.begin(op)
    if is_known:
        await _asked_before(ctx, asked)
        return
    await ctx.begin_new()
    event = msgspec.structs.replace(request, ts=ctx.clock.now_ms())
    committed = ctx.journal.emit_tracked(event)
    fault("after_approval_requested")
    await _asked_now(ctx, asked, committed, event)


async def wait_while(ctx: Context, is_so: Callable[[], bool], reason: str, delay: float) -> None:
    """Wait until something of the worker's own is no longer so; parked, ask again after `delay` seconds."""
    if not is_so():
        return
    over: asyncio.Future[None] = ctx.loop.create_future()

    def look() -> None:
        if over.done():
            return
        if is_so():
            ctx.loop.call_later(_POLL, look)
        else:
            over.set_result(None)

    ctx.loop.call_later(_POLL, look)
    wait = Wait(reason, until=ctx.clock.now_ms() + round(delay * 1000), delay_ms=round(delay * 1000))
    await ctx.replay.wait(wait, over)


def _clear(ctx: Context, key: str, timer: asyncio.Future[Any]) -> None:
    """The timeout of a wait that was answered need not wake anybody."""
    if not timer.done():
        ctx.journal.set_timer(key, -1)


def _payload(letter: Occurrence) -> Json:
    event = letter.event
    assert isinstance(event, ev.SignalReceived)
    return event.payload
