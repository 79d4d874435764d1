"""Structured logs, set up once by the CLI.

Rule 1: one record, one line, one write: processes may share standard error. JSON unless a person reads along
on a terminal. That holds for what others write with the standard library as well.
Rule 2: never prompts, answers, tool arguments or keys: values of fields that sound like secrets are hidden,
and whatever `redaction` knows for one.
Rule 3: what others chose (names, errors of tools and providers) cannot end a line or steer a terminal.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

from streamjobs import redaction
from streamjobs.config import Settings, secrets_of
from streamjobs.errors import ConfigError

_SECRET = re.compile(r"authorization|cookie|token|api[_-]?key|secret|password", re.IGNORECASE)
_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}
_Record = MutableMapping[str, Any]


def set_up_logs(settings: Settings) -> None:
    """Send our logs, and the standard library's, to standard error, without the secrets of these settings.

    Raises `ConfigError` for an unknown level or format.
    """
    level = _LEVELS.get(settings.log_level.lower())
    if level is None:
        raise ConfigError(f"setting 'log_level': one of {', '.join(_LEVELS)}")
    if settings.log_format not in {"auto", "json", "console"}:
        raise ConfigError("setting 'log_format': auto, json or console")
    redaction.learn(secrets_of(settings))
    as_json = settings.log_format == "json" or (settings.log_format == "auto" and not sys.stderr.isatty())
    gather: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _hide_secrets,
    ]
    as_text: list[Any] = [_printable, structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
    # JSONRenderer writes ASCII: whatever might end a line is escaped
    render: list[Any] = [structlog.processors.JSONRenderer()] if as_json else as_text
    write: list[Any] = [structlog.processors.format_exc_info, *render, _redacted]
    structlog.configure(
        processors=[*gather, *write],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    _set_up_others(max(level, logging.WARNING), gather, write)


def _set_up_others(level: int, gather: list[Any], write: list[Any]) -> None:
    """Have the records of other libraries, and Python's warnings, look like ours."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *gather],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *write],
        )
    )
    logging.basicConfig(handlers=[handler], level=level)
    logging.captureWarnings(True)


def _hide_secrets(_logger: Any, _method: str, record: _Record) -> _Record:
    for name in record:
        if _SECRET.search(name):
            record[name] = redaction.HIDDEN
    return record


def _printable(_logger: Any, _method: str, record: _Record) -> _Record:
    """Strings as a terminal may show them; the lines of a traceback stay lines."""
    for name, value in record.items():
        if isinstance(value, str):
            lines = value.split("\n") if name == "exception" else [value]
            record[name] = "\n".join(map(_escaped, lines))
    return record


def _escaped(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _redacted(_logger: Any, _method: str, line: str) -> str:
    return redaction.redacted(line)
