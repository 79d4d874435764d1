"""Children: jobs that a job submits and may wait for.

Rule 1: a child's id comes from its parent and its key, and it is submitted before `child.spawned` is
written: a run that died in between submits it again, and finds it, or finds that it has ended meanwhile.
Rule 2: the script that ends a child tells its parent; cancelling a parent cancels its children.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from streamjobs import events as ev
from streamjobs.errors import ChildFailed, Invalid
from streamjobs.events import Json, decode_raw
from streamjobs.faults import fault
from streamjobs.store import Submission
from streamjobs.store.keys import child_job_id
from streamjobs.worker.patience import patiently
from streamjobs.worker.replay import Wait
from streamjobs.worker.values import UNENCODABLE, digest, encode_clean

if TYPE_CHECKING:
    from streamjobs.worker.context import Context


class Child:
    """A job that this job submitted."""

    def __init__(self, ctx: Context, job_id: str, kind: str) -> None:
        self.job_id = job_id
        self.kind = kind
        self._ctx = ctx
        self._ended = ctx.replay.begin(("child", job_id))

    def __repr__(self) -> str:
        return f"<Child {self.kind} {self.job_id}>"

    async def result(self) -> Any:
        """Wait for its end; its result, as JSON. Raises `ChildFailed` where it failed or was cancelled."""
        told = await self._ctx.replay.wait(Wait(f"child:{self.job_id}"), self._ended)
        event: ev.ChildEnded = told.event
        if event.status == "completed":
            return await self._result_of(event)
        error = event.error
        why = f"{error.code}: {error.message}" if error else "no reason is recorded"
        raise ChildFailed(
            f"child {self.kind} {self.job_id} {event.status} ({why})",
            job_id=self.job_id,
            status=event.status,
        )

    async def _result_of(self, event: ev.ChildEnded) -> Json:
        if not event.artifact:
            return event.result
        return decode_raw(msgspec.Raw(await self._ctx.read_artifact(self.job_id, event.artifact)))

    async def cancel(self, reason: str = "") -> None:
        """Ask for its end."""
        await self._ctx.store.jobs.cancel(self.job_id, by=self._ctx.job_id, reason=reason)


async def spawn(ctx: Context, kind: str, value: object, key: str, options: dict[str, Any]) -> Child:
    """Submit a child, unless the log has it.

    Raises `Invalid`, `UnknownKind`, `UnknownQueue`, `TooDeep`, ...
    """
    try:
        encoded = encode_clean(value)
        base = f"{kind}:{key}" if key else f"{kind}:{digest(value)}"
    except UNENCODABLE as error:
        raise Invalid(f"child {kind!r}: its input is not JSON: {error}") from error
    unique = ctx.unique(base)
    child_id = child_job_id(ctx.job_id, unique)
    has_ended = ctx.replay.has_outcome(("child", child_id))
    child, op = Child(ctx, child_id, kind), ("spawn", child_id)
    told = ctx.replay.begin(op)
    if ctx.replay.has_outcome(op):
        await told
    else:
        await ctx.begin_new()
        with ctx.replay.working():
            if not has_ended:
                submission = _submission(ctx, kind, encoded, child_id, options)
                await patiently(lambda: ctx.store.jobs.submit(submission))
            fault("after_child_submitted")
            event = ev.ChildSpawned(ts=ctx.clock.now_ms(), job=child_id, key=unique, kind=kind)
            await ctx.record(op, event)
    return child


def _submission(
    ctx: Context, kind: str, encoded: bytes, child_id: str, options: dict[str, Any]
) -> Submission:
    ctx.app.check_submission(kind, encoded)
    workflow = ctx.app.workflows.get(kind)
    chosen: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if workflow is not None:
        declared = {
            "queue": workflow.queue,
            "timeout": workflow.timeout,
            "max_attempts": workflow.max_attempts,
        }
        chosen = {name: value for name, value in declared.items() if value is not None} | chosen
    queues = ctx.settings.queues
    chosen = {"queue": "default" if "default" in queues else queues[0]} | chosen
    return Submission(kind=kind, owner=ctx.owner, input=encoded, job_id=child_id, parent=ctx.job_id, **chosen)
