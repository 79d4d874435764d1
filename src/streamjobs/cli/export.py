"""The command that takes a job's log away: export."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from streamjobs.cli.options import ask, gateway_options

if TYPE_CHECKING:
    from streamjobs.client import Client


@click.command()
@click.argument("job_id")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="A file; default: the output."
)
@click.option(
    "--format", "form", type=click.Choice(["jsonl", "zst"]),
    help="Lines of JSON, or those compressed; default: as the file's name says, else jsonl.",
)  # fmt: skip
@gateway_options
def export(job_id: str, output: Path | None, form: str | None, url: str, owner: str) -> None:
    """Write a job's whole log, an event a line: of a live, an ended or an archived job.

    A file is there when it is whole.

    \b
    streamjobs export JOB_ID | jq -r .type
    streamjobs export JOB_ID -o job.jsonl.zst
    """
    is_compressed = form == "zst" or (form is None and output is not None and output.suffix == ".zst")
    if output is None:
        ask(url, owner, lambda client: _export(client, job_id, sys.stdout.buffer, is_compressed))
        return
    part = output.with_name(f".{output.name}.part")
    try:
        with part.open("wb") as file:
            ask(url, owner, lambda client: _export(client, job_id, file, is_compressed))
        part.replace(output)
    finally:
        part.unlink(missing_ok=True)


async def _export(client: Client, job_id: str, file: BinaryIO, is_compressed: bool) -> None:
    out: Any = _compressed(file) if is_compressed else file
    async for piece in client.export(job_id):
        out.write(piece)
    if is_compressed:
        out.close()
    file.flush()


def _compressed(file: BinaryIO) -> Any:
    import zstandard

    return zstandard.ZstdCompressor(write_checksum=True).stream_writer(file, closefd=False)
