"""The registry of a program: its tools, agents, workflows, schedules; what a submission is checked against.

Rule 1: worker and gateway import the same App; nothing here touches Redis or a provider.
Rule 2: a registration that cannot work raises at import, it never becomes a failed job.
Rule 3: what a client sent raises `Invalid`, or a subclass, that names the field.
Rule 4: a decorated function stays what it was: it can be called, tested and named as before.
"""

from __future__ import annotations

import difflib
import importlib
import operator
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, TypeVar, overload

import msgspec

from streamjobs.agent import Agent, AgentFunction
from streamjobs.canary import CANARY
from streamjobs.canary import WORKFLOW as CANARY_WORKFLOW
from streamjobs.config import Settings
from streamjobs.cron import Timing
from streamjobs.errors import ConfigError, UnknownAgent, UnknownKind, UnknownTool
from streamjobs.events import Json, encode_json
from streamjobs.inputs import MAX_DEPTH, ChatInput, ChatMessage, bounded, require_no_ours
from streamjobs.retry import Retry
from streamjobs.schedule import Missed, Overlap, Priority, Schedule
from streamjobs.tool import TOOL_NAME, Effect, Recovery, Tool, ToolContext, listed, name_of
from streamjobs.workflow import Workflow

__all__ = [
    "CHAT",
    "MAX_DEPTH",
    "Agent",
    "App",
    "ChatInput",
    "ChatMessage",
    "Tool",
    "ToolContext",
    "Workflow",
    "load_app",
]

CHAT = "chat"
"""The kind that every App has; the worker brings its implementation."""


NAME = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,63}")


Function = TypeVar("Function", bound=Callable[..., Any])


# --- the registry ------------------------------------------------------------------------------------


