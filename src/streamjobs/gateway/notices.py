"""An owner's notices and webhooks: what they are told, and where it is sent.

Rule 1: everything here is the asker's own: for anybody else there is none.
Rule 2: a webhook's address is checked when it is made, and again, resolved, at every delivery.
Rule 3: a secret is in the answer that makes it, and in no other.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from streamjobs.config import Settings
from streamjobs.errors import Invalid
from streamjobs.gateway.answers import answer
from streamjobs.gateway.body import decode_body, fields_of, read_body
from streamjobs.gateway.requests import Label, owner_of, parameters_of
from streamjobs.outgoing import Policy
from streamjobs.store import Store, WebhookRecord
from streamjobs.webhook import MAX_CHOSEN, NOTICED, Webhook, address_of, check_choice

Chosen = Annotated[list[Annotated[Label, msgspec.Meta(min_length=1)]], msgspec.Meta(max_length=MAX_CHOSEN)]


class NoticesQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which notices: all, or with `unread=1` those not read."""

    unread: bool = False
    cursor: Label = ""
    limit: Annotated[int, msgspec.Meta(ge=1, le=500)] = 50


class ReadRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was read: some notices, or all up to and with one."""

    ids: Annotated[list[Label], msgspec.Meta(max_length=1000)] = []
    until: Label = ""


class WebhookRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A webhook's body: `https://…` or `mailto:…`, which events (all of a job's end and approvals if
    absent), of which kinds of jobs (all)."""

    url: Annotated[str, msgspec.Meta(max_length=2000)]
    events: Chosen | None = None
    kinds: Chosen = []


class AgainRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which undelivered ones."""

    ids: Annotated[list[Label], msgspec.Meta(min_length=1, max_length=1000)]


class UndeliveredQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many of the newest."""

    limit: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 100


class NoticeRoutes:
    """The routes of notices and webhooks."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._settings = settings
        self._policy = Policy.of(settings.webhook_allow, http=settings.webhook_http)

    def routes(self) -> list[Route]:
        """What a router needs."""
        hook = "/v1/webhooks/{id}"
        return [
            Route("/v1/notifications", self.notices, methods=["GET"]),
            Route("/v1/notifications/read", self.read, methods=["POST"]),
            Route("/v1/webhooks", self.create, methods=["POST"]),
            Route("/v1/webhooks", self.list, methods=["GET"]),
            Route(hook, self.view, methods=["GET"]),
            Route(hook, self.delete, methods=["DELETE"]),
            Route(f"{hook}/rotate", self.rotate, methods=["POST"]),
            Route(f"{hook}/enable", self.enable, methods=["POST"]),
            Route(f"{hook}/disable", self.disable, methods=["POST"]),
            Route(f"{hook}/undelivered", self.undelivered, methods=["GET"]),
            Route(f"{hook}/undelivered/rerun", self.rerun, methods=["POST"]),
        ]

    # --- notices

    async def notices(self, request: Request) -> Response:
        """What the owner is told, newest first, and how much of it is unread."""
        owner, asked = owner_of(request), parameters_of(request, NoticesQuery)
        found, cursor = await self._store.notices.page(
            owner, unread=asked.unread, before=asked.cursor, limit=asked.limit
        )
        unread = await self._store.notices.unread(owner)
        return answer({"notifications": found, "unread": unread, "cursor": cursor})

    async def read(self, request: Request) -> Response:
        """Mark notices as read; `marked` is how many were not before."""
        owner, asked = (
            owner_of(request),
            fields_of(decode_body(await self._body(request), self._settings), ReadRequest),
        )
        if not asked.ids and not asked.until:
            raise Invalid("ids: some, or until")
        marked = await self._store.notices.mark_read(owner, ids=asked.ids, until=asked.until)
        return answer({"marked": marked, "unread": await self._store.notices.unread(owner)})

    # --- webhooks

    async def create(self, request: Request) -> Response:
        """Make a webhook: 201, what it is, and its secret."""
        asked = fields_of(decode_body(await self._body(request), self._settings), WebhookRequest)
        events = sorted(NOTICED) if asked.events is None else asked.events
        check_choice(events)
        self._check_url(asked.url)
        webhook = Webhook(
            url=asked.url,
            events=tuple(events),
            kinds=tuple(asked.kinds),
            created_ms=await self._store.now_ms(),
        )
        record, secret = await self._store.webhooks.create(owner_of(request), webhook)
        headers = {"Location": f"/v1/webhooks/{record.id}"}
        return answer(_shown(record) | {"secret": secret}, headers, status_code=201)

    def _check_url(self, url: str) -> None:
        if not url.startswith("mailto:"):
            self._policy.target(url)
        elif self._settings.smtp_url:
            address_of(url)
        else:
            raise Invalid("url: mail is not set up here")

    async def list(self, request: Request) -> Response:
        """All of the owner's webhooks, oldest first."""
        records = await self._store.webhooks.of_owner(owner_of(request))
        return answer({"webhooks": [_shown(record) for record in records]})

    async def view(self, request: Request) -> Response:
        """One webhook."""
        return answer(_shown(await self._own(request)))

    async def delete(self, request: Request) -> Response:
        """Forget it, and what it did not take."""
        webhook_id: str = request.path_params["id"]
        await self._store.webhooks.delete(owner_of(request), webhook_id)
        return answer({"id": webhook_id, "deleted": True})

    async def rotate(self, request: Request) -> Response:
        """Give it another secret; the one before signs too for a while."""
        webhook_id: str = request.path_params["id"]
        secret = await self._store.webhooks.rotate(owner_of(request), webhook_id)
        return answer({"id": webhook_id, "secret": secret, "grace": self._settings.webhook_grace})

    async def enable(self, request: Request) -> Response:
        """Send to it again."""
        await self._store.webhooks.enable(owner_of(request), request.path_params["id"])
        return answer(_shown(await self._own(request)))

    async def disable(self, request: Request) -> Response:
        """Send nothing to it."""
        await self._store.webhooks.disable(owner_of(request), request.path_params["id"], "by its owner")
        return answer(_shown(await self._own(request)))

    async def undelivered(self, request: Request) -> Response:
        """What it did not take, newest first."""
        record, asked = await self._own(request), parameters_of(request, UndeliveredQuery)
        found = await self._store.deliveries.undelivered(owner_of(request), record.id, asked.limit)
        return answer({"undelivered": found})

    async def rerun(self, request: Request) -> Response:
        """Send some of that again, under the same ids."""
        record, asked = (
            await self._own(request),
            fields_of(decode_body(await self._body(request), self._settings), AgainRequest),
        )
        count = await self._store.deliveries.rerun(owner_of(request), record.id, asked.ids)
        return answer({"count": count})

    async def _own(self, request: Request) -> WebhookRecord:
        return await self._store.webhooks.get(owner_of(request), request.path_params["id"])

    async def _body(self, request: Request) -> bytes:
        return await read_body(request.scope, request.receive, self._settings)


def _shown(record: WebhookRecord) -> dict[str, Any]:
    here = f"/v1/webhooks/{record.id}"
    return {
        "id": record.id,
        "url": record.webhook.url,
        "events": record.webhook.events,
        "kinds": record.webhook.kinds,
        "disabled": record.is_disabled,
        "disabled_ms": record.disabled_ms or None,
        "disabled_why": record.disabled_why,
        "created_ms": record.webhook.created_ms,
        "links": {"self": here, "undelivered": f"{here}/undelivered"},
    }
