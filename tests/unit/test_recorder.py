"""Group commit: what goes out when, what is sent again, and what a job is told of what came of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from streamjobs.config import Settings
from streamjobs.errors import Fenced, LimitExceeded, StoreFull, StoreUnavailable, StreamjobsError
from streamjobs.events import (
    Event,
    JobCompleted,
    JobLog,
    ReasoningDelta,
    TextDelta,
    ToolCompleted,
    ToolStarted,
    ToolUnknown,
    TurnStarted,
)
from streamjobs.store import Answer, Batch, Lease
from streamjobs.worker.recorder import Committer, Journal
from tests.conftest import wait_until

OK = "ok"
Reply = str | Answer | StreamjobsError


class Call:
    """One append call as the fake store saw it."""

    def __init__(self, batches: list[Batch], always: bool) -> None:
        self.batches = batches
        self.always = always
        self.at = asyncio.get_running_loop().time()

    @property
    def types(self) -> list[str]:
        return [kind for batch in self.batches for kind, _ in batch.events]

    @property
    def texts(self) -> list[str]:
        return [
            json.loads(data)["text"]
            for batch in self.batches
            for kind, data in batch.events
            if "delta" in kind
        ]


class FakeWork:
    """Appends as a script would, unless told what to answer; `hold` keeps calls in flight."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.replies: list[Reply | Callable[[list[Batch]], Reply]] = []
        self.seq: dict[str, int] = {}
        self.in_flight = 0
        self.most_in_flight = 0
        self.open = asyncio.Event()
        self.open.set()

    def hold(self) -> None:
        self.open.clear()

    def release(self) -> None:
        self.open.set()

    async def append(self, _partition: int, batches: list[Batch], *, always: bool = False) -> list[Answer]:
        self.calls.append(Call(list(batches), always))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await self.open.wait()
            await asyncio.sleep(0)
        finally:
            self.in_flight -= 1
        reply = self.replies.pop(0) if self.replies else OK
        if callable(reply):
            reply = reply(batches)
        if isinstance(reply, StreamjobsError):
            raise reply
        return [reply if isinstance(reply, Answer) else self._write(batch) for batch in batches]

    def _write(self, batch: Batch) -> Answer:
        seq = self.seq.get(batch.job_id, 2) + len(batch.events)
        self.seq[batch.job_id] = seq
        return Answer("ok", seq, 0, "")

    @property
    def written(self) -> list[str]:
        return [kind for call in self.calls for kind in call.types]


class Bench:
    """A committer over a fake store."""

    def __init__(self, **settings: Any) -> None:
        self.work = FakeWork()
        self.committer = Committer(self.work, 0, Settings(**settings))  # type: ignore[arg-type]
        self.changes: list[Journal] = []
        self.task = asyncio.create_task(self.committer.run())

    def journal(self, job: str = "a", inbox: int = 0) -> Journal:
        job_id = f"j0-{job * 26}"
        lease = Lease(job_id, 7, 2, 1, inbox, 0, -1, "chat", "ann", "default", b"")
        return Journal(lease, self.committer, self.changes.append)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    made = Bench()
    yield made
    await _stopped(made)


async def _stopped(bench: Bench) -> None:
    bench.task.cancel()
    await asyncio.gather(bench.task, return_exceptions=True)


def text(words: str, attempt: int = 1) -> TextDelta:
    return TextDelta(turn=1, text=words, attempt=attempt)


def said(words: str = "hi") -> Event:
    return JobLog(message=words)


# --- coalescing --------------------------------------------------------------------------------------


async def test_the_first_delta_goes_at_once(bench: Bench):
    """Time to first token: nobody waits for a window to fill."""
    bench.journal().emit_delta(text("Hel"))
    for _ in range(4):
        await asyncio.sleep(0)
    assert [call.texts for call in bench.work.calls] == [["Hel"]]


async def test_later_deltas_wait_for_the_interval_and_go_as_one(bench: Bench):
    """One write a token would cost every viewer a frame, and Redis a script, for each token."""
    journal = bench.journal()
    journal.emit_delta(text("a"))
    await wait_until(lambda: bench.work.calls)
    for word in "bcdef":
        journal.emit_delta(text(word))
    await wait_until(lambda: len(bench.work.calls) == 2)
    first, second = bench.work.calls
    assert second.texts == ["bcdef"]
    assert 0.01 <= second.at - first.at < 1.0