class App:
    """The tools, agents, workflows and schedules of one program.

    `builtin_tools=False` starts without those of `streamjobs.builtin`, or with your own of the same names.
    """

    def __init__(self, *, name: str = "app", builtin_tools: bool = True) -> None:
        self.name = name
        self._tools: dict[str, Tool] = {}
        self._agents: dict[str, Agent] = {}
        self._workflows: dict[str, Workflow] = {}
        self._schedules: dict[str, Schedule] = {}
        if builtin_tools:
            from streamjobs.builtin import BUILTIN_TOOLS  # it is written with Tool and ToolContext

            for tool in BUILTIN_TOOLS:
                self.add_tool(tool)

    def __repr__(self) -> str:
        return f"<App {self.name!r}: kinds {listed(self.kinds)}>"

    @property
    def tools(self) -> Mapping[str, Tool]:
        """Every registered tool by its name."""
        return MappingProxyType(self._tools)

    @property
    def agents(self) -> Mapping[str, Agent]:
        """Every agent by its name."""
        return MappingProxyType(self._agents)

    @property
    def workflows(self) -> Mapping[str, Workflow]:
        """The program's own workflows by their kind; `chat` is not among them."""
        return MappingProxyType(self._workflows)

    @property
    def schedules(self) -> Mapping[str, Schedule]:
        """Every schedule by its name; workers make the store's the same when they start."""
        return MappingProxyType(self._schedules)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Every kind of job that may be submitted: `chat`, then the program's own."""
        return (CHAT, *self._workflows)

    @overload
    def tool(self, function: Function, /) -> Function: ...

    @overload
    def tool(
        self,
        /,
        *,
        name: str | None = None,
        description: str | None = None,
        timeout: float | None = None,
        effect: Effect = "idempotent",
        approval: bool | str = False,
        rate: str | None = None,
        recovery: Recovery = "tell",
        lookup: Callable[[str], Any] | None = None,
        isolated: bool = False,
    ) -> Callable[[Function], Function]: ...

    def tool(
        self,
        function: Callable[..., Any] | None = None,
        /,
        *,
        name: str | None = None,
        description: str | None = None,
        timeout: float | None = None,
        effect: Effect = "idempotent",
        approval: bool | str = False,
        rate: str | None = None,
        recovery: Recovery = "tell",
        lookup: Callable[[str], Any] | None = None,
        isolated: bool = False,
    ) -> Callable[..., Any]:
        """Register a function that models may call; with or without parentheses.

        The schema comes from the type hints, the description from the docstring. `timeout` of None is the
        setting `tool_timeout`. With `approval` (what to ask, or True) a person is asked before each call.
        `rate` (`"30/m"`) bounds the calls of all workers together. `lookup` and `recovery` say what becomes
        of a `once` call whose worker died: `lookup(key)` returns its output or raises `LookupError`;
        without it the caller is told that the outcome is unknown, or with `recovery="ask"` a person
        decides. An `isolated` one runs in a process of its own, with limits, and without our secrets; it
        must be a function of a module.

        Raises what `Tool.of` raises, and `ValueError` for a name that is taken.
        """

        def register(function: Function) -> Function:
            tool = Tool.of(
                function,
                name=name,
                description=description,
                timeout=timeout,
                effect=effect,
                approval=approval,
                rate=rate,
                recovery=recovery,
                lookup=lookup,
                isolated=isolated,
            )
            self.add_tool(tool)
            return function

        return register if function is None else register(function)

    def add_tool(self, tool: Tool) -> None:
        """Register a tool that was made with `Tool.of`."""
        _require_new("tool", tool.name, self._tools, TOOL_NAME)
        self._tools[tool.name] = tool

    def offered_tools(self, settings: Settings) -> dict[str, Tool]:
        """The tools that work with these settings: one that needs an empty setting is left out."""
        works = (tool for tool in self._tools.values() if not tool.needs or getattr(settings, tool.needs))
        return {tool.name: tool for tool in works}

    def find_tool(self, tool: str | Callable[..., Any]) -> Tool:
        """The tool of that name, or made of that function. Raises `UnknownTool`."""
        if isinstance(tool, str):
            if tool in self._tools:
                return self._tools[tool]
            raise UnknownTool(_unknown("tool", tool, self._tools))
        for known in self._tools.values():
            if known.function == tool:
                return known
        raise UnknownTool(f"{getattr(tool, '__name__', tool)!r} is not registered as a tool")

    @overload
    def agent(self, function: AgentFunction, /) -> Agent: ...

    @overload
    def agent(
        self,
        name: str,
        *,
        role: str = "",
        backstory: str = "",
        instructions: str = "",
        model: str = "",
        parameters: Mapping[str, Json] | None = None,
        tools: Sequence[str | Callable[..., Any]] = (),
    ) -> Agent: ...

    @overload
    def agent(
        self,
        *,
        role: str = "",
        backstory: str = "",
        instructions: str = "",
        model: str = "",
        parameters: Mapping[str, Json] | None = None,
        tools: Sequence[str | Callable[..., Any]] = (),
    ) -> Callable[[AgentFunction], Agent]: ...

    def agent(
        self,
        name: str | AgentFunction | None = None,
        *,
        role: str = "",
        backstory: str = "",
        instructions: str = "",
        model: str = "",
        parameters: Mapping[str, Json] | None = None,
        tools: Sequence[str | Callable[..., Any]] = (),
    ) -> Agent | Callable[[AgentFunction], Agent]:
        """Register an agent: `app.agent("editor", role="an editor")`, or as a decorator of a function.

        Decorated, the agent is named after the function unless a name is given; the docstring gives the
        instructions unless they are given; and a string that the function returns, called with the
        `ChatInput` (or nothing, if it takes nothing), replaces them for that input.

        `tools` are names or functions, registered before. Raises `UnknownTool` for others, and `ValueError`
        for a name that is taken or does not fit.
        """
        require_no_ours(parameters or {})
        known_tools = tuple(self.find_tool(tool).name for tool in tools)

        def register(agent_name: str) -> Agent:
            _require_new("agent", agent_name, self._agents, NAME)
            agent = Agent(
                name=agent_name,
                role=role,
                backstory=backstory,
                instructions=instructions,
                model=model,
                parameters=dict(parameters or {}),
                tools=known_tools,
                registry=self._agents,
            )
            self._agents[agent_name] = agent
            return agent

        if isinstance(name, str):
            return register(name)
        if name is not None:
            return register(name_of(name))(name)
        return lambda function: register(name_of(function))(function)

    def find_agent(self, name: str) -> Agent:
        """The agent of that name. Raises `UnknownAgent`."""
        if name in self._agents:
            return self._agents[name]
        raise UnknownAgent(_unknown("agent", name, self._agents))

    def workflow(
        self,
        kind: str,
        *,
        timeout: float | None = None,
        max_attempts: int | None = None,
        queue: str | None = None,
        retry: Retry | None = None,
        heartbeat_timeout: float | None = None,
    ) -> Callable[[Function], Function]:
        """Register `async def f(ctx, input: T) -> R` as what jobs of this kind run; `input` may be absent.

        `retry` says how often a failed job is tried and after which delays. An attempt that records
        nothing, and calls no `ctx.heartbeat()`, for longer than `heartbeat_timeout` seconds of work fails.

        Raises what `Workflow.of` raises, and `ValueError` for a kind that is taken, as `chat` is.
        """

        def register(function: Function) -> Function:
            _require_new("workflow", kind, (*self.kinds, CANARY), NAME)
            self._workflows[kind] = Workflow.of(
                kind,
                function,
                timeout=timeout,
                max_attempts=max_attempts,
                queue=queue,
                retry=retry,
                heartbeat_timeout=heartbeat_timeout,
            )
            return function

        return register

    def find_workflow(self, kind: str) -> Workflow:
        """The workflow of that kind: the program's own, or the canary's. Raises `UnknownKind`."""
        if kind in self._workflows:
            return self._workflows[kind]
        if kind == CANARY:
            return CANARY_WORKFLOW
        raise UnknownKind(_unknown("kind", kind, self.kinds))

    def run_inline(
        self,
        kind: str,
        input: object = None,  # noqa: A002 - the word of the API
        *,
        settings: Settings | None = None,
        owner: str = "inline",
        timeout: float | None = None,
        signals: Mapping[str, Any] | None = None,
        on_event: Callable[[str, Any], None] | None = None,
    ) -> Any:
        """Run a job of this kind here, without any server, and return its result.

        For tests and small scripts.

        In a running event loop it is to be awaited. `signals` are there from the start: a name and its
        payload, or a list of payloads (an approval is `{"approval": "approve"}`). `on_event` is called with
        the job's id and each event. Raises `InlineJobFailed`, whose `view` says how it ended, and what a
        submission raises.
        """
        inline = importlib.import_module("streamjobs.worker.inline")  # a layer above
        work = inline.run(
            self,
            kind,
            input,
            settings=settings,
            owner=owner,
            timeout=timeout,
            signals=signals,
            on_event=on_event,
        )
        return inline.run_here(work)

    def schedule(
        self,
        name: str,
        kind: str,
        *,
        cron: str = "",
        timezone: str = "UTC",
        every: float = 0.0,
        offset: float = 0.0,
        input: Json = None,  # noqa: A002 - what it is called everywhere
        owner: str = "system",
        queue: str = "",
        priority: Priority = "default",
        metadata: Mapping[str, Json] | None = None,
        thread_id: str = "",
        timeout: float | None = None,
        max_attempts: int | None = None,
        concurrency_key: str = "",
        missed: Missed = "skip",
        overlap: Overlap = "allow",
    ) -> Schedule:
        """Register a job that recurs: by `cron` in a `timezone`, or `every` so many seconds.

        What is not said here, the workflow says, which must be registered before. Raises `Invalid`,
        `UnknownKind`, what `check_submission` raises for the input, and `ValueError` for a name that is taken
        or does not fit.
        """
        _require_new("schedule", name, self._schedules, NAME)
        raw_input = msgspec.Raw(encode_json(input))
        self.check_submission(kind, raw_input)
        workflow = self._workflows.get(kind)
        schedule = Schedule(
            name=name,
            kind=kind,
            timing=Timing(cron=cron, timezone=timezone, every=every, offset=offset),
            owner=owner,
            input=raw_input,
            queue=queue or (workflow and workflow.queue) or "",
            priority=priority,
            metadata=dict(metadata or {}),
            thread_id=thread_id,
            timeout=timeout if timeout is not None else workflow and workflow.timeout,
            max_attempts=max_attempts or (workflow and workflow.max_attempts) or 0,
            concurrency_key=concurrency_key,
            missed=missed,
            overlap=overlap,
        )
        self._schedules[name] = schedule
        return schedule

    def check_submission(self, kind: str, raw_input: bytes | msgspec.Raw) -> None:
        """Refuse what could not run.

        Raises `UnknownKind`; `Invalid` with the path of the field that does not fit; and for `chat`
        `UnknownAgent` and `UnknownTool`, with the name that was probably meant.
        """
        if kind == CHAT:
            self._check_chat(ChatInput.from_json(raw_input))
        else:
            self.find_workflow(kind).arguments(raw_input)

    def _check_chat(self, chat: ChatInput) -> None:
        if chat.agent:
            self.find_agent(chat.agent)
        for name in chat.tools or ():
            self.find_tool(name)


