"""What a person sees while a run lasts: one line a step, a line every two seconds within a step.

Everything goes to standard error, so that standard output is the report alone.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field

TICK_INTERVAL = 2.0


@dataclass
class Progress:
    """Prints steps, numbered over the whole run, with the time since its start."""

    total: int = 0
    quiet: bool = False
    _step: int = 0
    _started: float = field(default_factory=time.monotonic)
    _ticked: float = 0.0

    def step(self, text: str) -> None:
        """Begin the next numbered step."""
        self._step += 1
        self._ticked = time.monotonic()
        self.say(f"[{self._step}/{self.total}] {text}")

    def tick(self, text: str) -> None:
        """Say how far the step is; at most one line in two seconds is printed."""
        now = time.monotonic()
        if now - self._ticked >= TICK_INTERVAL:
            self._ticked = now
            self.say(f"    {text}")

    def say(self, text: str) -> None:
        if not self.quiet:
            print(f"{time.monotonic() - self._started:6.1f}s  {text}", file=sys.stderr, flush=True)
