"""Plays the same commands on the model and on real Redis, and compares all that comes of them.

Rule 1: time stands still unless a command moves it.
Rule 2: every reply is compared, every key and message regularly; and after each program all jobs must end.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from streamjobs.store.work import Batch
from tests.contract.callers import LEASE, LIMITS, START, Ear, ScriptCaller, plain
from tests.contract.commands import SLOT_IDS, Advance, Append, Ask, Command, Row, Strike, Take, Wake
from tests.contract.keyspace import PREFIX, Found, check_invariants, comparable, expected, found
from tests.model import Model

REST = (":events", ":sealed", ":children", ":seen", ":artifacts")
"""What the keys of a job but its head end with."""


class Difference(AssertionError):
    """Model and Redis disagree."""


class Duel:
    """A model and a Redis under the same commands. Empties the database first."""

    def __init__(self, call: ScriptCaller, ear: Ear, seen: Counter[str] | None = None) -> None:
        self.call = call
        self.ear = ear
        ear.heard()
        self.client = call.client
        self.client.flushdb()
        self.model = Model(LIMITS)
        self.seen: Counter[str] = Counter() if seen is None else seen
        self.leases: list[tuple[str, int]] = []
        self.sent: dict[tuple[str, int], Batch] = {}
        self.numbers: Counter[str] = Counter()
        self.last: Callable[[], None] = lambda: None
        self.latest = START
        self.set_clock(START)

    def set_clock(self, now: int) -> None:
        """Move both clocks, and take away what expires by then."""
        self.call.now = self.model.now = now
        self.latest = max(self.latest, now)
        jobs, records, takes = self.model.expired()
        gone = [f"job:{job.id}{rest}" for job in jobs for rest in ("", *REST)]
        gone += [f"idem:{key}" for key in records] + [f"take:{worker}" for worker in takes]
        if gone:
            self.client.delete(*(PREFIX + name for name in gone))
        self.model.forget_expired()

    def compare(self, script: str, answer: Callable[[], Any], *arguments: str | bytes | int) -> None:
        """Call a script and the model, and compare what they say. `last` does the same again."""

        def play() -> None:
            said = without_stream_ends(script, plain(self.call(script, *arguments)))
            wanted = plain(answer())
            if said != wanted:
                raise Difference(f"{script}{arguments}\n{differing(said, wanted)}")
            self.seen.update(verdicts(script, said))
            if script == "take":
                self.remember(said)

        self.last = play
        play()

    def remember(self, taken: list[Any]) -> None:
        leases = [(job[0], job[1]) for job in taken[1]]
        is_repeated = any(lease in self.leases for lease in leases)
        self.seen["take answered again"] += is_repeated
        self.leases += [lease for lease in leases if lease not in self.leases]

    def check(self) -> None:
        """Compare everything that is stored and was published, and judge what is stored."""
        published, self.model.published = self.model.published, []
        hinted, self.model.hinted = self.model.hinted, set()
        heard = self.ear.heard()
        told = [message for message in heard if message[0].startswith("owner:")]
        compare_states(
            {"published": Found([m for m in heard if m not in told], -1)}, {"published": Found(published, -1)}
        )
        hints = {(f"owner:{owner}:live", b"") for owner in hinted}
        compare_states({"hinted": Found(sorted({*told}), -1)}, {"hinted": Found(sorted(hints), -1)})
        state = found(self.client)
        compare_states(comparable(state), expected(self.model))
        try:
            check_invariants(state)
        except AssertionError as error:
            raise Difference(str(error)) from error

    def run(self, program: Sequence[Command], *, check_every: int = 8) -> None:
        """Play a program, then let all jobs end; every job must."""
        for number, command in enumerate(program, 1):
            command.play(self)
            if number % check_every == 0:
                self.check()
        self.check()
        self.seen["commands"] += len(program)
        self.seen.update(self.told())
        self.bring_to_an_end()

    def bring_to_an_end(self) -> None:
        """Faults have stopped: workers finish what they take, signals and resumes come. Nothing may be left.

        First by the clock as it is, which may have stepped back; then it is set right.
        """
        corrected = max(0, self.latest - self.model.now)
        for what in tuple(self.model.strikes):
            Strike("lift", what).play(self)
        for pause in (LEASE // 3,) * 8 + (corrected,) + (LEASE // 2,) * 3 + (12 * LEASE,) * 8:
            if not self.model.live_jobs():
                break
            for job in self.model.live_jobs():
                ask = {"waiting": "signal", "paused": "resume"}.get(job.status)
                if ask is not None:
                    Ask(ask, SLOT_IDS.index(job.id), self.model.now).play(self)
            self.finish_what_is_taken()
            Advance(pause).play(self)
            Wake().play(self)
        self.check()
        left = {job.id: job.status for job in self.model.live_jobs()}
        if left or self.places():
            raise Difference(f"never ended: {left}, left behind: {self.places()}")

    def finish_what_is_taken(self) -> None:
        """One take and the end of all that it leased; what others hold is lost, for the sweep to find."""
        before = len(self.leases)
        Take(wanted=10).play(self)
        taken = len(self.leases) - before
        if taken:
            Append(tuple(Row(lease=i, outcome="completed") for i in range(taken))).play(self)

    def places(self) -> list[str]:
        """Keys that live jobs only may have."""
        names = [name.decode().removeprefix(PREFIX) for name in self.client.keys(f"{PREFIX}*")]  # type: ignore[union-attr]
        return [name for name in names if re.match("leases|timers|held|running:|tickets|ckey:", name)]

    def told(self) -> Counter[str]:
        """What the logs say happened, for scripts that do several things without a word for each."""
        whys: Counter[str] = Counter()
        for job in self.model.jobs.values():
            for entry in job.log:
                said = msgspec.json.decode(entry.content)
                why = said.get("why", "")
                whys[f"{entry.type} {why}".strip()] += 1
                whys[f"held {said.get('held', '')}"] += 1
        return whys


def without_stream_ends(script: str, reply: Any) -> Any:
    """A take's answer with the streams' names only: where they end is by Redis's own clock."""
    if script == "take":
        reply[2] = [name.removeprefix(PREFIX) for name in reply[2][::2]]
    return reply


