"""Running one tool call: whatever happens in it becomes an outcome that the model sees.

Rule 1: only the cancellation of the caller's own task is raised; no tool fails a job or stops a worker.
Rule 2: a call's result is what its JSON decodes to, so the log, a replay and the model see the same.
Rule 3: once an outcome is known, the call is not heard any more: late progress is dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import hashlib
import inspect
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec

from streamjobs.app import App
from streamjobs.config import Settings
from streamjobs.errors import Invalid, ToolError, UnknownTool
from streamjobs.events import UNENCODABLE, ErrorInfo, Json, clean_text, encode_json
from streamjobs.inputs import MAX_DEPTH, bounded, decode_shallow, is_too_deep
from streamjobs.tool import Tool, ToolContext
from streamjobs.worker.calls import Raised, Returned, TimedOut, call
from streamjobs.worker.values import encode_clean

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
    connection = _Connection(context)
    if tool.context_parameter:
        keywords[tool.context_parameter] = connection.context
    timeout = tool.timeout or settings.tool_timeout
    function = functools.partial(tool.function, **keywords)
    try:
        return await _run(function, tool.is_async, settings.max_tool_output, timeout)
    finally:
        connection.is_over = True


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
        return encode_clean(arguments)
    except UNENCODABLE as error:
        raise Invalid(bounded(f"not JSON: {error}")) from error


class _Connection:
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


async def _run(function: Callable[[], Any], is_async: bool, limit: int, timeout: float) -> ToolOutcome:
    """Run a tool; its output is encoded where it runs: a large one does not hold up the event loop."""

    async def produce() -> ToolOutcome:
        return outcome_of(await function(), limit)

    def produce_in_thread() -> ToolOutcome:
        return outcome_of(function(), limit)

    match await call(produce if is_async else produce_in_thread, is_async=is_async, timeout=timeout):
        case Returned(outcome):
            return outcome
        case Raised(error):
            return _failed_by(error)
        case TimedOut(why):
            return _timed_out(timeout, why)


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


def outcome_of(value: object, limit: int) -> ToolOutcome:
    """An output as its JSON decodes, cut to `limit` bytes."""
    if inspect.iscoroutine(value):
        value.close()
        return _failed(
            "tool_output", "the tool returned a coroutine: what decorates it must be async as well"
        )
    try:
        encoded = encode_clean(value)
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


def _cut(text: bytes, limit: int) -> str:
    """The text cut to `limit` bytes, marker included, and never inside a character; empty if it fits."""
    if len(text) <= limit:
        return ""
    kept = text[: max(limit - MARKER_BYTES, 0)].decode("utf-8", "ignore")
    return kept + f"\n[cut: {len(text) - len(kept.encode())} of {len(text)} bytes left out]"
