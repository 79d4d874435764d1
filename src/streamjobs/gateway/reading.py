"""A read that several share, as one of them waits for it: begun once, looked at until it is there."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Callable
from typing import Any


class Reader:
    """Waits for one shared read at a time, without a task of its own."""

    __slots__ = ("_reading",)

    def __init__(self) -> None:
        self._reading: asyncio.Task[Any] | None = None

    @abstractmethod
    def on_read(self) -> None:
        """What was asked for is there. Must not block."""

    def _read(self, begin: Callable[..., asyncio.Task[Any]], *arguments: Any) -> Any:
        """The answer of the task that `begin` gives, None until it is there; then the next one may begin."""
        if self._reading is None:
            self._reading = begin(*arguments)
            if not self._reading.done():
                self._reading.add_done_callback(lambda _: self.on_read())
        if not self._reading.done() or self._reading.cancelled():
            return None
        task, self._reading = self._reading, None
        return task.result()
