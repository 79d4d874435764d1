"""The commands that look, steer and operate: what they send, what they print, and how they end."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from click.testing import CliRunner, Result

from streamjobs.cli import options, output
from streamjobs.cli.control import since_when
from streamjobs.cli.main import cli
from streamjobs.client.client import Client

JOB = "j0-x"
RESULT: dict[str, Any] = {
    "id": JOB, "kind": "work", "status": "completed", "summary": "", "output": "done\x1b[2J",
    "output_artifact": "", "artifacts": [], "metrics": {"steps": 2}, "error": None,
}  # fmt: skip
_TIMES = {"count": 4, "sum": 9.0, "buckets": {"0.5": 2, "1": 3, "5": 3}}
STATS: dict[str, Any] = {
    "kind": "chat", "queue": "bulk", "now": {"queued": 2, "running": 1}, "submitted": 9, "started": 9,
    "completed": 4, "failed": 1, "cancelled": 1, "retries": 3, "crashes": 0, "turns": 4,
    "input_tokens": 70, "output_tokens": 30, "reasoning_tokens": 0, "cached_tokens": 0,
    "wait_seconds": _TIMES, "run_seconds": _TIMES | {"count": 3},
    "first_token_seconds": {"count": 0, "sum": 0.0, "buckets": {"0.5": 0}},
}  # fmt: skip
ANSWERS: dict[str, Any] = {
    "GET /v1/jobs": {"jobs": [{"id": JOB, "kind": "work", "status": "failed", "queue": "bulk",
                               "created_ms": 1_760_000_000_000}], "cursor": "c9"},
    f"GET /v1/jobs/{JOB}/result": RESULT,
    f"GET /v1/jobs/{JOB}/log": {"job": JOB, "cursor": "3-1", "lines": [
        {"cursor": "2-1", "ts": 1_760_000_000_000, "level": "warning", "message": "slow\nly",
         "data": {"ms": 9}},
        {"cursor": "3-1", "ts": 0, "level": "info", "message": "\x1b[31m", "data": None}]},
    f"GET /v1/jobs/{JOB}/effects": {"job": JOB, "cursor": "3-1", "effects": [
        {"kind": "tool", "name": "send", "key": "c1", "state": "unknown", "effect": "once", "attempts": 1,
         "ms": None, "approval": "", "error": {"code": "unknown_outcome", "message": "lost"}}]},
    f"POST /v1/jobs/{JOB}/pause": {"id": JOB, "status": "requested"},
    f"POST /v1/jobs/{JOB}/resume": {"id": JOB, "status": "resumed"},
    f"POST /v1/jobs/{JOB}/signal": {"id": JOB, "signal": "go", "repeated": False},
    f"POST /v1/jobs/{JOB}/rerun": {"id": "j0-y", "kind": "work", "status": "queued"},
    "POST /v1/dead/rerun": {"rerun": [{"from": JOB, "to": "j0-y"}], "count": 1},
    "GET /v1/dead": {"dead": [{"id": JOB, "kind": "work", "owner": "bo", "ended_ms": 1, "attempts": 3,
                               "crashes": 0, "code": "timeout", "message": "too\nlong"}], "cursor": ""},
    "GET /v1/queues": {"queues": [{"name": "bulk", "waiting": 12, "held": 1, "running": 3,
                                   "oldest_wait": 250.0, "struck": True}]},
    "GET /v1/workers": {"workers": [{"id": "w1", "host": "h", "pid": 7, "queues": ["a", "b"], "running": 3,
                                     "concurrency": 400, "processed": 99, "started_ms": 1,
                                     "draining": True}]},
    "GET /v1/strikes": {"strikes": [{"scope": "kind", "name": "work", "by": "olga", "reason": "moving",
                                     "since_ms": 1}]},
    "GET /v1/projections": {"projections": [
        {"name": "index", "notes": 3, "pending": 1, "seconds": 90.0, "consumers": 2, "quarantined": 1,
         "rebuild": "asked", "errors": [{"job": JOB, "error": "Boom: x\ny", "seq": 4, "ts": 1}]}]},
    "POST /v1/projections/index/rebuild": {"projection": "index", "rebuild": "asked"},
    "POST /v1/projections/index/retry": {"projection": "index", "retried": 1},
    "GET /v1/stats": {"stats": [STATS]},
    "PUT /v1/strikes/kind/work": {"changed": True},
    "DELETE /v1/strikes/kind/work": {"changed": False},
    "POST /v1/jobs": {"id": JOB, "kind": "work", "status": "queued", "cursor": "1-7"},
}  # fmt: skip


class Gateway:
    """Answers from a table, without a network; keeps what it was sent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers = dict(ANSWERS)
        self.requests: list[httpx.Request] = []
        made = Client.__init__

        def make(client: Client, *arguments: Any, **named: Any) -> None:
            made(client, *arguments, **named)
            transport = httpx.MockTransport(self.answer)
            client._http = httpx.AsyncClient(base_url="http://gateway", transport=transport)  # pyright: ignore

        monkeypatch.setattr(Client, "__init__", make)
        monkeypatch.setattr(options, "run", asyncio.run)

    def answer(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        return httpx.Response(200, json=self.answers[f"{request.method} {request.url.path}"])

    @property
    def body(self) -> Any:
        return json.loads(self.requests[-1].content or b"null")

    @property
    def query(self) -> dict[str, str]:
        return dict(self.requests[-1].url.params)


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Gateway:
    return Gateway(monkeypatch)


def invoke(*arguments: str, status: int = 0, stdin: str = "") -> Result:
    result = CliRunner().invoke(cli, arguments, input=stdin, catch_exceptions=False)
    assert result.exit_code == status, result.output
    return result


READING = ["list", "queues", "workers", "dead", "strikes", "stats"]
OF_A_JOB = ["log", "effects"]


@pytest.mark.parametrize("words", [[name] for name in READING] + [[name, JOB] for name in OF_A_JOB])
def test_everything_is_readable_by_programs(gateway: Gateway, words: list[str]):
    """`… --json | jq` is how everybody else builds on this."""
    path = f"/v1/jobs/{JOB}/{words[0]}" if len(words) > 1 else f"/v1/{words[0]}"
    answer = gateway.answers["GET /v1/jobs" if words == ["list"] else f"GET {path}"]
    shown = json.loads(invoke(*words, "--json").stdout)
    whole = {"list": [answer], "dead": [answer], "stats": [answer]}
    assert shown in whole.get(words[0], list(answer.values()))


@pytest.mark.parametrize(
    ("words", "header", "row"),
    [
        (["list"], "JOB KIND STATUS QUEUE SUBMITTED", "j0-x work failed bulk 2025-10-"),
        (["queues"], "QUEUE WAITING HELD RUNNING OLDEST WAIT STRUCK", "bulk 12 1 3 4 min struck"),
        (["workers"], "WORKER HOST PID QUEUES RUNNING DONE SINCE STATE", "w1 h 7 a,b 3/400 99 19"),
        (
            ["stats"],
            "KIND QUEUE NEW NOW DONE FAILED CANCELLED RETRIES CRASHES WAIT RUN TOKEN TOKENS",
            "chat bulk 9 3 4 1 1 3 0 0.5s/more 0.5s/1s - 100",
        ),
        (
            ["projections", "list"],
            "PROJECTION BEHIND AGE PROJECTORS QUARANTINED REBUILD",
            "index 3 90.0 s 2 1 asked",
        ),
        (["strikes"], "SCOPE NAME SINCE BY REASON", "kind work 19"),
        (
            ["effects", JOB],
            "KIND NAME KEY STATE EFFECT TRIES MS APPROVAL ERROR",
            "tool send c1 unknown once 1 - - unknown_outcome: lost",
        ),
    ],
)
def test_tables_are_read_at_a_glance(gateway: Gateway, words: list[str], header: str, row: str):
    """Somebody at night would read JSON."""
    lines = [" ".join(line.split()) for line in invoke(*words).stdout.splitlines()]
    assert lines[0] == header
    assert lines[1].startswith(row)


def test_a_row_is_one_line(gateway: Gateway):
    """A message of several lines would break what `awk` and eyes rely on."""
    assert invoke("dead").stdout.splitlines()[1].endswith("timeout  too long")
    assert len(invoke("dead").stdout.splitlines()) == 2
    first, second = invoke("log", JOB).stdout.splitlines()
    assert first.endswith('warning  slow ly  {"ms":9}')
    assert "\x1b" not in second


def test_nothing_to_show_is_said(gateway: Gateway):
    """An empty screen leaves open whether anything was asked at all; a pipe must stay empty."""
    gateway.answers |= {"GET /v1/strikes": {"strikes": []}, "GET /v1/jobs": {"jobs": [], "cursor": ""}}
    for name, words in (("strikes", "nothing is struck"), ("list", "no jobs")):
        shown = invoke(name)
        assert (shown.stdout, shown.stderr) == ("", f"{words}\n")


def test_a_page_says_that_there_is_more(gateway: Gateway):
    """The first twenty would pass for all."""
    assert invoke("list").stderr == "more: --cursor c9\n"
    invoke("list", "--status", "failed", "--kind", "work", "--limit", "5", "--cursor", "c9")
    assert gateway.query == {"status": "failed", "kind": "work", "limit": "5", "cursor": "c9"}


def test_filters_of_a_list_are_sent(gateway: Gateway):
    """A filter that is lost on the way shows everything."""
    counts = {"failed": 2, "queued": 1}
    gateway.answers["GET /v1/jobs"] = {"jobs": [], "counts": counts, "cursor": ""}
    shown = invoke("list", "--thread", "t", "--message", "m", "--queue", "q", "--until", "u", "--counts")
    assert gateway.query == {"thread": "t", "message": "m", "queue": "q", "until": "u", "counts": "1",
                             "limit": "20"}  # fmt: skip
    assert shown.stderr == "no jobs\nfailed 2  queued 1\n"
    invoke("list", "--since", "2h")
    assert gateway.query["since"].startswith("20")


def test_projections_are_looked_after(gateway: Gateway):
    """Somebody at night has to see what is behind, and set it going again."""
    assert invoke("projections", "lag").stdout == "index  3 notes  90.000 s\n"
    lag = json.loads(invoke("projections", "lag", "--json").stdout)
    assert lag == {"index": {"notes": 3, "seconds": 90.0}}
    assert invoke("projections", "list").stderr == f"index  {JOB} at 4: Boom: x y\n"
    assert json.loads(invoke("projections", "list", "--json").stdout)[0]["name"] == "index"
    assert invoke("projections", "rebuild", "index").stdout == "index  a projector will rebuild it\n"
    assert invoke("projections", "retry", "index").stdout == "index  1 jobs are looked at again\n"
    assert json.loads(invoke("projections", "retry", "index", "--json").stdout)["retried"] == 1
    assert json.loads(invoke("projections", "rebuild", "index", "--json").stdout)["rebuild"] == "asked"


def test_statistics_come_in_steps(gateway: Gateway):
    """Whether it has been getting worse could not be seen."""
    gateway.answers["GET /v1/stats"] = {"step": "1h", "history": [
        {"at_ms": 1_760_000_000_000, "stats": [STATS]}]}  # fmt: skip
    header, row = invoke("stats", "--history", "1h", "--kind", "chat").stdout.splitlines()
    assert header.split()[:2] == ["FROM", "KIND"]
    assert row.startswith("2025-10-")
    assert gateway.query == {"history": "1h", "kind": "chat"}
    gateway.answers["GET /v1/stats"] = {"stats": []}
    assert invoke("stats").stderr == "nothing was counted\n"


# --- results


def test_a_result_is_printed_as_it_is(gateway: Gateway):
    """A text would come with quotes around it, and could steer the terminal."""
    assert invoke("result", JOB).stdout == "done\ufffd[2J\n"
    gateway.answers[f"GET /v1/jobs/{JOB}/result"] = RESULT | {"output": {"n": 1}}
    assert invoke("result", JOB).stdout == '{"n":1}\n'
    assert json.loads(invoke("result", JOB, "--json").stdout)["metrics"] == {"steps": 2}


def test_a_large_result_is_fetched(gateway: Gateway):
    """Only small results could be read at a terminal."""
    gateway.answers[f"GET /v1/jobs/{JOB}/result"] = RESULT | {"output": None, "output_artifact": "result"}
    gateway.answers[f"GET /v1/jobs/{JOB}/artifacts/result"] = [1, 2]
    assert invoke("result", JOB).stdout == "[1,2]\n"


@pytest.mark.parametrize(("now", "status"), [("failed", 2), ("cancelled", 2), ("running", 3)])
def test_a_result_ends_as_its_job_did(gateway: Gateway, now: str, status: int):
    """A script would go on with the output of a job that has none."""
    error = {"code": "boom", "message": "it broke"} if now == "failed" else None
    changed = {"status": now, "output": None, "error": error}
    gateway.answers[f"GET /v1/jobs/{JOB}/result"] = RESULT | changed
    shown = invoke("result", JOB, status=status)
    assert shown.stdout == ""
    assert shown.stderr == f"streamjobs: {now}" + ("  boom: it broke\n" if error else "\n")


def test_submit_waits_for_what_comes_of_it(gateway: Gateway):
    """A script would have to poll."""
    shown = invoke("submit", "work", "--wait")
    assert (shown.stdout, shown.stderr) == ("done\ufffd[2J\n", "j0-x\n")


def test_submit_sends_its_limits(gateway: Gateway):
    """A job would start at once, run for ever, or beside its like."""
    invoke("submit", "work", "--delay", "5", "--timeout", "0", "--start-timeout", "60",
           "--concurrency-key", "c7")  # fmt: skip
    assert gateway.body == {
        "kind": "work", "input": None, "delay": 5.0, "timeout": 0.0, "start_timeout": 60.0,
        "concurrency_key": "c7",
    }  # fmt: skip


# --- steering


@pytest.mark.parametrize(
    ("words", "body", "said"),
    [
        (["pause", JOB, "--reason", "lunch"], {"reason": "lunch"}, "pause requested"),
        (["resume", JOB], None, "resumed"),
        (["signal", JOB, "go"], {"name": "go", "payload": None, "key": ""}, "go sent"),
        (
            ["signal", JOB, "go", "--payload", '{"a": 1}', "--key", "k"],
            {"name": "go", "payload": {"a": 1}, "key": "k"},
            "go sent",
        ),
        (
            ["approve", JOB, "--comment", "fine"],
            {"name": "approve", "payload": {"comment": "fine", "key": ""}, "key": ""},
            "approve sent",
        ),
        (
            ["deny", JOB, "--request", "c1"],
            {"name": "deny", "payload": {"comment": "", "key": "c1"}, "key": ""},
            "deny sent",
        ),
    ],
)
def test_what_was_typed_is_sent(gateway: Gateway, words: list[str], body: Any, said: str):
    """A no would arrive as a yes, or without its reason."""
    assert invoke(*words).stdout == f"{JOB}  {said}\n"
    assert gateway.body == body
    assert json.loads(invoke(*words, "--json").stdout)["id"] == JOB


def test_a_payload_comes_from_standard_input(gateway: Gateway):
    """Anything larger than a command line could not be sent."""
    invoke("signal", JOB, "go", "--payload", "-", stdin="[1]")
    assert gateway.body["payload"] == [1]


def test_a_job_that_was_not_paused_is_said_to_be(gateway: Gateway):
    """Somebody believes that it had stood still."""
    gateway.answers[f"POST /v1/jobs/{JOB}/resume"] = {"id": JOB, "status": "running"}
    assert "was not paused: running" in invoke("resume", JOB).stdout


def test_jobs_run_again_by_id_or_by_filter(gateway: Gateway):
    """After a bad night somebody would type a thousand ids."""
    assert invoke("rerun", JOB, "--key", "k").stdout.splitlines()[1].split() == [JOB, "j0-y"]
    assert gateway.requests[-1].headers["idempotency-key"] == "k"
    invoke("rerun", "--dead", "--kind", "work", "--code", "timeout", "--of", "bo", "--limit", "7")
    assert gateway.body == {"kind": "work", "code": "timeout", "owner": "bo", "limit": 7}
    assert json.loads(invoke("rerun", "--dead", "--all", "--json").stdout)["count"] == 1


def test_since_is_how_people_say_it(gateway: Gateway):
    """`--since 2h` would be answered with a lesson on RFC 3339."""
    invoke("dead", "--since", "2h")
    ago = datetime.now(UTC) - datetime.fromisoformat(gateway.query["since"])
    assert timedelta(hours=2) <= ago < timedelta(hours=2, minutes=1)
    assert since_when("2026-01-01T00:00:00Z") == "2026-01-01T00:00:00Z"


# --- operating


def test_strikes_say_whether_anything_changed(gateway: Gateway):
    """Two operators at night could not tell who stopped it."""
    assert invoke("strike", "kind", "work", "--reason", "moving").stdout == "kind work  struck\n"
    assert gateway.body == {"reason": "moving"}
    assert invoke("unstrike", "kind", "work").stdout == "kind work  was not struck\n"
    assert json.loads(invoke("strike", "kind", "work", "--json").stdout)["changed"] is True


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "-"), (0.25, "0.2 s"), (90, "90.0 s"), (250, "4 min"), (7200, "2 h"), (1e6, "12 d")],
)
def test_durations_are_short(seconds: float, shown: str):
    """A backlog of days would be told in seconds."""
    assert output.duration(seconds) == shown
