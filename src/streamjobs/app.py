"""The registry of a program: its tools, agents, workflows, schedules; what a submission is checked against.

Rule 1: worker and gateway import the same App; nothing here touches Redis or a provider.
Rule 2: a registration that cannot work raises at import, it never becomes a failed job.
Rule 3: what a client sent raises `Invalid`, or a subclass, that names the field.
Rule 4: a decorated function stays what it was: it can be called, tested and named as before.

The parameters of a tool become one msgspec struct. That struct gives the JSON schema the model sees and
validates what the model wrote, so the two cannot differ.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import importlib
import inspect
import math
import operator
import re
import sys
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, Literal, TypeVar, overload

import msgspec

from streamjobs.agents import Agent, AgentFunction
from streamjobs.config import Settings
from streamjobs.cron import Timing
from streamjobs.errors import ConfigError, Invalid, UnknownAgent, UnknownKind, UnknownTool
from streamjobs.events import UNENCODABLE, Json, clean_text, encode_json
from streamjobs.llm.base import ToolSpec
from streamjobs.schedule import Missed, Overlap, Schedule

CHAT = "chat"
"""The kind that every App has; the worker brings its implementation."""

MAX_DEPTH = 100
"""How deep JSON may nest: far below where a decoder gives up, since the log wraps it once more."""

MAX_MESSAGE = 500
"""Characters of an error's message: it may quote what a stranger wrote."""

TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
NAME = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,63}")

Effect = Literal["pure", "idempotent", "once"]
"""What a second run would do: nothing, nothing new under the same key, or harm."""

OURS = frozenset({"model", "messages", "tools", "stream", "stream_options", "system"})
"""What chat itself puts in a provider's request; `parameters` may not replace it."""

Function = TypeVar("Function", bound=Callable[..., Any])
Decoded = TypeVar("Decoded")


# --- what a client submits ---------------------------------------------------------------------------


class ChatMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One message of a conversation that a client brings along."""

    role: Literal["system", "user", "assistant"]
    content: str

    def __post_init__(self) -> None:
        _refuse_if(not self.content.strip(), "`content` must not be empty")


class ChatInput(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The input of `chat`: a prompt or a conversation, and how to answer it.

    `tools` of None leaves the choice to the agent, [] offers none; `parameters` go to the provider.
    """

    prompt: str | None = None
    messages: list[ChatMessage] = []
    agent: str = ""
    model: str = ""
    tools: list[str] | None = None
    parameters: dict[str, Json] = {}

    def __post_init__(self) -> None:
        has_prompt = self.prompt is not None
        has_user = any(message.role == "user" for message in self.messages)
        _refuse_if(has_prompt == bool(self.messages), "exactly one of `prompt` and `messages` is needed")
        _refuse_if(has_prompt and not str(self.prompt).strip(), "`prompt` must not be empty")
        _refuse_if(not has_prompt and not has_user, "`messages` must have one of role `user`")
        for field, names in (("agent", [self.agent]), ("model", [self.model]), ("tools", self.tools or [])):
            _refuse_if(
                any(map(_is_no_name, names)), f"`{field}`: over 200 characters, or a control character"
            )
        _require_no_ours(self.parameters)

    @classmethod
    def from_json(cls, raw: bytes | msgspec.Raw) -> ChatInput:
        """Read a submitted input. Raises `Invalid` that names the field."""
        return decode_shallow(_CHAT_DECODER, bytes(raw), "input")


def _refuse_if(is_wrong: bool, message: str) -> None:
    if is_wrong:
        raise ValueError(message)


def _require_no_ours(parameters: Mapping[str, Json]) -> None:
    _refuse_if(not OURS.isdisjoint(parameters), f"`parameters` must not have any of {_listed(OURS)}")


def _is_no_name(text: str) -> bool:
    return len(text) > 200 or re.search(r"[\x00-\x1f\x7f]", text) is not None


_CHAT_DECODER = msgspec.json.Decoder(ChatInput)


