"""Review a repository's Python: each file by a step of its own, many at once; then a model sums it up.

Rule 1: the checks are plain and their own judges; the model is told findings, not asked for them.
Rule 2: everything is bounded: files, bytes of a file, findings of a file, what the model is shown.
"""

from __future__ import annotations

import ast
import asyncio
import io
import threading
import tokenize
from collections import Counter
from collections.abc import Iterator
from typing import Annotated

import msgspec

from examples.git import git
from examples.program import app, readable
from streamjobs import Context

AT_ONCE = 8
LONG = 60
MAX_BYTES = 512 * 1024
MAX_OF_A_FILE = 50
SHOWN_TO_THE_MODEL = 40

MARKS = ("TODO", "FIXME", "XXX")
SEVERITY = ["syntax", "bare-except", "long-function", "unfinished", "no-docstring"]
"""The rules, the worst first."""

PROMPT = """\
Sum up this code review for the maintainers in at most five sentences: what is worst, where it gathers, what
to do first. Say nothing that the findings do not say."""

_PARSER = threading.Lock()
"""Steps that are not async run in threads, and Python's parser counts its depth once for all of them."""

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class Review(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A git repository below the root, which of its folders, how many files, and whose words."""

    path: str = "."
    below: str = ""
    max_files: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 300
    model: str = ""


class Finding(msgspec.Struct, frozen=True):
    """Something in a file that a person should see."""

    file: str
    line: int
    rule: str
    message: str


class Report(msgspec.Struct, frozen=True):
    """The review; `left_out` files were over `max_files`."""

    files: int
    left_out: int
    counts: dict[str, int]
    findings: list[Finding]
    summary: str


@app.workflow("code_review")
async def code_review(ctx: Context, request: Review) -> Report:
    """Review the Python files of a git repository."""
    names = await ctx.step("list", list_files, request.path, request.below)
    chosen = names[: request.max_files]
    findings = await review_all(ctx, request.path, chosen)
    counts = Counter(finding.rule for finding in findings)
    ctx.log(f"{len(findings)} findings in {len(chosen)} files", data=counts)
    worst = {"files": len(chosen), "counts": counts, "worst": findings[:SHOWN_TO_THE_MODEL]}
    summary = await ctx.chat(PROMPT, data=worst, model=request.model)
    ctx.summary = summary
    return Report(len(chosen), len(names) - len(chosen), counts, findings, summary)


async def review_all(ctx: Context, path: str, names: list[str]) -> list[Finding]:
    """The findings of all files, the worst rules first."""
    places, done = asyncio.Semaphore(AT_ONCE), 0

    async def review_one(name: str) -> list[Finding]:
        nonlocal done
        async with places:
            found: list[Finding] = await ctx.step("review", review, path, name)
        done += 1
        if done % 10 == 0 or done == len(names):
            ctx.progress(90 * done / len(names), f"{done} of {len(names)} files")
        return found

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(review_one(name)) for name in names]
    findings = [finding for task in tasks for finding in task.result()]
    return sorted(findings, key=lambda one: (SEVERITY.index(one.rule), one.file, one.line))


async def list_files(path: str, below: str) -> list[str]:
    """The repository's Python files, new ones included, ignored ones not."""
    listing = ("ls-files", "-z", "--cached", "--others", "--exclude-standard", "--deduplicate")
    pattern = f":(glob){below.strip('/')}/**/*.py" if below else ":(glob)**/*.py"
    return sorted((await git(readable(path), *listing, "--", pattern)).split("\0")[:-1])


def review(path: str, name: str) -> list[Finding]:
    """What the checks say of one file."""
    found = readable(f"{path}/{name}")
    if found.stat().st_size > MAX_BYTES:
        return [Finding(name, 1, "syntax", f"over {MAX_BYTES} bytes: not read")]
    return [Finding(name, *found) for found in sorted(check(found.read_bytes()))][:MAX_OF_A_FILE]


def check(source: bytes) -> Iterator[tuple[int, str, str]]:
    """Line, rule and message of each finding in a source."""
    try:
        with _PARSER:
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        yield getattr(error, "lineno", None) or 1, "syntax", f"does not parse: {error}"[:200]
        return
    yield from _unfinished(source)
    if ast.get_docstring(tree) is None and tree.body:
        yield 1, "no-docstring", "the module has no docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield node.lineno, "bare-except", "catches everything, also cancellation"
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _too_long(node)
        elif isinstance(node, ast.Module | ast.ClassDef):
            yield from _undocumented(node)


def _too_long(node: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[tuple[int, str, str]]:
    length = (node.end_lineno or node.lineno) - node.lineno + 1
    if length > LONG:
        yield node.lineno, "long-function", f"{node.name} has {length} lines"


def _undocumented(scope: ast.Module | ast.ClassDef) -> Iterator[tuple[int, str, str]]:
    for node in scope.body:
        if not isinstance(node, Definition) or node.name.startswith("_"):
            continue
        if ast.get_docstring(node) is None:
            yield node.lineno, "no-docstring", f"{node.name} has no docstring"


def _unfinished(source: bytes) -> Iterator[tuple[int, str, str]]:
    for token in tokenize.tokenize(io.BytesIO(source).readline):
        if token.type == tokenize.COMMENT and any(mark in token.string for mark in MARKS):
            yield token.start[0], "unfinished", token.string.strip("# ")[:200]
