"""Whether this gateway hears and reads Redis, and what time it is there.

Rule 1: degraded is what viewers would notice if they knew: the subscriptions' connection is down although
somebody watches, or the last comparison of positions failed. Streams stay open; their heartbeats say so.
Rule 2: a connection that comes back within `LOOK_INTERVAL` was never away.
"""

from __future__ import annotations

import math
import time

import structlog

from streamjobs import metrics
from streamjobs.store import Clock, Store

log = structlog.get_logger(__name__)

LOOK_INTERVAL = 0.5
_LATEST = 3_600_000
"""ms; an event that is older was not late, its clock was wrong."""


class Health:
    """`is_degraded` as of the last look; `is_unread`: positions could not be compared the last time."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._clock = Clock(lambda: time.monotonic_ns() // 1_000_000)
        self._down_since = math.inf
        self.is_unread = False
        self.is_degraded = False
        metrics.DEGRADED.set_function(lambda: self.is_degraded)

    async def read_clock(self) -> None:
        """Ask Redis for the time. Raises `StoreUnavailable`."""
        asked = time.monotonic()
        now_ms = await self._store.now_ms()
        self._clock.set(now_ms + round(500 * (time.monotonic() - asked)))

    def look(self, now: float) -> bool:
        """Look again, at an instant in seconds; True where it has just become degraded."""
        was_degraded = self.is_degraded
        self._down_since = min(self._down_since, now) if self._store.live.is_down else math.inf
        self.is_degraded = self.is_unread or now - self._down_since >= LOOK_INTERVAL
        if self.is_degraded:
            metrics.DEGRADED_SECONDS.inc(LOOK_INTERVAL)
        if self.is_degraded != was_degraded:
            log.warning("gateway.degraded" if self.is_degraded else "gateway.recovered")
        return self.is_degraded and not was_degraded

    def observe(self, event: bytes) -> None:
        """Note how old a live event is, now that those who could take it have it."""
        if self._clock.is_known and (written := written_ms(event)) is not None:
            late = self._clock.now_ms() - written
            if late < _LATEST:
                metrics.DELIVERY_SECONDS.observe(max(0, late) / 1000)


def written_ms(event: bytes) -> int | None:
    """The instant in an event's JSON; None where it does not begin with one, as all of ours do."""
    start = event.partition(b",")[0]
    name, _, number = start.rstrip(b"}").partition(b":")
    return int(number) if name == b'{"ts"' and number.isdigit() else None
