"""How events look on a terminal: text as it streams, everything else as one line each."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, cast

from rich.console import Console
from rich.text import Text

from streamjobs.cli.output import printable
from streamjobs.client import WatchedEvent

_STYLES = {
    "job.completed": "bold green",
    "job.failed": "bold red",
    "job.cancelled": "bold yellow",
    "job.lost": "bold red",
    "job.retrying": "yellow",
    "turn.restarted": "bold yellow",
    "tool.called": "cyan",
    "tool.completed": "green",
    "tool.failed": "red",
    "tool.unknown": "magenta",
    "reset": "bold red",
    "error": "bold red",
}
_MAX = 110


class Screen:
    """Prints events. Deltas run on; any other event begins a line of its own."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._in_text = False

    def show(self, event: WatchedEvent) -> None:
        """Print one event."""
        if event.type == "text.delta":
            self._stream(event.data["text"], "white")
        elif event.type == "reasoning.delta":
            self._stream(event.data["text"], "dim italic")
        else:
            self.line(_summary(event), _STYLES.get(event.type, "dim"), event.id.partition("-")[0])

    def line(self, text: str, style: str = "", number: str = "") -> None:
        """Print a line of its own."""
        self._end_text()
        self.console.print(
            Text.assemble((f"{number:>5} " if number else "      ", "dim"), (printable(text), style))
        )

    def say(self, text: str) -> None:
        """Print what the program itself has to say."""
        self._end_text()
        self.console.print(Text(text, style="bold blue"))

    def _stream(self, text: str, style: str) -> None:
        if not self._in_text:
            self.console.print("      ", end="")
        self._in_text = True
        self.console.print(Text(printable(text).replace("\n", "\n      "), style=style), end="")
        sys.stdout.flush()

    def _end_text(self) -> None:
        if self._in_text:
            self.console.print()
            self._in_text = False


def _summary(event: WatchedEvent) -> str:
    data: dict[str, Any] = event.data
    words = _WORDS.get(event.type)
    detail = words(data) if words is not None else ""
    line = f"{event.type}  {detail}".rstrip()
    return line if len(line) <= _MAX else line[: _MAX - 1] + "…"


def _call(data: dict[str, Any]) -> str:
    arguments: Any = data.get("arguments")
    if isinstance(arguments, dict):
        named = cast("dict[str, Any]", arguments)
        arguments = ", ".join(f"{name}={value!r}" for name, value in named.items())
    return f"{data['tool']}({arguments})"


def _output(data: dict[str, Any]) -> str:
    text = " ".join(str(data.get("output")).split())
    return f"{data.get('ms', 0)} ms  {text}"


def _error(data: dict[str, Any]) -> str:
    error: dict[str, Any] = data.get("error") or {}
    return f"{error.get('code')}: {error.get('message')}"


_WORDS: dict[str, Callable[[dict[str, Any]], str]] = {
    "job.queued": lambda d: (
        f"{d['kind']} in {d.get('queue', 'default')}" + (f", held: {d['held']}" if d.get("held") else "")
    ),
    "job.started": lambda d: (
        f"attempt {d['attempt']} on {d['worker']}"
        + (f", going on from {d['resumed_from']}" if d.get("resumed_from") else "")
    ),
    "job.lost": lambda d: f"{d.get('worker')} is gone (crash {d.get('crashes', 0)})",
    "job.retrying": lambda d: f"in {d.get('delay_ms', 0)} ms: {_error(d)}",
    "job.requeued": lambda d: d.get("why", ""),
    "job.failed": _error,
    "job.cancelled": lambda d: (
        f"{d.get('effective_ms', 0)} ms after the request, {d.get('deltas_after', 0)} deltas written after it"
    ),
    "job.progress": lambda d: f"{d.get('percent') or ''} {d.get('message', '')}".strip(),
    "job.log": lambda d: f"{d.get('level', 'info')}: {d.get('message', '')}",
    "turn.started": lambda d: f"{d['turn']} {d.get('model', '')}",
    "turn.restarted": lambda d: (
        f"{d['turn']}, attempt {d['attempt']}: text since {d['supersedes_from']} no longer stands"
    ),
    "turn.completed": lambda d: f"{d['turn']} {d.get('finish_reason', '')}",
    "tool.called": _call,
    "tool.started": lambda d: f"{d['call_id']} ({d['effect']}, attempt {d.get('attempt', 1)})",
    "tool.completed": _output,
    "tool.failed": _error,
    "tool.unknown": lambda d: d.get("message", ""),
    "snapshot": lambda d: f"{d['status']}, {len(d.get('text', ''))} characters so far",
    "reset": lambda d: f"{d.get('reason')}",
    "error": lambda d: str(d.get("detail") or d.get("title")),
}
