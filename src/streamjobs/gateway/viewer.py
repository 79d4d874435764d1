"""The stream of one job's events as server-sent events: a cursor, never a queue.

What is due is rendered in the form that the client asked for, once for all who stand at the same place.
It ends after the terminal event of its job (or a snapshot that covers it), or with a handover or error frame.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from streamjobs.config import Settings
from streamjobs.cursor import Cursor
from streamjobs.errors import StreamjobsError
from streamjobs.gateway import sse
from streamjobs.gateway.channel import Channel
from streamjobs.gateway.coding import Piece
from streamjobs.gateway.follower import Beginning, Due, Follower
from streamjobs.gateway.forms import Form, plain
from streamjobs.gateway.stream import EventStream


class Manner(NamedTuple):
    """How a client wants its events: in what form, and how many seconds apart at least (0: as they come)."""

    form: Form = plain
    pace: float = 0.0


AS_THEY_COME = Manner()


class Viewer(EventStream):
    """A stream of one job's events, from behind `cursor`, or from a snapshot where there is none."""

    __slots__ = ("_follower", "_form", "_is_first")

    def __init__(
        self,
        channel: Channel,
        cursor: Cursor | None,
        settings: Settings,
        abort: Callable[[], None],
        manner: Manner = AS_THEY_COME,
    ) -> None:
        super().__init__(settings, abort, manner.pace)
        self._form = manner.form
        self._is_first = True
        self._follower = Follower(channel, cursor, self)

    def close(self) -> None:
        """Free everything about it."""
        super().close()
        self._follower.close()

    def wake_for(self, follower: Follower) -> None:
        """See `Follows`; an end is not held back."""
        if follower.channel.end is None:
            self.wake()
        else:
            self.nudge()

    def nudge_for(self, _follower: Follower) -> None:
        """See `Follows`."""
        self.nudge()

    def take(self) -> tuple[Piece, ...]:
        """What is due now, in pieces; none where nothing is. `ended` is set once nothing comes after them."""
        pieces = self._due()
        if not pieces:
            return self.heartbeat(self._follower.channel.is_degraded)
        if self._is_first:
            self._is_first = False
            return sse.retry_line(), *pieces
        return pieces

    def _due(self) -> tuple[Piece, ...]:
        if self._leaving:
            self.ended, self._is_first = self._leaving, False
            return (sse.handover_frame(self._leaving),)
        due = self._follower.take()
        if self._follower.is_over:
            self.ended = self.ended or ("error" if isinstance(due, StreamjobsError) else "ended")
        return () if due is None else self._pieces(due)

    def _pieces(self, due: Due) -> tuple[Piece, ...]:
        if isinstance(due, StreamjobsError):
            return (sse.error_frame(due),)
        if isinstance(due, Beginning):
            self.events += 1
            frame = due.snapshot.frame
            return (frame,) if due.lost is None else (sse.reset_frame(*due.lost), frame)
        rendered = due.rendered(self._form)
        self.events += rendered.events
        return (rendered.body,)
