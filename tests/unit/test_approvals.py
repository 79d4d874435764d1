"""What people send to approve or deny: read kindly in form, strictly in substance."""

from __future__ import annotations

from typing import Any

import pytest

from streamjobs.approvals import Decision, canonical, decision_in, decision_of
from streamjobs.errors import Invalid
from streamjobs.events import SignalReceived


@pytest.mark.parametrize(
    ("name", "payload", "approved"),
    [
        ("approval", {"decision": "approve"}, True),
        ("approval", {"decision": "deny"}, False),
        ("approval", {"decision": " Approved "}, True),
        ("approval", {"decision": "denied"}, False),
        ("approval", {"decision": True}, True),
        ("approval", {"approve": True}, True),
        ("approval", {"approve": False}, False),
        ("approval", {"approved": True}, True),
        ("approval", {"deny": True}, False),
        ("approval", "approve", True),
        ("approval", "deny", False),
        ("approval", True, True),
        ("approval", False, False),
        ("approve", None, True),
        ("approve", {}, True),
        ("approve", "go ahead", True),
        ("deny", None, False),
        ("deny", "not on a Friday", False),
    ],
)
def test_a_decision_is_read_in_every_form(name: str, payload: Any, approved: bool):
    """A person says yes, and the job waits on since a key was called otherwise."""
    decision = decision_of(SignalReceived(name=name, payload=payload))
    assert decision is not None
    assert decision.approved is approved


@pytest.mark.parametrize("name", ["approval", "approve", "deny"])
@pytest.mark.parametrize(
    "payload",
    [
        {"decision": "maybe"},
        {"decision": 1},
        {"decision": "approve", "approve": False},
        {"approved": "false"},
        {"approve": True, "deny": True},
    ],
)
def test_nothing_is_approved_by_a_guess(name: str, payload: Any):
    """A payment goes out since `"false"` counts as true."""
    assert decision_of(SignalReceived(name=name, payload=payload)) is None
    with pytest.raises(Invalid, match=r"^payload\."):
        decision_in(name, payload)


@pytest.mark.parametrize("payload", [None, {}, {"comment": "hm"}, 1, [], ["approve"], ""])
def test_an_approval_must_say_which(payload: Any):
    """An empty signal, sent to try the route, lets a job go on."""
    assert decision_of(SignalReceived(name="approval", payload=payload)) is None
    with pytest.raises(Invalid, match=r"^payload\.decision: "):
        canonical("approval", payload)


@pytest.mark.parametrize(
    ("name", "payload"), [("approve", {"decision": "deny"}), ("deny", {"approve": True}), ("approve", False)]
)
def test_a_name_and_a_payload_that_disagree_decide_nothing(name: str, payload: Any):
    """A form that posts `deny` to the wrong name approves."""
    with pytest.raises(Invalid, match=r"^payload\.decision: "):
        decision_in(name, payload)


def test_who_decided_and_about_what_is_kept():
    """The log does not say who let it happen, or a yes to one request is taken as a yes to another."""
    signal = SignalReceived(
        name="approval",
        payload={"decision": "deny", "comment": "too many", "key": "send#1"},
        key="dedupe",
        by="alice",
    )
    assert decision_of(signal) == Decision(approved=False, comment="too many", key="send#1", by="alice")


@pytest.mark.parametrize("member", ["comment", "key"])
def test_a_key_or_comment_that_is_no_text_is_refused(member: str):
    """A yes meant for one request, with its key mistyped, would be for all of them."""
    with pytest.raises(Invalid, match=rf"^payload\.{member}: text"):
        decision_in("approval", {"decision": "approve", member: 5})


@pytest.mark.parametrize("name", ["ready", "Approval", "approved", ""])
def test_other_signals_are_left_alone(name: str):
    """A workflow's own signals would be rewritten, or taken for a decision."""
    payload = {"decision": "approve", "approve": False}
    assert decision_of(SignalReceived(name=name, payload=payload)) is None
    assert canonical(name, payload) == (name, payload)


@pytest.mark.parametrize(
    ("name", "payload", "logged"),
    [
        ("approve", "fine", {"decision": "approve", "comment": "fine", "key": ""}),
        ("deny", {"comment": "no", "key": "k"}, {"decision": "deny", "comment": "no", "key": "k"}),
        ("approval", {"approved": True}, {"decision": "approve", "comment": "", "key": ""}),
        ("approval", False, {"decision": "deny", "comment": "", "key": ""}),
        ("approve", {"ticket": 7}, {"ticket": 7, "decision": "approve", "comment": "", "key": ""}),
    ],
)
def test_the_log_has_one_form(name: str, payload: Any, logged: dict[str, Any]):
    """Everybody who reads the log must know every form that anybody may have sent."""
    assert canonical(name, payload) == ("approval", logged)
    assert canonical("approval", logged) == ("approval", logged)
