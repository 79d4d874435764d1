"""A kind of job: the function that runs it, its types, and its policies."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from streamjobs.events import Json
from streamjobs.inputs import decode_shallow
from streamjobs.retry import Retry
from streamjobs.tool import first_paragraph, hints_of, require_positive, schema_of


class Workflow(msgspec.Struct, frozen=True, kw_only=True):
    """A kind of job: an async function of a context and, if `takes_input`, of the submitted input.

    None in `timeout`, `max_attempts`, `queue` and `retry` leaves them to the submission and the settings;
    without a `heartbeat_timeout` its code may be silent for as long as it likes.
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
    retry: Retry | None = None
    heartbeat_timeout: float | None = None

    @classmethod
    def of(
        cls,
        kind: str,
        function: Callable[..., Any],
        *,
        timeout: float | None = None,
        max_attempts: int | None = None,
        queue: str | None = None,
        retry: Retry | None = None,
        heartbeat_timeout: float | None = None,
    ) -> Workflow:
        """Make a workflow of `async def f(ctx)` or `async def f(ctx, input: T) -> R`.

        Raises `TypeError` for a function of another shape or a type that JSON does not know.
        """
        what = f"workflow {kind!r}"
        if not inspect.iscoroutinefunction(function):
            raise TypeError(f"{what}: must be an async function")
        require_positive(f"{what}: timeout", timeout)
        require_positive(f"{what}: max_attempts", max_attempts)
        require_positive(f"{what}: heartbeat_timeout", heartbeat_timeout)
        _, *inputs = _positional_of(function, what)
        hints = hints_of(function, what)
        input_type = hints.get(inputs[0].name, Any) if inputs else Any
        return cls(
            kind=kind,
            function=function,
            description=first_paragraph(function),
            input_type=input_type,
            result_type=hints.get("return", Any),
            input_schema=schema_of(input_type, what),
            takes_input=bool(inputs),
            has_default=bool(inputs) and inputs[0].default is not inspect.Parameter.empty,
            timeout=timeout,
            max_attempts=max_attempts or (retry and retry.attempts),
            queue=queue,
            retry=retry,
            heartbeat_timeout=heartbeat_timeout,
        )

    def arguments(self, raw: bytes | msgspec.Raw) -> tuple[Any, ...]:
        """What the function gets after its context: one decoded input, or nothing.

        Nothing where it takes none, or where the input is null and the parameter has a default.
        Raises `Invalid` that names the field.
        """
        if self.has_default and bytes(raw).strip() == b"null":
            return ()
        value = decode_shallow(_decoder(self.input_type), bytes(raw), "input")
        return (value,) if self.takes_input else ()


def _positional_of(function: Callable[..., Any], what: str) -> Sequence[inspect.Parameter]:
    parameters = list(inspect.signature(function).parameters.values())
    positional = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}
    if not 1 <= len(parameters) <= 2 or any(parameter.kind not in positional for parameter in parameters):
        raise TypeError(f"{what}: takes a context and at most one input")
    return parameters


@functools.lru_cache(maxsize=256)
def _decoder(input_type: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(input_type)
