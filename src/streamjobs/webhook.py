"""What a webhook is, and how what is sent to it is signed. Pure.

Signatures are those of Standard Webhooks 1.0 (standardwebhooks.com): `v1,` and the base64 of HMAC-SHA256
over `<id>.<timestamp>.<body>`; during a rotation there is one for each secret, separated by spaces.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable

import msgspec

from streamjobs.errors import Invalid
from streamjobs.events import ApprovalRequested, JobCancelled, JobCompleted, JobFailed

NOTICED = frozenset({JobCompleted.type, JobFailed.type, JobCancelled.type, ApprovalRequested.type})
"""Events that an owner is told of, and all that a webhook may ask for beside `x.` ones."""

MAX_CHOSEN = 50
"""Events, and kinds, that one webhook may name."""

_SECRET_PREFIX = "whsec_"  # noqa: S105 - a form, no secret
_USER_EVENT = re.compile(r"x\.(\*|[A-Za-z0-9._-]{1,64})", re.ASCII)
_MAIL = re.compile(r"mailto:[^\s@<>,;:\"()\[\]\\\x00-\x1f\x7f?&%]{1,64}@[A-Za-z0-9.-]{1,190}", re.ASCII)


class Webhook(msgspec.Struct, frozen=True, kw_only=True):
    """Where to send what: `events` by type (`x.*` for all of one's own), `kinds` of jobs, all if empty."""

    url: str
    events: tuple[str, ...] = tuple(sorted(NOTICED))
    kinds: tuple[str, ...] = ()
    created_ms: int = 0

    @property
    def is_mail(self) -> bool:
        """Whether it is somebody's mailbox."""
        return self.url.startswith("mailto:")

    def wants(self, event_type: str, kind: str) -> bool:
        """Whether an event of a job of this kind is to be sent."""
        if self.kinds and kind not in self.kinds:
            return False
        return event_type in self.events or (event_type.startswith("x.") and "x.*" in self.events)


def check_choice(events: Iterable[str]) -> None:
    """Raise `Invalid` for an event that no webhook can ask for."""
    for event in events:
        if event not in NOTICED and not _USER_EVENT.fullmatch(event):
            raise Invalid(f"events: {event!r} is none of {', '.join(sorted(NOTICED))}, x.<name>, x.*")


def address_of(url: str) -> str:
    """The address of a `mailto:`. Raises `Invalid` for anything but a single plain one."""
    if not _MAIL.fullmatch(url):
        raise Invalid("url: mailto: takes one plain address")
    return url.removeprefix("mailto:")


def is_news(event_type: str) -> bool:
    """Whether a webhook could ask for an event of this type."""
    return event_type in NOTICED or event_type.startswith("x.")


def new_secret() -> str:
    """A secret of 192 bits, as `whsec_<base64>`."""
    return _SECRET_PREFIX + base64.b64encode(secrets.token_bytes(24)).decode()


def signed_headers(keys: Iterable[str], message_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The three headers of Standard Webhooks; one signature for each secret."""
    signatures = (_signature(key, message_id, timestamp, body) for key in keys)
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(signatures),
    }


def _signature(key: str, message_id: str, timestamp: int, body: bytes) -> str:
    raw_key = base64.b64decode(key.removeprefix(_SECRET_PREFIX))
    digest = hmac.new(raw_key, f"{message_id}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode()}"
