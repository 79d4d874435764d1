"""What a workflow's code sees: its job, its past, and the ways to record what it does.

Rule 1: a workflow runs from its start after every wake or crash; what is recorded is returned, not redone.
Rule 2: between what it records its code must be quick, and do the same in every run: no clock, no chance, no
input or output of its own. That is what steps are for.
Rule 3: what a workflow says (progress, log lines, its own events) is said once: the first n of a kind are
skipped where the log has n.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from streamjobs import events as ev
from streamjobs.app import App
from streamjobs.approvals import Decision
from streamjobs.config import Settings
from streamjobs.errors import Denied, Fenced, Invalid, LimitExceeded, OutcomeUnknown, StepError, WaitTimeout
from streamjobs.events import UNENCODABLE, Event, Json, clean_text, encode_json
from streamjobs.faults import fault
from streamjobs.inputs import ChatInput, ChatMessage
from streamjobs.llm import Providers
from streamjobs.retry import Retry
from streamjobs.safe_client import SafeClient
from streamjobs.store import Clock, Lease, Store
from streamjobs.tool import Effect, Tool
from streamjobs.worker.children import Child, spawn
from streamjobs.worker.history import History, Occurrence, OpKey, artifact_op
from streamjobs.worker.isolation.processes import ToolProcesses
from streamjobs.worker.news import News
from streamjobs.worker.outcomes import ToolOutcome
from streamjobs.worker.patience import patiently
from streamjobs.worker.recorder import Journal
from streamjobs.worker.replay import Replay
from streamjobs.worker.steps import ONCE, WITHIN, Step
from streamjobs.worker.toolcall import ToolCall, shown_arguments
from streamjobs.worker.values import digest, encode_clean
from streamjobs.worker.waits import approve, sleep, wait_for

if TYPE_CHECKING:
    from streamjobs.worker.chat import ChatResult

_RAISE: Any = object()
_EVENT_NAME = re.compile(r"[a-z0-9_.-]{1,60}", re.ASCII)


class Surroundings(NamedTuple):
    """What the worker gives a run beside its lease and its past."""

    app: App
    store: Store
    settings: Settings
    providers: Providers
    clock: Clock
    should_stop: Callable[[], bool]
    is_stopped_for_good: Callable[[], bool]
    is_struck: Callable[[str], bool]
    processes: ToolProcesses | None = None


class Context:
    """One run of one job. Workflows get it as their first argument.

    `summary`, if set, stands beside the job's result.
    """

    def __init__(
        self,
        lease: Lease,
        history: History,
        journal: Journal,
        replay: Replay,
        news: News,
        surroundings: Surroundings,
    ) -> None:
        self.summary = ""
        self.lease = lease
        self.history = history
        self.journal = journal
        self.replay = replay
        self.loop = asyncio.get_running_loop()
        self.app = surroundings.app
        self.store = surroundings.store
        self.settings = surroundings.settings
        self.providers = surroundings.providers
        self.clock = surroundings.clock
        self.processes = surroundings.processes
        self.turn = 0
        self.is_chatting = False
        self.call_ids: set[str] = set()
        self._news = news
        self._surroundings = surroundings
        self._thread = threading.get_ident()
        self._names: defaultdict[str, int] = defaultdict(int)
        self._artifacts: defaultdict[str, int] = defaultdict(int)

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
    def http(self) -> SafeClient:
        """HTTP for addresses that a stranger chose. Use it in steps: a second run finds something else."""
        return SafeClient(self.settings)

    @property
    def is_cancelled(self) -> bool:
        """Whether somebody asked for the job's end."""
        return self.journal.asked == "cancel"

    # --- doing

    async def step(
        self,
        name: str | Callable[..., Any],
        *given: Any,
        key: str = "",
        retry: Retry | int | None = None,
        timeout: float | None = None,
        effect: Effect = "idempotent",
        approval: str = "",
    ) -> Any:
        """Run `function(*arguments)` once and record what it returns: `ctx.step("scan", scan, file)`.

        The function may be async, or sync (it then runs in a thread); its output is JSON, or of the type
        that it says it returns. The step is known by its name and arguments, in a replay too; `key`
        replaces arguments that JSON does not know. The name may be left out where the function has one.

        `retry` (how often, or a policy) is none by default. `effect` "once" runs it at most once. With
        `approval` a person is asked first. Raises `StepError`, `OutcomeUnknown`, `Denied`, `Invalid`,
        `WorkflowChanged`.
        """
        function, arguments, called = _function_of(name, given)
        policy = Retry(attempts=retry) if isinstance(retry, int) else retry or ONCE
        step = Step(
            self,
            self.unique(_named(called, arguments, key)),
            called,
            function,
            arguments,
            retry=policy,
            timeout=timeout,
            effect=effect,
            approval=approval,
        )
        return await step.run()

    async def tool(self, tool: str | Callable[..., Any], /, **arguments: Any) -> Any:
        """Call a registered tool, with its limits, effects and approvals, and return its output.

        Raises `StepError` where the tool failed, `OutcomeUnknown`, `Denied`, `UnknownTool`.
        """
        known = self._tool(tool)
        call_id = f"call_{digest(self.unique(_named(known.name, [arguments], '')))}"
        text = encode_json(msgspec.to_builtins(arguments)).decode()
        request = ev.ToolCallRequest(call_id, known.name, text)
        op = ("tool", call_id)
        is_known = self.replay.is_known(op)
        told = self.replay.begin(op)
        if self.replay.has_outcome(op):
            await told
        elif not is_known:
            await self.begin_new()
            self.journal.emit(
                ev.ToolCalled(
                    ts=self.clock.now_ms(),
                    call_id=call_id,
                    tool=known.name,
                    arguments=shown_arguments(text),
                )
            )
        call = ToolCall(self, known, 0, request)
        outcome = await call.run()
        if call.recorded is not None:
            with self.replay.working():
                await self.tell_in_turn(op, *call.recorded)
        return _output_of(known.name, outcome)

    async def spawn(
        self,
        kind: str,
        input: object = None,  # noqa: A002 - the word of the API
        *,
        key: str = "",
        queue: str | None = None,
        priority: str | None = None,
        delay: float | None = None,
        timeout: float | None = None,
        max_attempts: int | None = None,
        concurrency_key: str | None = None,
        metadata: dict[str, Json] | None = None,
    ) -> Child:
        """Submit a child job and go on; `await child.result()` waits for it.

        It has this job's owner, and is cancelled with it. It is known by kind and input, or by `key`. Raises
        `Invalid`, `UnknownKind`, `UnknownQueue`, `TooDeep`, `TooManyChildren`.
        """
        options = {
            "queue": queue,
            "priority": priority,
            "delay": delay,
            "timeout": timeout,
            "max_attempts": max_attempts,
            "concurrency_key": concurrency_key,
            "metadata": metadata,
        }
        return await spawn(self, kind, input, key, options)

    async def join(self, *children: Child) -> list[Any]:
        """Wait for children.

        Their results in order. Raises `ChildFailed` for the first that did not complete.
        """
        return list(await asyncio.gather(*(child.result() for child in children)))

    # --- waiting

    async def sleep(self, seconds: float, *, key: str = "") -> None:
        """Sleep: past a few seconds without a worker, and through any crash."""
        await sleep(self, self.unique(f"sleep:{key or f'{seconds:g}'}"), seconds)

    async def wait_for(self, signal: str, *, timeout: float | None = None, default: Any = _RAISE) -> Json:
        """Wait for a signal of that name, also one that came before; its payload.

        Signals are read in the order in which they came, each once. After `timeout` seconds the `default` is
        returned, or without one `WaitTimeout`, a `TimeoutError`, is raised.
        """
        try:
            return await wait_for(self, signal, self.unique(f"signal:{signal}"), timeout)
        except WaitTimeout:
            if default is _RAISE:
                raise
            return default

    async def approve(
        self, message: str, *, detail: Json = None, timeout: float | None = None, key: str = ""
    ) -> Decision:
        """Ask a person to approve something, and wait for the decision (`approved`, `comment`, `by`).

        It is answered by a signal named `approval`. Raises `WaitTimeout`.
        """
        name = self.unique(key or f"job:{digest(message)}")
        return await approve(self, name, subject="job", message=message, detail=detail, timeout=timeout)

    # --- saying

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
        self._say(event)

    def log(self, message: str, *, level: str = "info", data: Json = None) -> None:
        """Record a line for people."""
        kept = _as_json(ev.JobLog.type, data)
        event = ev.JobLog(ts=self.clock.now_ms(), level=level, message=clean_text(message), data=kept)
        self._say(event)

    def heartbeat(self) -> None:
        """Say that the code is alive, where it records nothing for a long time; writes nothing."""
        self.journal.touched = time.monotonic()

    async def artifact(
        self, name: str, data: bytes | str | object, *, media_type: str = ""
    ) -> ev.ArtifactCreated:
        """Keep something with the job that is too large for its log: bytes, text, or any value as JSON.

        The same name replaces what was there before. Raises `LimitExceeded`, `Invalid` for a name that does
        not fit.
        """
        if isinstance(data, bytes):
            content, default = data, "application/octet-stream"
        elif isinstance(data, str):
            content, default = clean_text(data).encode(), "text/plain; charset=utf-8"
        else:
            content, default = encode_clean(data), "application/json"
        made = self._artifact(name, content, media_type or default)
        if made.within:
            await self._put_artifact(made, content)
            self.journal.emit(made)
            return made
        op = self._artifact_op(name)
        told = self.replay.begin(op)
        if self.replay.has_outcome(op):
            await told
            return made
        await self.begin_new()
        with self.replay.working():
            await self._put_artifact(made, content)
            await self.record(op, made)
        return made

    def emit(self, name: str, data: Json = None) -> None:
        """Record an event of the workflow's own; viewers get it as `x.<name>` with `data`.

        Raises `Invalid` for a name that is not of lower case letters, digits and `_.-`, or data not JSON.
        """
        if not _EVENT_NAME.fullmatch(name):
            raise Invalid(f"event name {name!r}: 1 to 60 of a-z, 0-9 and _.-")
        self._say(OwnEvent(ts=self.clock.now_ms(), name=name, data=_as_json(f"x.{name}", data)))

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
        result: ChatResult = await converse(self, request, self.unique(f"chat:{digest(request)}"))
        return result.text

    @property
    def is_stopped_for_good(self) -> bool:
        """Whether this run is being stopped and no other one follows: the job was cancelled or timed out."""
        return self._surroundings.is_stopped_for_good()

    def should_stop(self) -> bool:
        """Whether this run is to be handed back at its next recorded point (a drain or a pause)."""
        return self._surroundings.should_stop() or self.journal.asked == "pause"

    async def checkpoint(self) -> None:
        """A recorded point: hand the job back here where that is wanted."""
        if self.should_stop():
            await self.replay.rest()

    # --- for the operations

    def is_struck(self, tool: str) -> bool:
        """Whether an operator has struck this tool."""
        return self._surroundings.is_struck(tool)

    def unique(self, name: str) -> str:
        """The name, with an occurrence number where it was used before.

        Raises `Invalid` within a step, which is one operation and may not ask for others.
        """
        if WITHIN.get():
            raise Invalid(f"{name!r} within step {WITHIN.get()!r}: only the workflow itself may ask for that")
        self._names[name] += 1
        return name if self._names[name] == 1 else f"{name}#{self._names[name]}"

    def step_key(self, key: str) -> str:
        """The idempotency key of a step, the same over all attempts."""
        return f"{self.job_id}-{digest(key)}"

    async def begin_new(self) -> None:
        """Wait until something that the log does not have may begin. Raises `WorkflowChanged`."""
        await self.replay.ready()
        await self.checkpoint()
        if self.journal.is_full:
            await self.journal.room()

    async def record(self, op: OpKey, event: Event) -> None:
        """Commit an operation's outcome, and return when it is its turn to be told."""
        await self.tell_in_turn(op, self.journal.emit_tracked(event), event)

    async def tell_in_turn(self, op: OpKey, committed: asyncio.Future[int], event: Event) -> None:
        """Return once an outcome is in the log and all that came before it there was told."""
        seq = await committed
        if not self._news.is_behind and self.replay.passes():
            return
        self.replay.hold()
        try:
            self.replay.tell(Occurrence(seq, op, event))
            await self._news.catch_up()
        finally:
            self.replay.release()
        await self.replay.begin(op)

    async def store_artifact(self, name: str, content: bytes, media_type: str) -> ev.ArtifactCreated:
        """Store bytes beside the log, and say so in it where an earlier run did not."""
        event = self._artifact(name, content, media_type)
        await self._put_artifact(event, content)
        if not self.replay.has_outcome(self._artifact_op(name)):
            self.journal.emit(event)
        return event

    async def _put_artifact(self, made: ev.ArtifactCreated, content: bytes) -> None:
        put = self.store.artifacts.put
        await patiently(lambda: put(self.job_id, self.lease.epoch, made.name, made.media_type, content))
        fault("after_artifact_stored")

    def _artifact_op(self, name: str) -> OpKey:
        self._artifacts[name] += 1
        return artifact_op(name, self._artifacts[name])

    def _artifact(self, name: str, content: bytes, media_type: str) -> ev.ArtifactCreated:
        now = self.clock.now_ms()
        return ev.ArtifactCreated(
            ts=now, name=name, media_type=media_type, size=len(content), where="redis", within=WITHIN.get()
        )

    async def read_artifact(self, job_id: str, name: str) -> bytes:
        """The bytes of an artifact; waits while Redis is away, and nothing else is told meanwhile."""
        self.replay.hold()
        try:
            with self.replay.working():
                _, content = await patiently(lambda: self.store.artifacts.get(job_id, name))
                return content
        finally:
            self.replay.release()

    def _tool(self, tool: str | Callable[..., Any]) -> Tool:
        return self.app.find_tool(tool)

    def _say(self, event: ev.JobProgress | ev.JobLog | OwnEvent) -> None:
        """Record what the code says; from a step's thread, too."""
        step = WITHIN.get()
        if step:
            event = msgspec.structs.replace(event, within=step)
        elif self.history.emitted[event.type] > 0:
            self.history.emitted[event.type] -= 1
            return
        try:
            if threading.get_ident() == self._thread:
                self.journal.emit(event)
            else:
                encode_json(event)
                self.loop.call_soon_threadsafe(self._say_late, event)
        except UNENCODABLE as error:
            raise Invalid(f"{event.type} cannot be stored as JSON: {error}") from error

    def _say_late(self, event: Event) -> None:
        """What a thread said: its step may have been given up, or its job be over its budget."""
        with contextlib.suppress(Fenced, LimitExceeded):
            self.journal.emit(event)


