"""The cursor of an owner's stream: what was issued is read again, everything else is refused."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamjobs.cursor import Cursor
from streamjobs.errors import InvalidCursor
from streamjobs.gateway.owner_cursor import OwnerCursor, parse_owner_cursor, tag_of
from streamjobs.store import Position

NUMBERS = st.integers(0, 10**16 - 1)
TAGS = st.text("abcdefghijklmnopqrstuvwxyz234567", min_size=8, max_size=8)
CURSORS = st.builds(
    OwnerCursor,
    st.builds(Position, NUMBERS, NUMBERS, NUMBERS),
    st.dictionaries(TAGS, st.builds(Cursor, NUMBERS, NUMBERS), max_size=16),
)


@given(CURSORS)
def test_what_was_issued_is_read_again(cursor: OwnerCursor):
    """A stream would go on somewhere else than it was cut."""
    assert parse_owner_cursor(str(cursor)) == cursor
    assert re.fullmatch(r"[A-Za-z0-9:._-]+", str(cursor)), "an SSE id may hold nothing else"


@given(st.text(max_size=60) | CURSORS.map(lambda cursor: f"{cursor}:") | CURSORS.map(lambda c: f"{c}x"))
def test_everything_else_is_refused(text: str):
    """Garbage would be taken for a place in the log."""
    try:
        cursor = parse_owner_cursor(text)
    except InvalidCursor:
        return
    assert str(cursor) == text


@pytest.mark.parametrize(
    "text",
    ["", "0", "0-0", "1-0.1 ", "1-0.1:", "1-0.1:abcdefgh", "-1-0.1", "01-0.1", "1-0.1:abcdefgh.1-1.2",
     "1-0.1\n", "1-0.1" + ":abcdefgh.1-1" * 65, "1" * 17 + "-0.1", "\u0661-0.1"],
)  # fmt: skip
def test_near_misses_are_refused(text: str):
    with pytest.raises(InvalidCursor):
        parse_owner_cursor(text)


def test_a_tag_is_of_the_random_part():
    assert tag_of("j12-nnueod6uhold2r2h37mspwdehq") == "nnueod6u"
