"""Files of archived jobs: what they hold, that they are whole, and where they may be."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import pytest
import zstandard

from streamjobs import targets
from streamjobs.archive import Archive, DamagedArchive, Header, name_of
from streamjobs.cursor import START, Cursor
from streamjobs.errors import ArchiveUnavailable, ConfigError, JobNotFound, StreamjobsError
from streamjobs.segments import Entry
from streamjobs.targets import Folder, target_of
from tests.conftest import wait_until

JOB = "j0-" + "ab" * 13
ENTRIES = [
    Entry(Cursor(n, 1000 + n // 4), "x.said", b'{"ts":%d,"text":"w\xc3\xb6rd %d"}' % (n, n))
    for n in range(1, 41)
]


def header_of(entries: list[Entry], job_id: str = JOB) -> Header:
    return Header(job_id, "anna", "chat", "completed", 5, 9, len(entries), str(entries[-1].cursor))


async def pages_of(entries: list[Entry], size: int = 7) -> AsyncIterator[list[Entry]]:
    for start in range(0, len(entries), size):
        yield entries[start : start + size]


async def read(archive: Archive, after: Cursor = START, limit: int = 9) -> list[Entry]:
    async with archive.reading(JOB) as reading:
        assert await reading.seek(after)
        found: list[Entry] = []
        while page := await reading.page(limit):
            assert len(page) <= limit
            found += page
        return found


@pytest.fixture(params=["folder", "file", "memory"])
def archive(request: pytest.FixtureRequest, tmp_path: Path) -> Archive:
    url = {
        "folder": str(tmp_path / "a b"),
        "file": (tmp_path / "a b").as_uri(),
        "memory": f"memory://{uuid4().hex}/jobs",
    }[request.param]
    made = Archive.of(url, 10.0)
    assert made is not None
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Archive:
    return Archive(Folder(tmp_path), 10.0)


def files_of(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


async def test_what_was_written_is_read(archive: Archive):
    """The only copy of a job that is left would lack events, or have others."""
    await archive.write(header_of(ENTRIES), pages_of(ENTRIES))
    await archive.write(header_of(ENTRIES), pages_of(ENTRIES, 3))
    assert await read(archive) == ENTRIES
    async with archive.reading(JOB) as reading:
        assert reading.header == header_of(ENTRIES)
        assert len(await reading.page(max_bytes=100)) < 10
    for seq in (1, 4, 39, 40):
        assert await read(archive, ENTRIES[seq - 1].cursor) == ENTRIES[seq:]
    for cursor in (Cursor(4, 7), Cursor(41, 1010), Cursor(0, 7)):
        async with archive.reading(JOB) as reading:
            assert not await reading.seek(cursor)


async def test_removed_means_gone(archive: Archive):
    """A job that somebody must forget would stay."""
    assert not await archive.remove(JOB)
    await archive.write(header_of(ENTRIES), pages_of(ENTRIES))
    assert await archive.remove(JOB)
    assert not await archive.remove(JOB)
    with pytest.raises(JobNotFound):
        await read(archive)


async def test_a_file_is_json_lines_that_any_tool_reads(folder: Archive, tmp_path: Path):
    """In ten years nobody has our program at hand."""
    await folder.write(header_of(ENTRIES), pages_of(ENTRIES))
    (path,) = files_of(tmp_path)
    assert path.relative_to(tmp_path).as_posix() == f"ab/{JOB}.jsonl.zst"
    with zstandard.open(path, "rt", encoding="utf-8") as file:
        head, *lines = [json.loads(line) for line in file]
    assert head == {
        "id": JOB, "owner": "anna", "kind": "chat", "status": "completed", "created_ms": 5, "ended_ms": 9,
        "events": 40, "last": "40-1010", "format": 1,
    }  # fmt: skip
    assert lines[3] == {"id": "4-1001", "type": "x.said", "data": {"ts": 4, "text": "wörd 4"}}


@pytest.mark.parametrize("wrong", [ENTRIES[:-1], ENTRIES[:5] + ENTRIES[6:], [*ENTRIES, *ENTRIES]])
async def test_a_log_that_is_not_whole_gives_no_file(folder: Archive, tmp_path: Path, wrong: list[Entry]):
    """A damaged log would be archived as if it were all there was, and the original would go."""
    with pytest.raises(StreamjobsError):
        await folder.write(header_of(ENTRIES), pages_of(wrong))
    assert list(files_of(tmp_path)) == []


async def test_a_writer_that_dies_leaves_what_was_there(folder: Archive, tmp_path: Path):
    """A half-written file would stand in for the whole one; or its pieces would fill the disk."""
    await folder.write(header_of(ENTRIES), pages_of(ENTRIES))

    async def breaking() -> AsyncIterator[list[Entry]]:
        yield ENTRIES[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await folder.write(header_of(ENTRIES), breaking())
    assert len(list(files_of(tmp_path))) == 1
    (tmp_path / "ab" / f".{JOB}.jsonl.zst.killed").write_bytes(b"left by kill -9")
    await folder.write(header_of(ENTRIES), pages_of(ENTRIES))
    assert len(list(files_of(tmp_path))) == 1
    assert await read(folder) == ENTRIES


def damage(how: str, content: bytes) -> bytes:
    lines = zstandard.ZstdDecompressor().decompressobj().decompress(content).splitlines(keepends=True)
    match how:
        case "cut":
            return content[: len(content) // 2]
        case "bit":
            return content[:-40] + bytes([content[-40] ^ 1]) + content[-39:]
        case "empty":
            return b""
        case "less":
            lines = lines[:-1]
        case "more":
            lines = [*lines, lines[-1]]
        case "swapped":
            lines[3], lines[4] = lines[4], lines[3]
        case "another":
            lines[0] = lines[0].replace(b"j0-abab", b"j0-abaa")
        case "newer":
            lines[0] = lines[0].replace(b'"format":1', b'"format":2')
        case "end":
            lines[-1] = lines[-1].replace(b"40-1010", b"40-1011")
        case _:
            lines[2] = b"what?\n"
    return zstandard.ZstdCompressor().compress(b"".join(lines))


@pytest.mark.parametrize(
    "how", ["cut", "bit", "empty", "less", "more", "swapped", "another", "newer", "end", "garbage"]
)
async def test_damage_is_found(folder: Archive, tmp_path: Path, how: str):
    """A shorter or a changed history would be shown as the true one."""
    await folder.write(header_of(ENTRIES), pages_of(ENTRIES))
    path = tmp_path / name_of(JOB)
    path.write_bytes(damage(how, path.read_bytes()))
    with pytest.raises(DamagedArchive):
        await read(folder)


class Broken(Folder):
    """Loses the second half of what it is given."""

    def commit(self, staged: Path, name: str) -> None:
        content = staged.read_bytes()
        staged.write_bytes(content[: len(content) // 2])
        super().commit(staged, name)


@pytest.mark.parametrize("cancels", [1, 2])
async def test_who_is_cancelled_leaves_no_file_open(folder: Archive, tmp_path: Path, cancels: int):
    """A projector that stops would keep files open, and what it had begun would fill the disk."""

    async def stopped(work: Coroutine[Any, Any, Any], after: int) -> None:
        task = asyncio.ensure_future(work)
        for pause in (after, *[1] * (cancels - 1)):
            for _ in range(pause):
                await asyncio.sleep(0.0002)
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    def opened() -> list[str]:
        held = (os.path.realpath(link) for link in Path("/proc/self/fd").iterdir())
        return [path for path in held if path.startswith(str(tmp_path))]

    for after in range(40):
        await stopped(folder.write(header_of(ENTRIES), pages_of(ENTRIES, 2)), after)
        await wait_until(lambda: not opened() and not list(tmp_path.rglob(".*")))
    await folder.write(header_of(ENTRIES), pages_of(ENTRIES))
    for after in range(20):
        await stopped(read(folder, limit=2), after)
        await wait_until(lambda: not opened())
    assert await read(folder) == ENTRIES


async def test_two_who_write_the_same_job_both_succeed(tmp_path: Path):
    """Two projectors meet at one job: the second one would set it aside as a failure."""
    folder = Folder(tmp_path)
    first, second = folder.stage("ab/job"), folder.stage("ab/job")
    for staged in (first, second):
        staged.write_bytes(b"the same")
        folder.commit(staged, "ab/job")
    assert [path.name for path in files_of(tmp_path)] == ["job"]
    gone = folder.stage("ab/other")
    gone.unlink()
    with pytest.raises(ArchiveUnavailable):
        folder.commit(gone, "ab/other")


async def test_what_was_written_is_read_back(tmp_path: Path):
    """A disk that lies would be believed, and the job in Redis let go."""
    with pytest.raises(DamagedArchive):
        await Archive(Broken(tmp_path), 10.0).write(header_of(ENTRIES), pages_of(ENTRIES))


async def test_a_place_that_refuses_says_so_without_its_address(tmp_path: Path):
    """A full or absent disk would be a traceback; an address with a password would be in every log."""
    (tmp_path / "file").write_bytes(b"")
    archive = Archive(Folder(tmp_path / "file"), 10.0)
    with pytest.raises(ArchiveUnavailable) as caught:
        await archive.write(header_of(ENTRIES), pages_of(ENTRIES))
    assert str(tmp_path) not in str(caught.value)
    assert caught.value.http_status == 503


async def test_a_place_that_hangs_is_given_up(tmp_path: Path):
    """One hanging mount would stop everything that reads or writes."""
    over = threading.Event()

    class Hanging(Folder):
        def open(self, name: str) -> BinaryIO:
            over.wait(30)
            return io.BytesIO()

    try:
        with pytest.raises(ArchiveUnavailable, match="did not answer"):
            await read(Archive(Hanging(tmp_path), 0.05))
    finally:
        over.set()


@pytest.mark.parametrize("job_id", ["", "x", "../../etc/passwd", "j0-" + "a" * 25 + "/", JOB + "\n"])
async def test_what_cannot_be_an_id_is_no_path(folder: Archive, job_id: str):
    """A crafted id would read, or remove, any file."""
    with pytest.raises(JobNotFound):
        name_of(job_id)
    assert not await folder.remove(job_id)


@pytest.mark.parametrize(
    ("url", "said"), [("file://host/x", "three slashes"), ("nosuch://x", "nosuch"), ("s3://bucket", "s3")]
)
def test_an_address_that_cannot_work_is_refused_at_the_start(url: str, said: str):
    """It would be found out when the first job has to be archived."""
    with pytest.raises(ConfigError, match="archive_url.*" + said):
        target_of(url)


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch):
    """A missing package would be a traceback."""

    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(targets, "import_module", missing)
    with pytest.raises(ConfigError, match=r"streamjobs\[archive\]"):
        target_of("s3://bucket")
    assert Archive.of("", 1.0) is None
