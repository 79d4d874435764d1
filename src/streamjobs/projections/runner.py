"""The runner: carries notes from the feeds to projections, together with other projectors.

Rule 1: a note says only which job to look at. What is new is read from the job's log, behind the position
that the projection itself keeps; so notes may repeat, race and come out of order.
Rule 2: notes are acknowledged after the jobs they name were advanced. A projector that dies, or loses Redis
or an answer in between, leaves them to be read again: by itself first, else by whoever claims them.
Rule 3: a job on which a projection fails is set aside with its error, and the others go on. That Redis is
away or full is nobody's fault: then the batch is tried again after a pause.

Each projection has one loop for each partition, which takes a batch, advances its jobs a few at a time, and
acknowledges; loops beside them listen for new notes, keep the groups, and rebuild.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import structlog

from streamjobs import metrics
from streamjobs.errors import JobNotFound, StoreFull, StoreUnavailable, StreamjobsError
from streamjobs.faults import fault
from streamjobs.retry import Backoff
from streamjobs.store import Quarantined, Store, jitter

log = structlog.get_logger(__name__)

_BATCH = 100
"""Entries of the feed that are read at once; each may note many jobs."""
_GATHER = 0.01
"""Seconds from the first new note to its reading: what comes meanwhile is read with it."""
_POLL = 1.0
_REAP_AFTER = 300.0
_HOLD_LEASES = 2
"""Leases for which a rebuild stays with a projector that says nothing."""
_CHUNK = 32
"""Jobs that a rebuild advances before it says something."""
_PATIENCE = Backoff(base=0.1, cap=5.0)


class Projection(Protocol):
    """What the runner runs. It may be `Sweeping`, `Resettable` and `Looping` too."""

    name: str

    async def advance(self, job_id: str) -> None:
        """Fold what is new of a job, up to the end of its log.

        Safe to call twice, late and from several processes at once. `JobNotFound` means that there is
        nothing to do; any other error sets the job aside.
        """
        ...


@runtime_checkable
class Sweeping(Protocol):
    """A projection with something to do now and then."""

    async def sweep(self, partition: int) -> None:
        """Do some of it."""
        ...


@runtime_checkable
class Resettable(Protocol):
    """A projection that can begin from nothing."""

    async def reset(self, partition: int) -> None:
        """Forget everything; every job is advanced afterwards."""
        ...


@runtime_checkable
class Looping(Protocol):
    """A projection with a loop of its own, beside its notes."""

    async def run(self) -> None:
        """Run until cancelled."""
        ...


class Runner:
    """One projector."""

    def __init__(self, store: Store, projections: Iterable[Projection], *, consumer: str = "") -> None:
        self.consumer = consumer or secrets.token_hex(6)
        self._store = store
        self._projections = {projection.name: projection for projection in projections}
        self._places = [(name, partition) for name in self._projections for partition in store.partitions]
        self._news = {place: asyncio.Event() for place in self._places}
        self._claims = dict.fromkeys(self._places, "0-0")
        self._slots = asyncio.Semaphore(store.settings.projector_concurrency)
        self._hold = _HOLD_LEASES * store.settings.lease
        self._draining = False

    @property
    def names(self) -> list[str]:
        """Of its projections."""
        return list(self._projections)

    def drain(self) -> None:
        """Read nothing more; `run` returns once what was read is done."""
        self._draining = True
        for news in self._news.values():
            news.set()

    async def run(self) -> None:
        """Run until drained. Cancelling drops everything at once, as kill -9 does."""
        loops = [asyncio.create_task(loop, name=name) for name, loop in (
            ("listen", self._listen()),
            ("keep", self._repeat(self.keep)),
            ("rebuild", self._repeat(self.rebuild)),
            *((one.name, one.run()) for one in self._projections.values() if isinstance(one, Looping)),
        )]  # fmt: skip
        following = [
            asyncio.create_task(self._follow(*place), name=f"follow {place}") for place in self._places
        ]
        try:
            await _all_or_first_error(following, loops)
        finally:
            for task in (*following, *loops):
                task.cancel()
            await asyncio.gather(*following, *loops, return_exceptions=True)
        with contextlib.suppress(StreamjobsError):
            for name, partition in self._places:
                await self._store.feed.leave(partition, name, self.consumer)

    # --- notes

    async def tick(self, name: str, partition: int) -> int:
        """Carry one batch of notes to a projection; returns how many jobs it named, 0 where nothing is left.

        Raises `StoreUnavailable` and `StoreFull`; the batch then comes again.
        """
        notes = await self._store.feed.read(partition, name, self.consumer, _BATCH)
        if not notes.entries:
            return 0
        fault("after_notes_read")
        done = await self._advance_all(name, partition, notes.jobs)
        fault("before_ack")
        await self._store.feed.ack(partition, name, notes.entries, done)
        return max(1, len(notes.jobs))

    async def _follow(self, name: str, partition: int) -> None:
        news, failures = self._news[name, partition], 0
        while not self._draining:
            news.clear()
            try:
                count = await self.tick(name, partition)
                failures = 0
            except StreamjobsError as error:
                failures += 1
                if failures == 1:
                    log.warning("projection.failed", projection=name, error=str(error))
                await asyncio.sleep(_PATIENCE.delay(failures))
                continue
            if not count and not self._draining:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_POLL):
                        await news.wait()

    async def _advance_all(self, name: str, partition: int, jobs: Mapping[str, int]) -> list[str]:
        """Advance jobs, a few at a time; returns those that were. The others are in quarantine."""
        troubles: list[StreamjobsError] = []
        calls = (self._advance(name, partition, job_id, seq, troubles) for job_id, seq in jobs.items())
        were_advanced = await asyncio.gather(*calls)
        if troubles:
            raise troubles[0]
        return [job_id for job_id, was in zip(jobs, were_advanced, strict=True) if was]

    async def _advance(
        self, name: str, partition: int, job_id: str, seq: int, troubles: list[StreamjobsError]
    ) -> bool:
        """After the first trouble with the store nothing more is tried: the whole batch comes again."""
        async with self._slots:
            if troubles:
                return False
            try:
                was_advanced = await self._advance_or_set_aside(name, partition, job_id, seq)
            except (StoreUnavailable, StoreFull) as error:
                troubles.append(error)
                return False
        metrics.PROJECTED.labels(name, "advanced" if was_advanced else "quarantined").inc()
        fault("after_advance")
        return was_advanced

    async def _advance_or_set_aside(self, name: str, partition: int, job_id: str, seq: int) -> bool:
        try:
            await self._projections[name].advance(job_id)
        except (StoreUnavailable, StoreFull):
            raise
        except JobNotFound:
            return True
        except Exception as error:  # noqa: BLE001 - rule 3: whatever it raises is the job's, not the runner's
            what = f"{type(error).__name__}: {error}"
            log.warning("projection.quarantined", projection=name, job_id=job_id, error=what)
            failed = Quarantined(job_id, what, seq, await self._store.now_ms())
            await self._store.feed.quarantine(partition, name, failed)
            return False
        return True

    async def _listen(self) -> None:
        """Wake the loops when there is something new; without this they look once a second."""
        client = self._store.blocking(_POLL)
        ends: dict[int, str] = {}
        failures = 0
        while True:
            try:
                if not ends:
                    ends = {p: await self._store.feed.end(p) for p in self._store.partitions}
                found = await self._store.feed.wait(client, ends, _POLL)
                failures = 0
            except StreamjobsError:
                failures, ends = failures + 1, {}
                await asyncio.sleep(_PATIENCE.delay(failures))
                continue
            ends |= found
            if found:
                await asyncio.sleep(_GATHER)
            for (_, partition), news in self._news.items():
                if partition in found:
                    news.set()

    # --- keeping

    async def keep(self) -> None:
        """Claim what dead projectors left and remove them, sweep, trim the feeds, and say how far we are."""
        for partition in self._store.partitions:
            await self._store.feed.trim(partition)
            for lag in await self._store.feed.lag(partition):
                if lag.name in self._projections and lag.pending:
                    await self._claim(lag.name, partition)
                if lag.name in self._projections and lag.consumers > 1:
                    await self._store.feed.reap(partition, lag.name, self.consumer, _REAP_AFTER)
        for name, partition in self._places:
            projection = self._projections[name]
            if isinstance(projection, Sweeping):
                await projection.sweep(partition)
        await self._store.feed.report()

    async def _claim(self, name: str, partition: int) -> None:
        """The position is kept: from the start each time, a busy front would hide what is behind it."""
        idle = self._store.settings.lease
        cursor, count = await self._store.feed.claim(
            partition, name, self.consumer, idle, self._claims[name, partition]
        )
        self._claims[name, partition] = cursor
        if count:
            self._news[name, partition].set()

    async def rebuild(self) -> None:
        """Do the rebuilds that are asked for and that nobody else does."""
        for name, partition in self._places:
            request = await self._store.feed.begin_rebuild(partition, name, self.consumer, self._hold)
            if request:
                await self._rebuild(name, partition, request)

    async def _rebuild(self, name: str, partition: int, request: str) -> None:
        why, projection = request.partition(" ")[0], self._projections[name]
        log.info("projection.rebuilding", projection=name, partition=partition, why=why)
        if why == "asked" and isinstance(projection, Resettable):
            await projection.reset(partition)
        async for jobs in self._store.feed.jobs(partition):
            for start in range(0, len(jobs), _CHUNK):
                await self._advance_all(name, partition, dict.fromkeys(jobs[start : start + _CHUNK], 0))
                if not await self._store.feed.hold_rebuild(partition, name, self.consumer, self._hold):
                    return
        await self._store.feed.finish_rebuild(partition, name, self.consumer, request)
        log.info("projection.rebuilt", projection=name, partition=partition)

    async def _repeat(self, act: Callable[[], Awaitable[None]]) -> None:
        failures = 0
        while True:
            delay = jitter(self._store.settings.sweep_interval)
            try:
                await act()
                failures = 0
            except StreamjobsError as error:
                failures += 1
                log.warning("projector.failed", error=str(error), failures=failures)
                delay += _PATIENCE.delay(failures)
            await asyncio.sleep(delay)


async def _all_or_first_error(
    ending: Sequence[asyncio.Task[None]], endless: Sequence[asyncio.Task[None]]
) -> None:
    """Wait until all of `ending` have ended; raises what any task raised, as soon as it did."""
    left = set(ending)
    while left:
        done, _ = await asyncio.wait({*left, *endless}, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        left -= done
