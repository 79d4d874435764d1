"""Every metric. Closed label sets; never a job id, an owner or a path with ids.

Rule 1: a metric is declared here and nowhere else; its help says what it counts and in what unit.
Rule 2: observing one costs no more than a method call.
Rule 3: of several processes that share a port any one answers for all. Each writes to files of its slot
(prometheus_client's multiprocess mode, 0.4 µs more an increment); whoever takes the slot over goes on with
them, so counters never go down. Gauges are those of live processes: a sum, or what was set last.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import prometheus_client
import prometheus_client.values
from prometheus_client import CollectorRegistry, Counter, Histogram, Metric, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead  # pyright: ignore[reportUnknownVariableType]
from prometheus_client.registry import Collector

SLOT_VARIABLE = "STREAMJOBS_SERVE_SLOT"
FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
"""What a process that shares its port finds in its environment, set before this module is imported."""

REGISTRY = CollectorRegistry()

_slot = os.environ.get(SLOT_VARIABLE)
IS_SHARED = _slot is not None
"""Whether this process shares its port with others."""
if IS_SHARED:
    prometheus_client.values.ValueClass = prometheus_client.values.MultiProcessValue(lambda: _slot)  # pyright: ignore[reportUnknownMemberType]

_sampled: dict[Gauge, Callable[[], float]] = {}


class Gauge(prometheus_client.Gauge):
    """A gauge; among processes that share a port a sum, unless `multiprocess_mode` says otherwise."""

    def __init__(self, *args: Any, multiprocess_mode: Any = "livesum", **kwargs: Any) -> None:
        super().__init__(*args, multiprocess_mode=multiprocess_mode, **kwargs)

    def set_function(self, f: Callable[[], float]) -> None:
        """Ask `f` when somebody looks; where processes share a port, at each `publish`."""
        if IS_SHARED:
            _sampled[self] = f
        else:
            super().set_function(f)


def publish() -> None:
    """Show what gauges are now to the other processes of this port."""
    for gauge, sample in _sampled.items():
        gauge.set(sample())


def forget(slot: int, folder: str) -> None:
    """Drop the gauges of a process that ended; its counters stay."""
    mark_process_dead(slot, folder)


def exposition() -> bytes:
    """Everything as Prometheus reads it, of all processes that share this one's port."""
    if not IS_SHARED:
        return generate_latest(REGISTRY)
    shared = CollectorRegistry()
    shared.register(_Shared())
    return generate_latest(shared)


class _Shared(Collector):
    """Collects what is declared here from the files of all slots; an app's own metrics are in them too."""

    def collect(self) -> Iterable[Metric]:
        declared = {metric.name for metric in REGISTRY.collect()}
        merged = cast("Iterable[Metric]", MultiProcessCollector.merge(_files()))  # pyright: ignore[reportUnknownMemberType]
        return [metric for metric in merged if metric.name in declared]


def _files() -> Iterable[Path]:
    for file in Path(os.environ[FOLDER_VARIABLE]).glob("*.db"):
        with contextlib.suppress(FileNotFoundError):  # the gauges of a process that just ended
            if file.stat().st_size:  # else it is just being made
                yield file


_FAST = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
_SLOW = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 1800.0)

# --- worker

JOBS_TAKEN = Counter("streamjobs_jobs_taken", "Leases this worker got", registry=REGISTRY)
JOBS_RUNNING = Gauge("streamjobs_jobs_running", "Jobs this worker runs now", registry=REGISTRY)
JOBS_DONE = Counter(
    "streamjobs_jobs_done", "What became of jobs this worker ran", ["outcome"], registry=REGISTRY
)
JOB_SECONDS = Histogram(
    "streamjobs_job_run_seconds", "Time of one run of a job", buckets=_SLOW, registry=REGISTRY
)
COMMIT_SECONDS = Histogram(
    "streamjobs_commit_seconds", "One append call, retries included", buckets=_FAST, registry=REGISTRY
)
COMMIT_BATCHES = Histogram(
    "streamjobs_commit_batches", "Batches carried by one append call",
    buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500), registry=REGISTRY,
)  # fmt: skip
LEASES_LOST = Counter("streamjobs_leases_lost", "Leases this worker lost", registry=REGISTRY)
TURNS = Counter("streamjobs_turns", "Model calls", ["outcome"], registry=REGISTRY)
TOKENS = Counter("streamjobs_tokens", "Tokens as providers count them", ["direction"], registry=REGISTRY)
TOOL_CALLS = Counter("streamjobs_tool_calls", "Tool calls", ["outcome"], registry=REGISTRY)
STEPS = Counter("streamjobs_steps", "Attempts of steps", ["outcome"], registry=REGISTRY)
SWEPT = Counter("streamjobs_swept", "What sweeps did to jobs", ["what"], registry=REGISTRY)

# --- webhooks

