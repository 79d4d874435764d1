"""Mail to an owner, for those who have no webhook: plain text, over SMTP.

Rule 1: what goes into a header was checked or is ours; `EmailMessage` refuses line ends in one.
Rule 2: a refusal that will stay one (5xx) is final, everything else is worth another try.
"""

from __future__ import annotations

import asyncio
import smtplib
import ssl
from email.message import EmailMessage
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

import msgspec

from streamjobs.webhook import Webhook, address_of

_PORTS = {"smtp": 25, "smtps": 465}
_PERMANENT = 500


class Letter(Protocol):
    """What mail needs of a delivery."""

    @property
    def id(self) -> str:
        """The same for each try."""
        ...

    @property
    def webhook(self) -> Webhook:
        """Where it goes."""
        ...

    @property
    def content(self) -> bytes:
        """What a webhook would be sent."""
        ...


class MailError(Exception):
    """The mail was not taken; `is_final` where another try cannot help."""

    def __init__(self, message: str, *, is_final: bool) -> None:
        super().__init__(message)
        self.is_final = is_final


class Mail:
    """Sends mail through one server; without a URL it refuses everything."""

    def __init__(self, url: str, sender: str, timeout: float) -> None:
        self._url = urlsplit(url)
        self._sender = sender
        self._timeout = timeout

    async def send(self, letter: Letter) -> None:
        """Send one mail. Raises `MailError`."""
        if not self._url.hostname:
            raise MailError("mail is not set up", is_final=True)
        message = message_of(letter, self._sender)
        try:
            await asyncio.to_thread(self._send, message)
        except smtplib.SMTPRecipientsRefused as error:
            codes = [code for code, _ in error.recipients.values()]
            raise MailError("the recipient was refused", is_final=min(codes) >= _PERMANENT) from error
        except smtplib.SMTPResponseException as error:
            is_final = error.smtp_code >= _PERMANENT and not isinstance(
                error, smtplib.SMTPAuthenticationError
            )
            raise MailError(f"the mail server answered {error.smtp_code}", is_final=is_final) from error
        except (OSError, smtplib.SMTPException) as error:
            raise MailError(f"the mail server: {type(error).__name__}", is_final=False) from error

    def _send(self, message: EmailMessage) -> None:
        host = self._url.hostname or ""
        port = self._url.port or _PORTS[self._url.scheme]
        context = ssl.create_default_context()
        if self._url.scheme == "smtps":
            server = smtplib.SMTP_SSL(host, port, timeout=self._timeout, context=context)
        else:
            server = smtplib.SMTP(host, port, timeout=self._timeout)
        with server:
            server.ehlo()
            if self._url.scheme == "smtp" and server.has_extn("starttls"):
                server.starttls(context=context)
                server.ehlo()
            if self._url.username:
                server.login(unquote(self._url.username), unquote(self._url.password or ""))
            server.send_message(message)


def message_of(letter: Letter, sender: str) -> EmailMessage:
    """The mail that says what a webhook would have been sent."""
    said: dict[str, Any] = msgspec.json.decode(letter.content)
    data = said["data"]
    message = EmailMessage()
    message["From"] = sender
    message["To"] = address_of(letter.webhook.url)
    message["Subject"] = f"{data['kind']}: {_WORDS.get(said['type'], said['type'])}"
    message["Message-ID"] = f"<{letter.id}@{sender.rpartition('@')[2].rstrip('>')}>"
    message["Auto-Submitted"] = "auto-generated"
    message.set_content(
        f"Job {data['id']} ({data['kind']})\n{said['type']} at {said['timestamp']}\n{data['links']['self']}\n"
    )
    return message


_WORDS = {
    "job.completed": "completed",
    "job.failed": "failed",
    "job.cancelled": "cancelled",
    "approval.requested": "needs your approval",
}
