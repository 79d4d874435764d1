"""What becomes of ticks that nobody was there for."""

from __future__ import annotations

from typing import Any

import pytest

from streamjobs.cron import Timing
from streamjobs.errors import Invalid
from streamjobs.schedule import Plan, Schedule

MINUTE = 60_000
HOUR = 60 * MINUTE


def schedule(every: float = 60.0, **fields: Any) -> Schedule:
    return Schedule(**({"name": "s", "kind": "k", "timing": Timing(every=every)} | fields))


@pytest.mark.parametrize("missed", ["skip", "once", "all"])
def test_a_tick_in_time_gives_its_job(missed: Any):
    """The ordinary case, whatever is to happen in the others."""
    assert schedule(missed=missed).plan(MINUTE, MINUTE + 700) == Plan([MINUTE], 2 * MINUTE, 0)


def test_skip_runs_what_is_fresh():
    """A nightly report at noon, when nobody wants it; or none at all because of one slow second."""
    assert schedule(HOUR / 1000).plan(HOUR, HOUR + MINUTE) == Plan([HOUR], 2 * HOUR, 0)
    assert schedule(HOUR / 1000).plan(HOUR, HOUR + MINUTE + 1) == Plan([], 2 * HOUR, 1)
    assert schedule(HOUR / 1000).plan(HOUR, 4 * HOUR + 5) == Plan([4 * HOUR], 5 * HOUR, 3)


def test_skip_runs_every_tick_of_a_short_interval():
    """Ticks of a second would be lost whenever a sweep takes two."""
    assert schedule(1.0).plan(1000, 4200) == Plan([1000, 2000, 3000, 4000], 5000, 0)


def test_once_runs_the_newest():
    """After a weekend without power the database would be cleaned fifty times in a row."""
    assert schedule(missed="once").plan(MINUTE, 50 * MINUTE + 1) == Plan([50 * MINUTE], 51 * MINUTE, 49)


def test_all_runs_each_in_order():
    """An invoice would be missing for each day that was missed."""
    plan = schedule(missed="all").plan(MINUTE, 5 * MINUTE)
    assert plan == Plan([MINUTE * i for i in (1, 2, 3, 4, 5)], 6 * MINUTE, 0)


def test_all_is_bounded():
    """A schedule of minutes that stood still for a year would file half a million jobs."""
    plan = schedule(missed="all").plan(MINUTE, 300 * MINUTE)
    assert (len(plan.ticks), plan.ticks[-1], plan.skipped) == (100, 300 * MINUTE, 200)


def test_an_instant_that_is_no_tick_gives_no_job():
    """A schedule that was changed while it waited would run once more by its old rule."""
    assert schedule(missed="all").plan(MINUTE + 5, MINUTE + 10) == Plan([], 2 * MINUTE, 0)


@pytest.mark.parametrize(
    ("field", "value"), [("missed", "later"), ("overlap", "queue"), ("name", " "), ("name", "")]
)
def test_what_makes_no_sense_is_refused(field: str, value: str):
    """A typo would be found when the first tick is missed."""
    with pytest.raises(Invalid, match=f"^{field}: "):
        schedule(**{field: value})
