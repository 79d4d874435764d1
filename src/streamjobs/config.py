"""Settings: one frozen struct, read once, strict, and kind about typos.

Sources, later ones win: the defaults here, a YAML or JSON file, environment variables
(`STREAMJOBS_<NAME>`, upper case), command line options. Durations are float seconds, sizes bytes.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import yaml

from streamjobs.errors import ConfigError

PREFIX = "STREAMJOBS_"


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every setting, its default, and what it means."""

    # --- Redis
    redis_url: str = ""
    """Where Redis is; empty: an embedded one is started (`streamjobs dev` and `demo` only)."""
    data_dir: str = ".streamjobs"
    """Folder of the embedded Redis."""
    partitions: int = 1
    """Units of atomicity; fixed when a store is created. 1 for one Redis, two per primary for a cluster."""
    redis_timeout: float = 2.0
    redis_connect_timeout: float = 1.0
    redis_max_connections: int = 64

    # --- jobs
    queues: tuple[str, ...] = ("default",)
    """The declared queues; a submission to another one is refused."""
    retention: float = 7 * 86400.0
    """How long an ended job is kept."""
    idempotency_ttl: float = 86400.0
    """An Idempotency-Key is remembered this long, or for the job's life if that is longer."""
    owner_limit: int = 50
    """Jobs of one owner that run at once; 0: no limit."""
    job_timeout: float = 3600.0
    """From first start to end; 0: no limit. A submission may ask for less or more."""
    max_attempts: int = 3
    max_crashes: int = 3
    """Workers a job may bring down in a row before it is `failed: poisoned`."""
    max_events: int = 200_000
    max_bytes: int = 64 * 1024 * 1024
    """Budgets of one job's log, enforced in the append script."""
    max_event_bytes: int = 1024 * 1024
    """The most that one event may hold."""
    retry_base: float = 1.0
    retry_cap: float = 300.0
    crash_base: float = 1.0
    crash_cap: float = 60.0

    # --- feeds
    feed_cap: int = 200_000
    feed_bytes: int = 4096
    owner_feed_cap: int = 10_000
    owner_feed_ttl: float = 7 * 86400.0
    owner_feed_bytes: int = 2048

    # --- worker
    concurrency: int = 200
    """Jobs that one worker process runs at once."""
    priority_weights: tuple[int, int, int] = (8, 4, 1)
    """Shares of takes that begin with high, default and low."""
    lease: float = 15.0
    """A worker that is silent this long loses its jobs."""
    sweep_interval: float = 1.0
    take_block: float = 1.0
    drain_grace: float = 20.0
    coalesce_interval: float = 0.02
    coalesce_bytes: int = 1024
    recorder_bytes: int = 256 * 1024
    """What one job may have waiting for Redis before reading from its provider stops."""
    inline_bytes: int = 16 * 1024
    worker_ttl: float = 30.0

    # --- chat and tools
    default_model: str = ""
    max_rounds: int = 10
    max_tool_calls: int = 16
    """Tool calls in one round; more are answered with an error that the model sees."""
    tool_timeout: float = 10.0
    max_tool_output: int = 64 * 1024
    files_root: str = ""
    """The folder that `read_file` and `list_files` may see; empty: they are not offered."""

    # --- providers
    provider: str = ""
    """`openai` or `anthropic`, for models named without one; empty: whichever has a key."""
    openai_base_url: str = "https://api.openai.com/v1"
    openai_api_key: str = ""
    anthropic_base_url: str = "https://api.anthropic.com"
    anthropic_api_key: str = ""
    provider_connect_timeout: float = 10.0
    provider_first_byte_timeout: float = 60.0
    provider_idle_timeout: float = 60.0
    provider_total_timeout: float = 900.0
    provider_attempts: int = 4
    """Tries of one turn's request while nothing of its answer has been seen."""
    provider_max_retry_after: float = 60.0
    provider_connections: int = 1000
    provider_max_bytes: int = 16 * 1024 * 1024
    """The most that is read of one response."""

    # --- gateway
    host: str = "127.0.0.1"
    port: int = 8400
    ops_port: int = 0
    """Probes and metrics on a port of their own; 0: on the API's port."""
    max_body: int = 1024 * 1024
    max_wait: float = 60.0
    """The most that `Prefer: wait` or `?wait=` may ask for."""
    flush_interval: float = 0.04
    ring_bytes: int = 256 * 1024
    heartbeat_interval: float = 15.0
    send_timeout: float = 30.0
    send_buffer: int = 64 * 1024
    position_interval: float = 5.0
    max_connection_age: float = 1800.0
    ready_timeout: float = 0.0
    """`/readyz` turns false when Redis has been away this long; 0: an outage does not take gateways out."""
    page_events: int = 500
    page_bytes: int = 256 * 1024

    # --- logs
    log_level: str = "info"
    log_format: str = "auto"
    """`json`, `console`, or `auto`: console on a terminal."""


FIELDS = Settings.__struct_fields__


def load_settings(
    env: Mapping[str, str] | None = None, file: Path | None = None, **overrides: Any
) -> Settings:
    """Read settings from `file`, then `env` (the process's own by default), then `overrides` that are not None.

    Raises `ConfigError` that names the setting, and the one that was probably meant.
    """
    values: dict[str, Any] = {}
    if file is not None:
        values |= _from_file(file)
    values |= _from_env(os.environ if env is None else env)
    values |= {name: value for name, value in overrides.items() if value is not None}
    for name in values:
        _require_known(name)
    try:
        settings = msgspec.convert(values, Settings, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"setting {_path_of(error)}") from error
    _check(settings)
    return settings


def _from_file(file: Path) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"settings file {file}: {error}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"settings file {file}: expected names and values")
    return {str(name): value for name, value in loaded.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]


def _from_env(env: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for variable, text in env.items():
        if variable.startswith(PREFIX):
            name = variable[len(PREFIX) :].lower()
            values[name] = _split(text) if name in {"queues", "priority_weights"} else text
    for name in ("openai_api_key", "anthropic_api_key"):
        if name not in values and env.get(name.upper()):
            values[name] = env[name.upper()]
    return values


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _require_known(name: str) -> None:
    if name in FIELDS:
        return
    close = difflib.get_close_matches(name, FIELDS, n=1)
    raise ConfigError(f"unknown setting {name!r}" + (f", did you mean {close[0]!r}?" if close else ""))


def _path_of(error: msgspec.ValidationError) -> str:
    message, _, path = str(error).partition(" - at `$.")
    return f"{path.rstrip('`')!r}: {message}" if path else message


def _check(settings: Settings) -> None:
    for name in (
        "lease",
        "sweep_interval",
        "redis_timeout",
        "flush_interval",
        "heartbeat_interval",
        "send_timeout",
    ):
        if getattr(settings, name) <= 0:
            raise ConfigError(f"setting {name!r}: must be more than 0")
    for name in ("partitions", "concurrency", "max_attempts", "page_events", "max_body"):
        if getattr(settings, name) < 1:
            raise ConfigError(f"setting {name!r}: must be at least 1")
    if not settings.queues:
        raise ConfigError("setting 'queues': at least one queue")
    if sum(settings.priority_weights) < 1 or min(settings.priority_weights) < 0:
        raise ConfigError("setting 'priority_weights': three weights of 0 or more, not all 0")
    if settings.provider not in {"", "openai", "anthropic"}:
        raise ConfigError("setting 'provider': openai or anthropic")
