"""Back-off: how long to wait before the next attempt. Pure, but for the jitter.

Full jitter between half and the whole of the exponential delay, so that many jobs that
failed together do not come back together.
"""

from __future__ import annotations

import math
import random
from datetime import UTC
from email.utils import parsedate_to_datetime

import msgspec


class Backoff(msgspec.Struct, frozen=True):
    """Exponential back-off, in seconds: `base * factor ** (attempt - 1)`, at most `cap`."""

    base: float = 1.0
    cap: float = 300.0
    factor: float = 2.0

    def delay(self, attempt: int, *, at_least: float | None = None, jitter: float | None = None) -> float:
        """Seconds to wait after failed attempt number `attempt` (1 is the first).

        `at_least` is the other side's wish (Retry-After), itself held to `cap`; `jitter` in 0..1
        replaces chance.
        """
        share = random.random() if jitter is None else jitter
        exponential = min(self.cap, self.base * self.factor ** min(attempt - 1, 64))
        own = exponential * (0.5 + 0.5 * share)
        return max(
            own, min(at_least or 0.0, self.cap)
        )  # in this order, a wish that is nan counts for nothing


class Retry(msgspec.Struct, frozen=True, kw_only=True):
    """How often something that fails is tried, and how long is waited in between, in seconds.

    `attempts` counts the first one; what is an instance of `non_retryable`, or has one of its names or codes,
    is not tried again.
    """

    attempts: int = 3
    base: float = 1.0
    cap: float = 300.0
    factor: float = 2.0
    non_retryable: tuple[type[BaseException] | str, ...] = ()

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError("attempts: at least 1")
        if min(self.base, self.cap, self.factor) < 0:
            raise ValueError("base, cap and factor: at least 0")

    @property
    def backoff(self) -> Backoff:
        """The delays between attempts."""
        return Backoff(self.base, self.cap, self.factor)

    def forbids(self, error: BaseException, code: str = "") -> bool:
        """Whether `error` is one that is never tried again."""
        names = {cls.__name__ for cls in type(error).__mro__} | {code}
        return any(
            one in names if isinstance(one, str) else isinstance(error, one) for one in self.non_retryable
        )


def parse_retry_after(value: str | None, now: float) -> float | None:
    """Read a Retry-After header: seconds or an HTTP date (RFC 9110, 10.2.3).

    Returns seconds from `now` (a unix time), never negative; None where there is none or it does not parse.
    """
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = _seconds_until(value, now)
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _seconds_until(date: str, now: float) -> float:
    try:
        at = parsedate_to_datetime(date)
        return at.replace(tzinfo=at.tzinfo or UTC).timestamp() - now
    except (ValueError, OverflowError):
        return math.nan
