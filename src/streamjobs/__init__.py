"""Durable AI jobs over Redis Streams."""

from streamjobs.app import Agent, App, ChatInput, ChatMessage, ToolContext
from streamjobs.config import Settings, load_settings
from streamjobs.errors import StreamjobsError, ToolError
from streamjobs.worker.context import Context

__all__ = [
    "Agent",
    "App",
    "ChatInput",
    "ChatMessage",
    "Context",
    "Settings",
    "StreamjobsError",
    "ToolContext",
    "ToolError",
    "load_settings",
]
