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


def test_a_new_attempt_has_the_answers_for_their_own_questions():
    """A yes to a question of the first attempt would approve something else in the second."""
    questions = Questions()
    questions.ask("a")
    questions.answer(2, answer())
    questions.answer(3, SignalReceived(name="other", payload=None))
    assert {key: given.seq for key, given in questions.start_over().items()} == {"a": 2}
    assert questions.start_over() == {}
    questions.ask("a")
    assert questions.settle("a") is None
