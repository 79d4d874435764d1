"""Children: started in a session of their own, logged to a file, always ended with their whole session.

A run that is interrupted (SIGINT, SIGTERM) raises, so every `with` here still kills what it started.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
SOURCES = os.pathsep.join((str(ROOT / "src"), str(ROOT)))
"""Where children import from: this working tree, whatever is installed."""
TAIL_CHARS = 600
STOP_TIMEOUT = 3.0


class RunError(Exception):
    """A measurement could not be made; the text says why and is shown in its row of the report."""


class Child:
    """One running process and the file that holds what it printed."""

    def __init__(self, name: str, argv: Sequence[str], env: Mapping[str, str], folder: Path) -> None:
        self.name = name
        self._log = folder / f"{name.replace(' ', '-')}-{time.monotonic_ns()}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                argv, cwd=ROOT, env=child_env(env), stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self.pid = self._process.pid

    def require_alive(self) -> None:
        """Raise `RunError` with the end of its output if it has exited."""
        code = self._process.poll()
        if code is not None:
            raise RunError(f"{self.name} exited with {code}: {self.tail()}")

    def output(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def tail(self) -> str:
        return " ".join(self.output()[-TAIL_CHARS:].split())

    def wait(self, timeout: float) -> None:
        """Wait for a clean exit; raise `RunError` otherwise."""
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise RunError(f"{self.name} did not end within {timeout:.0f} s: {self.tail()}") from None
        if code != 0:
            raise RunError(f"{self.name} exited with {code}: {self.tail()}")

    def freeze(self) -> None:
        """Stop the whole session in its tracks, until `thaw`."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def stop(self) -> None:
        """End the whole session: asked first, killed after three seconds."""
        self._signal(signal.SIGTERM)
        self.thaw()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_TIMEOUT)
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)


def child_env(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without STREAMJOBS_* settings of the person who runs it, and `extra`."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("STREAMJOBS_")}
    return env | {"PYTHONPATH": SOURCES, "PYTHONUNBUFFERED": "1"} | dict(extra)


@contextlib.contextmanager
def running(name: str, argv: Sequence[str], env: Mapping[str, str] | None = None) -> Iterator[Child]:
    """Start a child and end it when the block is left, however it is left."""
    with tempfile.TemporaryDirectory(prefix="loadtests-") as folder:
        child = Child(name, argv, env or {}, Path(folder))
        try:
            yield child
        finally:
            child.stop()


def run_to_end(
    name: str, argv: Sequence[str], env: Mapping[str, str] | None = None, *, timeout: float
) -> dict[str, Any]:
    """Run a child that ends by itself; return the JSON object that is its last line."""
    with running(name, argv, env) as child:
        child.wait(timeout)
        return last_json(child)


def last_json(child: Child) -> dict[str, Any]:
    """Return the JSON object that is the last line of what a child printed."""
    lines = child.output().strip().splitlines()
    try:
        return json.loads(lines[-1])
    except (IndexError, ValueError):
        raise RunError(f"{child.name} printed no result: {child.tail()}") from None


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def raise_on_signals() -> None:
    """Make SIGTERM unwind the stack as SIGINT does."""

    def unwind(number: int, _frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, unwind)
