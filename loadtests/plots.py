"""Charts as PNG files, by matplotlib, which only a run of the load tests needs."""

from __future__ import annotations

from pathlib import Path

from loadtests.report import Chart


def draw(chart: Chart, file: Path) -> None:
    """Draw a chart; one without a point is not drawn."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for line in chart.lines:
        if line.points:
            axes.plot(*zip(*line.points, strict=True), marker="o", label=line.name)
    axes.set(title=chart.title, xlabel=chart.x, ylabel=chart.y)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(visible=True, alpha=0.3)
    if any(line.points for line in chart.lines):
        axes.legend(fontsize="small")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