async def test_a_kilobyte_does_not_wait(bench: Bench):
    """A fast model is not slowed down to one write an interval."""
    await _stopped(bench)
    bench = Bench(coalesce_interval=3600.0)
    journal = bench.journal()
    journal.emit_delta(text("a"))
    await wait_until(lambda: bench.work.calls)
    journal.emit_delta(text("b" * 1000))
    journal.emit_delta(text("c" * 24))
    await wait_until(lambda: len(bench.work.calls) == 2)
    assert bench.work.calls[1].texts == ["b" * 1000 + "c" * 24]
    await _stopped(bench)


async def test_what_is_no_delta_takes_along_what_is_before_it(bench: Bench):
    """A tool call must not be seen before the words that led to it, nor wait for a window."""
    await _stopped(bench)
    bench = Bench(coalesce_interval=3600.0)
    journal = bench.journal()
    journal.emit_delta(text("a"))
    await wait_until(lambda: bench.work.calls)
    journal.emit_delta(text("b"))
    journal.emit(said())
    await wait_until(lambda: len(bench.work.calls) == 2)
    assert bench.work.calls[1].types == ["text.delta", "job.log"]
    await _stopped(bench)


async def test_deltas_of_different_kinds_and_attempts_are_not_joined(bench: Bench):
    """Reasoning must not appear as text, nor a superseded generation's words in the next one."""
    bench.work.hold()
    journal = bench.journal()
    journal.emit(said())
    await wait_until(lambda: bench.work.calls)
    journal.emit_delta(ReasoningDelta(turn=1, text="hm"))
    journal.emit_delta(text("one"))
    journal.emit_delta(text("two", attempt=2))
    journal.emit_delta(text(" and three", attempt=2))
    bench.work.release()
    await wait_until(lambda: len(bench.work.calls) == 2)
    assert bench.work.calls[1].types == ["reasoning.delta", "text.delta", "text.delta"]
    assert bench.work.calls[1].texts == ["hm", "one", "two and three"]


# --- one call at a time, frozen batches ----------------------------------------------------------------


async def test_one_call_is_in_flight_and_the_rest_gathers(bench: Bench):
    """Two calls at once could overtake each other; and many small ones cost more than one large one."""
    bench.work.hold()
    journals = [bench.journal(name) for name in "abcd"]
    for journal in journals:
        journal.emit(said("first"))
    await wait_until(lambda: bench.work.calls)
    for journal in journals:
        journal.emit(said("second"))
        journal.emit(said("third"))
    bench.work.release()
    await asyncio.gather(*(journal.commit() for journal in journals))
    assert bench.work.most_in_flight == 1
    assert [len(call.batches) for call in bench.work.calls] == [4, 4]
    assert [[batch.number for batch in call.batches] for call in bench.work.calls] == [[1] * 4, [2] * 4]


async def test_a_batch_whose_reply_was_lost_is_sent_again_as_it_was(bench: Bench):
    """The script knows a resend by its size: with more in it, it would be a conflict, and the lease lost."""
    bench.work.replies = [StoreUnavailable("away"), StoreUnavailable("away")]
    journal = bench.journal()
    journal.emit(said("one"))
    await wait_until(lambda: bench.work.calls)
    journal.emit(said("two"))
    assert await journal.commit() == 4
    first, second, third, fourth = bench.work.calls
    assert first.batches == second.batches == third.batches
    assert (fourth.types, fourth.batches[0].number) == (["job.log"], 2)


async def test_an_answer_that_it_was_there_already_is_as_good(bench: Bench):
    """A job whose reply was lost must not be told that its lease is."""
    bench.work.replies = [Answer("dup", 3, 0, "")]
    journal = bench.journal()
    journal.emit(said())
    assert await journal.commit() == 3
    assert journal.closed is None


async def test_a_tracked_event_is_told_its_seq(bench: Bench):
    """`turn.restarted` names the seq from which on nothing stands; a wrong one would cut good text."""
    journal = bench.journal()
    journal.emit(said())
    tracked = journal.emit_tracked(TurnStarted(turn=1))
    journal.emit(said())
    journal.emit(said())
    assert await tracked == 4
    assert await journal.commit() == 6


