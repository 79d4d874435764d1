"""The systems of the tokens scenario: streamjobs, and INCR + XADD for every token.

Each starts as one worker process, warms up on a short text of the same provider, begins all streams at
once, says how many have ended, and reads back what it has written.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import redis

from loadtests import streamjobs_peer
from loadtests.peers import naive_tokens
from loadtests.processes import Child, RunError, python, run_to_end
from loadtests.provider import MODEL, TOKEN, WARMUP_MODEL, Provider
from loadtests.redis_server import Server

WARMUP_TIMEOUT = 30.0
SUBMIT_TIMEOUT = 30.0
PAGE = 50
PROBED = 8
"""Streams whose commits are watched as they happen."""


@dataclass(frozen=True)
class Load:
    """How many streams, and how many tokens in each."""

    streams: int
    tokens: int

    @property
    def total(self) -> int:
        return self.streams * self.tokens


@dataclass(frozen=True)
class Transcript:
    """What is in the logs after a run: tokens, the entries that hold them, the first one's instant."""

    tokens: int
    entries: int
    first_ms: int


class TokenSystem(ABC):
    """One way to bring tokens from a provider into Redis."""

    name: ClassVar[str]
    described: ClassVar[str]

    @abstractmethod
    def worker_command(self, load: Load) -> list[str]:
        """Return the child that is one worker process."""

    @abstractmethod
    def env(self, url: str, provider: Provider) -> dict[str, str]:
        """Return what its children find in their environment."""

    @abstractmethod
    def warm_up(self, server: Server, worker: Child, env: dict[str, str]) -> None:
        """Wait until the worker has read some streams and is idle again."""

    @abstractmethod
    def begin(self, server: Server, load: Load, env: dict[str, str]) -> None:
        """Start all streams."""

    @abstractmethod
    def ended(self, client: redis.Redis, load: Load) -> int:
        """Count the streams that have ended, at constant cost."""

    @abstractmethod
    def read(self, client: redis.Redis) -> Transcript:
        """Read back what was written."""

    def live_channels(self) -> list[str]:
        """Return channels on which commits of some streams are published as they happen."""
        return []


class StreamjobsChat(TokenSystem):
    """Chat jobs through one streamjobs worker."""

    name: ClassVar[str] = "streamjobs"
    described: ClassVar[str] = (
        "chat jobs through `streamjobs worker`, its settings as they come, no projector"
    )

    def __init__(self) -> None:
        self.ids: list[str] = []
        """The jobs of the streams that were begun, by number."""

    def worker_command(self, load: Load) -> list[str]:
        return streamjobs_peer.worker_command("loadtests.noop_app:app", load.streams)

    def env(self, url: str, provider: Provider) -> dict[str, str]:
        settings = {"provider": "openai", "openai_base_url": provider.base_url, "openai_api_key": "load"}
        return streamjobs_peer.settings_env(url, **settings)

    def warm_up(self, server: Server, worker: Child, env: dict[str, str]) -> None:
        self._submit(naive_tokens.WARMUP_STREAMS, WARMUP_MODEL, env)
        deadline = time.monotonic() + WARMUP_TIMEOUT
        while streamjobs_peer.unended(server.client):
            worker.require_alive()
            if time.monotonic() > deadline:
                raise RunError(f"the worker did not finish its warm-up: {worker.tail()}")
            time.sleep(0.02)

    def begin(self, server: Server, load: Load, env: dict[str, str]) -> None:
        self.ids = self._submit(load.streams, MODEL, env)

    def live_channels(self) -> list[str]:
        return [streamjobs_peer.live_channel(job) for job in self.ids[:PROBED]]

    def _submit(self, count: int, model: str, env: dict[str, str]) -> list[str]:
        argv = python("-m", "loadtests.streamjobs_peer", "chat", str(count), model)
        return run_to_end("streamjobs submit", argv, env, timeout=SUBMIT_TIMEOUT)["ids"]

    def ended(self, client: redis.Redis, load: Load) -> int:
        return load.streams - streamjobs_peer.unended(client)

    def read(self, client: redis.Redis) -> Transcript:
        texts: list[tuple[str, int]] = []
        for job in self.ids:
            for entry in entries_of(client, [streamjobs_peer.events_key(job)]):
                if entry[1][b"t"] == b"text.delta":
                    content = streamjobs_peer.content_of(client, job, "text.delta", entry[1][b"d"])
                    event = json.loads(content)
                    texts.append((event["text"], event["ts"]))
        return _transcript(texts)


class Naive(TokenSystem):
    """INCR and XADD for every token, from one Python process."""

    name: ClassVar[str] = "INCR + XADD for each token"
    described: ClassVar[str] = (
        "one Python process, httpx, redis-py with hiredis, uvloop; two round trips a token"
    )

    def worker_command(self, load: Load) -> list[str]:
        return python("-m", "loadtests.peers.naive_tokens", str(load.streams))

    def env(self, url: str, provider: Provider) -> dict[str, str]:
        return {
            "LOADTEST_REDIS_URL": url,
            "LOADTEST_PROVIDER_URL": provider.base_url,
            "LOADTEST_MODEL": MODEL,
            "LOADTEST_WARMUP_MODEL": WARMUP_MODEL,
        }

    def warm_up(self, server: Server, worker: Child, env: dict[str, str]) -> None:
        deadline = time.monotonic() + WARMUP_TIMEOUT
        while not server.client.exists(naive_tokens.READY):
            worker.require_alive()
            if time.monotonic() > deadline:
                raise RunError(f"the naive worker did not get ready: {worker.tail()}")
            time.sleep(0.02)

    def begin(self, server: Server, load: Load, env: dict[str, str]) -> None:
        server.client.rpush(naive_tokens.GO, 1)

    def ended(self, client: redis.Redis, load: Load) -> int:
        finished: Any = client.get(naive_tokens.FINISHED)
        return int(finished or 0)

    def read(self, client: redis.Redis) -> Transcript:
        keys = sorted(client.scan_iter(match=f"{naive_tokens.PREFIX}*", count=1000))
        return _transcript(
            (entry[1][b"text"].decode(), int(entry[0].partition(b"-")[0]))
            for entry in entries_of(client, keys)
        )


def entries_of(client: redis.Redis, keys: list[Any]) -> Iterable[Any]:
    """Yield the entries of many streams, a few streams a round trip."""
    for start in range(0, len(keys), PAGE):
        pipeline = client.pipeline(transaction=False)
        for key in keys[start : start + PAGE]:
            pipeline.xrange(key)
        for stream in pipeline.execute():
            yield from stream


def _transcript(texts: Iterable[tuple[str, int]]) -> Transcript:
    """Count tokens in texts with their instants in ms; a text that is not whole tokens fails the run."""
    characters, instants = 0, []
    for text, instant in texts:
        characters += len(text)
        instants.append(instant)
    if not instants or characters % len(TOKEN):
        raise RunError(f"{characters:,} characters in {len(instants):,} entries are not whole tokens")
    return Transcript(characters // len(TOKEN), len(instants), min(instants))


SYSTEMS: tuple[TokenSystem, ...] = (StreamjobsChat(), Naive())
