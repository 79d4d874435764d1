"""Group commit: jobs hand in events, one append call at a time carries what all of them gathered.

Rule 1: one append call is in flight for each partition; what gathers meanwhile goes into the next one.
Rule 2: a batch once sent is frozen: the same bytes under the same number until it has an answer.
Rule 3: deltas coalesce: the first after a pause goes at once, later ones every 20 ms or 1 KB;
anything that is not a delta goes at once, with what is before it.
Rule 4: it is bounded: a job whose events wait for Redis is told to stop reading (`is_full`, `room`).

A journal is one job under one lease; all of it is keyed by (job, epoch), so a job that comes back to
the same worker shares nothing with its former life.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import structlog

from streamjobs import metrics
from streamjobs.config import Settings
from streamjobs.errors import Fenced, LimitExceeded, StoreFull, StoreUnavailable
from streamjobs.events import DELTAS, Event, ReasoningDelta, TextDelta, encode_event
from streamjobs.faults import fault
from streamjobs.store import Answer, Batch, Lease, Outcome, Work
from streamjobs.store.keys import partition_of_job

log = structlog.get_logger(__name__)

Delta = TextDelta | ReasoningDelta

_MAX_BATCH_EVENTS = 500
_ALWAYS = frozenset({"tool.completed", "tool.failed", "tool.unknown"})
_BACKOFF_CAP = 1.0


class _Ending(NamedTuple):
    """What becomes of a job with a batch; `has_event`: the batch's last event belongs to it."""

    outcome: Outcome
    delay_ms: int = 0
    timers: bytes = b""
    has_event: bool = False


_KEEP = _Ending("keep")


