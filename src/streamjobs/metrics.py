"""Every metric. Closed label sets; never a job id, an owner or a path with ids.

Rule 1: a metric is declared here and nowhere else; its help says what it counts and in what unit.
Rule 2: observing one costs no more than a method call.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

REGISTRY = CollectorRegistry()

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
    "streamjobs_projection_lag_notes", "Notes not yet done", ["projection"], registry=REGISTRY
)
PROJECTION_LAG_SECONDS = Gauge(
    "streamjobs_projection_lag_seconds", "Age of the oldest note not yet done", ["projection"],
    registry=REGISTRY,
)  # fmt: skip
PROJECTION_QUARANTINE = Gauge(
    "streamjobs_projection_quarantined", "Jobs set aside after an error", ["projection"], registry=REGISTRY
)

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
    "Streams by how they began: snapshot, replay, resumed, reset, archived",
    ["began"],
    registry=REGISTRY,
)
STREAMS_CLOSED = Counter(
    "streamjobs_streams_closed",
    "Streams by why they ended: ended, gone, slow, age, drain, error; subscriptions also unsubscribed, flood",
    ["why"],
    registry=REGISTRY,
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
HTTP_REQUESTS = Counter(
    "streamjobs_http_requests", "Answers by route template and status", ["route", "status"], registry=REGISTRY
)
HTTP_SECONDS = Histogram(
    "streamjobs_http_seconds", "Time to the head of the answer", ["route"], buckets=_FAST, registry=REGISTRY
)
