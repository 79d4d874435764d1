"""Processes that the tools of `tests.hostile` have started, and whether any is left."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec

from tests.conftest import wait_until

OF_A_TOOL = ("tool", "child", "grandchild")
"""The tool's process and those that it has started, one of which tried to get away."""


async def written(file: Path) -> dict[str, int]:
    """The process ids that a tool has written down."""
    await wait_until(file.exists, what="the tool's processes")
    return msgspec.json.decode(file.read_bytes(), type=dict[str, int])


def is_gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody buries has, too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


async def all_gone(numbers: dict[str, int], names: Iterable[str] = OF_A_TOOL) -> None:
    """Wait for the end of those."""
    for name in names:
        await wait_until(lambda pid=numbers[name]: is_gone(pid), what=f"the end of the {name}")
