"""Group commit: jobs hand in events, one append call at a time carries what all of them gathered.

Rule 1: one append call is in flight for each partition; what gathers meanwhile goes into the next one.
Rule 2: a batch once sent is frozen: the same bytes under the same number until it has an answer.
Rule 3: deltas coalesce: the first after a pause goes at once, later ones every 20 ms or 1 KB;
anything that is not a delta goes at once, with what is before it.
Rule 4: it is bounded: a job whose events wait for Redis is told to stop reading (`is_full`, `room`), a
batch and a call have a most, and what one job cannot get rid of never passes its own budget.
Rule 5: once a job's outcome is handed in its journal takes nothing more; an `inbox` answer opens it again.
Rule 6: one job's fault never stops the others: what Redis refuses for no passing reason is sent row by row.

A journal is one job under one lease; all of it is keyed by (job, epoch), so a job that comes back to
the same worker shares nothing with its former life.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec
import structlog

from streamjobs import metrics
from streamjobs.config import Settings
from streamjobs.errors import Fenced, LimitExceeded, StoreFull, StoreUnavailable, StreamjobsError
from streamjobs.events import DELTAS, Event, ReasoningDelta, TextDelta, encode_event, encode_json
from streamjobs.faults import fault
from streamjobs.store import Answer, Batch, Lease, Outcome, Work
from streamjobs.store.keys import partition_of_job

log = structlog.get_logger(__name__)

Delta = TextDelta | ReasoningDelta

_MAX_BATCH_EVENTS = 500
_MAX_BATCH_BYTES = 1024 * 1024
_MAX_CALL_BYTES = 4 * 1024 * 1024
"""The most of one call, but for its last batch: Redis serves nobody else while it runs."""

_ALWAYS = frozenset({"tool.completed", "tool.failed", "tool.unknown", "turn.completed"})
"""What is written even when Redis is full: outcomes that are in hand, without which a job cannot end."""

_BACKOFF_CAP = 1.0
_TRIES_TOGETHER = 6
"""How often a call that Redis refuses for no passing reason is tried before its batches go one by one."""


class _Ending(NamedTuple):
    """What becomes of a job with a batch; `has_event`: the batch's last event belongs to it."""

    outcome: Outcome
    delay_ms: int = 0
    timers: Mapping[str, int] = MappingProxyType({})
    has_event: bool = False
    seen: int = -1


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
        "_finished",
        "_flushed_at",
        "_is_beginning",
        "_pending",
        "_pieces",
        "_room",
        "_timers",
        "_tracked",
        "_waiters",
        "asked",
        "closed",
        "committed",
        "inbox",
        "is_delayed",
        "is_queued",
        "is_resting",
        "lease",
        "number",
        "on_change",
        "partition",
        "read",
        "read_seq",
        "refused",
        "seq",
        "touched",
        "unwritten",
    )

    def __init__(self, lease: Lease, committer: Committer, on_change: Callable[[Journal], None]) -> None:
        self.lease = lease
        self.partition = partition_of_job(lease.job_id)
        self.on_change = on_change
        self.seq = lease.seq
        self.inbox = lease.inbox
        self.read = lease.inbox
        self.read_seq = 0
        self.touched = time.monotonic()
        self.asked = ""
        self.number = 0
        self.committed = 0
        self.unwritten = 0
        self.closed: Exception | None = None
        self.refused: LimitExceeded | None = None
        self.is_queued = False
        self.is_delayed = False
        self.is_resting = False
        self._committer = committer
        self._emitted = 0
        self._pending: list[tuple[str, bytes]] = []
        self._delta: Delta | None = None
        self._pieces: list[str] = []
        self._delta_bytes = 0
        self._flushed_at = -math.inf
        self._is_beginning = False
        self._batch: Batch | None = None
        self._ending: _Ending | None = None
        self._finished: asyncio.Future[Answer] | None = None
        self._timers: dict[str, int] = {}
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

        Raises `Fenced` (or what else closed the journal), `LimitExceeded` for an event that is too large or a
        job that is over its budget.
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

    def emit_soon(self, event: Event) -> None:
        """As `emit`, but it may wait for what follows, as long as deltas may."""
        self._require_open()
        self._end_delta()
        self._add(event)
        self._committer.soon(self)

    def set_timer(self, key: str, delay_ms: int) -> None:
        """Let the store wake the job after `delay_ms`, unless it has a timer of that key.

        Below 0 the timer is taken back. It goes with what is emitted next.
        """
        self._timers[key] = delay_ms

    def emit_delta(self, delta: Delta) -> None:
        """Hand in a delta; it joins the one before where it can. Raises as `emit`."""
        self._require_open()
        before = self._delta
        if before is not None and not _continues(delta, before):
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
            future: asyncio.Future[Answer] = self._committer.loop.create_future()
            self._waiters.append((self._emitted, future))
            await future
        return self.seq

    async def begin(self) -> None:
        """Commit a batch, empty if need be: from then on losing the lease counts as a crash."""
        self._require_open()
        self._is_beginning = True
        self._committer.ready(self)
        future: asyncio.Future[Answer] = self._committer.loop.create_future()
        self._waiters.append((self._emitted, future))
        await future

    async def room(self) -> None:
        """Wait until less waits for Redis. Raises what closed the journal meanwhile."""
        while self.is_full and self.closed is None:
            if self._room is None:
                self._room = asyncio.Event()
            await self._room.wait()
        self._require_open()

    async def finish(
        self,
        outcome: Outcome,
        event: Event | None = None,
        *,
        delay_ms: int = 0,
        timers: Mapping[str, int] = MappingProxyType({}),
        seen: int = -1,
    ) -> Answer:
        """Hand in what becomes of the job, with what is still pending, and wait for the answer.

        `seen` is the inbox count that the decision is based on, by default what is known of it now.
        An `inbox` answer leaves the lease as it was; everything else ends the journal. Raises `Fenced`, and
        `LimitExceeded` where the pending events are over the job's budget: they are dropped, finish again.
        """
        if self.closed is not None:
            raise self.closed
        self._settle(Fenced("the job is ending"))
        self._end_delta()
        if event is not None:
            self._add(event, checked=False)
        self._ending = _Ending(outcome, delay_ms, timers, event is not None, seen)
        self._finished = self._committer.loop.create_future()
        self._committer.ready(self)
        return await self._finished

    def drop_deltas(self) -> None:
        """Forget text that was not sent yet, before `finish`: whoever still waits gets `Fenced`."""
        self._settle(Fenced("the job is ending"))
        self._keep([event for event in self._pending if event[0] not in DELTAS])

    def _require_open(self) -> None:
        if self.closed is not None:
            raise self.closed
        if self.refused is not None:
            raise self.refused
        if self._finished is not None:
            raise Fenced("the job is ending")

    def _add(self, event: Event, *, checked: bool = True) -> None:
        data = encode_event(event)
        if checked:
            self._require_within_budget(event, len(data))
        self._pending.append((event.type, data))
        self.touched = time.monotonic()
        self._emitted += 1
        self.unwritten += len(data)

    def _require_within_budget(self, event: Event, size: int) -> None:
        settings = self._committer.settings
        if size > settings.max_event_bytes:
            raise LimitExceeded(f"{event.type} of {size} bytes is over max_event_bytes")
        if self.unwritten + size > settings.max_bytes:
            raise LimitExceeded(f"with {event.type} more waits to be written than max_bytes allows")

    def _end_delta(self) -> None:
        """Make the gathered pieces an event."""
        delta = self._delta
        if delta is None:
            return
        text = self._pieces[0] if len(self._pieces) == 1 else "".join(self._pieces)
        self.unwritten -= self._delta_bytes
        self._delta, self._pieces, self._delta_bytes = None, [], 0
        event = type(delta)(ts=delta.ts, turn=delta.turn, text=text, attempt=delta.attempt)
        self._add(event, checked=False)

    def _keep(self, events: list[tuple[str, bytes]]) -> None:
        """Make these all that is pending. Positions start anew, so nobody may be waiting for one."""
        self._delta, self._pieces, self._delta_bytes = None, [], 0
        self._pending = events
        sent = self._batch.events if self._batch is not None else ()
        self._emitted = self.committed + len(sent) + len(events)
        self.unwritten = sum(len(data) for _, data in (*sent, *events))

    # --- going out

    @property
    def must_be_written(self) -> bool:
        """Whether it is to be written even when Redis is full: it has what lets the job end."""
        if self._finished is not None:
            return True
        sent = self._batch.events if self._batch is not None else ()
        return any(kind in _ALWAYS for kind, _ in (*sent, *self._pending))

    def next_batch(self, now: float) -> Batch | None:
        """The frozen batch that has no answer yet, else a new one of what is pending."""
        if self._batch is not None:
            return self._batch
        self._end_delta()
        self._flushed_at = now
        events = self._next_events()
        ending = _KEEP
        if self._ending is not None and not self._pending:
            ending = self._ending
        elif not events and not self._is_beginning:
            return None
        self._is_beginning = False
        self._batch = Batch(
            self.lease.job_id,
            self.lease.epoch,
            self.number + 1,
            events,
            ending.outcome,
            self.inbox if ending.seen < 0 else ending.seen,
            ending.delay_ms,
            self._next_timers(ending),
        )
        return self._batch

    def _next_timers(self, ending: _Ending) -> bytes:
        timers = {**self._timers, **ending.timers}
        return encode_json(timers) if timers else b""

    def _next_events(self) -> list[tuple[str, bytes]]:
        """The first of what is pending, as much as one batch may hold; that is taken out."""
        count = len(self._pending)
        if count > _MAX_BATCH_EVENTS or self.unwritten > _MAX_BATCH_BYTES:
            count = _fitting(self._pending)
        events, self._pending = self._pending[:count], self._pending[count:]
        return events

    def on_answer(self, answer: Answer) -> bool:
        """Take in what became of the batch; returns whether more waits to be sent."""
        batch, self._batch = self._batch, None
        assert batch is not None
        if answer.is_written:
            self._on_written(batch, answer)
        elif answer.verdict == "inbox":
            self._on_unread(batch, answer)
        elif answer.verdict == "limit":
            self._on_limit(answer)
        else:
            self.close(_closing(answer))
        return bool(self._pending or self._ending)

    def note(self, inbox: int, asked: str) -> None:
        """What a renewal, or an answer, said of the outside."""
        if (inbox, asked) != (self.inbox, self.asked):
            self.inbox, self.asked = inbox, asked
            self.on_change(self)

    def close(self, error: Exception) -> None:
        """End it: whoever waits, and whoever hands in more, gets `error`."""
        if self.closed is not None:
            return
        self.closed = error
        self._settle(error)
        self._settle_finished(error)
        self._batch = None
        self._keep([])
        self._free_room()
        self.on_change(self)

    def _on_written(self, batch: Batch, answer: Answer) -> None:
        self.number = batch.number
        if answer.inbox == self.read:
            self.read_seq = answer.seq  # nothing from outside came before it that was not read
        if self._timers:
            self._forget_timers(batch.timers)
        first = self.committed + 1
        self.committed += len(batch.events)
        self.seq = answer.seq
        self.unwritten -= sum(len(data) for _, data in batch.events)
        for position in [p for p in self._tracked if p <= self.committed]:
            tracked = self._tracked.pop(position)
            if not tracked.done():
                tracked.set_result(answer.seq - len(batch.events) + 1 + position - first)
        while self._waiters and self._waiters[0][0] <= self.committed:
            _, waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(answer)
        if batch.outcome != "keep":
            self.closed = Fenced("the lease was given back")
            self._settle_finished(answer)
        self._free_room()
        self.note(answer.inbox, answer.asked)

    def _forget_timers(self, written: bytes) -> None:
        """What the batch carried is set; what changed meanwhile goes with the next one."""
        sent: dict[str, int] = msgspec.json.decode(written) if written else {}
        self._timers = {key: delay for key, delay in self._timers.items() if sent.get(key) != delay}

    def _on_unread(self, batch: Batch, answer: Answer) -> None:
        """Something came in: who gave the outcome decides again; what else was to be written waits."""
        kept = [*batch.events, *self._pending]
        if batch.outcome != "keep" and self._ending is not None and self._ending.has_event:
            kept.pop()
        if answer.asked == "cancel":
            self._settle(Fenced("no tool starts in a job that is to be cancelled"))
            kept = [event for event in kept if event[0] != "tool.started"]
        self._keep(kept)
        if batch.outcome != "keep":
            self._settle_finished(answer)
        self.note(answer.inbox, answer.asked)

    def _on_limit(self, answer: Answer) -> None:
        """The job is over its budget for good: only its end is still taken."""
        self.refused = LimitExceeded(f"the job's log is over its budget of {answer.detail}")
        self._settle(self.refused)
        self._settle_finished(self.refused)
        self._keep([])
        self._free_room()

    def _settle(self, error: Exception) -> None:
        """Tell whoever waits for a commit."""
        waiters, self._waiters = self._waiters, deque()
        tracked, self._tracked = self._tracked, {}
        for waiter in (*(w for _, w in waiters), *tracked.values()):
            _fail(waiter, error)

    def _settle_finished(self, outcome: Answer | Exception) -> None:
        """Tell who gave the job's outcome what came of it; the journal is open again, unless it is closed."""
        finished, self._finished, self._ending = self._finished, None, None
        if finished is None or finished.done():
            return
        if isinstance(outcome, Exception):
            _fail(finished, outcome)
        else:
            finished.set_result(outcome)

    def _free_room(self) -> None:
        if self._room is not None and (self.closed is not None or not self.is_full):
            self._room.set()
            self._room = None


