"""Marks: begins and ends of numbered things, which a child notes in a file with the time; the same for all.

A line is `<s|e> <number> <seconds since the epoch>`: about a microsecond each to write, and reading them
disturbs nobody. Of a workflow they say when its code ran; what is recorded is asked of the system itself.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

VARIABLE = "LOADTEST_MARKS"


class Pen:
    """Writes marks into a file: the one that the environment names, unless said."""

    def __init__(self, file: str | None = None) -> None:
        self._file = os.open(file or os.environ[VARIABLE], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def begin(self, number: int) -> None:
        """Note that a thing begins."""
        os.write(self._file, b"s %d %.6f\n" % (number, time.time()))

    def end(self, number: int) -> None:
        """Note that it ends."""
        os.write(self._file, b"e %d %.6f\n" % (number, time.time()))


class Marks:
    """The first mark of each kind for each number, read as the file grows."""

    def __init__(self, file: Path) -> None:
        self.begun: dict[int, float] = {}
        self.ended: dict[int, float] = {}
        self._file = file
        self._offset = 0

    def read(self) -> Marks:
        """Take in what was written since; half a line is left for the next time."""
        if self._file.exists():
            with self._file.open("rb") as file:
                file.seek(self._offset)
                content = file.read()
            whole = content[: content.rfind(b"\n") + 1]
            self._offset += len(whole)
            for line in whole.splitlines():
                self._note(*line.split())
        return self

    def _note(self, kind: bytes, number: bytes, instant: bytes) -> None:
        kept = self.begun if kind == b"s" else self.ended
        kept.setdefault(int(number), float(instant))
