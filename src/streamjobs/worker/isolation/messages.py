"""What worker, supervisor and an isolated tool's process say to each other.

Rule 1: worker and supervisor send frames: a letter, a length, and so many bytes.
Rule 2: a tool's process writes lines of JSON, which the supervisor passes on unread, so many bytes in all.
Rule 3: whoever reads what a tool wrote believes nothing of it.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, Literal

import msgspec

from streamjobs.config import FIELDS, Settings
from streamjobs.events import ErrorInfo, Json

HEAD = struct.Struct("!cI")

REQUEST = b"r"
"""Worker to supervisor, once: what to run."""
STARTED = b"s"
"""Supervisor to worker, once: the supervisor's process id."""
SAID = b"d"
"""What the tool's process wrote."""
ENDED = b"e"
"""The last one: how it ended. Nothing of it runs any more."""

NOT_STARTED = "tool_not_started"
"""The code of a call whose tool never ran."""

EndReason = Literal["exited", "timeout", "too_much", "cancelled", "not_started"]


class Limits(msgspec.Struct, frozen=True):
    """What a tool's process may take; bytes, a number of files, seconds."""

    memory: int
    file: int
    files: int
    output: int
    timeout: float

    @classmethod
    def of(cls, settings: Settings, timeout: float) -> Limits:
        """The limits that the settings name."""
        return cls(
            memory=settings.tool_process_memory,
            file=settings.tool_process_file,
            files=settings.tool_process_files,
            output=settings.tool_process_output,
            timeout=timeout,
        )


class Request(msgspec.Struct, frozen=True):
    """One call: all that its process is told."""

    module: str
    function: str
    tool: str
    arguments: msgspec.Raw
    limits: Limits
    settings: dict[str, Any]
    context: dict[str, Any]


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """A line that says how far the tool is."""

    percent: float | None = None
    message: str = ""


class Answer(msgspec.Struct, frozen=True, tag="answer"):
    """The line that says what came of the call."""

    output: Json = None
    error: ErrorInfo | None = None


class End(msgspec.Struct, frozen=True):
    """How the tool's process ended: why, its exit status (negative: a signal), or what went wrong before."""

    reason: EndReason
    status: int = 0
    error: str = ""


def frame(kind: bytes, payload: bytes = b"") -> bytes:
    """One message on the wire."""
    return HEAD.pack(kind, len(payload)) + payload


def shown_settings(settings: Settings) -> dict[str, Any]:
    """The settings that an isolated tool's context has; all others are at their defaults there."""
    names = (name for name in FIELDS if name in _SHOWN or name.startswith("fetch_"))
    shown = {name: getattr(settings, name) for name in names}
    root = settings.files_root  # it may be relative, and the tool begins elsewhere
    return shown | {"files_root": str(Path(root).absolute()) if root else ""}


_SHOWN = frozenset({"max_tool_output", "tool_timeout"})
