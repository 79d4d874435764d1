"""Permits: how often something may be used, counted once for all workers.

Rule: a permit is reserved before it is used, and the clock is Redis's; whoever has to wait is told how long.
"""

from __future__ import annotations

import re
import zlib
from typing import NamedTuple

from streamjobs.config import Settings
from streamjobs.errors import Invalid
from streamjobs.store.scripts import Scripts, ms, text

_NAME = re.compile(r"[A-Za-z0-9._:@/-]{1,200}", re.ASCII)


class Permit(NamedTuple):
    """Whether it was granted; `wait` is the seconds before it may be used, or before asking again helps."""

    granted: bool
    wait: float


class Permits:
    """Token buckets by name, each in one partition."""

    def __init__(self, scripts: Scripts, settings: Settings) -> None:
        self._scripts = scripts
        self._partitions = settings.partitions

    async def acquire(self, name: str, *, rate: float, burst: int, max_wait: float) -> Permit:
        """Reserve one of `rate` permits a second, of which `burst` may be used at once.

        Nothing is reserved where that would mean waiting longer than `max_wait` seconds.
        Raises `Invalid`, `StoreUnavailable`.
        """
        if not _NAME.fullmatch(name):
            raise Invalid("permit: its name has 1 to 200 of letters, digits and ._:@/-")
        if not 0 < rate <= 1e6 or burst < 1:
            raise Invalid("permit: its rate is more than 0, its burst at least 1")
        partition = zlib.crc32(name.encode()) % self._partitions
        period = f"{1000 / rate:.6f}"
        verdict, wait = await self._scripts.call(Scripts.PERMIT, partition, name, period, burst, ms(max_wait))
        return Permit(text(verdict) == "go", wait / 1000)
