"""Frames must reach every client whole, whatever a job's author, user or model wrote."""

from __future__ import annotations

import re

import pytest

from streamjobs.cursor import Cursor
from streamjobs.errors import JobNotFound
from streamjobs.events import encode_json
from streamjobs.gateway import sse
from streamjobs.store import Entry
from tests.integration.gateway import frame_of

AT = Cursor(7, 1700000000000)


def read(block: bytes) -> tuple[str, str, str]:
    text = block.decode()
    assert text.endswith("\n\n")
    assert text.count("\n\n") == 1
    return frame_of(text.removesuffix("\n\n")).row


def test_an_event_is_one_block_of_id_name_and_one_line_of_data():
    """Clients that read chunk by chunk lose events which come in more than one block."""
    frame = sse.event_frame(Entry(AT, "text.delta", b'{"text":"hello"}'))
    assert frame == b'id: 7-1700000000000\nevent: text.delta\ndata: {"text":"hello"}\n\n'


@pytest.mark.parametrize("name", ["x.my-event", "x.a:b_c", "X1"])
def test_names_of_users_pass_when_they_are_safe(name: str):
    assert sse.event_name(name) == name.encode()


@pytest.mark.parametrize("name", ["", "x.a\nb", "x.a\rid: 9", "x.\x00", "x.a b", "x.é", "x." + "a" * 200])
def test_names_that_could_forge_a_field_become_message(name: str):
    """A workflow's author could otherwise write frames of their own into a viewer's stream."""
    assert sse.event_name(name) == b"message"


@pytest.mark.parametrize("data", [b'{"a":\n1}', b'{"a":\r\r1}', b'{"a":\r\n\r\n1}'])
def test_line_ends_between_tokens_do_not_forge_fields(data: bytes):
    _, _, line = read(sse.event_frame(Entry(AT, "x.a", data)))
    assert re.fullmatch(r'\{"a": +1\}', line)


def test_text_that_some_readers_cut_lines_at_is_escaped():
    """Clients built on `str.splitlines` end a line at U+2028 and lose the rest of the event."""
    frame = sse.snapshot_frame(AT, encode_json({"text": "a\u2028b\u2029c\u0085d\ne\rf"}))
    assert len(frame.decode().splitlines()) == 4


def test_control_frames_carry_no_id():
    """An id that is no position of the log would come back as a cursor."""
    for frame in (
        sse.reset_frame("unknown_cursor", AT),
        sse.handover_frame("drain"),
        sse.error_frame(JobNotFound("no")),
    ):
        assert read(frame)[0] == ""


def test_reset_says_which_cursor_is_not_there():
    assert frame_of(sse.reset_frame("unknown_cursor", AT).decode().strip()).json == {
        "reason": "unknown_cursor",
        "cursor": "7-1700000000000",
    }


def test_an_error_is_a_problem_document():
    assert frame_of(sse.error_frame(JobNotFound("no such job")).decode().strip()).json["code"] == "not_found"


def test_every_retry_is_another_one():
    """Viewers that broke together must not come back together."""
    assert len({sse.retry_line() for _ in range(50)}) > 25
    assert len({frame_of(sse.handover_frame("age").decode().strip()).retry for _ in range(50)}) > 25


def test_a_heartbeat_is_no_event():
    """A blank line behind the comment would be an empty event to the openai SDK and httpx-sse."""
    assert sse.HEARTBEAT == b":\n"
