"""Clone a git repository: progress while it runs, and never a half clone that looks like a whole one.

Rule 1: a folder of the final name is whole: git works in a hidden sibling that is renamed at the end.
Rule 2: whoever clones removes what an earlier attempt of the same job has left.
Rule 3: the URL comes from a stranger: it is no option, no password, and of a scheme that is allowed here.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import shutil
from asyncio import StreamReader
from collections import deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import msgspec

from examples.git import git, require_success, running
from examples.program import app, output
from streamjobs import Context, Retry

PHASES = {
    "remote: Counting objects": (0, 2),
    "remote: Compressing objects": (2, 5),
    "Receiving objects": (5, 80),
    "Resolving deltas": (80, 95),
    "Updating files": (95, 100),
}
"""What git says it does, and where that is on the way, in percent."""

_PROGRESS = re.compile(rf"({'|'.join(PHASES)}):\s+(\d{{1,3}})%", re.ASCII)
_BRANCH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]*", re.ASCII)

Tell = Callable[[float, str], None]
"""Takes percent and a message."""


def schemes() -> list[str]:
    """The URL schemes that may be cloned: https, unless EXAMPLES_CLONE_SCHEMES says otherwise."""
    return os.environ.get("EXAMPLES_CLONE_SCHEMES", "https").split(",")


class Clone(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to clone: a URL, and if it is not to be the default one, a branch or tag."""

    url: Annotated[str, msgspec.Meta(max_length=2000)]
    branch: Annotated[str, msgspec.Meta(max_length=200)] = ""

    def __post_init__(self) -> None:
        url = urlsplit(self.url)
        if url.scheme not in schemes() or not url.path.strip("/"):
            raise ValueError(f"`url` must be a repository's, of {' or '.join(schemes())}")
        if "@" in url.netloc:
            raise ValueError("`url` must not hold a name or password: the job's log keeps it")
        if self.branch and not _BRANCH.fullmatch(self.branch):
            raise ValueError("`branch` is not the name of one")

    @property
    def name(self) -> str:
        """The repository's name, fit for a folder."""
        last = urlsplit(self.url).path.rstrip("/").rpartition("/")[2].removesuffix(".git")
        return re.sub(r"[^A-Za-z0-9_-]", "_", last)[:60]


class Cloned(msgspec.Struct, frozen=True):
    """Where the clone is, and what is in it."""

    path: str
    commit: str
    files: int
    bytes: int


@app.workflow("clone_repo", timeout=3600.0)
async def clone_repo(ctx: Context, request: Clone) -> Cloned:
    """Clone a git repository."""
    target = output("clones", f"{request.name}-{ctx.job_id}")
    await ctx.step("clone", clone, request, target, ctx.progress, key=request.url, retry=Retry(base=2.0))
    cloned = await ctx.step("inspect", inspect, str(target))
    ctx.summary = f"{cloned.files} files, {cloned.bytes:,} bytes at {cloned.commit[:12]}"
    return cloned


async def clone(request: Clone, target: Path, tell: Tell) -> None:
    """Clone to `target`; cancelled or failed, nothing is left of it."""
    if await asyncio.to_thread(is_there, target):
        return  # an earlier run did this, and was lost before it could say so
    half = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        await _run(request, half, tell)
        half.rename(target)
    finally:
        await asyncio.to_thread(remove, half)


def is_there(target: Path) -> bool:
    """Whether the whole clone is; what attempts that were killed have left beside it goes."""
    for leftover in target.parent.glob(f".{target.name}.*"):
        remove(leftover)
    return target.exists()


def remove(folder: Path) -> None:
    """Remove a folder, if it is there; a git whose worker is gone may be removing it as well."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder, onerror=_unless_gone)


def _unless_gone(_function: object, _path: object, error: Any) -> None:
    if not issubclass(error[0], FileNotFoundError):
        raise error[1]


async def _run(request: Clone, folder: Path, tell: Tell) -> None:
    branch = [f"--branch={request.branch}"] if request.branch else []
    allowed = {"GIT_ALLOW_PROTOCOL": ":".join(schemes())}  # where the server redirects to, as well
    command = ("clone", "--progress", *branch, "--", request.url, str(folder))
    async with running(*command, env=allowed) as process:
        assert process.stderr is not None
        said = await _follow(process.stderr, tell)
        await process.wait()
    require_success(process, said)


async def _follow(stream: StreamReader, tell: Tell) -> str:
    """Pass on what git says of its progress, a whole percent at a time; returns its last words."""
    told, last_words = -1, deque[str](maxlen=5)
    async for line in _lines(stream):
        match = _PROGRESS.search(line)
        if match is None:
            last_words.extend([line] if line.strip() else [])
            continue
        start, end = PHASES[match[1]]
        percent = start + (end - start) * int(match[2]) // 100
        if percent > told:
            told = percent
            tell(percent, match[1].removeprefix("remote: ").lower())
    return "\n".join(last_words)


async def _lines(stream: StreamReader) -> AsyncIterator[str]:
    """Lines as a terminal shows them: git writes over its progress with a carriage return."""
    rest = b""
    while piece := await stream.read(4096):
        *lines, rest = re.split(rb"[\r\n]", rest + piece)
        for line in lines:
            yield line.decode(errors="replace")
    yield rest.decode(errors="replace")


async def inspect(folder: str) -> Cloned:
    """What was cloned."""
    path = Path(folder)
    commit = (await git(path, "rev-parse", "--verify", "HEAD")).strip()
    names = (await git(path, "ls-files", "-z")).split("\0")[:-1]
    size = await asyncio.to_thread(lambda: sum((path / name).lstat().st_size for name in names))
    return Cloned(folder, commit, len(names), size)
