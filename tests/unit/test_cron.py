"""When things recur: across changes of the clock, at odd instants, and what is refused."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamjobs.cron import ALIASES, Timing
from streamjobs.errors import Invalid

BERLIN = "Europe/Berlin"
NIGHTLY = Timing(cron="30 2 * * *", timezone=BERLIN)
SPRING = "2025-03-29T12:00"
"""The day before 02:00 becomes 03:00 in Berlin."""
AUTUMN = "2025-10-25T12:00"
"""The day before 03:00 becomes 02:00."""


def ms(text: str) -> int:
    return round(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp() * 1000)


def utc(tick: int) -> str:
    return datetime.fromtimestamp(tick / 1000, UTC).strftime("%Y-%m-%dT%H:%M")


def ticks(timing: Timing, after: str, count: int) -> list[str]:
    found: list[int] = [ms(after)]
    while len(found) <= count:
        found.append(timing.next_after(found[-1]))
    return [utc(tick) for tick in found[1:]]


# --- cron


def test_a_time_of_day_is_one_of_its_zone():
    """A report for three in the morning would come at five."""
    assert ticks(Timing(cron="0 3 * * *", timezone=BERLIN), "2025-07-01", 1) == ["2025-07-01T01:00"]
    assert ticks(Timing(cron="0 3 * * *", timezone=BERLIN), "2025-01-01", 1) == ["2025-01-01T02:00"]
    assert ticks(Timing(cron="0 3 * * *"), "2025-07-01", 1) == ["2025-07-01T03:00"]


def test_a_time_that_does_not_exist_comes_due_at_the_change():
    """Once a year the nightly report would be missing."""
    assert ticks(NIGHTLY, SPRING, 2) == ["2025-03-30T01:00", "2025-03-31T00:30"]


def test_a_time_that_exists_twice_comes_due_once():
    """Once a year the nightly report would be sent twice."""
    assert ticks(NIGHTLY, AUTUMN, 2) == ["2025-10-26T00:30", "2025-10-27T01:30"]


@pytest.mark.parametrize("after", ["2025-10-26T00:30", "2025-10-26T00:45", "2025-10-26T01:29"])
def test_the_second_time_is_none_also_for_who_asks_in_between(after: str):
    """A worker that starts in that hour would make the job again, or one in the past for ever."""
    assert ticks(NIGHTLY, after, 1) == ["2025-10-27T01:30"]


def test_what_runs_every_hour_does_so_every_hour_that_passes():
    """In autumn an hour of hourly work would be left out."""
    hourly = Timing(cron="0 * * * *", timezone=BERLIN)
    assert ticks(hourly, "2025-10-25T23:30", 4) == [f"2025-10-26T0{hour}:00" for hour in range(4)]
    assert ticks(hourly, "2025-03-29T23:30", 4) == [f"2025-03-30T0{hour}:00" for hour in range(4)]
    assert (
        len(Timing(cron="*/15 * * * *", timezone=BERLIN).between(ms(AUTUMN), ms(AUTUMN) + 86_400_000, 999))
        == 97
    )


def test_days_of_month_and_week_as_cron_has_them():
    """People paste what works in their crontab."""
    assert ticks(Timing(cron="0 0 1 * MON"), "2025-06-01T12:00", 3) == [
        "2025-06-02T00:00", "2025-06-09T00:00", "2025-06-16T00:00",
    ]  # fmt: skip
    assert ticks(Timing(cron="0 0 L * *"), "2024-02-01", 1) == ["2024-02-29T00:00"]
    assert ticks(Timing(cron="0 9 * * FRI#2"), "2025-08-01", 1) == ["2025-08-08T09:00"]
    assert ticks(Timing(cron="0 0 29 2 *"), "2097-01-01", 1) == ["2104-02-29T00:00"]


@pytest.mark.parametrize(
    ("alias", "first"),
    [
        ("@hourly", "2025-05-14T11:00"), ("@daily", "2025-05-15T00:00"), ("@midnight", "2025-05-15T00:00"),
        ("@weekly", "2025-05-18T00:00"), ("@monthly", "2025-06-01T00:00"), ("@yearly", "2026-01-01T00:00"),
        ("@annually", "2026-01-01T00:00"), ("@Daily ", "2025-05-15T00:00"),
    ],
)  # fmt: skip
def test_names_for_what_is_common(alias: str, first: str):
    """The names that every cron has would be refused, or mean something else."""
    assert alias.strip().lower() in ALIASES
    assert ticks(Timing(cron=alias), "2025-05-14T10:20", 1) == [first]


# --- intervals


def test_an_interval_is_counted_from_the_epoch():
    """Each restart of a worker would push the next tick away, and two workers would not agree."""
    every = Timing(every=90)
    assert every.next_after(0) == 90_000
    assert every.next_after(89_999) == 90_000
    assert every.next_after(90_000) == 180_000
    assert every.next_after(-1) == 0


def test_an_offset_moves_every_tick():
    """All hourly work of a fleet would begin in the same second."""
    late = Timing(every=3600, offset=0.5)
    assert late.next_after(0) == 500
    assert late.next_after(500) == 3_600_500
    assert late.between(500, 3_600_500, 10) == [500, 3_600_500]


def test_parts_of_a_second_do_not_drift():
    """A job a second and a half would become one a second."""
    every = Timing(every=1.5)
    assert every.between(1, 6_000, 10) == [1_500, 3_000, 4_500, 6_000]


# --- what was missed

TIMINGS = [
    NIGHTLY, Timing(cron="*/20 * * * *", timezone=BERLIN), Timing(every=1234.5, offset=7), Timing(every=1),
    Timing(cron="0 12 1 * *"), Timing(cron="30 0 * * *", timezone="America/Havana"),
    Timing(cron="15 1,2,3 * * *", timezone="Australia/Lord_Howe"),
]  # fmt: skip


@given(st.sampled_from(TIMINGS), st.integers(0, 2 * 10**12), st.integers(-5, 10**7), st.integers(1, 30))
def test_between_is_what_next_after_says(timing: Timing, first: int, length: int, limit: int):
    """What was missed would not be what would have come."""
    last = first + length
    found = timing.between(first, last, limit)
    assert all(first <= tick <= last for tick in found)
    assert len(found) <= limit
    for one, following in pairwise([*found, timing.next_after(last)]):
        assert timing.next_after(one) == following
    if len(found) < limit:
        assert timing.next_after(first - 1) == (found or [timing.next_after(last)])[0]


def test_the_newest_of_many_are_found_at_once():
    """A schedule of minutes that stood still for years would stop the sweep of a whole fleet."""
    assert Timing(every=1).between(0, 10**12, 2) == [10**12 - 1000, 10**12]
    minutes = Timing(cron="* * * * *").between(0, ms("2025-01-01"), 3)
    assert [utc(tick) for tick in minutes] == ["2024-12-31T23:58", "2024-12-31T23:59", "2025-01-01T00:00"]
    assert len(Timing(cron="0 0 29 2 *").between(0, ms("2025-01-01"), 100)) == 14


@given(st.sampled_from(TIMINGS), st.integers(0, 3 * 10**12))
def test_the_next_tick_is_later(timing: Timing, at: int):
    """A schedule would wait for a tick that has been, and make jobs without end."""
    assert timing.next_after(at) > at


@given(
    st.sampled_from(["30 2 * * *", "0 0 * * *", "*/10 1 * * *", "59 23 31 12 *"]), st.integers(0, 2 * 10**12)
)
def test_ticks_are_on_the_clock_of_the_zone(cron: str, at: int):
    """A tick at an instant that the expression does not name."""
    minute, hour, *_ = cron.split()
    moment = datetime.fromtimestamp(
        Timing(cron=cron, timezone=BERLIN).next_after(at) / 1000, ZoneInfo(BERLIN)
    )
    assert (
        hour in {"*", str(moment.hour)}
        or moment.utcoffset() != datetime.fromtimestamp(moment.timestamp() - 1, ZoneInfo(BERLIN)).utcoffset()
    )
    assert moment.second == moment.microsecond == 0
    assert minute.startswith("*") or moment.minute in {int(minute), 0}


# --- what is refused


@pytest.mark.parametrize(
    "cron",
    ["61 * * * *", "* * * *", "* * * * * *", "nonsense", "@often", "* * 30 2 *", "*/0 * * * *", "5-1 * * * *",
     "* * * * 8", "* * * FOO *", "é * * * *",
     "1" * 5000 + " * * * *", "* * * * 1L/2", "0 0 * * ²L", "*" * 300, "\0",
     "0 0 31 2,4 *", "* * */20 * 1L"],
)  # fmt: skip
def test_a_cron_that_makes_no_sense_is_refused(cron: str):
    """A job would never run, and nobody would know."""
    with pytest.raises(Invalid, match=r"^cron: ") as refused:
        Timing(cron=cron)
    assert len(str(refused.value)) < 400


def test_the_refusal_says_what_is_wrong():
    """Five fields, one of them wrong, and no word which."""
    with pytest.raises(Invalid, match="Bad hour"):
        Timing(cron="0 24 * * *")


@pytest.mark.parametrize(
    "zone", ["Europe/Berlyn", "", "../../etc/passwd", "/etc/passwd", "Europe", "é", "x" * 999, "\0"]
)
def test_a_zone_that_is_none_is_refused(zone: str):
    """Ticks would come at the wrong hour, or a file of the machine would be read."""
    with pytest.raises(Invalid, match=r"^timezone: "):
        Timing(cron="0 3 * * *", timezone=zone)


@pytest.mark.parametrize("every", [0.5, -1.0, math.nan, math.inf, 1e12])
def test_an_interval_out_of_bounds_is_refused(every: float):
    """A schedule of a thousand jobs a second."""
    with pytest.raises(Invalid, match=r"^every: "):
        Timing(every=every)


@pytest.mark.parametrize("offset", [-1.0, 60.0, math.nan, math.inf])
def test_an_offset_is_less_than_the_interval(offset: float):
    """The first tick would be a mystery."""
    with pytest.raises(Invalid, match=r"^offset: "):
        Timing(every=60, offset=offset)


def test_one_way_to_say_when():
    """Two that contradict, or none."""
    for wrong in ({}, {"cron": "* * * * *", "every": 5.0}):
        with pytest.raises(Invalid, match=r"^cron: "):
            Timing(**wrong)
    with pytest.raises(Invalid, match=r"^timezone: "):
        Timing(every=60, timezone=BERLIN)
    with pytest.raises(Invalid, match=r"^offset: "):
        Timing(cron="* * * * *", offset=1)
