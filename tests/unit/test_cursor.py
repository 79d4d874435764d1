"""Cursors come back from browsers: what no log could have issued must stop here, before it reaches Redis."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamjobs.cursor import START, Cursor, parse_cursor
from streamjobs.errors import InvalidCursor

numbers = st.integers(min_value=0, max_value=10**16 - 1)


@given(numbers, numbers)
def test_a_printed_cursor_reads_back(seq: int, epoch: int):
    """A viewer that comes back with the id it was given would land somewhere else."""
    cursor = Cursor(seq, epoch)
    assert parse_cursor(str(cursor)) == cursor


@pytest.mark.parametrize("text", ["0", "0-0"])
def test_the_beginning_has_two_names(text: str):
    """`?after=0`, the documented way to replay everything, would be refused."""
    assert parse_cursor(text) == START == Cursor(0, 0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "1",
        "-",
        "1-",
        "-1",
        "-1-2",
        "1--2",
        "1-2-3",
        "+1-2",
        "1-+2",
        "1_0-2",
        "1.0-2",
        "1e3-2",
        "0x1-2",
        "01-2",
        "1-02",
        "00-0",
        "00",
        " 1-2",
        "1-2 ",
        "1-2\n",
        "\n1-2",
        "1-2\x00",
        "\x001-2",
        "1-2,3-4",
        "$",
        "*",
        "(1-2",
        "nan-1",
        "٣-٤",
        "²-1",
        "\uff11-\uff12",
        "1\u20102",
        "1\u22122",
        "9" * 17 + "-1",
        "1-" + "9" * 17,
        "9" * 5000,
        "null",
        "😀",
    ],
)
def test_anything_else_is_refused(text: str):
    """Garbage would reach a Redis command as part of an id: an error there, or another position than was
    meant."""
    with pytest.raises(InvalidCursor):
        parse_cursor(text)


@given(st.text(max_size=40))
def test_what_is_taken_is_what_would_be_printed(text: str):
    """Two spellings of one position would break comparisons of whole ids, and so make false resets."""
    try:
        cursor = parse_cursor(text)
    except InvalidCursor:
        return
    assert text in {str(cursor), "0"}


def test_events_are_ordered_by_their_numbers():
    """As text, event 10 would come before event 9, and a viewer would skip it."""
    ids = ["10-5", "9-99", "2-1", "10-4"]
    assert sorted(ids, key=parse_cursor) == ["2-1", "9-99", "10-4", "10-5"]
    assert parse_cursor("1-1") > START


def test_histories_with_the_same_number_differ():
    """After a failover that lost a tail, event 7 may be another event 7: comparing numbers alone would
    splice."""
    assert parse_cursor("7-100") != parse_cursor("7-200")
