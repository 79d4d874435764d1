"""A position in a job's log: `<seq>-<epoch>`, which is the Redis stream id and the SSE `id:`.

Rule 1: seq orders events; epoch only tells histories apart. Positions are compared whole.
Rule 2: what comes from outside is checked here before it reaches Redis.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from streamjobs.errors import InvalidCursor

_FORM = re.compile(r"(0|[1-9][0-9]{0,15})-(0|[1-9][0-9]{0,15})", re.ASCII)


class Cursor(NamedTuple):
    """Event `seq` as written under `epoch`; `START` is before the first event."""

    seq: int
    epoch: int

    def __str__(self) -> str:
        return f"{self.seq}-{self.epoch}"


START = Cursor(0, 0)


def parse_cursor(text: str) -> Cursor:
    """Read a cursor; `"0"` and `"0-0"` are `START`.

    Raises `InvalidCursor` for anything that no log could ever have issued.
    """
    if text == "0":
        return START
    match = _FORM.fullmatch(text)
    if match is None:
        raise InvalidCursor("a cursor is '<seq>-<epoch>', as in the id of an event, or 0 for the beginning")
    return Cursor(int(match[1]), int(match[2]))
