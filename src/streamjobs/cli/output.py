"""What commands print: one JSON value, or a table that is read at a glance and cut by `awk`.

Rule 1: nothing that a model, a tool or a job said steers the terminal.
Rule 2: a table has one line a row, whatever is in it; without rows it says so on standard error.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import click

_CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """The text without control characters: models and tools must not steer a terminal."""
    return text.translate(_CONTROLS)


def in_line(value: object) -> str:
    """A value as a part of one line; `-` for nothing."""
    return " ".join(printable("" if value is None else str(value)).split()) or "-"


def json_text(value: Any) -> str:
    """A value as JSON."""
    import msgspec

    return msgspec.json.encode(value).decode()


def print_json(value: Any) -> None:
    """One JSON value on a line of its own."""
    sys.stdout.write(json_text(value) + "\n")
    sys.stdout.flush()


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], nothing: str) -> None:
    """Aligned columns under their names; `nothing` says that there are no rows."""
    if not rows:
        click.echo(nothing, err=True)
        return
    cells = [[in_line(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    click.echo(click.style(_padded(columns, widths), dim=True))
    for row in cells:
        click.echo(_padded(row, widths))


def _padded(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def when(instant_ms: int | None) -> str:
    """An instant in local time."""
    if not instant_ms:
        return "-"
    return datetime.fromtimestamp(instant_ms / 1000).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def duration(seconds: float) -> str:
    """A duration in the largest unit that says enough."""
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.1f} s" if seconds else "-"


def why(error: dict[str, Any] | None) -> str:
    """An error in one line; `-` for none."""
    return in_line(f"{error['code']}: {error['message']}" if error else "")
