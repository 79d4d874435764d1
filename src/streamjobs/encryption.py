"""Keys and ciphertexts: AES-256-GCM under a data key of each job, which a named master key wraps. Pure.

Rule 1: what is sealed is bound to its place (the job and what of it): pasted anywhere else it does not open.
Rule 2: a data key never leaves a process unwrapped; wrapped it names its master key, and is bound to its job.
Rule 3: what does not open raises, and says which job and which master key; it is never taken for content.
Rule 4: a ciphertext's size follows from its content's alone: what is sealed again is as long as before.

A record is a wrapped data key as it is stored: `1:<name of the master key>:<base64>`.

Rejected: Fernet, which has no associated data, and so lets one ciphertext stand for another.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import os
import re
from collections.abc import Iterable
from typing import Any

from streamjobs.errors import ConfigError, DamagedCiphertext, EncryptionKeyMissing

KEY_BYTES = 32
NONCE_BYTES = 12
OVERHEAD = NONCE_BYTES + 16
"""Bytes that a sealed content has more than its content."""
MAGIC = b"\xe5SJ1"
"""What a sealed blob begins with: neither zstd nor UTF-8 text does."""
_VERSION = "1"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
_SHARED = KEY_BYTES + OVERHEAD
_ENVELOPE, _SHARED_ENVELOPE = b'"enc1:', b'"enc2:'


class Keyring:
    """Master keys by name. The first wraps new data keys, all of them unwrap."""

    def __init__(self, keys: dict[str, bytes]) -> None:
        """Raises `ConfigError` where the package that encrypts is not there."""
        self.first = next(iter(keys))
        self._keys = {name: _aead(key) for name, key in keys.items()}

    @classmethod
    def parse(cls, entries: Iterable[str]) -> Keyring:
        """Read `name:base64`, one for each key. Raises `ConfigError`, which never shows a key."""
        keys: dict[str, bytes] = {}
        for number, entry in enumerate(entries, 1):
            name, _, encoded = entry.partition(":")
            if not _NAME.fullmatch(name) or name in keys:
                raise ConfigError(
                    f"setting 'encryption_keys': entry {number} needs a name of its own, as name:base64key, "
                    "of letters, digits and ._-"
                )
            keys[name] = _decoded_key(name, encoded)
        if not keys:
            raise ConfigError("setting 'encryption_keys': at least one name:base64key")
        return cls(keys)

    @property
    def names(self) -> list[str]:
        """Of its keys, the one that wraps first."""
        return list(self._keys)

    def new_key(self, job_id: str) -> tuple[str, Cipher]:
        """A random data key for a job: its record, and what seals with it."""
        key = os.urandom(KEY_BYTES)
        return self._wrapped(job_id, key), Cipher(job_id, self.first, key)

    def cipher(self, job_id: str, record: str) -> Cipher:
        """What a job's record is the key of. Raises `EncryptionKeyMissing`, `DamagedCiphertext`."""
        name, key = self._unwrapped(job_id, record)
        return Cipher(job_id, name, key)

    def rewrapped(self, job_id: str, record: str) -> str:
        """The same data key under the first master key. Raises as `cipher`."""
        return self._wrapped(job_id, self._unwrapped(job_id, record)[1])

    def is_current(self, record: str) -> bool:
        """Whether the first master key has wrapped it."""
        return master_of(record) == self.first

    def _wrapped(self, job_id: str, key: bytes) -> str:
        nonce = os.urandom(NONCE_BYTES)
        sealed = nonce + self._keys[self.first].encrypt(nonce, key, _bound(job_id, self.first))
        return f"{_VERSION}:{self.first}:{base64.b64encode(sealed).decode()}"

    def _unwrapped(self, job_id: str, record: str) -> tuple[str, bytes]:
        name = master_of(record)
        aead = self._keys.get(name)
        if aead is None:
            raise EncryptionKeyMissing(
                f"the data key of {job_id} was wrapped by the key {name!r}, which is not in 'encryption_keys'"
            )
        try:
            sealed = base64.b64decode(record.rpartition(":")[2], validate=True)
            return name, aead.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], _bound(job_id, name))
        except (_invalid_tag(), ValueError) as error:
            raise DamagedCiphertext(
                f"the data key of {job_id} does not open with the key {name!r}: it is damaged, "
                "or another job's, or another key has that name"
            ) from error


def master_of(record: str) -> str:
    """The name of the master key that wrapped a data key. Raises `DamagedCiphertext`."""
    version, *rest = record.split(":")
    if version != _VERSION or len(rest) != 2:
        raise DamagedCiphertext(f"this release cannot read the record of a data key: {version!r}")
    return rest[0]


