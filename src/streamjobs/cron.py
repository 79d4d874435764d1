"""When something recurs: a cron expression in a time zone, or an interval. Pure; the time is an argument.

Rule 1: instants are ms since the epoch; what comes due at one is a tick.
Rule 2: ticks follow from the timing alone, so every process that computes them gets the same.
Rule 3: what cannot be meant raises `Invalid` with the field in front.

Cron has five fields (minute, hour, day of month, month, day of week) as Debian's cron reads them, or one of
`ALIASES`. Where the clocks change, so does Debian's cron: a time of day that does not exist that day comes
due at the change, one that exists twice comes due once, the first time; expressions whose minute or hour
begins with `*` follow the clock on the wall, so each hour that really passes has its ticks.

An interval is counted from the epoch (UTC) plus `offset`: `every=3600` is every full hour, whenever the
schedule was made, and two processes need not agree on a beginning.

Rejected: croniter, in which a time of day that exists twice comes due twice.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, tzinfo
from zoneinfo import ZoneInfo

import msgspec
from cronsim import CronSim, CronSimError

from streamjobs.errors import Invalid

ALIASES = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}

MIN_EVERY = 1.0
MAX_EVERY = 10 * 366 * 86400.0

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_FIELDS = 5
_MAX_LENGTH = 200
_MINUTE = 60_000


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """Either `cron` in `timezone` (IANA, as `Europe/Berlin`), or `every` seconds, `offset` after the epoch.

    Raises `Invalid` that begins with `cron`, `timezone`, `every` or `offset`.
    """

    cron: str = ""
    timezone: str = "UTC"
    every: float = 0.0
    offset: float = 0.0

    def __post_init__(self) -> None:
        if bool(self.cron) == bool(self.every):
            raise Invalid("cron: exactly one of `cron` and `every` is needed")
        if self.cron:
            self._check_cron()
        else:
            self._check_interval()

    def next_after(self, ms: int) -> int:
        """The first tick later than `ms`."""
        return next(self._after(ms))

    def between(self, first_ms: int, last_ms: int, limit: int) -> list[int]:
        """The newest `limit` ticks from `first_ms` to `last_ms`, both included; oldest first."""
        if self.every:
            step, last = self._step, self._at_or_before(last_ms)
            count = min(limit, max(0, (last - first_ms) // step + 1))
            return [last - step * i for i in reversed(range(count))]
        span = limit * _MINUTE
        while True:
            begin = max(first_ms, last_ms - span)
            ticks = list(itertools.takewhile(lambda tick: tick <= last_ms, self._after(begin - 1)))
            if begin == first_ms or len(ticks) >= limit:
                return ticks[-limit:]
            span *= 8

    def _after(self, ms: int) -> Iterator[int]:
        if self.every:
            yield from itertools.count(self._at_or_before(ms) + self._step, self._step)
        for moment in CronSim(_expanded(self.cron), _local(ms, _zone(self.timezone))):
            tick = round((moment - _EPOCH) / timedelta(milliseconds=1))
            if tick > ms:  # begun in an hour that comes twice, the first one may lie behind
                ms = tick
                yield tick

    @property
    def _step(self) -> int:
        return round(self.every * 1000)

    def _at_or_before(self, ms: int) -> int:
        return ms - (ms - round(self.offset * 1000)) % self._step

    def _check_cron(self) -> None:
        if self.offset:
            raise Invalid("offset: only together with `every`")
        zone = _zone(self.timezone)
        expression = _expanded(self.cron)
        try:
            if len(self.cron) > _MAX_LENGTH or len(expression.split()) != _FIELDS:
                raise CronSimError("expected five fields: minute hour day month weekday")
            first = next(CronSim(expression, _local(0, zone)), None)
        except (CronSimError, ValueError, AssertionError) as error:
            raise Invalid(f"cron: {self.cron[:_MAX_LENGTH]!r} does not parse: {error}") from error
        if first is None:
            raise Invalid(f"cron: {self.cron!r} never comes due")

    def _check_interval(self) -> None:
        if not MIN_EVERY <= self.every <= MAX_EVERY:  # nan is in no range
            raise Invalid(f"every: seconds, at least {MIN_EVERY:g} and at most {MAX_EVERY:.0f}")
        if not (math.isfinite(self.offset) and 0 <= self.offset < self.every):
            raise Invalid("offset: seconds, at least 0 and less than `every`")
        if self.timezone != "UTC":
            raise Invalid("timezone: only together with `cron`; an interval is counted in UTC")


def _expanded(cron: str) -> str:
    return ALIASES.get(cron.strip().lower(), cron)


def _local(ms: int, zone: tzinfo) -> datetime:
    return (_EPOCH + timedelta(milliseconds=ms)).astimezone(zone)


def _zone(name: str) -> tzinfo:
    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError) as error:
        raise Invalid(f"timezone: {name[:_MAX_LENGTH]!r} is no IANA time zone") from error
