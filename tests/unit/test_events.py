"""Events outlive every release, and travel as lines: through Redis, SSE, NDJSON and other people's
parsers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamjobs import events as ev
from streamjobs.errors import Invalid

GOLDEN = Path(__file__).parents[1] / "golden"
RELEASED = [
    json.loads(line)
    for path in sorted(GOLDEN.glob("events-*.jsonl"))
    for line in path.read_text().splitlines()
]

# every character that some reader somewhere takes for the end of a line
LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"

EXAMPLES: list[ev.Event] = [
    ev.JobQueued(ts=1, kind="chat", owner="anna", input=msgspec.Raw(b'{"prompt":"Hi"}')),
    ev.JobStarted(ts=2, attempt=1, worker="w"),
    ev.JobProgress(ts=3, percent=1.5, message="x"),
    ev.JobLog(ts=4, message="x", data=[1, None, {"a": "b"}]),
    ev.JobRetrying(ts=5, attempt=1, error=ev.ErrorInfo("e", "m", True)),
    ev.JobLost(ts=6, worker="w", crashes=1),
    ev.JobRequeued(ts=7, why="timer"),
    ev.JobWaiting(ts=8, waits_for="approval", until=9),
    ev.SignalReceived(ts=9, name="approval", payload={"ok": True}),
    ev.TimerSet(ts=10, key="k", delay_ms=1),
    ev.TimerFired(ts=11, key="k"),
    ev.JobPaused(ts=12, by="anna"),
    ev.JobResumed(ts=13, by="anna"),
    ev.JobCancelRequested(ts=14, reason="enough"),
    ev.JobCompleted(ts=15, result=msgspec.Raw(b"[1,2]")),
    ev.JobFailed(ts=16, error=ev.ErrorInfo("e", "m")),
    ev.JobCancelled(ts=17, effective_ms=3),
    ev.TurnStarted(ts=18, turn=1, model="m"),
    ev.TurnRestarted(ts=19, turn=1, attempt=2, supersedes_from=4),
    ev.TurnFailed(ts=19, turn=1, error=ev.ErrorInfo("provider_error", "refused")),
    ev.TurnCompleted(ts=20, turn=1, calls=[ev.ToolCallRequest("c", "t", "{}")], usage=ev.Usage(1, 2)),
    ev.TextDelta(ts=21, turn=1, text="Hi"),
    ev.ReasoningDelta(ts=22, turn=1, text="Hm"),
    ev.ToolCalled(ts=23, call_id="c", tool="t", arguments={"a": 1}),
    ev.ToolStarted(ts=24, call_id="c", idempotency_key="k", effect="once"),
    ev.ToolProgress(ts=25, call_id="c", percent=50.0),
    ev.ToolCompleted(ts=26, call_id="c", output="out", ms=1),
    ev.ToolFailed(ts=27, call_id="c", error=ev.ErrorInfo("e", "m")),
    ev.ToolUnknown(ts=28, call_id="c"),
    ev.StepStarted(ts=29, key="s"),
    ev.StepCompleted(ts=30, key="s", output=1),
    ev.StepFailed(ts=31, key="s", error=ev.ErrorInfo("e", "m")),
    ev.ChildSpawned(ts=32, job="j", key="k"),
    ev.ChildEnded(ts=33, job="j", status="completed", result=1),
    ev.ArtifactCreated(ts=34, name="n", media_type="m", size=1, where="w"),
    ev.ApprovalRequested(ts=35, key="k", subject="tool"),
    ev.StepUnknown(ts=36, key="s", message="m"),
]


def by_type(event: ev.Event) -> str:
    return event.type


@pytest.mark.parametrize("event", EXAMPLES, ids=by_type)
def test_an_event_is_one_line_that_begins_with_its_time(event: ev.Event):
    """Scripts put `"ts":…` in front of what callers encode: one that has it elsewhere would carry it
    twice."""
    line = ev.encode_event(event)
    assert line.startswith(b'{"ts":%d' % event.ts)
    assert line.decode().splitlines() == [line.decode()]


@pytest.mark.parametrize("event", EXAMPLES, ids=by_type)
def test_an_event_reads_back_as_it_was(event: ev.Event):
    """A worker replays its decisions from these: what is lost on the way is done a second time, or never."""
    assert ev.decode_event(event.type, ev.encode_event(event)) == event


def test_the_examples_are_all_there_are():
    """A new type of event would be covered by none of the tests here."""
    assert {event.type for event in EXAMPLES} == set(ev.EVENTS)
    assert len(ev.EVENTS) == 37


@pytest.mark.parametrize("entry", RELEASED, ids=lambda entry: entry["type"])
def test_events_of_every_release_decode(entry: dict[str, Any]):
    """After an update, jobs that were stored before it could not be shown or gone on with any more."""
    event = ev.decode_event(entry["type"], json.dumps(entry["data"]).encode())
    assert type(event) is ev.EVENTS[entry["type"]]
    assert json.loads(msgspec.json.encode(event)) | entry["data"] == entry["data"]


def test_every_type_is_in_the_golden_files():
    """A type without a golden line may be changed by anybody, and old logs with it."""
    assert {entry["type"] for entry in RELEASED} == set(ev.EVENTS)


def test_what_ends_a_job_and_what_is_a_delta_is_said_by_hand():
    """Viewers stop at terminal events and workers skip deltas: a wrong set loses data without a word."""
    assert {"job.completed", "job.failed", "job.cancelled"} == ev.TERMINAL
    assert {"text.delta", "reasoning.delta"} == ev.DELTAS


@given(st.text(alphabet=st.sampled_from(LINE_ENDS + 'aé😀"\\'), min_size=1, max_size=20))
def test_no_character_ends_the_line_early(text: str):
    """A U+2028 in an answer cut its event in two for every client that reads lines with str.splitlines()."""
    event = ev.TextDelta(ts=1, turn=1, text=text)
    line = ev.encode_event(event).decode()
    assert line.splitlines() == [line]
    assert ev.decode_event("text.delta", line.encode()) == event
    assert json.loads(line)["text"] == text


@given(
    st.dictionaries(
        st.text(alphabet=LINE_ENDS + "a", max_size=3), st.text(alphabet=LINE_ENDS, max_size=3), max_size=3
    )
)
def test_nor_in_the_names_of_users_values(value: dict[str, str]):
    """Keys of a user's dictionary reach the log too."""
    line = ev.encode_json(value)
    assert len(line.decode().splitlines()) == 1
    assert json.loads(line) == value