class Cipher:
    """Seals and opens what belongs to one job. `name` is the master key that its data key came wrapped in."""

    __slots__ = ("_aead", "_head", "_key", "id", "name")

    def __init__(self, job_id: str, name: str, key: bytes) -> None:
        self.id = job_id
        self.name = name
        self._head = job_id.encode() + b"\0"
        self._key = key
        self._aead = _aead(key)

    def digest(self, content: bytes) -> str:
        """The same for the same content; it says nothing to whoever has not the key."""
        key = hashlib.blake2b(self._key, digest_size=32, person=b"sj digest").digest()
        return hashlib.blake2b(content, digest_size=16, key=key).hexdigest()

    def of(self, what: str) -> Cipher:
        """The same key for something else that has none of its own."""
        return Cipher(f"{self.id} {what}", self.name, self._key)

    # --- bytes

    def seal(self, content: bytes, place: bytes) -> bytes:
        """Content as ciphertext that opens in this place only."""
        nonce = os.urandom(NONCE_BYTES)
        return nonce + self._aead.encrypt(nonce, content, self._head + place)

    def open(self, sealed: bytes, place: bytes) -> bytes:
        """What was sealed. Raises `DamagedCiphertext`."""
        try:
            return self._aead.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], self._head + place)
        except (_invalid_tag(), ValueError) as error:
            raise self._damaged(place) from error

    # --- blobs, which are told from plain ones

    def seal_blob(self, content: bytes, place: bytes) -> bytes:
        """As `seal`, with a beginning that says so."""
        return MAGIC + self.seal(content, place)

    def open_blob(self, blob: bytes, place: bytes) -> bytes:
        """What was sealed; a blob from before encryption was turned on as it is. Raises as `open`."""
        return self.open(blob[len(MAGIC) :], place) if is_sealed_blob(blob) else blob

    # --- envelopes: a JSON value as one JSON string

    def envelope(self, value: bytes, place: bytes) -> bytes:
        """A JSON value as a JSON string that opens in this place only."""
        return b'"enc1:%b"' % binascii.b2a_base64(self.seal(value, place), newline=False)

    def shared_envelope(self, value: bytes, place: bytes, other: Cipher) -> bytes:
        """As `envelope`, but `other` opens it as well: for a child's outcome, which its parent's log has too.

        It has a key of its own, which both wrap: either job's data key may go without the other's copy.
        """
        key, nonce = os.urandom(KEY_BYTES), os.urandom(NONCE_BYTES)
        sealed = _aead(key).encrypt(nonce, value, self._head + place)
        keys = self.seal(key, b"outcome") + other.seal(key, _outcome_of(self.id))
        return b'"enc2:%b"' % binascii.b2a_base64(keys + nonce + sealed, newline=False)

    def value(self, envelope: bytes, place: bytes) -> bytes:
        """The JSON value in an envelope; any other JSON as it is. Raises `DamagedCiphertext`."""
        if envelope.startswith(_ENVELOPE):
            return self.open(self._bytes(envelope, place), place)
        if envelope.startswith(_SHARED_ENVELOPE):
            sealed = self._bytes(envelope, place)
            return self._shared(
                sealed[2 * _SHARED :], self.open(sealed[:_SHARED], b"outcome"), self.id, place
            )
        return envelope

    def value_of_child(self, envelope: bytes, place: bytes, child: str) -> bytes:
        """The same of a child's outcome in this job's log."""
        if not envelope.startswith(_SHARED_ENVELOPE):
            if envelope.startswith(_ENVELOPE):
                raise self._damaged(place)
            return envelope
        sealed = self._bytes(envelope, place)
        key = self.open(sealed[_SHARED : 2 * _SHARED], _outcome_of(child))
        return self._shared(sealed[2 * _SHARED :], key, child, place)

    def _shared(self, sealed: bytes, key: bytes, child: str, place: bytes) -> bytes:
        try:
            head = child.encode() + b"\0"
            return _aead(key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], head + place)
        except (_invalid_tag(), ValueError) as error:
            raise self._damaged(place) from error

    def _bytes(self, envelope: bytes, place: bytes) -> bytes:
        try:
            return base64.b64decode(envelope[len(_ENVELOPE) : -1], validate=True)
        except ValueError as error:
            raise self._damaged(place) from error

    def _damaged(self, place: bytes) -> DamagedCiphertext:
        what = place.decode(errors="replace").replace("\0", " ")
        return DamagedCiphertext(
            f"{what} of {self.id} does not open with its data key, which the key {self.name!r} wraps: "
            "it is damaged, or was written elsewhere"
        )


def is_sealed_blob(blob: bytes) -> bool:
    """Whether bytes are what `Cipher.seal_blob` gave."""
    return blob.startswith(MAGIC)


def has_envelope(content: bytes) -> bool:
    """Whether there may be an envelope in this JSON; where not, there is none."""
    return b'"enc' in content


def _outcome_of(child: str) -> bytes:
    return b"outcome of\0" + child.encode()


def _bound(job_id: str, name: str) -> bytes:
    return f"data key\0{job_id}\0{name}".encode()


def _decoded_key(name: str, encoded: str) -> bytes:
    try:
        key = base64.b64decode(encoded.strip(), validate=True)
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise ConfigError(
            f"setting 'encryption_keys': the key {name!r} is not {KEY_BYTES} bytes as base64; "
            "`openssl rand -base64 32` makes one"
        )
    return key


def _aead(key: bytes) -> Any:
    return _algorithm()(key)


@functools.cache
def _algorithm() -> Any:
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError as error:
        raise ConfigError("setting 'encryption_keys': install streamjobs[encryption]") from error
    return AESGCM


def _invalid_tag() -> type[Exception]:
    from cryptography.exceptions import InvalidTag

    return InvalidTag
