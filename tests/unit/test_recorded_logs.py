"""Logs that workers wrote to a real Redis, some of them lost meanwhile.

Only what is missing is done, for ever.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from streamjobs import App, Context
from streamjobs.events import encode_json
from streamjobs.store import Entry
from streamjobs.store.log import stored_cursor
from tests.desk import Desk
from tests.golden import workflows

LOGS = sorted((Path(__file__).parents[1] / "golden" / "recorded").glob("*.jsonl"))
KINDS = {"steps", "sleeps", "waits", "approvals", "children", "chats", "retries"}
STARTS = {"step.started": "key", "tool.started": "call_id", "turn.started": "turn", "child.spawned": "job",
          "timer.set": "key", "approval.requested": "key"}  # fmt: skip
OUTCOMES = {
    "step.completed": "key", "step.failed": "key", "tool.completed": "call_id", "turn.completed": "turn",
    "child.spawned": "job", "child.ended": "job", "timer.fired": "key",
}  # fmt: skip
ANSWERS = {"first": "first 0", "second": "second", "approval": "approve"}
SETTINGS: dict[str, Any] = {"inline_output": 1000, "default_model": "m", "park_after": 0.02}


class Recorded:
    """A log as it was recorded, and what others wrote into it."""

    def __init__(self, path: Path) -> None:
        head, *lines = (json.loads(line) for line in path.read_text().splitlines())
        self.job_id: str = head["job"]
        self.entries = [Entry(stored_cursor(x["id"]), x["type"], encode_json(x["data"])) for x in lines]
        self.queued: dict[str, Any] = lines[0]["data"]
        self.result: Any = lines[-1]["data"]["result"]
        self.children = {x["data"]["job"]: x["data"] for x in lines if x["type"] == "child.ended"}

    def desk(self, app: App, entries: Sequence[Entry]) -> Desk:
        """A desk with the beginning of the log on it."""
        desk = Replayed(self, app)
        desk.artifacts = {
            (self.job_id, name): encode_json("x" * 2000)
            for name in (
                content["name"] for kind, content in desk.read(entries) if kind == "artifact.created"
            )
        }
        desk.load(entries)
        return desk


class Replayed(Desk):
    """A desk whose children end as they did."""

    def __init__(self, recorded: Recorded, app: App) -> None:
        super().__init__(
            app,
            recorded.queued["kind"],
            recorded.queued.get("input"),
            script=workflows.says,
            job_id=recorded.job_id,
            **SETTINGS,
        )
        self._recorded = recorded

    def end_child(self, job_id: str, result: Any = None, status: str = "completed") -> None:
        ended = self._recorded.children[job_id]
        super().end_child(job_id, ended.get("result"), ended["status"])


def done(entries: Sequence[tuple[str, dict[str, Any]]], named: dict[str, str]) -> set[tuple[str, Any]]:
    """What was begun, or ended: its kind and name; what failed before the last attempt is left out."""
    attempts = [at for at, (kind, _) in enumerate(entries) if kind == "job.retrying"]
    last = attempts[-1] if attempts else 0
    return {
        (kind.split(".")[0], content[named[kind]])
        for at, (kind, content) in enumerate(entries)
        if kind in named and not content.get("will_retry") and (kind != "step.failed" or at > last)
    }


def test_every_kind_is_recorded_undisturbed_and_crashed():
    """A kind without a log is one whose jobs nobody knows to survive an upgrade."""
    names = {path.stem.rsplit("-", 1)[0] for path in LOGS}
    assert names >= {f"{kind}-{how}" for kind in KINDS for how in ("undisturbed", "crashed")}


@pytest.mark.parametrize("path", LOGS, ids=lambda path: path.stem)
async def test_a_recorded_log_goes_on_from_every_event(path: Path):
    """Jobs live longer than releases: what an earlier one recorded is not done again by this one."""
    recorded = Recorded(path)
    for length in range(2, len(recorded.entries)):
        workflows.failures_left.clear()
        desk = recorded.desk(workflows.app, recorded.entries[:length])
        await desk.finish(**ANSWERS)
        if is_paying(desk.events[:length]):
            assert desk.error["code"] == "unknown_outcome"
            continue
        assert desk.status == "completed", (length, desk.error)
        if recorded.queued["kind"] != "retries":  # nothing fails any more in those
            expected = ["second" if "second" in str(one) else one for one in as_list(recorded.result)]
            assert ["second" if "second" in str(one) else one for one in as_list(desk.result)] == expected
        before, after = desk.events[:length], desk.events[length:]
        tries_again = any(kind == "job.retrying" for kind, _ in after)  # and with it what failed
        stands = {kind: name for kind, name in OUTCOMES.items() if kind != "step.failed" or not tries_again}
        again = done(before, stands) & done(after, STARTS)
        assert not again, (length, again)


def is_paying(entries: Sequence[tuple[str, dict[str, Any]]]) -> bool:
    """Whether the `once` tool was started and nobody knows what came of it."""
    once = {content["call_id"] for kind, content in entries if content.get("effect") == "once"}
    return bool(once - {content["call_id"] for kind, content in entries if kind == "tool.completed"})


def as_list(result: Any) -> list[Any]:
    return result if isinstance(result, list) else [result]


@pytest.mark.parametrize("path", LOGS, ids=lambda path: path.stem)
async def test_a_recorded_log_is_refused_by_other_code(path: Path):
    """A workflow that was rewritten under its jobs says so, and touches nothing."""
    recorded = Recorded(path)
    other = App(builtin_tools=False)

    @other.workflow(recorded.queued["kind"])
    async def rewritten(ctx: Context, given: Any = None) -> Any:
        return await ctx.step("another", workflows.letters, 1)

    attempts = [at for at, entry in enumerate(recorded.entries) if entry.type == "job.retrying"]
    since = attempts[-1] if attempts else 0
    outcomes = [at for at, entry in enumerate(recorded.entries) if at > since and entry.type in OUTCOMES]
    desk = recorded.desk(other, recorded.entries[:-1])
    await desk.run()
    assert outcomes
    assert desk.error["code"] == "workflow_changed"
    assert not {kind for kind, _ in desk.events[len(recorded.entries) - 1 :]} & set(STARTS)
