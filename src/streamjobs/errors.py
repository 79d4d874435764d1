"""Every deliberate error: its code, its HTTP status, and whether trying again can help.

Rule 1: the class tells the caller what to do; the message tells a person what happened.
Rule 2: `code` is stable, clients may branch on it; the message is not.
"""

# ruff: noqa: N818 - a class is named after what happened: `except JobNotFound` reads as it should

from __future__ import annotations

from typing import ClassVar


class StreamjobsError(Exception):
    """Base of every error raised on purpose."""

    code: ClassVar[str] = "internal"
    http_status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False


class BadRequest(StreamjobsError):
    """The request cannot be understood. Correct it; the same request fails again."""

    code, http_status = "bad_request", 400


class InvalidCursor(BadRequest):
    """A cursor that is not `<seq>-<epoch>`."""

    code = "invalid_cursor"


class Invalid(StreamjobsError):
    """The request is well-formed and names a field that does not fit."""

    code, http_status = "invalid", 422


class InputTooLarge(Invalid):
    """A field holds more than it may. Send less."""

    code = "input_too_large"


class UnknownKind(Invalid):
    """No workflow of that name is registered."""

    code = "unknown_kind"


class UnknownQueue(Invalid):
    """The queue is not declared."""

    code = "unknown_queue"


class UnknownTool(Invalid):
    """No tool of that name is registered."""

    code = "unknown_tool"


class UnknownAgent(Invalid):
    """No agent of that name is registered."""

    code = "unknown_agent"


class IdempotencyMismatch(Invalid):
    """The Idempotency-Key was used before with another body."""

    code = "idempotency_mismatch"


class JobNotFound(StreamjobsError):
    """No such job: never submitted, or its retention has passed."""

    code, http_status = "not_found", 404


class Unauthenticated(StreamjobsError):
    """Nobody is known to have sent this: no credential, or one that is not good (any more)."""

    code, http_status = "unauthenticated", 401


class Forbidden(StreamjobsError):
    """Who asks is known, and may not do this."""

    code, http_status = "forbidden", 403


class ForeignOrigin(StreamjobsError):
    """A page of another site asks for what only our own pages, and configured ones, may do."""

    code, http_status = "foreign_origin", 403


class IdentityUnavailable(StreamjobsError):
    """The keys that tokens are checked with cannot be fetched. Try again."""

    code, http_status, retryable = "identity_unavailable", 503, True


class KeyNotFound(StreamjobsError):
    """No API key has this id."""

    code, http_status = "not_found", 404


class TooManyKeys(Invalid):
    """There are as many API keys as there may be."""

    code = "too_many_keys"


class Shredded(JobNotFound):
    """The job's data key was deleted: nothing of what it was given or made can be read again, by anybody."""

    code, http_status = "shredded", 410


class ScheduleNotFound(StreamjobsError):
    """No such schedule: never made, deleted, or somebody else's."""

    code, http_status = "not_found", 404


class WebhookNotFound(StreamjobsError):
    """No such webhook: never made, deleted, or somebody else's."""

    code, http_status = "not_found", 404


class ProjectionNotFound(StreamjobsError):
    """No projection has this name, or none ever ran."""

    code, http_status = "not_found", 404


class TooManyWebhooks(Invalid):
    """The owner has as many webhooks as there may be."""

    code = "too_many_webhooks"


class RefusedTarget(Invalid):
    """An address outside that requests of strangers' making must not go to. Nothing was sent."""

    code = "refused_target"


class ResponseTooLarge(StreamjobsError):
    """What another server answered is over the cap. Ask it for less."""

    code, http_status = "response_too_large", 502


class UnreadableSchedule(StreamjobsError):
    """A schedule that another release wrote, and that this one cannot read. Leave it alone."""

    code = "unreadable_schedule"


class TooManySchedules(Invalid):
    """The owner has as many schedules as there may be."""

    code = "too_many_schedules"


class TickTaken(StreamjobsError):
    """The tick has its job already, or the schedule was paused or deleted. Nothing is left to do."""

    code, http_status = "tick_taken", 409


class Overlapping(StreamjobsError):
    """The job of an earlier tick is live, and the schedule wants one at a time. This tick gives none."""

    code, http_status = "overlapping", 409


class ArtifactNotFound(JobNotFound):
    """The job is there and has no artifact of that name."""

    code = "artifact_not_found"


class JobEnded(StreamjobsError):
    """The job has ended, as `state` says; what was asked for needs a live one."""

    code, http_status = "job_ended", 409

    def __init__(self, message: str, *, state: str = "") -> None:
        super().__init__(message)
        self.state = state


class JobNotEnded(StreamjobsError):
    """The job has not ended; what was asked for needs an ended one."""

    code, http_status = "job_not_ended", 409


class TooDeep(Invalid):
    """The job is a child of a child of a child …, deeper than `max_depth` allows."""

    code = "too_deep"


class TooManyChildren(Invalid):
    """The job has as many children as `max_children` allows."""

    code = "too_many_children"


class CursorNotFound(StreamjobsError):
    """The cursor is not in the job's log (any more). Start over, without one."""

    code, http_status = "cursor_not_found", 409


class AlreadySubscribed(StreamjobsError):
    """The connection has a subscription to this job. Unsubscribe first to begin it anew."""

    code, http_status = "already_subscribed", 409


