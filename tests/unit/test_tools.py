"""Running a tool call: whatever it does, an outcome comes of it, and the worker goes on."""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import json
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest

from streamjobs.app import App, ToolContext
from streamjobs.config import Settings
from streamjobs.errors import Invalid, ToolError
from streamjobs.events import ErrorInfo, ToolCompleted, decode_event, encode_event
from streamjobs.worker import calls
from streamjobs.worker.calls import abandoned_calls
from streamjobs.worker.outcomes import ToolOutcome, tool_result_text
from streamjobs.worker.tools import call_tool, idempotency_key

SETTINGS = Settings(tool_timeout=60.0, max_tool_output=1000)
HANGS = 0.4
"""Until a call is given up that hangs: its thread must have begun with it by then."""


class Point(msgspec.Struct):
    x: int
    y: float = 0.0


@dataclasses.dataclass
class Person:
    name: str


class Caller:
    """An app of one test, and a short way to call its tools."""

    def __init__(self) -> None:
        self.app = App(builtin_tools=False)

    async def __call__(
        self,
        function: Callable[..., Any],
        arguments: Any = "",
        *,
        context: ToolContext | None = None,
        **options: Any,
    ) -> ToolOutcome:
        self.app = App(builtin_tools=False)
        self.app.tool(name="tried", **options)(function)
        return await call_tool(self.app, SETTINGS, "tried", arguments, context or ToolContext())


@pytest.fixture
def call() -> Caller:
    return Caller()


@pytest.fixture(autouse=True)
async def nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """Every test ends what it abandoned."""
    monkeypatch.setattr(calls, "CANCEL_GRACE", 0.05)
    yield
    async with asyncio.timeout(60):
        while abandoned_calls():
            await asyncio.sleep(0.005)


def short(value: object) -> str:
    """A test's id: what is long or no text is cut, and escaped."""
    return ascii(value).split(" at 0x")[0][:40]


def error_of(outcome: ToolOutcome) -> ErrorInfo:
    assert outcome.error is not None, outcome
    assert outcome.output is None
    return outcome.error


# --- arguments ---------------------------------------------------------------------------------------


async def test_arguments_arrive_as_their_types(call: Caller) -> None:
    """Without this every tool would have to convert what the model wrote."""

    async def move(point: Point, person: Person, times: int = 2) -> list[Any]:
        return [type(point).__name__, point.x, person.name, times]

    outcome = await call(move, '{"point": {"x": 1}, "person": {"name": "Ann"}}')
    assert outcome.output == ["Point", 1, "Ann", 2]
    assert outcome.error is None
    as_value = await call(move, {"point": {"x": 1}, "person": {"name": "Ann"}, "times": 3})
    assert as_value.output == ["Point", 1, "Ann", 3]


@pytest.mark.parametrize("empty", ["", "  \n", "{}", {}])
async def test_no_arguments_are_an_empty_object(call: Caller, empty: Any) -> None:
    """Without this the providers that send nothing for no arguments would see every such call fail."""
    assert (await call(lambda: "fine", empty)).output == "fine"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("{", "not JSON"),
        ("city=Paris", "not JSON"),
        ("[]", "Expected `object`, got `array`"),
        ('"x"', "Expected `object`, got `str`"),
        ("null", "Expected `object`, got `null`"),
        ("{}", "missing required field `x`"),
        ('{"x": "1"}', "x: Expected `int`, got `str`"),
        ('{"x": 1, "y": 2}', "unknown field `y`"),
        ('{"x": 1, "p": {"x": "no"}}', "p.x: Expected `int`, got `str`"),
        ('{"x": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested deeper"),
        ('{"x": ' + "9" * 5000 + "}", "x: "),
        ('{"x": NaN}', "not JSON"),
        ('{"x": "\\ud800"}', "not JSON"),
        ("\ud800", "not JSON"),
        ('{"x": 1}\x00', "not JSON"),
        ({"x": object()}, "not JSON"),
        ({"x": "\ud800"}, "x: Expected `int`, got `str`"),
        ([], "Expected `object`, got `array`"),
        ('{"' + "k" * 100_000 + '": 1}', "unknown field"),
    ],
    ids=short,
)
async def test_wrong_arguments_are_told_to_the_model_by_field(
    call: Caller, arguments: Any, said: str
) -> None:
    """Without this a model could not correct itself, or its mistake would fail the job."""

    def act(x: int, p: Point | None = None) -> int:
        raise AssertionError("must not run")

    error = error_of(await call(act, arguments))
    assert error.code == "invalid_arguments"
    assert said in error.message
    assert len(error.message) <= 500


