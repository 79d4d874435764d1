"""Durable AI jobs over Redis Streams.

The names are imported when they are first used, so that `streamjobs --help` and a client alone load neither
Redis nor a web server.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streamjobs.app import Agent, App, ChatInput, ChatMessage, ToolContext
    from streamjobs.approvals import Decision
    from streamjobs.config import Settings, load_settings
    from streamjobs.errors import (
        ChildFailed,
        Denied,
        OutcomeUnknown,
        Permanent,
        StepError,
        StreamjobsError,
        ToolError,
        WaitTimeout,
    )
    from streamjobs.retry import Retry
    from streamjobs.worker.children import Child
    from streamjobs.worker.context import Context

__all__ = [
    "Agent",
    "App",
    "ChatInput",
    "ChatMessage",
    "Child",
    "ChildFailed",
    "Context",
    "Decision",
    "Denied",
    "OutcomeUnknown",
    "Permanent",
    "Retry",
    "Settings",
    "StepError",
    "StreamjobsError",
    "ToolContext",
    "ToolError",
    "WaitTimeout",
    "load_settings",
]

_HOMES = {
    "streamjobs.approvals": ("Decision",),
    "streamjobs.app": ("Agent", "App", "ChatInput", "ChatMessage", "ToolContext"),
    "streamjobs.config": ("Settings", "load_settings"),
    "streamjobs.errors": (
        "ChildFailed",
        "Denied",
        "OutcomeUnknown",
        "Permanent",
        "StepError",
        "StreamjobsError",
        "ToolError",
        "WaitTimeout",
    ),
    "streamjobs.retry": ("Retry",),
    "streamjobs.worker.children": ("Child",),
    "streamjobs.worker.context": ("Context",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'streamjobs' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
