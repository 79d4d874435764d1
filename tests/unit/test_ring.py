"""The ring must give every viewer exactly what follows its cursor, or say that it cannot."""

from __future__ import annotations

import pytest

from streamjobs.cursor import Cursor
from streamjobs.gateway import ring as rings
from streamjobs.gateway.ring import CHUNK_BYTES, Ring


def at(seq: int, epoch: int = 1) -> Cursor:
    return Cursor(seq, epoch)


def filled(count: int, *, limit: int = 10_000, size: int = 10, start: int = 0) -> Ring:
    ring = Ring(limit)
    ring.reset(at(start))
    for seq in range(start + 1, start + count + 1):
        ring.push(at(seq), f"{seq:0{size}}".encode())
    ring.settle()
    return ring


def test_what_follows_every_cursor_is_the_exact_suffix():
    ring = filled(20, start=5)
    for seq in range(5, 25):
        chunk = ring.after(seq)
        assert chunk.plain.body == b"".join(f"{n:010}".encode() for n in range(seq + 1, 26))
        assert (chunk.cursor, chunk.plain.events) == (at(25), 25 - seq)


def test_viewers_at_the_same_place_share_the_same_bytes():
    """A thousand viewers must cost one join."""
    ring = filled(20)
    assert ring.after(3) is ring.after(3)


def test_viewers_at_many_places_do_not_multiply_the_memory():
    ring = filled(100)
    for seq in range(100):
        ring.after(seq)
    assert len(ring._joined) <= rings._JOINS


def test_a_new_event_makes_new_joins():
    ring = filled(3)
    before = ring.after(0)
    ring.push(at(4), b"new")
    ring.settle()
    assert ring.after(0).plain.body == before.plain.body + b"new"


@pytest.mark.parametrize("limit", [10, 95, 100, 101, 500])
def test_the_oldest_leave_and_no_more_than_needed(limit: int):
    ring = filled(50, limit=limit)
    assert ring.size == limit // 10 * 10
    assert ring.base.seq == 50 - ring.size // 10
    assert ring.top.seq == 50
    assert not ring.covers(ring.base.seq - 1)
    assert ring.after(ring.base.seq).plain.events == ring.size // 10


def test_it_keeps_the_last_event_however_large():
    """Otherwise one event over the limit would send every viewer to the log for it."""
    ring = filled(5, limit=3)
    assert (ring.base.seq, ring.top.seq) == (4, 5)


def test_it_goes_on_after_dropping():
    ring = filled(50, limit=100)
    ring.push(at(51), b"x" * 10)
    ring.settle()
    assert ring.after(ring.base.seq).plain.events == 10
    assert ring.after(50).plain.body == b"x" * 10


def test_a_cursor_is_held_only_with_its_epoch():
    """The same seq of another history is another event."""
    ring = filled(5, start=5)
    assert ring.holds(at(5))
    assert ring.holds(at(7))
    assert ring.holds(at(10))
    for cursor in (at(5, 2), at(7, 2), at(10, 2), at(4), at(11)):
        assert not ring.holds(cursor)


def test_a_viewer_far_behind_gets_pieces():
    """One viewer's backlog must not be handed to its socket in one piece of any size."""
    ring = filled(30, limit=1_000_000, size=2500)
    seq, whole, pieces = 0, b"", 0
    while seq < 30:
        chunk = ring.after(seq)
        assert len(chunk.plain.body) <= CHUNK_BYTES
        whole += chunk.plain.body
        seq, pieces = chunk.cursor.seq, pieces + 1
    assert whole == b"".join(f"{n:02500}".encode() for n in range(1, 31))
    assert pieces == 5


def test_reset_forgets():
    ring = filled(5)
    ring.reset(at(9, 2))
    assert (ring.base, ring.top, ring.size) == (at(9, 2), at(9, 2), 0)
    assert not ring.holds(at(5))


def test_what_was_read_again_is_held_as_if_it_had_never_left():
    """Viewers who were away would each read the log, one after the other."""
    ring = filled(5, start=20)
    ring.precede(at(15), [at(n) for n in range(16, 21)], [f"{n:010}".encode() for n in range(16, 21)])
    ring.precede(at(13), [at(14), at(15)], [b"14", b"15"])
    assert (ring.base, ring.top, ring.size) == (at(13), at(25), 104)
    assert ring.after(13).plain.body == b"1415" + b"".join(f"{n:010}".encode() for n in range(16, 26))
    assert ring.after(18).plain.body == b"".join(f"{n:010}".encode() for n in range(19, 26))
    assert ring.holds(at(14))
    assert not ring.holds(at(14, epoch=2))


def test_what_was_read_again_may_fill_an_empty_ring_and_leaves_first():
    ring = filled(0, start=3, limit=50)
    ring.precede(at(0), [at(1), at(2), at(3)], [b"1" * 10, b"2" * 10, b"3" * 10])
    assert (ring.base, ring.top, ring.size) == (at(0), at(3), 30)
    for seq in range(4, 8):
        ring.push(at(seq), str(seq).encode() * 10)
    ring.settle()
    assert (ring.base, ring.top, ring.size) == (at(2), at(7), 50)
    assert ring.after(2).plain.body == b"".join(str(seq).encode() * 10 for seq in range(3, 8))


def test_what_was_read_again_does_not_exceed_the_limit():
    ring = filled(5, start=20, limit=59)
    ring.precede(at(19), [at(20)], [b"x" * 10])
    assert (ring.base, ring.size) == (at(20), 50)
