"""How a stream's bytes are coded: plain, or as zstd in which a view is compressed once for all its viewers.

Rule 1: a coded stream is one zstd frame. Its first view goes into it as compressed blocks that all viewers
share, everything else as it is, in raw blocks: three bytes more, no work and no memory for each viewer.
Only the first: compressed blocks go on from what the ones before them left to the decoder (repeat offsets).
Rule 2: every piece ends a block, so a client sees it at once.
Rule 3: no piece is copied that is large, and none is given to a connection in one go that is larger than
`CHUNK_BYTES`: what waits for a slow socket is that much for each viewer, not a view.

Format: RFC 8878, 3.1.1. Windows are at most 8 MB (RFC 9659).

Rejected: a compressor for each viewer, which costs it hundreds of KB; gzip, whose stored blocks would do the
same, but whose end is a checksum over all that a viewer got.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Protocol

import zstandard

from streamjobs.gateway.ring import CHUNK_BYTES

HEADERS = ((b"content-encoding", b"zstd"), (b"vary", b"accept-encoding"))

_PARAMETERS = zstandard.ZstdCompressionParameters(
    compression_level=3, window_log=21, write_content_size=False, write_checksum=False
)
_BEGIN = b"\x28\xb5\x2f\xfd\x00\x58"
"""The frame's header: the magic number, no size, no checksum, no dictionary; a window of 2 MB."""
_END = b"\x01\x00\x00"
"""An empty raw block that says that it is the last."""
_BLOCK = 64 * 1024
"""The most that goes into one raw block; the format allows 128 KB."""

Bytes = bytes | memoryview


class Shared:
    """A piece that many viewers get; compressed when the first one asks, then kept."""

    def __init__(self, plain: bytes) -> None:
        self.plain = plain

    @cached_property
    def blocks(self) -> bytes:
        """As compressed blocks, for a frame in which only raw ones are before them."""
        compressor = zstandard.ZstdCompressor(compression_params=_PARAMETERS).compressobj()
        frame = compressor.compress(self.plain) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
        if frame and not frame.startswith(_BEGIN):
            raise ValueError(f"a zstd frame begins with {frame[:6].hex()}")
        return frame[len(_BEGIN) :]


Piece = bytes | Shared


class Coding(Protocol):
    """One stream's coding."""

    def portions(self, pieces: Sequence[Piece]) -> Iterator[Bytes]:
        """The pieces as they are given to the connection, one after another."""
        ...

    def end(self) -> bytes:
        """What ends the stream."""
        ...


class Plain:
    """As it is. Has no state, so all streams share it."""

    def portions(self, pieces: Sequence[Piece]) -> Iterator[Bytes]:
        """The pieces as they are given to the connection, one after another."""
        if len(pieces) == 1 and isinstance(pieces[0], bytes) and len(pieces[0]) <= CHUNK_BYTES:
            return iter(pieces)  # pyright: ignore[reportReturnType] - nearly always, and it is bytes
        return _portions(piece.plain if isinstance(piece, Shared) else piece for piece in pieces)

    def end(self) -> bytes:
        """What ends the stream: nothing."""
        return b""


PLAIN: Coding = Plain()


class Zstd:
    """One zstd frame."""

    __slots__ = ("_has_begun", "_has_compressed")

    def __init__(self) -> None:
        self._has_begun = self._has_compressed = False

    def portions(self, pieces: Sequence[Piece]) -> Iterator[Bytes]:
        """The pieces as they are given to the connection, one after another."""
        return _portions([self._begin(), *(part for piece in pieces for part in self._blocks(piece))])

    def end(self) -> bytes:
        """What ends the stream."""
        return self._begin() + _END

    def _blocks(self, piece: Piece) -> Iterator[bytes]:
        if isinstance(piece, bytes):
            return _raw_blocks(piece)
        if self._has_compressed:
            return _raw_blocks(piece.plain)
        self._has_compressed = True
        return iter((piece.blocks,))

    def _begin(self) -> bytes:
        begin = b"" if self._has_begun else _BEGIN
        self._has_begun = True
        return begin


def _raw_blocks(plain: bytes) -> Iterator[bytes]:
    for start in range(0, len(plain), _BLOCK):
        content = plain[start : start + _BLOCK]
        yield (len(content) << 3).to_bytes(3, "little")
        yield content


def _portions(parts: Iterable[bytes]) -> Iterator[Bytes]:
    """Small parts together, large ones cut."""
    small: list[bytes] = []
    size = 0
    for part in parts:
        if size + len(part) <= CHUNK_BYTES:
            small.append(part)
            size += len(part)
            continue
        if small:
            yield b"".join(small)
        whole = memoryview(part)
        for start in range(0, len(part), CHUNK_BYTES):
            yield whole[start : start + CHUNK_BYTES]
        small, size = [], 0
    if small:
        yield small[0] if len(small) == 1 else b"".join(small)
