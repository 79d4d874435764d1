"""The doctor's checks of one job, on heads and logs made by hand: each of them is made to find something."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from streamjobs.cursor import Cursor
from streamjobs.store.doctor import (
    CHECKS,
    Head,
    Report,
    Violation,
    check_expiry,
    check_log,
    check_place,
    check_sealed,
)
from streamjobs.store.log import Entry

JOB = "j0-" + "a" * 26


def entry(seq: int, epoch: int, event: str, /, **data: Any) -> Entry:
    return Entry(Cursor(seq, epoch), event, json.dumps({"ts": 1, **data}).encode())


QUEUED = entry(1, 100, "job.queued", kind="chat", owner="anna")
STARTED = entry(2, 200, "job.started", attempt=1, worker="w")
DELTA = entry(3, 200, "text.delta", turn=1, text="x")
COMPLETED = entry(4, 200, "job.completed", result=1)
WHOLE = [QUEUED, STARTED, DELTA, COMPLETED]


def head(status: str, log: list[Entry] | None = None, **changes: Any) -> Head:
    """The head of a healthy job in that status."""
    log = WHOLE if log is None else log
    has_ended = status in {"completed", "failed", "cancelled"}
    last = str(log[-1].cursor) if log else ""
    fields = {"status": status, "seq": str(len(log)), "last": last}
    if status == "running":
        fields["lease"] = "200"
    if status == "scheduled":
        fields["due"] = "5000"
    healthy = Head(
        job_id=JOB,
        fields=fields,
        length=len(log),
        first="",
        last=last,
        lease_score="9000" if status == "running" else "",
        timer_score="5000" if status == "scheduled" else "",
        has_ticket=status == "queued",
        held_score="",
        ttl=1000 if has_ended else -1,
        log_ttl=1000 if has_ended else -1,
        in_running_set=status == "running",
    )
    changed = {name: value for name, value in changes.items() if name != "fields"}
    return msgspec.structs.replace(healthy, **changed, fields=fields | changes.get("fields", {}))


def without(whole: Head, *names: str) -> Head:
    return msgspec.structs.replace(whole, fields={k: v for k, v in whole.fields.items() if k not in names})


def checks(found: list[tuple[str, str]]) -> set[str]:
    return {check for check, _ in found}


STATUSES = ["queued", "running", "scheduled", "waiting", "paused", "completed", "failed", "cancelled"]


@pytest.mark.parametrize("status", STATUSES)
def test_a_healthy_head_passes(status: str):
    """The doctor would cry at night about stores in which all is well."""
    assert check_place(head(status)) == []
    assert check_expiry(head(status)) == []


def test_a_whole_log_passes():
    """The same, for logs."""
    assert check_log(head("completed"), WHOLE) == []
    assert check_log(head("running", WHOLE[:3]), WHOLE[:3]) == []


TOOLS = [
    QUEUED,
    STARTED,
    entry(3, 200, "tool.called", call_id="c", tool="t"),
    entry(4, 200, "tool.started", call_id="c", idempotency_key="k", effect="once"),
    entry(5, 200, "tool.completed", call_id="c", output=1),
]
CANCELLED_TOO_LATE = [
    *TOOLS[:3],
    entry(4, 300, "job.cancel_requested"),
    entry(5, 200, "tool.started", call_id="c", idempotency_key="k", effect="once"),
]


def renumbered(entries: list[Entry]) -> list[Entry]:
    return [Entry(Cursor(seq, e.cursor.epoch), e.type, e.data) for seq, e in enumerate(entries, 1)]


DAMAGED_LOGS: dict[str, tuple[str, Head, list[Entry]]] = {
    "an event is missing": ("dense_log", head("completed"), [QUEUED, STARTED, COMPLETED]),
    "an event is there twice": ("dense_log", head("completed"), [QUEUED, STARTED, DELTA, DELTA, COMPLETED]),
    "the end is missing": ("dense_log", head("completed"), WHOLE[:3]),
    "the head has another history": ("dense_log", head("completed", fields={"last": "4-199"}), WHOLE),
    "the log goes on behind the head": ("dense_log", head("completed", last="5-200"), WHOLE),
    "the log is empty": ("dense_log", head("queued"), []),
    "it ended and did not": ("one_end", head("running"), WHOLE),
    "it did not end and has": ("one_end", head("completed", WHOLE[:3]), WHOLE[:3]),
    "it ended twice": ("one_end", head("completed", [*WHOLE, QUEUED]), renumbered([*WHOLE, COMPLETED])),
    "something follows the end": (
        "one_end",
        head("completed", [*WHOLE, QUEUED]),
        renumbered([*WHOLE, DELTA]),
    ),
    "it began without a submission": ("lifecycle", head("running", WHOLE[1:3]), renumbered(WHOLE[1:3])),
    "it started twice": ("lifecycle", head("running", WHOLE[:3]), renumbered([QUEUED, STARTED, STARTED])),
    "the head says something else": ("lifecycle", head("waiting", WHOLE[:3]), WHOLE[:3]),
    "an event does not decode": (
        "lifecycle",
        head("running", WHOLE[:3]),
        [QUEUED, STARTED, Entry(Cursor(3, 200), "text.delta", b"{}")],
    ),
    "two workers wrote": (
        "one_writer",
        head("running", WHOLE[:3]),
        [QUEUED, STARTED, entry(3, 201, "text.delta", turn=1, text="x")],
    ),
    "a worker wrote without a lease": (
        "one_writer",
        head("running", WHOLE[:2]),
        [QUEUED, entry(2, 100, "x.mine")],
    ),
    "a lease is older than the one before": (
        "one_writer",
        head("running", TOOLS[:4]),
        [
            QUEUED,
            STARTED,
            entry(3, 250, "job.lost", worker="w"),
            entry(4, 150, "job.started", attempt=1, worker="v"),
        ],
    ),
    "a result does not decode": (
        "lifecycle",
        head("running", TOOLS),
        [*TOOLS[:4], Entry(Cursor(5, 200), "tool.completed", b"{")],
    ),
    "a result was recorded twice": (
        "one_result",
        head("running", [*TOOLS, DELTA]),
        [*TOOLS, entry(6, 200, "tool.failed", call_id="c", error={"code": "e", "message": "m"})],
    ),
    "a tool started after the cancel": (
        "no_tool_after_cancel",
        head("running", CANCELLED_TOO_LATE),
        CANCELLED_TOO_LATE,
    ),
}


@pytest.mark.parametrize("damage", DAMAGED_LOGS)
def test_a_damaged_log_is_found(damage: str):
    """An operator would be told that all is well while answers are doubled, cut or spliced."""
    check, found_head, log = DAMAGED_LOGS[damage]
    assert check in checks(check_log(found_head, log))


@pytest.mark.parametrize(
    "scripts_own", ["job.cancel_requested", "signal.received", "timer.fired", "job.paused"]
)
def test_events_of_the_scripts_may_have_any_epoch(scripts_own: str):
    """Every cancelled or signalled job would be reported."""
    log = [QUEUED, STARTED, entry(3, 999, scripts_own, name="x", key="k")]
    assert "one_writer" not in checks(check_log(head("running", log), log))


DAMAGED_PLACES = {
    "queued, without a ticket": head("queued", has_ticket=False),
    "queued, with a lease": head("queued", lease_score="9000"),
    "queued, twice": head("queued", held_score="1"),
    "running, without a lease": head("running", lease_score=""),
    "running, without its epoch": without(head("running"), "lease"),
    "running, not in the owner's set": head("running", in_running_set=False),
    "running, with a ticket": head("running", has_ticket=True),
    "scheduled, without a timer": without(head("scheduled", timer_score=""), "due"),
    "scheduled, at another time": head("scheduled", timer_score="6000"),
    "waiting, with a ticket": head("waiting", has_ticket=True),
    "paused, with a lease": head("paused", lease_score="9000"),
    "waiting, in the owner's set": head("waiting", in_running_set=True),
    "waiting, with an epoch": head("waiting", fields={"lease": "200"}),
    "completed, with a ticket": head("completed", has_ticket=True),
    "failed, with a lease": head("failed", lease_score="9000"),
    "cancelled, with a timer": head("cancelled", timer_score="5000", fields={"due": "5000"}),
    "a timer that nobody knows": head("waiting", timer_score="5000"),
    "no status": without(head("queued"), "status"),
    "no such status": head("queued", fields={"status": "sleeping"}),
}


@pytest.mark.parametrize("damage", DAMAGED_PLACES)
def test_a_job_in_the_wrong_place_is_found(damage: str):
    """A job in no place waits for ever; one in two is run by two workers."""
    assert "one_place" in checks(check_place(DAMAGED_PLACES[damage]))


@pytest.mark.parametrize("status", ["queued", "running", "waiting", "paused", "completed"])
def test_a_reminder_is_no_place(status: str):
    """Every job with a timeout would be reported; but an ended one must have none."""
    with_timer = head(status, timer_score="5000", fields={"due": "5000"})
    assert (check_place(with_timer) == []) == (status != "completed")


def test_a_held_job_is_in_its_list():
    """Every job over its owner's limit would be reported."""
    assert check_place(head("queued", has_ticket=False, held_score="1", fields={"held": "owner_limit"})) == []


