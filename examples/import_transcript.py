"""Import a transcript of a few hundred thousand lines into SQLite: no line lost, none twice.

Rule 1: a batch is a step, known by the byte offset at which it begins; it records where the next one does.
Rule 2: a batch's rows and the batch itself are one transaction. A step that runs again, since its worker died
between the commit and the log, finds its batch there and reports it, without reading a line.
Rule 3: a line that is no message is counted and shown; it does not stop the import.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Annotated, BinaryIO

import msgspec

from examples.program import app, output, readable
from streamjobs import Context, Permanent, Retry

MAX_LINE = 1024 * 1024
SHOWN_A_BATCH = 10
SHOWN_IN_ALL = 100

SCHEMA = """
    CREATE TABLE IF NOT EXISTS messages (
        line INTEGER PRIMARY KEY, speaker TEXT NOT NULL, text TEXT NOT NULL, at REAL NOT NULL);
    CREATE TABLE IF NOT EXISTS batches (
        offset INTEGER PRIMARY KEY, report BLOB NOT NULL);
"""


class Import(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A JSONL file below the root, and how many of its lines are one batch."""

    path: str
    batch: Annotated[int, msgspec.Meta(ge=100, le=100_000)] = 5000


class Message(msgspec.Struct, frozen=True):
    """One line of a transcript."""

    speaker: str
    text: str
    at: float = 0.0


class BadLine(msgspec.Struct, frozen=True):
    """A line that is no message."""

    line: int
    error: str


class Source(msgspec.Struct, frozen=True):
    """A file as it was when the import began: if it changes, offsets mean nothing any more."""

    path: str
    bytes: int
    modified_ns: int


class Batch(msgspec.Struct, frozen=True):
    """What became of one batch; `shown` are the first of its bad lines."""

    next_offset: int
    lines: int
    bad: int
    shown: list[BadLine]


class Imported(msgspec.Struct, frozen=True):
    """What is in the database."""

    database: str
    lines: int
    messages: int
    bad: int


@app.workflow("import_transcript")
async def import_transcript(ctx: Context, request: Import) -> Imported:
    """Import a JSONL transcript into a SQLite database."""
    source = await ctx.step("open", examine, request.path)
    database = str(output("transcripts", f"{ctx.job_id}.sqlite"))
    offset = lines = bad = 0
    shown: list[BadLine] = []
    while offset < source.bytes:
        batch = await ctx.step(
            "batch", import_batch, source, database, offset, lines, request.batch,
            key=str(offset), retry=Retry(base=0.2),
        )  # fmt: skip
        offset, lines, bad = batch.next_offset, lines + batch.lines, bad + batch.bad
        shown += batch.shown[: SHOWN_IN_ALL - len(shown)]
        ctx.progress(100 * offset / source.bytes, f"{lines:,} lines")
    if bad:
        ctx.log(f"{bad:,} lines are no messages", level="warning", data=shown[:SHOWN_A_BATCH])
        await ctx.artifact("bad-lines.json", shown)
    ctx.summary = f"{lines - bad:,} messages of {lines:,} lines"
    return Imported(database, lines, lines - bad, bad)


def examine(path: str) -> Source:
    """The file that is to be imported, as it is now."""
    found = readable(path)
    if not found.is_file():
        raise Permanent(f"path: {path!r} is no file")
    stat = found.stat()
    return Source(str(found), stat.st_size, stat.st_mtime_ns)


def import_batch(source: Source, database: str, offset: int, line: int, size: int) -> Batch:
    """Import `size` lines from `offset` on, of which `line` came before, unless that was done already."""
    with closing(sqlite3.connect(database, timeout=30.0, isolation_level=None)) as connection:
        connection.executescript(SCHEMA)
        connection.execute("BEGIN IMMEDIATE")  # a second one, of a worker that was given up, waits here
        done = connection.execute("SELECT report FROM batches WHERE offset = ?", (offset,)).fetchone()
        if done:
            return msgspec.json.decode(done[0], type=Batch)
        with open_unchanged(source) as file:
            batch, rows = parse(file, offset, line, size)
        connection.executemany("INSERT INTO messages VALUES (?, ?, ?, ?)", rows)
        connection.execute("INSERT INTO batches VALUES (?, ?)", (offset, msgspec.json.encode(batch)))
        connection.execute("COMMIT")
    return batch


def open_unchanged(source: Source) -> BinaryIO:
    """The file, open. Raises `Permanent` where it is not the one that was examined."""
    path = Path(source.path)
    stat = path.stat()
    if (stat.st_size, stat.st_mtime_ns) != (source.bytes, source.modified_ns):
        raise Permanent(f"{path.name} was changed while it was imported")
    return path.open("rb")


def parse(file: BinaryIO, offset: int, line: int, size: int) -> tuple[Batch, list[tuple[object, ...]]]:
    """Read the next lines: the report, and the rows of those that are messages."""
    decoder = msgspec.json.Decoder(Message)
    rows: list[tuple[object, ...]] = []
    shown: list[BadLine] = []
    file.seek(offset)
    number = line
    for number, raw in enumerate(_lines(file, size), line + 1):
        try:
            message = decoder.decode(raw)
            rows.append((number, message.speaker, message.text, message.at))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            if len(shown) < SHOWN_A_BATCH:
                shown.append(BadLine(number, str(error)[:200]))
    lines = number - line
    return Batch(file.tell(), lines, lines - len(rows), shown), rows


def _lines(file: BinaryIO, most: int) -> Iterator[bytes]:
    """The next lines; one over `MAX_LINE` is empty here, and so is bad, and never whole in memory."""
    for _ in range(most):
        raw = file.readline(MAX_LINE)
        if not raw:
            return
        is_whole = raw.endswith(b"\n") or len(raw) < MAX_LINE
        while not raw.endswith(b"\n") and len(raw) == MAX_LINE:
            raw = file.readline(MAX_LINE)
        yield raw if is_whole else b""
