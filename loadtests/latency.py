"""How long a token takes from its arrival at the worker to a subscriber: a few jobs' live channels, watched.

A delta's `ts` is when its first token arrived, by Redis's clock as the worker knows it; the message is
published by the script that commits it. So this is the coalescing window, the commit and the way back.
The clocks are one machine's; a millisecond either way is their resolution.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

import redis

from loadtests.measure import percentile

POLL_TIMEOUT = 0.2


class LatencyProbe:
    """Subscribes to channels while its block runs; with none it does nothing."""

    def __init__(self, url: str, channels: Sequence[str]) -> None:
        self._channels = channels
        self._client = redis.Redis.from_url(url, socket_timeout=5.0)
        self._delays: list[float] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="latency-probe", daemon=True)

    def __enter__(self) -> LatencyProbe:
        if self._channels:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(5.0)
        self._client.close()

    def quantiles(self) -> dict[str, float]:
        """Return seconds for `p50` and `p99`; empty if no delta was seen."""
        found = {"p50": percentile(self._delays, 0.5), "p99": percentile(self._delays, 0.99)}
        return {name: value for name, value in found.items() if value is not None}

    def _listen(self) -> None:
        subscription = self._client.pubsub(ignore_subscribe_messages=True)
        subscription.subscribe(*self._channels)
        while not self._stopped.is_set():
            message: Any = subscription.get_message(timeout=POLL_TIMEOUT)
            if message is not None:
                now = time.time()
                self._delays += [max(0.0, now - arrived) for arrived in arrivals(message["data"])]
        subscription.close()


def arrivals(message: bytes) -> Iterator[float]:
    """Yield the arrival, in seconds, of each text delta in a live message (`<id> <type> <json>` a line)."""
    for line in message.split(b"\n"):
        _, kind, content = line.split(b" ", 2)
        if kind == b"text.delta":
            yield json.loads(content)["ts"] / 1000