def _continues(delta: Delta, before: Delta) -> bool:
    return (type(before), before.turn, before.attempt) == (type(delta), delta.turn, delta.attempt)


def _fitting(events: list[tuple[str, bytes]]) -> int:
    """How many of the first events fit one batch; one at least."""
    size = 0
    for count, (_, data) in enumerate(events[:_MAX_BATCH_EVENTS]):
        size += len(data)
        if size > _MAX_BATCH_BYTES and count > 0:
            return count
    return min(len(events), _MAX_BATCH_EVENTS)


def _fail(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # a job that is being stopped may never look at it


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
        """This journal has a delta: at once after a pause or when it is enough, else within the interval."""
        if journal.is_queued:
            return
        if size >= self._coalesce_bytes or time.monotonic() - flushed_at >= self._interval:
            self.ready(journal)
        else:
            self.soon(journal)

    def soon(self, journal: Journal) -> None:
        """This journal has something that may wait for the interval."""
        if journal.is_queued or journal.is_delayed:
            return
        journal.is_delayed = True
        self._delayed.append((time.monotonic() + self._interval, journal))
        if self._timer is None:
            self._timer = self.loop.call_later(self._interval, self._release_delayed)

    async def run(self) -> None:
        """Commit until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            # whoever else becomes ready in this turn of the loop goes along
            await asyncio.sleep(0)
            sent = self._batches()
            if sent:
                fault("before_append")
                await self._commit(sent)
                fault("after_append")

    def _batches(self) -> _Sent:
        """What the next call carries. Journals that it has no room for stay ready."""
        journals, self._ready = self._ready, []
        sent: _Sent = []
        size, now = 0, time.monotonic()
        for index, journal in enumerate(journals):
            if size > _MAX_CALL_BYTES:
                self._ready = journals[index:]
                self._wake.set()
                break
            journal.is_queued = False
            batch = None if journal.closed or journal.is_resting else journal.next_batch(now)
            if batch is not None:
                sent.append((journal, batch))
                size += min(journal.unwritten, _MAX_BATCH_BYTES)
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
            except StreamjobsError as error:
                failures += 1
                if failures >= _TRIES_TOGETHER and not isinstance(error, StoreUnavailable):
                    await self._isolate(sent, error)
                    break
                await self._back_off(error, failures)
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
        written = {journal for journal, _ in must}
        self._rest([journal for journal, _ in sent if journal not in written])

    def _rest(self, journals: list[Journal]) -> None:
        """Redis is full: these wait, their batches frozen, so that others can end and free memory."""
        if journals:
            log.warning("commit.store_full", jobs=len(journals))
        for journal in journals:
            if not journal.is_resting:
                journal.is_resting = True
                self.loop.call_later(random.uniform(0.5, 1.0), self._wake_up, journal)

    def _wake_up(self, journal: Journal) -> None:
        journal.is_resting = False
        self.ready(journal)

    async def _isolate(self, sent: _Sent, error: StreamjobsError) -> None:
        """One of these makes Redis refuse all: whoever is refused alone too loses its lease, not the rest."""
        log.error("commit.refused_whole", jobs=len(sent), error=str(error))
        for journal, batch in sent:
            try:
                if journal.closed is None:
                    await self._send([(journal, batch)])
            except StreamjobsError as alone:
                log.error("commit.refused_alone", job_id=journal.lease.job_id, error=str(alone))
                journal.close(Fenced("Redis refuses what this job writes"))

    def _take_in(self, sent: _Sent, answers: list[Answer]) -> None:
        metrics.COMMIT_BATCHES.observe(len(sent))
        for (journal, _), answer in zip(sent, answers, strict=True):
            if journal.closed is None and journal.on_answer(answer):
                self.ready(journal)

    async def _back_off(self, error: StreamjobsError, failures: int) -> None:
        if failures == 1:
            log.warning("commit.failed", partition=self._partition, error=str(error))
        await asyncio.sleep(min(_BACKOFF_CAP, 0.05 * 2 ** min(failures, 10)) * random.uniform(0.5, 1.0))


_Sent = list[tuple[Journal, Batch]]


def _closing(answer: Answer) -> Exception:
    if answer.verdict in {"error", "bad", "conflict"}:
        log.error("commit.refused", verdict=answer.verdict, detail=answer.detail)
    return Fenced(f"the lease is lost ({answer.verdict})")
