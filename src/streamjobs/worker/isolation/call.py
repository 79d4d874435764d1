"""An isolated tool's own process: find the function, give up what it may not have, call it, answer, end.

Rule 1: limits and privileges are set after the function was found and before it runs.
Rule 2: whatever happens there is one line on the pipe, or silence; the process ends by `_exit`, so that
nothing of what was forked along (buffers, exit hooks, threads that hang) has a say.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import operator
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from streamjobs.config import Settings
from streamjobs.events import encode_json
from streamjobs.tool import Tool, ToolContext
from streamjobs.worker.isolation import confinement
from streamjobs.worker.isolation.messages import NOT_STARTED, Answer, Progress, Request
from streamjobs.worker.outcomes import ToolOutcome, failed, failed_by, outcome_of
from streamjobs.worker.tools import keywords_of

OUT_OF_MEMORY = "tool_memory"


class Pipe:
    """The way to the supervisor."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, message: Progress | Answer) -> None:
        """Say one thing; whole, however large."""
        left = memoryview(encode_json(message) + b"\n")
        while left:
            left = left[os.write(self._descriptor, left) :]

    def report(self, percent: float | None, message: str) -> None:
        """What a tool's context calls for progress."""
        self.write(Progress(percent, message))


def run(request: Request, pipe: Pipe, folder: Path) -> None:
    """Run the call and write its answer. `folder` is the call's own, and where it begins."""
    outcome = _outcome(request, pipe, folder)
    pipe.write(Answer(outcome.output, outcome.error))


def _outcome(request: Request, pipe: Pipe, folder: Path) -> ToolOutcome:
    try:
        function = _bound(request, pipe)
    except BaseException as error:  # noqa: BLE001 - importing is foreign code
        return failed(NOT_STARTED, f"its process cannot load it: {type(error).__name__}: {error}")
    _confine(request, folder)
    try:
        return outcome_of(function(), request.settings["max_tool_output"])
    except MemoryError:
        del function
    except BaseException as error:  # noqa: BLE001 - whatever it raises is an answer
        return failed_by(error)
    return _out_of_memory(request.limits.memory)


def _bound(request: Request, pipe: Pipe) -> Callable[[], Any]:
    """The function with its arguments; an async one is run on a loop of its own."""
    function = operator.attrgetter(request.function)(importlib.import_module(request.module))
    tool = Tool.of(function, name=request.tool, description="")
    keywords = keywords_of(tool, bytes(request.arguments))
    if tool.context_parameter:
        settings = msgspec.convert(request.settings, Settings)
        context = ToolContext(**request.context, settings=settings, on_progress=pipe.report)
        keywords[tool.context_parameter] = context
    if tool.is_async:
        return lambda: asyncio.run(function(**keywords))
    return lambda: function(**keywords)


def _confine(request: Request, folder: Path) -> None:
    os.chdir(folder)
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    confinement.drop_privileges()
    confinement.leave_others_alone()
    confinement.limit(request.limits)


def _out_of_memory(most: int) -> ToolOutcome:
    confinement.make_room()
    gc.collect()
    return failed(OUT_OF_MEMORY, f"the tool took more memory than the {most >> 20} MB that it may have")
