"""What the examples share: their App, and the two folders that they may touch.

Rule: a path in an input was written by a stranger. What is read is below `EXAMPLES_ROOT` (the current folder
unless it is set), what is written is below `EXAMPLES_OUTPUT`.
"""

from __future__ import annotations

import os
from pathlib import Path

from streamjobs import App, Permanent

app = App(name="examples")


def readable(path: str) -> Path:
    """The file or folder that an input names. Raises `Permanent` for one outside the root, or none at all."""
    root = Path(os.environ.get("EXAMPLES_ROOT", ".")).resolve()
    found = (root / path).resolve()  # follows links: what counts is where they lead
    if not found.is_relative_to(root):
        raise Permanent(f"path: {path!r} is outside the folder that the examples may read")
    if not found.exists():
        raise Permanent(f"path: there is no {path!r}")
    return found


def output(*parts: str) -> Path:
    """A path below the folder for results; the folders above it are made."""
    folder = Path(os.environ.get("EXAMPLES_OUTPUT", ".streamjobs/examples")).resolve()
    path = folder.joinpath(*parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
