"""The closed union of events, version 1, and their wire form.

Rule 1: an event is a fact, past tense and for ever: fields may be added with defaults, never changed.
Rule 2: the type travels outside (`t`), the content is one line of JSON (`d`) that begins with `ts`.
Rule 3: what this release does not know decodes to `Unknown` and folds to nothing.

`ts` is Redis's clock in milliseconds; scripts stamp their own events, workers go by their offset to it.
"""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec

from streamjobs.errors import Invalid
from streamjobs.redaction import redacted

Json = Any
"""A JSON value: None, bool, int, float, str, list or dict."""


class Event(msgspec.Struct, frozen=True, omit_defaults=True):
    """What every event says: when, in ms since the epoch."""

    type: ClassVar[str] = ""
    ts: int = 0


class ErrorInfo(msgspec.Struct, frozen=True):
    """Why something failed: a stable code, words for a person, and whether another try can help."""

    code: str
    message: str
    retryable: bool = False

    def __post_init__(self) -> None:
        """Take out what looks like a secret: errors of others quote URLs and headers."""
        clean = redacted(self.message)
        if clean != self.message:
            msgspec.structs.force_setattr(self, "message", clean)


class Usage(msgspec.Struct, frozen=True):
    """Tokens of one turn, or the sum over a job."""

    input_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    cached_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            self.reasoning_tokens + other.reasoning_tokens,
            self.cached_tokens + other.cached_tokens,
        )


class ToolCallRequest(msgspec.Struct, frozen=True):
    """A call the model asked for. `arguments` is the JSON text as the model wrote it."""

    call_id: str
    tool: str
    arguments: str
    extra: dict[str, Json] = {}


# --- lifecycle ---------------------------------------------------------------------------------------


class JobQueued(Event, frozen=True, kw_only=True):
    """A job was submitted; everything needed to start it.

    `schedule` made it, for the instant `tick_ms`, or out of turn without one.
    """

    type = "job.queued"
    kind: str
    owner: str
    queue: str = "default"
    priority: str = "default"
    held: str = ""
    thread_id: str = ""
    message_id: str = ""
    metadata: dict[str, Json] = {}
    delay_ms: int = 0
    timeout_ms: int = 0
    max_attempts: int = 0
    concurrency_key: str = ""
    parent: str = ""
    depth: int = 0
    rerun_of: str = ""
    rerun_by: str = ""
    schedule: str = ""
    tick_ms: int = 0
    start_timeout_ms: int = 0
    input: msgspec.Raw = msgspec.Raw(b"null")


class JobStarted(Event, frozen=True, kw_only=True):
    """A worker took the job; after a crash, `resumed_from` is the seq it goes on from."""

    type = "job.started"
    attempt: int
    worker: str
    waited_ms: int = 0
    resumed_from: int = 0


class JobProgress(Event, frozen=True, kw_only=True):
    """How far the job is, as its code says; `within` names the step that said it."""

    type = "job.progress"
    percent: float | None = None
    step: int | None = None
    steps: int | None = None
    message: str = ""
    within: str = ""


class JobLog(Event, frozen=True, kw_only=True):
    """A line for people, from the job's code; `within` names the step that said it."""

    type = "job.log"
    level: str = "info"
    message: str = ""
    data: Json = None
    within: str = ""


class JobRetrying(Event, frozen=True, kw_only=True):
    """An attempt failed; the next one starts after `delay_ms`."""

    type = "job.retrying"
    attempt: int
    error: ErrorInfo
    delay_ms: int = 0


class JobLost(Event, frozen=True, kw_only=True):
    """The worker's lease ran out; `delay_ms` is the crash back-off."""

    type = "job.lost"
    worker: str = ""
    crashes: int = 0
    delay_ms: int = 0


class JobRequeued(Event, frozen=True, kw_only=True):
    """The job waits for a worker again (`why`: timer, signal, child, yield, released) or is held (`held`)."""

    type = "job.requeued"
    why: str = ""
    held: str = ""


class JobWaiting(Event, frozen=True, kw_only=True):
    """The job waits without a worker: for `timer`, `signal:<name>`, `approval:<key>` or `child:<job>`.

    Where it waits for several of them, the first is named.
    """

    type = "job.waiting"
    waits_for: str = msgspec.field(default="", name="for")
    until: int = 0


class SignalReceived(Event, frozen=True, kw_only=True):
    """Somebody outside sent the job a value."""

    type = "signal.received"
    name: str
    payload: Json = None
    key: str = ""
    by: str = ""


class ApprovalRequested(Event, frozen=True, kw_only=True):
    """Somebody is to approve or deny `subject` (`tool` or `step`); the answer is a `signal.received`.

    `key` names the request; `detail` is what is to be judged; 0 in `timeout_ms` waits for ever.
    """

    type = "approval.requested"
    key: str
    subject: str = ""
    message: str = ""
    detail: Json = None
    timeout_ms: int = 0


