"""The command line: help that teaches, errors of one line, output that can be piped, and a start that
nobody notices."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import httpx
import msgspec
import pytest
import zstandard
from click.testing import CliRunner

from streamjobs.cli import options
from streamjobs.cli.doctor import print_report
from streamjobs.cli.main import cli
from streamjobs.cli.output import printable
from streamjobs.cli.show import Screen
from streamjobs.client import WatchedEvent
from streamjobs.client.client import Client
from streamjobs.config import Settings
from streamjobs.errors import StreamjobsError
from streamjobs.store.doctor import CHECKS, Report, Violation

COMMANDS = [
    "approve", "canary", "cancel", "dead", "delete", "demo", "deny", "dev", "doctor", "effects", "export",
    "keys", "list", "log", "notifications", "pause", "projections", "projector", "provider", "queues",
    "rerun", "result", "resume", "schedules", "serve", "signal", "stats", "status", "strike", "strikes",
    "submit", "unstrike", "watch", "webhooks", "worker", "workers",
]  # fmt: skip
HEAVY = [
    "starlette",
    "aiohttp",
    "uvicorn",
    "redis",
    "httpx",
    "rich",
    "structlog",
    "yaml",
    "msgspec",
    "prometheus_client",
]
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("STREAMJOBS_")}
NOBODY = "http://127.0.0.1:9"


def streamjobs(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "streamjobs", *arguments],
        capture_output=True, text=True, timeout=30, env=CLEAN | env, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip


def one_line(run: subprocess.CompletedProcess[str]) -> str:
    """The error, which must be all there is."""
    assert run.stdout == ""
    lines = run.stderr.splitlines()
    assert len(lines) == 1, run.stderr
    assert lines[0].startswith("streamjobs: ")
    return lines[0]


# --- help


def test_these_are_the_commands():
    """A command that was renamed breaks scripts; one that is not listed here has no test of its help."""
    assert sorted(name for name, command in cli.commands.items() if not command.hidden) == COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_teaches(name: str):
    """Somebody in front of a terminal at night would have to go and find the documentation."""
    shown = CliRunner().invoke(cli, [name, "--help"])
    assert shown.exit_code == 0
    assert re.search(rf"^  +(\w+=\S+ )?streamjobs {name}\b", shown.output, re.MULTILINE), "an example to copy"
    command = cli.commands[name]
    unexplained = [p.name for p in command.params if isinstance(p, click.Option) and not p.help]
    assert unexplained == []
    assert command.help
    assert len(command.get_short_help_str(limit=200)) > 15


def test_examples_are_commands_that_exist():
    """What is copied from the help would be answered with `no such option`."""
    for name in COMMANDS:
        lines = [line.strip() for line in (cli.commands[name].help or "").splitlines()]
        for line in (line for line in lines if line.startswith("streamjobs ")):
            words = line.split("   ")[0].split(" | ")[0].split()
            command = cli.commands[words[1]]
            known = {option for parameter in command.params for option in parameter.opts}
            assert {word for word in words if word.startswith("--")} <= known, line


def test_the_first_help_says_what_to_try():
    """The way from an installation to a running job would lead over a search engine."""
    shown = CliRunner().invoke(cli, ["--help"]).output
    assert "streamjobs demo" in shown
    assert "streamjobs dev" in shown
    assert "streamjobs submit" in shown


@pytest.mark.parametrize(
    "arguments", [["--help"], ["submit", "--help"], ["serve", "--help"], ["doctor", "-h"], ["--version"]]
)
def test_help_loads_nothing_heavy(arguments: list[str]):
    """Every completion and every --help would take half a second."""
    code = (
        "import sys\nsys.argv = ['streamjobs', *sys.argv[1:]]\nfrom streamjobs.cli import main\n"
        f"try: main()\nfinally: print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=CLEAN, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr.strip() == "[]"
    assert run.stdout


# --- errors


def test_a_typo_in_a_setting_is_answered_in_one_line():
    """A traceback of forty lines hides the one word that matters."""
    said = one_line(run := streamjobs("worker", "--redis-url", "redis://nowhere", "--set", "leese=3"))
    assert run.returncode == 1
    assert "unknown setting 'leese', did you mean 'lease'?" in said
    said = one_line(run := streamjobs("dev", STREAMJOBS_CONCURENCY="3"))
    assert run.returncode == 1
    assert "did you mean 'concurrency'?" in said


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["serve"], 1, "where is Redis?"),
        (["doctor"], 1, "where is Redis?"),
        (["worker", "--set", "lease"], 1, "NAME=VALUE"),
        (["worker", "--set", "lease=soon"], 1, "'lease'"),
        (["worker", "--config", "/nowhere.yaml"], 1, "/nowhere.yaml"),
        (["worker", "--redis-url", "http://x"], 1, "redis_url"),
        (["worker", "--redis-url", "redis://127.0.0.1:9"], 1, "Redis cannot be reached"),
        (["doctor", "--redis-url", "redis://127.0.0.1:9", "--json"], 1, "Redis cannot be reached"),
        (["worker", "--redis-url", "redis://x", "--queue", "nope"], 2, "not a declared queue: nope"),
        (["worker", "--redis-url", "redis://x", "no.such.module:app"], 1, "no.such.module"),
        (["status", "j0-x", "--url", NOBODY], 1, "no answer from"),
        (["status", "j0-x", "--url", "http://x:port"], 1, "not an address"),
        (["status", "j0-x", "--url", "nonsense"], 1, "no answer from"),
        (["submit", "--input", "{", "--url", NOBODY], 1, "--input is not JSON"),
        (["submit", "--input", '"\\ud800"', "--url", NOBODY], 1, "--input is not JSON"),
        (["provider", "--scenario", "/nowhere.yaml"], 1, "/nowhere.yaml"),
        (["status"], 2, "Missing argument 'JOB_ID' (see"),
        (["statsu"], 2, "statsu"),
        (["submit", "--priority", "highest"], 2, "'highest' is not one of 'high', 'default', 'low'"),
        (["rerun"], 2, "either job ids, or --dead"),
        (["rerun", "j0-x", "--dead"], 2, "either job ids, or --dead"),
        (["rerun", "--dead"], 2, "--dead wants a filter, or --all"),
        (["rerun", "j0-x", "--kind", "work"], 2, "filters go with --dead"),
        (["strike", "planet", "earth"], 2, "'planet' is not one of 'queue', 'kind', 'tool'"),
        (["submit", "--watch", "--wait"], 2, "either --watch or --wait"),
        (["signal", "j0-x", "go", "--payload", "{"], 1, "--payload is not JSON"),
        (["pause", "j0-x", "--url", NOBODY], 1, "no answer from"),
        (["serve", "--port", "many"], 2, "'many' is not a valid integer"),
        (["--nope"], 2, "--nope"),
    ],
)  # fmt: skip
def test_an_error_is_one_line_and_an_exit_status(arguments: list[str], status: int, words: str):
    """A script cannot tell wrong use from a failure, and a person cannot find the reason."""
    run = streamjobs(*arguments)
    assert words in one_line(run)
    assert run.returncode == status
    assert "Traceback" not in run.stderr


def test_debug_shows_where_it_happened():
    """A bug could be reported without the one thing that helps to find it."""
    run = streamjobs("--debug", "worker", "--set", "leese=3")
    assert "Traceback" in run.stderr
    assert run.returncode != 0


def test_without_a_command_there_is_help():
    """`streamjobs` alone would be answered with an error."""
    run = streamjobs()
    assert "Usage:" in run.stderr + run.stdout
    assert "Commands:" in run.stderr + run.stdout


def test_a_reader_that_leaves_is_no_error():
    """`streamjobs … | head` would end in a traceback."""
    read, write = os.pipe()
    os.close(read)
    run = subprocess.run(
        [sys.executable, "-m", "streamjobs", "--help"],
        stdout=write,
        stderr=subprocess.PIPE,
        env=CLEAN,
        check=False,
    )
    os.close(write)
    assert b"Traceback" not in run.stderr


# --- what commands print


VIEW = {
    "id": "j0-x",
    "kind": "chat",
    "status": "failed",
    "attempt": 2,
    "cursor": "9-7",
    "text": "Hello\x1b[2J",
    "tool_calls": [{"tool": "list_files", "state": "completed"}],
    "error": {"code": "timeout", "message": "too long"},
}


class Gateway:
    """Answers a client without a network; keeps what it was sent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.requests: list[httpx.Request] = []
        self.events: list[bytes] = []
        made = Client.__init__

        def make(client: Client, *arguments: Any, **options: Any) -> None:
            made(client, *arguments, **options)
            client._http = httpx.AsyncClient(
                base_url="http://gateway", transport=httpx.MockTransport(self.answer)
            )  # pyright: ignore

        monkeypatch.setattr(Client, "__init__", make)
        monkeypatch.setattr(options, "run", asyncio.run)

    def answer(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        if request.url.path.endswith("/events"):
            return httpx.Response(200, content=b"".join(self.events))
        if request.url.path.endswith("/cancel"):
            return httpx.Response(200, json={"id": "j0-x", "cancel_requested": True})
        if request.method == "POST":
            return httpx.Response(
                202, json={"id": "j0-x", "kind": "chat", "status": "queued", "cursor": "1-7"}
            )
        if request.url.path.endswith("/gone"):
            return httpx.Response(404, json={"code": "not_found", "detail": "no such job"})
        return httpx.Response(200, json=VIEW)

    @property
    def body(self) -> Any:
        return json.loads(self.requests[0].content)


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Gateway:
    return Gateway(monkeypatch)


def invoke(*arguments: str, stdin: str = "") -> str:
    result = CliRunner().invoke(cli, arguments, input=stdin, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_submit_sends_what_was_typed(gateway: Gateway):
    """A job would run with another model, without its tools, or twice."""
    out = invoke(
        "submit",
        "--prompt",
        "Hi",
        "--tool",
        "a",
        "--tool",
        "b",
        "--model",
        "m",
        "--priority",
        "low",
        "--key",
        "k1",
    )
    assert out == "j0-x\n"
    assert gateway.body == {
        "kind": "chat",
        "input": {"prompt": "Hi", "model": "m", "tools": ["a", "b"]},
        "priority": "low",
    }
    assert gateway.requests[0].headers["idempotency-key"] == "k1"


def test_input_comes_from_the_argument_or_standard_input(gateway: Gateway):
    """Anything larger than a command line could not be submitted."""
    invoke("submit", "review", "--input", '{"path": "src"}')
    invoke("submit", "review", "--input", "-", stdin='{"path": "src"}')
    bodies = [json.loads(request.content) for request in gateway.requests]
    assert bodies == [{"kind": "review", "input": {"path": "src"}}] * 2


@pytest.mark.parametrize("arguments", [["submit", "--prompt", "Hi"], ["status", "j0-x"], ["cancel", "j0-x"]])
def test_json_output_is_one_value(gateway: Gateway, arguments: list[str]):
    """`streamjobs status … --json | jq` is how everybody else builds on this."""
    assert json.loads(invoke(*arguments, "--json"))["id"] == "j0-x"


def frame(seq: int, event: str, /, **data: Any) -> bytes:
    return f"id: {seq}-7\nevent: {event}\ndata: {json.dumps({'ts': 1, **data})}\n\n".encode()


STREAM = [
    frame(1, "job.queued", kind="chat"),
    frame(2, "job.started", attempt=1, worker="w"),
    frame(3, "text.delta", turn=1, text="Hel"),
    frame(4, "text.delta", turn=1, text="lo"),
    frame(5, "tool.called", call_id="c", tool="t", arguments={"a": 1}),
]


def test_watch_prints_events_as_json_lines(gateway: Gateway):
    """A script that follows a job needs a line for each event, with its id to come back to."""
    gateway.events = [*STREAM, frame(6, "job.completed", result={"text": "Hello"})]
    lines = [json.loads(line) for line in invoke("watch", "j0-x", "--after", "0", "--json").splitlines()]
    assert [line["id"] for line in lines] == [f"{n}-7" for n in range(1, 7)]
    assert lines[2] == {"id": "3-7", "type": "text.delta", "data": {"ts": 1, "turn": 1, "text": "Hel"}}


def test_watch_shows_text_as_it_streams(gateway: Gateway):
    """Each token would stand on a line of its own."""
    gateway.events = [*STREAM, frame(6, "job.completed", result={"text": "Hello"})]
    shown = invoke("watch", "j0-x")
    assert "Hello\n" in shown
    assert "t(a=1)" in shown


@pytest.mark.parametrize(("end", "status"), [("job.completed", 0), ("job.failed", 2), ("job.cancelled", 2)])
def test_watch_ends_as_its_job_did(gateway: Gateway, end: str, status: int):
    """A deployment script would go on after a job that failed."""
    gateway.events = [*STREAM, frame(6, end, error={"code": "e", "message": "m"})]
    assert CliRunner().invoke(cli, ["watch", "j0-x"]).exit_code == status


@pytest.mark.parametrize(("now", "status"), [("completed", 0), ("failed", 2)])
def test_watching_what_has_ended_says_how(gateway: Gateway, now: str, status: int):
    """A snapshot of a failed job would count as success."""
    gateway.events = [f"id: 6-7\nevent: snapshot\ndata: {json.dumps({'status': now})}\n\n".encode()]
    gateway_answer = gateway.answer

    def once(request: httpx.Request) -> httpx.Response:
        is_second = any(r.url.path.endswith("/events") for r in gateway.requests)
        return (
            httpx.Response(204)
            if request.url.path.endswith("/events") and is_second
            else gateway_answer(request)
        )

    gateway.answer = once  # type: ignore[method-assign]
    assert CliRunner().invoke(cli, ["watch", "j0-x"]).exit_code == status


def test_submit_and_watch_in_one(gateway: Gateway):
    """The first thing anybody tries."""
    gateway.events = [*STREAM, frame(6, "job.failed", error={"code": "e", "message": "m"})]
    result = CliRunner().invoke(cli, ["submit", "--prompt", "Hi", "--watch"])
    assert result.exit_code == 2
    assert result.output.startswith("j0-x\n")
    assert "e: m" in result.output


def test_status_tells_the_whole_story_in_a_few_lines(gateway: Gateway):
    """Where it is, what it called, what it said, why it failed."""
    shown = invoke("status", "j0-x")
    assert "failed" in shown
    assert "list_files  completed" in shown
    assert "timeout: too long" in shown


def test_a_models_words_do_not_steer_the_terminal(gateway: Gateway):
    """An answer, or a file that a tool read, could clear the screen, or write what looks like our own
    output."""
    assert "\x1b" not in invoke("status", "j0-x")
    assert printable("a\x1b[31mb\x07\x9b0m\r\n\tc") == "a\ufffd[31mb\ufffd\ufffd0m\ufffd\n\tc"
    gateway.events = [
        frame(1, "text.delta", turn=1, text="\x1b]0;owned\x07"),
        frame(2, "job.log", message="\x1b[2J"),
        frame(3, "job.completed"),
    ]
    assert "\x1b" not in invoke("watch", "j0-x", "--after", "0")


@pytest.mark.parametrize(
    "kind", ["x.mine", "job.new_in_a_later_release", "turn.completed", "reset", "error", "snapshot"]
)
def test_a_sparse_or_unknown_event_is_shown(kind: str, capsys: pytest.CaptureFixture[str]):
    """Watching a job of a newer release would end in a KeyError."""
    data = {"turn": 1, "status": "running"}
    Screen().show(WatchedEvent("3-7", kind, msgspec.json.encode(data)))
    assert kind in capsys.readouterr().out


def test_the_doctors_report_is_read_at_a_glance(capsys: pytest.CaptureFixture[str]):
    """Twenty thousand lines of violations would scroll the first one away."""
    report = Report(
        jobs=3, violations=[Violation("one_place", f"j{n}", "nowhere") for n in range(30)], notes=["n"]
    )
    print_report(report)
    out = click.unstyle(capsys.readouterr().out)
    assert re.search(r"^  FAILED  one_place  ", out, re.MULTILINE)
    assert out.count("  ok      ") == len(CHECKS) - 1
    assert "and 10 more" in out
    assert "30 violations" in out


# --- settings from options


def test_options_win_over_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """What was just typed would be ignored."""
    monkeypatch.setattr("streamjobs.logs.set_up_logs", lambda _settings: None)
    monkeypatch.setenv("STREAMJOBS_LEASE", "7")
    monkeypatch.setenv("STREAMJOBS_REDIS_URL", "redis://variable")
    file = tmp_path / "s.yaml"
    file.write_text("max_rounds: 3\nlease: 1\n")
    settings = options.read_settings(None, file, ("concurrency=5", "queues=a,b"), port=None)
    assert (settings.lease, settings.max_rounds, settings.concurrency, settings.queues) == (
        7.0,
        3,
        5,
        ("a", "b"),
    )
    assert settings.redis_url == "redis://variable"
    assert settings.port == Settings().port
    assert options.read_settings("redis://option", None, ()).redis_url == "redis://option"


def test_export_writes_the_log_to_the_output_or_a_file(
    gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A log that was taken away would lack its end, or a broken one would stand where the whole one was."""
    gateway.events = [b'{"id":"1-7"}\n', b'{"id":"2-7"}\n']
    whole = b"".join(gateway.events)
    assert invoke("export", "j0-x").encode() == whole
    assert gateway.requests[0].headers["accept"] == "application/x-ndjson"
    plain, packed = tmp_path / "a.jsonl", tmp_path / "a.jsonl.zst"
    invoke("export", "j0-x", "-o", str(plain))
    invoke("export", "j0-x", "-o", str(packed))
    assert plain.read_bytes() == whole
    assert unpacked(packed.read_bytes()) == whole
    invoke("export", "j0-x", "-o", str(plain), "--format", "zst")
    assert unpacked(plain.read_bytes()) == whole
    monkeypatch.setattr(gateway, "answer", lambda _: httpx.Response(404, json={"detail": "no such job"}))
    with pytest.raises(StreamjobsError, match="no such job"):
        invoke("export", "j0-x", "-o", str(packed))
    assert unpacked(packed.read_bytes()) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "a.jsonl.zst"]


def unpacked(content: bytes) -> bytes:
    return zstandard.ZstdDecompressor().decompressobj().decompress(content)
