"""The cursor of an owner's stream: a position in the feed, and one in the log of each watched job. Pure.

    <ms>-<n>.<seen>[:<tag>.<seq>-<epoch>]...        1795586124295-0.2:nnueod6u.57-1795586124299

A tag is the beginning of the random part of a job's id: 40 bits, which nobody can choose.
Rule: it holds nothing but what an SSE id may hold, and no more than `MAX_WATCHED` jobs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from streamjobs.cursor import Cursor, parse_cursor
from streamjobs.errors import InvalidCursor
from streamjobs.store.owners import Position

MAX_WATCHED = 64
"""More than any setting allows; bounds what is parsed."""

_NUMBER = r"(?:0|[1-9][0-9]{0,15})"
_JOB = rf"[a-z2-7]{{8}}\.{_NUMBER}-{_NUMBER}"
_FORM = re.compile(rf"({_NUMBER})-({_NUMBER})\.({_NUMBER})((?::{_JOB}){{0,{MAX_WATCHED}}})", re.ASCII)


class OwnerCursor(NamedTuple):
    """Where a stream stands: in the feed, and by tag in the jobs it watches."""

    feed: Position
    jobs: Mapping[str, Cursor]

    def __str__(self) -> str:
        return "".join([str(self.feed), *(f":{tag}.{cursor}" for tag, cursor in self.jobs.items())])


def tag_of(job_id: str) -> str:
    """What stands for a job in a cursor."""
    return job_id.rpartition("-")[2][:8]


def parse_owner_cursor(text: str) -> OwnerCursor:
    """Read a cursor. Raises `InvalidCursor` for anything that no stream could ever have issued."""
    match = _FORM.fullmatch(text)
    if match is None:
        raise InvalidCursor("a cursor of this stream is the id of one of its events, or nothing")
    jobs = [part.split(".") for part in match[4].split(":")[1:]]
    return OwnerCursor(
        Position(int(match[1]), int(match[2]), int(match[3])),
        {tag: parse_cursor(cursor) for tag, cursor in jobs},
    )