def _require_new(what: str, name: str, taken: Iterable[str], pattern: re.Pattern[str]) -> None:
    if not pattern.fullmatch(name):
        raise ValueError(f"{what} {name!r}: a name must match {pattern.pattern}")
    if name in taken:
        raise ValueError(f"{what} {name!r} is already registered")


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name[:100], list(known), n=1)
    return bounded(f"unknown {what} {name[:100]!r}" + (f", did you mean {close[0]!r}?" if close else ""))


# --- loading -----------------------------------------------------------------------------------------


def load_app(target: str) -> App:
    """Import the App that `module:attribute` names; modules of the current directory are found first.

    Raises `ConfigError` of one line when there is no such module or attribute, or it is no App.
    """
    module_name, _, path = target.partition(":")
    if not module_name or not path:
        raise ConfigError(f"app {target!r}: expected module:attribute, as in mypackage.main:app")
    module = _import(module_name)
    try:
        found: object = operator.attrgetter(path)(module)
    except AttributeError as error:
        apps = [name for name, value in vars(module).items() if isinstance(value, App)]
        hint = f", did you mean '{module_name}:{apps[0]}'?" if apps else ""
        raise ConfigError(f"app {target!r}: {module_name} has no {path!r}{hint}") from error
    if not isinstance(found, App):
        raise ConfigError(f"app {target!r}: expected a streamjobs.App, found a {type(found).__name__}")
    return found


def _import(module_name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(bounded(f"app: cannot import {module_name!r}: {reason}")) from error
