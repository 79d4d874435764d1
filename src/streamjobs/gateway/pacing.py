"""Fewer writes for those who ask for fewer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Pacer:
    """Calls `go` when asked, but at most every `pace` seconds.

    The first time after a pause it goes at once, else at the next multiple of the pace: all with the same
    pace go together, stand at the same place, and share the same bytes.
    """

    __slots__ = ("_go", "_pace", "_rests_until", "_timer")

    def __init__(self, pace: float, go: Callable[[], None]) -> None:
        self._pace = pace
        self._go = go
        self._rests_until = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def ask(self) -> None:
        """Go as soon as the pace allows it."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        if self._timer is not None:
            return
        if now >= self._rests_until:
            self._rests_until = now + self._pace
            self._go()
        else:
            self._timer = loop.call_at((now // self._pace + 1) * self._pace, self._in_time)

    def cancel(self) -> None:
        """Go no more, unless asked again."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _in_time(self) -> None:
        self._timer = None
        self._rests_until = asyncio.get_running_loop().time() + self._pace
        self._go()
