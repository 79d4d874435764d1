"""Random programs for a duel, and the shortest form of one that fails.

Rule 1: a program is data; its repr can be pasted into a test.
Rule 2: the same seed makes the same program.

Rejected: Hypothesis. It repeats values and stays small, which is its strength elsewhere: of 5,000 commands 94
appended anything, where these reach every verdict of every script in a few seconds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

from tests.contract.callers import LEASE
from tests.contract.commands import (
    EVENTS,
    QUEUES,
    TIMERS,
    Advance,
    Again,
    Append,
    Ask,
    Cancel,
    Command,
    Idle,
    Keep,
    Permit,
    Renew,
    Rerun,
    Row,
    Seal,
    Strike,
    Submission,
    Submit,
    Take,
    Wake,
)

FACTS = tuple(name for name in EVENTS if name not in {"completed", "failed", "cancelled"})
OUTCOMES = {
    "keep": 10, "completed": 4, "failed": 2, "cancelled": 1, "retry": 3, "sleep": 2, "wait": 4, "yield": 2,
    "nonsense": 1,
}  # fmt: skip
STEPS = {1: 4, 100: 4, 4_000: 6, 20_000: 8, LEASE: 2}
JUMPS = (3 * LEASE + 1, 310_000, 3_600_000, -3_600_000, -30_000)


class Dice:
    """Random commands. Few slots make long lives of jobs, many make crowds."""

    def __init__(self, seed: int | str) -> None:
        self.random = Random(seed)
        self.slots = self.random.choice([2, 5, 10, 20])
        self.commands: dict[Callable[[], Command], int] = {
            self.submit: 10, self.take: 10, self.append: 16, self.ask: 8, self.renew: 2, Wake: 6,
            self.keep: 2, self.permit: 2, self.small_wake: 2, self.idle: 3, self.step: 8, self.jump: 1,
            self.cancel: 2, self.strike: 1, self.seal: 4, self.lift: 2, self.rerun: 2, Again: 3,
        }  # fmt: skip

    def command(self) -> Command:
        return self.chosen(self.commands)()

    def chosen(self, weights: dict[Any, int]) -> Any:
        return self.random.choices(list(weights), list(weights.values()))[0]

    def rarely(self, one_in: int, value: Any, otherwise: Any) -> Any:
        return value if self.random.randrange(one_in) == 0 else otherwise

    def several(self, make: Callable[[], Any], most: int) -> tuple[Any, ...]:
        return tuple(make() for _ in range(self.random.randint(1, most)))

    def slot(self) -> int:
        return self.random.randrange(self.slots)

    def lease(self) -> int:
        return self.random.randrange(4)

    def submit(self) -> Submit:
        return Submit(self.several(self.submission, 3))

    def submission(self) -> Submission:
        pick = self.random.choice
        return Submission(
            slot=self.slot(),
            owner=self.rarely(3, 1, 0),
            queue=self.rarely(3, 1, 0),
            priority=pick(["high", "default", "default", "low"]),
            delay=self.rarely(6, pick([3_000, 40_000]), 0),
            start_timeout=self.rarely(6, pick([10_000, 70_000]), 0),
            timeout=self.rarely(6, pick([15_000, 130_000]), 0),
            ckey=self.rarely(3, pick([1, 2]), 0),
            idem=self.rarely(5, pick([1, 2]), 0),
            body=self.rarely(3, 1, 0),
            parent=self.rarely(4, self.slot(), -1),
            kind=self.rarely(3, "play", "work"),
        )

    def take(self) -> Take:
        queues = self.random.choice([QUEUES, QUEUES, QUEUES[:1], QUEUES[1:]])
        return Take(
            self.random.randrange(2), self.random.randint(1, 4), queues, again=self.rarely(6, True, False)
        )

    def append(self) -> Append:
        return Append(self.several(self.row, 3), always=self.rarely(3, True, False))

    def row(self) -> Row:
        facts = self.random.choices(FACTS, k=self.random.choice([0, 1, 1, 2, 3]))
        return Row(
            lease=self.lease(),
            stale=self.rarely(10, True, False),
            sent=self.rarely(8, True, False),
            number=self.rarely(12, self.random.choice([-1, 1]), 0),
            events=tuple(facts + self.rarely(25, [self.random.choice(["completed", "cancelled"])], [])),
            outcome=self.chosen(OUTCOMES),
            unread=self.rarely(10, 1, 0),
            delay=self.random.choice([0, 2_000, 30_000]),
            timers=self.random.choice(["", *TIMERS]),
        )

    def keep(self) -> Keep:
        pick = self.random.choice
        return Keep(self.lease(), self.rarely(4, True, False), pick(["a", "b", "c"]), pick([5, 12, 20, 21]))

    def permit(self) -> Permit:
        return Permit(self.random.choice("ab"), self.random.choice([0, 0, 8_000, 90_000]))

    def rerun(self) -> Rerun:
        return Rerun(self.slot(), self.slot())

    def seal(self) -> Seal:
        pick = self.random.choice
        return Seal(
            self.slot(), pick([1, 3, 50]), pick([0, 0, 1, 2]), self.rarely(3, True, False),
            known=self.rarely(5, "before", "now"),
            flaw=self.rarely(5, pick(["again", "hole", "empty", "gap", "foreign"]), ""),
        )  # fmt: skip

    def strike(self) -> Strike:
        return Strike("set", self.struck())

    def lift(self) -> Strike:
        return Strike("lift", self.struck())

    def struck(self) -> str:
        return self.random.choice(["kind:work", "kind:play", "queue:fast", "queue:slow", "tool:t"])

    def renew(self) -> Renew:
        return Renew(self.several(self.lease, 3), stale=self.rarely(3, True, False))

    def ask(self) -> Ask:
        script = self.random.choice(["signal", "signal", "signal", "pause", "resume", "resume"])
        return Ask(script, self.slot(), self.random.randrange(5))

    def cancel(self) -> Cancel:
        return Cancel(self.slot())

    def small_wake(self) -> Wake:
        return Wake(self.random.randint(1, 2))

    def idle(self) -> Idle:
        return Idle(self.random.randint(1, 2))

    def step(self) -> Advance:
        return Advance(self.chosen(STEPS))

    def jump(self) -> Advance:
        return Advance(self.random.choice(JUMPS))


def random_program(seed: int | str, length: int) -> list[Command]:
    """The program of this seed."""
    dice = Dice(seed)
    return [dice.command() for _ in range(length)]


def shortest(
    program: Sequence[Command], fails: Callable[[Sequence[Command]], bool], *, tries: int = 800
) -> list[Command]:
    """A part of a failing program, with the simplest values, that still fails."""
    fails = in_budget(fails, iter(range(tries)))
    best = without_parts(list(program), fails)
    while simpler := next((part for part in simplified(best) if fails(part)), None):
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


def as_code(value: Any) -> str:
    """A command as one would write it."""
    if isinstance(value, tuple):
        return f"({', '.join(map(as_code, value))},)"
    if not dataclasses.is_dataclass(value):
        return repr(value)
    fields = [(field.name, getattr(value, field.name), field.default) for field in dataclasses.fields(value)]
    said = ", ".join(f"{name}={as_code(now)}" for name, now, default in fields if now != default)
    return f"{type(value).__name__}({said})"
