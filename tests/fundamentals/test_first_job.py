"""How streamjobs is used, step by step. Read it from top to bottom; every test runs on a real Redis.

A job is its log. Whoever submits gets an id at once, a worker advances the job, and whoever wants to
know reads the log: its events, or the view that they fold into.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import msgspec

from streamjobs import App, Context
from streamjobs.config import Settings
from streamjobs.job import Fold, JobView
from streamjobs.store import Store, Submission
from streamjobs.testing import Scenario, ScriptedCall, ScriptedProvider, Turn
from streamjobs.worker.worker import Worker
from tests.conftest import wait_until

app = App()


@app.tool(effect="pure")
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@app.workflow("greet")
async def greet(ctx: Context, name: str = "world") -> str:
    """A workflow is an async function; what it returns is the job's result."""
    ctx.progress(50, "thinking of something nice")
    return f"Hello, {name}"


@contextlib.asynccontextmanager
async def working(store: Store) -> AsyncIterator[Worker]:
    """A worker of this process. In production: `streamjobs worker mypackage.jobs:app`."""
    worker = Worker(store, app)
    running = asyncio.create_task(worker.run())
    try:
        yield worker
    finally:
        worker.drain()
        await running


async def ended(store: Store, job_id: str) -> JobView:
    """The view of a job once it has ended. Viewers get it as it grows, over SSE."""

    async def is_ended() -> bool:
        return (await store.jobs.get(job_id)).is_ended

    await wait_until(is_ended)
    fold = Fold(job_id)
    async for page in store.log.pages(job_id):
        fold.apply_all(page.entries)
    return fold.view()


async def test_a_job_is_submitted_first_and_run_later(store: Store) -> None:
    """Nobody needs to be there when a job is submitted: it waits in the log."""
    receipt = await store.jobs.submit(Submission(kind="greet", input=b'"Ada"'))
    assert (await store.jobs.get(receipt.job_id)).status == "queued"
    async with working(store):
        view = await ended(store, receipt.job_id)
    assert (view.status, view.result) == ("completed", "Hello, Ada")
    assert view.progress is not None
    assert view.progress.percent == 50


async def test_every_fact_is_an_event(store: Store) -> None:
    """The log says all that happened, in order; positions in it are what viewers resume by."""
    receipt = await store.jobs.submit(Submission(kind="greet"))
    async with working(store):
        await ended(store, receipt.job_id)
    page = await store.log.page(receipt.job_id)
    assert [entry.type for entry in page.entries] == [
        "job.queued", "job.started", "job.progress", "job.completed",
    ]  # fmt: skip
    assert [entry.cursor.seq for entry in page.entries] == [1, 2, 3, 4]
    resumed = await store.log.page(receipt.job_id, after=page.entries[1].cursor)
    assert [entry.type for entry in resumed.entries] == ["job.progress", "job.completed"]


async def test_the_same_key_is_the_same_job(store: Store) -> None:
    """A client that got no answer sends again, with the same key, and nothing happens twice."""
    first = await store.jobs.submit(Submission(kind="greet", idempotency_key="order-42"))
    again = await store.jobs.submit(Submission(kind="greet", idempotency_key="order-42"))
    assert again.job_id == first.job_id
    assert again.repeated


async def test_a_model_calls_tools_on_the_server(redis, settings: Settings) -> None:
    """The chat goes on until the model stops asking: here one tool, then the answer."""
    script = Scenario(
        turns=[
            Turn(tool_calls=[ScriptedCall(name="add", arguments={"a": 2, "b": 40})]),
            Turn(text="It is 42."),
        ]
    )
    async with ScriptedProvider(script) as provider:
        store = await Store.open(
            msgspec.structs.replace(settings, openai_base_url=provider.openai_url, default_model="scripted")
        )
        chat = {"prompt": "What is 2 + 40?", "tools": ["add"]}
        receipt = await store.jobs.submit(Submission(kind="chat", input=msgspec.json.encode(chat)))
        async with working(store):
            view = await ended(store, receipt.job_id)
        await store.aclose()
    assert [(call.tool, call.state, call.output) for call in view.tool_calls] == [("add", "completed", 42)]
    assert view.text == "It is 42."