async def test_a_huge_backlog_goes_in_bounded_batches_in_order(bench: Bench):
    """After an outage one job's backlog must not hold Redis for everybody."""
    journal = bench.journal()
    for number in range(1200):
        journal.emit(said(str(number)))
    large = "x" * 600_000
    journal.emit(said(large))
    journal.emit(said(large))
    await journal.commit()
    sizes = [len(call.batches[0].events) for call in bench.work.calls]
    assert max(sizes) <= 500
    assert sum(sizes) == 1202
    assert max(sum(len(d) for _, d in call.batches[0].events) for call in bench.work.calls) < 1_100_000
    words = [json.loads(d)["message"] for call in bench.work.calls for _, d in call.batches[0].events]
    assert words == [*map(str, range(1200)), large, large]


async def test_a_call_is_bounded_and_leaves_nobody_behind(bench: Bench):
    """Hundreds of jobs with a megabyte each, after an outage, are not one call that Redis chokes on."""
    bench.work.hold()
    bench.journal("z").emit(said())
    await wait_until(lambda: bench.work.calls)
    journals = [bench.journal(name) for name in "abcdefghijkl"]
    for journal in journals:
        journal.emit(said("x" * 900_000))
    bench.work.release()
    await asyncio.gather(*(journal.commit() for journal in journals))
    assert max(len(call.batches) for call in bench.work.calls) <= 6
    assert [journal.committed for journal in journals] == [1] * 12


# --- back-pressure -------------------------------------------------------------------------------------


async def test_a_full_journal_says_so_and_wakes_whoever_waits(bench: Bench):
    """With Redis slow the provider is not read on, so memory does not grow with the answer."""
    await _stopped(bench)
    bench = Bench(recorder_bytes=1000)
    bench.work.hold()
    journal = bench.journal()
    journal.emit(said())
    await wait_until(lambda: bench.work.calls)
    assert not journal.is_full
    journal.emit_delta(text("x" * 1001))
    assert journal.is_full
    waiting = [asyncio.create_task(journal.room()) for _ in range(2)]
    await asyncio.sleep(0.05)
    assert not any(task.done() for task in waiting)
    bench.work.release()
    await asyncio.gather(*waiting)
    assert not journal.is_full
    assert journal.unwritten == 0
    await _stopped(bench)


async def test_whoever_waits_for_room_hears_of_the_lost_lease(bench: Bench):
    """A job that waits for Redis must stop when its lease goes, not wait for ever."""
    await _stopped(bench)
    bench = Bench(recorder_bytes=10)
    bench.work.hold()
    journal = bench.journal()
    journal.emit(said("much too much"))
    waiting = asyncio.create_task(journal.room())
    await asyncio.sleep(0)
    journal.close(Fenced("gone"))
    with pytest.raises(Fenced):
        await waiting
    await _stopped(bench)


async def test_what_waits_never_passes_the_jobs_own_budget(bench: Bench):
    """A workflow that emits in a loop while Redis is away must not take the worker's memory with it."""
    await _stopped(bench)
    bench = Bench(max_bytes=10_000)
    bench.work.hold()
    journal = bench.journal()
    with pytest.raises(LimitExceeded, match="max_bytes"):
        for _ in range(1000):
            journal.emit(said("x" * 100))
    assert journal.unwritten <= 10_000
    await _stopped(bench)


async def test_an_event_that_is_too_large_is_refused_where_it_is_made(bench: Bench):
    """One event of 100 MB would stop every viewer of the job."""
    journal = bench.journal()
    with pytest.raises(LimitExceeded, match="max_event_bytes"):
        journal.emit(said("x" * 1_100_000))
    journal.emit(said())
    await journal.commit()


# --- refusals ------------------------------------------------------------------------------------------


async def test_over_the_budget_only_the_end_is_taken(bench: Bench):
    """A runaway job must fail and say why, not go on unseen or hang."""
    bench.work.replies = [Answer("limit", detail="events")]
    journal = bench.journal()
    journal.emit(said())
    with pytest.raises(LimitExceeded, match="events"):
        await journal.commit()
    for hand_in in (lambda: journal.emit(said()), lambda: journal.emit_delta(text("a"))):
        with pytest.raises(LimitExceeded):
            hand_in()
    assert journal.unwritten == 0
    answer = await journal.finish("failed", said())
    assert answer.verdict == "ok"
    assert bench.work.calls[-1].batches[0].outcome == "failed"
    assert bench.work.calls[-1].types == ["job.log"]