async def test_an_unknown_tool_is_told_with_the_one_that_was_meant(call: Caller) -> None:
    """Without this an invented name would fail the job."""
    app = App()
    error = error_of(await call_tool(app, SETTINGS, "calculat", "{}", ToolContext()))
    assert (error.code, error.message) == (
        "unknown_tool",
        "unknown tool 'calculat', did you mean 'calculate'?",
    )
    strange = error_of(await call_tool(app, SETTINGS, "\ud800\x00" * 5000, "{}", ToolContext()))
    msgspec.json.encode(strange)
    assert len(strange.message) <= 500


async def test_the_built_in_tools_answer() -> None:
    """Without this they would be tested as functions, and never as a model calls them."""
    app = App()
    assert (await call_tool(app, SETTINGS, "calculate", '{"expression":"6*7"}', ToolContext())).output == 42
    assert set((await call_tool(app, SETTINGS, "get_current_time", "", ToolContext())).output) == {
        "time", "timezone", "weekday",
    }  # fmt: skip
    error = error_of(await call_tool(app, SETTINGS, "read_file", '{"path":"x"}', ToolContext()))
    assert error.message.startswith("read_file is not configured")


# --- context -----------------------------------------------------------------------------------------


async def test_a_tool_sees_its_call_and_reports(call: Caller) -> None:
    """Without this a tool could not pass its idempotency key on, nor show how far it is."""
    seen: list[tuple[float | None, str, bool]] = []
    loop_thread = threading.get_ident()

    def report(percent: float | None, message: str) -> None:
        seen.append((percent, message, threading.get_ident() == loop_thread))

    context = ToolContext(job_id="j", call_id="c", idempotency_key="k", attempt=2, on_progress=report)

    def sync(context: ToolContext, x: int) -> list[Any]:
        context.progress(10, "sync")
        return [context.job_id, context.call_id, context.idempotency_key, context.attempt, x]

    async def in_task(x: int, ctx: ToolContext) -> bool:
        ctx.progress(20, "async")
        await asyncio.to_thread(ctx.progress, 30, "thread")
        await asyncio.sleep(0)
        return ctx.is_cancelled

    assert (await call(sync, '{"x":1}', context=context)).output == ["j", "c", "k", 2, 1]
    assert (await call(in_task, '{"x":1}', context=context)).output is False
    assert seen == [(10, "sync", True), (20, "async", True), (30, "thread", True)]


async def test_a_cancelled_job_can_be_seen_from_a_thread(call: Caller) -> None:
    """Without this a long sync tool could not stop early."""
    context = ToolContext(cancelled=lambda: True)
    assert (await call(lambda: context.is_cancelled)).output is True

    def ask(ctx: ToolContext) -> bool:
        return ctx.is_cancelled

    assert (await call(ask, context=context)).output is True


async def test_sync_tools_run_beside_the_loop_with_its_variables(call: Caller) -> None:
    """Without this one sync tool would stop hundreds of jobs, and its log lines would not name the job."""
    job = contextvars.ContextVar("job", default="none")
    job.set("j1")
    go = threading.Event()

    def wait() -> list[Any]:
        return [job.get(), go.wait(60), threading.current_thread().daemon]

    running = asyncio.create_task(call(wait))
    await asyncio.sleep(0.01)
    go.set()
    assert (await running).output == ["j1", True, True]


async def test_threads_are_kept_and_bounded(monkeypatch: pytest.MonkeyPatch, call: Caller) -> None:
    """Without this a burst of calls would start a thread each."""
    pool = calls._Threads(limit=3)
    monkeypatch.setattr(calls, "_threads", pool)
    lock, now, most, names = threading.Lock(), 0, 0, set()

    def work() -> None:
        nonlocal now, most
        with lock:
            now, most = now + 1, max(most, now + 1)
            names.add(threading.get_ident())
        time.sleep(0.002)
        with lock:
            now -= 1

    outcomes = await asyncio.gather(*(call(work) for _ in range(30)))
    assert all(outcome.error is None for outcome in outcomes)
    assert most <= 3
    assert len(names) <= 3


# --- time and cancellation ---------------------------------------------------------------------------


async def test_a_slow_async_tool_is_stopped(call: Caller) -> None:
    """Without this a hanging request would hold its job for ever."""
    cleaned: list[str] = []

    async def slow() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            cleaned.append("up")

    outcome = await call(slow, timeout=0.02)
    error = error_of(outcome)
    assert error == ErrorInfo("tool_timeout", "the tool did not answer within 0.02 s", retryable=True)
    assert cleaned == ["up"]
    assert 20 <= outcome.ms < 30_000


async def test_the_setting_is_the_timeout_of_tools_without_their_own() -> None:
    """Without this the documented default would mean nothing."""
    app = App(builtin_tools=False)

    @app.tool
    async def slow() -> None:
        await asyncio.sleep(60)

    outcome = await call_tool(app, Settings(tool_timeout=0.01), "slow", "", ToolContext())
    assert "within 0.01 s" in error_of(outcome).message