@pytest.mark.parametrize("kind", ["x.mine", "job.teleported", "", "text.delta2", "TEXT.DELTA"])
def test_an_unknown_type_decodes(kind: str):
    """During a rolling update, old workers and gateways would fail on the first event of a new type."""
    event = ev.decode_event(kind, b'{"ts":5,"anything":[1,2]}')
    assert isinstance(event, ev.Unknown)
    assert event.ts == 5


@pytest.mark.parametrize("entry", RELEASED, ids=lambda entry: entry["type"])
def test_unknown_fields_are_passed_over(entry: dict[str, Any]):
    """A field that a newer release added would make its whole log unreadable to this one."""
    later = {**entry["data"], "brand_new": {"nested": [1]}}
    assert ev.decode_event(entry["type"], json.dumps(later).encode()) == ev.decode_event(
        entry["type"], json.dumps(entry["data"]).encode()
    )


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("text.delta", b'{"ts":1,"turn":"one","text":"x"}'),
        ("text.delta", b'{"ts":1,"text":"x"}'),
        ("job.started", b"[]"),
        ("job.started", b""),
        ("x.mine", b"{"),
        ("x.mine", b'{"ts":"now"}'),
        ("job.log", b'{"ts":1,"data":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        ("job.log", b'{"ts":1,"message":"\xff"}'),
    ],
)
def test_damage_is_an_error_of_ours(kind: str, content: bytes):
    """One damaged entry would take the gateway's task down with an exception that nobody expects."""
    with pytest.raises(Invalid):
        ev.decode_event(kind, content)


@pytest.mark.parametrize("content", [b"1e999", b"9" * 5000, b'"\xff"', b"", b"{"])
def test_raw_content_that_no_reader_understands_is_an_error_of_ours(content: bytes):
    """msgspec passes over what it does not decode: such an input was stored, and no view of its job could
    be made."""
    with pytest.raises(Invalid):
        ev.decode_raw(msgspec.Raw(content))


@given(st.text(alphabet=st.characters(exclude_categories=()), max_size=20))
def test_cleaned_text_can_be_stored_and_shown(text: str):
    """Half an emoji in a model's output would end the job with an encoding error."""
    cleaned = ev.clean_text(text)
    assert "\x00" not in cleaned
    assert ev.decode_event("text.delta", ev.encode_event(ev.TextDelta(turn=1, text=cleaned))) is not None


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        ("plain é 😀 \n", "plain é 😀 \n"),
        ("a\ud800b", "a\ufffdb"),
        ("a\udc00", "a\ufffd"),
        ("\ud83d\ude00", "😀"),
        ("a\x00b", "a\ufffdb"),
        ("\x00\ud800", "\ufffd\ufffd"),
        ("", ""),
    ],
)
def test_cleaning_changes_nothing_but_what_cannot_be_kept(dirty: str, clean: str):
    """Two halves of one emoji that came in two deltas belong together; anything else must stay as it is."""
    assert ev.clean_text(dirty) == clean


def test_what_json_cannot_say_is_refused():
    """A cycle or a foreign object from a tool must be that tool's error, not a crash of the recorder."""
    cycle: list[Any] = []
    cycle.append(cycle)
    for value in (cycle, object(), {"a": {1: object()}}, "\ud800", 10**5000, {(1, 2): 3}):
        with pytest.raises(ev.UNENCODABLE):
            ev.encode_json(value)


def test_usage_adds_up():
    """The bill of a job of many turns would show its last turn only."""
    total = ev.Usage(1, 2, 3, 4) + ev.Usage(10, 20, 30, 40)
    assert total == ev.Usage(11, 22, 33, 44)
