"""Sealed history on a real Redis: what is in segments and what is in the stream read as one log."""

from __future__ import annotations

import asyncio

import pytest

from streamjobs import events as ev
from streamjobs import segments
from streamjobs.cursor import START, Cursor
from streamjobs.errors import StreamjobsError
from streamjobs.job import Fold
from streamjobs.store import DeadFilter, Entry, Sealed, Store, Stored, keys, log
from streamjobs.store.log import Page
from tests.logs import random_log
from tests.sealing import Job


@pytest.fixture
async def job(store: Store) -> Job:
    return await Job.start(store)


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "SEGMENT_EVENTS", 7)


@pytest.mark.usefixtures("small_segments")
@pytest.mark.parametrize("has_ended", [False, True])
async def test_every_offset_ever_issued_replays_exactly(job: Job, has_ended: bool):
    """A browser that comes back after a night would miss words of the answer, or get them twice."""
    await job.say(30)
    await job.seal(20)
    await job.say(8)
    if has_ended:
        await job.end()
        await job.seal(33)
    assert await job.replay() == job.whole
    for at, entry in enumerate(job.whole, 1):
        page = await job.store.log.page(job.id, entry.cursor, limit=3)
        assert (page.found, page.last) == (True, job.whole[-1].cursor)
        assert page.entries == job.whole[at : at + len(page.entries)]
        assert len(page.entries) >= min(1, len(job.whole) - at)
        assert await job.replay(entry.cursor) == job.whole[at:]


@pytest.mark.usefixtures("small_segments")
async def test_a_cursor_that_was_never_issued_is_not_found(job: Job):
    """A cursor of a lost history would be taken up in the middle of another one: a silent splice."""
    await job.say(30)
    await job.seal(20)
    for entry in (*job.whole, Entry(Cursor(99, 1), "", b"")):
        wrong = Cursor(entry.cursor.seq, entry.cursor.epoch + 1)
        page = await job.store.log.page(job.id, wrong)
        assert (page.found, page.entries) == (False, []), wrong
    assert await job.replay(job.whole[2].cursor) == job.whole[3:]
    wrong = Cursor(3, job.whole[2].cursor.epoch + 1)
    assert not (await job.store.log.page(job.id, wrong)).found, "also of a segment that is kept decoded"


async def test_pages_of_segments_are_bounded(job: Job):
    """One request would make the gateway hold, and send, a whole segment at once."""
    await job.say(300, size=1000)
    await job.seal()
    page = await job.store.log.page(job.id, max_bytes=5000)
    assert 3 <= len(page.entries) <= 6
    assert not page.is_up_to_date
    assert len((await job.store.log.page(job.id, limit=2)).entries) == 2
    assert len((await job.store.log.page(job.id, limit=1, max_bytes=1)).entries) == 1


async def test_what_is_sealed_leaves_the_stream_and_nothing_else_does(job: Job):
    """Redis would hold every log twice; or a tail that no segment has would be gone."""
    await job.say(40)
    sealed = await job.seal(30)
    assert sealed is not None
    assert sealed.log == job.whole[29].cursor
    assert await job.stream() == len(job.whole) - 30
    await job.say(5)
    assert await job.replay() == job.whole
    await job.end()
    assert await job.stream() == len(job.whole) - 30
    await job.seal()
    assert not await job.store.client.exists(f"{keys.job_key(job.id)}:events")
    expiries = {await job.store.client.pexpiretime(keys.job_key(job.id) + rest) for rest in ("", ":sealed")}
    assert len(expiries) == 1
    assert await job.replay() == job.whole


async def test_a_log_that_is_sealed_whole_goes_on(job: Job):
    """A quiet job would be stuck, or start anew at 1, after its stream was emptied."""
    await job.seal()
    assert await job.stream() == 0
    assert await job.replay() == job.whole
    page = await job.store.log.page(job.id, job.whole[-1].cursor)
    assert (page.found, page.is_up_to_date) == (True, True)
    await job.say(2)
    assert [entry.cursor.seq for entry in job.whole] == [1, 2, 3, 4]
    assert await job.replay() == job.whole


async def test_who_is_second_is_told_so_and_changes_nothing(job: Job):
    """Two projectors at one job would trim each other's work away."""
    await job.say(10)
    assert await job.seal(6)
    assert await job.seal(9, known=Sealed()) is None
    await job.say(3)
    both = await asyncio.gather(*(job.seal() for _ in range(4)))
    assert any(both)
    assert await job.replay() == job.whole
    assert (await job.store.snapshots.load(job.id)).sealed.log == job.whole[-1].cursor


async def test_a_fold_of_another_history_seals_nothing(job: Job):
    """After a failover that lost a tail, events that never happened would be sealed for ever."""
    await job.say(5)
    fold = job.fold()
    fold.cursor = Cursor(fold.cursor.seq, fold.cursor.epoch + 1)
    assert await job.store.snapshots.seal(job.id, Sealed(), fold) is None
    assert await job.stream() == len(job.whole)


