"""A named way to chat: who answers, with which model, parameters and tools."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

from streamjobs.events import Json
from streamjobs.inputs import ChatInput

AgentFunction = Callable[..., str | None]
"""Takes the `ChatInput`, or nothing."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Agent:
    """A named way to chat: who answers, with which model, parameters and tools.

    `function`, if any, gives instructions for one input; what it does not give, `instructions` does.
    """

    name: str
    role: str = ""
    backstory: str = ""
    instructions: str = ""
    model: str = ""
    parameters: Mapping[str, Json] = dataclasses.field(default_factory=dict[str, Json])
    tools: tuple[str, ...] = ()
    function: AgentFunction | None = dataclasses.field(default=None, repr=False)
    registry: dict[str, Agent] = dataclasses.field(default_factory=dict[str, Any], repr=False, compare=False)

    def __call__(self, function: AgentFunction) -> Agent:
        """Take the instructions from a function (its docstring, or what it returns): the decorator form."""
        _require_agent_function(function, self.name)
        instructions = self.instructions or inspect.getdoc(function) or ""
        agent = dataclasses.replace(self, function=function, instructions=instructions)
        self.registry[self.name] = agent
        return agent

    def system_prompt(self, chat: ChatInput | None = None) -> str:
        """Join role, backstory and instructions by blank lines; `chat` is what the agent's function sees."""
        role = self.role.strip()
        if role and not role.lower().startswith("you "):
            role = f"You are {role.rstrip('.')}."
        instructions = self._instructions_for(chat) or self.instructions
        parts = (role, self.backstory.strip(), instructions.strip())
        return "\n\n".join(part for part in parts if part)

    def _instructions_for(self, chat: ChatInput | None) -> str | None:
        takes_chat = self.function is not None and bool(inspect.signature(self.function).parameters)
        if self.function is None or (takes_chat and chat is None):
            return None
        said = typing.cast("object", self.function(chat) if takes_chat else self.function())
        if said is None or isinstance(said, str):
            return said
        raise TypeError(f"agent {self.name!r}: its function must return a str, not {type(said).__name__}")


def _require_agent_function(function: AgentFunction, name: str) -> None:
    if inspect.iscoroutinefunction(function):
        raise TypeError(f"agent {name!r}: its function must not be async")
    if len(inspect.signature(function).parameters) > 1:
        raise TypeError(f"agent {name!r}: its function takes nothing, or the ChatInput")
