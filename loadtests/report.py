"""One Markdown page: what ran where, the tables, the noise. Pure functions over plain data.

Rule: whatever was asked for stands in the report, as numbers or as the reason why there are none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from loadtests.measure import Machine, Summary, spread, summarize

NOTHING = "-"


@dataclass(frozen=True)
class Table:
    """Headers and rows of finished cells."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Line:
    """One line of a chart: points (x, y) with x growing."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """One plot, kept beside the page as `<page>-<name>.png`. Both axes begin at 0."""

    name: str
    title: str
    x: str
    y: str
    lines: Sequence[Line]


@dataclass(frozen=True)
class Section:
    """One scenario's part of the page, and its raw numbers for --json."""

    title: str
    intro: str
    tables: Sequence[Table]
    notes: Sequence[str] = ()
    data: dict[str, Any] = field(default_factory=dict)
    failures: Sequence[str] = ()
    charts: Sequence[Chart] = ()


@dataclass(frozen=True)
class Report:
    """A whole run."""

    started_at: str
    command: str
    machine: Machine
    redis_version: str
    calibration: Sequence[float]
    load_average: Sequence[float]
    sections: Sequence[Section]


# --- cells


def number(value: float | None, digits: int = 0) -> str:
    """Format with thousands separators; None is a dash."""
    return NOTHING if value is None else f"{value:,.{digits}f}"


def three_figures(value: float | None) -> str:
    """Format with about three significant figures: 1,234 · 123 · 12.3 · 1.23."""
    if value is None:
        return NOTHING
    size = abs(value)
    return number(value, 0 if size >= 100 else 1 if size >= 10 else 2)


def summary(values: Sequence[float]) -> str:
    """Format the median, and minimum and maximum where there is more than one value."""
    found = summarize(values)
    if found is None:
        return NOTHING
    return _with_ends(found) if len(values) > 1 else three_figures(found.median)


def _with_ends(found: Summary) -> str:
    return f"{three_figures(found.median)} ({three_figures(found.low)}-{three_figures(found.high)})"


def ratio(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f} x"


def percent(value: float | None) -> str:
    return NOTHING if value is None else f"{100 * value:.0f} %"


# --- the page


def table(content: Table) -> str:
    """Lay out a Markdown table: the first column to the left, the others to the right."""
    columns = len(content.headers)
    lines = [_row(content.headers), _row([":--", *["--:"] * (columns - 1)])]
    for row in content.rows:
        if len(row) != columns:
            raise ValueError(f"a row of {len(row)} cells under {columns} headers: {row}")
        lines.append(_row(row))
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def machine_lines(report: Report) -> str:
    """Describe the machine and its noise in a few lines."""
    machine, noise = report.machine, report.calibration
    load = " ".join(f"{value:.2f}" for value in report.load_average)
    return "\n".join(
        [
            f"- {report.started_at}, `{report.command}`",
            f"- {machine.processor}, {machine.cores} cores, {machine.memory_gib:g} GiB; {machine.system}; "
            f"Python {machine.python}; Redis {report.redis_version}",
            "- Redis, for all alike: one binary, a fresh private process for each measurement, loopback TCP, "
            '`appendonly no`, `save ""` (nothing is written to disk)',
            f"- load average at the start: {load}",
            f"- noise: a fixed chain of SHA-256 beside each measurement ({len(noise)} times) took "
            f"{_milliseconds(noise)}; spread (max - min) / median {percent(spread(noise))}",
        ]
    )


def _milliseconds(seconds: Sequence[float]) -> str:
    return f"{summary([1000 * value for value in seconds])} ms"


def chart_file(page: str, chart: Chart) -> str:
    """Name a chart's file beside its page."""
    return f"{page}-{chart.name}.png"


def markdown(report: Report, page: str = "") -> str:
    """Return the whole page; with the page's name the charts beside it are shown."""
    parts = ["# streamjobs load tests", machine_lines(report)]
    for section in report.sections:
        parts += [f"## {section.title}", section.intro]
        parts += [table(content) for content in section.tables]
        parts += [f"![{chart.title}]({chart_file(page, chart)})" for chart in section.charts if page]
        if section.notes:
            parts.append("\n".join(f"- {note}" for note in section.notes))
    return "\n\n".join(parts) + "\n"
