"""The users of `deploy/redis/users.acl` as the tests' servers have them."""

from __future__ import annotations

import hashlib
from pathlib import Path

FILE = Path(__file__).parents[1] / "deploy" / "redis" / "users.acl"
USER, METRICS = "streamjobs", "streamjobs-metrics"
PASSWORD, METRICS_PASSWORD = "tests-only", "tests-only-too"


def users() -> str:
    """The file as an operator fills it in."""
    text = FILE.read_text()
    for name, password in (("STREAMJOBS", PASSWORD), ("METRICS", METRICS_PASSWORD)):
        digest = hashlib.sha256(password.encode()).hexdigest()
        text = text.replace(f"{name}_PASSWORD_SHA256", digest)
    return text


def users_and_tester() -> str:
    """The same with a default user that may do all: tests break and empty what they test."""
    off = "user default off\n"
    assert off in users()
    return users().replace(off, "user default on nopass ~* &* +@all\n")
