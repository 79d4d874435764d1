"""Text that compresses as prose does: words that follow one another as in this repository's documents.

Words in random order compress too badly, and one text again and again too well. So the next word is drawn
from those that have followed the last one, by a seed: the same text for the same seed and documents.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from itertools import islice, pairwise

from loadtests.processes import ROOT


def tokens(seed: int, count: int) -> list[str]:
    """`count` words with a space behind each: what a model says in as many deltas."""
    return list(islice(_words(random.Random(seed)), count))


def _words(choice: random.Random) -> Iterator[str]:
    followers = _followers()
    word = choice.choice(list(followers))
    while True:
        yield f"{word} "
        word = choice.choice(followers[word])


@cache
def _followers() -> dict[str, list[str]]:
    """Of each word of the documents, those that follow it, as often as they do."""
    files = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CHANGELOG.md"])
    words = [word for file in files for word in file.read_text(encoding="utf-8").split()]
    found: dict[str, list[str]] = defaultdict(list)
    for word, follower in pairwise([*words, words[0]]):
        found[word].append(follower)
    return dict(found)