class Journal:
    """The events of one job under one lease, on their way into its log."""

    __slots__ = (
        "_batch",
        "_committer",
        "_delta",
        "_delta_bytes",
        "_emitted",
        "_ending",
        "_flushed_at",
        "_outcome",
        "_pending",
        "_pieces",
        "_refused",
        "_room",
        "_tracked",
        "_waiters",
        "asked",
        "closed",
        "committed",
        "inbox",
        "is_delayed",
        "is_queued",
        "lease",
        "number",
        "on_change",
        "partition",
        "seq",
        "unwritten",
    )

    def __init__(self, lease: Lease, committer: Committer, on_change: Callable[[Journal], None]) -> None:
        self.lease = lease
        self.partition = partition_of_job(lease.job_id)
        self.on_change = on_change
        self.seq = lease.seq
        self.inbox = lease.inbox
        self.asked = ""
        self.number = 0
        self.committed = 0
        self.unwritten = 0
        self.closed: Exception | None = None
        self.is_queued = False
        self.is_delayed = False
        self._committer = committer
        self._emitted = 0
        self._pending: list[tuple[str, bytes]] = []
        self._delta: Delta | None = None
        self._pieces: list[str] = []
        self._delta_bytes = 0
        self._flushed_at = 0.0
        self._batch: Batch | None = None
        self._outcome: _Ending | None = None
        self._ending: _Ending | None = None
        self._refused: Exception | None = None
        self._tracked: dict[int, asyncio.Future[int]] = {}
        self._waiters: deque[tuple[int, asyncio.Future[Answer]]] = deque()
        self._room: asyncio.Event | None = None

    # --- handing in

    @property
    def is_full(self) -> bool:
        """Whether too much waits for Redis; then `room()` is to be awaited before more is read."""
        return self.unwritten > self._committer.settings.recorder_bytes

    def emit(self, event: Event) -> None:
        """Hand in an event that is not a delta; it goes out with the next call.

        Raises `Fenced` (or what else closed the journal), `LimitExceeded` for an event that is too large.
        """
        self._require_open()
        self._end_delta()
        self._add(event)
        self._committer.ready(self)

    def emit_tracked(self, event: Event) -> asyncio.Future[int]:
        """As `emit`; the future becomes the event's seq once it is committed."""
        self.emit(event)
        future: asyncio.Future[int] = self._committer.loop.create_future()
        self._tracked[self._emitted] = future
        return future

    def emit_delta(self, delta: Delta) -> None:
        """Hand in a delta; it joins the one before where it can."""
        self._require_open()
        before = self._delta
        if before is not None and (type(before), before.turn, before.attempt) != (
            type(delta),
            delta.turn,
            delta.attempt,
        ):
            self._end_delta()
        if self._delta is None:
            self._delta = delta
        self._pieces.append(delta.text)
        self._delta_bytes += len(delta.text)
        self.unwritten += len(delta.text)
        self._committer.delta_ready(self, self._delta_bytes, self._flushed_at)

    async def commit(self) -> int:
        """Wait until everything handed in is in the log; returns the seq of the last of it.

        Raises `Fenced`, `LimitExceeded`.
        """
        self._require_open()
        self._end_delta()
        if self.committed < self._emitted:
            self._committer.ready(self)
            await self._answered(self._emitted)
        return self.seq

    async def room(self) -> None:
        """Wait until less waits for Redis. Raises what closed the journal meanwhile."""
        while self.is_full and self.closed is None:
            self._room = asyncio.Event()
            await self._room.wait()
        self._require_open()

    async def finish(
        self, outcome: Outcome, event: Event | None = None, *, delay_ms: int = 0, timers: bytes = b""
    ) -> Answer:
        """Hand in what becomes of the job, with what is still pending, and wait for the answer.

        An `inbox` answer leaves the lease as it was; everything else ends the journal. Raises `Fenced`.
        """
        self._refused = None
        self._require_open()
        self._end_delta()
        if event is not None:
            self._add(event, checked=False)
        self._outcome = _Ending(outcome, delay_ms, timers, event is not None)
        self._committer.ready(self)
        return await self._answered(self._emitted + 1)

    def drop_deltas(self) -> None:
        """Forget text that was not sent yet. Only once nobody in the job's code waits any more."""
        self._delta, self._pieces, self._delta_bytes = None, [], 0
        self._drop([event for event in self._pending if event[0] not in DELTAS])

    def _drop(self, kept: list[tuple[str, bytes]]) -> None:
        self._pending = kept
        self._outcome = None
        sent = self._batch.events if self._batch is not None else ()
        self._emitted = self.committed + len(sent) + len(kept)
        self.unwritten = sum(len(data) for _, data in (*sent, *kept))
        tracked, self._tracked = self._tracked, {}
        for future in tracked.values():
            future.cancel()
        self._waiters = deque(waiter for waiter in self._waiters if not waiter[1].done())

    def _require_open(self) -> None:
        if self.closed is not None:
            raise self.closed
        if self._refused is not None:
            raise self._refused

    def _add(self, event: Event, *, checked: bool = True) -> None:
        data = encode_event(event)
        if checked and len(data) > self._committer.settings.max_event_bytes:
            raise LimitExceeded(f"{event.type} of {len(data)} bytes is over max_event_bytes")
        self._pending.append((event.type, data))
        self._emitted += 1
        self.unwritten += len(data)

    def _end_delta(self) -> None:
        """Make the gathered pieces an event."""
        delta = self._delta
        if delta is None:
            return
        text = self._pieces[0] if len(self._pieces) == 1 else "".join(self._pieces)
        self.unwritten -= self._delta_bytes
        self._delta, self._pieces, self._delta_bytes = None, [], 0
        self._add(type(delta)(ts=delta.ts, turn=delta.turn, text=text, attempt=delta.attempt))

    def _answered(self, position: int) -> asyncio.Future[Answer]:
        future: asyncio.Future[Answer] = self._committer.loop.create_future()
        self._waiters.append((position, future))
        return future

    # --- going out

    @property
    def must_be_written(self) -> bool:
        """Whether its batch is to be written even when Redis is full: it helps the job to end."""
        if self._outcome is not None or self._ending is not None:
            return True
        return self._batch is not None and any(kind in _ALWAYS for kind, _ in self._batch.events)

    def next_batch(self, now: float) -> Batch | None:
        """The frozen batch that has no answer yet, else a new one of what is pending."""
        if self._batch is not None:
            return self._batch
        self._end_delta()
        self._flushed_at = now
        events, self._pending = self._pending[:_MAX_BATCH_EVENTS], self._pending[_MAX_BATCH_EVENTS:]
        ending = _KEEP
        if self._outcome is not None and not self._pending:
            ending = self._ending = self._outcome
            self._outcome = None
        elif not events:
            return None
        self._batch = Batch(
            self.lease.job_id,
            self.lease.epoch,
            self.number + 1,
            events,
            ending.outcome,
            self.inbox,
            ending.delay_ms,
            ending.timers,
        )
        return self._batch

    def on_answer(self, answer: Answer) -> bool:
        """Take in what became of the batch; returns whether more waits to be sent."""
        batch, self._batch = self._batch, None
        ending, self._ending = self._ending, None
        assert batch is not None
        if answer.is_written:
            self._on_written(batch, answer)
        elif answer.verdict == "inbox":
            self._on_unread(batch, ending, answer)
        elif answer.verdict == "limit":
            self._refused = LimitExceeded(f"the job's log is over its budget of {answer.detail}")
            self._settle_waiters(self._refused)
            self._drop([])
            self._free_room()
        else:
            self.close(_closing(answer))
        return bool(self._pending or self._outcome)

    def take_back(self) -> None:
        """The call that carried the batch was refused whole: its events are pending again."""
        assert self._batch is not None
        self._pending[:0] = self._batch.events
        self._outcome = self._ending or self._outcome
        self._batch = self._ending = None

    def note(self, inbox: int, asked: str) -> None:
        """What a renewal said of the outside."""
        if (inbox, asked) != (self.inbox, self.asked):
            self.inbox, self.asked = inbox, asked
            self.on_change(self)

    def close(self, error: Exception) -> None:
        """End it: whoever waits, and whoever hands in more, gets `error`."""
        if self.closed is not None:
            return
        self.closed = error
        self._settle_waiters(error)
        self._batch = self._delta = None
        self._drop([])
        self._free_room()
        self.on_change(self)

    def _on_written(self, batch: Batch, answer: Answer) -> None:
        self.number = batch.number
        first = self.committed + 1
        self.committed += len(batch.events)
        self.seq = answer.seq
        self.unwritten -= sum(len(data) for _, data in batch.events)
        for position in [p for p in self._tracked if p <= self.committed]:
            tracked = self._tracked.pop(position)
            if not tracked.done():
                tracked.set_result(answer.seq - len(batch.events) + 1 + position - first)
        ends = batch.outcome != "keep"
        while self._waiters and (ends or self._waiters[0][0] <= self.committed):
            _, waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(answer)
        if ends:
            self.closed = Fenced("the lease was given back")
        self._free_room()
        self.note(answer.inbox, answer.asked)

    def _on_unread(self, batch: Batch, ending: _Ending | None, answer: Answer) -> None:
        """Something came in: who gave the outcome decides again; what else was to be written waits."""
        kept = list(batch.events)
        if ending is not None and ending.has_event:
            kept.pop()
        if answer.asked == "cancel":
            kept = [event for event in kept if event[0] != "tool.started"]
        self._pending[:0] = kept
        self._emitted -= len(batch.events) - len(kept)
        if ending is not None:
            _, waiter = self._waiters.pop()
            if not waiter.done():
                waiter.set_result(answer)
        self.note(answer.inbox, answer.asked)

    def _settle_waiters(self, error: Exception) -> None:
        waiters, self._waiters = self._waiters, deque()
        tracked, self._tracked = self._tracked, {}
        for waiter in (*(w for _, w in waiters), *tracked.values()):
            if not waiter.done():
                waiter.set_exception(error)
                waiter.exception()  # a job that is being stopped may never look at it

    def _free_room(self) -> None:
        if self._room is not None and (self.closed is not None or not self.is_full):
            self._room.set()
            self._room = None


