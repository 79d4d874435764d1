"""What a workflow's code sees: its job, its past, and the ways to record what it does.

Rule 1: a workflow runs from its start after every wake or crash; what is recorded is returned, not redone.
Rule 2: what a workflow says (progress, log lines, its own events) is said once: the first n of a kind are
skipped where the log has n.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from streamjobs import events as ev
from streamjobs.app import App, ChatInput, ChatMessage, Tool
from streamjobs.config import Settings
from streamjobs.errors import Invalid
from streamjobs.events import UNENCODABLE, Event, Json, clean_text, encode_json
from streamjobs.llm import Providers
from streamjobs.store import Lease
from streamjobs.worker.history import History
from streamjobs.worker.recorder import Journal

if TYPE_CHECKING:
    from streamjobs.worker.chat import ChatResult

_EVENT_NAME = re.compile(r"[a-z0-9_.-]{1,60}", re.ASCII)


class Clock:
    """Redis's clock as this process knows it: an offset to the local monotonic one."""

    def __init__(self, monotonic_ms: Callable[[], int]) -> None:
        self._monotonic_ms = monotonic_ms
        self._offset = 0

    def set(self, redis_ms: int) -> None:
        """Take over what a reply said."""
        self._offset = redis_ms - self._monotonic_ms()

    def now_ms(self) -> int:
        """Milliseconds since the epoch, by Redis's clock."""
        return self._monotonic_ms() + self._offset


class Context:
    """One run of one job. Workflows get it as their first argument."""

    def __init__(
        self,
        lease: Lease,
        history: History,
        journal: Journal,
        *,
        app: App,
        settings: Settings,
        providers: Providers,
        clock: Clock,
        should_stop: Callable[[], bool],
        is_stopped_for_good: Callable[[], bool],
    ) -> None:
        self.lease = lease
        self.history = history
        self.journal = journal
        self.app = app
        self.settings = settings
        self.providers = providers
        self.clock = clock
        self.turn = 0
        self.is_chatting = False
        self.call_ids: set[str] = set()
        self._should_stop = should_stop
        self._is_stopped_for_good = is_stopped_for_good

    @property
    def job_id(self) -> str:
        """The job's id."""
        return self.lease.job_id

    @property
    def owner(self) -> str:
        """Whose job it is."""
        return self.lease.owner

    @property
    def attempt(self) -> int:
        """1 for the first attempt, one more after each failed one."""
        return self.lease.attempt

    @property
    def metadata(self) -> dict[str, Json]:
        """What the submitter attached."""
        return self.history.submission.metadata

    @property
    def is_cancelled(self) -> bool:
        """Whether somebody asked for the job's end."""
        return self.journal.asked == "cancel"

    def progress(
        self,
        percent: float | None = None,
        message: str = "",
        *,
        step: int | None = None,
        steps: int | None = None,
    ) -> None:
        """Say how far the job is; `percent` is 0 to 100."""
        event = ev.JobProgress(
            ts=self.clock.now_ms(), percent=percent, step=step, steps=steps, message=clean_text(message)
        )
        self._say(event.type, event)

    def log(self, message: str, *, level: str = "info", data: Json = None) -> None:
        """Record a line for people."""
        event = ev.JobLog(ts=self.clock.now_ms(), level=level, message=clean_text(message), data=data)
        self._say(event.type, event)

    def emit(self, name: str, data: Json = None) -> None:
        """Record an event of the workflow's own; viewers get it as `x.<name>` with `data`.

        Raises `Invalid` for a name that is not of lower case letters, digits and `_.-`, or data not JSON.
        """
        if not _EVENT_NAME.fullmatch(name):
            raise Invalid(f"event name {name!r}: 1 to 60 of a-z, 0-9 and _.-")
        self._say(f"x.{name}", OwnEvent(ts=self.clock.now_ms(), name=name, data=data))

    async def chat(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[ChatMessage] = (),
        data: Json = None,
        agent: str = "",
        model: str = "",
        tools: Sequence[str | Callable[..., Any]] | None = None,
        parameters: dict[str, Json] | None = None,
    ) -> str:
        """Ask a model, let it use tools, and return its answer; deltas stream into this job's log.

        `data` is put behind the prompt as JSON. One chat of a job runs at a time. Raises `ProviderError`,
        `UnknownTool`, `UnknownAgent`, `Invalid`.
        """
        from streamjobs.worker.chat import converse

        if prompt is not None and data is not None:
            prompt = f"{prompt}\n\n{_as_text(data)}"
        names = None if tools is None else [self._tool(tool).name for tool in tools]
        request = ChatInput(
            prompt=prompt,
            messages=list(messages),
            agent=agent,
            model=model,
            tools=names,
            parameters=parameters or {},
        )
        result: ChatResult = await converse(self, request)
        return result.text

    @property
    def is_stopped_for_good(self) -> bool:
        """Whether this run is being stopped and no other one follows: the job was cancelled or timed out."""
        return self._is_stopped_for_good()

    def should_stop(self) -> bool:
        """Whether this run is to be handed back at its next recorded point (a drain or a pause)."""
        return self._should_stop() or self.journal.asked == "pause"

    def checkpoint(self) -> None:
        """A recorded point: hand the job back here where that is wanted."""
        if self.should_stop():
            raise HandBack

    def _tool(self, tool: str | Callable[..., Any]) -> Tool:
        return self.app.find_tool(tool)

    def _say(self, kind: str, event: Event) -> None:
        if self.history.emitted[kind] > 0:
            self.history.emitted[kind] -= 1
            return
        try:
            self.journal.emit(event)
        except UNENCODABLE as error:
            raise Invalid(f"{kind} cannot be stored as JSON: {error}") from error


class HandBack(BaseException):
    """Unwinds a workflow whose job is to be handed back; never seen by users' `except Exception`."""


class OwnEvent(Event, frozen=True, kw_only=True):
    """A user's own event; its type carries the name."""

    name: str = ""
    data: Json = None

    @property
    def type(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """`x.<name>`."""
        return f"x.{self.name}"


def _as_text(data: Json) -> str:
    try:
        return encode_json(msgspec.to_builtins(data)).decode()
    except UNENCODABLE as error:
        raise Invalid(f"data cannot be written as JSON: {error}") from error
