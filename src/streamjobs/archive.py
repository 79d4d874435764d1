"""The archive: ended jobs as files, one each, which outlive Redis. Made of a `Target`.

Rule 1: a file is `<two letters of the id>/<job id>.jsonl.zst`: one line of JSON about the job, then a line
for each event, just as `GET /v1/jobs/{id}/events` gives it as NDJSON. `zstdcat FILE | jq` reads it.
Rule 2: a file counts as written once it was read back from where it is, and holds what it should.
Rule 3: neither writing nor reading holds more of a job than a page. Both run in threads of their own, few of
them: a target that hangs takes nothing but those.
Rule 4: the same job gives the same file, whoever writes it and however often. Where jobs are encrypted that
holds of what is in the file, which is encrypted with the data key of its job.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import re
import threading
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

import msgspec
import zstandard

from streamjobs.cursor import START, Cursor, parse_cursor
from streamjobs.encryption import Cipher
from streamjobs.errors import (
    ArchiveUnavailable,
    InvalidCursor,
    JobNotFound,
    Shredded,
    StreamjobsError,
)
from streamjobs.events import encode_json
from streamjobs.segments import Entry
from streamjobs.targets import Target, target_of, troubles

FORMAT = 1
PAGE_EVENTS = 500
PAGE_BYTES = 256 * 1024
_ENCRYPTED = b"\xe5SJARC1\n"
"""What an encrypted file begins with, which zstd does not."""
_CHUNK = 64 * 1024
_THREADS = 4
_LEVEL = 6
_MAX_LINE = 128 * 1024 * 1024
_JOB_ID = re.compile(r"j(?:0|[1-9]\d{0,3})-([a-z2-7]{2})[a-z2-7]{24}", re.ASCII)

Result = TypeVar("Result")
File = TypeVar("File", "_Writer", "_Reader")
Run = Callable[..., Any]


class DamagedArchive(StreamjobsError):  # noqa: N818 - named after what happened, as all of ours
    """A file of the archive that does not hold what it should."""

    code = "damaged_archive"


class DataKeys(Protocol):
    """Where the data keys of jobs are, of those too that are in the archive alone."""

    async def ensure(self, job_id: str, /) -> Cipher | None:
        """A job's data key, to write its file with; None where that is not encrypted."""
        ...

    async def current(self, job_id: str, /) -> Cipher | None:
        """A job's data key, as it is now."""
        ...


class Header(msgspec.Struct, frozen=True):
    """The first line of a file: whose job it is, how it ended, and how many events follow."""

    id: str
    owner: str
    kind: str
    status: str
    created_ms: int
    ended_ms: int
    events: int
    last: str
    format: int = FORMAT

    @property
    def cursor(self) -> Cursor:
        """The last event's."""
        return parse_cursor(self.last)


class _Line(msgspec.Struct, frozen=True):
    id: str
    type: str
    data: msgspec.Raw


_header_decoder = msgspec.json.Decoder(Header)
_line_decoder = msgspec.json.Decoder(_Line)


def line_of(entry: Entry) -> bytes:
    """An event as one line of NDJSON."""
    return encode_json({"id": str(entry.cursor), "type": entry.type, "data": msgspec.Raw(entry.data)}) + b"\n"


def name_of(job_id: str) -> str:
    """The name of a job's file. Raises `JobNotFound` for what cannot be an id."""
    match = _JOB_ID.fullmatch(job_id)
    if match is None:
        raise JobNotFound("no such job")
    return f"{match[1]}/{job_id}.jsonl.zst"


