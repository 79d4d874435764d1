"""One record, one line: whatever others choose as names, ids and errors."""

from __future__ import annotations

import io
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import structlog

from streamjobs import redaction
from streamjobs.config import Settings
from streamjobs.errors import ConfigError
from streamjobs.logs import set_up_logs

HOSTILE = {
    "CR LF": 'x\r\n{"event": "forged", "level": "error"}',
    "LF": "x\nforged",
    "CR": "x\rforged",
    "U+2028": "x\u2028forged\u2029",
    "NEL, VT, FF": "x\x85f\x0bf\x0cf\x1cf\x1ef",
    "ANSI": "\x1b[31mred\x1b[0m\x1b]0;title\x07\x9b2J",
    "NUL": "x\x00y",
    "lone surrogate": "x\ud800y\udfff",
    "bidi": "x\u202etxt.exe\u2066",
    "DEL, BS": "x\x7f\x08\x08\x08",
    "quotes": "\"'\\\\\" ' \\n",
}

STEERING = set("\r\x1b\x07\x9b\x00\x08\x7f\u2028\u202e\x85\x0b")


class Output(io.TextIOWrapper):
    """Standard error, as it is in a process: UTF-8, and nothing that raises."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8", errors="backslashreplace", write_through=True)
        self.before: list[logging.Handler] = []

    def take_logs(self, **settings: Any) -> None:
        """Have what is logged from now on written here."""
        self.before = logging.getLogger().handlers[:]
        logging.getLogger().handlers[:] = []
        with mock.patch.object(sys, "stderr", self):
            set_up_logs(Settings(**settings))

    def lines(self) -> list[bytes]:
        assert isinstance(self.buffer, io.BytesIO)
        text = self.buffer.getvalue()
        assert text.endswith(b"\n")
        return text[:-1].split(b"\n")


@pytest.fixture
def output() -> Iterator[Output]:
    made = Output()
    root = logging.getLogger()
    level, known = root.level, set(redaction._known)
    yield made
    logging.captureWarnings(False)
    root.handlers[:] = made.before
    root.setLevel(level)
    structlog.reset_defaults()
    redaction._known.clear()
    redaction.learn(known)


def record_of(output: Output) -> dict[str, Any]:
    """The only record, read as strictly as the most simple-minded of shippers does."""
    (line,) = output.lines()
    assert line.isascii()
    assert len(line.decode().splitlines()) == 1
    return json.loads(line)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_value_stays_within_its_record(output: Output, name: str):
    """Anybody who may submit a job could write lines into the log, in the name of any component."""
    output.take_logs(log_format="json")
    text = HOSTILE[name]
    log = structlog.get_logger("test")
    log.warning("job.failed", owner=text, error=ValueError(text), nested={text: [text]})
    record = record_of(output)
    assert record["owner"] == text
    assert record["event"] == "job.failed"
    assert record["level"] == "warning"


@pytest.mark.parametrize("name", HOSTILE)
def test_a_traceback_is_one_line(output: Output, name: str):
    """The message of a tool's exception is chosen by whoever the tool talked to."""
    output.take_logs(log_format="json")
    try:
        raise RuntimeError(HOSTILE[name])
    except RuntimeError:
        structlog.get_logger("test").exception(HOSTILE[name], job_id=HOSTILE[name])
    record = record_of(output)
    assert "RuntimeError" in record["exception"]
    assert record["event"] == HOSTILE[name]


@pytest.mark.parametrize("name", HOSTILE)
def test_records_of_other_libraries_are_lines_too(output: Output, name: str):
    """asyncio's `Task exception was never retrieved` is twenty lines, and its text is the exception's."""
    output.take_logs(log_format="json")
    try:
        raise RuntimeError(HOSTILE[name])
    except RuntimeError:
        logging.getLogger("asyncio").exception("Task %s was never retrieved", HOSTILE[name])
    record = record_of(output)
    assert (record["logger"], record["level"]) == ("asyncio", "error")
    assert record["event"] == f"Task {HOSTILE[name]} was never retrieved"
    assert "RuntimeError" in record["exception"]


def test_warnings_of_python_are_lines_too(output: Output):
    """A library's deprecation would break what reads the log."""
    output.take_logs(log_format="json")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        warnings.warn("old\nthing", UserWarning, stacklevel=1)
    assert "old\nthing" in record_of(output)["event"]


@pytest.mark.parametrize("name", HOSTILE)
def test_on_a_terminal_nothing_is_steered(output: Output, name: str):
    """A job's owner could clear the operator's screen, or hide what was written before."""
    output.take_logs(log_format="console")
    text = HOSTILE[name]
    structlog.get_logger("test").warning(text, owner=text, nested=[text])
    logging.getLogger("other").warning("%s", text)
    for line in output.lines():
        assert not set(line.decode(errors="backslashreplace")) & set(
            "\r\x1b\x07\x9b\x00\x08\x7f\u2028\u202e\x85\x0b"
        )
    assert len(output.lines()) == 2


def test_a_traceback_on_a_terminal_is_many_lines_of_which_none_steers(output: Output):
    """Somebody who debugs wants to read it; the exception's text is still a stranger's."""
    output.take_logs(log_format="console")
    try:
        raise RuntimeError("\x1b[2J\r")
    except RuntimeError:
        structlog.get_logger("test").exception("failed")
    assert len(output.lines()) > 3
    assert not set(b"\x1b\r") & set(b"".join(output.lines()))


def test_secrets_are_hidden_by_name_by_look_and_by_value(output: Output):
    """Logs are shipped to places, and read by people, that must not have the keys."""
    output.take_logs(
        log_format="json",
        openai_api_key="plainly-the-key",
        redis_url="redis://me:pass%40word@h",
        smtp_url="smtp://u:mailpass@h",
    )
    log = structlog.get_logger("test")
    log.warning("a", authorization="xyz", provider_token="xyz", error="url http://h/?token=xyz1")
    log.warning("b", error="key plainly-the-key", nested={"x": ["pass@word", "pass%40word"]}, mail="mailpass")
    logging.getLogger("redis").warning("cannot use %s", "redis://me:pass%40word@h")
    try:
        raise RuntimeError("plainly-the-key")
    except RuntimeError:
        log.exception("c")
    text = b"\n".join(output.lines())
    for secret in (b"xyz", b"plainly-the-key", b"pass@word", b"pass%40word", b"mailpass"):
        assert secret not in text
    assert text.count(b"[hidden]") >= 8
    assert all(json.loads(line) for line in output.lines())


@pytest.mark.parametrize("wrong", [{"log_level": "loud"}, {"log_format": "xml"}])
def test_a_level_or_format_that_is_none_is_refused(wrong: dict[str, str]):
    """A typo would be found when the log is needed."""
    with pytest.raises(ConfigError, match=f"setting '{next(iter(wrong))}'"):
        set_up_logs(Settings(**wrong))