class NotSubscribed(StreamjobsError):
    """The connection has no subscription to this job (any more). Nothing is left to do."""

    code, http_status = "not_subscribed", 409


class TooManySubscriptions(Invalid):
    """The connection has as many subscriptions as there may be."""

    code = "too_many_subscriptions"


class TooManyStreams(StreamjobsError):
    """The owner holds as many streams open as they may. Close one, or try again later."""

    code, http_status, retryable = "too_many_streams", 429, True


class TooManyWaiting(StreamjobsError):
    """As many of the owner's jobs wait as may. Try again when some have started."""

    code, http_status, retryable = "too_many_waiting", 429, True


class TooManyMessages(StreamjobsError):
    """The connection sends faster than it may, and is closed."""

    code, http_status, retryable = "too_many_messages", 429, True


class TooLarge(StreamjobsError):
    """The body is over the limit."""

    code, http_status = "too_large", 413


class TooManyItems(StreamjobsError):
    """The body is JSON of more values than there may be."""

    code, http_status = "too_many_items", 413


class Compressed(StreamjobsError):
    """The body is compressed. Send it as it is."""

    code, http_status = "unsupported_encoding", 415


class HeadTooLarge(StreamjobsError):
    """The head of the request, or what frames its body, is over a limit."""

    code, http_status = "head_too_large", 431


class UrlTooLong(StreamjobsError):
    """The request's URL is over the limit."""

    code, http_status = "url_too_long", 414


class TooSlow(StreamjobsError):
    """The body did not arrive in time. Try again."""

    code, http_status, retryable = "too_slow", 408, True


class ArchiveUnavailable(StreamjobsError):
    """The place where archived jobs are does not answer, or refuses. Try again later."""

    code, http_status, retryable = "archive_unavailable", 503, True


class StoreUnavailable(StreamjobsError):
    """Redis cannot be reached now. Try again."""

    code, http_status, retryable = "store_unavailable", 503, True


class MissingPermission(StoreUnavailable):
    """Redis does not let our user run a command, or reach a key or channel. Its ACL must be repaired."""

    code = "missing_permission"


class StoreFull(StreamjobsError):
    """Redis is at its memory limit: running jobs may end, new ones are refused. Try again later."""

    code, http_status, retryable = "store_full", 503, True


class ConfigError(StreamjobsError):
    """A setting is unknown, or its value does not fit."""

    code = "config"


class EncryptionKeyMissing(StreamjobsError):
    """A job's data key was wrapped by a master key that this process does not have. Give it that key."""

    code, http_status = "encryption_key_missing", 503


class DamagedCiphertext(StreamjobsError):
    """What was encrypted does not open: it was changed, or stands in a place that it was not written for."""

    code = "damaged_ciphertext"


class Fenced(StreamjobsError):
    """Another worker holds the lease, or nobody does. Stop; do not retry."""

    code, http_status = "fenced", 409


class LimitExceeded(StreamjobsError):
    """The job is over one of its budgets (events or bytes)."""

    code, http_status = "limit_exceeded", 409


class JobTimeout(StreamjobsError):
    """The job ran longer than its timeout."""

    code, http_status = "timeout", 504


class Permanent(StreamjobsError):
    """Raise it in a workflow or a step: another attempt cannot help."""

    code, http_status = "permanent", 422


class StepError(StreamjobsError):
    """A step or a tool of a workflow failed for good; `info` is what the log says of it."""

    code, http_status = "step_failed", 422

    def __init__(self, message: str, *, step_code: str = "", is_retryable: bool = True) -> None:
        super().__init__(message)
        self.step_code = step_code
        self.is_retryable = is_retryable


class OutcomeUnknown(StreamjobsError):
    """A `once` step or tool was started and never recorded: it may or may not have taken effect."""

    code, http_status = "unknown_outcome", 409


class Denied(StreamjobsError):
    """Somebody denied what needed an approval; the message has the comment."""

    code, http_status = "denied", 403


class WaitTimeout(StreamjobsError, TimeoutError):
    """Nobody sent what a workflow waited for in time."""

    code, http_status = "wait_timeout", 504


class HeartbeatTimeout(StreamjobsError):
    """The job's code gave no sign of life for longer than its `heartbeat_timeout`."""

    code, http_status, retryable = "heartbeat_timeout", 504, True


class StepTimeout(StreamjobsError, TimeoutError):
    """A step ran longer than its timeout."""

    code, http_status, retryable = "step_timeout", 504, True


class ChildFailed(StreamjobsError):
    """A child job failed or was cancelled; `status` says which."""

    code, http_status = "child_failed", 422

    def __init__(self, message: str, *, job_id: str = "", status: str = "") -> None:
        super().__init__(message)
        self.job_id = job_id
        self.status = status


class WorkflowChanged(StreamjobsError):
    """The workflow's code no longer asks for what its log holds: it was changed while the job lived."""

    code, http_status = "workflow_changed", 409


class ProviderError(StreamjobsError):
    """A model provider failed. `retry_after` is its own wish, in seconds, where it said one."""

    code, http_status = "provider_error", 502

    def __init__(
        self,
        message: str,
        *,
        retryable: bool = False,
        retry_after: float | None = None,
        status: int | None = None,
    ) -> None:
        super().__init__(message)
        self.is_retryable = retryable
        self.retry_after = retry_after
        self.status = status


class ToolError(StreamjobsError):
    """A tool refuses its call; the message is what the model is told."""

    code, http_status = "tool_error", 422