class Archive:
    """Writes, reads and removes the files of jobs."""

    def __init__(self, target: Target, timeout: float, data_keys: DataKeys | None = None) -> None:
        self._target = target
        self._timeout = timeout
        self._data_keys = data_keys
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="archive")

    @classmethod
    def of(cls, url: str, timeout: float, data_keys: DataKeys | None = None) -> Archive | None:
        """The archive that the settings name, None without one. Raises `ConfigError`."""
        return cls(target_of(url), timeout, data_keys) if url else None

    async def write(self, header: Header, pages: AsyncIterable[Iterable[Entry]]) -> None:
        """Write a job's file, and check it.

        Raises `ArchiveUnavailable`, `DamagedArchive` where what is there then is something else, and
        `StreamjobsError` where the pages do not hold what the header says.
        """
        cipher = None if self._data_keys is None else await self._data_keys.ensure(header.id)
        async with self._held(lambda: _Writer(self._target, header, cipher)) as (writer, run):
            async for entries in pages:
                await run(writer.add, list(entries))
            await run(writer.commit)
        await self._verify(header)

    async def _verify(self, header: Header) -> None:
        try:
            async with self.reading(header.id) as reading:
                if reading.header != header:
                    raise DamagedArchive(f"the file of {header.id} is about something else")
                while await reading.page():
                    pass
        except JobNotFound as error:
            raise DamagedArchive(f"the file of {header.id} is not there") from error

    @contextlib.asynccontextmanager
    async def reading(self, job_id: str) -> AsyncGenerator[Reading]:
        """Read a job's file.

        Raises `JobNotFound`, `ArchiveUnavailable`, `DamagedArchive`, of an encrypted one `Shredded`,
        `EncryptionKeyMissing`, `DamagedCiphertext`.
        """
        name = name_of(job_id)
        cipher = None if self._data_keys is None else await self._data_keys.current(job_id)
        async with contextlib.AsyncExitStack() as stack:
            try:
                held = self._held(lambda: _Reader(self._target.open(name), cipher))
                reader, run = await stack.enter_async_context(held)
            except FileNotFoundError as error:
                raise JobNotFound("no such job") from error
            if reader.header.id != job_id:
                raise DamagedArchive(f"the file of {job_id} is about another job")
            yield Reading(reader, run)

    async def remove(self, job_id: str) -> bool:
        """Remove a job's file; False where there is none. Raises `ArchiveUnavailable`."""
        try:
            return await self._run(self._target.remove, name_of(job_id))
        except (FileNotFoundError, JobNotFound):
            return False

    @contextlib.asynccontextmanager
    async def _held(self, make: Callable[[], File]) -> AsyncGenerator[tuple[File, Run]]:
        """An open file and how to use it: one thing after the other, and closed whatever comes.

        Who waits may go first, cancelled or too late. What it began is still at work in its thread then, and
        the file is closed behind it.
        """
        turn = threading.Lock()
        making = self._threads.submit(_translated, make)
        try:
            file = await self._outcome(making)
        except BaseException:
            making.add_done_callback(_close_made)
            raise
        try:
            yield file, functools.partial(self._run, _in_turn, turn)
        finally:
            with contextlib.suppress(ArchiveUnavailable):
                await self._run(_in_turn, turn, file.close)

    async def _run(self, act: Callable[..., Result], *arguments: Any) -> Result:
        return await self._outcome(self._threads.submit(_translated, act, *arguments))

    async def _outcome(self, begun: Future[Result]) -> Result:
        """Wait, but never take back what waits for a thread: that may be what closes a file."""
        try:
            async with asyncio.timeout(self._timeout):
                return await asyncio.shield(asyncio.wrap_future(begun))
        except TimeoutError as error:
            raise ArchiveUnavailable(f"the archive did not answer within {self._timeout:g} s") from error


def _translated(act: Callable[..., Result], *arguments: Any) -> Result:
    with troubles():
        return act(*arguments)


def _in_turn(turn: threading.Lock, act: Callable[..., Result], *arguments: Any) -> Result:
    with turn:
        return act(*arguments)


def _close_made(making: Future[Any]) -> None:
    if making.exception() is None:
        making.result().close()


class Reading:
    """A job's file while it is read; from its first event, or from behind one."""

    def __init__(self, reader: _Reader, run: Run) -> None:
        self._reader = reader
        self._run = run
        self.header = reader.header

    async def seek(self, after: Cursor) -> bool:
        """Go behind an event, once and before anything else; False where it is not in the log."""
        return after == START or await self._run(self._reader.seek, after)

    async def page(self, limit: int = PAGE_EVENTS, max_bytes: int = PAGE_BYTES) -> list[Entry]:
        """The next events, at most so many; none at the end."""
        return await self._run(self._reader.page, limit, max_bytes)


class _Writer:
    def __init__(self, target: Target, header: Header, cipher: Cipher | None) -> None:
        self._target = target
        self._header = header
        self._seq = 0
        self._last = START
        self._staged: Path | None = target.stage(name_of(header.id))
        try:
            self._file = self._staged.open("wb")
        except BaseException:
            self._discard()
            raise
        try:
            compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True)
            file: Any = self._file if cipher is None else _Encrypting(self._file, cipher)
            self._out: Any = compressor.stream_writer(file)
            self._out.write(encode_json(header) + b"\n")
        except BaseException:
            self.close()
            raise

    def add(self, entries: list[Entry]) -> None:
        for entry in entries:
            self._seq += 1
            self._last = entry.cursor
            if entry.cursor.seq != self._seq:
                raise StreamjobsError(f"the log of {self._header.id} has a hole before {entry.cursor}")
        self._out.write(b"".join(map(line_of, entries)))

    def commit(self) -> None:
        """Give the file its name. Raises unless all of it was written."""
        self._out.close()
        if self._seq != self._header.events or self._last != self._header.cursor:
            raise StreamjobsError(
                f"the log of {self._header.id} ends at {self._last}, not {self._header.last}"
            )
        if self._staged is not None:
            self._target.commit(self._staged, name_of(self._header.id))
            self._staged = None

    def close(self) -> None:
        """Without a name, it is removed."""
        try:
            self._file.close()
        finally:
            self._discard()

    def _discard(self) -> None:
        if self._staged is not None:
            with contextlib.suppress(OSError):
                self._target.discard(self._staged)
            self._staged = None


