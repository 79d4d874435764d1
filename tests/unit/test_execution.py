"""A stop may come at any point of a job's run: the job gets the outcome that it says, once, and ends."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from streamjobs.app import App
from streamjobs.config import Settings
from streamjobs.cursor import Cursor
from streamjobs.errors import JobNotFound, StoreUnavailable
from streamjobs.events import JobLog, JobQueued, encode_event
from streamjobs.store import Answer, Clock, Entry, Lease, Page
from streamjobs.worker.execution import Execution, Services, Stop
from streamjobs.worker.recorder import Committer
from tests.conftest import wait_until
from tests.unit.test_recorder import FakeWork

JOB = f"j0-{'a' * 26}"
QUEUED = encode_event(JobQueued(kind="tried", owner="ann"))


class Log:
    """A log whose reading can be held up, and can fail."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.open.set()
        self.reads: list[Cursor] = []
        self.failures: list[Exception] = []
        self.pages_of: Callable[[Cursor], list[Page]] = lambda _: [
            page(Entry(Cursor(1, 5), "job.queued", QUEUED))
        ]

    async def pages(self, _job_id: str, after: Cursor) -> AsyncIterator[Page]:
        self.reads.append(after)
        await self.open.wait()
        for each in self.pages_of(after):
            yield each
        if self.failures:
            raise self.failures.pop(0)


def page(*entries: Entry, found: bool = True) -> Page:
    return Page(found, "running", Cursor(9, 9), list(entries))


class Bench(NamedTuple):
    """One execution over fakes; `code` says when its workflow runs and lets it end."""

    execution: Execution
    work: FakeWork
    log: Log
    started: asyncio.Event
    may_end: asyncio.Event
    left_behind: set[asyncio.Task[Any]]

    def outcomes(self) -> list[str]:
        return [
            batch.outcome for call in self.work.calls for batch in call.batches if batch.outcome != "keep"
        ]

    def last_event(self) -> str:
        return self.work.calls[-1].types[-1]


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with made() as bench:
        yield bench


@contextlib.asynccontextmanager
async def made(workflow: Any = None, **changes: Any) -> AsyncIterator[Bench]:
    settings = Settings(**({"cancel_timeout": 0.2} | changes))
    work, log, started, may_end = FakeWork(), Log(), asyncio.Event(), asyncio.Event()
    app = App(builtin_tools=False)

    async def tried(ctx: Any) -> str:
        started.set()
        await may_end.wait()
        return "done"

    app.workflow("tried")(workflow or tried)
    committer = Committer(work, 0, settings)  # type: ignore[arg-type]
    running = asyncio.create_task(committer.run())
    left_behind: set[asyncio.Task[Any]] = set()
    services = Services(
        SimpleNamespace(log=log),
        app,
        settings,
        SimpleNamespace(),
        Clock(lambda: 0),
        {},
        lambda: False,
        left_behind,
    )  # type: ignore[arg-type]
    lease = Lease(JOB, 7, 2, 1, 0, 0, -1, "tried", "ann", "default", b"")
    yield Bench(Execution(lease, services, committer), work, log, started, may_end, left_behind)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


OUTCOME: dict[Stop, list[str]] = {
    "cancel": ["cancelled"],
    "timeout": ["failed"],
    "yield": ["yield"],
    "fenced": [],
}


@pytest.mark.parametrize("why", OUTCOME)
@pytest.mark.parametrize("point", ["before its first step", "loading", "running"])
async def test_a_stop_is_heard_wherever_it_comes(bench: Bench, point: str, why: Stop):
    """A cancel that comes between two lines of ours must not be the one that is forgotten."""
    if point == "loading":
        bench.log.open.clear()
    task = asyncio.create_task(bench.execution.run())
    if point == "before its first step":
        bench.execution.stop(why)
    elif point == "loading":
        await wait_until(lambda: bench.log.reads)
        bench.execution.stop(why)
        bench.log.open.set()
    else:
        await bench.started.wait()
        bench.execution.stop(why)
    await asyncio.wait_for(task, 60)
    assert bench.outcomes() == OUTCOME[why]
    assert bench.started.is_set() == (point == "running")


@pytest.mark.parametrize("why", OUTCOME)
async def test_a_stop_that_comes_with_the_result(bench: Bench, why: Stop):
    """The code has returned, nobody has looked yet: one outcome; work that is done is not handed back."""
    task = asyncio.create_task(bench.execution.run())
    await bench.started.wait()
    bench.may_end.set()
    await asyncio.sleep(0)
    bench.execution.stop(why)
    await asyncio.wait_for(task, 60)
    assert bench.outcomes() == (["completed"] if why == "yield" else OUTCOME[why])


@pytest.mark.parametrize("why", ["cancel", "timeout", "yield"])
async def test_a_stop_while_the_end_is_written_changes_nothing(bench: Bench, why: Stop):
    """The outcome is on its way; to interrupt that would leave the job with none."""
    bench.work.hold()
    bench.may_end.set()
    task = asyncio.create_task(bench.execution.run())
    await wait_until(lambda: bench.work.calls)
    bench.execution.stop(why)
    bench.work.release()
    await asyncio.wait_for(task, 60)
    assert bench.outcomes() == ["completed"]


