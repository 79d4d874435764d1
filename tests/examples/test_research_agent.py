"""research and its agent: tools, a person who is asked, and a report that is published once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from examples.app import app
from examples.research_agent import find_report, publish_report, read_note, search_notes
from streamjobs import ToolContext, ToolError
from streamjobs.testing import load_scenario
from tests.conftest import RedisProcess
from tests.harness import Lab, lab, one_outcome_each, sweeping, talking, worker_process, working

SCENARIO = load_scenario(Path(__file__).parents[2] / "examples" / "scenario.yaml")
QUESTION = "Why are zombies harmless? Publish a report."


def reports(tmp_path: Path) -> list[str]:
    return [path.name for path in sorted((tmp_path / "output" / "reports").glob("*"))]


async def answer(bench: Lab, job_id: str, word: str, comment: str = "") -> None:
    await bench.until(job_id, "approval.requested")
    payload = {"decision": word, "comment": comment}
    await bench.store.jobs.signal(job_id, "approval", payload, by="a person")


@pytest.mark.parametrize("kind", ["research", "chat"])
async def test_a_report_is_published_once_a_person_agrees(redis: RedisProcess, tmp_path: Path, kind: str):
    """An agent would publish whatever it likes, or ask and never go on."""
    given = {"text": QUESTION} if kind == "research" else {"prompt": QUESTION, "agent": "researcher"}
    async with talking(redis.url, SCENARIO, app=app, park_after=0.1) as bench:
        job_id = await bench.submit(kind, given)
        await bench.until(job_id, "job.waiting")
        assert reports(tmp_path) == [], "nothing is published before somebody said so"
        await answer(bench, job_id, "approve")
        view = await bench.ended(job_id)
        log = await bench.log(job_id)
    assert view.status == "completed", view.error
    assert view.text.endswith("Redis refuses its old epoch (leases).")
    one_outcome_each(log)
    outputs: dict[str, Any] = {call.tool: call.output for call in view.tool_calls}
    assert outputs["search_notes"][0]["note"] == "leases"
    assert [Path(outputs["publish_report"]["report"]).name] == reports(tmp_path)
    assert Path(outputs["publish_report"]["report"]).read_text().startswith("# Why zombies are harmless\n")


async def test_what_a_person_refuses_is_not_published(redis: RedisProcess, tmp_path: Path):
    """A person's no would count for nothing, or fail the job instead of reaching the agent."""
    async with talking(redis.url, SCENARIO, app=app, park_after=0.1) as bench:
        job_id = await bench.submit("research", {"text": QUESTION})
        await answer(bench, job_id, "deny", "not without sources")
        view = await bench.ended(job_id)
    assert view.status == "completed", view.error
    published = view.tool_calls[-1]
    assert (published.tool, published.state) == ("publish_report", "failed")
    assert published.error is not None
    assert published.error.message == "not without sources"
    assert reports(tmp_path) == []


@pytest.mark.parametrize("fault", ["after_tool_started", "after_tool_effect"])
async def test_a_report_is_published_once_through_a_crash(redis: RedisProcess, tmp_path: Path, fault: str):
    """A worker that dies while it publishes would publish twice, or leave nobody knowing whether it did."""
    async with lab(redis.url, SCENARIO, park_after=0.1) as bench, sweeping(bench.store):
        job_id = await bench.submit("research", {"text": QUESTION})
        await publish_and_die(bench, job_id, fault)
        async with working(bench.store, app):
            view = await bench.ended(job_id, timeout=60.0)
        log = await bench.log(job_id)
        await bench.healthy()
    assert view.status == "completed", view.error
    one_outcome_each(log)
    assert len(reports(tmp_path)) == 1
    assert view.tool_calls[-1].state == "completed", "the lookup tells what came of it"


async def publish_and_die(bench: Lab, job_id: str, fault: str) -> None:
    async with working(bench.store, app):
        await bench.until(job_id, "job.waiting")
    with worker_process(bench.store.settings, "examples.app:app", fault=fault) as worker:
        await answer(bench, job_id, "approve")
        await worker.ended()


def test_a_report_is_never_written_over(tmp_path: Path):
    """Two workers that both believe to hold the job would publish one over the other."""
    context = ToolContext(idempotency_key="key-1")
    published = publish_report("Title", "Text.", context)
    assert find_report("key-1") == published
    with pytest.raises(FileExistsError):
        publish_report("Title", "Other text.", context)
    assert reports(tmp_path) == ["key-1.md"], "no draft is left"
    with pytest.raises(LookupError):
        find_report("key-2")


def test_notes_are_found_by_their_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The agent would read what does not matter, or files that are no notes."""
    (tmp_path / "cats.md").write_text("# Cats\n\nCats sleep by day.\nDogs do not.\n")
    (tmp_path / "secret.txt").write_text("cats")
    monkeypatch.setenv("EXAMPLES_NOTES", str(tmp_path))
    assert [(hit.note, hit.line) for hit in search_notes("Do cats sleep?")] == [("cats", 3), ("cats", 1)]
    assert read_note("cats").startswith("# Cats")
    for name in ("secret", "../cats", "", "cats.md"):
        with pytest.raises(ToolError, match="there are: cats"):
            read_note(name)
