"""Policies of retention: how long an ended job is kept, by kind and outcome. Pure.

As text: `chat:failed=90d, chat=60d, *:cancelled=1h`, in `d`, `h`, `min` or `s`. The first that fits decides.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import msgspec

from streamjobs.errors import ConfigError

_POLICY = re.compile(
    r"(\*|[A-Za-z0-9._-]{1,64})(?::(\*|completed|failed|cancelled))?=(\d{1,9}(?:\.\d{1,3})?)(d|h|min|s)",
    re.ASCII,
)
_UNITS = {"d": 86400.0, "h": 3600.0, "min": 60.0, "s": 1.0}
_LONGEST = 10 * 365 * 86400.0


class Policy(msgspec.Struct, frozen=True):
    """Ended jobs of this kind and outcome (`*` for any) are kept so many seconds."""

    kind: str
    outcome: str
    seconds: float

    def fits(self, kind: str, outcome: str) -> bool:
        """Whether a job is one of them."""
        return self.kind in {"*", kind} and self.outcome in {"*", outcome}


def parse_policies(texts: Iterable[str]) -> tuple[Policy, ...]:
    """Read policies. Raises `ConfigError` that quotes what is none."""
    return tuple(map(_parsed, texts))


def kept_for(policies: Iterable[Policy], kind: str, outcome: str) -> float | None:
    """For how many seconds a job is kept; None where no policy says."""
    return next((policy.seconds for policy in policies if policy.fits(kind, outcome)), None)


def _parsed(text: str) -> Policy:
    match = _POLICY.fullmatch(text.replace(" ", ""))
    if match is None:
        raise ConfigError(
            f"setting 'retention_policies': {text!r} is no <kind>[:<outcome>]=<number>d|h|min|s"
        )
    seconds = float(match[3]) * _UNITS[match[4]]
    if not 0 < seconds <= _LONGEST:
        raise ConfigError(f"setting 'retention_policies': {text!r} is more than ten years, or nothing")
    return Policy(match[1], match[2] or "*", seconds)
