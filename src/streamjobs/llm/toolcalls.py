"""Putting streamed tool calls together, from providers that disagree about how they are numbered.

Rule 1: a delta belongs to a call by (index, id). Where either is missing, repeated or changed, the rules
of `_at_index` and `_without_index` decide; what stays ambiguous is dropped and logged, never guessed,
because a wrong guess runs a tool with someone else's arguments.
Rule 2: a call is finished by the end of the stream only: a prefix that parses may grow.
Rule 3: a call that never got a name is dropped.

Met in the wild: `index: 0` for every parallel call (Ollama), no index (Gemini, old Ollama), no id,
arguments before the name (SGLang), id or name repeated or changed in each delta, whole calls in one chunk.
"""

from __future__ import annotations

import structlog

from streamjobs.errors import ProviderError
from streamjobs.events import Json, ToolCallRequest, clean_text
from streamjobs.llm.wire import MAX_CALLS, CallIds, finished_arguments

log = structlog.stdlib.get_logger(__name__)


class Arguments:
    """The pieces of one call's arguments; knows when the JSON value has ended."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._scanned = 0
        self._depth = 0
        self._has_begun = False
        self._in_string = False
        self._is_escaped = False

    def add(self, piece: str) -> None:
        """Append a piece."""
        if piece:
            self._parts.append(piece)

    @property
    def is_empty(self) -> bool:
        """Whether nothing came yet."""
        return not self._parts

    @property
    def is_closed(self) -> bool:
        """Whether the object has ended, so that nothing can follow. Each piece is scanned once."""
        for part in self._parts[self._scanned :]:
            for character in part:
                self._scan(character)
        self._scanned = len(self._parts)
        return self._has_begun and self._depth <= 0

    def text(self) -> str:
        """All pieces, joined."""
        return "".join(self._parts)

    def _scan(self, character: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif self._in_string:
            self._is_escaped = character == "\\"
            self._in_string = character != '"'
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth, self._has_begun = self._depth + 1, True
        elif character in "}]":
            self._depth -= 1


class CallDelta:
    """One delta of a call, its odd shapes made plain: absent is None or empty."""

    __slots__ = ("arguments", "call_id", "extra", "index", "name")

    def __init__(
        self, index: int | None, call_id: str, name: str, arguments: str, extra: dict[str, Json] | None = None
    ) -> None:
        self.index = index
        self.call_id = call_id
        self.name = name
        self.arguments = arguments
        self.extra = extra or {}

    @property
    def opens_object(self) -> bool:
        """Whether its arguments begin an object, as those of a new call do."""
        return self.arguments.lstrip().startswith("{")


class Call:
    """A call while it is being streamed."""

    def __init__(self, delta: CallDelta) -> None:
        self.index = delta.index
        self.call_id = ""
        self.name = ""
        self.arguments = Arguments()
        self.extra: dict[str, Json] = {}
        self.add(delta)

    def add(self, delta: CallDelta) -> None:
        """Take a delta of this call: the first id and name stay."""
        self.call_id = self.call_id or delta.call_id
        self.name = self.name or delta.name
        self.arguments.add(delta.arguments)
        self.extra |= delta.extra

    def is_followed_by(self, delta: CallDelta) -> bool:
        """Whether a delta that looks like this call's begins the next one."""
        if not delta.name:
            return False
        if self.name and delta.name != self.name:
            return True
        has_other_id = bool(self.call_id) and bool(delta.call_id) and delta.call_id != self.call_id
        if has_other_id and delta.opens_object:
            return True
        return self.arguments.is_closed and (has_other_id or delta.opens_object)


class ToolCallTracker:
    """All calls of one answer."""

    def __init__(self) -> None:
        self._calls: list[Call] = []

    def __bool__(self) -> bool:
        return bool(self._calls)

    def add(self, delta: CallDelta) -> None:
        """Give a delta to its call, or begin a new one. Raises `ProviderError` for too many calls."""
        call = self._at_index(delta) if delta.index is not None else self._without_index(delta)
        if call is not None:
            call.add(delta)
        elif delta.name or (delta.index is not None and not self._is_known(delta.index)):
            self._begin(delta)
        elif delta.arguments:
            log.warning("provider.call_delta_dropped", index=delta.index, size=len(delta.arguments))

    def finish(self, ids: CallIds, *, is_cut: bool) -> list[ToolCallRequest]:
        """The calls, in the order they began. `is_cut`: the answer was cut short, in the last of them."""
        nameless = [call for call in self._calls if not call.name.strip()]
        if nameless:
            log.warning("provider.nameless_calls_dropped", calls=len(nameless))
        last = self._calls[-1] if self._calls else None
        return [
            ToolCallRequest(
                ids.claim(call.call_id),
                clean_text(call.name),
                finished_arguments(call.arguments.text(), is_cut=is_cut and call is last),
                call.extra,
            )
            for call in self._calls
            if call.name.strip()
        ]

    def _begin(self, delta: CallDelta) -> None:
        if len(self._calls) >= MAX_CALLS:
            raise ProviderError(f"the answer has over {MAX_CALLS} tool calls")
        self._calls.append(Call(delta))

    def _is_known(self, index: int) -> bool:
        return any(call.index == index for call in self._calls)

    def _at_index(self, delta: CallDelta) -> Call | None:
        """The call a numbered delta belongs to: the one with its id, else the latest with its number."""
        candidates = [call for call in self._calls if call.index == delta.index]
        named = [call for call in candidates if delta.call_id and call.call_id == delta.call_id]
        call = (named or candidates or [None])[-1]
        return None if call is None or call.is_followed_by(delta) else call

    def _without_index(self, delta: CallDelta) -> Call | None:
        """The call an unnumbered delta belongs to: the one with its id, else the only unfinished one."""
        named = [call for call in self._calls if delta.call_id and call.call_id == delta.call_id]
        candidates = named[-1:] or [call for call in self._calls if not call.arguments.is_closed]
        if len(candidates) != 1 or candidates[0].is_followed_by(delta):
            return None
        return candidates[0]
