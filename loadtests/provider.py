"""The scripted provider in a process of its own: a long text at a token rate, and a short one to warm up.

As a child: `python -m loadtests.provider <scenario> <port> <marks>`, where it also marks when the connection
of a numbered stream (its prompt says `stream <number>`) was closed by the other side.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loadtests.marks import Marks, Pen
from loadtests.processes import Child, RunError, python, running
from loadtests.redis_server import free_port
from streamjobs.testing import ScriptedProvider
from streamjobs.testing.scenario import parse_scenario

TOKEN = "token "
MODEL, WARMUP_MODEL = "long", "short"
WARMUP_TOKENS = 100
START_TIMEOUT = 20.0
NUMBERED = re.compile(rb"stream (\d+)")


@dataclass(frozen=True)
class Provider:
    """A running provider: its OpenAI-compatible API, its process, and the connections that it saw closed."""

    base_url: str
    child: Child
    closed: Marks


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
        marks = Path(folder) / "marks"
        argv = python("-m", "loadtests.provider", str(file), str(port), str(marks))
        with running("provider", argv) as child:
            _wait_until_listening(port, child)
            yield Provider(f"http://127.0.0.1:{port}/v1", child, Marks(marks))


def _wait_until_listening(port: int, child: Child) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        child.require_alive()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
            return
        time.sleep(0.02)
    raise RunError(f"the provider did not listen within {START_TIMEOUT:.0f} s: {child.tail()}")


class Witness:
    """ASGI middleware: passes everything on, and marks the end of a numbered stream whose client leaves."""

    def __init__(self, app: ASGIApp, pen: Pen) -> None:
        self._app = app
        self._pen = pen

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        content = bytearray()

        async def watched() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                content.extend(message.get("body", b""))
            elif found := NUMBERED.search(content):
                self._pen.end(int(found[1]))
            return message

        await self._app(scope, watched, send)


def main(file: str, port: str, marks: str) -> None:
    """Be the provider."""
    provider = ScriptedProvider(parse_scenario(Path(file).read_text(encoding="utf-8")))
    app = Witness(provider.app, Pen(marks))
    config = uvicorn.Config(
        app, port=int(port), log_level="critical", ws="none", lifespan="off", backlog=4096
    )  # fmt: skip
    uvicorn.Server(config).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
