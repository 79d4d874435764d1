"""Records the logs of the golden workflows on a real Redis, undisturbed and with a worker lost in the middle.

`python -m tests.golden.record`; logs that are there already stay as they are.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from streamjobs.errors import JobEnded
from streamjobs.testing import Scenario, ScriptedCall, Turn
from streamjobs.testing.scenario import Match
from tests.conftest import RedisProcess
from tests.golden import workflows
from tests.harness import Lab, lab, sweeping, working

LOGS = Path(__file__).with_name("recorded")
JOBS: dict[str, Any] = {
    "steps": [1, 2, 3, 3], "sleeps": None, "waits": None, "approvals": None, "children": None, "chats": None,
    "retries": None,
}  # fmt: skip
SCENARIO = Scenario(
    turns=[
        Turn(text="Let me look.", tool_calls=[ScriptedCall(name="weather", arguments={"city": "Paris"})]),
        Turn(text="It is sunny."),
        Turn(match=Match(user="Sure"), text="Very sure."),
    ]
)
SETTINGS = {"park_after": 0.1, "inline_output": 1000, "lease": 0.5}


UNDISTURBED = 10**6


async def record(bench: Lab, kind: str, given: Any, crash_at: int) -> tuple[str, list[str]]:
    """Run a job whose first worker is lost behind `crash_at` events; its id and its log as lines."""
    workflows.failures_left |= {"tried": 1, "caught": 1, "fatal": 1}
    async with working(bench.store, workflows.app):
        job_id = await bench.submit(kind, given)
        answering = asyncio.create_task(_answer(bench, job_id))
        while len(await bench.types(job_id)) < crash_at and not await bench.has(job_id, "job.completed"):
            await asyncio.sleep(0.001)
    async with working(bench.store, workflows.app):
        await bench.ended(job_id)
    answering.cancel()
    lines = [
        json.dumps({"id": str(event.cursor), "type": event.type, "data": event.data})
        for event in await bench.log(job_id)
    ]
    return job_id, lines


async def _answer(bench: Lab, job_id: str) -> None:
    """Send the signals and decisions that the workflows wait for."""
    sent: set[str] = set()
    with contextlib.suppress(JobEnded):
        while True:
            for event in await bench.log(job_id):
                if event.type == "approval.requested" and event.data["key"] not in sent:
                    sent.add(event.data["key"])
                    decision = {"decision": "approve", "key": event.data["key"]}
                    await bench.store.jobs.signal(job_id, "approval", decision)
                waits_for = event.data.get("for", "") if event.type == "job.waiting" else ""
                name = waits_for.removeprefix("signal:")
                if name != waits_for and name not in sent and name != "never":
                    sent.add(name)
                    for number in range(2 if name == "second" else 1):
                        await bench.store.jobs.signal(job_id, name, f"{name} {number}")
            await asyncio.sleep(0.05)


async def main() -> None:
    """Record what is missing."""
    with tempfile.TemporaryDirectory(prefix="sj-") as folder:
        redis = RedisProcess(Path(folder))
        redis.start()
        try:
            async with lab(redis.url, SCENARIO, **SETTINGS) as bench, sweeping(bench.store):
                for kind, given in JOBS.items():
                    for crash_at in (UNDISTURBED, 4 if kind == "children" else 7):
                        path = (
                            LOGS / f"{kind}-{'undisturbed' if crash_at == UNDISTURBED else 'crashed'}-1.jsonl"
                        )
                        if path.exists():
                            continue
                        job_id, lines = await record(bench, kind, given, crash_at)
                        path.write_text("\n".join([json.dumps({"job": job_id}), *lines]) + "\n")
                        sys.stdout.write(f"{path.name}: {len(lines)} events\n")
        finally:
            redis.stop()


if __name__ == "__main__":
    asyncio.run(main())