def decode_shallow(decoder: msgspec.json.Decoder[Decoded], text: bytes, root: str = "") -> Decoded:
    """Decode foreign JSON, refusing what nests deeper than `MAX_DEPTH`.

    Raises `Invalid`; its message begins with the path of the field at fault, under the name `root`.
    """
    try:
        if text.count(b"[") + text.count(b"{") > MAX_DEPTH and is_too_deep(msgspec.json.decode(text)):
            raise RecursionError
        return decoder.decode(text)
    except RecursionError as error:
        reason = f"nested deeper than {MAX_DEPTH} levels"
        raise Invalid(_at(root, reason)) from error
    except msgspec.ValidationError as error:
        reason, has_path, path = str(error).rpartition(" - at `$")
        where = root + path.removesuffix("`") if has_path else root
        raise Invalid(_at(where, reason if has_path else path)) from error
    except UNENCODABLE as error:
        raise Invalid(_at(root, f"not JSON: {error}")) from error


def _at(path: str, reason: str) -> str:
    path = path.removeprefix(".")
    return bounded(f"{path}: {reason}" if path else reason)


def is_too_deep(value: Json, levels: int = MAX_DEPTH) -> bool:
    """Whether a JSON value nests lists and objects more than `levels` deep."""
    inner: Iterable[Json]
    if isinstance(value, dict):
        inner = typing.cast("dict[str, Json]", value).values()
    elif isinstance(value, list):
        inner = typing.cast("list[Json]", value)
    else:
        return False
    return levels == 0 or any(is_too_deep(one, levels - 1) for one in inner)


def bounded(text: str) -> str:
    """Clean a message that may quote foreign text, and cut it to `MAX_MESSAGE` characters."""
    text = clean_text(text)
    return text if len(text) <= MAX_MESSAGE else text[: MAX_MESSAGE - 1] + "…"


# --- tools -------------------------------------------------------------------------------------------


def _report_nothing(_percent: float | None, _message: str) -> None:
    pass


def _never() -> bool:
    return False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ToolContext:
    """What a tool may know of its call; a parameter with this annotation receives it, unseen by the model.

    The two callbacks are the worker's. `is_cancelled` may be asked from any thread.
    """

    job_id: str = ""
    owner: str = ""
    call_id: str = ""
    idempotency_key: str = ""
    attempt: int = 1
    settings: Settings = dataclasses.field(default_factory=Settings, repr=False)
    on_progress: Callable[[float | None, str], None] = dataclasses.field(default=_report_nothing, repr=False)
    cancelled: Callable[[], bool] = dataclasses.field(default=_never, repr=False)

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody waits for the result any more; long tools should ask and return."""
        return self.cancelled()

    def progress(self, percent: float | None, message: str = "") -> None:
        """Say how far the call is, 0 to 100; None or NaN where that is not known."""
        if percent is not None:
            percent = None if math.isnan(percent) else min(max(float(percent), 0.0), 100.0)
        self.on_progress(percent, bounded(message))


class Tool(msgspec.Struct, frozen=True, kw_only=True):
    """A function that a model may call.

    `parameters` is the JSON schema of `arguments_type`; `context_parameter` names the parameter that receives
    the `ToolContext`, if any; `needs` names the setting without which the tool is not offered.
    """

    name: str
    description: str
    parameters: dict[str, Json]
    function: Callable[..., Any]
    arguments_type: type[msgspec.Struct]
    context_parameter: str = ""
    is_async: bool = False
    timeout: float | None = None
    effect: Effect = "idempotent"
    needs: str = ""

    @classmethod
    def of(
        cls,
        function: Callable[..., Any],
        *,
        name: str | None = None,
        description: str | None = None,
        timeout: float | None = None,
        effect: Effect = "idempotent",
        needs: str = "",
    ) -> Tool:
        """Make a tool of a function: its name, its docstring's first paragraph and its type hints.

        Raises `TypeError` for what a model cannot call: positional-only and variadic parameters, generators,
        types that JSON does not know; `ValueError` for a name, timeout or effect that does not fit.
        """
        name = name or _name_of(function)
        if effect not in typing.get_args(Effect):
            raise ValueError(f"tool {name!r}: effect must be one of {_listed(typing.get_args(Effect))}")
        _require_positive(f"tool {name!r}: timeout", timeout)
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(f"tool {name!r}: a generator cannot be a tool, return the whole result")
        arguments_type, context_parameter = _arguments_of(function, name)
        return cls(
            name=name,
            description=first_paragraph(function) if description is None else description,
            parameters=_object_schema(arguments_type, name),
            function=function,
            arguments_type=arguments_type,
            context_parameter=context_parameter,
            is_async=inspect.iscoroutinefunction(function),
            timeout=timeout,
            effect=effect,
            needs=needs,
        )

    @property
    def spec(self) -> ToolSpec:
        """The tool as a provider is told of it."""
        return ToolSpec(self.name, self.description, self.parameters)


def _arguments_of(function: Callable[..., Any], name: str) -> tuple[type[msgspec.Struct], str]:
    """The struct of a tool's parameters, and the parameter that receives the context."""
    hints = _hints_of(function, f"tool {name!r}")
    fields: list[tuple[str, Any] | tuple[str, Any, Any]] = []
    contexts: list[str] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in {parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY}:
            bare = str(parameter.replace(annotation=parameter.empty, default=parameter.empty))
            raise TypeError(f"tool {name!r}: parameter {bare!r} cannot be passed by name")
        hint = hints.get(parameter.name, Any)
        if hint is ToolContext:
            contexts.append(parameter.name)
        elif parameter.default is parameter.empty:
            fields.append((parameter.name, hint))
        else:
            fields.append((parameter.name, hint, _field_default(parameter.default)))
    if len(contexts) > 1:
        raise TypeError(f"tool {name!r}: one parameter may be a ToolContext, not {_listed(contexts)}")
    # The name is one that no type of the user's has: msgspec's schemas mix up types of one name.
    struct = msgspec.defstruct(f"arguments_of_{name}", fields, kw_only=True, forbid_unknown_fields=True)
    return struct, "".join(contexts)