class TimerSet(Event, frozen=True, kw_only=True):
    """The job will be woken in `delay_ms`; a short sleep is kept `in_worker`, which writes its end itself."""

    type = "timer.set"
    key: str
    delay_ms: int
    in_worker: bool = False


class TimerFired(Event, frozen=True, kw_only=True):
    """A timer of the job came due."""

    type = "timer.fired"
    key: str


class JobPaused(Event, frozen=True, kw_only=True):
    """The job was parked until somebody resumes it."""

    type = "job.paused"
    by: str = ""
    reason: str = ""


class JobResumed(Event, frozen=True, kw_only=True):
    """A paused job goes on."""

    type = "job.resumed"
    by: str = ""
    reason: str = ""


class JobCancelRequested(Event, frozen=True, kw_only=True):
    """Somebody wants the job to stop; no tool starts after this."""

    type = "job.cancel_requested"
    by: str = ""
    reason: str = ""


class JobCompleted(Event, frozen=True, kw_only=True):
    """The job ended with a result; one too large for an event is the artifact of that name."""

    type = "job.completed"
    result: msgspec.Raw = msgspec.Raw(b"null")
    summary: str = ""
    artifact: str = ""


class JobFailed(Event, frozen=True, kw_only=True):
    """The job ended with an error."""

    type = "job.failed"
    error: ErrorInfo


class JobCancelled(Event, frozen=True, kw_only=True):
    """The job was stopped: `effective_ms` after the request, with `deltas_after` deltas written meanwhile."""

    type = "job.cancelled"
    by: str = ""
    reason: str = ""
    effective_ms: int = 0
    deltas_after: int = 0


# --- turns and text ----------------------------------------------------------------------------------


class TurnStarted(Event, frozen=True, kw_only=True):
    """The model is being called; `chat` is the key of a workflow's own call, empty in the built-in chat."""

    type = "turn.started"
    turn: int
    attempt: int = 1
    model: str = ""
    chat: str = ""


class TurnRestarted(Event, frozen=True, kw_only=True):
    """The turn begins again; what it said from `supersedes_from` (a seq) on no longer stands."""

    type = "turn.restarted"
    turn: int
    attempt: int
    supersedes_from: int
    model: str = ""
    why: str = ""


class TurnCompleted(Event, frozen=True, kw_only=True):
    """The model's whole answer: what the next turn is built from.

    `extra` is what the provider wants back untouched (signed thinking blocks, reasoning text).
    """

    type = "turn.completed"
    turn: int
    attempt: int = 1
    finish_reason: str = ""
    usage: Usage = Usage()
    text: str = ""
    calls: list[ToolCallRequest] = []
    extra: dict[str, Json] = {}


class TurnFailed(Event, frozen=True, kw_only=True):
    """A workflow's own call of the model failed, and the workflow was told so.

    Where that ends the job, or its attempt, `job.failed` or `job.retrying` follows.
    """

    type = "turn.failed"
    turn: int
    error: ErrorInfo
    attempt: int = 1


class TextDelta(Event, frozen=True, kw_only=True):
    """A piece of the answer."""

    type = "text.delta"
    turn: int
    text: str
    attempt: int = 1


class ReasoningDelta(Event, frozen=True, kw_only=True):
    """A piece of the model's reasoning."""

    type = "reasoning.delta"
    turn: int
    text: str
    attempt: int = 1


# --- tools, steps, children, artifacts ---------------------------------------------------------------


class ToolCalled(Event, frozen=True, kw_only=True):
    """The model asked for a tool; recorded before anything runs."""

    type = "tool.called"
    call_id: str
    tool: str
    arguments: Json = None
    turn: int = 0


class ToolStarted(Event, frozen=True, kw_only=True):
    """The tool is about to run; committed before its effect."""

    type = "tool.started"
    call_id: str
    idempotency_key: str
    effect: str
    attempt: int = 1


class ToolProgress(Event, frozen=True, kw_only=True):
    """How far a running tool is."""

    type = "tool.progress"
    call_id: str
    percent: float | None = None
    message: str = ""


class ToolCompleted(Event, frozen=True, kw_only=True):
    """The tool's output, as the model sees it."""

    type = "tool.completed"
    call_id: str
    output: Json = None
    ms: int = 0


class ToolFailed(Event, frozen=True, kw_only=True):
    """The tool failed; the model is told."""

    type = "tool.failed"
    call_id: str
    error: ErrorInfo
    ms: int = 0


