"""An owner's notices: what they are told of their jobs, once each, until they have read it.

Rule 1: what is told of a job, and how far its log was told of, are written in one script; whoever saw an
older "how far" is refused. So any number of projectors tell of an event once.
Rule 2: a notice's id is an instant in ms, greater than all before it: also the cursor of a page.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import chain
from typing import Any, NamedTuple

import msgspec
from redis.asyncio import Redis

from streamjobs import confidential
from streamjobs.confidential import NOTICE
from streamjobs.config import Settings
from streamjobs.cursor import START, Cursor
from streamjobs.encryption import Cipher, has_envelope
from streamjobs.errors import Invalid, InvalidCursor, JobNotFound
from streamjobs.store import keys
from streamjobs.store.deliveries import DELIVERY_TTL, TRIES
from streamjobs.store.log import stored_cursor
from streamjobs.store.scripts import Scripts, ms, text, translated
from streamjobs.store.vault import Vault

_ID = re.compile(r"[1-9]\d{0,14}", re.ASCII)
MAX_MARKED = 1000
"""Notices that one call marks by their ids."""


class News(NamedTuple):
    """What an owner is told: an event of a job, and JSON that says it."""

    cursor: Cursor
    type: str
    content: bytes


class Posting(NamedTuple):
    """What a webhook is sent: an id that is the same for the same event, and the body."""

    delivery_id: str
    webhook_id: str
    content: bytes


class Told(NamedTuple):
    """Whose job it is, and the event up to which its log was told of.

    `is_history`: nothing of it was told, and it ended before anybody was there to tell of it.
    """

    owner: str
    cursor: Cursor
    last: Cursor
    is_history: bool


class Notice(msgspec.Struct, frozen=True):
    """One notice: its id, the event (`type`, `cursor`) of which job, whether it was read, and the rest."""

    id: str
    type: str
    job: str
    cursor: str
    read: bool
    about: msgspec.Raw


class Notices:
    """Writes and reads the notices of owners."""

    def __init__(
        self, client: Redis, scripts: Scripts, settings: Settings, vault: Vault | None = None
    ) -> None:
        self._vault = vault
        self._client: Any = client
        self._scripts = scripts
        self._settings = settings

    # --- write

    async def told(self, job_id: str) -> Told:
        """How far a job was told of. Raises `JobNotFound`."""
        with translated():
            async with self._client.pipeline(transaction=False) as pipe:
                pipe.hmget(keys.job_key(job_id), ["owner", "told", "last", "ended"])
                pipe.hget(f"{keys.prefix(keys.partition_of_job(job_id))}projections", "since:notify")
                (owner, told, last, ended), since = await pipe.execute()
        if owner is None:
            raise JobNotFound("no such job")
        is_history = not told and bool(ended) and int(ended) < int(since or 0)
        return Told(text(owner), stored_cursor(told) if told else START, stored_cursor(last), is_history)

    async def tell(
        self, job_id: str, before: Cursor, after: Cursor, news: Iterable[News], postings: Iterable[Posting]
    ) -> bool:
        """Tell of a stretch of a job's log; False where somebody was faster, and nothing was done.

        Raises `JobNotFound`, `StoreFull`, `StoreUnavailable`.
        """
        rows = [(str(one.cursor), one.type, one.content) for one in news]
        if self._vault is not None and rows and (cipher := await self._vault.ensure(job_id)) is not None:
            rows = [(at, kind, confidential.encrypt(cipher, NOTICE, said)) for at, kind, said in rows]
        answer = await self._scripts.call(
            Scripts.NOTIFY,
            keys.partition_of_job(job_id),
            job_id,
            "" if before == START else str(before),
            str(after),
            self._settings.notice_cap,
            ms(self._settings.notice_ttl),
            ms(DELIVERY_TTL),
            TRIES,
            len(rows),
            *chain.from_iterable(rows),
            *chain.from_iterable(postings),
        )
        verdict = text(answer[0])
        if verdict == "gone":
            raise JobNotFound("no such job")
        return verdict == "ok"

    # --- read

    async def page(
        self, owner: str, *, unread: bool = False, before: str = "", limit: int = 50
    ) -> tuple[list[Notice], str]:
        """An owner's notices, newest first, behind the cursor `before`; the next cursor, empty at the end.

        Raises `InvalidCursor`.
        """
        if before and not _ID.fullmatch(before):
            raise InvalidCursor("a cursor of notices is a notice's id")
        limit = max(1, min(limit, 500))
        found = await (self._unread if unread else self._all)(owner, before, limit)
        if self._vault is not None:
            found = await self._opened(self._vault, found)
        return found, found[-1].id if len(found) == limit else ""

    async def unread(self, owner: str) -> int:
        """How many an owner has not read."""
        with translated():
            return await self._client.zcard(self._key("unread", owner))

    async def mark_read(self, owner: str, *, ids: Iterable[str] = (), until: str = "") -> int:
        """Mark notices as read, those named and all up to and with `until`; how many were not before.

        Raises `Invalid`.
        """
        chosen = list(ids)
        if len(chosen) > MAX_MARKED or not all(map(_ID.fullmatch, chosen)):
            raise Invalid(f"ids: up to {MAX_MARKED} ids of notices")
        if until and not _ID.fullmatch(until):
            raise Invalid("until: a notice's id")
        key, marked = self._key("unread", owner), 0
        with translated():
            if chosen:
                marked += await self._client.zrem(key, *chosen)
            if until:
                marked += await self._client.zremrangebyscore(key, "-inf", until)
        return marked

    async def _all(self, owner: str, before: str, limit: int) -> list[Notice]:
        newest = f"({before}-0" if before else "+"
        with translated():
            rows: list[Any] = await self._client.xrevrange(
                self._key("notices", owner), max=newest, count=limit
            )
            ids = [_number(row[0]) for row in rows]
            scores: list[Any] = await self._client.zmscore(self._key("unread", owner), ids) if ids else []
        return [_notice(row[1], row_id, score is None)
                for row, row_id, score in zip(rows, ids, scores, strict=True)]  # fmt: skip

    async def _unread(self, owner: str, before: str, limit: int) -> list[Notice]:
        feed = self._key("notices", owner)
        with translated():
            ids: list[Any] = await self._client.zrevrangebyscore(
                self._key("unread", owner), f"({before}" if before else "+inf", "-inf", 0, limit
            )
            async with self._client.pipeline(transaction=False) as pipe:
                for one in map(text, ids):
                    pipe.xrange(feed, f"{one}-0", f"{one}-0")
                found: list[Any] = await pipe.execute() if ids else []
        return [_notice(rows[0][1], text(one), False) for one, rows in zip(ids, found, strict=True) if rows]

    async def _opened(self, vault: Vault, notices: list[Notice]) -> list[Notice]:
        """Notices as they were told; without their message where the job is shredded or gone."""
        jobs = list(dict.fromkeys(one.job for one in notices if has_envelope(bytes(one.about))))
        ciphers = dict(zip(jobs, await vault.current_of(jobs), strict=True))
        return [_with_message(one, ciphers[one.job]) if one.job in ciphers else one for one in notices]

    def _key(self, what: str, owner: str) -> str:
        partition = keys.partition_of_owner(owner, self._settings.partitions)
        return f"{keys.prefix(partition)}{what}:{owner}"


def _with_message(notice: Notice, cipher: Cipher | None) -> Notice:
    about = bytes(notice.about)
    said = (
        confidential.without(NOTICE, about) if cipher is None else confidential.decrypt(cipher, NOTICE, about)
    )
    return msgspec.structs.replace(notice, about=msgspec.Raw(said))


def _number(entry_id: bytes | str) -> str:
    return text(entry_id).partition("-")[0]


def _notice(fields: dict[bytes, bytes], notice_id: str, is_read: bool) -> Notice:
    return Notice(
        id=notice_id,
        type=text(fields[b"t"]),
        job=text(fields[b"j"]),
        cursor=text(fields[b"e"]),
        read=is_read,
        about=msgspec.Raw(fields[b"d"]),
    )
