"""What the scripted provider says: turns, and the faults on the way. Loaded from JSON or YAML, strictly.

Rule 1: which turn answers a request is decided by the request alone, so a worker that starts over is told
the same again.
Rule 2: a turn with `match` answers what it matches; the others answer by place: the first one a
conversation without assistant messages, the second one with one, and so on.
Rule 3: a turn's faults apply in order, each to its `times` first requests of a conversation (0: to all).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import msgspec
import yaml

from streamjobs.errors import ConfigError


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of a scenario file: unknown names are errors."""


class _Fault(_Strict, frozen=True, kw_only=True, tag_field="kind"):
    """A way to fail. `times`: how many requests of the turn meet it; 0 for all."""

    times: int = 0


class StatusFault(_Fault, frozen=True, kw_only=True, tag="status"):
    """An HTTP error; `retry_after` seconds in the form that is asked for."""

    status: int = 500
    retry_after: float | None = None
    form: Literal["seconds", "date", "ms"] = "seconds"


class ErrorFault(_Fault, frozen=True, kw_only=True, tag="error"):
    """An error event inside the stream, on HTTP 200, after some tokens."""

    after: int = 1
    type: str = "overloaded_error"


class CutFault(_Fault, frozen=True, kw_only=True, tag="cut"):
    """The answer breaks off after some tokens.

    In the middle of an event (`token`), inside a character (`character`), or with a clean end of
    the body between two events (`clean`).
    """

    after: int = 3
    where: Literal["token", "character", "clean"] = "token"


class StallFault(_Fault, frozen=True, kw_only=True, tag="stall"):
    """Silence for `seconds` after some tokens; `comments` (and pings) keep the connection busy meanwhile."""

    after: int = 3
    seconds: float = 3600.0
    comments: bool = False


class GarbageFault(_Fault, frozen=True, kw_only=True, tag="garbage"):
    """An event whose data is not JSON, after some tokens."""

    after: int = 3


class ContentTypeFault(_Fault, frozen=True, kw_only=True, tag="content_type"):
    """HTTP 200 with a page in place of a stream."""

    content_type: str = "text/html; charset=utf-8"
    body: str = "<!doctype html><title>Sign in</title>"


class EndlessFault(_Fault, frozen=True, kw_only=True, tag="endless"):
    """The text begins again whenever it ends, until the client goes away."""


class DelayFault(_Fault, frozen=True, kw_only=True, tag="delay"):
    """`seconds` before the first byte; the answer is then as it should be."""

    seconds: float = 1.0


Fault = (
    StatusFault
    | ErrorFault
    | CutFault
    | StallFault
    | GarbageFault
    | ContentTypeFault
    | EndlessFault
    | DelayFault
)


class Match(_Strict, frozen=True, kw_only=True):
    """Conditions on a request; all that are given must hold."""

    turn: int | None = None
    """Assistant messages in the conversation."""
    round: int | None = None
    """Assistant messages since the last user message."""
    user: str = ""
    """A regular expression that is found in the last user message, whatever the case."""
    model: str = ""
    """A regular expression that is the whole of the model's name."""
    tools: list[str] = []
    """Tools that are all offered."""


class ScriptedCall(_Strict, frozen=True, kw_only=True):
    """A tool call. `arguments` as text goes out as it is, broken or not; without `id`, one is made."""

    name: str
    arguments: dict[str, Any] | str = {}
    id: str = ""


class ScriptedUsage(_Strict, frozen=True, kw_only=True):
    """Token counts to report."""

    input_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    cached_tokens: int = 0


class Turn(_Strict, frozen=True, kw_only=True):
    """One answer. `text` in pieces is sent in just these; `rate` is in tokens per second, 0 for no pause."""

    match: Match | None = None
    text: str | list[str] = ""
    reasoning: str = ""
    tool_calls: list[ScriptedCall] = []
    rate: float = 0.0
    usage: ScriptedUsage | None = None
    finish_reason: str = ""
    faults: list[Fault] = []


class Scenario(_Strict, frozen=True, kw_only=True):
    """A whole script. `repeat` starts over after the last turn; what fits none is echoed at `echo_rate`."""

    name: str = ""
    turns: list[Turn] = []
    repeat: bool = False
    echo_rate: float = 0.0


class Conversation(msgspec.Struct, frozen=True, kw_only=True):
    """What a request says about its conversation, in neither wire format."""

    model: str
    key: str
    """The same for every request of one conversation."""
    turn: int
    round: int
    user: str
    tools: list[str]


