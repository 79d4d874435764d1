"""The signals that end a role."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Generator


class Stop:
    """The first one asks for an orderly end, a second one for a quick one."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.hurried = asyncio.Event()
        self.is_interactive = False

    def __call__(self, number: int) -> None:
        """Take a signal."""
        self.is_interactive = self.is_interactive or number == signal.SIGINT
        if self.asked.is_set():
            self.hurried.set()
        self.asked.set()

    @contextlib.contextmanager
    def on_signals(self) -> Generator[None, None, None]:
        """Hear SIGTERM and SIGINT; only the main thread can."""
        loop = asyncio.get_running_loop()
        heard = (signal.SIGTERM, signal.SIGINT)
        for number in heard:
            loop.add_signal_handler(number, self, number)
        try:
            yield
        finally:
            for number in heard:
                loop.remove_signal_handler(number)
