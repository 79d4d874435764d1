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
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec

from streamjobs.app import App
from streamjobs.config import Settings
from streamjobs.errors import Invalid, UnknownTool
from streamjobs.events import UNENCODABLE, Json, clean_text
from streamjobs.inputs import bounded, decode_shallow
from streamjobs.tool import Tool, ToolContext
from streamjobs.worker.calls import Raised, Returned, TimedOut, call
from streamjobs.worker.isolation.processes import NOT_STARTED, ToolProcesses, is_isolated
from streamjobs.worker.outcomes import ToolOutcome, failed, failed_by, outcome_of, timed_out
from streamjobs.worker.values import encode_clean


def idempotency_key(job_id: str, turn: int, call_id: str) -> str:
    """The key of a call's effect, the same over all attempts; fit for a header, whatever the model wrote."""
    digest = hashlib.blake2b(call_id.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()
    return f"{job_id}-{turn}-{digest}"


async def call_tool(
    app: App,
    settings: Settings,
    name: str,
    arguments: str | Json,
    context: ToolContext,
    processes: ToolProcesses | None = None,
) -> ToolOutcome:
    """Run one call to its outcome, within the tool's timeout.

    A str of `arguments` is the JSON text as the model wrote it (empty: no arguments); other values are JSON
    already. `processes` are for tools that are isolated. Raises `CancelledError` when the calling task is
    cancelled, and nothing else.
    """
    started = time.monotonic()
    outcome = await _call(app, settings, name, arguments, context, processes)
    return msgspec.structs.replace(outcome, ms=int((time.monotonic() - started) * 1000))


async def _call(
    app: App,
    settings: Settings,
    name: str,
    arguments: str | Json,
    context: ToolContext,
    processes: ToolProcesses | None,
) -> ToolOutcome:
    try:
        tool = app.find_tool(name)
        text = _argument_text(arguments)
        keywords = keywords_of(tool, text)
    except UnknownTool as error:
        return failed(error.code, str(error))
    except Invalid as error:
        return failed("invalid_arguments", str(error))
    timeout = tool.timeout or settings.tool_timeout
    if is_isolated(tool, settings):
        if processes is None:
            return failed(NOT_STARTED, "there are no processes for isolated tools here")
        return await processes.run(tool, text, context, timeout)
    connection = _Connection(context)
    if tool.context_parameter:
        keywords[tool.context_parameter] = connection.context
    function = functools.partial(tool.function, **keywords)
    try:
        return await _run(function, tool.is_async, settings.max_tool_output, timeout)
    finally:
        connection.is_over = True


# --- arguments ---------------------------------------------------------------------------------------


def _argument_text(arguments: str | Json) -> bytes:
    """The arguments of a call as JSON. Raises `Invalid`."""
    if isinstance(arguments, str):
        return clean_text(arguments).strip().encode() or b"{}"
    try:
        return encode_clean(arguments)
    except UNENCODABLE as error:
        raise Invalid(bounded(f"not JSON: {error}")) from error


def keywords_of(tool: Tool, text: bytes) -> dict[str, Any]:
    """Validate the arguments of a call and fill in the defaults. Raises `Invalid` that names the field."""
    struct = decode_shallow(msgspec.json.Decoder(tool.arguments_type), text)
    return {name: getattr(struct, name) for name in struct.__struct_fields__}


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
            return failed_by(error)
        case TimedOut(why):
            return timed_out(timeout, why)
