"""Redis's clock as a process knows it."""

from __future__ import annotations

from collections.abc import Callable


class Clock:
    """An offset to the local monotonic clock."""

    def __init__(self, monotonic_ms: Callable[[], int]) -> None:
        self._monotonic_ms = monotonic_ms
        self._offset = 0
        self.is_known = False

    def set(self, redis_ms: int) -> None:
        """Take over what a reply said."""
        self._offset = redis_ms - self._monotonic_ms()
        self.is_known = True

    def now_ms(self) -> int:
        """Milliseconds since the epoch, by Redis's clock."""
        return self._monotonic_ms() + self._offset