async def test_a_snapshot_and_what_follows_it_are_the_whole_job(store: Store):
    """A viewer who joins late would see another job than one who was there from the beginning."""
    object.__setattr__(store.snapshots, "_min_events", 10)
    job = await Job.start(store)
    for events in (6, 20, 3):
        await job.say(events)
        await job.seal(len(job.whole) - 2)
        stored = await store.snapshots.load(job.id)
        assert (stored.weight > 0) == (len(job.whole) > 12)
        if stored.weight:
            assert stored.fold.cursor == stored.sealed.snap == stored.sealed.log == job.whole[-3].cursor
        assert (await folded_on(store, stored)).view() == job.fold().view()


async def folded_on(store: Store, stored: Stored) -> Fold:
    """What `load` gave, and what follows it."""
    stored.fold.apply_all(stored.page.entries)
    async for page in store.log.pages(stored.fold.view().id, stored.fold.cursor):
        stored.fold.apply_all(page.entries)
    return stored.fold


async def test_a_snapshot_of_another_release_is_passed_over(store: Store):
    """During a rolling upgrade the older gateways would fail, or show nonsense."""
    object.__setattr__(store.snapshots, "_min_events", 0)
    job = await Job.start(store)
    await job.say(5)
    await job.seal(5)
    blob = segments.compress(b'{"schema":99}')
    await store.client.hset(f"{keys.job_key(job.id)}:sealed", "snap", blob)
    stored = await store.snapshots.load(job.id)
    assert (stored.fold.cursor, stored.weight) == (START, 0)
    assert (await folded_on(store, stored)).view() == job.fold().view()


async def test_the_last_event_is_found_wherever_it_is(job: Job):
    """The dead list would not say why an old job failed."""
    await job.say(5)
    assert await job.store.log.last(job.id) == job.whole[-1]
    await job.seal(4)
    assert await job.store.log.last(job.id) == job.whole[-1]
    await job.write([ev.JobFailed(error=ev.ErrorInfo("boom", "it broke"))], "failed")
    await job.seal()
    assert await job.store.log.last(job.id) == job.whole[-1]
    (dead,), _ = await job.store.dead.page(DeadFilter())
    assert dead.message == "it broke"


@pytest.mark.usefixtures("small_segments")
async def test_a_log_that_is_sealed_while_it_is_read_reads_whole(job: Job):
    """Viewers of a live job would meet a hole each time the projector has been there."""
    await job.say(60)
    for seals_after in range(1, 60, 7):
        seen: list[Entry] = []
        page: Page | None = None
        while page is None or not page.is_up_to_date:
            page = await job.store.log.page(job.id, seen[-1].cursor if seen else START, limit=4)
            assert page.found
            seen += page.entries
            if seals_after <= len(seen) < seals_after + 4:
                await job.seal(min(len(job.whole), len(seen) + 3))
        assert seen == job.whole


@pytest.mark.usefixtures("small_segments")
async def test_damage_is_an_error_and_never_an_empty_log(job: Job):
    """A lost segment would pass for a job in which nothing happened."""
    await job.say(30)
    await job.seal(21)
    history = f"{keys.job_key(job.id)}:sealed"
    whole = await job.store.client.hgetall(history)
    other = Store(job.store.settings, job.store.client)  # which has kept nothing decoded
    for field, damaged in ((b"14", whole[b"7"]), (b"14", b"nonsense"), (b"14", None), (b"index", None)):
        await job.store.client.delete(history)
        mapping = {name: value for name, value in (whole | {field: damaged}).items() if value is not None}
        await job.store.client.hset(history, mapping=mapping)
        with pytest.raises(StreamjobsError):
            async for page in other.log.pages(job.id):
                assert page.found
    await job.store.client.hset(history, mapping=whole)
    assert await job.replay() == job.whole


async def test_a_segment_that_is_forgotten_while_it_is_read_on_is_no_damage(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    """A busy projector would set sound jobs aside as damaged, and a busy gateway break their streams."""
    monkeypatch.setattr(log, "KEPT_BYTES", 1)
    jobs = [await Job.start(store, number) for number in (1, 2, 3)]
    for job in jobs:
        await job.say(30)
        await job.end()
        await job.seal()

    async def replay(job: Job) -> list[Entry]:
        entries: list[Entry] = []
        while entries != job.whole:
            after = entries[-1].cursor if entries else START
            entries += (await store.log.page(job.id, after, limit=3)).entries
        return entries

    await asyncio.gather(*(replay(job) for job in jobs))


async def test_many_who_replay_one_job_decode_it_once(job: Job, monkeypatch: pytest.MonkeyPatch):
    """A hundred viewers who replay a long answer would cost the gateway a hundred times its memory."""
    await job.say(200)
    await job.seal()
    decoded: list[int] = []
    decode = segments.decode

    def counted(blob: bytes) -> list[Entry]:
        decoded.append(len(blob))
        return decode(blob)

    monkeypatch.setattr(segments, "decode", counted)
    for _ in range(5):
        cursor = START
        while cursor != job.whole[-1].cursor:
            page = await job.store.log.page(job.id, cursor, limit=11)
            cursor = page.entries[-1].cursor
    assert len(decoded) == 1


@pytest.mark.parametrize("seed", range(3))
async def test_random_logs_seal_and_read_back(job: Job, seed: int, small_segments: None):
    """A kind of event that nobody thought of would not survive being sealed."""
    events = [event for event in random_log(seed, 120) if not event.type.startswith("job.") and event.type]
    await job.write(events)
    await job.seal(len(job.whole) - 11)
    assert await job.replay() == job.whole
