"""Statistics: what they count, that nothing counts twice, and that counting again gives the same."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from streamjobs import events as ev
from streamjobs.cursor import Cursor
from streamjobs.job import Status
from streamjobs.projections.stats import Position, StatsProjection, Tally
from streamjobs.store import Entry, Store
from tests.projections.bench import Floor, carry, plain

SLOT = 300_000


def entries(*events: ev.Event) -> list[Entry]:
    return [Entry(Cursor(i, 1), event.type, ev.encode_event(event)) for i, event in enumerate(events, 1)]


LIFE = entries(
    ev.JobQueued(ts=1000, kind="k", owner="o"),
    ev.JobStarted(ts=1200, attempt=1, worker="w", waited_ms=200),
    ev.TurnStarted(ts=1300, turn=1),
    ev.ReasoningDelta(ts=1340, turn=1, text="h"),
    ev.TextDelta(ts=1400, turn=1, text="h"),
    ev.JobLost(ts=2200, worker="w", crashes=1),
    ev.JobStarted(ts=2300, attempt=1, worker="x", waited_ms=100),
    ev.TurnRestarted(ts=2300, turn=1, attempt=2, supersedes_from=4),
    ev.TextDelta(ts=2900, turn=1, text="h", attempt=2),
    ev.TurnCompleted(ts=3000, turn=1, usage=ev.Usage(7, 9, 2, 1)),
    ev.JobWaiting(ts=3300, waits_for="signal:x"),
    ev.JobRequeued(ts=400_000, why="signal"),
    ev.JobStarted(ts=400_100, attempt=1, worker="x", waited_ms=100),
    ev.JobCompleted(ts=400_600),
)


def counted(events: list[Entry], *, cut: int = 0) -> dict[tuple[int, str], int]:
    """What a log adds; counted in two pieces with the position stored in between, where it is cut."""
    position, total = Position(), {}
    for piece in (events[:cut], events[cut:]):
        tally = Tally(Position.parse(str(position)) if cut else position)
        tally.add_all(piece)
        position = tally.position
        for key, amount in tally.amounts.items():
            total[key] = total.get(key, 0) + amount
    return {key: amount for key, amount in total.items() if amount}


def test_a_life_is_counted_as_it_was():
    """A dashboard would show waits, crashes or tokens that nobody had."""
    assert counted(LIFE) == {
        (0, "submitted"): 1, (0, "started"): 2, (0, "crashes"): 1, (0, "turns"): 1,
        (0, "wait:3"): 1, (0, "wait:2"): 1, (0, "wait_ms"): 300,
        (0, "first_token:1"): 1, (0, "first_token:5"): 1, (0, "first_token_ms"): 640,
        (0, "input_tokens"): 7, (0, "output_tokens"): 9, (0, "reasoning_tokens"): 2, (0, "cached_tokens"): 1,
        (SLOT, "started"): 1, (SLOT, "wait:2"): 1, (SLOT, "wait_ms"): 100,
        (SLOT, "completed"): 1, (SLOT, "run:6"): 1, (SLOT, "run_ms"): 2500,
    }  # fmt: skip


@pytest.mark.parametrize("cut", range(1, len(LIFE)))
def test_counting_may_stop_and_go_on_anywhere(cut: int):
    """A projector that was killed between two events would count a time wrong, or a move not at all."""
    assert counted(LIFE, cut=cut) == counted(LIFE)


@pytest.mark.parametrize("status", Status)
def test_a_position_is_short(status: Status):
    """Over 64 bytes a job's hash would take ten times its memory."""
    late = Position(Cursor(200_000, 1_900_000_000_000), status, 1_900_000_000_000, 10**9, 1_900_000_000_000)
    stored = str(late)
    assert len(f"99 {stored}") <= 64
    assert status.is_terminal or Position.parse(stored) == late


