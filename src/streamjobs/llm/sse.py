"""Reading server-sent events: bytes in, events out (WHATWG HTML, 9.2.6).

Rule 1: lines end at LF, CR and CRLF only, wherever the chunks are cut; the bytes of a line are never
decoded here, so U+2028 and half characters cannot break one.
Rule 2: memory is bounded: a line or an event over the limit is a `ProviderError`.
Rule 3: comments, `id` and `retry` make no event by themselves: an idle clock must not
take them for progress.

Rejected: `httpx.Response.aiter_lines`, which also splits at U+2028, U+0085 and VT, inside a JSON string.
"""

from __future__ import annotations

import msgspec

from streamjobs.errors import ProviderError

MAX_EVENT_BYTES = 4 * 1024 * 1024
_BOM = b"\xef\xbb\xbf"
_MAX_RETRY_DIGITS = 10  # `int` refuses thousands of digits


class ServerSentEvent(msgspec.Struct, frozen=True):
    """One event: its name (empty where the server gave none) and its data as bytes.

    `id` is the last one the stream gave; `retry`, in ms, is there in the event whose block brought it.
    """

    event: str
    data: bytes
    id: str = ""
    retry: int | None = None

    @property
    def is_progress(self) -> bool:
        """Whether it carries data: empty events and pings only keep a connection open."""
        return bool(self.data) and self.event != "ping"


class EventParser:
    """An incremental parser; one for each response."""

    def __init__(self, max_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max_bytes = max_bytes
        self._rest = bytearray()
        self._after_cr = False
        self._at_start = True
        self._event = ""
        self._id = ""
        self._retry: int | None = None
        self._data: list[bytes] = []
        self._size = 0

    def feed(self, chunk: bytes) -> list[ServerSentEvent]:
        """Take the next bytes; returns the events that they complete.

        Raises `ProviderError` where a line or an event is over the limit.
        """
        first, *others = self._with_lf_only(chunk).split(b"\n")
        self._rest += first
        self._require_room(len(self._rest))
        if not others:
            return []
        lines = [bytes(self._rest), *others[:-1]]
        self._rest = bytearray(others[-1])
        self._require_room(len(self._rest))
        return [event for line in lines if (event := self._line(line)) is not None]

    def close(self) -> list[ServerSentEvent]:
        """Take the end of the response; returns the last event if no blank line followed it.

        The standard drops that event; providers leave out the last line end of a whole one.
        """
        events = [self._line(bytes(self._rest)), self._line(b"")]
        self._rest.clear()
        return [event for event in events if event is not None]

    def _with_lf_only(self, chunk: bytes) -> bytes:
        if self._after_cr and chunk:
            self._after_cr = False
            if chunk.startswith(b"\n"):
                chunk = chunk[1:]
        if b"\r" not in chunk:
            return chunk
        self._after_cr = chunk.endswith(b"\r")
        return chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    def _require_room(self, size: int) -> None:
        if size > self._max_bytes:
            raise ProviderError(f"an event is over {self._max_bytes} bytes")

    def _line(self, line: bytes) -> ServerSentEvent | None:
        if self._at_start:
            self._at_start = False
            line = line.removeprefix(_BOM)
        if not line:
            return self._dispatch()
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._add_data(value)
        elif name == b"event":
            self._event = value.decode("utf-8", "replace")
        elif name == b"id" and b"\x00" not in value:
            self._id = value.decode("utf-8", "replace")
        elif name == b"retry" and value.isdigit() and len(value) < _MAX_RETRY_DIGITS:
            self._retry = int(value)
        return None

    def _add_data(self, value: bytes) -> None:
        self._size += len(value) + 1
        self._require_room(self._size)
        self._data.append(value)

    def _dispatch(self) -> ServerSentEvent | None:
        event = None
        if self._data:
            event = ServerSentEvent(self._event, b"\n".join(self._data), self._id, self._retry)
        self._event, self._retry, self._data, self._size = "", None, [], 0
        return event
