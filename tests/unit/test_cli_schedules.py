"""How schedules look on a terminal."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from streamjobs.cli import schedules as module
from streamjobs.cli.main import cli
from streamjobs.cli.schedules import schedules

COMMANDS = ["create", "delete", "list", "pause", "resume", "show", "trigger"]
RECORD: dict[str, Any] = {
    "id": "s0-x", "name": "nightly", "kind": "report", "cron": "0 3 * * *", "timezone": "Europe/Berlin",
    "missed": "skip", "overlap": "allow", "paused": False, "next_ms": 1_760_000_000_000, "runs": 3,
    "skipped": 1, "error": "", "last_tick_ms": None, "last_job": "", "declared_by": "", "declared_ms": None,
    "coming_ms": [1_760_000_000_000],
}  # fmt: skip


def test_these_are_the_commands():
    """A command that was renamed breaks scripts; one that is not listed here has no test of its help."""
    assert sorted(schedules.commands) == COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_teaches(name: str):
    """Somebody in front of a terminal at night would have to go and find the documentation."""
    shown = CliRunner().invoke(cli, ["schedules", name, "--help"])
    assert shown.exit_code == 0
    examples = re.findall(rf"streamjobs schedules {name}\b.*", shown.output.partition("\n\n")[2])
    assert examples, "an example to copy"
    given = schedules.commands[name].params
    assert {word for line in examples for word in re.findall(r"--[a-z]+", line.partition("|")[0])} <= {
        option for parameter in given for option in parameter.opts
    }
    assert [p.name for p in given if isinstance(p, click.Option) and not p.help] == []


def test_the_guide_works():
    """What is copied from the guide would be refused."""
    guide = (Path(__file__).parents[2] / "docs" / "schedules.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", guide, re.MULTILINE | re.DOTALL)
    namespace: dict[str, Any] = {"__name__": "guide"}
    exec(compile(code, "schedules.md", "exec"), namespace)
    assert set(namespace["app"].schedules) == {"nightly", "pulse"}
    lines = re.findall(r"^streamjobs schedules (.*)", guide, re.MULTILINE)
    assert {shlex.split(line)[0] for line in lines} == set(COMMANDS)
    for name, *words in map(shlex.split, lines):
        with click.Context(schedules.commands[name]) as context:
            schedules.commands[name].make_parser(context).parse_args(words)


def show(capsys: pytest.CaptureFixture[str], **changes: Any) -> str:
    module._print_one(RECORD | changes)  # pyright: ignore[reportPrivateUsage]
    return capsys.readouterr().out


def test_what_goes_wrong_is_seen(capsys: pytest.CaptureFixture[str]):
    """A schedule whose every tick fails would look like one that works."""
    shown = show(capsys, error="queue: 'slow' is not one of default")
    assert "failing" in shown and "queue: 'slow'" in shown
    assert "active" in show(capsys)


def test_who_declared_it_is_seen(capsys: pytest.CaptureFixture[str]):
    """A schedule that the code forgot could not be told from one that it declares each day."""
    shown = show(capsys, declared_by="reports", declared_ms=1_760_000_000_000)
    assert "declared by reports, 2025-10-09 10:53:20+02:00" in shown


def test_names_do_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]):
    """A name from a stranger would clear the operator's screen."""
    assert "\x1b" not in show(capsys, name="a\x1b[2Jb")


def test_intervals(capsys: pytest.CaptureFixture[str]):
    """Cron and interval would look alike."""
    record = RECORD | {"every": 90.0, "offset": 5.0}
    del record["cron"], record["timezone"]
    module._print_one(record)  # pyright: ignore[reportPrivateUsage]
    shown = capsys.readouterr().out
    assert "every 90 s + 5 s" in shown and "2025-10-09 08:53:20+00:00" in shown


def test_a_zone_that_this_machine_does_not_know(capsys: pytest.CaptureFixture[str]):
    """Somebody with an old machine could not look at a schedule at all."""
    assert "2025-10-09 08:53:20+00:00" in show(capsys, timezone="Mars/Olympus")
