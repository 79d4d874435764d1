"""What grows without end, kept to a bound: the newest stay, and what left is counted. Pure.

Rule: when a bound is passed a quarter leaves at once. So each item costs O(1), and what stands is the same
for everybody who saw the same events.
"""

from __future__ import annotations

from itertools import islice
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")


def kept_of(bound: int) -> int:
    """How much stays when a bound is passed."""
    return bound - bound // 4


def cut_items(items: dict[K, V], bound: int) -> tuple[dict[K, V], list[V]]:
    """The newest items and those that leave, oldest first; the same dict while the bound holds."""
    if len(items) <= bound:
        return items, []
    leaving = len(items) - kept_of(bound)
    # a new dict: taking the first item from one again and again costs more each time
    return dict(islice(items.items(), leaving, None)), list(islice(items.values(), leaving))


class Spoken:
    """Text that grows at its end and is cut at its beginning. Gathered in pieces: n of them cost O(n)."""

    __slots__ = ("_pieces", "size")

    def __init__(self, text: str = "") -> None:
        self._pieces = [text] if text else []
        self.size = len(text)

    def add(self, text: str) -> None:
        """Append."""
        self._pieces.append(text)
        self.size += len(text)

    def drop(self, characters: int) -> None:
        """Take the first characters away."""
        self._pieces = [self.text()[characters:]]
        self.size -= characters

    def text(self) -> str:
        """What stands; kept in one piece from now on, so that text that is looked at often stays small."""
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""
