"""One open connection that events are sent on: when to look, when to say that all is well, when to end.

Rule 1: a stream sleeps in `wait` until it is woken; what is sent then is up to its kind.
Rule 2: one timer a stream looks after heartbeats, slow sockets and age.
Rule 3: a stream that asked for fewer writes is woken at its pace only; see `pacing`.
"""

from __future__ import annotations

import asyncio
import random
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Protocol

from streamjobs import metrics
from streamjobs.config import Settings
from streamjobs.gateway import sse
from streamjobs.gateway.coding import PLAIN, Bytes, Coding, Piece
from streamjobs.gateway.pacing import Pacer


class Stream:
    """What all streams have.

    `abort` breaks the connection at once; `pace` is the time between writes that the client asked for, 0 for
    the job's own. `ended` says why it is over, and is empty until then: ended, error, slow, gone, or what
    `leave` was told. `events` counts those handed out.
    """

    __slots__ = (
        "_abort", "_born", "_leaving", "_max_age", "_pacer", "_period", "_sending_since", "_sent_at",
        "_settings", "_timer", "_waiter", "ended", "events",
    )  # fmt: skip

    def __init__(self, settings: Settings, abort: Callable[[], None], pace: float = 0.0) -> None:
        self.ended = ""
        self.events = 0
        self._settings = settings
        self._abort = abort
        self._leaving = ""
        self._waiter: asyncio.Future[None] | None = None
        self._pacer = Pacer(pace, self.nudge) if pace else None
        self._born = time.monotonic()
        self._sent_at = 0.0
        self._sending_since = 0.0
        self._max_age = settings.max_connection_age * random.uniform(0.75, 1.25)
        self._period = min(settings.heartbeat_interval, settings.send_timeout, self._max_age)
        self._timer = asyncio.get_running_loop().call_later(self._period * random.uniform(0.5, 1), self._tick)

    def close(self) -> None:
        """Free everything about it."""
        self._stop_timers()
        metrics.STREAMS_CLOSED.labels(self.ended or "gone").inc()

    def _stop_timers(self) -> None:
        self._timer.cancel()
        if self._pacer is not None:
            self._pacer.cancel()

    def count(self) -> None:
        """What was handed out has been sent."""
        if self.events:
            metrics.FRAMES_SENT.inc(self.events)
            self.events = 0

    # --- waiting

    def wake(self) -> None:
        """Look again, as soon as the pace allows it."""
        if self._pacer is None:
            self.nudge()
        else:
            self._pacer.ask()

    def nudge(self) -> None:
        """Look again at once."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self) -> None:
        """Sleep until something may be due."""
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def leave(self, why: str) -> None:
        """End with a handover when what is being sent is out."""
        self._leaving = self._leaving or why
        self.nudge()

    def remind(self) -> None:
        """Have a heartbeat sent now."""
        self._sent_at = 0.0
        self.nudge()

    def lose(self) -> None:
        """The client is gone."""
        self.ended = self.ended or "gone"
        self.nudge()

    # --- time

    def begin_send(self) -> None:
        """Bytes are being handed to the connection."""
        self._sending_since = time.monotonic()

    def end_send(self) -> None:
        """The connection took them."""
        self._sent_at, self._sending_since = time.monotonic(), 0.0

    @property
    def is_heartbeat_due(self) -> bool:
        """Whether nothing was sent for so long that something must be."""
        return time.monotonic() - self._sent_at >= self._settings.heartbeat_interval

    def _tick(self) -> None:
        now = time.monotonic()
        if self._sending_since and now - self._sending_since >= self._settings.send_timeout:
            self.ended = "slow"
            self._abort()
            self.nudge()
            return
        if now - self._born >= self._max_age:
            self.leave("age")
        elif self.is_heartbeat_due:
            self.nudge()
        self._timer = asyncio.get_running_loop().call_later(self._until_next(now), self._tick)

    def _until_next(self, now: float) -> float:
        """Seconds to the earliest thing that the timer is for, at most a period."""
        if self._sending_since:
            due = self._sending_since + self._settings.send_timeout
        else:
            due = min(self._sent_at + self._settings.heartbeat_interval, self._born + self._max_age)
        return min(due - now, self._period) if due > now else self._period


BROKEN = frozenset({"gone", "slow"})
"""How streams end to which nothing more can be sent."""


class Wire(Protocol):
    """Where a stream's bytes go."""

    def write(self, portion: Bytes) -> bool:
        """Hand bytes to the connection; False: it has not taken all of them yet. Must not block."""
        ...

    async def drain(self) -> None:
        """Wait until the connection has taken what it was handed."""


class EventStream(Stream):
    """A stream of server-sent events, which writes from where it is woken: no task runs for an event.

    The stream's task is needed only when the connection does not take what it is handed, and at the end.
    """

    __slots__ = ("_coding", "_inserted", "_is_blocked", "_portions", "_wire")

    def __init__(self, settings: Settings, abort: Callable[[], None], pace: float = 0.0) -> None:
        super().__init__(settings, abort, pace)
        self._coding: Coding = PLAIN
        self._wire: Wire | None = None
        self._portions: Iterator[Bytes] | None = None
        self._is_blocked = False
        self._inserted: tuple[Piece, ...] = ()

    def insert(self, frame: bytes) -> None:
        """Send a frame that is no event of a log, between two that are."""
        self._inserted = (*self._inserted, frame)
        self.nudge()

    @abstractmethod
    def take(self) -> tuple[Piece, ...]:
        """What is due now, in pieces; none where nothing is. `ended` is set once nothing comes after them."""

    def heartbeat(self, is_degraded: bool) -> tuple[Piece, ...]:
        """A comment, if one is due."""
        if self.ended or not self.is_heartbeat_due:
            return ()
        return (sse.DEGRADED if is_degraded else sse.HEARTBEAT,)

    async def run(self, wire: Wire, coding: Coding) -> None:
        """Write what is due until the stream is over; what ends the coding is left to the caller."""
        self._wire, self._coding = wire, coding
        while True:
            self._flow(wire)
            if self.ended in BROKEN:
                return
            if self._is_blocked:
                await wire.drain()
                self._is_blocked = False
                self.end_send()
            elif self.ended:
                return
            else:
                await self.wait()

    def nudge(self) -> None:
        """Write what is due at once."""
        if self._wire is None or self._waiter is None or self._waiter.done():
            return  # its task is not asleep, and will look by itself
        try:
            self._flow(self._wire)
        except Exception as error:  # noqa: BLE001 - whoever woke it is none of this stream's business
            self._waiter.set_exception(error)
        else:
            if self._is_blocked or self.ended:
                self._waiter.set_result(None)

    def _flow(self, wire: Wire) -> None:
        """Write until nothing is due, the stream is over or the connection is full."""
        while self.ended not in BROKEN and not self._is_blocked:
            if self._portions is None:
                due = () if self.ended else self._inserted or self.take()
                self._inserted = ()
                if not due:
                    return
                self._portions = self._coding.portions(due)
            for portion in self._portions:
                metrics.STREAM_BYTES.inc(len(portion))
                if not wire.write(portion):
                    self.begin_send()
                    self._is_blocked = True
                    return
            self._portions = None
            self.end_send()
            self.count()
