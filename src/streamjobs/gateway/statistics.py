"""How statistics look from outside. Pure."""

from __future__ import annotations

from collections import Counter
from itertools import accumulate
from typing import Any

from streamjobs.job import Status
from streamjobs.store.stats import BOUNDS_MS, Totals

_COUNTS = (
    "submitted", "started", "completed", "failed", "cancelled", "retries", "crashes", "turns", "input_tokens",
    "output_tokens", "reasoning_tokens", "cached_tokens",
)  # fmt: skip
_DURATIONS = {"wait": "wait_seconds", "run": "run_seconds", "first_token": "first_token_seconds"}


def described(totals: Totals, kind: str = "", queue: str = "") -> list[dict[str, Any]]:
    """What was counted of each kind and queue, by their names; of one kind or queue where it is named."""
    return [
        {"kind": one[0], "queue": one[1]} | _described(counts)
        for one, counts in sorted(totals.items())
        if kind in {"", one[0]} and queue in {"", one[1]}
    ]


def _described(counts: Counter[str]) -> dict[str, Any]:
    now = {status: counts[f"now:{status}"] for status in Status if not status.is_terminal}
    return (
        {"now": now}
        | {name: counts[name] for name in _COUNTS}
        | {shown: _histogram(counts, name) for name, shown in _DURATIONS.items()}
    )


def _histogram(counts: Counter[str], name: str) -> dict[str, Any]:
    """As Prometheus has it: `buckets` are cumulative, by their upper bounds in seconds."""
    sizes = list(accumulate(counts[f"{name}:{i}"] for i in range(len(BOUNDS_MS) + 1)))
    buckets = {f"{bound / 1000:g}": size for bound, size in zip(BOUNDS_MS, sizes, strict=False)}
    return {"count": sizes[-1], "sum": counts[f"{name}_ms"] / 1000, "buckets": buckets}