def _field_default(default: Any) -> Any:
    if default is None or isinstance(default, str | int | float):
        return default
    return msgspec.field(default_factory=functools.partial(copy.deepcopy, default))


def _object_schema(struct: type[msgspec.Struct], name: str) -> dict[str, Json]:
    """The schema of a struct with the struct itself at the top, and the types it names under `$defs`."""
    schema = _schema_of(struct, f"tool {name!r}")
    definitions: dict[str, Json] = schema["$defs"]
    top: dict[str, Json] = definitions.pop(schema["$ref"].removeprefix("#/$defs/"))
    del top["title"]
    return top | ({"$defs": definitions} if definitions else {})


def _schema_of(hint: Any, what: str) -> dict[str, Json]:
    try:
        msgspec.json.Decoder(hint)
        return msgspec.json.schema(hint)
    except KeyError as error:  # msgspec's way to say it
        raise TypeError(f"{what}: two types have the name of {error}") from error
    except (TypeError, RecursionError) as error:
        raise TypeError(f"{what}: {' '.join(str(error).split())}") from error


def _hints_of(function: Callable[..., Any], what: str) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError, AttributeError) as error:
        raise TypeError(f"{what}: its type hints must resolve when it is registered: {error}") from error


def _name_of(function: Callable[..., Any]) -> str:
    name = getattr(function, "__name__", None)
    if not isinstance(name, str):
        raise TypeError(f"{function!r} has no name, give one")
    return name


def first_paragraph(function: Callable[..., Any]) -> str:
    """The first paragraph of a docstring, on one line; empty without one."""
    return " ".join((inspect.getdoc(function) or "").split("\n\n")[0].split())


# --- workflows ---------------------------------------------------------------------------------------


