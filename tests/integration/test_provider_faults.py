"""Every way in which a model fails, through a real worker: the right end, never two tellings in one text."""

from __future__ import annotations

import asyncio
import time
from typing import Any, NamedTuple

import pytest

from streamjobs.app import App
from streamjobs.testing import Scenario, ScriptedCall, Turn
from streamjobs.testing.scenario import (
    ContentTypeFault,
    CutFault,
    DelayFault,
    EndlessFault,
    ErrorFault,
    Fault,
    GarbageFault,
    StallFault,
    StatusFault,
)
from tests.conftest import RedisProcess, wait_until
from tests.harness import Lab, one_end, one_outcome_each, says, talking

WORDS = "It was a bright cold day in April — \N{GRINNING FACE} — and the clocks were striking thirteen. " * 3
FORMATS = ["openai:scripted", "anthropic:scripted"]
ATTEMPTS = 3
FAST: dict[str, Any] = {
    "provider_attempts": ATTEMPTS,
    "provider_idle_timeout": 1.2,
    "provider_first_byte_timeout": 1.2,
    "retry_base": 0.02,
}
"""The clocks end what stalls for ever, and must not run out while this process stands still for a moment."""


class Case(NamedTuple):
    """A fault that passes: what it does once, and how often the turn visibly begins again for it."""

    fault: Fault
    restarts: int


PASSING = {
    "429 in seconds": Case(StatusFault(status=429, retry_after=0.2, times=1), 0),
    "429 as a date": Case(StatusFault(status=429, retry_after=0.5, form="date", times=1), 0),
    "500 twice": Case(StatusFault(status=500, times=2), 0),
    "529": Case(StatusFault(status=529, times=1), 0),
    "cut in a token": Case(CutFault(after=8, where="token", times=1), 1),
    "cut in a character": Case(CutFault(after=8, where="character", times=1), 1),
    "cut cleanly": Case(CutFault(after=8, where="clean", times=1), 1),
    "cut twice": Case(CutFault(after=8, times=2), 2),
    "cut before a word": Case(CutFault(after=0, where="clean", times=1), 0),
    "stall": Case(StallFault(after=8, times=1), 1),
    "stall with comments": Case(StallFault(after=8, comments=True, times=1), 1),
    "garbage": Case(GarbageFault(after=8, times=1), 1),
    "error event": Case(ErrorFault(after=8, times=1), 1),
    "a page in place of a stream": Case(ContentTypeFault(times=1), 0),
    "no first byte": Case(DelayFault(seconds=30.0, times=1), 0),
}


def faulty(*faults: Fault, rate: float = 400.0) -> Scenario:
    return Scenario(turns=[Turn(text=WORDS, faults=list(faults), rate=rate)])


def tries_of(fault: Fault) -> int:
    return fault.times + 1


@pytest.mark.parametrize("model", FORMATS)
@pytest.mark.parametrize("name", PASSING)
async def test_a_fault_that_passes_costs_nothing_but_time(redis: RedisProcess, name: str, model: str):
    """The user reads one whole answer; where words were taken back, the log and every viewer say so."""
    fault, restarts = PASSING[name]
    async with talking(redis.url, faulty(fault), **FAST) as bench:
        job_id = await bench.chat(model=model)
        view = await bench.ended(job_id)
        assert (view.status, view.text) == ("completed", WORDS), view.error
        assert view.result["text"] == WORDS
        assert view.attempt == 1
        assert len(bench.provider.requests) == tries_of(fault)
        await require_clean_restarts(bench, job_id, restarts)
        await wait_until(lambda: bench.provider.open_streams == 0)


async def require_clean_restarts(bench: Lab, job_id: str, count: int) -> None:
    """Each restart follows words of its turn, names where they began, and none of them carry its attempt."""
    log = await bench.log(job_id)
    started = next(event.cursor.seq for event in log if event.type == "turn.started")
    attempt, has_text, restarts = 1, False, 0
    for event in log:
        if event.type == "text.delta":
            assert event.data.get("attempt", 1) == attempt
            has_text = True
        elif event.type == "turn.restarted":
            assert has_text
            assert event.data["supersedes_from"] == started
            attempt, has_text, restarts = event.data["attempt"], False, restarts + 1
    assert restarts == count
    one_end(log)
    await bench.healthy()


@pytest.mark.parametrize("form", ["seconds", "date", "ms"])
async def test_retry_after_is_honoured(redis: RedisProcess, form: Any):
    """A provider that says when to come back blocks the key of those who come sooner."""
    fault = StatusFault(status=429, retry_after=0.6, form=form, times=1)
    async with talking(redis.url, faulty(fault, rate=0), **FAST) as bench:
        started = time.monotonic()
        view = await bench.run()
        assert view.status == "completed"
        assert time.monotonic() - started >= 0.6


@pytest.mark.parametrize(("fault", "requests", "restarts"), [
    (StatusFault(status=500), ATTEMPTS, 0),
    (StatusFault(status=400), 1, 0),
    (StatusFault(status=401), 1, 0),
    (CutFault(after=8), ATTEMPTS, ATTEMPTS - 1),
    (StallFault(after=8), ATTEMPTS, ATTEMPTS - 1),
    (GarbageFault(after=0), ATTEMPTS, 0),
    (ContentTypeFault(), ATTEMPTS, 0),
])  # fmt: skip
async def test_a_fault_that_stays_fails_the_job_after_its_tries(
    redis: RedisProcess, fault: Fault, requests: int, restarts: int
):
    """Tries are bounded, and not multiplied by each layer that retries: somebody pays for each."""
    async with talking(redis.url, faulty(fault), **FAST) as bench:
        job_id = await bench.chat(max_attempts=1)
        view = await bench.ended(job_id)
        assert view.error is not None
        assert (view.status, view.error.code) == ("failed", "provider_error")
        assert len(bench.provider.requests) == requests
        await require_clean_restarts(bench, job_id, restarts)


