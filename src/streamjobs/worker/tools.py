"""Running one tool call: whatever happens in it becomes an outcome that the model sees.

Rule 1: only the cancellation of the caller's own task is raised; no tool fails a job or stops a worker.
Rule 2: a call's result is what its JSON decodes to, so the log, a replay and the model see the same.
Rule 3: once an outcome is known, the call is not heard any more: late progress is dropped.

A tool runs in a task, or a thread, of its own, under a guard that catches everything. So a `CancelledError`
that a tool raises by itself is told from ours, a `SystemExit` does not reach the event loop, and a tool that
ignores its cancellation is left behind. A thread cannot be killed: past its timeout it is abandoned, counted,
and replaced as long as not too many hang.

Rejected: `ThreadPoolExecutor` (and `asyncio.to_thread` on it) waits for its threads when the process ends, so
one hanging tool would keep a drained worker from ending. These threads are daemons.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import functools
import hashlib
import inspect
import queue
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any, cast

import msgspec

from streamjobs.app import MAX_DEPTH, App, Tool, ToolContext, bounded, decode_shallow, is_too_deep
from streamjobs.config import Settings
from streamjobs.errors import Invalid, ToolError, UnknownTool
from streamjobs.events import UNENCODABLE, ErrorInfo, Json, clean_text, encode_json

MAX_THREADS = 64
"""Sync calls that run at once; as many again may hang and be replaced."""

CANCEL_GRACE = 1.0
"""Seconds that a cancelled async tool has for its clean-up before it is left behind."""

MARKER_BYTES = 64
"""Room for the words that end a cut output."""


class ToolOutcome(msgspec.Struct, frozen=True):
    """What came of a call: an output, or an error."""

    output: Json = None
    error: ErrorInfo | None = None
    ms: int = 0


def idempotency_key(job_id: str, turn: int, call_id: str) -> str:
    """The key of a call's effect, the same over all attempts; fit for a header, whatever the model wrote."""
    digest = hashlib.blake2b(call_id.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()
    return f"{job_id}-{turn}-{digest}"


def tool_result_text(outcome: ToolOutcome) -> str:
    """What the model is told: a string as it is, other outputs as JSON, an error as `{"error": {...}}`."""
    if outcome.error is not None:
        return encode_json({"error": outcome.error}).decode()
    return outcome.output if isinstance(outcome.output, str) else encode_json(outcome.output).decode()


async def call_tool(
    app: App, settings: Settings, name: str, arguments: str | Json, context: ToolContext
) -> ToolOutcome:
    """Run one call to its outcome, within the tool's timeout.

    A str of `arguments` is the JSON text as the model wrote it (empty: no arguments); other values are JSON
    already. Raises `CancelledError` when the calling task is cancelled, and nothing else.
    """
    started = time.monotonic()
    outcome = await _call(app, settings, name, arguments, context)
    return msgspec.structs.replace(outcome, ms=int((time.monotonic() - started) * 1000))


async def _call(
    app: App, settings: Settings, name: str, arguments: str | Json, context: ToolContext
) -> ToolOutcome:
    try:
        tool = app.find_tool(name)
        keywords = _keywords(tool, arguments)
    except UnknownTool as error:
        return _failed(error.code, str(error))
    except Invalid as error:
        return _failed("invalid_arguments", str(error))
    call = _Call(context)
    if tool.context_parameter:
        keywords[tool.context_parameter] = call.context
    run = _run_async if tool.is_async else _run_in_thread
    timeout = tool.timeout or settings.tool_timeout
    try:
        return await run(functools.partial(tool.function, **keywords), settings.max_tool_output, timeout)
    finally:
        call.is_over = True


# --- arguments ---------------------------------------------------------------------------------------


def _keywords(tool: Tool, arguments: str | Json) -> dict[str, Any]:
    """Validate the arguments of a call and fill in the defaults. Raises `Invalid` that names the field."""
    if isinstance(arguments, str):
        text = clean_text(arguments).strip().encode() or b"{}"
    else:
        text = _encoded_arguments(arguments)
    struct = decode_shallow(msgspec.json.Decoder(tool.arguments_type), text)
    return {name: getattr(struct, name) for name in struct.__struct_fields__}


def _encoded_arguments(arguments: Json) -> bytes:
    try:
        return _encoded(arguments)
    except UNENCODABLE as error:
        raise Invalid(bounded(f"not JSON: {error}")) from error


class _Call:
    """What a tool's context is connected to: the worker's callbacks, until the call is over."""

    def __init__(self, context: ToolContext) -> None:
        self.is_over = False
        self._worker_context = context
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self.context = dataclasses.replace(context, on_progress=self._report, cancelled=self._is_cancelled)

    def _report(self, percent: float | None, message: str) -> None:
        if threading.get_ident() == self._thread:
            self._forward(percent, message)
        else:
            with contextlib.suppress(RuntimeError):  # an abandoned thread may outlive the loop
                self._loop.call_soon_threadsafe(self._forward, percent, message)

    def _forward(self, percent: float | None, message: str) -> None:
        if not self.is_over:
            self._worker_context.on_progress(percent, message)

    def _is_cancelled(self) -> bool:
        return self.is_over or self._worker_context.cancelled()


# --- running -----------------------------------------------------------------------------------------


async def _run_async(function: Callable[[], Awaitable[Any]], limit: int, timeout: float) -> ToolOutcome:
    task = asyncio.create_task(_guarded_async(function, limit))
    try:
        done, _ = await asyncio.wait({task}, timeout=timeout)
        if done:
            return task.result()
    finally:
        await _stop(task)
    return _timed_out(timeout, "" if task.done() else "; it ignores its cancellation and still runs")


async def _stop(task: asyncio.Task[ToolOutcome]) -> None:
    """Cancel a tool's task and give it the grace; if that is not enough, leave it behind."""
    if task.done():
        return
    _abandoned_tasks.add(task)
    task.add_done_callback(_abandoned_tasks.discard)
    task.cancel()
    await asyncio.wait({task}, timeout=CANCEL_GRACE)


async def _run_in_thread(function: Callable[[], Any], limit: int, timeout: float) -> ToolOutcome:
    variables = contextvars.copy_context()
    call = _threads.submit(lambda: variables.run(_guarded, function, limit))
    waiter = asyncio.wrap_future(call)
    try:
        done, _ = await asyncio.wait({waiter}, timeout=timeout)
        if done:
            return waiter.result()
    finally:
        waiter.cancel()
        has_run = _threads.abandon(call)
    if has_run:
        return _timed_out(timeout, "; its thread cannot be stopped and still runs")
    return _timed_out(timeout, f": no thread was free, {abandoned_calls()} hang in calls that timed out")


async def _guarded_async(function: Callable[[], Awaitable[Any]], limit: int) -> ToolOutcome:
    try:
        return _completed(await function(), limit)
    except BaseException as error:  # noqa: BLE001 - rule 1: whatever a tool raises is its outcome
        return _failed_by(error)


def _guarded(function: Callable[[], Any], limit: int) -> ToolOutcome:
    try:
        return _completed(function(), limit)
    except BaseException as error:  # noqa: BLE001 - rule 1: whatever a tool raises is its outcome
        return _failed_by(error)


class _Threads:
    """Daemon threads that take calls from one queue; started when needed, kept, bounded."""

    def __init__(self, limit: int = MAX_THREADS) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._calls: queue.SimpleQueue[tuple[Future[ToolOutcome], Callable[[], ToolOutcome]]] = (
            queue.SimpleQueue()
        )
        self._idle = threading.Semaphore(0)
        self._started = 0
        self._hanging: set[Future[ToolOutcome]] = set()

    @property
    def hanging(self) -> int:
        """Calls that were given up and still run."""
        return len(self._hanging)

    def submit(self, call: Callable[[], ToolOutcome]) -> Future[ToolOutcome]:
        """Run a call, which never raises, as soon as a thread is free."""
        future: Future[ToolOutcome] = Future()
        self._calls.put((future, call))
        with self._lock:
            may_start = self._started < self._limit + min(len(self._hanging), self._limit)
            if may_start and not self._idle.acquire(blocking=False):
                with contextlib.suppress(RuntimeError):  # the system has no thread left: wait for one of ours
                    threading.Thread(target=self._work, name=f"tool-{self._started}", daemon=True).start()
                    self._started += 1
        return future

    def abandon(self, call: Future[ToolOutcome]) -> bool:
        """Give a call up. False if it never began, and so never will; one that runs is counted to its end."""
        if call.cancel():
            return False
        with self._lock:
            self._hanging.add(call)
        call.add_done_callback(self._forget)  # at once, if it is done
        return True

    def _forget(self, call: Future[ToolOutcome]) -> None:
        with self._lock:
            self._hanging.discard(call)

    def _work(self) -> None:
        while True:
            try:
                future, call = self._calls.get_nowait()
            except queue.Empty:
                self._idle.release()
                future, call = self._calls.get()
            if future.set_running_or_notify_cancel():
                future.set_result(call())
            del future, call  # keep no result while waiting


_threads = _Threads()
_abandoned_tasks: set[asyncio.Task[ToolOutcome]] = set()


def abandoned_calls() -> int:
    """Calls of this process that were given up and still run; a number that grows means a broken tool."""
    return _threads.hanging + len(_abandoned_tasks)


def abandoned_tasks() -> frozenset[asyncio.Task[ToolOutcome]]:
    """The async calls among them."""
    return frozenset(_abandoned_tasks)


# --- outcomes ----------------------------------------------------------------------------------------


def _failed(code: str, message: str, *, retryable: bool = False) -> ToolOutcome:
    return ToolOutcome(error=ErrorInfo(code, bounded(message), retryable))


def _failed_by(error: BaseException) -> ToolOutcome:
    """What a tool raised; a `ToolError` is the tool's own words, all else is told with its type."""
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - the text of a foreign exception is foreign code
        text = ""
    if isinstance(error, ToolError):
        return _failed(error.code, text or "the tool refused the call")
    name = type(error).__name__
    return _failed(ToolError.code, f"{name}: {text}" if text else name)


def _timed_out(timeout: float, why: str) -> ToolOutcome:
    return _failed("tool_timeout", f"the tool did not answer within {timeout:g} s{why}", retryable=True)


def _completed(value: object, limit: int) -> ToolOutcome:
    """An output as its JSON decodes, cut to `limit` bytes."""
    if inspect.iscoroutine(value):
        value.close()
        return _failed(
            "tool_output", "the tool returned a coroutine: what decorates it must be async as well"
        )
    try:
        encoded = _encoded(value)
        output = msgspec.json.decode(encoded)
        if is_too_deep(output):
            raise RecursionError
    except RecursionError:
        return _failed(
            "tool_output", f"the tool's output nests deeper than {MAX_DEPTH} levels, or in a circle"
        )
    except UNENCODABLE as error:
        return _failed("tool_output", f"the tool's output is not JSON: {error}")
    if isinstance(output, str):
        return ToolOutcome(_cut(output.encode(), limit) or output)
    return ToolOutcome(_cut(encoded, limit) or output)


def _encoded(value: object) -> bytes:
    """The JSON of a value (NaN and infinity are null), without lone surrogates and NULs."""
    try:
        encoded = encode_json(value)
    except UnicodeEncodeError:
        return encode_json(_cleaned(msgspec.to_builtins(value, str_keys=True)))
    return encode_json(_cleaned(msgspec.json.decode(encoded))) if b"\\u0000" in encoded else encoded


def _cleaned(value: Json) -> Json:
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, list | tuple):
        return [_cleaned(one) for one in cast("list[Json]", value)]
    if isinstance(value, dict):
        items = cast("dict[str, Json]", value).items()
        return {clean_text(name): _cleaned(one) for name, one in items}
    return value


def _cut(text: bytes, limit: int) -> str:
    """The text cut to `limit` bytes, marker included, and never inside a character; empty if it fits."""
    if len(text) <= limit:
        return ""
    kept = text[: max(limit - MARKER_BYTES, 0)].decode("utf-8", "ignore")
    return kept + f"\n[cut: {len(text) - len(kept.encode())} of {len(text)} bytes left out]"
