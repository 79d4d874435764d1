"""`streamjobs dev` in a process of its own, for tests of what people and programs do with it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.endswith("_API_KEY")}


@contextlib.contextmanager
def running_dev(folder: Path, *words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`streamjobs dev` with a Redis of its own, and where it answers."""
    process = subprocess.Popen(
        [sys.executable, "-m", "streamjobs", "dev", "--port", "0", "--set", f"data_dir={folder}", *words],
        env=ENVIRONMENT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if found := re.search(r"gateway\s+(http://\S+)", line):
                yield process, found[1]
                break
        else:
            raise AssertionError("streamjobs dev ended without a gateway")
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(90)
        process.stderr.close()
