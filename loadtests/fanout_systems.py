"""What serves one text to many viewers: streamjobs, and what else one would take for it.

Each system is started for one measurement, says where viewers come in, and how the text is written to it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import tempfile
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from loadtests.peers import nchan, node
from loadtests.processes import ROOT, Child, python, run_to_end, running
from loadtests.redis_server import Server, free_port, wait_for_port
from loadtests.streamjobs_peer import settings_env

LEASE = 86400.0
SPEAK_MARGIN = 60.0
STREAM = "text"


class Stage:
    """A system that runs: its serving process, where viewers come in, and how to speak."""

    def __init__(self, child: Child, port: int, path: str, speaker: list[str], env: dict[str, str]) -> None:
        self.child = child
        self.port = port
        self.path = path
        self._speaker = speaker
        self._env = env

    def speak(self, tokens: int, rate: float) -> float:
        """Write the text; returns how many seconds late its last token was."""
        argv = python("-m", "loadtests.speaker", *self._speaker, str(tokens), str(rate))
        return run_to_end("speaker", argv, self._env, timeout=tokens / rate + SPEAK_MARGIN)["late"]


class FanoutSystem(ABC):
    """One way to serve a live text."""

    name: ClassVar[str]
    described: ClassVar[str]

    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        return None

    @abstractmethod
    def stage(self, server: Server, tokens: int, rate: float) -> contextlib.AbstractContextManager[Stage]:
        """Start it."""


class Ours(FanoutSystem):
    """A streamjobs gateway, and a job that is written through the store."""

    def __init__(self, name: str, described: str, way: str, query: str) -> None:
        self.name = name  # type: ignore[misc]
        self.described = described  # type: ignore[misc]
        self._way = way
        self._query = query

    @contextlib.contextmanager
    def stage(self, server: Server, tokens: int, rate: float) -> Iterator[Stage]:
        env = settings_env(server.url, lease=str(LEASE))
        (job,) = begun_jobs(1, env)
        with gateway(env) as (child, port):
            path = f"/v1/jobs/{job.partition(':')[0]}/events?{self._query}"
            yield Stage(child, port, path, [self._way, job], env)


@contextlib.contextmanager
def gateway(env: dict[str, str], *, port: int = 0) -> Iterator[tuple[Child, int]]:
    """A gateway process that takes requests."""
    port = port or free_port()
    with running("streamjobs serve", python("-m", "streamjobs", "serve", "--port", str(port)), env) as child:
        wait_for_port(port, child)
        yield child, port


def begun_jobs(count: int, env: dict[str, str]) -> list[str]:
    """Jobs that run under a lease that nobody has to renew, as `<job>:<epoch>`."""
    argv = python("-m", "loadtests.streamjobs_history", "begin", str(count))
    return run_to_end("streamjobs begin", argv, env, timeout=60.0)["jobs"]


class Nchan(FanoutSystem):
    """nchan: one nginx process in C, published to by HTTP."""

    name = "nchan"
    described = (
        "one nginx process; each token a message by HTTP POST over one connection; buffers 2,000 messages"
    )

    def missing(self) -> str | None:
        return nchan.missing()

    @contextlib.contextmanager
    def stage(self, server: Server, tokens: int, rate: float) -> Iterator[Stage]:
        port = free_port()
        with tempfile.TemporaryDirectory(prefix="loadtests-") as folder:
            Path(folder).chmod(0o755)
            with running("nginx", nchan.command(Path(folder), port)) as child:
                wait_for_port(port, child)
                url = f"http://127.0.0.1:{port}/pub?id={STREAM}"
                # a viewer's answer begins with its first message
                urllib.request.urlopen(url, data=b'{"ts":0,"text":""}', timeout=10).close()
                yield Stage(child, port, f"/sub?id={STREAM}", ["post", url], {})


class XreadEach(FanoutSystem):
    """sse-starlette, with an XREAD for each viewer."""

    name = "sse-starlette, XREAD each"
    described = "uvicorn, one process; each viewer blocks in an XREAD of its own; each token XADDed"

    def missing(self) -> str | None:
        is_here = importlib.util.find_spec("sse_starlette") is not None
        return None if is_here else "sse-starlette is not installed"

    @contextlib.contextmanager
    def stage(self, server: Server, tokens: int, rate: float) -> Iterator[Stage]:
        port, env = free_port(), {"LOADTEST_REDIS_URL": server.url}
        with running("sse-starlette", python("-m", "loadtests.peers.xread_stream", str(port)), env) as child:
            wait_for_port(port, child)
            yield Stage(child, port, f"/{STREAM}", ["stream", STREAM], env)


class _SpokenByItself(Stage):
    """A stage that speaks itself."""

    def speak(self, tokens: int, rate: float) -> float:
        urllib.request.urlopen(f"http://127.0.0.1:{self.port}/start", timeout=10).close()
        return 0.0


class ResumableStream(FanoutSystem):
    """Vercel's resumable-stream in Node, which produces the text itself."""

    name = "resumable-stream (Node)"
    described = "one Node process that produces the text and serves it; Redis pub/sub between"
    folder = node.CACHE / "resumable-stream"
    packages = ("resumable-stream@2", "redis@5")

    def missing(self) -> str | None:
        return node.missing(self.folder, self.packages)

    @contextlib.contextmanager
    def stage(self, server: Server, tokens: int, rate: float) -> Iterator[Stage]:
        port = free_port()
        script = ROOT / "loadtests" / "peers" / "resumable_stream.mjs"
        words = (self.folder / "node_modules", port, server.url, tokens, rate)
        with running("resumable-stream", [*node.node(), str(script), *map(str, words)]) as child:
            wait_for_port(port, child)
            yield _SpokenByItself(child, port, "/viewers", [], {})


SYSTEMS: tuple[FanoutSystem, ...] = (
    Ours("streamjobs", "as a worker writes: what 20 ms bring is one event", "log", "after=0"),
    Ours(
        "streamjobs, an event a token",
        "each token an event of its own, a batch every 20 ms",
        "events",
        "after=0",
    ),
    Ours("the same, ?merge=1", "viewers ask for merged deltas", "events", "after=0&merge=1"),
    Nchan(),
    ResumableStream(),
    XreadEach(),
)