async def test_an_ending_over_the_budget_is_told_and_may_be_given_again(bench: Bench):
    """The last words of a job may be what is too much; it must still end."""
    bench.work.replies = [OK, Answer("limit", detail="bytes")]
    journal = bench.journal()
    journal.emit(said())
    await journal.commit()
    journal.emit_delta(text("too much"))
    with pytest.raises(LimitExceeded):
        await journal.finish("completed", JobCompleted())
    answer = await journal.finish("failed", said())
    assert (answer.verdict, bench.work.calls[-1].types) == ("ok", ["job.log"])


async def test_an_unread_inbox_gives_the_outcome_back_and_keeps_the_rest(bench: Bench):
    """A signal that arrives while a job says 'I wait' is read, not lost; and nothing it said before is."""
    bench.work.replies = [Answer("inbox", inbox=1, asked="")]
    journal = bench.journal()
    journal.emit_delta(text("words"))
    answer = await journal.finish("wait", said("waiting"))
    assert (answer.verdict, journal.inbox) == ("inbox", 1)
    assert bench.changes == [journal]
    answer = await journal.finish("wait", said("still waiting"))
    assert answer.verdict == "ok"
    first, second = (call.batches[0] for call in bench.work.calls)
    assert (first.seen, second.seen, first.number, second.number) == (0, 1, 1, 1)
    assert bench.work.calls[1].types == ["text.delta", "job.log"]
    assert b"still" in second.events[-1][1]


async def test_a_journal_that_got_an_unread_inbox_takes_events_again(bench: Bench):
    """What came in is handled by the job's code, which goes on writing."""
    bench.work.replies = [Answer("inbox", inbox=1, asked="")]
    journal = bench.journal()
    await journal.finish("wait", said())
    journal.emit(said("handled"))
    await journal.commit()
    assert bench.work.written == ["job.log", "job.log"]


async def test_no_tool_starts_once_a_cancel_is_in_the_log(bench: Bench):
    """The script refuses it; what was said beside it is still written, and the job hears of the cancel."""
    bench.work.replies = [Answer("inbox", inbox=1, asked="cancel")]
    journal = bench.journal()
    journal.emit(said("before"))
    journal.emit(ToolStarted(call_id="c", idempotency_key="k", effect="once"))
    with pytest.raises(Fenced):
        await journal.commit()
    assert bench.changes == [journal]
    assert journal.asked == "cancel"
    journal.emit(ToolUnknown(call_id="c"))
    answer = await journal.finish("cancelled")
    assert answer.verdict == "ok"
    assert bench.work.calls[-1].types == ["job.log", "tool.unknown"]


@pytest.mark.parametrize("verdict", ["fenced", "gap", "conflict", "gone", "bad", "error"])
async def test_any_other_answer_ends_the_journal(bench: Bench, verdict: str):
    """A worker that lost its lease must not write one event more, whatever its code does."""
    bench.work.replies = [Answer(verdict, detail="5")]
    journal = bench.journal()
    tracked = journal.emit_tracked(TurnStarted(turn=1))
    with pytest.raises(Fenced):
        await journal.commit()
    with pytest.raises(Fenced):
        await tracked
    assert bench.changes == [journal]
    with pytest.raises(Fenced):
        journal.emit(said())
    with pytest.raises(Fenced):
        await journal.finish("completed", JobCompleted())
    assert len(bench.work.calls) == 1


async def test_nothing_follows_an_outcome(bench: Bench):
    """A task that a workflow forgot must not write behind the job's end: the whole end would be refused."""
    bench.work.hold()
    journal = bench.journal()
    finishing = asyncio.create_task(journal.finish("completed", JobCompleted()))
    await asyncio.sleep(0)
    with pytest.raises(Fenced):
        journal.emit(said())
    with pytest.raises(Fenced):
        journal.emit_delta(text("late"))
    bench.work.release()
    assert (await finishing).verdict == "ok"
    assert bench.work.written == ["job.completed"]
    with pytest.raises(Fenced):
        journal.emit(said())


