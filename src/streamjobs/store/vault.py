"""Data keys: each job's under a key of its own in Redis, wrapped by a master key. All is encrypted here.

Rule 1: whoever reads a job's log gets its data key's record in the same answer: one that was deleted opens
nothing from then on, whatever this process has seen before. Only writers of live jobs go by what they know.
Rule 2: a job has one data key for good. Two processes that make it at the same time get the same one.
Rule 3: a job whose data key was deleted is shredded: it says so to readers, and takes nothing more.
Rule 4: outside of the store there is no ciphertext, and in Redis nothing confidential without one.

A record is what `encryption.Keyring` gave, and behind a space the job's parent, if it has one. In place of a
record scripts answer '' for a job without a data key and '-' for a shredded one.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from redis.asyncio import Redis

from streamjobs import confidential
from streamjobs.config import Settings
from streamjobs.encryption import Cipher, Keyring, has_envelope
from streamjobs.errors import (
    ConfigError,
    DamagedCiphertext,
    EncryptionKeyMissing,
    JobNotEnded,
    JobNotFound,
    Shredded,
)
from streamjobs.segments import Entry
from streamjobs.store import keys
from streamjobs.store.scripts import Scripts, flatten, text, translated

if TYPE_CHECKING:
    from streamjobs.store.work import Batch

NONE, SHREDDED = "", "-"
_ERRORS = 20
_STORE = "store"
"""In the place of a job's id, for what belongs to no job."""


class _Known(NamedTuple):
    """A data key that this process has unwrapped, or None; the record says when it is another one."""

    record: str
    cipher: Cipher | None
    parent: str
    until: float


class Rotated(NamedTuple):
    """Data keys that were looked at, wrapped anew, and not to be unwrapped; why some of those were not."""

    seen: int = 0
    changed: int = 0
    failed: int = 0
    errors: tuple[str, ...] = ()

    def plus(self, other: Rotated) -> Rotated:
        """Both together."""
        return Rotated(
            self.seen + other.seen,
            self.changed + other.changed,
            self.failed + other.failed,
            (*self.errors, *other.errors)[:_ERRORS],
        )


