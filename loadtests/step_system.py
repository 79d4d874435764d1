"""What a durable-workflow system must offer to be measured: a store, one worker process, a way to submit.

Rule 1: the workflow is the same everywhere: ten steps one after another, each an async function that returns
a small number; a step's result is recorded before the next one begins.
Rule 2: workflows are submitted by another process, through the system's own client, and run by its worker.
Rule 3: what the system itself has recorded is counted after each run: an outcome and ten steps, or it failed.
Rule 4: all stores are as fast as they can be made: nothing waits for a disk.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar

from loadtests.bench import Bench
from loadtests.pacing import Plan
from loadtests.processes import Child

STEPS = 10
READY_TIMEOUT = 30.0


@dataclass(frozen=True)
class Site:
    """A running store: where it is, and its process (the root of its processes)."""

    url: str
    store: Child


@dataclass(frozen=True)
class Outcome:
    """What the system has recorded of a workflow that succeeded: when it ended, and how many steps."""

    ended: float
    steps: int


class StepSystem(ABC):
    """One system in the comparison."""

    name: ClassVar[str]
    store: ClassVar[str]
    tuning: ClassVar[str]

    def prepare(self) -> str | None:
        """Install or find what is needed; return why that failed, or None."""
        return None

    @abstractmethod
    def version(self) -> str:
        """Return the versions that run, the store's too."""

    @abstractmethod
    def opened(self, bench: Bench) -> AbstractContextManager[Site]:
        """Run an empty store of its own while the block lasts."""

    @abstractmethod
    def env(self, site: Site) -> dict[str, str]:
        """Return what worker and submitter find in their environment."""

    @abstractmethod
    def worker_command(self) -> list[str]:
        """Return the child that is one worker process; it marks where a workflow's code begins and ends."""

    def get_ready(self, site: Site, worker: Child) -> None:
        """Wait until workflows may be submitted; what takes part in running them is warmed up afterwards."""
        return

    @abstractmethod
    def submit_command(self, plan: Plan) -> list[str]:
        """Return the child that submits a plan's workflows and prints what `pacing.run` does."""

    @abstractmethod
    def outcomes(self, site: Site, ids: Sequence[str]) -> dict[str, Outcome]:
        """Ask the store for the workflows among `ids` that have succeeded."""