class OwnEvent(Event, frozen=True, kw_only=True):
    """A user's own event; its type carries the name."""

    name: str = ""
    data: Json = None
    within: str = ""

    @property
    def type(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """`x.<name>`."""
        return f"x.{self.name}"


def _as_json(what: str, data: Json) -> Json:
    """What is said, encoded; without what JSON, or those behind it, cannot carry. Raises `Invalid`."""
    try:
        return None if data is None else msgspec.Raw(encode_clean(data))
    except UNENCODABLE as error:
        raise Invalid(f"{what} cannot be stored as JSON: {error}") from error


def _as_text(data: Json) -> str:
    try:
        return encode_json(msgspec.to_builtins(data)).decode()
    except UNENCODABLE as error:
        raise Invalid(f"data cannot be written as JSON: {error}") from error


def _function_of(
    name: str | Callable[..., Any], given: Sequence[Any]
) -> tuple[Callable[..., Any], Sequence[Any], str]:
    """What a step runs, with which arguments, and what it is called."""
    if isinstance(name, str):
        if not given or not callable(given[0]):
            raise TypeError(f"step {name!r}: expected a function behind its name")
        return given[0], given[1:], name
    called = getattr(name, "__name__", "")
    if not called or called == "<lambda>":
        raise TypeError("a step of a function without a name needs one: ctx.step('name', function, ...)")
    return name, given, called


def _named(name: str, arguments: Sequence[Any], key: str) -> str:
    """What an operation is known by: its name, and its key or a digest of its arguments."""
    if key:
        return f"{name}:{key}"
    if not arguments:
        return name
    try:
        return f"{name}:{digest(list(arguments))}"
    except UNENCODABLE as error:
        raise Invalid(f"{name!r}: its arguments are not JSON, give a key=: {error}") from error


def _output_of(name: str, outcome: ToolOutcome) -> Json:
    error = outcome.error
    if error is None:
        return outcome.output
    if error.code == Denied.code:
        raise Denied(error.message)
    if error.code == OutcomeUnknown.code:
        raise OutcomeUnknown(f"tool {name!r}: {error.message}")
    raise StepError(f"tool {name!r}: {error.message}", step_code=error.code, is_retryable=error.retryable)