DELIVERIES = Counter(
    "streamjobs_deliveries",
    "Tries of deliveries to webhooks: done, retry, dead, gone, late",
    ["outcome"],
    registry=REGISTRY,
)
# --- projector

PROJECTED = Counter(
    "streamjobs_projected",
    "Jobs that projections looked at: advanced, quarantined",
    ["projection", "outcome"],
    registry=REGISTRY,
)
PROJECTION_LAG = Gauge(
    "streamjobs_projection_lag_notes", "Notes not yet done", ["projection"],
    multiprocess_mode="livemostrecent", registry=REGISTRY,
)  # fmt: skip
PROJECTION_LAG_SECONDS = Gauge(
    "streamjobs_projection_lag_seconds", "Age of the oldest note not yet done", ["projection"],
    multiprocess_mode="livemostrecent", registry=REGISTRY,
)  # fmt: skip
PROJECTION_QUARANTINE = Gauge(
    "streamjobs_projection_quarantined", "Jobs set aside after an error", ["projection"],
    multiprocess_mode="livemostrecent", registry=REGISTRY,
)  # fmt: skip

ARCHIVED = Counter(
    "streamjobs_archived", "Tries to archive an ended job: archived, failed", ["outcome"], registry=REGISTRY
)

# --- gateway

VIEWERS = Gauge("streamjobs_viewers", "Open streams, and requests that wait for a job", registry=REGISTRY)
WEBSOCKETS = Gauge("streamjobs_websockets", "Open WebSockets; each is a viewer too", registry=REGISTRY)
CHANNELS = Gauge("streamjobs_channels", "Jobs watched by this process", registry=REGISTRY)
FRAMES_SENT = Counter("streamjobs_frames_sent", "Event frames handed to viewers", registry=REGISTRY)
STREAM_BYTES = Counter("streamjobs_stream_bytes", "Bytes handed to viewers", registry=REGISTRY)
STREAMS_OPENED = Counter(
    "streamjobs_streams_opened",
    "Streams by how they began: snapshot, replay, resumed, reset, archived; or were refused",
    ["began"],
    registry=REGISTRY,
)
STREAMS_CLOSED = Counter(
    "streamjobs_streams_closed",
    "Streams by why they ended: ended, gone, slow, age, drain, error; subscriptions also unsubscribed, flood",
    ["why"],
    registry=REGISTRY,
)
DELIVERY_SECONDS = Histogram(
    "streamjobs_delivery_seconds",
    "From an event's `ts` to when the sockets of those who watch had it; the oldest of each flush",
    buckets=(0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
    registry=REGISTRY,
)
DEGRADED = Gauge("streamjobs_degraded", "Whether Redis is not heard or not read now", registry=REGISTRY)
DEGRADED_SECONDS = Counter(
    "streamjobs_degraded_seconds", "Time in which Redis was not heard or not read", registry=REGISTRY
)
GAP_FILLS = Counter(
    "streamjobs_gap_fills",
    "Reads of the log to make up for live delivery: hole, reconnected, position",
    ["why"],
    registry=REGISTRY,
)
CHANNEL_RESETS = Counter(
    "streamjobs_channel_resets", "Watched jobs whose log was replaced by another history", registry=REGISTRY
)
RING_MISSES = Counter(
    "streamjobs_ring_misses", "Times a viewer had to read from the log what the ring no longer held",
    registry=REGISTRY,
)  # fmt: skip
CANARY_RUNS = Counter(
    "streamjobs_canary_runs",
    "Runs of this canary: ok, unreachable, refused, timeout, hole, repeat, content, failed",
    ["outcome"],
    registry=REGISTRY,
)
CANARY_FIRST_SECONDS = Histogram(
    "streamjobs_canary_first_event_seconds",
    "From submitting to the first event",
    buckets=_FAST,
    registry=REGISTRY,
)
CANARY_WHOLE_SECONDS = Histogram(
    "streamjobs_canary_run_seconds", "From submitting to the end", buckets=_SLOW, registry=REGISTRY
)
CANARY_LATE_SECONDS = Histogram(
    "streamjobs_canary_late_seconds", "How much later than the quickest one of its run an event came",
    buckets=_FAST, registry=REGISTRY,
)  # fmt: skip
CANARY_LAST_OK = Gauge(
    "streamjobs_canary_last_ok_timestamp_seconds", "When a run last was well", multiprocess_mode="livemax",
    registry=REGISTRY,
)  # fmt: skip
HTTP_REQUESTS = Counter(
    "streamjobs_http_requests", "Answers by route template and status", ["route", "status"], registry=REGISTRY
)
ACCESS = Counter(
    "streamjobs_access",
    "Requests by what was decided of them: admitted, unauthenticated, forbidden, not_found, error",
    ["verdict"],
    registry=REGISTRY,
)
HTTP_SECONDS = Histogram(
    "streamjobs_http_seconds", "Time to the head of the answer", ["route"], buckets=_FAST, registry=REGISTRY
)
