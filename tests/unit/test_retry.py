"""Back-off: never at once, never for ever, never all together, and as long as the other side asks, within
reason."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamjobs.retry import Backoff, parse_retry_after

NOW = 1_750_000_000.0  # Sun, 15 Jun 2025 15:06:40 GMT


@given(st.integers(1, 10**9), st.floats(0, 1))
def test_a_delay_stays_between_half_and_the_whole_of_its_step(attempt: int, jitter: float):
    """A hot loop against a provider that is down; or a job that comes back in years."""
    backoff = Backoff(base=1.0, cap=300.0)
    step = min(300.0, 2.0 ** min(attempt - 1, 60))
    assert step / 2 <= backoff.delay(attempt, jitter=jitter) <= step


def test_delays_double_up_to_the_cap():
    """Twenty attempts within a minute, where the documentation says five minutes between them."""
    backoff = Backoff(base=1.0, cap=10.0)
    assert [backoff.delay(n, jitter=1.0) for n in range(1, 7)] == [1.0, 2.0, 4.0, 8.0, 10.0, 10.0]


def test_chance_spreads_jobs_that_failed_together():
    """A thousand jobs would come back in the same millisecond and fail together again."""
    delays = {Backoff().delay(5) for _ in range(50)}
    assert len(delays) > 40
    assert all(8.0 <= delay <= 16.0 for delay in delays)


def test_the_other_sides_wish_is_kept_but_not_beyond_the_cap():
    """Ignoring Retry-After gets a key blocked; obeying 'a day' would park the job for a day."""
    backoff = Backoff(base=1.0, cap=60.0)
    assert backoff.delay(1, at_least=20.0, jitter=0.0) == 20.0
    assert backoff.delay(1, at_least=86_400.0, jitter=0.0) == 60.0
    assert backoff.delay(6, at_least=1.0, jitter=1.0) == 32.0


@pytest.mark.parametrize("wish", [-5.0, 0.0, float("nan"), float("-inf")])
def test_a_senseless_wish_does_not_undo_the_delay(wish: float):
    """`max(nan, …)` is nan, and sleeping nan seconds is an exception in the retry loop."""
    assert Backoff(base=2.0).delay(1, at_least=wish, jitter=1.0) == 2.0


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0.0),
        ("3", 3.0),
        ("1.5", 1.5),
        (" 7 ", 7.0),
        ("-4", 0.0),
        ("Sun, 15 Jun 2025 15:07:10 GMT", 30.0),
        ("Sun, 15 Jun 2025 15:06:00 GMT", 0.0),
        ("Sunday, 15-Jun-25 15:07:10 GMT", 30.0),
        ("Sun, 15 Jun 2025 17:07:10 +0200", 30.0),
        ("Sun, 15 Jun 2025 15:07:10", 30.0),
    ],
)
def test_seconds_and_http_dates_are_read(value: str, seconds: float):
    """A provider's wish in the form it happens to use would be ignored."""
    assert parse_retry_after(value, NOW) == seconds


@pytest.mark.parametrize(
    "value",
    [
        None,
        "",
        "soon",
        "nan",
        "inf",
        "-inf",
        "1e999",
        "Sun, 99 Jun 2025 15:07:10 GMT",
        "15:07",
        "12:",
        "\x00",
        "9" * 400,
        "Sun, 15 Jun 99999999 15:07:10 GMT",
    ],
)
def test_what_is_neither_counts_as_no_wish(value: str | None):
    """A strange header would turn one failed request into a crashed job, or into an endless sleep."""
    assert parse_retry_after(value, NOW) is None
