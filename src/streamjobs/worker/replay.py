"""Tells a workflow what came of what it asked for: from its log while that lasts, then as it happens.

Rule 1: occurrences are told in the order of the log, the same in every run: an outcome waits until the
workflow has asked again for all that it had asked for before.
Rule 2: nothing new begins before everything recorded was asked for again. What is not, within
`replay_timeout`, means that the code was changed: `WorkflowChanged`, before anything else is done.
Rule 3: an outcome of the workflow's own is told once it is committed, and behind the news from outside that
came before it in the log. Two that were committed together are told one after the other, as in a replay.

A workflow's operations are asked for with `begin` and awaited as futures. While all it has are waits, its
job may be parked; while that is being decided, nothing new begins.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from streamjobs import events as ev
from streamjobs.approvals import Decision, decision_of
from streamjobs.errors import WorkflowChanged
from streamjobs.worker.history import History, Occurrence, OpKey

_HOPS = 3
"""Turns of the event loop between two occurrences: what wakes up may ask for more before the next one."""
_TURNS = 50
"""Turns that nothing may move in before code counts as changed: time alone proves nothing where the loop
stood still."""


class Wait(NamedTuple):
    """Something that a parked job may be woken by.

    `until` in ms, 0 for never; `delay_ms` where the store is to be given a timer for it when the job parks.
    """

    reason: str
    until: int = 0
    delay_ms: int = 0
    is_timer: bool = False


class Decided(NamedTuple):
    """An answer to a request for approval, and where the log has it."""

    seq: int
    op: OpKey
    decision: Decision


class Replay:
    """What one run of a workflow has been told, and what it still has to be told."""

    def __init__(self, history: History, *, timeout: float, on_idle: Callable[[], None]) -> None:
        self.activity = 0
        self.active = 0
        self.resting = 0
        self.waits: dict[int, Wait] = {}
        self.approvals: dict[str, asyncio.Future[Decided]] = {}
        self._on_idle = on_idle
        self._timeout = timeout
        self._loop = asyncio.get_running_loop()
        self._ahead: list[Occurrence] = list(history.occurrences)
        heapq.heapify(self._ahead)
        self._begun = history.begun
        self._outcomes = history.outcomes
        self._expected = deque(sorted((seq, op) for op, seq in history.begun.items()))
        self._asked: set[OpKey] = set()
        self._told: dict[OpKey, Occurrence] = {}
        self._futures: dict[OpKey, asyncio.Future[Occurrence]] = {}
        self._mail: dict[str, deque[Occurrence]] = {}
        self._readers: dict[str, deque[asyncio.Future[Occurrence]]] = {}
        self._queued: set[int] = set()
        self._is_telling = False
        self._held = 0
        self._moved = asyncio.Event()
        self._watch: asyncio.TimerHandle | None = None
        self._changed: WorkflowChanged | None = None
        self._next_wait = 0
        self._closed: BaseException | None = None
        if self._ahead:
            self._loop.call_soon(self._touch)

    # --- asking

    @property
    def is_replaying(self) -> bool:
        """Whether the log still holds what this run has not been told, or has not asked for again."""
        return bool(self._ahead) or self._missing() is not None

    def is_known(self, op: OpKey) -> bool:
        """Whether the log has the beginning, or the outcome, of this operation."""
        return op in self._begun or op in self._outcomes

    def has_outcome(self, op: OpKey) -> bool:
        """Whether the log has what came of this operation."""
        return op in self._outcomes

    def begin(self, op: OpKey) -> asyncio.Future[Occurrence]:
        """Ask for an operation; the future becomes its outcome. The same one may be asked for again."""
        self.activity += 1
        future = self._futures.get(op)
        if future is None:
            future = self._futures[op] = self._loop.create_future()
            if self._closed is not None:
                _fail(future, self._closed)
            elif op in self._told:
                self._settle_later(future, self._told[op])
            elif self._changed is not None and op in self._outcomes:
                _fail(future, self._changed)
        if op not in self._asked:
            self._asked.add(op)
            self._touch()
        return future

    async def ready(self) -> None:
        """Wait until something new may begin.

        Raises `WorkflowChanged` where the log holds what this run does not ask for.
        """
        while self._held or self.is_replaying:
            if self._changed is not None:
                raise self._changed
            self._watch_for_standstill()
            self._moved.clear()
            await self._moved.wait()

    def require_complete(self) -> None:
        """Raise `WorkflowChanged` unless everything recorded was asked for again."""
        missing = self._missing()
        if missing is not None:
            raise _change(missing)

    def _missing(self) -> OpKey | None:
        """The first operation with an outcome that was not asked for again, if any."""
        while self._expected and self._expected[0][1] in self._asked:
            self._expected.popleft()
        return next((op for _, op in self._expected if op in self._outcomes and op not in self._asked), None)

    # --- telling

    def tell(self, occurrence: Occurrence) -> None:
        """Take in what happened now; it is told in its place. What is read again in the log is not."""
        if occurrence.seq not in self._queued:
            self._queued.add(occurrence.seq)
            heapq.heappush(self._ahead, occurrence)
            self._touch()

    def hold(self) -> None:
        """Tell nothing, and begin nothing new, until `release`."""
        self._held += 1

    def release(self) -> None:
        """Go on after `hold`, once whoever held has gone on."""
        self._held -= 1
        self._moved.set()
        self._tell_later()

    def passes(self) -> bool:
        """Whether an outcome that was just committed is next, and so is told by returning; see rule 1."""
        if self._held or self._is_telling or self.is_replaying:
            return False
        self._tell_later()
        return True

    def _tell_later(self) -> None:
        """Tell the next occurrence, if any, when who was told something last has gone on."""
        if not self._is_telling:
            self._is_telling = True
            self._loop.call_soon(self._tell_next, _HOPS - 1)

    def _touch(self) -> None:
        """Something moved: see whether the next occurrence may be told.

        Never at once: whoever asked would go on before those that were to begin beside it.
        """
        self._moved.set()
        if self._ahead:
            self._tell_later()

    def _settle_later(self, future: asyncio.Future[Occurrence], told: Occurrence, hops: int = _HOPS) -> None:
        if hops:
            self._loop.call_soon(self._settle_later, future, told, hops - 1)
        elif not future.done():
            future.set_result(told)

    def _tell_next(self, hops: int = 0) -> None:
        if hops:
            self._loop.call_soon(self._tell_next, hops - 1)
            return
        if self._held or not self._ahead or not self._may_tell(self._ahead[0]):
            self._is_telling = False
            if self._ahead:
                self._watch_for_standstill()
            return
        occurrence = heapq.heappop(self._ahead)
        self._queued.discard(occurrence.seq)
        self._tell(occurrence)
        self._moved.set()
        self._loop.call_soon(self._tell_next, _HOPS - 1)

    def _may_tell(self, occurrence: Occurrence) -> bool:
        while self._expected and self._expected[0][1] in self._asked:
            self._expected.popleft()
        return not self._expected or self._expected[0][0] > occurrence.seq

    # --- standing still

    def _watch_for_standstill(self) -> None:
        if self._watch is None:
            self._watch = self._loop.call_later(self._timeout, self._look, self.activity)

    def _look(self, activity: int, turns: int = _TURNS) -> None:
        """Nothing was asked for, or told, for a while: what the log holds is not what the code does."""
        self._watch = None
        if self._closed is not None or not (self._held or self.is_replaying):
            return
        if self._held or activity != self.activity:
            self._watch_for_standstill()
        elif turns:
            self._loop.call_soon(self._look, activity, turns - 1)
        else:
            self._stand_still()

    def _stand_still(self) -> None:
        missing = self._missing()
        if missing is not None:
            self._changed = _change(missing)
            known = [future for op, future in self._futures.items() if op in self._outcomes]
            self._fail_all(known, self._changed)
            self._moved.set()
        else:  # something that began and has no outcome is not asked for again: it held up what came after
            self._expected.clear()
            self._touch()

    def _tell(self, occurrence: Occurrence) -> None:
        self.activity += 1
        kind, key = occurrence.op
        if kind == "signal":
            self._deliver(key, occurrence)
            return
        self._told.setdefault(occurrence.op, occurrence)
        future = self._futures.get(occurrence.op)
        if future is not None and not future.done():
            future.set_result(occurrence)

    # --- signals

    def read(self, name: str) -> asyncio.Future[Occurrence]:
        """The next signal of that name that nobody read; cancelled, it reads none."""
        self.activity += 1
        future: asyncio.Future[Occurrence] = self._loop.create_future()
        mail = self._mail.get(name)
        if self._closed is not None:
            _fail(future, self._closed)
        elif mail:
            future.set_result(mail.popleft())
        else:
            self._readers.setdefault(name, deque()).append(future)
        return future

    def put_back(self, occurrence: Occurrence) -> None:
        """A signal that was read too late by who read it."""
        self._mail.setdefault(occurrence.op[1], deque()).appendleft(occurrence)

    def ask_for_decision(self, key: str) -> asyncio.Future[Decided]:
        """The answer to an approval that was requested under `key`."""
        self.activity += 1
        future: asyncio.Future[Decided] = self._loop.create_future()
        self.approvals[key] = future
        for name in ("approval", "approve", "deny"):
            mail = self._mail.get(name, deque())
            for occurrence in tuple(mail):
                if not future.done() and self._decide(occurrence):
                    mail.remove(occurrence)
        return future

    def _deliver(self, name: str, occurrence: Occurrence) -> None:
        if self._decide(occurrence):
            return
        readers = self._readers.get(name)
        while readers:
            reader = readers.popleft()
            if not reader.done():
                reader.set_result(occurrence)
                return
        self._mail.setdefault(name, deque()).append(occurrence)

    def _decide(self, occurrence: Occurrence) -> bool:
        """Whether a signal answers an approval that waits: the one it names, or the oldest."""
        event = occurrence.event
        decision = decision_of(event) if isinstance(event, ev.SignalReceived) else None
        if decision is None:
            return False
        open_keys = [key for key, future in self.approvals.items() if not future.done()]
        key = decision.key or next(iter(open_keys), "")
        if key not in open_keys:
            return False
        self.approvals[key].set_result(Decided(occurrence.seq, ("approval", key), decision))
        return True

    # --- waiting and parking

    async def wait(self, wait: Wait, *futures: asyncio.Future[Any]) -> Any:
        """Await the first of what only the outside, or time, can bring: meanwhile the job may be parked."""
        # what is there is returned at once, in every run: turns of the loop would let others go first
        if not any(future.done() for future in futures):
            await self._wait(wait, futures)
        results = [future.result() for future in futures if future.done()]
        return results[0] if len(results) == 1 else min(results)

    async def _wait(self, wait: Wait, futures: Iterable[asyncio.Future[Any]]) -> None:
        number = self._next_wait = self._next_wait + 1
        self.waits[number] = wait
        self.nudge()
        try:
            await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.activity += 1
            del self.waits[number]

    async def rest(self) -> None:
        """Wait for good: the job is to be handed back once nothing else runs."""
        self.resting += 1
        self.nudge()
        await self._loop.create_future()

    def working(self) -> Working:
        """`with replay.working():` around what must not be parked."""
        return Working(self)

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs and something waits."""
        return not self.active and bool(self.waits or self.resting)

    def nudge(self) -> None:
        """Let the job be parked if it may be."""
        if self.is_idle:
            self._on_idle()

    def close(self, error: BaseException) -> None:
        """The run is over: whoever still asks, or waits, gets `error`."""
        self._closed = error
        if self._watch is not None:
            self._watch.cancel()
        self._fail_all(self._futures.values(), error)

    def _fail_all(self, futures: Iterable[asyncio.Future[Any]], error: BaseException) -> None:
        readers = [reader for queue in self._readers.values() for reader in queue]
        for future in (*futures, *readers, *self.approvals.values()):
            _fail(future, error)


class Working:
    """Counts what runs, for as long as the block lasts."""

    __slots__ = ("_replay",)

    def __init__(self, replay: Replay) -> None:
        self._replay = replay

    def __enter__(self) -> None:
        self._replay.active += 1
        self._replay.activity += 1

    def __exit__(self, *_: object) -> None:
        self._replay.active -= 1
        self._replay.activity += 1
        self._replay.nudge()


def _change(missing: OpKey) -> WorkflowChanged:
    kind, key = missing
    return WorkflowChanged(
        f"the log holds {kind} {key!r}, which the workflow's code does not ask for any more: "
        "it was changed while this job lived"
    )


def _fail(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # nobody may be looking any more
