"""Which answer in a log belongs to which request for approval. Pure; filled in the order of the log.

Rule 1: it decides as a run does: an answer without a key is for the oldest request that is open, and one that
came before any request is kept for the next.
Rule 2: in a new attempt of the job an answer stands for the question it was given to, and for no other.
"""

from __future__ import annotations

from streamjobs.approvals import decision_of
from streamjobs.events import SignalReceived

TIMEOUT = "approval:"
"""What the timer of a request is called, before the request's key."""


class Questions:
    """The requests of one log, by their keys; answers are known by their seq."""

    def __init__(self) -> None:
        self._open: list[str] = []
        self._answers: dict[str, int] = {}
        self._spent: dict[str, int] = {}
        self._early: dict[int, str] = {}

    def ask(self, key: str) -> None:
        """A request was made."""
        fitting = [seq for seq, wanted in self._early.items() if wanted in {"", key}]
        if fitting:
            self._answers[key] = min(fitting)
            del self._early[min(fitting)]
        else:
            self._open.append(key)

    def answer(self, seq: int, signal: SignalReceived) -> None:
        """A signal came; most are no answers."""
        decision = decision_of(signal)
        if decision is None:
            return
        key = decision.key or next(iter(self._open), "")
        if key in self._open:
            self._open.remove(key)
            self._answers[key] = seq
        else:
            self._early[seq] = decision.key

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
        if answer is not None:
            self._spent[key] = answer
        return answer

    def start_over(self) -> dict[int, str]:
        """A new attempt: all answers so far, and the question that each is for."""
        given = {seq: key for key, seq in (self._spent | self._answers).items()}
        self._early |= given
        for known in (self._open, self._answers, self._spent):
            known.clear()
        return given
