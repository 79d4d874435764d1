"""Submit a job.

Rule 1: a submission is answered once it is in the log. With an `Idempotency-Key` it may be sent again:
the same body gets the same job and `Idempotent-Replayed: true`, another body 422.
Rule 2: waiting is watching: no polling, and a drain ends it early.
Rule 3: what only the engine may say (a parent, a schedule) is no field of a submission.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Literal, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from streamjobs.app import CHAT
from streamjobs.config import Settings
from streamjobs.errors import Invalid
from streamjobs.events import Json, encode_json
from streamjobs.gateway.answers import accepted, viewed
from streamjobs.gateway.body import decode_body, fields_of, read_body
from streamjobs.gateway.hub import Hub
from streamjobs.gateway.limits import require_short_chat, require_sizes
from streamjobs.gateway.requests import Label, Seconds, idempotency_key, owner_of, preferred_wait
from streamjobs.store import Store, Submission
from streamjobs.tool import Tool
from streamjobs.workflow import Workflow

MAX_METADATA = 64
"""Members of `metadata`."""

_NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")


class JobRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A submission's body. `delay` in seconds; `run_at` is RFC 3339 with an offset; not both."""

    kind: Label
    input: Json = None
    queue: Label | None = None
    priority: Literal["high", "default", "low"] = "default"
    thread_id: Label = ""
    message_id: Label = ""
    metadata: Annotated[dict[Label, Json], msgspec.Meta(max_length=MAX_METADATA)] = {}
    delay: Seconds | None = None
    run_at: Annotated[datetime, msgspec.Meta(tz=True)] | None = None
    start_timeout: Seconds = 0.0
    timeout: Seconds | None = None
    max_attempts: Annotated[int, msgspec.Meta(ge=1, le=100)] | None = None
    concurrency_key: Label = ""

    def delay_from(self, now: float) -> float:
        """Seconds until it may start, by this machine's clock where an instant was given."""
        if self.run_at is None:
            return self.delay or 0.0
        return max(0.0, self.run_at.timestamp() - now)


class Registry(Protocol):
    """What may be submitted; `App` is one."""

    def check_submission(self, kind: str, raw_input: bytes | msgspec.Raw) -> None:
        """Refuse what could not run, as `App.check_submission`."""
        ...

    @property
    def workflows(self) -> Mapping[str, Workflow]:
        """The program's own workflows by kind."""
        ...

    @property
    def tools(self) -> Mapping[str, Tool]:
        """The program's tools by name."""
        ...


class JobRoutes:
    """The route that takes jobs."""

    def __init__(self, store: Store, hub: Hub, registry: Registry, settings: Settings) -> None:
        self._store = store
        self._hub = hub
        self._registry = registry
        self._settings = settings

    def routes(self) -> list[Route]:
        """What a router needs."""
        return [Route("/v1/jobs", self.submit, methods=["POST"])]

    async def submit(self, request: Request) -> Response:
        """Take a job: 202, or with `Prefer: wait=N` 200 and the view if it ends in time."""
        key = idempotency_key(request)
        body = await read_body(request.scope, request.receive, self._settings)
        asked = fields_of(decode_body(body, self._settings), JobRequest)
        submission = self._submission(asked, owner_of(request), key, body)
        del asked  # decoded, it takes many times what its text does
        receipt = await self._store.jobs.submit(submission)
        headers = {"Location": f"/v1/jobs/{receipt.job_id}"}
        if key and receipt.repeated:
            headers["Idempotent-Replayed"] = "true"
        wait = preferred_wait(request)
        if wait is None and not receipt.repeated:
            status = "scheduled" if submission.delay > 0 else "queued"
            return accepted(receipt.job_id, submission.kind, status, receipt.cursor, headers)
        if wait is not None:
            seconds = min(wait, self._settings.max_wait)
            headers["Preference-Applied"] = f"wait={seconds:.0f}"
            if await self._hub.wait_for(receipt.job_id, seconds):
                return viewed(await self._hub.snapshots.latest(receipt.job_id), headers)
        record = await self._store.jobs.get(receipt.job_id)
        return accepted(record.job_id, record.kind, record.status, record.last, headers)

    def _submission(self, asked: JobRequest, owner: str, key: str, body: bytes) -> Submission:
        if asked.delay is not None and asked.run_at is not None:
            raise Invalid("run_at: not together with delay")
        raw_input = without_nul("input", asked.input)
        without_nul("metadata", asked.metadata)
        require_sizes(self._settings, raw_input, asked.metadata)
        self._registry.check_submission(asked.kind, raw_input)
        if asked.kind == CHAT:
            require_short_chat(self._settings, asked.input)
        workflow = self._registry.workflows.get(asked.kind)
        return Submission(
            kind=asked.kind,
            owner=owner,
            input=raw_input,
            queue=asked.queue or (workflow and workflow.queue) or self._default_queue(),
            priority=asked.priority,
            thread_id=asked.thread_id,
            message_id=asked.message_id,
            metadata=asked.metadata,
            delay=asked.delay_from(time.time()),
            start_timeout=asked.start_timeout,
            timeout=asked.timeout if asked.timeout is not None else workflow and workflow.timeout,
            max_attempts=asked.max_attempts or (workflow and workflow.max_attempts) or 0,
            concurrency_key=asked.concurrency_key,
            idempotency_key=key,
            body=body,
        )

    def _default_queue(self) -> str:
        queues = self._settings.queues
        return "default" if "default" in queues else queues[0]


def without_nul(field: str, value: Json) -> bytes:
    """Encode a value; NUL, which ends strings in too many places behind us, is refused wherever it stands."""
    encoded = encode_json(value)
    if b"\\u0000" in encoded and _NUL.search(encoded):
        raise Invalid(f"{field}: a string holds NUL")
    return encoded
