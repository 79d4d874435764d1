"""Which parts of an event are confidential, and what an event looks like with those in envelopes. Pure.

Rule 1: what scripts, filters and dashboards need stays readable: types, ids, names, counts, times, codes.
Rule 2: an event with envelopes is JSON of the same form: scripts cut and move it as any other.
Rule 3: decrypting gives the event back byte for byte; one without envelopes (from before encryption was
turned on, or written by a script) is as it is.
Rule 4: an event of a type that is not in the table keeps its `ts` and `within`; all of it is confidential.

A child's outcome is written for two: its own log, and its parent's, where a script moves it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import msgspec

from streamjobs.encryption import Cipher, has_envelope
from streamjobs.errors import DamagedCiphertext, Invalid
from streamjobs.events import UNENCODABLE

FIELDS: dict[str, tuple[str, ...]] = {
    "job.queued": ("input", "metadata"),
    "job.progress": ("message",),
    "job.log": ("message", "data"),
    "job.retrying": ("error",),
    "job.completed": ("result", "summary"),
    "job.failed": ("error",),
    "signal.received": ("payload",),
    "approval.requested": ("message", "detail"),
    "turn.restarted": ("why",),
    "turn.completed": ("text", "calls", "extra"),
    "turn.failed": ("error",),
    "text.delta": ("text",),
    "reasoning.delta": ("text",),
    "tool.called": ("arguments",),
    "tool.progress": ("message",),
    "tool.completed": ("output",),
    "tool.failed": ("error",),
    "tool.unknown": ("message",),
    "step.completed": ("output",),
    "step.failed": ("error",),
    "step.unknown": ("message",),
}
"""Of each type of event, the confidential fields. Of an error it is the message: its code is counted by."""

READABLE = frozenset(
    {
        "job.started", "job.lost", "job.requeued", "job.waiting", "job.paused", "job.resumed",
        "job.cancel_requested", "job.cancelled", "timer.set", "timer.fired", "turn.started", "tool.started",
        "step.started", "child.spawned", "artifact.created",
    }
)  # fmt: skip
"""Types of events of which nothing is confidential: names and reasons are for operators to see."""

CHILD_ENDED = "child.ended"
OUTCOMES = frozenset({"job.completed", "job.failed"})
"""What a script moves into the log of a parent, as `child.ended`."""
NOTICE = "notice"
SCHEDULE = "schedule"

_SEALED = "sealed"
"""The only other field of an event that is confidential as a whole."""
_KEPT = ("ts", "within")
_MEMBERS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_encoder = msgspec.json.Encoder()


class _Part(NamedTuple):
    """A confidential part: the field, the member of it that is meant (of an error), and its place."""

    field: str
    member: str
    place: bytes


def _parts(kind: str, fields: tuple[str, ...]) -> tuple[_Part, ...]:
    return tuple(
        _Part(field, "message" if field == "error" else "", f"{kind}\0{field}".encode()) for field in fields
    )


_PARTS = {kind: _parts(kind, fields) for kind, fields in FIELDS.items()}
_PARTS[NOTICE] = _parts(NOTICE, ("message",))
_PARTS[SCHEDULE] = _parts(SCHEDULE, ("input", "metadata"))
_OF_CHILDREN = (*_PARTS["job.completed"], *_PARTS["job.failed"])


def encrypt(cipher: Cipher, kind: str, content: bytes, parent: Cipher | None = None) -> bytes:
    """An event's content with envelopes for what is confidential; an outcome for the `parent` as well.

    Raises `Invalid` for what is no event.
    """
    if kind in READABLE:
        return content
    parts = _PARTS.get(kind)
    try:
        if parts is None:
            return _encrypt_whole(cipher, kind, content)
        if parent is not None and kind in OUTCOMES:
            return _turned(content, parts, lambda value, place: cipher.shared_envelope(value, place, parent))
        return _turned(content, parts, cipher.envelope)
    except (*UNENCODABLE, KeyError) as error:
        raise Invalid(f"{kind} of {cipher.id} is no event: {error}") from error


def encrypt_fields(cipher: Cipher, kind: str, fields: bytes) -> bytes:
    """The same for an event's fields without the braces, which a script puts behind its `ts`."""
    return encrypt(cipher, kind, b"{" + fields + b"}")[1:-1]


def decrypt(cipher: Cipher, kind: str, content: bytes) -> bytes:
    """An event's content as it was before `encrypt`. Raises `DamagedCiphertext`."""
    if not has_envelope(content):
        return content
    try:
        if kind == CHILD_ENDED and (job := _MEMBERS.decode(content).get("job")) is not None:
            child = msgspec.json.decode(job, type=str)
            return _turned(
                content, _OF_CHILDREN, lambda value, place: cipher.value_of_child(value, place, child)
            )
        parts = _PARTS.get(kind)
        return _turned(content, parts, cipher.value) if parts else _decrypt_whole(cipher, kind, content)
    except (*UNENCODABLE, KeyError) as error:
        raise DamagedCiphertext(f"{kind} of {cipher.id} is no event: {error}") from error


def without(kind: str, content: bytes) -> bytes:
    """A content with empty texts for its envelopes: for what is shown although nobody can open them."""
    return _turned(content, _PARTS[kind], lambda value, _: b'""' if value.startswith(b'"enc') else value)


def _turned(content: bytes, parts: Iterable[_Part], turn: Callable[[bytes, bytes], bytes]) -> bytes:
    """The same members in the same order, with other values for the parts that are there."""
    members = _MEMBERS.decode(content)
    for part in parts:
        raw = members.get(part.field)
        if raw is None:
            continue
        if part.member:
            inner = _MEMBERS.decode(raw)
            inner[part.member] = msgspec.Raw(turn(bytes(inner[part.member]), part.place))
            members[part.field] = msgspec.Raw(_encoder.encode(inner))
        else:
            members[part.field] = msgspec.Raw(turn(bytes(raw), part.place))
    return _encoder.encode(members)


def _encrypt_whole(cipher: Cipher, kind: str, content: bytes) -> bytes:
    members = _MEMBERS.decode(content) if content.startswith(b"{") else {}
    kept = {name: members[name] for name in _KEPT if name in members}
    return _encoder.encode({**kept, _SEALED: msgspec.Raw(cipher.envelope(content, kind.encode()))})


def _decrypt_whole(cipher: Cipher, kind: str, content: bytes) -> bytes:
    sealed = _MEMBERS.decode(content).get(_SEALED)
    return content if sealed is None else cipher.value(bytes(sealed), kind.encode())
