"""What a repository's people did yesterday, as a Markdown report, every night at three.

Rule: which day it was is read from the clock once, in a step: a job that is lost and goes on after midnight
reports the same day.
"""

from __future__ import annotations

import datetime as dt
import re
from collections import Counter
from typing import Annotated
from zoneinfo import ZoneInfo

import msgspec

from examples.git import git
from examples.program import app, readable
from streamjobs import Context

TIMEZONE = "Europe/Berlin"
MOST_LISTED = 50

_STAT = re.compile(r"(\d+|-)\t(\d+|-)\t(.+)")


class Nightly(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which repository below the root, and which day (`2026-02-28`); empty for yesterday."""

    path: str = "."
    day: Annotated[str, msgspec.Meta(pattern=r"^(\d{4}-\d{2}-\d{2})?$")] = ""


class Commit(msgspec.Struct, frozen=True):
    """One commit; lines of binary files count as none."""

    id: str
    author: str
    subject: str
    files: list[str]
    added: int
    removed: int


class Summary(msgspec.Struct, frozen=True):
    """A day in figures; the report itself is the artifact of that name."""

    day: str
    commits: int
    files: int
    added: int
    removed: int
    artifact: str


@app.workflow("nightly_report")
async def nightly_report(ctx: Context, request: Nightly) -> Summary:
    """Report what was committed to a repository in one day."""
    day = request.day or await ctx.step("yesterday", yesterday)
    commits = await ctx.step("commits", commits_of, request.path, day)
    await ctx.artifact("report.md", write(day, commits), media_type="text/markdown; charset=utf-8")
    changed = {file for commit in commits for file in commit.files}
    added, removed = sum(commit.added for commit in commits), sum(commit.removed for commit in commits)
    ctx.summary = f"{day}: {len(commits)} commits, +{added} -{removed} lines in {len(changed)} files"
    return Summary(day, len(commits), len(changed), added, removed, "report.md")


app.schedule("nightly", "nightly_report", cron="0 3 * * *", timezone=TIMEZONE, input={}, missed="once")


def yesterday() -> str:
    """The day before today, in the report's time zone."""
    return (dt.datetime.now(ZoneInfo(TIMEZONE)).date() - dt.timedelta(days=1)).isoformat()


async def commits_of(path: str, day: str) -> list[Commit]:
    """What was committed between one midnight and the next, oldest first."""
    start = dt.datetime.combine(dt.date.fromisoformat(day), dt.time(), ZoneInfo(TIMEZONE))
    # a day of the clock on the wall: it has 23 or 25 hours, twice a year
    end = start + dt.timedelta(days=1, seconds=-1)
    window = (f"--since={start.isoformat()}", f"--until={end.isoformat()}")
    form = "--format=%x00%h%x01%an%x01%s"
    log = await git(readable(path), "log", *window, "--reverse", "--no-merges", "--numstat", form)
    return [read_commit(entry) for entry in log.split("\0")[1:]]


def read_commit(entry: str) -> Commit:
    """A commit as `git log --numstat` tells of it."""
    head, *lines = entry.strip().splitlines()
    commit, author, subject = head.split("\1")
    stats = [match for line in lines if (match := _STAT.fullmatch(line))]
    added, removed = (sum(int(match[side]) for match in stats if match[side] != "-") for side in (1, 2))
    return Commit(commit, author, subject, [match[3] for match in stats], added, removed)


def write(day: str, commits: list[Commit]) -> str:
    """The report, in Markdown."""
    if not commits:
        return f"# {day}\n\nNothing was committed.\n"
    people = Counter(commit.author for commit in commits)
    lines = [f"# {day}", "", "| who | commits |", "|---|--:|"]
    lines += [f"| {plain(author)} | {count} |" for author, count in people.most_common(MOST_LISTED)]
    lines += ["", *(line_of(commit) for commit in commits[:MOST_LISTED])]
    if len(commits) > MOST_LISTED:
        lines.append(f"- and {len(commits) - MOST_LISTED} more")
    return "\n".join(lines) + "\n"


def line_of(commit: Commit) -> str:
    """A commit in the report."""
    return f"- `{commit.id}` {plain(commit.subject)} (+{commit.added} -{commit.removed})"


def plain(text: str) -> str:
    """Somebody's words as Markdown that means nothing."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", text)
