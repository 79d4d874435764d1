"""The renew script over a blocking client of its own, for the thread that keeps leases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError
from redis.retry import Retry

from streamjobs.config import Settings
from streamjobs.store import keys
from streamjobs.store.connect import common_options
from streamjobs.store.scripts import Limits, Scripts, flatten, translated
from streamjobs.store.work import Renewal, parse_renewal


class Renewer:
    """Renews leases from outside the event loop."""

    def __init__(self, settings: Settings, *, plain: bool = False) -> None:
        script = Scripts.RENEW
        self._sha, self._text = (script.plain_sha, script.plain_text) if plain else (script.sha, script.text)
        redis: Any = Redis
        self._client = redis.from_url(
            settings.redis_url,
            socket_timeout=settings.redis_timeout,
            retry=Retry(NoBackoff(), 1),
            **common_options(settings),
        )
        self._limits = msgspec.json.encode(Limits.of(settings))

    def renew(self, partition: int, leases: Sequence[tuple[str, int]]) -> tuple[int, list[Renewal]]:
        """Extend leases given as (job id, epoch); returns Redis's clock and one renewal each.

        Raises `StoreUnavailable`.
        """
        arguments = (1, f"{keys.prefix(partition)}leases", self._limits, len(leases), *flatten(leases))
        with translated():
            try:
                now_ms, rows = self._client.execute_command("EVALSHA", self._sha, *arguments)
            except NoScriptError:
                now_ms, rows = self._client.execute_command("EVAL", self._text, *arguments)
        return now_ms, [parse_renewal(row) for row in rows]

    def close(self) -> None:
        """Close the connection."""
        self._client.close()