async def test_the_first_of_two_stops_decides(bench: Bench):
    """A drain and a cancel at once: one outcome, and the script makes a cancel of it if one is asked for."""
    bench.work.replies = [Answer("inbox", inbox=1, asked="cancel")]
    task = asyncio.create_task(bench.execution.run())
    await bench.started.wait()
    bench.execution.stop("yield")
    bench.execution.stop("cancel")
    await asyncio.wait_for(task, 60)
    assert bench.outcomes() == ["yield", "cancelled"]


async def test_what_comes_in_while_it_ends_is_read(bench: Bench):
    """A handed-back job that was signalled meanwhile is handed back knowing of it."""
    bench.work.replies = [Answer("inbox", inbox=3, asked="")]
    task = asyncio.create_task(bench.execution.run())
    await bench.started.wait()
    bench.execution.stop("yield")
    await asyncio.wait_for(task, 60)
    assert [(b.outcome, b.seen) for call in bench.work.calls for b in call.batches] == [
        ("yield", 0),
        ("yield", 3),
    ]


async def test_code_that_ignores_its_cancellation_is_left_behind_at_last():
    """Its job ends within the bound, and whoever stops the process is told of the task."""
    begun, ended = asyncio.Event(), asyncio.Event()

    async def stubborn(ctx: Any) -> None:
        while not ended.is_set():
            try:
                begun.set()
                await ended.wait()
            except asyncio.CancelledError:
                continue

    async with made(stubborn) as bench:
        task = asyncio.create_task(bench.execution.run())
        await begun.wait()
        bench.execution.stop("timeout")
        await asyncio.wait({task}, timeout=60)
        left = len(bench.left_behind)
        ended.set()
        assert (task.done(), bench.outcomes(), left) == (True, ["failed"], 1)
        await wait_until(lambda: not bench.left_behind)


async def test_a_cancellation_that_a_library_swallows_is_said_again():
    """`wait_for` of Python 3.11 loses a cancellation that meets its result; the job must still stop."""
    swallowed: list[int] = []
    begun = asyncio.Event()

    async def loses_one(ctx: Any) -> None:
        try:
            begun.set()
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            swallowed.append(1)
        await asyncio.sleep(3600)

    async with made(loses_one) as bench:
        task = asyncio.create_task(bench.execution.run())
        await begun.wait()
        bench.execution.stop("cancel")
        await asyncio.wait_for(task, 60)
        assert (bench.outcomes(), swallowed, len(bench.left_behind)) == (["cancelled"], [1], 0)


async def test_a_dropped_execution_writes_nothing(bench: Bench):
    """A worker that is dropped leaves its jobs to the lease, as one that was killed does."""
    task = asyncio.create_task(bench.execution.run())
    await bench.started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert bench.work.calls == []
    assert not bench.left_behind


async def test_loading_goes_on_where_an_outage_left_it(bench: Bench):
    """A long log is not read from its beginning again for each lost connection."""
    entries = [
        Entry(Cursor(1, 5), "job.queued", QUEUED),
        Entry(Cursor(2, 7), "job.log", encode_event(JobLog())),
    ]
    bench.log.pages_of = lambda after: [page(*entries[after.seq :])]
    bench.log.failures = [StoreUnavailable("away"), StoreUnavailable("away")]
    bench.may_end.set()
    await asyncio.wait_for(bench.execution.run(), 60)
    assert [cursor.seq for cursor in bench.log.reads] == [0, 2, 2]
    assert bench.outcomes() == ["completed"]


async def test_a_log_that_was_replaced_is_read_from_the_beginning(bench: Bench):
    """After a failover that lost a tail, half of the old history and half of the new one is nobody's."""
    first = page(Entry(Cursor(1, 5), "job.queued", QUEUED))
    bench.log.pages_of = lambda after: [first] if after.seq == 0 else [page(found=False)]
    bench.log.failures = [StoreUnavailable("away")]
    bench.may_end.set()
    await asyncio.wait_for(bench.execution.run(), 60)
    assert [cursor.seq for cursor in bench.log.reads] == [0, 1, 0]
    assert bench.outcomes() == ["completed"]


async def test_a_job_that_is_gone_ends_quietly(bench: Bench):
    """Somebody deleted it, or Redis came back empty: there is nothing to write to."""
    bench.log.pages_of = lambda _: []
    bench.log.failures = [JobNotFound("gone")]
    await asyncio.wait_for(bench.execution.run(), 60)
    assert bench.work.calls == []


async def test_a_job_whose_worker_was_lost_commits_before_its_code_runs(bench: Bench):
    """Code that crashes the process at once would otherwise never count as a crash, and go round for ever."""
    lost = Entry(Cursor(2, 6), "job.lost", b'{"ts":1,"worker":"w","crashes":0}')
    bench.log.pages_of = lambda _: [page(Entry(Cursor(1, 5), "job.queued", QUEUED), lost)]
    bench.work.hold()
    bench.may_end.set()
    task = asyncio.create_task(bench.execution.run())
    await wait_until(lambda: bench.work.calls)
    assert not bench.started.is_set()
    assert bench.work.calls[0].types == []
    bench.work.release()
    await asyncio.wait_for(task, 60)
    assert bench.outcomes() == ["completed"]