async def test_a_slow_sync_tool_is_abandoned_counted_and_told(call: Caller) -> None:
    """Without this a hung thread would be invisible, or its late words would follow its failure."""
    go, told = threading.Event(), []
    seen: list[str] = []

    def hang(ctx: ToolContext) -> None:
        go.wait(60)
        told.append(ctx.is_cancelled)
        ctx.progress(99, "late")

    outcome = await call(
        hang, timeout=HANGS, context=ToolContext(on_progress=lambda _, text: seen.append(text))
    )
    error = error_of(outcome)
    assert "its thread cannot be stopped and still runs" in error.message
    assert error.retryable
    assert abandoned_calls() == 1
    go.set()
    while abandoned_calls():
        await asyncio.sleep(0.001)
    await asyncio.sleep(0)
    assert told == [True]
    assert seen == []


async def test_hanging_threads_are_replaced_and_then_no_more(
    monkeypatch: pytest.MonkeyPatch, call: Caller
) -> None:
    """Without this a few hanging calls would stop every sync tool, or hang threads without end."""
    monkeypatch.setattr(calls, "_threads", calls._Threads(limit=2))
    go, ran = threading.Event(), []
    for _ in range(2):
        assert "still runs" in error_of(await call(lambda: go.wait(60), timeout=HANGS)).message
    assert (await call(lambda: "fine")).output == "fine"
    for _ in range(2):
        assert "still runs" in error_of(await call(lambda: go.wait(60), timeout=HANGS)).message
    starved = error_of(await call(lambda: ran.append(1), timeout=0.01))
    assert "no thread was free, 4 hang" in starved.message
    go.set()
    assert (await call(lambda: "again")).output == "again"
    assert ran == [], "a call that was given up must not run later"


async def test_a_tool_that_ignores_its_cancellation_is_left_behind(call: Caller) -> None:
    """Without this one stubborn tool would hold its job for ever."""
    go = asyncio.Event()

    async def stubborn() -> str:
        while not go.is_set():
            try:
                await go.wait()
            except asyncio.CancelledError:
                continue
        return "late"

    error = error_of(await call(stubborn, timeout=0.01))
    assert "ignores its cancellation" in error.message
    assert abandoned_calls() == 1
    go.set()


@pytest.mark.parametrize("is_async", [True, False])
async def test_our_own_cancellation_passes_at_once(call: Caller, is_async: bool) -> None:
    """Without this a cancelled job would go on, or report a tool's failure that was none."""
    go, started, ended = threading.Event(), threading.Event(), []

    async def slow() -> None:
        started.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("cancelled")

    def hang() -> None:
        started.set()
        go.wait(60)

    task = asyncio.create_task(call(slow if is_async else hang))
    while not started.is_set():
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == (["cancelled"] if is_async else [])
    assert abandoned_calls() == (0 if is_async else 1)
    go.set()


# --- what a tool raises ------------------------------------------------------------------------------


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


@pytest.mark.parametrize("is_async", [True, False])
@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (ToolError("no such city"), "no such city"),
        (ToolError(), "the tool refused the call"),
        (ValueError("bad \ud800 text\x00"), "ValueError: bad \ufffd text\ufffd"),
        (ValueError(), "ValueError"),
        (Invalid("x"), "Invalid: x"),
        (TimeoutError("its own"), "TimeoutError: its own"),
        (Unspeakable(), "Unspeakable"),
        (SystemExit(3), "SystemExit: 3"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (GeneratorExit(), "GeneratorExit"),
        (asyncio.CancelledError("mine"), "CancelledError: mine"),
        (RecursionError("deep"), "RecursionError: deep"),
        (MemoryError(), "MemoryError"),
        (ExceptionGroup("several", [ValueError("a")]), "ExceptionGroup: several (1 sub-exception)"),
    ],
)
async def test_whatever_a_tool_raises_is_an_outcome(
    call: Caller, raised: BaseException, message: str, is_async: bool
) -> None:
    """Without this one line in a tool could fail a job, or end the worker with all its jobs."""

    async def in_task() -> None:
        raise raised

    def in_thread() -> None:
        raise raised

    error = error_of(await call(in_task if is_async else in_thread))
    assert error == ErrorInfo("tool_error", message)


async def test_a_long_message_is_cut(call: Caller) -> None:
    """Without this an error page in an exception would fill the log and the model's context."""

    def fail() -> None:
        raise ValueError("x" * 1_000_000)

    assert len(error_of(await call(fail)).message) == 500


async def test_runaway_recursion_is_an_outcome(call: Caller) -> None:
    """Without this a tool's bug would be the worker's."""

    def deeper() -> None:
        deeper()

    assert "RecursionError" in error_of(await call(deeper)).message


