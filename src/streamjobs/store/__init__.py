"""The only package that talks to Redis."""

from __future__ import annotations

import random
from typing import Any

from redis.asyncio import Redis

from streamjobs.config import Settings
from streamjobs.errors import ConfigError
from streamjobs.store import keys
from streamjobs.store.apikeys import ApiKeys
from streamjobs.store.artifacts import Artifacts
from streamjobs.store.clock import Clock
from streamjobs.store.connect import blocking_client, rw_client, subscriber_client
from streamjobs.store.dead import Dead, DeadFilter, DeadJob
from streamjobs.store.deliveries import Claimed, Deliveries, Undelivered
from streamjobs.store.feed import Feed, GroupLag, Notes, ProjectionInfo, Quarantined
from streamjobs.store.index import Index, JobFilter, ListedJob
from streamjobs.store.jobs import JobRecord, Jobs, Receipt, Submission, Tick
from streamjobs.store.live import Listener, Live
from streamjobs.store.log import Entry, Log, Page
from streamjobs.store.notices import News, Notice, Notices, Posting
from streamjobs.store.owners import FeedEvent, FeedPage, Owners, Position
from streamjobs.store.permits import Permit, Permits
from streamjobs.store.queues import QueueInfo, Queues
from streamjobs.store.retention import Retention
from streamjobs.store.schedules import ScheduleRecord, Schedules
from streamjobs.store.scripts import Limits, Scripts, is_plain, text, translated
from streamjobs.store.snapshots import Sealed, Snapshots, Stored
from streamjobs.store.stats import Counted, Stats, Step, Totals
from streamjobs.store.strikes import Strike, Strikes
from streamjobs.store.ticks import Ticks
from streamjobs.store.vault import Rotated, Vault, require_no_vault
from streamjobs.store.webhooks import WebhookRecord, Webhooks
from streamjobs.store.work import Answer, Batch, Lease, Outcome, Renewal, Sweep, Taken, Work
from streamjobs.store.workers import WorkerInfo, Workers

__all__ = [
    "Answer",
    "ApiKeys",
    "Artifacts",
    "Batch",
    "Claimed",
    "Clock",
    "Counted",
    "Dead",
    "DeadFilter",
    "DeadJob",
    "Deliveries",
    "Entry",
    "Feed",
    "FeedEvent",
    "FeedPage",
    "GroupLag",
    "Index",
    "JobFilter",
    "JobRecord",
    "Jobs",
    "Lease",
    "ListedJob",
    "Listener",
    "Live",
    "Log",
    "News",
    "Notes",
    "Notice",
    "Notices",
    "Outcome",
    "Owners",
    "Page",
    "Permit",
    "Permits",
    "Position",
    "Posting",
    "ProjectionInfo",
    "Quarantined",
    "QueueInfo",
    "Queues",
    "Receipt",
    "Renewal",
    "Retention",
    "Rotated",
    "ScheduleRecord",
    "Schedules",
    "Sealed",
    "Snapshots",
    "Stats",
    "Step",
    "Store",
    "Stored",
    "Strike",
    "Strikes",
    "Submission",
    "Sweep",
    "Taken",
    "Tick",
    "Ticks",
    "Totals",
    "Undelivered",
    "Vault",
    "WebhookRecord",
    "Webhooks",
    "Work",
    "WorkerInfo",
    "Workers",
]

FORMAT = "1"


class Store:
    """Everything streamjobs does with one Redis. Made by `open`, ended by `aclose`."""

    def __init__(self, settings: Settings, client: Any, *, plain: bool = False) -> None:
        self.settings = settings
        self.is_plain = plain
        self.client: Any = client
        self._subscriber = subscriber_client(settings)
        self._blocking: list[Redis] = []
        scripts = self.scripts = Scripts(client, Limits.of(settings), plain=plain)
        self.vault = vault = Vault.of(client, scripts, settings)
        self.log = Log(client, scripts, vault)
        self.snapshots = Snapshots(scripts, self.log, settings, vault)
        self.jobs = Jobs(client, scripts, settings, vault)
        self.work = Work(client, scripts, settings, vault)
        self.artifacts = Artifacts(client, scripts, settings, vault)
        self.permits = Permits(scripts, settings)
        self.strikes = Strikes(client, scripts, settings)
        self.dead = Dead(client, self.log, settings, vault)
        self.queues = Queues(client, settings)
        self.workers = Workers(client, settings)
        self.schedules = Schedules(client, scripts, settings, self.jobs, self.now_ms, vault)
        self.ticks = Ticks(self.schedules, self.jobs)
        self.retention = Retention(client, scripts, plain=plain, vault=vault)
        self.notices = Notices(client, scripts, settings, vault)
        self.webhooks = Webhooks(client, scripts, settings)
        self.deliveries = Deliveries(client, scripts, settings)
        self.feed = Feed(client, scripts, settings)
        self.owners = Owners(client, settings, vault)
        self.index = Index(client, scripts, settings)
        self.stats = Stats(client, scripts, settings)
        self.api_keys = ApiKeys(client, self.now_ms)
        self.live = Live(self._subscriber, settings.partitions, vault)

    @classmethod
    async def open(cls, settings: Settings) -> Store:
        """Connect and check that this store fits the settings.

        Raises `StoreUnavailable`, `ConfigError` where the store was created with another partition count,
        Redis may evict keys, or jobs are encrypted and there is no key; `EncryptionKeyMissing` for one.
        """
        client: Any = rw_client(settings)
        try:
            store = cls(settings, client, plain=await is_plain(client))
            await store._check_meta()
            await (require_no_vault(client) if store.vault is None else store.vault.open())
            if not store.is_plain:
                await store._check_eviction()
        except BaseException:
            await client.aclose()
            raise
        return store

    @property
    def partitions(self) -> range:
        """The numbers of this store's partitions."""
        return range(self.settings.partitions)

    def blocking(self, block: float) -> Redis:
        """A client of its own for a loop that blocks up to `block` seconds."""
        client = blocking_client(self.settings, block)
        self._blocking.append(client)
        return client

    async def ping(self) -> None:
        """Raise `StoreUnavailable` unless Redis answers."""
        with translated():
            await self.client.execute_command("PING")

    async def now_ms(self) -> int:
        """Redis's clock."""
        with translated():
            seconds, microseconds = await self.client.execute_command("TIME")
        return int(seconds) * 1000 + int(microseconds) // 1000

    async def aclose(self) -> None:
        """Close every connection."""
        await self.live.aclose()
        for client in (*self._blocking, self._subscriber, self.client):
            await client.aclose()

    async def _check_meta(self) -> None:
        wanted = {"partitions": str(self.settings.partitions), "format": FORMAT}
        with translated():
            for field, value in wanted.items():
                await self.client.hsetnx(keys.META, field, value)
            found: dict[Any, Any] = await self.client.hgetall(keys.META)
        for field, value in ((text(f), text(v)) for f, v in found.items()):
            if wanted.get(field, value) != value:
                raise ConfigError(f"this store was created with {field} = {value}, not {wanted[field]}")

    async def _check_eviction(self) -> None:
        """Under an eviction policy a job's hash may vanish while its log stays. Managed Redis may hide it."""
        with translated():
            info: dict[str, Any] = await self.client.info("memory")
        policy = info.get("maxmemory_policy", "noeviction")
        if policy != "noeviction":
            raise ConfigError(f"Redis evicts keys (maxmemory-policy {policy}); streamjobs needs noeviction")


def jitter(seconds: float) -> float:
    """A duration changed by up to a quarter, so that many loops do not beat together."""
    return seconds * random.uniform(0.75, 1.25)