class Vault:
    """Makes, finds and deletes data keys, and encrypts and decrypts with them."""

    def __init__(self, client: Redis, scripts: Scripts, settings: Settings, ring: Keyring) -> None:
        self.ring = ring
        self._client: Any = client
        self._scripts = scripts
        self._makes = settings.encryption_new_jobs
        self._most = settings.encryption_cache
        self._ttl = settings.encryption_cache_ttl
        self._known: dict[str, _Known] = {}
        self._own: Cipher | None = None

    @classmethod
    def of(cls, client: Redis, scripts: Scripts, settings: Settings) -> Vault | None:
        """The vault that the settings name, None without keys. Raises `ConfigError`."""
        entries = [*settings.encryption_keys, *_entries_of(settings.encryption_keys_file)]
        return cls(client, scripts, settings, Keyring.parse(entries)) if entries else None

    # --- the store's own key

    async def open(self) -> None:
        """Find the store's own key, or make it. Raises `EncryptionKeyMissing`, `DamagedCiphertext`."""
        with translated():
            record = await self._client.hget(keys.META, keys.META_DATA_KEY)
            if record is None and self._makes:
                await self._client.hsetnx(keys.META, keys.META_DATA_KEY, self.ring.new_key(_STORE)[0])
                record = await self._client.hget(keys.META, keys.META_DATA_KEY)
        if record is not None:
            self._own = self.ring.cipher(_STORE, text(record))

    async def own(self) -> Cipher | None:
        """What encrypts what belongs to no job; None as long as nothing in this store is to be encrypted."""
        if self._own is None:
            await self.open()
        return self._own

    # --- one job's

    def cipher(self, job_id: str, record: bytes | str) -> Cipher | None:
        """What a record that was just read is the key of; None for a job without one.

        Raises `Shredded`, `EncryptionKeyMissing`, `DamagedCiphertext`.
        """
        stored = text(record)
        if stored == SHREDDED:
            self._known.pop(job_id, None)
            raise Shredded("the job's data key was deleted: nothing of it can be read any more")
        known, until = self._known.get(job_id), time.monotonic() + self._ttl
        if known is None or known.record != stored:
            record, _, parent = stored.partition(" ")
            known = _Known(stored, self.ring.cipher(job_id, record) if record else None, parent, until)
        self._remember(job_id, known._replace(until=until))
        return known.cipher

    def known(self, job_id: str) -> Cipher | None:
        """A data key that this process used a moment ago."""
        known = self._known.get(job_id)
        return known.cipher if known is not None else None

    async def current(self, job_id: str) -> Cipher | None:
        """A job's data key as it is now; None for one without. Raises as `cipher`."""
        return self.cipher(job_id, (await self._records([job_id]))[job_id])

    async def current_of(self, job_ids: Sequence[str]) -> list[Cipher | None]:
        """The same of several jobs; None also for shredded ones."""
        records = await self._records(job_ids)
        return [
            self.cipher(job_id, NONE if records[job_id] == SHREDDED else records[job_id])
            for job_id in job_ids
        ]

    async def _records(self, job_ids: Iterable[str]) -> dict[str, str]:
        found: dict[str, str] = {}
        for partition, ids in _by_partition(job_ids).items():
            records = await self._scripts.call(Scripts.DATAKEY, partition, "read", *ids)
            found |= dict(zip(ids, map(text, records), strict=True))
        return found

    async def ensure(self, job_id: str, *, always: bool = False) -> Cipher | None:
        """A job's data key; a new one where it has none, and may have one or `always`.

        Raises `JobNotFound`, `Shredded`, `EncryptionKeyMissing`, `DamagedCiphertext`.
        """
        may_make = self._makes or always
        known = self._known.get(job_id)
        if (
            known is not None
            and known.until > time.monotonic()
            and (known.cipher is not None or not may_make)
        ):
            return known.cipher
        if not may_make:
            return await self.current(job_id)
        made, _ = self.ring.new_key(job_id)
        (record,) = await self._scripts.call(
            Scripts.DATAKEY, keys.partition_of_job(job_id), "make", job_id, made
        )
        if record is None:
            raise JobNotFound("no such job")
        return self.cipher(job_id, record)

    def new(self, job_id: str) -> tuple[str, Cipher] | None:
        """A data key for a job to be submitted, which is to be stored with it; None where it needs none."""
        return self.ring.new_key(job_id) if self._makes else None

    async def shred(self, job_id: str) -> bool:
        """Delete an ended job's data key, of one that is in the archive alone too; False where it has none.

        From then on nobody can read what it was given or made, wherever copies of it are.
        Raises `JobNotEnded`, `JobNotFound` for what cannot be an id.
        """
        verdict, *rest = await self._scripts.call(
            Scripts.DATAKEY, keys.partition_of_job(job_id), "shred", job_id
        )
        if text(verdict) == "live":
            raise JobNotEnded(f"the job is {text(rest[0])}")
        self.forget(job_id)
        return text(verdict) == "ok"

    def forget(self, job_id: str) -> None:
        """Let go of a data key that was deleted."""
        self._known.pop(job_id, None)

    def _remember(self, job_id: str, known: _Known) -> None:
        """The one used longest ago leaves first."""
        self._known.pop(job_id, None)
        self._known[job_id] = known
        if len(self._known) > self._most:
            del self._known[next(iter(self._known))]

    # --- events

    def decrypt(self, cipher: Cipher | None, entries: list[Entry]) -> list[Entry]:
        """Entries of a job's log as they were written. Raises `DamagedCiphertext`."""
        if cipher is None:
            return entries
        return [
            Entry(entry.cursor, entry.type, confidential.decrypt(cipher, entry.type, entry.data))
            for entry in entries
        ]

    async def decrypted(self, job_id: str, kind: str, content: bytes) -> bytes:
        """A content that `Log` did not read. Raises as `cipher`, `Shredded` also of a job that is gone."""
        if not has_envelope(content):
            return content
        cipher = await self.current(job_id)
        if cipher is None:
            raise Shredded("the job's data key is gone")
        return confidential.decrypt(cipher, kind, content)

    async def encrypt(self, batch: Batch) -> None:
        """Give a batch its events as they are to be stored. It keeps them, so those sent again are the same.

        Raises `JobNotFound`, `Shredded`, `EncryptionKeyMissing`, `DamagedCiphertext`, `StoreUnavailable`.
        """
        if batch.stored or all(kind in confidential.READABLE for kind, _ in batch.events):
            return
        try:
            cipher = await self.ensure(batch.job_id)
        except Shredded:
            if all(_says_shredded(*event) for event in batch.events):
                return
            raise
        if cipher is not None:
            parent = await self._parent(batch) if batch.outcome in {"completed", "failed"} else None
            batch.stored.extend(
                (kind, confidential.encrypt(cipher, kind, content, parent)) for kind, content in batch.events
            )

    async def _parent(self, batch: Batch) -> Cipher | None:
        """Who is told of the outcome too. A parent has a data key where its child has one."""
        known = self._known.get(batch.job_id)
        if known is None or not known.parent:
            return None
        try:
            return await self.ensure(known.parent, always=True)
        except JobNotFound:
            return None

    # --- rotation

    async def rotate(
        self, partition: int, *, on_progress: Callable[[Rotated], None] = lambda _: None, batch: int = 500
    ) -> Rotated:
        """Wrap a partition's data keys anew that the first master key has not wrapped.

        It may be stopped and begun again at any time: what is done has the first key's name. Others read and
        write meanwhile. A data key that does not unwrap stays as it is. Raises `StoreUnavailable`.
        """
        cursor, done = 0, Rotated()
        pattern = f"{keys.prefix(partition)}job:*:datakey"
        while True:
            with translated():
                cursor, names = await self._client.scan(cursor, match=pattern, count=batch)
                records: list[Any] = await self._client.mget(names) if names else []
            found = [(text(name).split(":")[3], text(record))
                     for name, record in zip(names, records, strict=True) if record]  # fmt: skip
            done = done.plus(await self._rewrap(partition, found))
            on_progress(done)
            if not int(cursor):
                return done

    async def _rewrap(self, partition: int, found: list[tuple[str, str]]) -> Rotated:
        rows: list[tuple[str, str, str]] = []
        errors: list[str] = []
        for job_id, stored in found:
            record, space, parent = stored.partition(" ")
            try:
                if not self.ring.is_current(record):
                    rows.append((job_id, stored, self.ring.rewrapped(job_id, record) + space + parent))
            except (EncryptionKeyMissing, DamagedCiphertext) as error:
                errors.append(str(error))
        changed = 0
        if rows:
            changed = await self._scripts.call(Scripts.DATAKEY, partition, "rewrap", *flatten(rows))
        return Rotated(len(found), changed, len(errors), tuple(errors[:_ERRORS]))

    async def rotate_own(self) -> None:
        """The same for the store's own key."""
        with translated():
            record = await self._client.hget(keys.META, keys.META_DATA_KEY)
            if record is not None and not self.ring.is_current(text(record)):
                await self._client.hset(
                    keys.META, keys.META_DATA_KEY, self.ring.rewrapped(_STORE, text(record))
                )

    # --- digests

    async def digest(self, content: bytes) -> str:
        """A digest that says nothing to whoever has not the store's own key. Two processes give the same."""
        own = await self.own()
        if own is None:
            return hashlib.blake2b(content, digest_size=16).hexdigest()
        return own.digest(content)


def _says_shredded(kind: str, content: bytes) -> bool:
    """Whether an event is the end of a job that cannot go on without its data key. It says nothing else."""
    return kind == "job.failed" and b'"error":{"code":"shredded"' in content


def _entries_of(file: str) -> list[str]:
    """A line for each key; empty ones and comments are passed over."""
    if not file:
        return []
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"setting 'encryption_keys_file': {error}") from error
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def _by_partition(job_ids: Iterable[str]) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for job_id in dict.fromkeys(job_ids):
        found.setdefault(keys.partition_of_job(job_id), []).append(job_id)
    return found


async def require_no_vault(client: Any) -> None:
    """Raise `ConfigError` where a store holds what this process could not read for want of keys."""
    with translated():
        record = await client.hget(keys.META, keys.META_DATA_KEY)
    if record is not None:
        name = text(record).split(":")[1]
        raise ConfigError(
            f"this store is encrypted, with the key {name!r} among others: set 'encryption_keys'"
        )