class Committer:
    """Carries journals' batches of one partition into Redis, one call at a time."""

    def __init__(self, work: Work, partition: int, settings: Settings) -> None:
        self.settings = settings
        self.loop = asyncio.get_running_loop()
        self._work = work
        self._partition = partition
        self._ready: list[Journal] = []
        self._delayed: deque[tuple[float, Journal]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._wake = asyncio.Event()
        self._interval = settings.coalesce_interval
        self._coalesce_bytes = settings.coalesce_bytes

    def ready(self, journal: Journal) -> None:
        """This journal has something that must not wait."""
        if not journal.is_queued:
            journal.is_queued = True
            self._ready.append(journal)
            self._wake.set()

    def delta_ready(self, journal: Journal, size: int, flushed_at: float) -> None:
        """This journal has a delta: at once after a pause or when enough gathered, else within the interval."""
        if journal.is_queued:
            return
        now = time.monotonic()
        if size >= self._coalesce_bytes or now - flushed_at >= self._interval:
            self.ready(journal)
        elif not journal.is_delayed:
            journal.is_delayed = True
            self._delayed.append((now + self._interval, journal))
            if self._timer is None:
                self._timer = self.loop.call_later(self._interval, self._release_delayed)

    async def run(self) -> None:
        """Commit until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            # whoever else becomes ready in this turn of the loop goes along
            await asyncio.sleep(0)
            journals, self._ready = self._ready, []
            sent = self._batches(journals)
            if sent:
                fault("before_append")
                await self._commit(sent)
                fault("after_append")

    def _batches(self, journals: list[Journal]) -> _Sent:
        sent: _Sent = []
        now = time.monotonic()
        for journal in journals:
            journal.is_queued = False
            batch = None if journal.closed else journal.next_batch(now)
            if batch is not None:
                sent.append((journal, batch))
        return sent

    def _release_delayed(self) -> None:
        self._timer = None
        now = time.monotonic()
        while self._delayed and self._delayed[0][0] <= now + 0.001:
            _, journal = self._delayed.popleft()
            journal.is_delayed = False
            self.ready(journal)
        if self._delayed:
            self._timer = self.loop.call_later(self._delayed[0][0] - now, self._release_delayed)

    async def _commit(self, sent: _Sent) -> None:
        """Send until there is an answer: the same bytes, so that a lost reply costs nothing."""
        started, failures = time.monotonic(), 0
        while sent:
            try:
                await self._send(sent)
                break
            except StoreUnavailable:
                failures += 1
                await self._back_off("commit.store_unavailable", failures)
                sent = [(journal, batch) for journal, batch in sent if journal.closed is None]
        metrics.COMMIT_SECONDS.observe(time.monotonic() - started)

    async def _send(self, sent: _Sent) -> None:
        try:
            self._take_in(sent, await self._work.append(self._partition, [batch for _, batch in sent]))
            return
        except StoreFull:
            must = [pair for pair in sent if pair[0].must_be_written]
        if must:
            answers = await self._work.append(self._partition, [batch for _, batch in must], always=True)
            self._take_in(must, answers)
        self._try_later([journal for journal, _ in sent if journal not in {one for one, _ in must}])

    def _try_later(self, journals: list[Journal]) -> None:
        """Redis is full: these wait, so that others can end and free memory."""
        log.warning("commit.store_full", jobs=len(journals))
        for journal in journals:
            if journal.closed is None:
                journal.take_back()
                self.loop.call_later(random.uniform(0.5, 1.0), self.ready, journal)

    def _take_in(self, sent: _Sent, answers: list[Answer]) -> None:
        metrics.COMMIT_BATCHES.observe(len(sent))
        for (journal, _), answer in zip(sent, answers, strict=True):
            if journal.closed is None and journal.on_answer(answer):
                self.ready(journal)

    async def _back_off(self, event: str, failures: int) -> None:
        if failures == 1:
            log.warning(event, partition=self._partition)
        await asyncio.sleep(min(_BACKOFF_CAP, 0.05 * 2 ** min(failures, 10)) * random.uniform(0.5, 1.0))


_Sent = list[tuple[Journal, Batch]]


def _closing(answer: Answer) -> Exception:
    if answer.verdict in {"error", "bad", "conflict"}:
        log.error("commit.refused", verdict=answer.verdict, detail=answer.detail)
    return Fenced(f"the lease is lost ({answer.verdict})")
