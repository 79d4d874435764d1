"""Tells owners, and their webhooks, what became of their jobs: ended, failed, somebody must approve.

Rule 1: a stretch of a log is told of by whoever writes first how far it was told; nobody tells it twice. A
log that was replaced by another history is told from its beginning.
Rule 2: an owner's notices leave out the ends of children, which their parents hear of; webhooks get them.
Rule 3: a job that ended before there was a projector to tell of it is history, and no news: the first one
over an existing store would send years of it.
Rule 4: what is sent says what happened and where to look, never what a job was given or made.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any

from streamjobs.cursor import START, Cursor
from streamjobs.errors import JobNotFound
from streamjobs.events import (
    TERMINAL,
    ApprovalRequested,
    Event,
    JobCancelled,
    JobCompleted,
    JobFailed,
    JobQueued,
    decode_event,
    encode_json,
)
from streamjobs.faults import fault
from streamjobs.projections.delivery import Deliverer
from streamjobs.store import Entry, Page, Store
from streamjobs.store.keys import delivery_id
from streamjobs.store.notices import News, Posting
from streamjobs.store.webhooks import WebhookRecord
from streamjobs.webhook import NOTICED, is_news

PAGE = 200
"""Events that are told of in one call."""
PATIENCE = 100
"""Events without news that are read again rather than written down as told of."""
_MAX_WORDS = 500


class NotifyProjection:
    """Advances one job at a time; any number of processes may."""

    name = "notify"

    def __init__(self, store: Store) -> None:
        self._store = store
        self._public_url = store.settings.public_url.rstrip("/")

    async def run(self) -> None:
        """Deliver until cancelled."""
        await Deliverer(self._store).run()

    async def advance(self, job_id: str) -> None:
        """Tell of everything new in a job's log. Raises `StoreUnavailable`, `StoreFull`."""
        try:
            while not await self._advance_once(job_id):
                pass
        except JobNotFound:
            return

    async def _advance_once(self, job_id: str) -> bool:
        """One page; whether the end of the log was reached."""
        told = await self._store.notices.told(job_id)
        if told.is_history:
            return await self._store.notices.tell(job_id, told.cursor, told.last, [], [])
        page = await self._store.log.page(job_id, told.cursor, limit=PAGE)
        is_whole = told.cursor == START or not page.found
        if not page.found:
            page = await self._store.log.page(job_id, limit=PAGE)
        news = [entry for entry in page.entries if is_news(entry.type)]
        if page.is_up_to_date and not news and len(page.entries) < PATIENCE:
            return True
        after = page.entries[-1].cursor
        first = page.entries[0] if is_whole else None
        has_told = await self._tell(told.owner, job_id, (told.cursor, after), news, page, first)
        fault("after_told")
        return has_told and page.is_up_to_date

    async def _tell(
        self,
        owner: str,
        job_id: str,
        stretch: tuple[Cursor, Cursor],
        entries: list[Entry],
        page: Page,
        first: Entry | None,
    ) -> bool:
        before, after = stretch
        if not entries:
            return await self._store.notices.tell(job_id, before, after, [], [])
        queued = await self._queued(job_id, first)
        told = [Telling(job_id, queued, entry, page.status, self._public_url) for entry in entries]
        webhooks = await self._store.webhooks.of_owner(owner)
        return await self._store.notices.tell(job_id, before, after, _news(told), _postings(told, webhooks))

    async def _queued(self, job_id: str, first: Entry | None) -> JobQueued:
        """How the job was submitted."""
        entry = first or (await self._store.log.page(job_id, limit=1)).entries[0]
        event = decode_event(entry.type, entry.data)
        return event if isinstance(event, JobQueued) else JobQueued(kind="", owner="")


class Telling:
    """One event, in the words for a feed and for a webhook."""

    def __init__(self, job_id: str, queued: JobQueued, entry: Entry, status: str, public_url: str) -> None:
        self.job_id = job_id
        self.queued = queued
        self.entry = entry
        self.status = entry.type.removeprefix("job.") if entry.type in TERMINAL else status
        self._public_url = public_url

    @property
    def is_notice(self) -> bool:
        """Whether the owner's own feed has it."""
        is_end = self.entry.type in TERMINAL
        return self.entry.type in NOTICED and not (is_end and self.queued.parent)

    def notice(self) -> bytes:
        """What the owner's feed says."""
        event = decode_event(self.entry.type, self.entry.data)
        said = {"kind": self.queued.kind, "status": self.status, "thread_id": self.queued.thread_id}
        return encode_json({**said, "ts": event.ts, **_words(event)})

    def body(self) -> bytes:
        """What a webhook is sent."""
        here = f"{self._public_url}/v1/jobs/{self.job_id}"
        data: dict[str, Any] = {
            "id": self.job_id,
            "kind": self.queued.kind,
            "status": self.status,
            "cursor": str(self.entry.cursor),
            "thread_id": self.queued.thread_id,
            "links": {"self": here, "events": f"{here}/events"},
        }
        return encode_json({"type": self.entry.type, "timestamp": self._instant(), "data": data})

    def _instant(self) -> str:
        ts = decode_event(self.entry.type, self.entry.data).ts
        return (
            datetime.fromtimestamp(ts / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        )


def _news(told: Iterable[Telling]) -> Iterator[News]:
    return (News(one.entry.cursor, one.entry.type, one.notice()) for one in told if one.is_notice)


def _postings(told: Iterable[Telling], webhooks: Iterable[WebhookRecord]) -> Iterator[Posting]:
    """One for each event and each webhook that wants it; a disabled one gets nothing of what happens then."""
    active = [record for record in webhooks if not record.is_disabled]
    for one in told:
        takers = [each for each in active if each.webhook.wants(one.entry.type, one.queued.kind)]
        body = one.body() if takers else b""
        for taker in takers:
            yield Posting(delivery_id(one.job_id, str(one.entry.cursor), taker.id), taker.id, body)


def _words(event: Event) -> dict[str, Any]:
    """What a person reads, bounded."""
    match event:
        case JobCompleted():
            return {"message": event.summary[:_MAX_WORDS]}
        case JobFailed():
            return {"message": event.error.message[:_MAX_WORDS], "code": event.error.code}
        case JobCancelled():
            return {"message": event.reason[:_MAX_WORDS], "by": event.by}
        case ApprovalRequested():
            return {"message": event.message[:_MAX_WORDS], "key": event.key, "subject": event.subject}
        case _:
            return {}
