"""What a scenario is, and what every scenario works with."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from loadtests.measure import calibrate
from loadtests.processes import RunError
from loadtests.progress import Progress
from loadtests.report import Section

Run = TypeVar("Run")


@dataclass
class Bench:
    """One run: its options, the server binary, the progress display, the noise so far."""

    options: argparse.Namespace
    binary: str
    progress: Progress
    calibration: list[float] = field(default_factory=list)

    def attempt(
        self, label: str, measure: Callable[[], Run], spoken: Callable[[Run], str], failed: dict[str, str]
    ) -> list[Run]:
        """Take one step: a measurement that is said and returned, or noted in `failed` under its label."""
        try:
            run = measure()
        except RunError as error:
            failed[label] = f"failed: {error}"
            self.progress.say(f"    failed: {error}")
            return []
        self.progress.say(f"    {spoken(run)}")
        return [run]

    def sample_noise(self) -> None:
        """Run the calibration loop once; scenarios call this before and after each measurement."""
        self.calibration.append(calibrate())


@dataclass(frozen=True)
class Scenario:
    """A named set of measurements that fills one section of the report.

    `add_options` puts its settings on the common parser, `quicken` shrinks them for --quick,
    `steps` says how many progress steps `run` will take.
    """

    name: str
    summary: str
    add_options: Callable[[argparse.ArgumentParser], None]
    quicken: Callable[[argparse.Namespace], None]
    steps: Callable[[argparse.Namespace], int]
    run: Callable[[Bench], Section]