def sealed(*lines: str, **changes: Any) -> Head:
    """The head of a job that runs, of which the first two events are sealed, in a segment each."""
    index = "".join(f"{line}\n" for line in lines or ("1 1-100 30", "2 2-200 40"))
    fields = {"sealed": "2-200", "snap": "2-200"} | changes.pop("fields", {})
    healthy = {"first": "3-200", "length": 1, "history": ["1", "2", "index", "snap"], "history_ttl": -1}
    return head("running", WHOLE[:3], index=index, fields=fields, **(healthy | changes))


DAMAGED_HISTORIES = {
    "an index that cannot be read": sealed("one two"),
    "a hole between segments": sealed("1 1-100 30", "3 3-200 40"),
    "a segment twice": sealed("1 1-100 30", "1 2-200 40"),
    "no segments": sealed("", fields={"snap": ""}, history=[]),
    "segments that nobody knows of": without(sealed(), "sealed", "snap"),
    "sealed up to another history": sealed(fields={"sealed": "2-201", "snap": "2-201"}),
    "a segment is gone": sealed(history=["2", "index", "snap"]),
    "a segment too many": sealed(history=["1", "2", "7", "index", "snap"]),
    "the snapshot is gone": sealed(history=["1", "2", "index"]),
    "a snapshot that stands behind": sealed(fields={"snap": "1-100"}),
    "the stream goes on too late": sealed(first="4-200"),
    "the stream still has what is sealed": sealed(first="2-200"),
}


