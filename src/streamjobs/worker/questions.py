"""Which answer in a log belongs to which request for approval. Pure; filled in the order of the log.

Rule: it decides as a run does: an answer without a key is for the oldest request that is open, one that came
before any request is kept for the next.
"""

from __future__ import annotations

from typing import NamedTuple

from streamjobs.approvals import Decision, decision_of
from streamjobs.events import SignalReceived

TIMEOUT = "approval:"
"""What the timer of a request is called, before the request's key."""


class Answer(NamedTuple):
    """What a person decided, and where the log has it."""

    seq: int
    decision: Decision


class Questions:
    """The requests of one log, by their keys; answers are known by their seq."""

    def __init__(self) -> None:
        self._open: list[str] = []
        self._answers: dict[str, Answer] = {}
        self._spent: dict[str, Answer] = {}
        self._early: list[Answer] = []

    def ask(self, key: str) -> None:
        """A request was made."""
        self._answers.pop(key, None)
        for answer in self._early:
            if answer.decision.key in {"", key}:
                self._early.remove(answer)
                self._answers[key] = answer
                return
        self._open.append(key)

    def answer(self, seq: int, signal: SignalReceived) -> None:
        """A signal came; most are no answers."""
        decision = decision_of(signal)
        if decision is None:
            return
        key = decision.key or next(iter(self._open), "")
        if key in self._open:
            self._open.remove(key)
            self._answers[key] = Answer(seq, decision)
        else:
            self._early.append(Answer(seq, decision))

    def expire(self, timer: str) -> None:
        """A timer fired; if it is a request's, nobody waits for its answer any more."""
        key = timer.removeprefix(TIMEOUT)
        if key != timer and key in self._open:
            self._open.remove(key)

    def settle(self, key: str) -> int | None:
        """What was asked is over: the seq of its answer, if there was one."""
        if key in self._open:
            self._open.remove(key)
        answer = self._answers.pop(key, None)
        if answer is None:
            return None
        self._spent[key] = answer
        return answer.seq

    def start_over(self) -> dict[str, Answer]:
        """Nothing is asked any more; the answers so far, which stand, and are for no other question."""
        answers = self._spent | self._answers
        for known in (self._open, self._answers, self._spent):
            known.clear()
        return answers
