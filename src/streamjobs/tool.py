"""A function that a model, or a workflow, may call.

The parameters of a tool become one msgspec struct. That struct gives the JSON schema the model sees and
validates what the model wrote, so the two cannot differ.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import math
import re
import typing
from collections.abc import Callable, Iterable
from typing import Any, Literal

import msgspec

from streamjobs.config import Settings
from streamjobs.events import Json
from streamjobs.inputs import bounded
from streamjobs.llm.base import ToolSpec
from streamjobs.safe_client import SafeClient

TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")

Effect = Literal["pure", "idempotent", "once"]
"""What a second run would do: nothing, nothing new under the same key, or harm."""

Recovery = Literal["tell", "ask"]
"""What happens to a `once` call that was started and never recorded: who called is told that its outcome is
unknown, or a person is asked whether it may run again."""

_RATE = re.compile(r"(\d{1,7})/(\d{1,5})?(s|m|h)", re.ASCII)
_UNITS = {"s": 1, "m": 60, "h": 3600}


class Rate(msgspec.Struct, frozen=True):
    """So many calls in so many seconds, over all workers; as many may come at once."""

    calls: int
    seconds: float

    @classmethod
    def parse(cls, text: str) -> Rate:
        """Read `10/s`, `30/m`, `100/2h`. Raises `ValueError`."""
        match = _RATE.fullmatch(text)
        if match is None or int(match[1]) == 0 or match[2] == "0":
            raise ValueError(f"rate {text!r}: expected calls/time, as in 10/s, 30/m or 100/2h")
        return cls(int(match[1]), float(int(match[2] or 1) * _UNITS[match[3]]))


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
    def http(self) -> SafeClient:
        """HTTP for addresses that a model or a stranger chose; for async tools."""
        return SafeClient(self.settings)

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
    the `ToolContext`, if any; `needs` names the setting without which the tool is not offered. `approval`, if
    any, is what a person is asked before each call; `lookup`, if any, is called with the idempotency key of a
    `once` call whose outcome was not recorded: it returns the output, or raises `LookupError` where there
    is none. An `isolated` one runs in a process of its own, which finds it by its module and name.
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
    approval: str = ""
    rate: Rate | None = None
    recovery: Recovery = "tell"
    lookup: Callable[[str], Any] | None = None
    isolated: bool = False

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
        approval: bool | str = False,
        rate: str | None = None,
        recovery: Recovery = "tell",
        lookup: Callable[[str], Any] | None = None,
        isolated: bool = False,
    ) -> Tool:
        """Make a tool of a function: its name, its docstring's first paragraph and its type hints.

        Raises `TypeError` for what a model cannot call: positional-only and variadic parameters, generators,
        types that JSON does not know, an isolated function that its module does not name; `ValueError` for a
        name, timeout or effect that does not fit.
        """
        name = name or name_of(function)
        if effect not in typing.get_args(Effect):
            raise ValueError(f"tool {name!r}: effect must be one of {listed(typing.get_args(Effect))}")
        if recovery not in typing.get_args(Recovery):
            raise ValueError(f"tool {name!r}: recovery must be one of {listed(typing.get_args(Recovery))}")
        require_positive(f"tool {name!r}: timeout", timeout)
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(f"tool {name!r}: a generator cannot be a tool, return the whole result")
        if isolated and not is_importable(function):
            raise TypeError(
                f"tool {name!r}: what is isolated must be a function of a module, found by its name"
            )
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
            approval=f"May {name} be called?" if approval is True else approval or "",
            rate=None if rate is None else Rate.parse(rate),
            recovery=recovery,
            lookup=lookup,
            isolated=isolated,
        )

    @property
    def spec(self) -> ToolSpec:
        """The tool as a provider is told of it."""
        return ToolSpec(self.name, self.description, self.parameters)


def _arguments_of(function: Callable[..., Any], name: str) -> tuple[type[msgspec.Struct], str]:
    """The struct of a tool's parameters, and the parameter that receives the context."""
    hints = hints_of(function, f"tool {name!r}")
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
        raise TypeError(f"tool {name!r}: one parameter may be a ToolContext, not {listed(contexts)}")
    # The name is one that no type of the user's has: msgspec's schemas mix up types of one name.
    struct = msgspec.defstruct(f"arguments_of_{name}", fields, kw_only=True, forbid_unknown_fields=True)
    return struct, "".join(contexts)


def _field_default(default: Any) -> Any:
    if default is None or isinstance(default, str | int | float):
        return default
    return msgspec.field(default_factory=functools.partial(copy.deepcopy, default))


def _object_schema(struct: type[msgspec.Struct], name: str) -> dict[str, Json]:
    """The schema of a struct with the struct itself at the top, and the types it names under `$defs`."""
    schema = schema_of(struct, f"tool {name!r}")
    definitions: dict[str, Json] = schema["$defs"]
    top: dict[str, Json] = definitions.pop(schema["$ref"].removeprefix("#/$defs/"))
    del top["title"]
    return top | ({"$defs": definitions} if definitions else {})


def schema_of(hint: Any, what: str) -> dict[str, Json]:
    """The JSON schema of a type. Raises `TypeError` that names `what` for one that JSON does not know."""
    try:
        msgspec.json.Decoder(hint)
        return msgspec.json.schema(hint)
    except KeyError as error:  # msgspec's way to say it
        raise TypeError(f"{what}: two types have the name of {error}") from error
    except (TypeError, RecursionError) as error:
        raise TypeError(f"{what}: {' '.join(str(error).split())}") from error


def hints_of(function: Callable[..., Any], what: str) -> dict[str, Any]:
    """The resolved type hints of a function.

    Raises `TypeError` that names `what` where they do not resolve.
    """
    try:
        return typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError, AttributeError) as error:
        raise TypeError(f"{what}: its type hints must resolve when it is registered: {error}") from error


def is_importable(function: Callable[..., Any]) -> bool:
    """Whether another process may find it by its module and name: it is no lambda and no inner function."""
    return inspect.isfunction(function) and "<" not in function.__qualname__


def name_of(function: Callable[..., Any]) -> str:
    """The name of a function. Raises `TypeError` for a thing without one."""
    name = getattr(function, "__name__", None)
    if not isinstance(name, str):
        raise TypeError(f"{function!r} has no name, give one")
    return name


def first_paragraph(function: Callable[..., Any]) -> str:
    """The first paragraph of a docstring, on one line; empty without one."""
    return " ".join((inspect.getdoc(function) or "").split("\n\n")[0].split())


def require_positive(what: str, value: float | None) -> None:
    """Raise `ValueError` that begins with `what` unless the value is None or above 0."""
    if value is not None and not value > 0:
        raise ValueError(f"{what} must be more than 0")


def listed(names: Iterable[str]) -> str:
    """Names in a sentence: sorted, with commas."""
    return ", ".join(sorted(names))