class Workflow(msgspec.Struct, frozen=True, kw_only=True):
    """A kind of job: an async function of a context and, if `takes_input`, of the submitted input.

    None in `timeout`, `max_attempts` and `queue` leaves them to the submission and the settings.
    """

    kind: str
    function: Callable[..., Any]
    description: str = ""
    input_type: Any = Any
    result_type: Any = Any
    input_schema: dict[str, Json] = {}
    takes_input: bool = False
    has_default: bool = False
    timeout: float | None = None
    max_attempts: int | None = None
    queue: str | None = None

    @classmethod
    def of(
        cls,
        kind: str,
        function: Callable[..., Any],
        *,
        timeout: float | None = None,
        max_attempts: int | None = None,
        queue: str | None = None,
    ) -> Workflow:
        """Make a workflow of `async def f(ctx)` or `async def f(ctx, input: T) -> R`.

        Raises `TypeError` for a function of another shape or a type that JSON does not know.
        """
        what = f"workflow {kind!r}"
        if not inspect.iscoroutinefunction(function):
            raise TypeError(f"{what}: must be an async function")
        _require_positive(f"{what}: timeout", timeout)
        _require_positive(f"{what}: max_attempts", max_attempts)
        _, *inputs = _positional_of(function, what)
        hints = _hints_of(function, what)
        input_type = hints.get(inputs[0].name, Any) if inputs else Any
        return cls(
            kind=kind,
            function=function,
            description=first_paragraph(function),
            input_type=input_type,
            result_type=hints.get("return", Any),
            input_schema=_schema_of(input_type, what),
            takes_input=bool(inputs),
            has_default=bool(inputs) and inputs[0].default is not inspect.Parameter.empty,
            timeout=timeout,
            max_attempts=max_attempts,
            queue=queue,
        )

    def arguments(self, raw: bytes | msgspec.Raw) -> tuple[Any, ...]:
        """What the function gets after its context: one decoded input, or nothing.

        Nothing where it takes none, or where the input is null and the parameter has a default.
        Raises `Invalid` that names the field.
        """
        if self.has_default and bytes(raw).strip() == b"null":
            return ()
        value = decode_shallow(msgspec.json.Decoder(self.input_type), bytes(raw), "input")
        return (value,) if self.takes_input else ()


def _positional_of(function: Callable[..., Any], what: str) -> Sequence[inspect.Parameter]:
    parameters = list(inspect.signature(function).parameters.values())
    positional = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}
    if not 1 <= len(parameters) <= 2 or any(parameter.kind not in positional for parameter in parameters):
        raise TypeError(f"{what}: takes a context and at most one input")
    return parameters


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
        return f"<App {self.name!r}: kinds {_listed(self.kinds)}>"

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
    ) -> Callable[..., Any]:
        """Register a function that models may call; with or without parentheses.

        The schema comes from the type hints, the description from the docstring. `timeout` of None is the
        setting `tool_timeout`. Raises what `Tool.of` raises, and `ValueError` for a name that is taken.
        """

        def register(function: Function) -> Function:
            tool = Tool.of(function, name=name, description=description, timeout=timeout, effect=effect)
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
        _require_no_ours(parameters or {})
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
            return register(_name_of(name))(name)
        return lambda function: register(_name_of(function))(function)

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
    ) -> Callable[[Function], Function]:
        """Register `async def f(ctx, input: T) -> R` as what jobs of this kind run; `input` may be absent.

        Raises what `Workflow.of` raises, and `ValueError` for a kind that is taken, as `chat` is.
        """

        def register(function: Function) -> Function:
            _require_new("workflow", kind, self.kinds, NAME)
            self._workflows[kind] = Workflow.of(
                kind, function, timeout=timeout, max_attempts=max_attempts, queue=queue
            )
            return function

        return register

    def find_workflow(self, kind: str) -> Workflow:
        """The program's own workflow of that kind. Raises `UnknownKind`."""
        if kind in self._workflows:
            return self._workflows[kind]
        raise UnknownKind(_unknown("kind", kind, self.kinds))

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
        missed: Missed = "skip",
        overlap: Overlap = "allow",
        **fields: Any,
    ) -> Schedule:
        """Register a job that recurs: by `cron` in a `timezone`, or `every` so many seconds.

        `fields` are the others of `Schedule`, as `timeout`; what the workflow says itself is the default.
        Raises `Invalid`, `UnknownKind` for a workflow that is not registered before, what `check_submission`
        raises for the input, and `ValueError` for a name that is taken or does not fit.
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
            missed=missed,
            overlap=overlap,
            **(_schedule_defaults(workflow) | fields),
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


def _schedule_defaults(workflow: Workflow | None) -> dict[str, Any]:
    return (
        {} if workflow is None else {"timeout": workflow.timeout, "max_attempts": workflow.max_attempts or 0}
    )


def _require_new(what: str, name: str, taken: Iterable[str], pattern: re.Pattern[str]) -> None:
    if not pattern.fullmatch(name):
        raise ValueError(f"{what} {name!r}: a name must match {pattern.pattern}")
    if name in taken:
        raise ValueError(f"{what} {name!r} is already registered")


def _require_positive(what: str, value: float | None) -> None:
    if value is not None and not value > 0:
        raise ValueError(f"{what} must be more than 0")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


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
