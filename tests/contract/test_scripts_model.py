"""The scripts against a reference model: random programs on both, every reply and every key compared.

A failure prints its seed and the shortest program that shows it; `STREAMJOBS_TEST_SEED` repeats a run.
"""

from __future__ import annotations

import os
import secrets
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest

from tests.conftest import RedisProcess
from tests.contract.callers import Ear, ScriptCaller
from tests.contract.commands import Command
from tests.contract.duel import Difference, Duel
from tests.contract.programs import as_code, random_program, shortest
from tests.contract.stories import STORIES

PROGRAMS = 120
LONG_PROGRAMS = 15 * PROGRAMS
LENGTH = 120

VERDICTS = """
submit: ok same mismatch parent_gone parent_foreign parent_cancelled parent_completed depth children
take: leased nothing ends answered_again
append: ok dup fenced gap conflict inbox limit_events limit_bytes bad gone
renew: ok lost
wake: lost poisoned cancelled paused woken timeout queue_timeout released more
cancel: cancelled requested already gone
signal: ok dup already limit gone
pause: paused requested dup already gone
resume: resumed dup already gone
artifact: ok fenced limit_one limit_all gone
permit: go later
rerun: ok live gone
seal: ok already stale bad gone
strike: struck already lifted absent
job.requeued: timer signal child yield retry held released
held: owner_limit concurrency_key struck
"""
"""Everything that a script can say, and the reasons for which a job is queued again."""


def missing(seen: Counter[str]) -> list[str]:
    lines = [line.partition(": ") for line in VERDICTS.strip().splitlines()]
    wanted = [f"{script} {word.replace('_', ' ')}" for script, _, words in lines for word in words.split()]
    said = {name.replace("_", " ") for name, count in seen.items() if count}
    return [name for name in wanted if name not in said]


@pytest.fixture
def call(redis: RedisProcess) -> Iterator[ScriptCaller]:
    with redis.client() as client:
        yield ScriptCaller(client)
        client.flushdb()


@pytest.fixture
def ear(redis: RedisProcess) -> Iterator[Ear]:
    with redis.client() as client:
        ear = Ear(client)
        yield ear
        ear.close()


def difference(
    program: Sequence[Command], call: ScriptCaller, ear: Ear, seen: Counter[str] | None = None
) -> str:
    """What model and Redis disagree on, if anything."""
    try:
        Duel(call, ear, seen).run(program)
    except Difference as found:
        return str(found) or "invariants"
    return ""


def play(program: Sequence[Command], call: ScriptCaller, ear: Ear, seen: Counter[str], name: str) -> None:
    if difference(program, call, ear, seen):
        program = shortest(program, lambda part: bool(difference(part, call, ear)))
        lines = [difference(program, call, ear), *map(as_code, program)]
        pytest.fail(f"{name}: redis and the model differ after\n" + "\n".join(lines))


def play_all(call: ScriptCaller, ear: Ear, programs: int) -> Counter[str]:
    """The stories and that many random programs; returns what was seen."""
    seen: Counter[str] = Counter()
    for name, story in STORIES.items():
        play(story, call, ear, seen, name)
    seed = os.environ.get("STREAMJOBS_TEST_SEED") or secrets.token_hex(4)
    for number in range(programs):
        play(
            random_program(f"{seed}-{number}", LENGTH),
            call,
            ear,
            seen,
            f"STREAMJOBS_TEST_SEED={seed} ({number})",
        )
    return seen


@pytest.mark.timeout(300)
def test_scripts_agree_with_the_model(call: ScriptCaller, ear: Ear) -> None:
    """Without it, a job could be lost, doubled or stuck by an order of calls that nobody thought of."""
    seen = play_all(call, ear, PROGRAMS)
    assert not missing(seen), f"never seen: {missing(seen)}; a run without them proves nothing about them"


@pytest.mark.long
@pytest.mark.timeout(900)
def test_scripts_agree_with_the_model_for_long(call: ScriptCaller, ear: Ear) -> None:
    """Without it, what takes many unlucky steps would first be met by users."""
    assert not missing(play_all(call, ear, LONG_PROGRAMS))
