"""Coded streams: what a client decodes is what a plain stream says, piece by piece."""

from __future__ import annotations

import zstandard
from hypothesis import given
from hypothesis import strategies as st

from streamjobs.gateway.coding import Plain, Shared, Zstd
from streamjobs.gateway.events import takes_zstd
from streamjobs.gateway.ring import CHUNK_BYTES

PIECES = st.lists(st.tuples(st.booleans(), st.binary(max_size=300), st.integers(1, 2000)), max_size=6)


def content_of(pieces: list[bytes | Shared]) -> bytes:
    return b"".join(piece.plain if isinstance(piece, Shared) else piece for piece in pieces)


def made(rows: list[tuple[bool, bytes, int]]) -> list[bytes | Shared]:
    return [Shared(content * times) if is_shared else content * times for is_shared, content, times in rows]


@given(st.lists(PIECES, max_size=5))
def test_each_send_is_readable_at_once_and_the_whole_is_one_frame(sends: list[list[tuple[bool, bytes, int]]]):
    """A token that waits in a client's decoder for the next one would come seconds late, or never."""
    coding = Zstd()
    reader = zstandard.ZstdDecompressor().decompressobj()
    for rows in sends:
        pieces = made(rows)
        got = b"".join(reader.decompress(bytes(portion)) for portion in coding.portions(pieces))
        assert got == content_of(pieces)
        assert not reader.eof
    assert reader.decompress(coding.end()) == b""
    assert reader.eof
    assert reader.unused_data == b""


@given(PIECES)
def test_a_plain_stream_is_what_it_says(rows: list[tuple[bool, bytes, int]]):
    """Most clients take no zstd: cutting and joining must lose nothing for them."""
    pieces = made(rows)
    assert b"".join(map(bytes, Plain().portions(pieces))) == content_of(pieces)
    assert Plain().end() == b""


def test_nothing_large_is_handed_to_a_connection_in_one_go():
    """A thousand slow phones on a long job would each have a whole view waiting in this process."""
    view = Shared(bytes(range(256)) * 8192)
    for coding in (Plain(), Zstd()):
        portions = list(coding.portions([b"retry: 1\n", view, b"x" * 300_000]))
        assert max(map(len, portions)) <= CHUNK_BYTES
    assert len(list(Plain().portions([b":\n", b"retry: 1\n", b"small"]))) == 1


def test_a_view_is_compressed_once_for_all():
    """Five hundred viewers who join at once would cost five hundred compressions."""
    view = Shared(b"one word and another word " * 5000)
    first, second = (b"".join(map(bytes, Zstd().portions([view]))) for _ in range(2))
    assert first == second
    assert view.blocks is view.blocks
    assert len(first) < len(view.plain) / 50


def test_only_who_asks_for_zstd_gets_it():
    """A client that cannot read it would show nothing at all."""
    for asked in ("zstd", "gzip, deflate, br, zstd", "gzip, ZSTD;q=0.5", "zstd ; q=1, br"):
        assert takes_zstd(asked), asked
    for asked in ("", "gzip", "zstd;q=0", "gzip, zstd; q=0.00", "xzstd", "zstd2", "*"):
        assert not takes_zstd(asked), asked
