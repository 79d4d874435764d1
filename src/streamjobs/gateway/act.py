"""Act on a job: cancel, signal, approve, pause, resume, run again, delete.

Rule 1: each may be sent again: cancel by its nature, the others with a key (a signal's own `key`, the
`Idempotency-Key` of the rest). A repeat does nothing and says so.
Rule 2: a job that has ended takes nothing more: 409 `job_ended`, and `job_status` says how it ended. Only
then it may be run again, as another job, or be deleted.
Rule 3: in the log a decision has one form, whatever form was sent; what decides nothing is refused here,
where somebody can still correct it.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from streamjobs.approvals import APPROVAL, canonical
from streamjobs.config import Settings
from streamjobs.errors import JobNotFound
from streamjobs.events import Json, encode_json
from streamjobs.gateway.answers import accepted, answer, links
from streamjobs.gateway.archived import Archived
from streamjobs.gateway.body import decode_body, fields_of, read_body
from streamjobs.gateway.limits import require_size
from streamjobs.gateway.requests import Label, Reason, idempotency_key, owner_of
from streamjobs.gateway.snapshots import Snapshots
from streamjobs.job import ApprovalView
from streamjobs.store import Store


class ReasonRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of cancel, pause and resume, which may be absent."""

    reason: Reason = ""


class SignalRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A signal's body; a `key` makes it safe to send again."""

    name: Annotated[Label, msgspec.Meta(min_length=1)]
    payload: Json = None
    key: Label = ""


class _Requests(msgspec.Struct):
    """The requests for approval in a job's view."""

    approvals: list[ApprovalView] = []


class ActRoutes:
    """The routes that change single jobs."""

    def __init__(self, store: Store, snapshots: Snapshots, archived: Archived, settings: Settings) -> None:
        self._store = store
        self._archived = archived
        self._snapshots = snapshots
        self._settings = settings

    def routes(self) -> list[Route]:
        """What a router needs."""
        job = "/v1/jobs/{id}"
        return [
            Route(f"{job}/cancel", self.cancel, methods=["POST"]),
            Route(f"{job}/signal", self.signal, methods=["POST"]),
            Route(f"{job}/pause", self.pause, methods=["POST"]),
            Route(f"{job}/resume", self.resume, methods=["POST"]),
            Route(f"{job}/rerun", self.rerun, methods=["POST"]),
            Route(job, self.delete, methods=["DELETE"]),
        ]

    async def cancel(self, request: Request) -> Response:
        """Ask for a job's end. The answer is the same however often that is asked; the log says the rest."""
        job_id: str = request.path_params["id"]
        reason = await self._reason(request)
        await self._store.jobs.cancel(job_id, by=owner_of(request), reason=reason)
        return answer({"id": job_id, "cancel_requested": True, "links": links(job_id)})

    async def signal(self, request: Request) -> Response:
        """Send a live job a value; `repeated` where its key had come before, and nothing was done."""
        job_id: str = request.path_params["id"]
        asked = fields_of(decode_body(await self._body(request), self._settings), SignalRequest)
        name, payload = asked.name, asked.payload
        require_size("payload", len(encode_json(payload)), self._settings.max_signal)
        # without a request a signal `approval` is the workflow's own: its payload is not ours to judge
        if name != APPROVAL or await self._asks_a_person(job_id):
            name, payload = canonical(name, payload)
        is_new = await self._store.jobs.signal(job_id, name, payload, key=asked.key, by=owner_of(request))
        return answer({"id": job_id, "signal": name, "repeated": not is_new})

    async def _asks_a_person(self, job_id: str) -> bool:
        snapshot = await self._snapshots.latest(job_id)
        view = msgspec.json.decode(snapshot.view, type=_Requests)
        return any(approval.state == "pending" for approval in view.approvals)

    async def pause(self, request: Request) -> Response:
        """Park a job: `paused`, or `requested` where it runs, which ends at its next recorded point."""
        job_id: str = request.path_params["id"]
        reason, key = await self._reason(request), _key_of("pause", request)
        status = await self._store.jobs.pause(job_id, by=owner_of(request), reason=reason, key=key)
        is_repeated = status == "dup"
        if is_repeated:
            is_parked = (await self._store.jobs.get(job_id)).status == "paused"
            status = "paused" if is_parked else "requested"
        return answer({"id": job_id, "status": status, "repeated": is_repeated, "links": links(job_id)})

    async def resume(self, request: Request) -> Response:
        """Let a paused job go on: `resumed`, or the status of one that is not paused."""
        job_id: str = request.path_params["id"]
        reason, key = await self._reason(request), _key_of("resume", request)
        status = await self._store.jobs.resume(job_id, by=owner_of(request), reason=reason, key=key)
        is_repeated = status == "dup"
        status = "resumed" if is_repeated else status
        return answer({"id": job_id, "status": status, "repeated": is_repeated, "links": links(job_id)})

    async def rerun(self, request: Request) -> Response:
        """Submit an ended job again, as a new one: 202 as for a submission, and `rerun_of`."""
        job_id: str = request.path_params["id"]
        receipt = await self._store.jobs.rerun(job_id, key=idempotency_key(request), by=owner_of(request))
        headers = {"Location": f"/v1/jobs/{receipt.job_id}"}
        if receipt.repeated:
            headers["Idempotent-Replayed"] = "true"
        made = await self._store.jobs.get(receipt.job_id)
        return accepted(made.job_id, made.kind, made.status, made.last, headers, rerun_of=job_id)

    async def delete(self, request: Request) -> Response:
        """Forget an ended job, and everything of it, now; its file in the archive too."""
        job_id: str = request.path_params["id"]
        try:
            await self._store.retention.delete(job_id)
        except JobNotFound:
            # first of all: a file that cannot be removed now cannot be read any more
            was_shredded = self._store.vault is not None and await self._store.vault.shred(job_id)
            if not await self._archived.remove(job_id) and not was_shredded:
                raise
        else:
            await self._archived.remove(job_id)
        return answer({"id": job_id, "deleted": True})

    async def _reason(self, request: Request) -> str:
        body = await self._body(request)
        return fields_of(decode_body(body, self._settings), ReasonRequest).reason if body else ""

    async def _body(self, request: Request) -> bytes:
        return await read_body(request.scope, request.receive, self._settings)


def _key_of(act: str, request: Request) -> str:
    """The request's key in a space of its own: a job keeps the keys of all acts together.

    No signal's key holds a control character.
    """
    key = idempotency_key(request)
    return f"{act}\x1f{key}" if key else ""
