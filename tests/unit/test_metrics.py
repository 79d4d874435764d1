"""Metrics of processes that share a port: nobody must see which one answered, nor that one died."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from streamjobs import metrics

PROGRAM = """
import prometheus_client
from streamjobs import metrics
own = prometheus_client.Counter("shop_orders", "An app's own")
own.inc()
metrics.VIEWERS.set_function(lambda: 5)
metrics.JOBS_RUNNING.inc()
metrics.STREAMS_OPENED.labels("replay").inc(3)
metrics.HTTP_SECONDS.labels("/v1/jobs").observe(0.03)
metrics.PROJECTION_LAG.labels("index").set({lag})
metrics.publish()
print(metrics.exposition().decode())
"""


def shown_by(slot: int, folder: Path, lag: int = 1) -> list[str]:
    """The samples that a process in this slot shows, after it has counted something of its own."""
    env = {**os.environ, metrics.SLOT_VARIABLE: str(slot), metrics.FOLDER_VARIABLE: str(folder)}
    program = PROGRAM.replace("{lag}", str(lag))
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, check=True, capture_output=True, text=True
    )
    return done.stdout.splitlines()


def test_counters_are_summed_and_outlive_their_process(tmp_path: Path):
    """A rate over a counter that went down is a spike of everything that was ever counted."""
    shown_by(0, tmp_path)
    assert 'streamjobs_streams_opened_total{began="replay"} 6.0' in shown_by(1, tmp_path)
    metrics.forget(0, str(tmp_path))
    shown = shown_by(0, tmp_path)
    assert 'streamjobs_streams_opened_total{began="replay"} 9.0' in shown
    assert 'streamjobs_http_seconds_count{route="/v1/jobs"} 3.0' in shown
    assert 'streamjobs_http_seconds_bucket{le="0.02",route="/v1/jobs"} 0.0' in shown
    assert 'streamjobs_http_seconds_bucket{le="0.05",route="/v1/jobs"} 3.0' in shown


def test_gauges_are_those_of_live_processes(tmp_path: Path):
    """Viewers of a process that was killed would be counted until the next deployment."""
    for slot in (0, 1):
        shown_by(slot, tmp_path)
    shown = shown_by(2, tmp_path, lag=8)
    assert {"streamjobs_viewers 15.0", "streamjobs_jobs_running 3.0"} <= set(shown)
    assert 'streamjobs_projection_lag_notes{projection="index"} 8.0' in shown, "the last one that was set"
    for slot in (0, 1, 2):
        metrics.forget(slot, str(tmp_path))
    assert {"streamjobs_viewers 5.0", "streamjobs_jobs_running 1.0"} <= set(shown_by(2, tmp_path))


def test_a_process_that_just_starts_breaks_no_scrape(tmp_path: Path):
    """Its files are empty for a moment, and Prometheus would be answered with an error."""
    (tmp_path / "counter_7.db").touch()
    assert "streamjobs_viewers 5.0" in shown_by(0, tmp_path)


def test_only_our_metrics_are_shown(tmp_path: Path):
    """With a second process an app's own metrics would appear, and vanish again with one."""
    text = "\n".join(shown_by(0, tmp_path))
    assert "shop_orders" not in text
    assert "pid=" not in text, "a gauge that is not summed"


def test_one_process_alone_shows_what_is_there():
    metrics.STREAMS_OPENED.labels("replay").inc(0)
    text = metrics.exposition().decode()
    assert "# HELP streamjobs_viewers " in text
    assert 'streamjobs_streams_opened_total{began="replay"}' in text
