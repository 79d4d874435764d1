"""Messages as frames of a WebSocket: whatever their size and parts, a client reads what was meant."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.frames import Frame, Opcode
from websockets.protocol import CLIENT, Protocol

from streamjobs.gateway.ring import CHUNK_BYTES
from streamjobs.gateway.websocket import fragments_of, frame_of, key_of

PARTS = st.lists(st.binary(max_size=40) | st.integers(0, 3 * CHUNK_BYTES).map(bytes), min_size=1, max_size=4)


def read(data: Iterable[bytes]) -> list[Frame]:
    """The frames as another implementation reads them."""
    client = Protocol(CLIENT, max_size=None)
    for piece in data:
        client.receive_data(piece)
    assert client.parser_exc is None
    return [frame for frame in client.events_received() if isinstance(frame, Frame)]


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65535, 65536, 100_000])
def test_a_message_is_one_frame_of_its_size(size: int):
    """A length that is wrong by one ends the connection, at the sizes where its form changes."""
    (frame,) = read([frame_of((b"a" * (size // 2), memoryview(b"b" * (size - size // 2))))])
    assert (frame.opcode, frame.fin) == (Opcode.TEXT, True)
    assert bytes(frame.data) == b"a" * (size // 2) + b"b" * (size - size // 2)


@given(PARTS)
def test_fragments_are_small_and_one_message(parts: list[bytes]):
    """A view of megabytes must not be copied whole for each of its viewers, nor arrive as two messages."""
    sent = list(fragments_of(tuple(parts)))
    frames = read(sent)
    assert all(len(piece) <= CHUNK_BYTES + 10 for piece in sent)
    assert b"".join(bytes(frame.data) for frame in frames) == b"".join(parts)
    if frames:
        assert [frame.opcode for frame in frames] == [Opcode.TEXT, *[Opcode.CONT] * (len(frames) - 1)]
        assert [frame.fin for frame in frames] == [False] * (len(frames) - 1) + [True]


@pytest.mark.parametrize(
    ("key", "version", "is_right"),
    [
        (b"dGhlIHNhbXBsZSBub25jZQ==", b"13", True),
        (b"dGhlIHNhbXBsZSBub25jZQ==", b"8", False),
        (b"dGhlIHNhbXBsZSBub25jZQ", b"13", False),
        (b"dGhlIHNhbXBsZSBub25jZQ==\r\n", b"13", False),
        (b"", b"13", False),
    ],
)
def test_a_handshake_needs_a_key_and_the_version(key: bytes, version: bytes, *, is_right: bool):
    """An older draft would be answered by frames that it does not understand."""
    assert bool(key_of([(b"sec-websocket-key", key), (b"sec-websocket-version", version)])) == is_right
