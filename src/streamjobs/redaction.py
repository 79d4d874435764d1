"""Takes secrets out of text that is logged, recorded or shown. Pure, but for what it was told to look for.

Two ways, since neither is enough: what looks like a secret, wherever it comes from, and the very values that
this process was given, however they look.

Rule 1: only what stands where secrets stand is taken for one. Words of people must stay readable.
Rule 2: the time it takes grows with the text alone: a pattern begins once in any run of what it may go over.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from urllib.parse import quote

HIDDEN = "[hidden]"
_SHORTEST = 6
"""Shorter ones are stand-ins, and parts of common words."""

_NAME = (
    r"(?:[\w.-]*[_.-])?(?:api|auth|access|client|secret|private|session|refresh)?"
    r"(?:token|key|secret|signature|password|passwd|credentials?|authorization)"
)
_HEADER = r"(?:authorization|cookie|x-api-key)"
_QUOTE = r"\\?[\"']"
_VALUE = r"[^\s&#\"'<>\\,;)}\]]*[^\s&#\"'<>\\,;)}\]:.!?]"
_LOOKS = re.compile(
    "|".join(
        (
            # https://user:password@host
            r"(?<=://)[^\s/@\"'\\]+(?=@)",
            # ?api_key=… and &X-Amz-Signature=…, of URLs
            rf"(?<=[?&])(?P<query>{_NAME}|sig)={_VALUE}",
            # api_key=…, password=…
            rf"\b(?P<named>(?:\w+_)?(?:api|access|secret|private|client)[_-]?(?:key|token|secret)|password)={_VALUE}",
            # Authorization: Bearer …, as a header, and quoted in JSON or a dict
            rf"(?P<header>\b{_HEADER}\s*[:=]\s*|\b{_HEADER}{_QUOTE}\s*:\s*{_QUOTE})(?:\w+ )?{_VALUE}",
            rf"(?P<scheme>\bBearer )(?=[^\s\"']*[0-9]){_VALUE}",
            # keys of providers, of webhooks, of repositories and clouds; JSON web tokens
            r"\b(?:sk|rk|pk)-[\w-]{12,}",
            r"\bwhsec_[\w+/=-]{8,}",
            r"\bgh[opsru]_\w{20,}|\bgithub_pat_\w{20,}|\bxox[abprs]-[\w-]{10,}|\bAKIA[A-Z0-9]{16}\b",
            r"(?<![\w-])eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*",
        )
    ),
    re.IGNORECASE,
)

_known: set[str] = set()
_values: re.Pattern[str] | None = None


def learn(secrets: Iterable[str]) -> None:
    """Hide these values from now on, however a text writes them: plain, in a URL, in JSON."""
    global _values  # noqa: PLW0603 - a process has one set of secrets, and logs from anywhere in it
    for secret in secrets:
        if len(secret) >= _SHORTEST:
            _known.update((secret, quote(secret, safe=""), json.dumps(secret)[1:-1]))
    longest_first = sorted(_known, key=len, reverse=True)
    _values = re.compile("|".join(map(re.escape, longest_first))) if _known else None


def redacted(text: str) -> str:
    """The text without secrets. A JSON text stays one."""
    if _values is not None:
        text = _values.sub(HIDDEN, text)
    return _LOOKS.sub(_hidden, text)


def _hidden(found: re.Match[str]) -> str:
    named = found["query"] or found["named"]
    return f"{named}={HIDDEN}" if named else f"{found['header'] or found['scheme'] or ''}{HIDDEN}"
