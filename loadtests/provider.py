"""The scripted provider in a process of its own: a long text at a token rate, and a short one to warm up."""

from __future__ import annotations

import contextlib
import json
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtests.processes import Child, RunError, python, running
from loadtests.redis_server import free_port

TOKEN = "token "
MODEL, WARMUP_MODEL = "long", "short"
WARMUP_TOKENS = 100
START_TIMEOUT = 20.0


@dataclass(frozen=True)
class Provider:
    """A running provider: where its OpenAI-compatible API is, and its process."""

    base_url: str
    child: Child


def scenario(rate: float, tokens: int) -> dict[str, Any]:
    """Return the scenario file's content; a rate of 0 sends as fast as it is read."""
    return {"turns": [_turn(MODEL, rate, tokens), _turn(WARMUP_MODEL, 0.0, WARMUP_TOKENS)]}


def _turn(model: str, rate: float, tokens: int) -> dict[str, Any]:
    return {"match": {"model": model}, "text": [TOKEN] * tokens, "rate": rate}


@contextlib.contextmanager
def running_provider(rate: float, tokens: int) -> Iterator[Provider]:
    """Start a provider on a free loopback port and wait until it listens."""
    with tempfile.TemporaryDirectory(prefix="loadtests-") as folder:
        file = Path(folder) / "scenario.json"
        file.write_text(json.dumps(scenario(rate, tokens)), encoding="utf-8")
        port = free_port()
        argv = python("-m", "streamjobs", "provider", "--scenario", str(file), "--port", str(port))
        with running("provider", argv) as child:
            _wait_until_listening(port, child)
            yield Provider(f"http://127.0.0.1:{port}/v1", child)


def _wait_until_listening(port: int, child: Child) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        child.require_alive()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
            return
        time.sleep(0.02)
    raise RunError(f"the provider did not listen within {START_TIMEOUT:.0f} s: {child.tail()}")
