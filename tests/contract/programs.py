"""Random programs for a duel, and the shortest form of one that fails.

Rule 1: a program is data; its repr can be pasted into a test.
Rule 2: the same seed makes the same program.

Rejected: Hypothesis. Its examples repeat and stay small, as it means them to: of 5,000 commands 94 appended anything,
where these reach every verdict of every script in a few seconds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

from tests.contract.duel import (
    EVENTS,
    LEASE,
    QUEUES,
    TIMERS,
    Advance,
    Again,
    Append,
    Ask,
    Cancel,
    Command,
    Idle,
    Renew,
    Row,
    Submission,
    Submit,
    Take,
    Wake,
)

SLOTS = 20
FACTS = tuple(name for name in EVENTS if name not in {"completed", "failed", "cancelled"})
OUTCOMES = {
    "keep": 10, "completed": 4, "failed": 2, "cancelled": 1, "retry": 3, "sleep": 2, "wait": 4, "yield": 2, "nonsense": 1,
}  # fmt: skip
STEPS = {1: 4, 100: 4, 4_000: 6, 20_000: 8, LEASE: 2}
JUMPS = (3 * LEASE + 1, 310_000, 3_600_000, -3_600_000, -30_000)


def chosen(random: Random, weights: dict[Any, int]) -> Any:
    return random.choices(list(weights), list(weights.values()))[0]


def now_and_then(random: Random, value: Any, one_in: int, otherwise: Any) -> Any:
    return value if random.randrange(one_in) == 0 else otherwise


def submission(random: Random) -> Submission:
    return Submission(
        slot=random.randrange(SLOTS),
        owner=now_and_then(random, 1, 3, 0),
        queue=now_and_then(random, 1, 3, 0),
        priority=random.choice(["high", "default", "default", "low"]),
        delay=now_and_then(random, random.choice([3_000, 40_000]), 6, 0),
        start_timeout=now_and_then(random, random.choice([10_000, 70_000]), 6, 0),
        timeout=now_and_then(random, random.choice([15_000, 130_000]), 6, 0),
        ckey=now_and_then(random, random.choice([1, 2]), 3, 0),
        idem=now_and_then(random, random.choice([1, 2]), 5, 0),
        body=now_and_then(random, 1, 3, 0),
        parent=now_and_then(random, random.randrange(SLOTS), 4, -1),
    )


def row(random: Random) -> Row:
    facts = random.choices(FACTS, k=random.choice([0, 1, 1, 2, 3]))
    misplaced = now_and_then(random, [random.choice(["completed", "cancelled"])], 25, [])
    return Row(
        lease=random.randrange(4),
        stale=now_and_then(random, True, 10, False),
        sent=now_and_then(random, True, 8, False),
        number=now_and_then(random, random.choice([-1, 1]), 12, 0),
        events=tuple(facts + misplaced),
        outcome=chosen(random, OUTCOMES),
        unread=now_and_then(random, 1, 10, 0),
        delay=random.choice([0, 2_000, 30_000]),
        timers=random.choice(["", *TIMERS]),
    )


def several(random: Random, make: Callable[[Random], Any], most: int) -> tuple[Any, ...]:
    return tuple(make(random) for _ in range(random.randint(1, most)))


def take(random: Random) -> Take:
    queues = random.choice([QUEUES, QUEUES, QUEUES[:1], QUEUES[1:]])
    return Take(random.randrange(2), random.randint(1, 4), queues, again=now_and_then(random, True, 6, False))


def ask(random: Random) -> Ask:
    script = random.choice(["signal", "signal", "signal", "pause", "resume", "resume"])
    return Ask(script, random.randrange(SLOTS), random.randrange(5))


def renew(random: Random) -> Renew:
    return Renew(several(random, lambda r: r.randrange(4), 3), stale=now_and_then(random, True, 3, False))


COMMANDS: dict[Callable[[Random], Command], int] = {
    (lambda r: Submit(several(r, submission, 3))): 10,
    take: 10,
    (lambda r: Append(several(r, row, 3), always=now_and_then(r, True, 3, False))): 16,
    renew: 2,
    (lambda _: Wake()): 6,
    (lambda r: Wake(r.randint(1, 2))): 2,
    (lambda r: Idle(r.randint(1, 2))): 2,
    (lambda r: Advance(chosen(r, STEPS))): 8,
    (lambda r: Advance(r.choice(JUMPS))): 1,
    (lambda r: Cancel(r.randrange(SLOTS))): 3,
    ask: 8,
    (lambda _: Again()): 3,
}


def random_program(seed: int | str, length: int) -> list[Command]:
    """The program of this seed."""
    random = Random(seed)
    return [chosen(random, COMMANDS)(random) for _ in range(length)]


def shortest(
    program: Sequence[Command], fails: Callable[[Sequence[Command]], bool], *, tries: int = 800
) -> list[Command]:
    """A part of a failing program, with the simplest values, that still fails."""
    budget = iter(range(tries))
    fails = in_budget(fails, budget)
    best = without_parts(list(program), fails)
    for simpler in iter(lambda: next((p for p in simplified(best) if fails(p)), None), None):
        best = without_parts(simpler, fails)
    return best


def in_budget(fails: Callable[[Any], bool], budget: Iterator[int]) -> Callable[[Any], bool]:
    return lambda program: next(budget, None) is not None and fails(program)


def without_parts(program: list[Any], fails: Callable[[list[Any]], bool]) -> list[Any]:
    """Leave away ever smaller parts for as long as it fails without them."""
    size = len(program) // 2
    while size:
        start = 0
        while start < len(program):
            rest = program[:start] + program[start + size :]
            if rest and fails(rest):
                program = rest
            else:
                start += size
        size //= 2
    return program


def simplified(program: list[Command]) -> Iterator[list[Command]]:
    for at, command in enumerate(program):
        for simpler in simpler_values(command):
            yield [*program[:at], simpler, *program[at + 1 :]]


def simpler_values(value: Any) -> Iterator[Any]:
    """The same with one element less, or one field at its default, at any depth."""
    if isinstance(value, tuple):
        for at, part in enumerate(value):
            if len(value) > 1 or isinstance(part, str):
                yield value[:at] + value[at + 1 :]
            for simpler in simpler_values(part):
                yield (*value[:at], simpler, *value[at + 1 :])
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            now = getattr(value, field.name)
            if field.default is not dataclasses.MISSING and now != field.default:
                yield dataclasses.replace(value, **{field.name: field.default})
            for simpler in simpler_values(now):
                yield dataclasses.replace(value, **{field.name: simpler})
