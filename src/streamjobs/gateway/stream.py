"""One open connection that events are sent on: when to look, when to say that all is well, when to end.

Rule 1: a stream sleeps in `wait` until it is woken; what is sent then is up to its kind.
Rule 2: one timer a stream looks after heartbeats, slow sockets and age.
Rule 3: a stream that asked for fewer writes is woken at multiples of its pace only, so that all with the
same pace stand at the same place and share the same bytes; the first event after a pause comes at once.
"""

from __future__ import annotations

import asyncio
import random
import time
from abc import abstractmethod
from collections.abc import Callable

from streamjobs import metrics
from streamjobs.config import Settings
from streamjobs.gateway.coding import Piece


class Stream:
    """What all streams have.

    `abort` breaks the connection at once; `pace` is the time between writes that the client asked for, 0 for
    the job's own. `ended` says why it is over, and is empty until then: ended, error, slow, gone, or what
    `leave` was told. `events` counts those handed out.
    """

    __slots__ = (
        "_abort", "_born", "_leaving", "_max_age", "_pace", "_pacer", "_period", "_sending_since", "_sent_at",
        "_settings", "_timer", "_waiter", "ended", "events",
    )  # fmt: skip

    def __init__(self, settings: Settings, abort: Callable[[], None], pace: float = 0.0) -> None:
        self.ended = ""
        self.events = 0
        self._settings = settings
        self._abort = abort
        self._leaving = ""
        self._waiter: asyncio.Future[None] | None = None
        self._pace = pace
        self._pacer: asyncio.TimerHandle | None = None
        self._born = time.monotonic()
        self._sent_at = 0.0
        self._sending_since = 0.0
        self._max_age = settings.max_connection_age * random.uniform(0.75, 1.25)
        self._period = min(settings.heartbeat_interval, settings.send_timeout, self._max_age)
        self._timer = asyncio.get_running_loop().call_later(self._period * random.uniform(0.5, 1), self._tick)

    def close(self) -> None:
        """Free everything about it."""
        self._timer.cancel()
        if self._pacer is not None:
            self._pacer.cancel()
        metrics.STREAMS_CLOSED.labels(self.ended or "gone").inc()

    def count(self) -> None:
        """What was handed out has been sent."""
        if self.events:
            metrics.FRAMES_SENT.inc(self.events)
            self.events = 0

    # --- waiting

    def wake(self) -> None:
        """Look again, if the pace allows it now."""
        if not self._pace:
            self.nudge()
        elif self._pacer is None:
            now = asyncio.get_running_loop().time()
            if time.monotonic() - self._sent_at >= self._pace:
                self.nudge()
            else:
                at = (now // self._pace + 1) * self._pace
                self._pacer = asyncio.get_running_loop().call_at(at, self._paced)

    def _paced(self) -> None:
        self._pacer = None
        self.nudge()

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


class EventStream(Stream):
    """A stream of server-sent events."""

    __slots__ = ()

    @abstractmethod
    def take(self) -> tuple[Piece, ...]:
        """What is due now, in pieces; none where nothing is. `ended` is set once nothing comes after them."""