class Chosen(msgspec.Struct, frozen=True):
    """The turn that answers, and its number; -1 is the echo."""

    number: int
    turn: Turn


def choose(scenario: Scenario, conversation: Conversation) -> Chosen:
    """The turn for a request: one that matches, else the one in its place, else an echo."""
    placed: list[Chosen] = []
    for number, turn in enumerate(scenario.turns):
        if turn.match is None:
            placed.append(Chosen(number, turn))
        elif _fits(turn.match, conversation):
            return Chosen(number, turn)
    place = conversation.turn % len(placed) if scenario.repeat and placed else conversation.turn
    return placed[place] if place < len(placed) else Chosen(-1, _echo(scenario, conversation))


def fault_for(turn: Turn, count: int) -> Fault | None:
    """The fault that meets request number `count` (from 0) of a turn."""
    for fault in turn.faults:
        if fault.times == 0 or count < fault.times:
            return fault
        count -= fault.times
    return None


def load_scenario(file: Path) -> Scenario:
    """Read a scenario from a JSON or YAML file. Raises `ConfigError` that names the place of the mistake."""
    try:
        content = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"scenario {file}: {error}") from error
    return parse_scenario(content, str(file))


def parse_scenario(content: str, name: str = "scenario") -> Scenario:
    """Read a scenario from JSON or YAML (of which JSON is a part). Raises `ConfigError`."""
    try:
        scenario = msgspec.convert(yaml.safe_load(content) or {}, Scenario)
        for turn in scenario.turns:
            _require_patterns(turn.match)
    except (msgspec.ValidationError, yaml.YAMLError, re.error, RecursionError) as error:
        raise ConfigError(f"{name}: {error}") from error
    return scenario


def _require_patterns(match: Match | None) -> None:
    if match is not None:
        re.compile(match.user)
        re.compile(match.model)


def _fits(match: Match, conversation: Conversation) -> bool:
    return (
        match.turn in {None, conversation.turn}
        and match.round in {None, conversation.round}
        and (not match.user or re.search(match.user, conversation.user, re.IGNORECASE) is not None)
        and (not match.model or re.fullmatch(match.model, conversation.model) is not None)
        and set(match.tools) <= set(conversation.tools)
    )


def _echo(scenario: Scenario, conversation: Conversation) -> Turn:
    said = " ".join(conversation.user.split())[:200]
    text = (
        "This is a scripted answer: no model is connected, so I can only repeat what I was told. "
        f"You said: “{said}”. Thank you for asking!"
    )
    return Turn(text=text, rate=scenario.echo_rate)


_DEMO_ANSWER = """\
This is a scripted answer: no model is connected, and these words are the same for everybody. What happened \
around them was real. I asked for the list of files, then for two files at once; the worker ran those tools, \
recorded each call before it began and each result when it came, and called me again with what they said.

Everything you see arrives as events of one log, a few tokens at a time. Reload the page, open it in a \
second window, or stop the worker in the middle of this sentence: the answer goes on where it was, or the \
turn is visibly begun again, and no word is lost or shown twice.

To talk to a real model, set OPENAI_API_KEY or ANTHROPIC_API_KEY, or point STREAMJOBS_OPENAI_BASE_URL at any \
server that speaks chat completions, and ask again."""

_DEMO_TOOLS = ["list_files", "read_file"]

DEMO = Scenario(
    name="demo",
    echo_rate=60.0,
    turns=[
        Turn(
            match=Match(round=0, tools=_DEMO_TOOLS),
            reasoning="I should look at what is in the folder first.",
            text="Let me see which files there are.",
            tool_calls=[ScriptedCall(name="list_files", arguments={"path": "."})],
            rate=40.0,
        ),
        Turn(
            match=Match(round=1, tools=_DEMO_TOOLS),
            text="Two of these should tell me what this is: I will read both.",
            tool_calls=[
                ScriptedCall(name="read_file", arguments={"path": "README.md"}),
                ScriptedCall(name="read_file", arguments={"path": "pyproject.toml"}),
            ],
            rate=40.0,
        ),
        Turn(match=Match(round=2, tools=_DEMO_TOOLS), text=_DEMO_ANSWER, rate=60.0),
    ],
)
"""What `streamjobs demo` shows without a key: three turns, three tool calls, one answer."""