class ToolUnknown(Event, frozen=True, kw_only=True):
    """A `once` tool was started and never recorded: whether it took effect is not known."""

    type = "tool.unknown"
    call_id: str
    message: str = ""


class StepStarted(Event, frozen=True, kw_only=True):
    """A step of a workflow began."""

    type = "step.started"
    key: str
    attempt: int = 1
    name: str = ""
    effect: str = ""
    idempotency_key: str = ""


class StepCompleted(Event, frozen=True, kw_only=True):
    """A step's outcome, recorded once; an output too large for an event is the artifact of that name."""

    type = "step.completed"
    key: str
    attempt: int = 1
    output: Json = None
    ms: int = 0
    artifact: str = ""


class StepFailed(Event, frozen=True, kw_only=True):
    """An attempt of a step failed: for good within this attempt of the job, unless it `will_retry`."""

    type = "step.failed"
    key: str
    error: ErrorInfo
    attempt: int = 1
    ms: int = 0
    will_retry: bool = False
    delay_ms: int = 0


class StepUnknown(Event, frozen=True, kw_only=True):
    """A `once` step was started and never recorded: whether it took effect is not known."""

    type = "step.unknown"
    key: str
    message: str = ""


class ChildSpawned(Event, frozen=True, kw_only=True):
    """The job submitted another one."""

    type = "child.spawned"
    job: str
    key: str = ""
    kind: str = ""


class ChildEnded(Event, frozen=True, kw_only=True):
    """A child ended; written by the script that ended it."""

    type = "child.ended"
    job: str
    status: str
    result: Json = None
    error: ErrorInfo | None = None
    summary: str = ""
    artifact: str = ""


class ArtifactCreated(Event, frozen=True, kw_only=True):
    """The job made something too large for an event; `within` names the step that made it."""

    type = "artifact.created"
    name: str
    media_type: str
    size: int
    where: str
    within: str = ""


class Unknown(Event, frozen=True, kw_only=True):
    """An event of another release, or a user's own `x.` type; `within` names the step that said it."""

    type = "unknown"
    within: str = ""


def _leaves(base: type[Event]) -> list[type[Event]]:
    return [c for c in base.__subclasses__() if c is not Unknown]


EVENTS: dict[str, type[Event]] = {cls.type: cls for cls in _leaves(Event)}
"""Event type -> struct."""

TERMINAL = frozenset({JobCompleted.type, JobFailed.type, JobCancelled.type})
DELTAS = frozenset({TextDelta.type, ReasoningDelta.type})

_DECODERS = {name: msgspec.json.Decoder(cls) for name, cls in EVENTS.items()}
_UNKNOWN = msgspec.json.Decoder(Unknown)
_encoder = msgspec.json.Encoder()

# Legal in JSON, but readers built on str.splitlines() cut a line at them.
_LINE_BREAKS = (
    ("\x85".encode(), b"\\u0085"),
    ("\u2028".encode(), b"\\u2028"),
    ("\u2029".encode(), b"\\u2029"),
)

UNENCODABLE = (msgspec.MsgspecError, RecursionError, UnicodeError, ValueError, TypeError, OverflowError)
"""What encoding or decoding of foreign data may raise (deep nesting is no msgspec error)."""


def one_line(encoded: bytes) -> bytes:
    """Escape the three characters that are legal in JSON and that some readers take for line ends."""
    if encoded.isascii():
        return encoded
    for raw, escaped in _LINE_BREAKS:
        encoded = encoded.replace(raw, escaped)
    return encoded


def encode_json(value: object) -> bytes:
    """Encode any JSON value or struct as one line.

    Raises one of `UNENCODABLE` for what JSON cannot say (lone surrogates, cycles, foreign types).
    """
    return one_line(_encoder.encode(value))


def encode_event(event: Event) -> bytes:
    """The wire form of an event's content: one line of JSON, `ts` first."""
    return one_line(_encoder.encode(event))


def decode_event(kind: str, content: bytes) -> Event:
    """Read an event; a type this release does not know gives `Unknown`.

    Raises `Invalid` where the content of a known type does not fit it.
    """
    try:
        return _DECODERS.get(kind, _UNKNOWN).decode(content)
    except UNENCODABLE as error:
        raise Invalid(f"event {kind} does not decode: {error}") from error


def decode_raw(content: msgspec.Raw) -> Json:
    """Read what an event carries untouched. Raises `Invalid` where that is no JSON value."""
    try:
        return msgspec.json.decode(content)
    except UNENCODABLE as error:
        raise Invalid(f"not a JSON value: {error}") from error


def clean_text(text: str) -> str:
    """Replace lone surrogates, which JSON cannot carry, and NULs, which clients and terminals choke on."""
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text.replace("\x00", "\ufffd") if "\x00" in text else text
