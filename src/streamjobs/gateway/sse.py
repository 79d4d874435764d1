"""Frames of server-sent events, as bytes. Pure.

Rule 1: one frame is one block, `id`, `event` and exactly one line of `data`, and is written at once.
Rule 2: never a block without `data`: `retry:` goes in front of a real event, a heartbeat is one comment
line without a blank line behind it. Several clients take either for an empty event.
Rule 3: ids and names hold nothing but `[A-Za-z0-9:._-]`; data holds no CR and no LF.
Rule 4: only positions of the log carry an id, so that what a client sends back is always a cursor.

`snapshot` carries the view and the cursor it covers; `reset` says that the client's cursor is not in the
log, a snapshot follows in the same write; `handover` says that the stream ends and the job does not;
`error` is a problem document, after which the stream ends.
"""

from __future__ import annotations

import random
import re
from functools import lru_cache

from streamjobs.cursor import Cursor
from streamjobs.errors import StreamjobsError
from streamjobs.events import encode_json
from streamjobs.gateway.problems import problem_of
from streamjobs.store import Entry

HEARTBEAT = b":\n"
DEGRADED = b": degraded\n"
"""A heartbeat while the gateway does not hear or read Redis: nothing is lost, but nothing new comes."""

HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache, no-transform"),
    (b"x-accel-buffering", b"no"),
)

FIRST_RETRY = (1000, 10_000)
"""ms; the range for connections that may all break at once."""
HANDOVER_RETRY = (500, 5000)
"""ms; the range when it is we who end the stream."""

_SAFE = re.compile(r"[A-Za-z0-9:._-]{1,128}", re.ASCII)


@lru_cache(maxsize=1024)
def event_name(kind: str) -> bytes:
    """An event type as a name: types come from users too, one that does not fit becomes `message`."""
    return kind.encode() if _SAFE.fullmatch(kind) else b"message"


def frame(cursor: str, kind: str, data: bytes) -> bytes:
    """A frame; without an `id` line where `cursor` is empty."""
    start = b"id: %b\n" % cursor.encode() if cursor else b""
    return b"%bevent: %b\ndata: %b\n\n" % (start, event_name(kind), _one_line(data))


def event_frame(entry: Entry) -> bytes:
    """The frame of an event of the log; its content is forwarded as it is."""
    cursor, kind, data = entry
    return b"id: %d-%d\nevent: %b\ndata: %b\n\n" % (
        cursor.seq,
        cursor.epoch,
        event_name(kind),
        _one_line(data),
    )


def snapshot_frame(cursor: Cursor, view: bytes) -> bytes:
    """The frame of a view that covers everything up to `cursor`."""
    return b"id: %d-%d\nevent: snapshot\ndata: %b\n\n" % (cursor.seq, cursor.epoch, _one_line(view))


def reset_frame(reason: str, cursor: object) -> bytes:
    """The frame that says that `cursor`, the client's, is not in the log (or feed)."""
    return b"event: reset\ndata: %b\n\n" % encode_json({"reason": reason, "cursor": str(cursor)})


def handover_frame(reason: str) -> bytes:
    """The frame of a stream that ends before its job does: come back after `retry`, with your cursor."""
    return b"retry: %d\nevent: handover\ndata: %b\n\n" % (
        random.randint(*HANDOVER_RETRY),
        encode_json({"reason": reason}),
    )


def error_frame(error: StreamjobsError) -> bytes:
    """The frame of an error that shows only once the stream is open."""
    return b"event: error\ndata: %b\n\n" % encode_json(problem_of(error))


def retry_line() -> bytes:
    """How long a client waits before it comes back, each another time; to be put in front of a frame."""
    return b"retry: %d\n" % random.randint(*FIRST_RETRY)


def _one_line(data: bytes) -> bytes:
    """Raw line ends are legal between JSON's tokens, and would forge fields here."""
    if b"\n" in data or b"\r" in data:
        return data.replace(b"\r", b" ").replace(b"\n", b" ")
    return data
