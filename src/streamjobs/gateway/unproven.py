"""A job's stream that was opened while Redis was away, for a client of whom it is not known yet that it may.

It stands, with heartbeats, as any stream does meanwhile. Nothing of the job is shown before the proof.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from streamjobs.config import Settings
from streamjobs.cursor import Cursor
from streamjobs.errors import JobNotFound, StreamjobsError
from streamjobs.gateway import sse
from streamjobs.gateway.access import Prove
from streamjobs.gateway.channel import Channel
from streamjobs.gateway.coding import Piece
from streamjobs.gateway.patience import patiently
from streamjobs.gateway.viewer import Manner, Viewer


class UnprovenViewer(Viewer):
    """Shows its job once `prove` returns, and says that there is none where that raises."""

    __slots__ = ("_proving", "_refusal")

    def __init__(
        self,
        channel: Channel,
        cursor: Cursor | None,
        settings: Settings,
        abort: Callable[[], None],
        manner: Manner,
        prove: Prove,
    ) -> None:
        super().__init__(channel, cursor, settings, abort, manner)
        self._refusal: StreamjobsError | None = None
        self._proving = asyncio.create_task(self._prove(prove), name="proof")

    def close(self) -> None:
        """Free everything about it."""
        self._proving.cancel()
        super().close()

    def take(self) -> tuple[Piece, ...]:
        """What is due, as far as it may be shown."""
        if self._leaving or (self._proving.done() and self._refusal is None):
            return super().take()
        if self._refusal is not None:
            self.ended = "error"
            return (sse.error_frame(self._refusal),)
        return self.heartbeat(is_degraded=True)

    async def _prove(self, prove: Prove) -> None:
        try:
            await patiently(prove)
        except StreamjobsError as error:
            self._refusal = error
        except BaseException:
            self._refusal = JobNotFound("no such job")
            raise
        finally:
            asyncio.get_running_loop().call_soon(self.nudge)