# --- outputs -----------------------------------------------------------------------------------------

circle: list[Any] = []
circle.append(circle)


@pytest.mark.parametrize(
    ("returned", "output"),
    [
        (None, None),
        ("text", "text"),
        (Point(1), {"x": 1, "y": 0.0}),
        (Person("Ann"), {"name": "Ann"}),
        ({1: (2, 3)}, {"1": [2, 3]}),
        ({"a"}, ["a"]),
        (float("nan"), None),
        ([float("inf")], [None]),
        (10**30, 10**30),
        ("a\ud800b\x00", "a\ufffdb\ufffd"),
        (["a\x00b", "\\u0000"], ["a\ufffdb", "\\u0000"]),
        ({"k\udfff": ["\ud83d\ude00", ("\x00",)]}, {"k\ufffd": ["😀", ["\ufffd"]]}),
        ({1: "\ud800"}, {"1": "\ufffd"}),
        ("\u2028", "\u2028"),
    ],
    ids=short,
)
async def test_outputs_become_json_that_the_log_can_hold(call: Caller, returned: Any, output: Any) -> None:
    """Without this a replay would see another result than the model did, or the log could not be read."""
    outcome = await call(lambda: returned)
    assert outcome.error is None
    assert outcome.output == output
    event = ToolCompleted(call_id="c", output=outcome.output, ms=outcome.ms)
    assert decode_event("tool.completed", encode_event(event)) == event


@pytest.mark.parametrize(
    "returned",
    [object(), {"a": object()}, {(1, 2): 3}, circle, 10**5000, ValueError("x")],
    ids=lambda value: type(value).__name__,
)
async def test_outputs_that_are_no_json_are_an_error(call: Caller, returned: Any) -> None:
    """Without this they would fail the job when its event is written."""
    assert error_of(await call(lambda: returned)).code == "tool_output"


async def test_an_output_too_deep_for_the_log_is_an_error(call: Caller) -> None:
    """Without this the log of a job could be written and never be read again."""
    deep: list[Any] = []
    for _ in range(150):
        deep = [deep]
    assert "nests deeper" in error_of(await call(lambda: deep)).message


async def test_a_forgotten_await_is_explained(call: Caller) -> None:
    """Without this a decorator that is not async would give an error that names no cause."""

    async def real() -> str:
        return "x"

    assert "must be async" in error_of(await call(lambda: real())).message


async def test_a_long_text_is_cut_inside_no_character(call: Caller) -> None:
    """Without this one output could fill the model's context, or end in half a character."""
    outcome = await call(lambda: "ab" + "€" * 1000)
    assert len(outcome.output.encode()) <= SETTINGS.max_tool_output
    kept, _, marker = outcome.output.partition("\n")
    assert set(kept) == set("ab€")
    assert marker == f"[cut: {3002 - len(kept.encode())} of 3002 bytes left out]"
    exact = await call(lambda: "x" * SETTINGS.max_tool_output)
    assert exact.output == "x" * SETTINGS.max_tool_output


async def test_a_large_object_becomes_the_beginning_of_its_json(call: Caller) -> None:
    """Without this a large result would be lost as a whole."""
    outcome = await call(lambda: {"rows": list(range(5000))})
    assert isinstance(outcome.output, str)
    assert outcome.output.startswith('{"rows":[0,1,2,')
    assert outcome.output.endswith("bytes left out]")
    assert len(outcome.output.encode()) <= SETTINGS.max_tool_output


# --- keys and texts ----------------------------------------------------------------------------------


def test_a_key_is_stable_and_fit_for_a_header() -> None:
    """Without this a retried call would have its effect twice."""
    key = idempotency_key("job1", 2, "call_a")
    assert key == "job1-2-f512326134c6912bb106086a"
    others = {
        idempotency_key(*each)
        for each in [("job2", 2, "call_a"), ("job1", 3, "call_a"), ("job1", 2, "call_b")]
    }
    assert len(others | {key}) == 4
    strange = idempotency_key("job1", 2, "\r\n\ud800é" * 1000)
    assert strange.isascii()
    assert strange.isprintable()
    assert len(strange) == len(key)


def test_the_model_is_told_in_json_or_in_plain_words() -> None:
    """Without this a model would see Python's way to write things."""
    assert tool_result_text(ToolOutcome("plain")) == "plain"
    assert tool_result_text(ToolOutcome({"a": [1, None]})) == '{"a":[1,null]}'
    assert tool_result_text(ToolOutcome(None)) == "null"
    failed = ToolOutcome(error=ErrorInfo("tool_error", "no"))
    assert json.loads(tool_result_text(failed)) == {
        "error": {"code": "tool_error", "message": "no", "retryable": False}
    }
