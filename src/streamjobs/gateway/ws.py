"""`GET /v1/ws`: many jobs on one WebSocket; see `messages` for what is said, `docs/api.md` for what it means.

Rule 1: a socket is cursors and no queue: what is due is taken when the connection takes bytes, one piece of
`CHUNK_BYTES` from each subscription in turn, so none starves the others.
Rule 2: a socket costs no task. It is pumped when something may be due or the connection took everything; each
time about a piece is written, then others have their turn.
Rule 3: a bad message is answered, and the connection goes on; one that floods is closed. A client whose
answers do not go out is not read from.
Rule 4: heartbeats are pings, so a peer that is gone is noticed while nothing is said.

A connection is one viewer; its subscriptions are counted as streams that open and close.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import structlog
from starlette.exceptions import HTTPException
from starlette.routing import Route, WebSocketRoute
from starlette.types import Receive, Scope, Send

from streamjobs import metrics
from streamjobs.cursor import parse_cursor
from streamjobs.errors import (
    AlreadySubscribed,
    NotSubscribed,
    StreamjobsError,
    TooManyMessages,
    TooManySubscriptions,
)
from streamjobs.events import Json
from streamjobs.gateway import messages
from streamjobs.gateway.access import TOKEN, Access
from streamjobs.gateway.archived import Archived
from streamjobs.gateway.edge import socket_of
from streamjobs.gateway.events import manner_of
from streamjobs.gateway.forms import members, merged_members
from streamjobs.gateway.hub import Hub
from streamjobs.gateway.messages import Ping, Subscribe, Unsubscribe
from streamjobs.gateway.renewal import Renewal
from streamjobs.gateway.requests import principal_of
from streamjobs.gateway.ring import CHUNK_BYTES
from streamjobs.gateway.stream import Stream
from streamjobs.gateway.subscription import Subscription
from streamjobs.gateway.websocket import WHOLE, Parts, WebSocket, fragments_of, frame_of, size_of
from streamjobs.identity.principal import Principal
from streamjobs.identity.streamtoken import StreamToken

log = structlog.get_logger(__name__)

PATH = "/v1/ws"

GOODBYES = {"drain": (1012, "restarting"), "age": (1001, "old"), "idle": (1000, "idle"), "error": (1011, "")}
"""How we close: the code and the reason, by why."""
HANDOVERS = frozenset({"drain", "age"})
"""Why a client is to come back."""

_ANSWERS = 16
"""Answers that wait for the connection before its client is no longer read from."""


class SocketRoutes:
    """The route: for WebSockets, and for those who come without."""

    def __init__(self, hub: Hub, archived: Archived, access: Access) -> None:
        self._hub = hub
        self._archived = archived
        self._access = access

    def sockets(self) -> list[WebSocketRoute]:
        """For handshakes."""
        return [WebSocketRoute(PATH, self)]

    def routes(self) -> list[Route]:
        """For plain requests."""
        return [Route(PATH, _refuse, methods=["GET"])]

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        """Accept; whether this client may connect (credentials, a browser's `Origin`) is decided before."""
        owner = principal_of(scope).owner
        self._hub.open_streams.enter(owner)
        try:
            await send({"type": "websocket.accept"})
        except BaseException:
            self._hub.open_streams.leave(owner)
            raise
        wire = socket_of(scope)
        socket = Socket(self._hub, self._archived, wire, self._access, principal_of(scope), scope.get(TOKEN))
        wire.listen(socket, self._hub.settings.ws_max_message)


async def _refuse(_request: object) -> None:
    headers = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}
    raise HTTPException(426, headers=headers)


