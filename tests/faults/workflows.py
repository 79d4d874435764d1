"""The workflows that the fault tests run in worker processes: everything that a workflow can do, once.

Each step and tool writes a line to the file that EFFECTS names; some take STEP_SECONDS, so that a kill finds
them at work. `answer` sends the signals and decisions that jobs wait for, each of them twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import Counter
from pathlib import Path
from typing import Any

from streamjobs import App, Context, OutcomeUnknown, Retry, ToolContext
from streamjobs.errors import JobEnded
from streamjobs.store import Store
from streamjobs.testing import Scenario, ScriptedCall, Turn
from tests.faults.app import read_effects, take_effect
from tests.harness import Lab, Logged, one_end, one_outcome_each

app = App(name="workflows", builtin_tools=False)

SETTINGS = {"park_after": 0.2, "inline_output": 1000, "replay_timeout": 5.0}
"""What makes the workflow pass by every fault point: short parks, small outputs."""

SCENARIO = Scenario(
    turns=[Turn(text="I look first. ", tool_calls=[ScriptedCall(name="look")], rate=150.0),
           Turn(text="All is well.", rate=150.0)]
)  # fmt: skip
TEXT = "All is well."
SQUARES = 3
LARGE = 3000


async def work() -> None:
    await asyncio.sleep(float(os.environ.get("STEP_SECONDS", "0")))


async def add(job: str, one: int, other: int) -> int:
    await work()
    take_effect("step:add", "add", job)
    await work()
    return one + other


def square(job: str, number: int) -> int:
    take_effect("step:square", str(number), job)
    return number * number


async def pay(job: str) -> str:
    take_effect("once:pay", "pay", job)
    await work()
    return "paid"


async def large(job: str) -> str:
    take_effect("step:large", "large", job)
    await work()
    return "x" * LARGE


async def flaky(job: str) -> int:
    """Fail twice, then succeed."""
    take_effect("step:flaky", "flaky", job)
    runs = sum(effect.tool == "step:flaky" and effect.job == job for effect in _effects())
    if runs < 3:
        raise ConnectionError(f"run {runs} fails")
    return 1


@app.tool(effect="idempotent")
async def look(ctx: ToolContext) -> str:
    """Look."""
    take_effect("tool:look", ctx.idempotency_key, ctx.job_id)
    return "seen"


@app.tool(effect="once")
def charge(ctx: ToolContext) -> str:
    """Charge."""
    take_effect("once:charge", ctx.idempotency_key, ctx.job_id)
    return "charged"


@app.workflow("child")
async def child(ctx: Context, number: int) -> int:
    doubled: int = await ctx.step("add", add, ctx.job_id, number, number)
    return doubled


@app.workflow("everything")
async def everything(ctx: Context, number: int = 1) -> dict[str, Any]:
    """Do everything that a workflow can, once; with a number below 0, without a model."""
    ctx.progress(0, "begun")
    total = await ctx.step("add", add, ctx.job_id, number, 1)
    ctx.log("added", data=total)
    squares = [ctx.step("square", square, ctx.job_id, n) for n in range(SQUARES)]
    *found, paid, _ = await asyncio.gather(*squares, _known(ctx.step("pay", pay, ctx.job_id, effect="once")),
                                           ctx.sleep(0.05))  # fmt: skip
    size = len(await ctx.step("large", large, ctx.job_id))
    tries = await ctx.step("flaky", flaky, ctx.job_id, retry=Retry(attempts=4, base=0.02))
    await ctx.artifact("report", f"report of {number}")
    ctx.emit("milestone", {"total": total})
    seen = await ctx.tool(look)
    charged = await _known(ctx.tool(charge))
    ctx.progress(50, "half")
    text = await ctx.chat("Look at it", tools=[look]) if number >= 0 else TEXT
    await ctx.sleep(0.4)
    word = await ctx.wait_for("word", timeout=60)
    nobody = await ctx.wait_for("nobody", timeout=0.3, default="nobody came")
    decision = await ctx.approve("Go on?", key="go")
    spawned = await ctx.spawn("child", number, queue=ctx.lease.queue)
    doubled = await spawned.result()
    return {
        "total": total, "squares": found, "size": size, "tries": tries, "seen": seen, "text": text,
        "word": word, "nobody": nobody, "approved": decision.approved, "doubled": doubled,
        "paid": paid, "charged": charged,
    }  # fmt: skip


async def _known(doing: Any) -> Any:
    try:
        return await doing
    except OutcomeUnknown:
        return "unknown"


def _effects() -> list[Any]:
    return read_effects(Path(os.environ["EFFECTS"]))


# --- who answers -------------------------------------------------------------------------------------


async def answer(bench: Lab, job_id: str, interval: float = 0.1) -> None:
    """Send what the job waits for, each twice, until it has ended."""
    with contextlib.suppress(JobEnded):
        await _when_it_waits_for(bench, job_id, "timer.set", "signal:word", interval)
        await _twice(bench.store, job_id, "word", "hello")
        await _when_it_waits_for(bench, job_id, "approval.requested", "go", interval)
        await _twice(bench.store, job_id, "approval", {"decision": "approve", "key": "go"})


async def _when_it_waits_for(bench: Lab, job_id: str, kind: str, key: str, interval: float) -> None:
    while not any(event.data["key"] == key for event in await bench.log(job_id) if event.type == kind):
        if (await bench.store.jobs.get(job_id)).is_ended:
            raise JobEnded("it did not wait")
        await asyncio.sleep(interval)


async def _twice(store: Store, job_id: str, name: str, payload: Any) -> None:
    assert await store.jobs.signal(job_id, name, payload, key=name)
    assert not await store.jobs.signal(job_id, name, payload, key=name)


# --- what must hold ----------------------------------------------------------------------------------


async def require_right(bench: Lab, job_id: str, number: int, effects: Path) -> list[Logged]:
    """All that is promised of one job that ran `everything`; its log."""
    log = await bench.log(job_id)
    view = await bench.view(job_id)
    assert view.status == "completed", (view.error, [event.type for event in log][-5:])
    assert one_end(log) == "job.completed"
    _require_result(view.result, number)
    one_outcome_each(log)
    _require_steps(log)
    _require_said_once(log)
    _require_effects(log, job_id, effects)
    await _require_artifacts(bench, job_id, number)
    await _require_child(bench, log, effects)
    return log


def _require_result(result: Any, number: int) -> None:
    assert result.pop("paid") in {"paid", "unknown"}
    assert result.pop("charged") in {"charged", "unknown"}
    assert result == {
        "total": number + 1, "squares": [n * n for n in range(SQUARES)], "size": LARGE, "tries": 1,
        "seen": "seen", "text": TEXT, "word": "hello", "nobody": "nobody came", "approved": True,
        "doubled": 2 * number,
    }  # fmt: skip


def _require_steps(log: list[Logged]) -> None:
    """Every step that began has one outcome, and nothing of it comes after that."""
    ended: set[str] = set()
    begun: set[str] = set()
    for event in log:
        if event.type.startswith("step."):
            assert event.data["key"] not in ended, f"{event} comes after the step's outcome"
            begun.add(event.data["key"])
            if event.type != "step.started" and not event.data.get("will_retry"):
                ended.add(event.data["key"])
    assert begun == ended
    assert len(begun) == SQUARES + 4


def _require_said_once(log: list[Logged]) -> None:
    said = Counter(event.type for event in log)
    once = ("job.log", "x.milestone", "approval.requested", "child.spawned", "child.ended")
    assert {kind: said[kind] for kind in once} == dict.fromkeys(once, 1)
    assert said["job.progress"] == 2
    assert said["signal.received"] == 2
    timers = Counter(event.data["key"] for event in log if event.type == "timer.fired")
    assert max(timers.values()) == 1, timers


def _require_effects(log: list[Logged], job_id: str, path: Path) -> None:
    """What must happen happened, always under one key; what may happen once did not happen twice."""
    mine = [effect for effect in read_effects(path) if effect.job == job_id]
    done = Counter((effect.tool, effect.key) for effect in mine)
    names = Counter(name for name, _ in done)
    looks = sum(event.type == "tool.called" and event.data["tool"] == "look" for event in log)
    steps = {"step:add": 1, "step:square": SQUARES, "step:large": 1, "step:flaky": 1, "tool:look": looks}
    assert {name: names[name] for name in steps} == steps
    assert done["step:flaky", "flaky"] >= 3
    outcomes = {"once:pay": _outcome(log, "step", "pay"), "once:charge": _outcome(log, "tool", "charge")}
    for name, outcome in outcomes.items():
        times = sum(effect.tool == name for effect in mine)
        assert times == 1 if outcome.endswith("completed") else times <= 1, (name, outcome, times)


def _outcome(log: list[Logged], kind: str, name: str) -> str:
    """How the `once` step or tool of that name ended."""
    begins, field = ("step.started", "key") if kind == "step" else ("tool.called", "call_id")
    (known,) = {
        event.data[field] for event in log
        if event.type == begins and event.data.get("name", event.data.get("tool")) == name
    }  # fmt: skip
    ends = [event.type for event in log if event.data.get(field) == known and not event.type.endswith("ed")]
    ends += [event.type for event in log if event.data.get(field) == known
             and event.type in {f"{kind}.completed", f"{kind}.failed"}]  # fmt: skip
    (end,) = ends
    assert end in {f"{kind}.completed", f"{kind}.unknown"}
    return end


async def _require_artifacts(bench: Lab, job_id: str, number: int) -> None:
    names = [event.data["name"] for event in await bench.log(job_id) if event.type == "artifact.created"]
    assert len(names) == len(set(names)) == 2, names
    _, content = await bench.store.artifacts.get(job_id, "report")
    assert content == f"report of {number}".encode()


async def _require_child(bench: Lab, log: list[Logged], effects: Path) -> None:
    (spawned,) = (event.data["job"] for event in log if event.type == "child.spawned")
    its = await bench.log(spawned)
    assert one_end(its) == "job.completed"
    assert sum(event.type == "step.completed" for event in its) == 1
    assert any(effect.job == spawned for effect in read_effects(effects))
