"""Structured logs, set up once by the CLI.

Rule 1: one record, one line, one write: processes may share standard error. JSON unless a person reads along
on a terminal.
Rule 2: never prompts, answers, tool arguments or keys: values of fields that sound like secrets are hidden.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

from streamjobs.config import Settings
from streamjobs.errors import ConfigError

_SECRET = re.compile(r"authorization|cookie|token|api[_-]?key|secret|password", re.IGNORECASE)
_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}


def set_up_logs(settings: Settings) -> None:
    """Send our logs, and the standard library's, to standard error.

    Raises `ConfigError` for an unknown level or format.
    """
    level = _LEVELS.get(settings.log_level.lower())
    if level is None:
        raise ConfigError(f"setting 'log_level': one of {', '.join(_LEVELS)}")
    if settings.log_format not in {"auto", "json", "console"}:
        raise ConfigError("setting 'log_format': auto, json or console")
    as_json = settings.log_format == "json" or (settings.log_format == "auto" and not sys.stderr.isatty())
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _hide_secrets,
    ]
    last: list[Any] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if as_json
        # a plain traceback: a rich one prints locals, and with them keys and prompts
        else [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
    )
    structlog.configure(
        processors=[*shared, *last],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(
        stream=sys.stderr, level=max(level, logging.WARNING), format="%(levelname)s %(name)s %(message)s"
    )


def _hide_secrets(_logger: Any, _method: str, record: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for name in record:
        if _SECRET.search(name):
            record[name] = "hidden"
    return record
