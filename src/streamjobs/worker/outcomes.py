"""What comes of a tool call: an output, or an error, as the log and the model see it.

Rule: an output is what its JSON decodes to, cut to a limit, whoever made it.
"""

from __future__ import annotations

import inspect

import msgspec

from streamjobs.errors import ToolError
from streamjobs.events import UNENCODABLE, ErrorInfo, Json, encode_json
from streamjobs.inputs import MAX_DEPTH, bounded, is_too_deep
from streamjobs.worker.values import encode_clean

MARKER_BYTES = 64
"""Room for the words that end a cut output."""


class ToolOutcome(msgspec.Struct, frozen=True):
    """What came of a call: an output, or an error.

    `is_lost`: it was started and ended without an answer, so nobody knows whether it took effect.
    """

    output: Json = None
    error: ErrorInfo | None = None
    ms: int = 0
    is_lost: bool = False


def tool_result_text(outcome: ToolOutcome) -> str:
    """What the model is told: a string as it is, other outputs as JSON, an error as `{"error": {...}}`."""
    if outcome.error is not None:
        return encode_json({"error": outcome.error}).decode()
    return outcome.output if isinstance(outcome.output, str) else encode_json(outcome.output).decode()


def failed(code: str, message: str, *, retryable: bool = False) -> ToolOutcome:
    """A failure of that code; its message may quote what a stranger wrote."""
    return ToolOutcome(error=ErrorInfo(code, bounded(message), retryable))


def failed_by(error: BaseException) -> ToolOutcome:
    """What a tool raised; a `ToolError` is the tool's own words, all else is told with its type."""
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - the text of a foreign exception is foreign code
        text = ""
    if isinstance(error, ToolError):
        return failed(error.code, text or "the tool refused the call")
    name = type(error).__name__
    return failed(ToolError.code, f"{name}: {text}" if text else name)


def timed_out(timeout: float, why: str) -> ToolOutcome:
    """A call that took too long; `why` is what more there is to say of it."""
    return failed("tool_timeout", f"the tool did not answer within {timeout:g} s{why}", retryable=True)


def outcome_of(value: object, limit: int) -> ToolOutcome:
    """An output as its JSON decodes, cut to `limit` bytes."""
    if inspect.iscoroutine(value):
        value.close()
        return failed("tool_output", "the tool returned a coroutine: what decorates it must be async as well")
    try:
        encoded = encode_clean(value)
        output = msgspec.json.decode(encoded)
        if is_too_deep(output):
            raise RecursionError
    except RecursionError:
        return failed(
            "tool_output", f"the tool's output nests deeper than {MAX_DEPTH} levels, or in a circle"
        )
    except UNENCODABLE as error:
        return failed("tool_output", f"the tool's output is not JSON: {error}")
    if isinstance(output, str):
        return ToolOutcome(_cut(output.encode(), limit) or output)
    return ToolOutcome(_cut(encoded, limit) or output)


def _cut(text: bytes, limit: int) -> str:
    """The text cut to `limit` bytes, marker included, and never inside a character; empty if it fits."""
    if len(text) <= limit:
        return ""
    kept = text[: max(limit - MARKER_BYTES, 0)].decode("utf-8", "ignore")
    return kept + f"\n[cut: {len(text) - len(kept.encode())} of {len(text)} bytes left out]"
