"""Who may do what: every route has a rule here, and no route exists without one.

Rule 1: a request passes in this order: the page it comes from, who asks, what it may do, whose job it is.
Rule 2: somebody else's job is not there: 404, as for one that never was.
Rule 3: whose a job is never changes, so it is asked once and remembered, for as many jobs as fit.
Rule 4: an event stream is not refused because Redis, or the archive, is away: it opens, and says nothing of
its job until that is known to be the client's.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

from starlette.datastructures import Headers
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from streamjobs import metrics
from streamjobs.config import Settings
from streamjobs.errors import (
    ArchiveUnavailable,
    Forbidden,
    JobNotFound,
    StoreUnavailable,
    StreamjobsError,
    Unauthenticated,
)
from streamjobs.gateway.archived import Archived
from streamjobs.gateway.authenticators import Authenticator, KeyAuthenticator, authenticators_of
from streamjobs.gateway.credentials import OWNER_HEADER, Credential, credential_of
from streamjobs.gateway.hub import Hub
from streamjobs.gateway.origin import require_own_origin
from streamjobs.gateway.patience import patiently
from streamjobs.gateway.requests import PRINCIPAL
from streamjobs.identity import streamtoken
from streamjobs.identity.principal import SCOPES, Principal
from streamjobs.identity.principal import Scope as Need
from streamjobs.identity.streamtoken import StreamToken, StreamTokens, parse_keys
from streamjobs.store import Store

ANONYMOUS = "anonymous"
TOKEN = "streamjobs.token"  # noqa: S105 - a name
PROOF = "streamjobs.proof"
"""In a scope: the stream token that said who asks; what must hold before a stream shows its job."""

PROOF_TIMEOUT = 1.0
"""Seconds that an event stream waits for Redis to say whose its job is; then it opens without."""
_OWNERS = 20_000

Prove = Callable[[], Awaitable[None]]


class Rule(NamedTuple):
    """What a route needs. `of`: whose it is: a job's, or its caller's own; `takes_token`: in the URL."""

    need: Need | None
    of: Literal["job", "own", "all"] = "own"
    takes_token: bool = False
    is_stream: bool = False


_READ, _WRITE, _ADMIN = Rule("jobs:read"), Rule("jobs:write"), Rule("admin", "all")
_READ_JOB, _WRITE_JOB = Rule("jobs:read", "job"), Rule("jobs:write", "job")
_WATCH, _WATCH_JOB = Rule("jobs:read", takes_token=True), Rule("jobs:read", "job", takes_token=True)
_CATALOG, _OPEN = Rule("jobs:read", "all"), Rule(None, "all")

RULES: dict[tuple[str, str], Rule] = {
    ("POST", "/v1/jobs"): _WRITE,
    ("GET", "/v1/jobs"): _READ,
    ("GET", "/v1/jobs/{id}"): _WATCH_JOB,
    ("DELETE", "/v1/jobs/{id}"): _WRITE_JOB,
    ("GET", "/v1/jobs/{id}/events"): _WATCH_JOB._replace(is_stream=True),
    ("POST", "/v1/jobs/{id}/token"): _READ_JOB,
    ("GET", "/v1/jobs/{id}/result"): _WATCH_JOB,
    ("GET", "/v1/jobs/{id}/log"): _WATCH_JOB,
    ("GET", "/v1/jobs/{id}/effects"): _WATCH_JOB,
    ("GET", "/v1/jobs/{id}/artifacts/{name}"): _WATCH_JOB,
    ("POST", "/v1/jobs/{id}/cancel"): _WRITE_JOB,
    ("POST", "/v1/jobs/{id}/signal"): _WRITE_JOB,
    ("POST", "/v1/jobs/{id}/pause"): _WRITE_JOB,
    ("POST", "/v1/jobs/{id}/resume"): _WRITE_JOB,
    ("POST", "/v1/jobs/{id}/rerun"): _WRITE_JOB,
    ("GET", "/v1/events"): _WATCH,
    ("POST", "/v1/events/token"): _READ,
    ("GET", "/v1/ws"): _WATCH,
    ("POST", "/v1/schedules"): _WRITE,
    ("GET", "/v1/schedules"): _READ,
    ("GET", "/v1/schedules/{id}"): _READ,
    ("DELETE", "/v1/schedules/{id}"): _WRITE,
    ("POST", "/v1/schedules/{id}/pause"): _WRITE,
    ("POST", "/v1/schedules/{id}/resume"): _WRITE,
    ("POST", "/v1/schedules/{id}/trigger"): _WRITE,
    ("GET", "/v1/notifications"): _READ,
    ("POST", "/v1/notifications/read"): _WRITE,
    ("POST", "/v1/webhooks"): _WRITE,
    ("GET", "/v1/webhooks"): _READ,
    ("GET", "/v1/webhooks/{id}"): _READ,
    ("DELETE", "/v1/webhooks/{id}"): _WRITE,
    ("POST", "/v1/webhooks/{id}/rotate"): _WRITE,
    ("POST", "/v1/webhooks/{id}/enable"): _WRITE,
    ("POST", "/v1/webhooks/{id}/disable"): _WRITE,
    ("GET", "/v1/webhooks/{id}/undelivered"): _READ,
    ("POST", "/v1/webhooks/{id}/undelivered/rerun"): _WRITE,
    ("GET", "/v1/workflows"): _CATALOG,
    ("GET", "/v1/tools"): _CATALOG,
    ("GET", "/v1/workers"): _ADMIN,
    ("GET", "/v1/queues"): _ADMIN,
    ("GET", "/v1/stats"): _ADMIN,
    ("GET", "/v1/projections"): _ADMIN,
    ("POST", "/v1/projections/{name}/rebuild"): _ADMIN,
    ("POST", "/v1/projections/{name}/retry"): _ADMIN,
    ("GET", "/v1/dead"): _ADMIN,
    ("POST", "/v1/dead/rerun"): _ADMIN,
    ("GET", "/v1/strikes"): _ADMIN,
    ("PUT", "/v1/strikes/{scope}/{name}"): _ADMIN,
    ("DELETE", "/v1/strikes/{scope}/{name}"): _ADMIN,
    ("GET", "/openapi.json"): _OPEN,
    ("GET", "/livez"): _OPEN,
    ("GET", "/readyz"): _OPEN,
    ("GET", "/metrics"): _ADMIN,
}


class Access:
    """Lets requests to routes, or not."""

    def __init__(self, store: Store, hub: Hub, archived: Archived, settings: Settings) -> None:
        self._store = store
        self._hub = hub
        self._archived = archived
        self._settings = settings
        self._keys = KeyAuthenticator(store, settings)
        self._authenticators: Sequence[Authenticator] = authenticators_of(settings, self._keys)
        self._token_keys = parse_keys(settings.token_keys)
        self._owners: OrderedDict[str, str] = OrderedDict()
        self._tokens: StreamTokens | None = None

    def guarded(self, routes: Sequence[Route]) -> list[Route]:
        """The same routes, each behind its rule. Raises `KeyError` for one that has none."""
        return [self._guarded(route) for route in routes]

    def guarded_socket(self, route: WebSocketRoute) -> WebSocketRoute:
        """A WebSocket's route behind the rule of its path."""
        return WebSocketRoute(route.path, _Guard(self, {"GET": RULES["GET", route.path]}, route.app))

    def _guarded(self, route: Route) -> Route:
        methods = sorted(route.methods or ())
        rules = {method: RULES["GET" if method == "HEAD" else method, route.path] for method in methods}
        return Route(route.path, _Guard(self, rules, route.app), methods=methods)

    # --- who asks

    async def admit(self, scope: Scope, rule: Rule) -> None:
        """Let a request through, and note in its scope who asks.

        Raises `ForeignOrigin`, `Unauthenticated`, `Forbidden`, `JobNotFound`, `StoreUnavailable`.
        """
        if rule.need is None:
            return
        require_own_origin(scope, self._settings)
        principal = await self._principal(scope, rule)
        scope[PRINCIPAL] = principal
        if rule.need not in principal.scopes:
            raise Forbidden(f"this needs the scope {rule.need}")
        if principal.job and rule.of != "job" and scope["type"] != "websocket":
            raise Forbidden("this token is for one job")
        if rule.of == "job":
            await self._require_job(scope, principal, rule)

    async def _principal(self, scope: Scope, rule: Rule) -> Principal:
        credential = credential_of(scope, self._settings.auth_cookie, from_query=rule.takes_token)
        if credential is not None and credential.text.startswith(streamtoken.PREFIX):
            return await self._by_token(scope, credential, rule)
        if credential is not None and credential.source == "query":
            raise Unauthenticated("token: a stream token is what is understood here")
        if not self._authenticators:
            subject = Headers(scope=scope).get(OWNER_HEADER) or ANONYMOUS
            return Principal(subject=subject, scopes=SCOPES)
        for authenticate in self._authenticators:
            principal = await authenticate(scope, credential)
            if principal is not None:
                return self._acting(scope, principal)
        raise Unauthenticated(
            "say who you are" if credential is None else "this credential is not known here"
        )

    def _acting(self, scope: Scope, principal: Principal) -> Principal:
        subject = Headers(scope=scope).get(OWNER_HEADER)
        if subject is None or subject == principal.subject:
            return principal
        if "act-as" not in principal.scopes:
            raise Forbidden("to name another owner needs the scope act-as")
        return principal.acting_as(subject)

    async def _by_token(self, scope: Scope, credential: Credential, rule: Rule) -> Principal:
        if not rule.takes_token:
            raise Forbidden("a stream token only reads")
        token = (await self.tokens()).verify(credential.text, time.time())
        principal = token.principal
        await self._keys.require_live(principal)
        scope[TOKEN] = token
        return principal

    async def tokens(self) -> StreamTokens:
        """What signs stream tokens: the configured keys, else one that Redis keeps for all gateways."""
        if self._tokens is None:
            keys = self._token_keys
            if not keys:
                secret = await self._store.api_keys.signing_secret(secrets.token_hex(32))
                keys = {"store": secret.encode()}
            self._tokens = StreamTokens(keys, self._settings.token_ttl, self._settings.token_max_age)
        return self._tokens

    async def renew(self, token: StreamToken) -> tuple[StreamToken, str]:
        """The token after this one, and its text. Raises `Unauthenticated` where its credential has ended."""
        await self._keys.require_live(token.principal)
        tokens = await self.tokens()
        renewed = token.renewed(time.time(), tokens.ttl)
        return renewed, tokens.sign(renewed)

    # --- whose job it is

    async def _require_job(self, scope: Scope, principal: Principal, rule: Rule) -> None:
        job_id: str = scope["path_params"]["id"]
        prove = partial(self.require_own, principal, job_id)
        if not rule.is_stream:
            await prove()
            return
        try:
            async with asyncio.timeout(PROOF_TIMEOUT):
                await prove()
        except (StoreUnavailable, ArchiveUnavailable, TimeoutError):
            scope[PROOF] = prove

    async def require_own(self, principal: Principal, job_id: str) -> None:
        """Raise `JobNotFound` unless this job is the principal's to see; or `StoreUnavailable`."""
        if principal.job:  # of a token, which was given to somebody who may see the job
            if principal.job != job_id:
                raise JobNotFound("no such job")
            return
        if not principal.sees_all and await self._owner_of(job_id) != principal.owner:
            raise JobNotFound("no such job")

    async def require_own_patiently(self, principal: Principal, job_id: str) -> None:
        """The same, for who can wait until Redis is back."""
        await patiently(partial(self.require_own, principal, job_id))

    async def _owner_of(self, job_id: str) -> str:
        owner = self._owners.get(job_id)
        if owner is None:
            try:
                owner = (await self._hub.head(job_id)).owner
            except JobNotFound:
                owner = (await self._archived.header(job_id)).owner
            self._owners[job_id] = owner
            if len(self._owners) > _OWNERS:
                self._owners.popitem(last=False)
        return owner


class _Guard:
    """A route's app behind its rules, one for each method."""

    def __init__(self, access: Access, rules: dict[str, Rule], app: ASGIApp) -> None:
        self._access = access
        self._rules = rules
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._access.admit(scope, self._rules[scope.get("method", "GET")])
        except StreamjobsError as error:
            metrics.ACCESS.labels(_VERDICTS.get(type(error), "error")).inc()
            raise
        metrics.ACCESS.labels("admitted").inc()
        await self._app(scope, receive, send)


_VERDICTS: dict[type[StreamjobsError], str] = {
    Unauthenticated: "unauthenticated",
    Forbidden: "forbidden",
    JobNotFound: "not_found",
}
