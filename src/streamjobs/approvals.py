"""What a person decided: the signals that answer an `approval.requested`. Pure.

Rule 1: the names `approval`, `approve` and `deny` are ours; in the log it is always `approval`, with
`{"decision": "approve" | "deny", "comment", "key"}`: `canonical` makes it so before it is written.
Rule 2: reading is lenient in form (`true`, `"approved"`, `{"approve": true}`), never in substance: what
says nothing, or two things at once, is no decision. Nothing is ever approved by a guess.
Rule 3: a decision with a `key` is for that request only; without one, for the oldest that waits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import msgspec

from streamjobs.errors import Invalid
from streamjobs.events import Json, SignalReceived

APPROVAL = "approval"
"""The signal's name in the log."""

_SHORT_FORMS = {"approve": True, "deny": False}
_WORDS = {"approve": True, "approved": True, "deny": False, "denied": False}
_FLAGS = ("approve", "approved", "deny", "denied")


class Decision(msgspec.Struct, frozen=True):
    """Somebody's answer; an empty `key` is for the oldest request that waits."""

    approved: bool
    comment: str = ""
    key: str = ""
    by: str = ""


def decision_of(signal: SignalReceived) -> Decision | None:
    """The decision that a signal of the log carries; None where it is no approval, or decides nothing."""
    try:
        return decision_in(signal.name, signal.payload, by=signal.by)
    except Invalid:
        return None


def decision_in(name: str, payload: Json, *, by: str = "") -> Decision | None:
    """The decision that a signal carries; None where its name is none of an approval's.

    Raises `Invalid`, naming the field, where it decides nothing, contradicts itself, or where its `comment`
    or `key` is not text.
    """
    if name != APPROVAL and name not in _SHORT_FORMS:
        return None
    said = _said(payload, is_comment=name in _SHORT_FORMS)
    if name in _SHORT_FORMS:
        said.add(_SHORT_FORMS[name])
    if len(said) != 1:
        raise Invalid('payload.decision: "approve" or "deny"')
    comment = payload if isinstance(payload, str) and name in _SHORT_FORMS else _text("comment", payload)
    return Decision(said.pop(), comment, _text("key", payload), by)


def canonical(name: str, payload: Json) -> tuple[str, Json]:
    """A signal's name and payload as the log has them; those of other signals are left as they are.

    Other members of an approval's payload stay. Raises `Invalid` as `decision_in`.
    """
    decision = decision_in(name, payload)
    if decision is None:
        return name, payload
    kept = {member: value for member, value in _members(payload).items() if member not in _FLAGS}
    word = "approve" if decision.approved else "deny"
    return APPROVAL, {**kept, "decision": word, "comment": decision.comment, "key": decision.key}


def _said(payload: Json, *, is_comment: bool) -> set[bool]:
    """Everything that a payload says of the decision; a short form's text is its comment."""
    if isinstance(payload, bool):
        return {payload}
    if isinstance(payload, str):
        return set() if is_comment else _in_words(payload)
    members = _members(payload)
    said = _in_words(members["decision"]) if "decision" in members else set[bool]()
    for flag in _FLAGS:
        value = members.get(flag)
        if isinstance(value, bool):
            said.add(value == _WORDS[flag])
        elif value is not None:
            raise Invalid(f"payload.{flag}: true or false")
    return said


def _in_words(value: Json) -> set[bool]:
    if isinstance(value, bool):
        return {value}
    word = value.strip().lower() if isinstance(value, str) else ""
    if word not in _WORDS:
        raise Invalid('payload.decision: "approve" or "deny"')
    return {_WORDS[word]}


def _text(member: str, payload: Json) -> str:
    value = _members(payload).get(member)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Invalid(f"payload.{member}: text")
    return value


def _members(payload: Json) -> Mapping[str, Json]:
    return cast("Mapping[str, Json]", payload) if isinstance(payload, dict) else {}
