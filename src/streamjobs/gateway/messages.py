"""What is said over a WebSocket, as JSON text: reading a client's messages, making ours. Pure.

    client  subscribe {job, after?, merge?, flush?} · unsubscribe {job} · ping {data?}
    server  subscribed {job} · snapshot {job, id, data} · events {job, events: [{id, type, data}]} ·
            reset {job, reason, cursor} · ended {job, id} · unsubscribed {job} · pong {data} ·
            error {a problem document, job?} · handover {reason, retry} · token {token, expires_ms}

Rule 1: `op` names the message; a field that is not known is refused, a typo would mean something else.
Rule 2: what others share (events, views) is a part of a message, never copied into one.
"""

from __future__ import annotations

import random
from typing import Annotated, Any, cast

import msgspec

from streamjobs.cursor import Cursor
from streamjobs.errors import BadRequest, Invalid, StreamjobsError
from streamjobs.events import UNENCODABLE, Json, encode_json
from streamjobs.gateway.body import fields_of
from streamjobs.gateway.problems import problem_of
from streamjobs.gateway.snapshots import Snapshot
from streamjobs.gateway.sse import HANDOVER_RETRY
from streamjobs.gateway.websocket import Parts
from streamjobs.inputs import MAX_DEPTH, bounded, is_too_deep

MAX_ECHO = 256
"""Bytes of a ping's `data`, which we send back."""
_MAX_ID = 64


class Subscribe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Follow a job, from behind `after`; `flush` is milliseconds."""

    op: str
    job: str
    after: str | None = None
    merge: bool = False
    flush: Annotated[int, msgspec.Meta(ge=0, le=999_999)] | None = None


class Unsubscribe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Follow it no more."""

    op: str
    job: str


class Ping(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Answer, with the same data."""

    op: str
    data: Any = None


Asked = Subscribe | Unsubscribe | Ping
KINDS: dict[Json, type[Asked]] = {"subscribe": Subscribe, "unsubscribe": Unsubscribe, "ping": Ping}


def decode(text: str) -> dict[str, Json]:
    """A client's message as it came. Raises `BadRequest`."""
    try:
        value: Json = msgspec.json.decode(text)
    except UNENCODABLE as error:
        why = f"it nests deeper than {MAX_DEPTH} levels" if isinstance(error, RecursionError) else str(error)
        raise BadRequest(bounded(f"the message is not JSON: {why}")) from None
    if not isinstance(value, dict):
        raise BadRequest("the message is no JSON object")
    if is_too_deep(value):
        raise BadRequest(f"the message nests deeper than {MAX_DEPTH} levels")
    return cast("dict[str, Json]", value)


def asked_of(message: dict[str, Json]) -> Asked:
    """What a client asks for. Raises `Invalid` naming the field."""
    op = message.get("op")
    kind = KINDS.get(op) if isinstance(op, str) else None
    if kind is None:
        raise Invalid("op: subscribe, unsubscribe or ping")
    return fields_of(message, kind)


def job_of(message: dict[str, Json]) -> str:
    """The job that a message names, to tell which one an answer is about; it may be anything short."""
    job = message.get("job")
    return job if isinstance(job, str) and len(job) <= _MAX_ID else ""


# --- ours


def told(op: str, **fields: object) -> Parts:
    """A small message."""
    return (encode_json({"op": op, **fields}),)


def pong(data: Any) -> Parts:
    """The answer to a ping. Raises `Invalid`."""
    try:
        echo = encode_json(data)
    except UNENCODABLE as error:
        raise Invalid(bounded(f"data: {error}")) from None
    if len(echo) > MAX_ECHO:
        raise Invalid(f"data: at most {MAX_ECHO} bytes")
    return (b'{"op":"pong","data":%b}' % echo,)


def error(problem: StreamjobsError, job: str = "") -> Parts:
    """What was wrong, and with which job."""
    return told("error", **problem_of(problem), **({"job": job} if job else {}))


def handover(reason: str) -> Parts:
    """The connection ends: come back after `retry` ms, with your cursors."""
    return told("handover", reason=reason, retry=random.randint(*HANDOVER_RETRY))


def snapshot(job: str, found: Snapshot) -> Parts:
    """A view."""
    head = b'{"op":"snapshot","job":"%b","id":"%b","data":' % (job.encode(), str(found.cursor).encode())
    return (head, found.view, b"}")


def reset(job: str, reason: str, cursor: Cursor) -> Parts:
    """The client's cursor is not in the log; a snapshot follows."""
    return told("reset", job=job, reason=reason, cursor=str(cursor))


def events_head(job: str) -> bytes:
    """What comes before the members of a job's events."""
    return b'{"op":"events","job":"%b","events":[' % job.encode()


EVENTS_END = b"]}"
