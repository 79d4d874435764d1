"""Every example in one program: `streamjobs dev examples.app:app`."""

from __future__ import annotations

from examples import clone_repo, code_review, import_transcript, nightly_report, research_agent
from examples.program import app

__all__ = ["app", "clone_repo", "code_review", "import_transcript", "nightly_report", "research_agent"]