async def test_dropped_text_is_not_sent(bench: Bench):
    """After a cancel no more of the answer appears, but what was recorded of tools does."""
    bench.work.hold()
    journal = bench.journal()
    journal.emit(said())
    await wait_until(lambda: bench.work.calls)
    journal.emit_delta(text("late"))
    journal.emit(ToolUnknown(call_id="c"))
    journal.emit_delta(text("later"))
    journal.drop_deltas()
    finishing = asyncio.create_task(journal.finish("cancelled"))
    bench.work.release()
    await finishing
    assert bench.work.written == ["job.log", "tool.unknown"]
    assert journal.unwritten == 0


async def test_a_renewal_tells_a_job_once(bench: Bench):
    """A cancel that comes with a renewal stops the job, also where the hint was lost."""
    journal = bench.journal()
    journal.note(0, "")
    assert bench.changes == []
    journal.note(1, "cancel")
    journal.note(1, "cancel")
    assert bench.changes == [journal]
    assert (journal.inbox, journal.asked) == (1, "cancel")


# --- a store in trouble ----------------------------------------------------------------------------------


async def test_a_full_store_still_takes_what_lets_jobs_end(bench: Bench):
    """At its memory limit the system must drain, not lock up: jobs that end are what frees memory."""
    full = StoreFull("full")
    bench.work.replies = [full]
    talking, ending, using = bench.journal("a"), bench.journal("b"), bench.journal("c")
    talking.emit_delta(text("more"))
    using.emit(ToolCompleted(call_id="c"))
    finishing = asyncio.create_task(ending.finish("completed", JobCompleted()))
    await asyncio.gather(finishing, using.commit())
    plain, always = bench.work.calls
    assert (plain.always, len(plain.batches)) == (False, 3)
    assert (always.always, sorted(always.types)) == (True, ["job.completed", "tool.completed"])
    assert talking.committed == 0
    await wait_until(lambda: talking.committed == 1)
    assert bench.work.calls[-1].batches == [b for b in plain.batches if b.events[0][0] == "text.delta"]


async def test_a_full_store_is_not_asked_again_for_every_token(bench: Bench):
    """Redis at its limit is busy enough."""
    bench.work.replies = [StoreFull("full")] * 50
    journal = bench.journal()
    for _ in range(20):
        journal.emit(said())
        await asyncio.sleep(0.001)  # all within the shortest rest
    assert len(bench.work.calls) == 1


async def test_a_store_that_is_away_is_not_asked_in_a_hot_loop(bench: Bench):
    """An outage must not cost a core in every worker."""
    bench.work.replies = [StoreUnavailable("away")] * 1000
    journal = bench.journal()
    journal.emit(said())
    await asyncio.sleep(1.0)
    assert 2 <= len(bench.work.calls) < 12


async def test_one_jobs_poison_does_not_stop_the_others(bench: Bench):
    """A batch that Redis refuses for no passing reason takes its own job down, not the worker's all."""
    good, bad = bench.journal("a"), bench.journal("b")

    def refuse(batches: list[Batch]) -> Reply:
        return StreamjobsError("ERR") if any(b.job_id == bad.lease.job_id for b in batches) else OK

    bench.work.replies = [refuse] * 50
    good.emit(said())
    bad.emit(said())
    await good.commit()
    await wait_until(lambda: bad.closed is not None)
    with pytest.raises(Fenced):
        bad.emit(said())
    good.emit(said())
    await good.commit()


async def test_a_closed_journals_batch_is_not_sent_again(bench: Bench):
    """While Redis is away leases run out; what their jobs had to say is not retried for ever."""
    bench.work.replies = [StoreUnavailable("away")]
    journal, other = bench.journal("a"), bench.journal("b")
    journal.emit(said())
    other.emit(said())
    await wait_until(lambda: bench.work.calls)
    journal.close(Fenced("lost meanwhile"))
    await other.commit()
    assert [batch.job_id for batch in bench.work.calls[1].batches] == [other.lease.job_id]


async def test_two_lives_of_a_job_share_nothing(bench: Bench):
    """A job that comes back to the same worker under a new lease begins with batch 1."""
    bench.work.replies = [Answer("fenced")]
    before, after = bench.journal("a"), bench.journal("a")
    before.emit(said())
    with pytest.raises(Fenced):
        await before.commit()
    after.emit(said())
    await after.commit()
    assert [call.batches[0].number for call in bench.work.calls] == [1, 1]
    assert (before.closed is None, after.closed) == (False, None)
