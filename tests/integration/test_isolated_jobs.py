"""Jobs with isolated tools: however a job or its worker stops, nothing of the tool goes on."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from tests import hostile
from tests.conftest import RedisProcess
from tests.harness import Lab, drained, lab, talking, worker_process, working
from tests.orphans import OF_A_TOOL, all_gone, written

ABOVE_IT = ("supervisor", "server")


async def use(bench: Lab, tool: str, **arguments: Any) -> str:
    return await bench.submit("use", {"tool": tool, "arguments": arguments})


async def result_of(bench: Lab, tool: str, **arguments: Any) -> Any:
    view = await bench.ended(await use(bench, tool, **arguments))
    assert view.status == "completed", view.error
    return view.result


async def tool_events(bench: Lab, job_id: str) -> list[str]:
    return [
        kind for kind in await bench.types(job_id) if kind.startswith("tool.") and kind != "tool.progress"
    ]


async def test_the_kill_of_a_worker_leaves_nothing_of_a_tool_behind(redis: RedisProcess, tmp_path: Path):
    """Each crash would leave processes that nobody knows, still at what the next run repeats."""
    async with lab(redis.url) as bench:
        folders = tmp_path / "folders"
        folders.mkdir()
        env = {"TMPDIR": str(folders)}
        with worker_process(bench.store.settings, "tests.hostile:app", env=env) as worker:
            job_id = await use(bench, "lingers", file=str(tmp_path / "pids"))
            numbers = await written(tmp_path / "pids")
            await bench.until(job_id, "tool.progress")
            assert list(folders.iterdir()) != []
            worker.kill()
            await all_gone(numbers, [*OF_A_TOOL, *ABOVE_IT])
        assert list(folders.iterdir()) == []


async def test_a_tool_finds_no_secret_of_its_worker(redis: RedisProcess):
    """A tool that was talked into it would tell the keys of everybody's models, and where Redis is."""
    async with lab(redis.url) as bench:
        secret = {"OPENAI_API_KEY": "canary-of-this-test"}
        with worker_process(bench.store.settings, "tests.hostile:app", env=secret):
            inside = await result_of(bench, "snoops_inside", canary_of="canary of this test")
            assert inside["environ"], "else it looks for what is nowhere"
            found = await result_of(bench, "snoops", canary_of="canary of this test")
    assert found == {"environ": False, "processes": [], "memory": []}


async def test_a_cancelled_job_ends_its_tool(redis: RedisProcess, tmp_path: Path):
    """Whoever cancels wants it to stop, not to be told so."""
    async with talking(redis.url, app=hostile.app) as bench:
        job_id = await use(bench, "lingers", file=str(tmp_path / "pids"))
        numbers = await written(tmp_path / "pids")
        assert await bench.store.jobs.cancel(job_id) == "requested"
        assert (await bench.ended(job_id)).status == "cancelled"
        await all_gone(numbers, [*OF_A_TOOL, "supervisor"])
        assert await tool_events(bench, job_id) == ["tool.called", "tool.started", "tool.unknown"]


async def test_a_drain_ends_what_does_not_end_within_the_grace(redis: RedisProcess, tmp_path: Path):
    """A deployment would wait for it, or leave it running beside the next worker's."""
    async with lab(redis.url, drain_grace=0.1) as bench, working(bench.store, hostile.app) as worker:
        job_id = await use(bench, "lingers", file=str(tmp_path / "pids"))
        numbers = await written(tmp_path / "pids")
        await drained(worker, bench.store)
        assert await bench.status(job_id) == "queued"
        await all_gone(numbers, [*OF_A_TOOL, *ABOVE_IT])


async def test_a_tool_that_dies_fails_and_the_job_goes_on(redis: RedisProcess):
    """A segmentation fault in one tool would take 400 jobs along."""
    async with talking(redis.url, app=hostile.app) as bench:
        job_id = await use(bench, "dies", how="segfault")
        view = await bench.ended(job_id)
        assert view.status == "completed"
        assert "SIGSEGV" in view.result
        (failure,) = [event for event in await bench.log(job_id) if event.type == "tool.failed"]
        assert failure.data["error"]["code"] == "tool_died"


async def test_a_once_tool_that_dies_is_recovered_as_after_a_crash_of_the_worker(
    redis: RedisProcess, tmp_path: Path
):
    """`failed` would say that no payment was made, and the model would pay again."""
    async with talking(redis.url, app=hostile.app) as bench:

        async def paid(tool: str, effects: int, end: str, result: str) -> None:
            file = tmp_path / tool
            job_id = await use(bench, tool, file=str(file))
            if tool == "pays_asked":
                await bench.until(job_id, "approval.requested")
                assert len(file.read_text().splitlines()) == 1, "it does not run again before the answer"
                await bench.store.jobs.signal(job_id, "approval", {"decision": "approve"}, by="ann")
            view = await bench.ended(job_id)
            assert (view.status, result in view.result) == ("completed", True), view
            assert await tool_events(bench, job_id) == ["tool.called", *["tool.started"] * effects, end]
            keys = file.read_text().splitlines()
            assert (len(keys), len(set(keys))) == (effects, 1), "each run has the same key"

        unknown = "the tool's process died: it ended with status 1, without an answer; it may or may not"
        await asyncio.gather(
            paid("pays", 1, "tool.unknown", unknown),
            paid("pays_known", 1, "tool.completed", "paid, says the bank"),
            paid("pays_again", 2, "tool.unknown", unknown),
            paid("pays_asked", 2, "tool.unknown", unknown),
        )
