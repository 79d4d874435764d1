"""The demo: what a person runs first."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_demo_proves_that_nothing_is_lost() -> None:
    """Without it, the first command of the README may end with anything."""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_API_KEY")}
    done = subprocess.run(
        [sys.executable, "-m", "streamjobs", "demo", "--once"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=170, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    proof = re.search(
        r"events seen (\d+)  gaps (\d+)  duplicates (\d+)  restarts (\d+)  seconds [\d.]+", done.stdout
    )
    assert proof is not None, done.stdout
    assert int(proof[1]) > 50
    assert proof.groups()[1:] == ("0", "0", "1")
    assert "NO " not in done.stdout.partition("the proof")[2]
    assert "scripted" in done.stdout, "it must say that no model answered"


def test_the_demo_needs_a_folder_that_is_there() -> None:
    """Without it, a typo in --folder is a traceback, or a demo that reads nothing."""
    done = subprocess.run(
        [sys.executable, "-m", "streamjobs", "demo", "--once", "--folder", "/nowhere/at/all"],
        capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "/nowhere/at/all" in done.stderr