class Socket(Stream):
    """One connection's subscriptions, and what is on its way to it."""

    __slots__ = (
        "_access", "_allowance", "_answers", "_dirty", "_heard_at", "_idle_timer", "_is_closed",
        "_is_pumping", "_principal", "_renewal", "_rest", "_subscriptions", "_wire", "archived", "hub",
        "unpacking",
    )  # fmt: skip

    def __init__(
        self,
        hub: Hub,
        archived: Archived,
        wire: WebSocket,
        access: Access,
        principal: Principal,
        token: StreamToken | None = None,
    ) -> None:
        settings = hub.settings
        super().__init__(settings, wire.abort)
        self.hub = hub
        self.archived = archived
        self.unpacking = asyncio.Lock()
        self._principal = principal
        self._access = access
        self._renewal = None if token is None else Renewal(token, access.renew, self._tell)
        self._wire = wire
        self._subscriptions: dict[str, Subscription] = {}
        self._dirty: dict[Subscription, None] = {}
        self._answers: list[Parts] = []
        self._rest: Iterator[bytes] | None = None
        self._is_pumping = self._is_closed = False
        self._heard_at = time.monotonic()
        self._allowance: float = settings.ws_message_rate + settings.ws_subscriptions
        self._idle_timer: asyncio.TimerHandle | None = None
        self.end_send()
        metrics.WEBSOCKETS.inc()
        hub.attach(self)
        self._watch_idleness()

    def close(self) -> None:
        """Free everything about it."""
        self._is_closed = True
        self._stop_timers()
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        if self._renewal is not None:
            self._renewal.cancel()
        for subscription in tuple(self._subscriptions.values()):
            self._free(subscription, self.ended)
        self._dirty.clear()
        self.hub.open_streams.leave(self._principal.owner)
        metrics.WEBSOCKETS.dec()

    def _free(self, subscription: Subscription, why: str) -> None:
        del self._subscriptions[subscription.job]
        self._dirty.pop(subscription, None)
        subscription.close()
        metrics.STREAMS_CLOSED.labels(why).inc()
        if not self._subscriptions and not self._is_closed:
            self._watch_idleness()

    # --- what the connection says

    def on_frame(self) -> None:
        """Count it against what its client may send."""
        settings, now = self._settings, time.monotonic()
        most = settings.ws_message_rate + settings.ws_subscriptions
        earned = (now - self._heard_at) * settings.ws_message_rate
        self._heard_at = now
        self._allowance = min(most, self._allowance + earned) - 1
        if self._allowance < 0:
            self._refuse_flood()

    def _refuse_flood(self) -> None:
        error = TooManyMessages(f"at most {self._settings.ws_message_rate} messages a second")
        self.ended = self.ended or "flood"
        if self._wire.is_writable and self._rest is None:
            self._wire.write(frame_of(messages.error(error)))
        self._wire.refuse(1008, "too many messages")

    def on_message(self, text: str) -> None:
        """Do what is asked; see `messages`."""
        job = ""
        try:
            message = messages.decode(text)
            job = messages.job_of(message)
            self._do(message)
        except StreamjobsError as error:
            self._answer(messages.error(error, job))

    def on_writable(self) -> None:
        """Go on sending."""
        self.end_send()
        self.nudge()

    def on_lost(self) -> None:
        """Free everything."""
        self.lose()

    # --- who the client is

    @property
    def sees_all(self) -> bool:
        """See `Owner`."""
        return self._principal.sees_all

    async def require_own(self, job: str) -> None:
        """See `Owner`."""
        await self._access.require_own_patiently(self._principal, job)

    def _tell(self, text: str, token: StreamToken) -> None:
        self._answer(messages.told("token", token=text, expires_ms=token.expires * 1000))

    # --- what the client asks for

    def _do(self, message: dict[str, Json]) -> None:
        asked = messages.asked_of(message)
        match asked:
            case Subscribe():
                self._subscribe(asked)
            case Unsubscribe():
                self._unsubscribe(asked.job)
            case Ping():
                self._answer(messages.pong(asked.data))

    def _subscribe(self, asked: Subscribe) -> None:
        if asked.job in self._subscriptions:
            raise AlreadySubscribed("this connection is subscribed to the job")
        if len(self._subscriptions) >= self._settings.ws_subscriptions:
            raise TooManySubscriptions(f"job: at most {self._settings.ws_subscriptions} subscriptions")
        cursor = parse_cursor(asked.after) if asked.after else None
        query = {"merge": str(int(asked.merge))} | (
            {} if asked.flush is None else {"flush": str(asked.flush)}
        )
        manner = manner_of(query, self._settings, members, merged_members)
        subscription = Subscription(asked.job, cursor, manner, self)
        self._subscriptions[asked.job] = subscription
        subscription.open()

    def _unsubscribe(self, job: str) -> None:
        subscription = self._subscriptions.get(job)
        if subscription is None:
            raise NotSubscribed("this connection is not subscribed to the job")
        self._free(subscription, "unsubscribed")
        self._answer(messages.told("unsubscribed", job=job))

    def _answer(self, message: Parts) -> None:
        self._answers.append(message)
        if len(self._answers) > _ANSWERS:
            self._wire.pause_reading()
        self.nudge()

    # --- sending

    def mark(self, subscription: Subscription) -> None:
        """See `Owner`."""
        if self._subscriptions.get(subscription.job) is subscription:
            self._dirty[subscription] = None
            self.nudge()

    def nudge(self) -> None:
        """Pump soon."""
        if not self._is_pumping and not self._is_closed:
            self._is_pumping = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        self._is_pumping = False
        try:
            if not self.ended:
                self._send_if_possible()
        except Exception as error:
            log.exception("socket.failed", error=type(error).__name__)
            self.ended = "error"
        if self.ended and not self._is_closed:
            self.hub.close(self)
            if self.ended in GOODBYES:
                self._wire.close(*GOODBYES[self.ended])

    def _send_if_possible(self) -> None:
        if self._wire.is_writable:
            self._send(self._next())
        elif not self._sending_since:
            self.begin_send()  # a pong fills the socket too

    def _send(self, data: bytes) -> None:
        if data:
            self.begin_send()
            self._wire.write(data)
            metrics.STREAM_BYTES.inc(len(data))
            self.count()
        elif not self.ended and self.is_heartbeat_due:
            self.begin_send()
            self._wire.ping(self._settings.ws_pong_timeout)
        else:
            return
        if self._wire.is_writable:
            self.end_send()
            if self._rest is not None or self._dirty or self._answers:
                self.nudge()

    def _next(self) -> bytes:
        """What is written next: the next part of a message under way, or messages, about a piece in all."""
        portion = None if self._rest is None else next(self._rest, None)
        if portion is not None:
            return portion
        self._rest = None
        frames: list[bytes] = []
        size = 0
        while size < CHUNK_BYTES and (message := self._due()) is not None:
            if size_of(message) > WHOLE:
                self._rest = fragments_of(message)
                frames.append(next(self._rest))
                break
            frames.append(frame_of(message))
            size += len(frames[-1])
        return b"".join(frames)

    def _due(self) -> Parts | None:
        """The next message: an answer, a handover, what the subscription has whose turn it is."""
        if not self._answers and self._leaving:
            return self._last()
        while not self._answers and self._dirty:
            self._take_from(next(iter(self._dirty)))
        return self._next_answer() if self._answers else None

    def _last(self) -> Parts | None:
        if self.ended:
            return None
        self.ended = self._leaving
        return messages.handover(self.ended) if self.ended in HANDOVERS else None

    def _take_from(self, subscription: Subscription) -> None:
        del self._dirty[subscription]
        found = subscription.take()
        self.events += subscription.events
        subscription.events = 0
        self._answers += found
        if subscription.is_over:
            self._free(subscription, "ended")
        elif found and subscription.is_behind:
            self._dirty[subscription] = None  # after the others

    def _next_answer(self) -> Parts:
        if len(self._answers) == 1:
            self._wire.resume_reading()
        return self._answers.pop(0)

    # --- connections that nobody uses

    def _watch_idleness(self) -> None:
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        self._idle_timer = asyncio.get_running_loop().call_later(self._until_idle(), self._check_idleness)

    def _until_idle(self) -> float:
        return self._heard_at + self._settings.ws_idle_timeout - time.monotonic()

    def _check_idleness(self) -> None:
        self._idle_timer = None
        if self._subscriptions:
            return
        if self._until_idle() <= 0:
            self.leave("idle")
        else:
            self._watch_idleness()
