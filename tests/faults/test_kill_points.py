"""A worker killed at every named fault point: another goes on, and nothing is lost, spliced or done twice."""

from __future__ import annotations

import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from streamjobs.faults import CHAT_POINTS, POINTS
from streamjobs.testing import Scenario, ScriptedCall, Turn
from tests.conftest import RedisProcess
from tests.faults.app import once_at_most_once, read_effects
from tests.harness import Lab, Logged, lab, one_end, one_outcome_each, sweeping, worker_process

TEXTS = ("I look at it first. ", "Now I pay for it. ", "It is paid, and all is well.")
SCENARIO = Scenario(
    turns=[
        Turn(
            text=TEXTS[0], tool_calls=[ScriptedCall(name="pure"), ScriptedCall(name="idempotent")], rate=150.0
        ),
        Turn(text=TEXTS[1], tool_calls=[ScriptedCall(name="once")], rate=150.0),
        Turn(text=TEXTS[2], rate=150.0),
    ]
)
TOOLS = ["pure", "idempotent", "once"]
LEASE = 1.0
RECOVERY = 60.0
"""Far above lease and sweep: a bound that says 'it recovers', not how fast."""

ONCE = [f"{point}:3" for point in CHAT_POINTS if "_tool_" in point]
"""The third tool call is the one of the `once` tool."""
LATER = ["mid_turn:3", "after_turn_started:3", "before_append:4", "after_append:6"]


@pytest.fixture
async def bench(redis: RedisProcess) -> AsyncIterator[Lab]:
    async with lab(redis.url, SCENARIO, lease=LEASE) as opened, sweeping(opened.store):
        yield opened


@pytest.mark.parametrize("point", [*CHAT_POINTS, *ONCE, *LATER])
async def test_a_worker_killed_there_costs_a_lease_and_nothing_else(bench: Lab, tmp_path: Path, point: str):
    """The promise of the project: pull the plug anywhere, and the user's job ends as if nobody had."""
    effects = tmp_path / "effects"
    options = {"env": {"EFFECTS": str(effects)}}
    with worker_process(bench.store.settings, fault=point, **options) as victim:
        job_id = await bench.chat(tools=TOOLS)
        assert await victim.ended() == -signal.SIGKILL
        died = time.monotonic()
        with worker_process(bench.store.settings, **options):
            view = await bench.ended(job_id)
    assert time.monotonic() - died < LEASE + RECOVERY
    log = await bench.log(job_id)
    assert view.status == "completed", view.error
    assert view.text == "".join(TEXTS)
    assert one_end(log) == "job.completed"
    one_outcome_each(log)
    once_at_most_once(effects)
    _require_once_is_told(log, [effect.tool for effect in read_effects(effects)])
    _require_restarts_where_text_stood(log)
    await bench.healthy()


def _require_once_is_told(log: list[Logged], effects: list[str]) -> None:
    """The `once` call is either recorded as completed, and took effect, or said to be unknown."""
    (call,) = (
        event.data["call_id"] for event in log if event.type == "tool.called" and event.data["tool"] == "once"
    )
    (outcome,) = (
        event.type for event in log
        if event.type in {"tool.completed", "tool.failed", "tool.unknown"} and event.data["call_id"] == call
    )  # fmt: skip
    starts = sum(event.type == "tool.started" and event.data["call_id"] == call for event in log)
    assert starts == 1
    if outcome == "tool.completed":
        assert effects.count("once") == 1
    else:
        assert outcome == "tool.unknown"


def _require_restarts_where_text_stood(log: list[Logged]) -> None:
    """`turn.restarted` comes exactly where a turn that had said something begins again."""
    said: set[int] = set()
    for event in log:
        if event.type.endswith(".delta"):
            said.add(event.data["turn"])
        elif event.type == "turn.restarted":
            assert event.data["turn"] in said, "restarted, and nothing had been said"
            said.discard(event.data["turn"])


def test_every_point_of_the_program_is_listed():
    """A point that is not listed is a window in which nobody ever tried to kill a worker."""
    source = Path(__file__).parent.parent.parent / "src" / "streamjobs"
    found: set[str] = set()
    for file in source.rglob("*.py"):
        found |= {part.split('"')[0] for part in file.read_text().split('fault("')[1:]}
    assert found == set(POINTS)
