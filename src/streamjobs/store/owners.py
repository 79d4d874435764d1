"""An owner's feed: lifecycle and progress of all their jobs, as one log that can be read from any position.

Rule 1: a position is believed only where it is in the feed; one that has left it (the feed is capped and
expires) or was never there is said to be not found, and nothing is read from it.
Rule 2: an entry of the stream holds what one call of a script wrote, a line `<job> <id> <type>[ <json>]` for
each event; a position says how many of an entry's lines have been seen. Contents over `owner_feed_bytes` are
left out, as is what cannot be decrypted any more.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from redis import exceptions
from redis.asyncio import Redis

from streamjobs import confidential
from streamjobs.config import Settings
from streamjobs.encryption import Cipher, has_envelope
from streamjobs.segments import Entry
from streamjobs.store import keys
from streamjobs.store.log import stored_cursor
from streamjobs.store.scripts import text, translated
from streamjobs.store.vault import Vault

_PAGE_ENTRIES = 20
_PAGE_EVENTS = 500
_PAGE_BYTES = 64 * 1024
"""The most that a page holds, beside one event; entries may hold hundreds of events."""


class Position(NamedTuple):
    """After the first `seen` lines of the entry `ms-n`; `START` is before everything."""

    ms: int
    n: int
    seen: int

    def __str__(self) -> str:
        return f"{self.ms}-{self.n}.{self.seen}"

    @property
    def entry(self) -> str:
        """The id of the entry."""
        return f"{self.ms}-{self.n}"


START = Position(0, 0, 0)


class FeedEvent(NamedTuple):
    """One event of one of the owner's jobs, and the position after it."""

    position: Position
    job_id: str
    entry: Entry


class FeedPage(NamedTuple):
    """Events behind a position. `found`: it is in the feed; `is_last`: there was nothing more then."""

    found: bool
    events: list[FeedEvent]
    is_last: bool


class Owners:
    """The feeds of all owners."""

    def __init__(self, client: Redis, settings: Settings, vault: Vault | None = None) -> None:
        self._client: Any = client
        self._vault = vault
        self._partitions = settings.partitions

    async def page(self, owner: str, after: Position) -> FeedPage:
        """Read some events behind `after`. Raises `StoreUnavailable`."""
        key = keys.owner_feed_key(owner, self._partitions)
        with translated():
            async with self._client.pipeline(transaction=True) as pipe:
                pipe.xrange(key, min=after.entry, count=_PAGE_ENTRIES)
                if after == START:
                    pipe.xinfo_stream(key)
                rows, *info = await pipe.execute(raise_on_error=False)
            for reply in (rows, *info):
                _require_answer(reply)
        events = [event for row in rows for event in _events(row)]
        found = _is_whole(info[0]) if info else any(event.position == after for event in events)
        behind = _bounded([event for event in events if event.position > after]) if found else []
        is_last = len(rows) < _PAGE_ENTRIES and (not behind or behind[-1] is events[-1])
        return FeedPage(
            found, behind if self._vault is None else await self._opened(self._vault, behind), is_last
        )

    async def _opened(self, vault: Vault, events: list[FeedEvent]) -> list[FeedEvent]:
        """Events as they were written; without the content of those whose jobs are shredded or gone."""
        sealed = list(dict.fromkeys(event.job_id for event in events if has_envelope(event.entry.data)))
        if not sealed:
            return events
        ciphers = dict(zip(sealed, await vault.current_of(sealed), strict=True))
        return [_with_content(event, ciphers[event.job_id]) if has_envelope(event.entry.data) else event
                for event in events]  # fmt: skip

    async def end(self, owner: str) -> Position:
        """The position after everything there is. Raises `StoreUnavailable`."""
        return (await self.ends([owner]))[owner]

    async def ends(self, owners: Iterable[str]) -> dict[str, Position]:
        """The position after everything there is, of several owners in one round trip."""
        asked = list(owners)
        with translated():
            async with self._client.pipeline(transaction=False) as pipe:
                for owner in asked:
                    pipe.xrevrange(keys.owner_feed_key(owner, self._partitions), count=1)
                newest: list[Any] = await pipe.execute()
        return {
            owner: _events(rows[0])[-1].position if rows else START
            for owner, rows in zip(asked, newest, strict=True)
        }


def _with_content(event: FeedEvent, cipher: Cipher | None) -> FeedEvent:
    _, kind, data = event.entry
    content = b"" if cipher is None else confidential.decrypt(cipher, kind, data)
    return event._replace(entry=event.entry._replace(data=content))


def _require_answer(reply: Any) -> None:
    """Raise what Redis said, unless only that there is no such stream."""
    if isinstance(reply, exceptions.RedisError) and "no such key" not in str(reply):
        raise reply


def _is_whole(info: Any) -> bool:
    """Whether nothing has ever left the feed; one that does not exist has lost nothing that was seen."""
    if isinstance(info, exceptions.RedisError):
        return True
    added: int = info.get("entries-added", info["length"])
    return added == info["length"]


def _bounded(events: list[FeedEvent]) -> list[FeedEvent]:
    """The first ones, as many as a page holds; at least one."""
    size = 0
    for at, event in enumerate(events[:_PAGE_EVENTS]):
        size += len(event.entry.data)
        if at and size > _PAGE_BYTES:
            return events[:at]
    return events[:_PAGE_EVENTS]


def _events(row: Any) -> list[FeedEvent]:
    """What an entry of the stream holds."""
    ms, _, n = text(row[0]).partition("-")
    lines = row[1][b"e"].split(b"\n")
    return [_event(Position(int(ms), int(n), seen), line) for seen, line in enumerate(lines, 1)]


def _event(position: Position, line: bytes) -> FeedEvent:
    job_id, cursor, kind, *data = line.split(b" ", 3)
    entry = Entry(stored_cursor(cursor), kind.decode(), data[0] if data else b"")
    return FeedEvent(position, job_id.decode(), entry)
