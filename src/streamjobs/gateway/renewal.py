"""The next stream token, sent on the stream that was opened with the last one, in time.

So a stream survives its token: what the client connects with next is good, whenever that is. It goes on until
the token may not be renewed any more, or the credential behind it has ended.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import structlog

from streamjobs.errors import Unauthenticated
from streamjobs.gateway.patience import patiently
from streamjobs.identity.streamtoken import StreamToken

log = structlog.get_logger(__name__)

Renew = Callable[[StreamToken], Awaitable[tuple[StreamToken, str]]]
Tell = Callable[[str, StreamToken], None]
"""Sends a token's text to the client."""

_SHARE = 1 / 3
"""Of a token's life that is left when the next one is sent."""
_LEAST = 0.5
"""Seconds between two tokens."""


class Renewal:
    """Renews a token until `cancel`."""

    def __init__(self, token: StreamToken, renew: Renew, tell: Tell) -> None:
        self._renew = renew
        self._tell = tell
        self._task = asyncio.create_task(self._run(token), name="token renewal")

    def cancel(self) -> None:
        """Send no more."""
        self._task.cancel()

    async def _run(self, token: StreamToken) -> None:
        try:
            while token.expires < token.until:
                left = token.expires - time.time()
                await asyncio.sleep(max(_LEAST, left * (1 - _SHARE)))
                token, text = await patiently(lambda known=token: self._renew(known))
                self._tell(text, token)
        except Unauthenticated as error:
            log.info("token.not_renewed", why=str(error))