async def test_statistics_of_many_jobs(store: Store):
    """Totals and history would not add up."""
    floor = Floor(store)
    for end in ("completed", "failed", "completed"):
        await floor.live("chat", end)
    await floor.submit("other")
    await floor.submit("other", delay=60)
    await carry(store)
    totals = await store.stats.totals()
    chat, other = totals["chat", "default"], totals["other", "default"]
    assert (chat["submitted"], chat["completed"], chat["failed"]) == (3, 2, 1)
    assert (chat["started"], chat["retries"], chat["turns"]) == (6, 3, 3)
    assert (chat["input_tokens"], chat["output_tokens"]) == (9, 15)
    assert not any(n for what, n in chat.items() if what.startswith("now:"))
    assert (other["now:queued"], other["now:scheduled"], other["submitted"]) == (1, 1, 2)
    for step in ("5m", "1h"):
        history = await store.stats.history(step)
        chats = [counts[key]["submitted"] for _, counts in history for key in counts if key[0] == "chat"]
        others = [counts[key]["now:queued"] for _, counts in history for key in counts if key[0] == "other"]
        assert (sum(chats), sum(others)) == (3, 0), "in one step, or at the edge of two"
    assert await store.stats.history("5m", await store.now_ms() + 10 * SLOT) == []


async def test_racing_projectors_count_once(store: Store):
    """With two projectors a dashboard would show twice what happened."""
    floor = Floor(store)
    jobs = [await floor.live() for _ in range(5)]
    projections = [StatsProjection(store) for _ in range(4)]
    await asyncio.gather(*(one.advance(job) for job in jobs for one in projections * 3))
    once = plain(await store.stats.totals())
    assert once["work", "default"]["submitted"] == 5
    await carry(store)
    assert plain(await store.stats.totals()) == once


async def test_a_rebuild_gives_the_same(store: Store):
    """After a rebuild the numbers would jump."""
    floor = Floor(store)
    for _ in range(4):
        await floor.live()
    waiting = await floor.submit()
    runner = await carry(store)
    before = plain(await store.stats.totals()), await store.stats.history("5m")
    await store.feed.ask_rebuild("stats")
    await runner.rebuild()
    assert (plain(await store.stats.totals()), await store.stats.history("5m")) == before
    await store.jobs.cancel(waiting)
    await carry(store)
    work = (await store.stats.totals())["work", "default"]
    assert (work["now:queued"], work["cancelled"]) == (0, 1)


async def test_kinds_without_end_are_counted_as_one(store: Store, monkeypatch: pytest.MonkeyPatch):
    """Whoever may submit could fill Redis with kinds."""
    await store.client.hset("sj:{0}:totals:1", mapping={f"x|y|{n}": 1 for n in range(50_000)})
    await Floor(store).submit("new")
    await carry(store, StatsProjection(store))
    totals = await store.stats.totals()
    assert ("new", "default") not in totals
    assert totals["~other", "~other"]["submitted"] == 1


async def test_a_log_that_was_replaced_is_counted_on(store: Store):
    """After a failover that lost a tail, each such job would be in quarantine."""
    job_id = await Floor(store).submit()
    projection = StatsProjection(store)
    await projection.advance(job_id)
    key = f"sj:{{0}}:job:{job_id}"
    stored = (await store.client.hget(key, "stats")).decode()
    generation, cursor, rest = stored.split(" ", 2)
    await store.client.hset(key, "stats", f"{generation} {cursor}9 {rest}")
    await store.jobs.cancel(job_id)
    await projection.advance(job_id)
    counts = (await store.stats.totals())["work", "default"]
    assert (counts["submitted"], counts["now:queued"], counts["cancelled"]) == (1, 0, 1)


async def test_statistics_are_told_apart_by_queue(store: Store):
    """An autoscaler of one queue would act on another's."""
    settings = msgspec.structs.replace(store.settings, queues=("default", "bulk"))
    both = await Store.open(settings)
    floor = Floor(both)
    await floor.submit()
    await floor.submit(queue="bulk")
    await carry(both)
    assert set(await both.stats.totals()) == {("work", "default"), ("work", "bulk")}
    await both.aclose()