class _Encrypting:
    """A file that what is compressed goes through: a head, then chunks, each behind its length.

    A chunk opens in its own place only, and only the last one as the last.
    """

    def __init__(self, file: BinaryIO, cipher: Cipher) -> None:
        self._file = file
        self._cipher = cipher
        self._pending = bytearray()
        self._number = 0
        file.write(_ENCRYPTED)

    def write(self, data: bytes) -> int:
        self._pending += data
        while len(self._pending) > _CHUNK:
            self._put(bytes(self._pending[:_CHUNK]), is_last=False)
            del self._pending[:_CHUNK]
        return len(data)

    def close(self) -> None:
        self._put(bytes(self._pending), is_last=True)
        self._file.close()

    def _put(self, chunk: bytes, *, is_last: bool) -> None:
        sealed = self._cipher.seal(chunk, _chunk_place(self._number, is_last=is_last))
        self._file.write(len(sealed).to_bytes(4, "big") + bytes([is_last]) + sealed)
        self._number += 1


class _Decrypting:
    """What `_Encrypting` was given, from behind the head."""

    def __init__(self, file: BinaryIO, cipher: Cipher) -> None:
        self._file = file
        self._cipher = cipher
        self._number = 0
        self._is_over = False
        self._rest = b""

    def read(self, size: int = -1) -> bytes:
        while not self._is_over and (size < 0 or not self._rest):
            self._rest += self._next()
        size = len(self._rest) if size < 0 else size
        data, self._rest = self._rest[:size], self._rest[size:]
        return data

    def _next(self) -> bytes:
        head = self._file.read(5)
        length = int.from_bytes(head[:4], "big")
        if len(head) < 5 or length > 2 * _CHUNK:
            raise DamagedArchive("an encrypted file of the archive ends too early")
        self._is_over = head[4] == 1
        place = _chunk_place(self._number, is_last=self._is_over)
        self._number += 1
        return self._cipher.open(self._file.read(length), place)


def _chunk_place(number: int, *, is_last: bool) -> bytes:
    return b"archive\0%d%b" % (number, b" last" if is_last else b"")


def _opened(file: BinaryIO, cipher: Cipher | None) -> Any:
    """What to read an archive's lines from, behind whatever encrypts them. Raises `Shredded`."""
    head = file.read(len(_ENCRYPTED))
    if head != _ENCRYPTED:
        file.seek(0)
        return file
    if cipher is None:
        raise Shredded("the job's file is encrypted, and its data key is gone")
    return _Decrypting(file, cipher)


class _Reader:
    """Lines are counted: a file that was cut ends in silence."""

    def __init__(self, file: BinaryIO, cipher: Cipher | None) -> None:
        self._file = file
        try:
            source = _opened(file, cipher)
            stream: Any = zstandard.ZstdDecompressor().stream_reader(source, read_across_frames=True)
            self._lines = io.BufferedReader(stream, 128 * 1024)
            self.header = self._decoded(_header_decoder, self._line())
            if self.header.format != FORMAT:
                raise DamagedArchive(f"a file of format {self.header.format}, not {FORMAT}")
            self._end = self.header.cursor
        except InvalidCursor as error:
            self.close()
            raise DamagedArchive("a file's first line is not one of ours") from error
        except BaseException:
            self.close()
            raise
        self._seq = 0

    def seek(self, after: Cursor) -> bool:
        if not 0 < after.seq <= self.header.events:
            return False
        for _ in range(after.seq - 1):
            self._line()
            self._seq += 1
        return self._entry().cursor == after

    def page(self, limit: int, max_bytes: int) -> list[Entry]:
        entries: list[Entry] = []
        size = 0
        while len(entries) < limit and size < max_bytes and self._seq < self.header.events:
            entries.append(self._entry())
            size += len(entries[-1].data)
        if not entries and self._read(1):
            raise DamagedArchive(f"the file of {self.header.id} has more events than it says")
        return entries

    def close(self) -> None:
        self._file.close()

    def _entry(self) -> Entry:
        line = self._decoded(_line_decoder, self._line())
        self._seq += 1
        try:
            cursor = parse_cursor(line.id)
        except InvalidCursor as error:
            raise DamagedArchive(f"event {self._seq} of {self.header.id} has no id") from error
        if cursor.seq != self._seq or (cursor.seq == self.header.events and cursor != self._end):
            raise DamagedArchive(f"event {self._seq} of {self.header.id} is another one: {cursor}")
        return Entry(cursor, line.type, bytes(line.data))

    def _line(self) -> bytes:
        try:
            line = self._lines.readline(_MAX_LINE)
        except zstandard.ZstdError as error:
            raise DamagedArchive("a file of the archive cannot be read") from error
        if not line.endswith(b"\n"):
            raise DamagedArchive("a file of the archive ends too early")
        return line

    def _read(self, size: int) -> bytes:
        try:
            return self._lines.read(size)
        except zstandard.ZstdError as error:
            raise DamagedArchive("a file of the archive cannot be read") from error

    def _decoded(self, decoder: msgspec.json.Decoder[Result], line: bytes) -> Result:
        try:
            return decoder.decode(line)
        except msgspec.MsgspecError as error:
            raise DamagedArchive("a line of the archive is not one of ours") from error