async def test_a_later_attempt_of_the_job_begins_the_turn_anew(redis: RedisProcess):
    """The job's own retry goes on from the log as a new worker would: no word of the failed try stands."""
    fault = CutFault(after=8, times=ATTEMPTS + 1)
    async with talking(redis.url, faulty(fault), **FAST) as bench:
        job_id = await bench.chat(max_attempts=2)
        view = await bench.ended(job_id)
        assert (view.status, view.text, view.attempt) == ("completed", WORDS, 2)
        await require_clean_restarts(bench, job_id, ATTEMPTS + 1)
        restarted = [event.data["why"] for event in await bench.log(job_id) if event.type == "turn.restarted"]
        assert "the attempt before failed" in restarted


async def test_a_later_attempt_after_silence_is_no_restart(redis: RedisProcess):
    """Nothing was said, so nothing is taken back: viewers see one turn."""
    fault = StatusFault(status=500, times=ATTEMPTS)
    async with talking(redis.url, faulty(fault), **FAST) as bench:
        job_id = await bench.chat(max_attempts=2)
        view = await bench.ended(job_id)
        assert (view.status, view.text, view.attempt) == ("completed", WORDS, 2)
        assert len(view.turns) == 1
        await require_clean_restarts(bench, job_id, 0)


async def test_a_later_turn_that_breaks_keeps_the_earlier_ones(redis: RedisProcess):
    """Only the broken turn is taken back; the tool that ran before it does not run again."""
    app = App(builtin_tools=False)
    runs: list[int] = []

    @app.tool
    async def count() -> int:
        """Count."""
        runs.append(1)
        return len(runs)

    first = Turn(text="First. ", tool_calls=[ScriptedCall(name="count")])
    second = Turn(text=WORDS, faults=[CutFault(after=8, times=1)], rate=400.0)
    async with talking(redis.url, Scenario(turns=[first, second]), app, **FAST) as bench:
        job_id = await bench.chat(tools=["count"])
        view = await bench.ended(job_id)
        assert (view.text, runs) == ("First. " + WORDS, [1])
        assert [turn.attempt for turn in view.turns] == [1, 2]
        one_outcome_each(await bench.log(job_id))


async def test_an_endless_answer_ends_with_the_jobs_time(redis: RedisProcess):
    """A model that never stops is stopped, and its connection closed: it would be paid for for ever."""
    async with talking(redis.url, faulty(EndlessFault(), rate=200.0), **FAST) as bench:
        job_id = await bench.chat(timeout=3.0)
        view = await bench.ended(job_id)
        assert view.error is not None
        assert (view.status, view.error.code) == ("failed", "timeout")
        assert view.text.startswith(WORDS[:20])
        await wait_until(lambda: bench.provider.open_streams == 0)
        assert bench.provider.closed_early == 1
        await bench.healthy()


@pytest.mark.parametrize("budget", [{"max_events": 25}, {"max_bytes": 2000}])
async def test_an_endless_answer_ends_with_the_jobs_budget(redis: RedisProcess, budget: dict[str, int]):
    """The script counts, so no worker can fill Redis; the job says which budget it was."""
    async with talking(redis.url, faulty(EndlessFault(), rate=1000.0), **(FAST | budget)) as bench:
        job_id = await bench.chat()
        view = await bench.ended(job_id)
        assert view.error is not None
        assert (view.status, view.error.code, view.attempt) == ("failed", "limit_exceeded", 1)
        log = await bench.log(job_id)
        assert len(log) <= budget.get("max_events", 10**6) + 1
        assert sum(len(str(event.data)) for event in log[:-1]) <= 2 * budget.get("max_bytes", 10**6)
        await wait_until(lambda: bench.provider.open_streams == 0)
        await bench.healthy()


async def test_a_slow_answer_is_no_fault(redis: RedisProcess):
    """Data that keeps coming, however slowly, must not run into the idle clock."""
    async with talking(redis.url, says("one two three four five six", rate=3.0), **FAST) as bench:
        view = await bench.run()
        assert (view.status, len(bench.provider.requests)) == ("completed", 1)


async def test_many_jobs_meet_many_faults(redis: RedisProcess):
    """Faults of one job are its own: forty at once, each with another fault, all end with their own text."""
    faults = [case.fault for case in PASSING.values() if not isinstance(case.fault, DelayFault)]
    turns = [
        Turn(text=f"{n}: {WORDS}", faults=[fault], rate=800.0, match=match(n))
        for n, fault in enumerate(faults)
    ]
    async with talking(redis.url, Scenario(turns=turns), **FAST) as bench:
        wanted = [n % len(faults) for n in range(40)]
        jobs = [await bench.chat(f"number {n}. {place}") for place, n in enumerate(wanted)]
        await bench.ended(*jobs)
        views = await asyncio.gather(*(bench.view(job_id) for job_id in jobs))
        assert [view.text for view in views] == [f"{n}: {WORDS}" for n in wanted]
        await bench.healthy()


def match(number: int) -> Any:
    from streamjobs.testing.scenario import Match

    return Match(user=rf"number {number}\.")
