"""Principals: whose request it is, and what it may do.

Rule 1: what is stored belongs to an owner, one string: `<tenant>/<subject>`. A tenant holds no slash, so two
principals have one owner only where they are the same.
Rule 2: a scope allows, nothing forbids. What no scope allows is refused.
"""

from __future__ import annotations

import re
from typing import Literal, get_args

import msgspec

from streamjobs.errors import Invalid

Scope = Literal["jobs:read", "jobs:write", "act-as", "admin"]
"""jobs:read: look at one's own jobs, lists, streams, notices, schedules · jobs:write: change them ·
act-as: name the subject, any of the tenant's, in `X-Streamjobs-Owner` · admin: see every job, operate"""

SCOPES: frozenset[str] = frozenset(get_args(Scope))
DEFAULT_SCOPES = frozenset({"jobs:read", "jobs:write"})

_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_SUBJECT = re.compile(r"[^\x00-\x1f\x7f|]{1,128}")


class Principal(msgspec.Struct, frozen=True, kw_only=True):
    """Who asks. `credential` names what proved it, without being it; `job`: for this job only.

    Without a tenant the subject is the owner: so it is where nobody is asked who he is.
    """

    subject: str
    tenant: str = ""
    scopes: frozenset[str] = DEFAULT_SCOPES
    credential: str = ""
    job: str = ""

    @property
    def owner(self) -> str:
        """Whose things these are."""
        return f"{self.tenant}/{self.subject}" if self.tenant else self.subject

    @property
    def sees_all(self) -> bool:
        """Whether every job is shown to it."""
        return "admin" in self.scopes

    def acting_as(self, subject: str) -> Principal:
        """The same for another subject of its tenant. Raises `Invalid`."""
        return msgspec.structs.replace(self, subject=subject_of(subject))


def tenant_of(text: object) -> str:
    """Check a tenant's name. Raises `Invalid`."""
    if not isinstance(text, str) or not _TENANT.fullmatch(text):
        raise Invalid("tenant: 1 to 64 of letters, digits and ._-, the first no sign")
    return text


def subject_of(text: object) -> str:
    """Check a subject's name. Raises `Invalid`."""
    if not isinstance(text, str) or not _SUBJECT.fullmatch(text) or not _is_text(text):
        raise Invalid("subject: 1 to 128 characters, no control characters and no |")
    return text


def scopes_of(names: object) -> frozenset[str]:
    """Scopes, of a list or of words. Raises `Invalid` for one that nobody knows."""
    words = names.split() if isinstance(names, str) else names
    if not isinstance(words, list | tuple | set | frozenset):
        raise Invalid("scopes: a list of names, or names with spaces between")
    found = {str(word) for word in words}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    if unknown := found - SCOPES:
        raise Invalid(f"scopes: {', '.join(sorted(unknown))} is none of {', '.join(sorted(SCOPES))}")
    return frozenset(found)


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
