"""Which answer belongs to which question of a log."""

from __future__ import annotations

from streamjobs.events import SignalReceived
from streamjobs.worker.questions import Questions


def answer(key: str = "") -> SignalReceived:
    return SignalReceived(name="approval", payload={"decision": "approve", "comment": "", "key": key})


def test_an_answer_without_a_key_is_for_the_oldest_open_question():
    """A yes would be taken for a question that was asked later."""
    questions = Questions()
    questions.ask("a")
    questions.ask("b")
    questions.answer(3, answer())
    questions.answer(4, answer())
    assert (questions.settle("a"), questions.settle("b")) == (3, 4)


def test_an_answer_with_a_key_is_for_that_question_only():
    """Somebody who answers the second question would have answered the first."""
    questions = Questions()
    questions.ask("a")
    questions.ask("b")
    questions.answer(3, answer("b"))
    assert (questions.settle("a"), questions.settle("b")) == (None, 3)


def test_an_early_answer_is_for_the_next_question_and_for_one_only():
    """An answer that came before its question would be lost, or answer all that follow."""
    questions = Questions()
    questions.answer(1, answer())
    questions.ask("a")
    questions.ask("b")
    assert (questions.settle("a"), questions.settle("b")) == (1, None)


def test_a_question_that_timed_out_takes_no_answer():
    """An answer that came too late would not reach who waits for one now."""
    questions = Questions()
    questions.ask("a")
    questions.expire("approval:a")
    questions.ask("b")
    questions.answer(5, answer())
    assert questions.settle("b") == 5


def test_in_a_new_attempt_an_answer_stands_for_its_own_question():
    """A yes of the first attempt would approve something else in the second, or be asked for again."""
    questions = Questions()
    questions.ask("over")
    questions.ask("open")
    questions.answer(3, answer())
    questions.answer(4, SignalReceived(name="other", payload=None))
    questions.settle("over")
    questions.answer(5, answer())
    given = questions.start_over()
    assert {key: known.seq for key, known in given.items()} == {"over": 3, "open": 5}
    questions.ask("new")
    assert questions.settle("new") is None
