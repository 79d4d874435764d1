"""Named fault points: no-ops, unless STREAMJOBS_FAULT names one.

`STREAMJOBS_FAULT=after_tool_effect` kills the process (SIGKILL) when it first passes that point,
`after_tool_effect:3` when it passes for the third time; `after_tool_effect:1:stop` sends SIGSTOP instead.
Tests run the whole program once for each name; nothing else may set it.
"""

from __future__ import annotations

import os
import signal

CHAT_POINTS = (
    "after_take",
    "after_load",
    "after_turn_started",
    "mid_turn",
    "before_turn_completed",
    "after_turn_completed",
    "before_tool_started",
    "after_tool_started",
    "after_tool_effect",
    "after_tool_completed",
    "before_append",
    "after_append",
    "before_finish",
    "after_finish",
)
"""In the order in which a chat job with a tool passes them (append: many times)."""

WORKFLOW_POINTS = (
    "after_step_started",
    "after_step_effect",
    "after_step_recorded",
    "after_artifact_stored",
    "after_approval_requested",
    "after_news_read",
    "after_timer_set",
    "after_child_submitted",
    "before_park",
    "after_park",
)
"""What a workflow passes beside those."""

DELIVERY_POINTS = ("after_told", "after_delivery")
"""Between telling owners and their webhooks, and writing down that it was done."""

SEAL_POINTS = ("before_seal", "after_seal")
"""What the snapshot projection passes."""

PROJECTOR_POINTS = ("after_notes_read", "after_advance", "before_ack")
"""What a projector passes with each batch of notes."""

WORKER_POINTS = CHAT_POINTS + WORKFLOW_POINTS
"""All that a worker passes."""

POINTS = WORKER_POINTS + SEAL_POINTS + PROJECTOR_POINTS + DELIVERY_POINTS

_ARMED = os.environ.get("STREAMJOBS_FAULT", "")
_passed = 0


def fault(name: str) -> None:
    """Die here if this is the armed point."""
    if _ARMED:
        _strike(name)


def _strike(name: str) -> None:
    global _passed  # noqa: PLW0603 - one armed point a process
    armed, _, rest = _ARMED.partition(":")
    if name != armed:
        return
    count, _, action = rest.partition(":")
    _passed += 1
    if _passed == int(count or 1):
        os.kill(os.getpid(), signal.SIGSTOP if action == "stop" else signal.SIGKILL)