def compare_states(said: dict[str, Found], wanted: dict[str, Found]) -> None:
    if said != wanted:
        raise Difference(differing(said, wanted))


def differing(said: Any, wanted: Any, path: str = "") -> str:
    """The smallest parts that differ, a line each."""
    if isinstance(said, dict) and isinstance(wanted, dict):
        parts = [(str(name), said.get(name), wanted.get(name)) for name in sorted({*said, *wanted}, key=str)]
    elif isinstance(said, list | tuple) and isinstance(wanted, list | tuple) and len(said) == len(wanted):
        parts = [(str(i), one, other) for i, (one, other) in enumerate(zip(said, wanted, strict=True))]
    else:
        return f"  {path or 'all'}: redis {said!r}, model {wanted!r}"
    return "\n".join(
        differing(one, other, f"{path} {name}".strip()) for name, one, other in parts if one != other
    )


def verdicts(script: str, said: Any) -> list[str]:
    """Each thing that a reply says, by name."""
    rows: dict[str, Callable[[], list[str]]] = {
        "submit": lambda: [f"{row[0]} {row[1]}" if row[0] == "parent" else row[0] for row in said],
        "append": lambda: [" ".join(row[:2]) if row[0] == "limit" else row[0] for row in said],
        "renew": lambda: [row[0] for row in said[1]],
        "take": lambda: ["leased" if said[1] else "nothing"] + ["ends"] * bool(said[2]),
        "wake": lambda: [what for _, what in said[3]] + ["more"] * said[2],
    }
    rows["artifact"] = lambda: [" ".join(said) if said[0] == "limit" else said[0]]
    script = "append" if script == "always" else script
    return [f"{script} {word}" for word in rows.get(script, lambda: [said[0]])()]
