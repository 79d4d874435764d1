"""Runs git, so that nothing of it is left when the step that wanted it is cancelled.

Rule 1: git runs in a process group of its own; leaving the block kills all of it.
Rule 2: it never asks anybody anything, and speaks English, since its words are read here.
Rule 3: what git refuses once it refuses again (`Permanent`), unless it was the network.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncGenerator
from pathlib import Path

from streamjobs import Permanent

_QUIET = {"GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
_NETWORK = re.compile(
    r"resolve host|timed out|connection|early EOF|RPC failed|remote end hung up|unexpected disconnect"
    r"|error: 5\d\d",
    re.IGNORECASE,
)


async def git(folder: Path, *arguments: str) -> str:
    """What a git command in `folder` prints. Raises `Permanent` or `ConnectionError` with git's own words."""
    async with running("-C", str(folder), *arguments) as process:
        out, err = await process.communicate()
    require_success(process, err.decode(errors="replace"))
    return out.decode(errors="surrogateescape")


@contextlib.asynccontextmanager
async def running(*arguments: str, env: dict[str, str] | None = None) -> AsyncGenerator[Process]:
    """A git that runs; when the block ends, it and all that it started have ended, too."""
    process = await asyncio.create_subprocess_exec(
        "git",
        *arguments,
        env={**os.environ, **_QUIET, **(env or {})},
        stdin=DEVNULL,
        stdout=PIPE,
        stderr=PIPE,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


def require_success(process: Process, said: str) -> None:
    """Raise what git's exit status and last words mean."""
    if process.returncode == 0:
        return
    words = " ".join(said.split())[-500:] or f"exit status {process.returncode}"
    if _NETWORK.search(words):
        raise ConnectionError(f"git: {words}")
    raise Permanent(f"git: {words}")
