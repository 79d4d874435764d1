"""The scripts against a reference model: the same random programs on both, every reply and every key compared.

A failure prints its seed and the shortest program that shows it; `STREAMJOBS_TEST_SEED` repeats a run.
"""

from __future__ import annotations

import os
import secrets
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest

from tests.conftest import RedisProcess
from tests.contract.duel import Command, Difference, Duel, Ear, ScriptCaller
from tests.contract.programs import random_program, shortest

PROGRAMS = 1500
LENGTH = 150


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


def difference(program: Sequence[Command], call: ScriptCaller, ear: Ear, seen: Counter[str]) -> str:
    """What model and Redis disagree on, if anything."""
    try:
        Duel(call, ear, seen).run(program)
    except Difference as found:
        return str(found)
    return ""


def play_random_programs(call: ScriptCaller, ear: Ear, programs: int) -> Counter[str]:
    """Returns what was seen."""
    seen: Counter[str] = Counter()
    seed = os.environ.get("STREAMJOBS_TEST_SEED") or secrets.token_hex(4)
    for number in range(programs):
        program = random_program(f"{seed}-{number}", LENGTH)
        if difference(program, call, ear, seen):
            program = shortest(program, lambda part: bool(difference(part, call, ear, Counter())))
            what = difference(program, call, ear, Counter())
            pytest.fail(
                f"STREAMJOBS_TEST_SEED={seed}, program {number}:\n{what}\n" + "\n".join(map(repr, program))
            )
    return seen


def test_random_programs_agree_with_the_model(call: ScriptCaller, ear: Ear) -> None:
    """Without it, a job could be lost, doubled or stuck by an order of calls that nobody thought of."""
    seen = play_random_programs(call, ear, PROGRAMS)
    print(sorted(seen.items(), key=lambda x: x[1]))