@pytest.mark.parametrize("damage", DAMAGED_HISTORIES)
def test_a_damaged_history_is_found(damage: str):
    """What a trim took too much, or a segment lost, would be known when somebody replays it in a year."""
    assert checks(check_sealed(DAMAGED_HISTORIES[damage])) == {"sealed_history"}


def test_a_healthy_history_passes():
    """The doctor would report every store that has been running for an hour."""
    assert check_sealed(sealed()) == []
    assert check_sealed(head("running", WHOLE[:3])) == []
    assert check_log(sealed(), WHOLE[:3]) == []
    whole = head(
        "completed", index="1 4-200 99\n", fields={"sealed": "4-200"}, history=["4", "index"],
        length=0, last="", log_ttl=-2, history_ttl=1000,
    )  # fmt: skip
    assert check_sealed(whole) + check_log(whole, WHOLE) + check_expiry(whole) == []


DAMAGED_EXPIRY = {
    "a history that stays": head("completed", history_ttl=-1),
    "a live history that expires": head("running", history_ttl=1000),
    "neither log nor history": head("completed", log_ttl=-2),
    "a live job that expires": head("running", ttl=1000),
    "a live log that expires": head("waiting", log_ttl=1000),
    "an ended job that stays": head("completed", ttl=-1, log_ttl=-1),
    "an ended log that stays": head("failed", log_ttl=-1),
    "a log that goes first": head("cancelled", log_ttl=500),
}


@pytest.mark.parametrize("damage", DAMAGED_EXPIRY)
def test_keys_that_expire_apart_are_found(damage: str):
    """Memory that never comes back, or a job whose log is gone while it runs."""
    assert checks(check_expiry(DAMAGED_EXPIRY[damage])) == {"one_expiry"}


def test_every_check_of_one_job_is_made_to_fail_here():
    """A check that cannot fail is no check. Those of the whole store are made to fail in the integration
    test."""
    of_the_store = {"known_keys", "no_ghosts", "totals", "readable"}
    assert {check for check, _, _ in DAMAGED_LOGS.values()} | {
        "one_place",
        "one_expiry",
        "sealed_history",
    } | of_the_store == set(CHECKS)


def test_a_report_is_healthy_without_violations_only():
    """`streamjobs doctor` would end with 0 in a script that is to stop a deployment."""
    assert Report(jobs=5, notes=["something to know"]).is_healthy
    assert not Report(violations=[Violation("one_end", JOB, "x")]).is_healthy
