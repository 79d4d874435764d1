"""What the demo does, step by step.

The gateway runs in this process, the worker in one of its own, so that it can be killed with SIGKILL. The
viewer is the client that everybody uses; what it saw is compared with the log at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator
from typing import Any, cast

import msgspec

from streamjobs.app import App
from streamjobs.cli.doctor import print_report
from streamjobs.cli.local import has_provider, local_provider, local_redis, projecting
from streamjobs.cli.show import Screen
from streamjobs.client import Client, WatchedEvent
from streamjobs.config import PREFIX, Settings
from streamjobs.cursor import START, Cursor, parse_cursor
from streamjobs.gateway.app import Stop, serve
from streamjobs.job import Fold
from streamjobs.store import Entry, Store
from streamjobs.store.doctor import Doctor

LEASE = 3.0
"""Seconds; shorter than a fleet's, so that nobody waits long for the takeover."""
_AWAY = 1.5
_LEAVE_AFTER_TOOLS = 2
_KILL_AFTER_DELTAS = 12
_PATIENCE = 180.0


class Transcript:
    """What a viewer saw, over all its connections."""

    def __init__(self, job_id: str) -> None:
        self.events: list[Entry] = []
        self.types: Counter[str] = Counter()
        self._job_id = job_id

    def add(self, event: WatchedEvent) -> None:
        """Note an event of the log."""
        self.types[event.type] += 1
        if event.id and event.type != "snapshot":
            self.events.append(Entry(parse_cursor(event.id), event.type, event.raw))

    @property
    def cursor(self) -> Cursor:
        """Where the viewer is."""
        return self.events[-1].cursor if self.events else START

    @property
    def gaps(self) -> int:
        """Events that are missing between the first and the last one seen."""
        seqs = {entry.cursor.seq for entry in self.events}
        return max(seqs, default=0) - len(seqs)

    @property
    def duplicates(self) -> int:
        """Events that came more than once."""
        return len(self.events) - len({entry.cursor.seq for entry in self.events})

    def view(self) -> dict[str, Any]:
        """The view that these events fold into."""
        fold = Fold(self._job_id)
        fold.apply_all(self.events)
        return msgspec.to_builtins(fold.view())


class Showcase:
    """One demo."""

    def __init__(self, settings: Settings, prompt: str, *, once: bool, any_port: bool) -> None:
        self._settings = msgspec.structs.replace(settings, lease=LEASE)
        self._prompt = prompt
        self._once = once
        self._any_port = any_port
        self._screen = Screen()
        self._worker: asyncio.subprocess.Process | None = None
        self._kills = 0
        self._tools_seen = 0
        self._scripted = not has_provider(settings)

    async def run(self) -> int:
        """Show it; returns the exit status."""
        with self._data_dir() as data_dir:
            settings = msgspec.structs.replace(self._settings, data_dir=data_dir)
            async with local_redis(settings) as (settings, redis), local_provider(settings) as settings:
                self._settings = settings
                self._screen.say(f"Redis: {redis.description}")
                return await self._with_gateway()

    @contextlib.contextmanager
    def _data_dir(self) -> Generator[str]:
        """A folder for Redis: the configured one, or for --once a fresh one that goes with it."""
        if not self._once:
            yield self._settings.data_dir
            return
        with tempfile.TemporaryDirectory(prefix="streamjobs-") as folder:
            yield folder

    async def _with_gateway(self) -> int:
        if self._any_port:
            self._settings = msgspec.structs.replace(self._settings, port=_free_port(self._settings))
        store = await Store.open(self._settings)
        stop, ready = Stop(), asyncio.get_running_loop().create_future()
        with stop.on_signals():
            serving = asyncio.create_task(
                serve(self._settings, App(), store=store, stop=stop, on_ready=ready.set_result)
            )
            try:
                await asyncio.wait({serving, ready}, return_when=asyncio.FIRST_COMPLETED)
                if serving.done():
                    serving.result()
                async with projecting(store, stop.asked.set):
                    return await self._show(store, str(ready.result()), stop)
            finally:
                stop.asked.set()
                stop.hurried.set()
                await self._end_worker()
                await serving
                await store.aclose()

    async def _show(self, store: Store, url: str, stop: Stop) -> int:
        self._screen.say(f"gateway: {url}")
        await self._start_worker()
        started = time.monotonic()
        async with Client(url) as client:
            answer = await client.submit(self._submission())
            job_id = answer["id"]
            self._screen.say(f"submitted: {job_id}; a viewer opens its stream")
            transcript = Transcript(job_id)
            watching = asyncio.create_task(self._watch(client, job_id, transcript))
            stopped = asyncio.create_task(stop.asked.wait())
            await asyncio.wait({watching, stopped}, timeout=_PATIENCE, return_when=asyncio.FIRST_COMPLETED)
            stopped.cancel()
            if not watching.done():
                watching.cancel()
                self._screen.line("the job did not end", "bold red")
                return 1
            watching.result()
            is_proved = await self._prove(store, client, job_id, transcript, time.monotonic() - started)
        if self._once:
            return 0 if is_proved else 1
        self._invite(url, job_id)
        await stop.asked.wait()
        return 0 if is_proved else 1

    def _submission(self) -> dict[str, Any]:
        chat = {
            "prompt": self._prompt,
            "model": self._settings.default_model,
            "tools": ["list_files", "read_file"],
        }
        return {"kind": "chat", "input": {name: value for name, value in chat.items() if value}}

    # --- what happens to the viewer and to the worker

    async def _watch(self, client: Client, job_id: str, transcript: Transcript) -> None:
        """Watch to the end; leave once in the middle, and kill the worker once."""
        await self._watch_until(client, job_id, transcript, self._wants_to_leave)
        self._screen.say(f"the viewer's tab is closed at event {transcript.cursor}; the job goes on")
        await asyncio.sleep(_AWAY)
        self._screen.say("it comes back, with nothing but its last event id")
        deltas = transcript.types["text.delta"]

        def is_mid_sentence(_event: WatchedEvent) -> bool:
            return transcript.types["text.delta"] - deltas >= _KILL_AFTER_DELTAS

        await self._watch_until(client, job_id, transcript, is_mid_sentence)
        if transcript.events[-1].type.startswith("job."):
            return
        await self._kill_worker()
        await self._watch_until(client, job_id, transcript, _never)

    async def _watch_until(
        self, client: Client, job_id: str, transcript: Transcript, enough: Callable[[WatchedEvent], bool]
    ) -> None:
        async with contextlib.aclosing(client.watch(job_id, str(transcript.cursor))) as events:
            async for event in events:
                transcript.add(event)
                self._screen.show(event)
                if enough(event):
                    return

    def _wants_to_leave(self, event: WatchedEvent) -> bool:
        self._tools_seen += event.type in {"tool.completed", "tool.failed"}
        return self._tools_seen >= _LEAVE_AFTER_TOOLS

    async def _start_worker(self) -> None:
        environment = {**os.environ, **_as_environment(self._settings)}
        self._worker = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "streamjobs", "worker", env=environment, start_new_session=True
        )
        self._screen.say(f"worker: process {self._worker.pid}")

    async def _kill_worker(self) -> None:
        assert self._worker is not None
        self._screen.say(f"kill -9 {self._worker.pid}: the worker dies in the middle of a sentence")
        self._worker.send_signal(signal.SIGKILL)
        await self._worker.wait()
        self._kills += 1
        await self._start_worker()
        self._screen.say(
            f"its lease runs out in {LEASE:.0f} s at most; then another worker goes on from the log"
        )

    async def _end_worker(self) -> None:
        if self._worker is not None and self._worker.returncode is None:
            self._worker.send_signal(signal.SIGTERM)
            await self._worker.wait()

    # --- the proof

    async def _prove(
        self, store: Store, client: Client, job_id: str, transcript: Transcript, seconds: float
    ) -> bool:
        view = await client.get(job_id)
        log = [entry async for page in store.log.pages(job_id) for entry in page.entries]
        report = await Doctor(store).examine()
        restarts = transcript.types["job.lost"]
        checks = {
            "completed": view["status"] == "completed",
            "every event of the log was seen, byte for byte": transcript.events == log,
            "no gaps": transcript.gaps == 0,
            "no duplicates": transcript.duplicates == 0,
            "one restart for the killed worker": restarts == self._kills == 1,
            "what the viewer folded is what the gateway shows": transcript.view() == view,
            "the answer is whole, with no word of the lost attempt": _is_whole(view),
            "every invariant holds in the store": report.is_healthy,
        }  # fmt: skip
        self._screen.say("the proof")
        for claim, holds in checks.items():
            self._screen.line(f"{'yes' if holds else 'NO '}  {claim}", "green" if holds else "bold red")
        self._screen.line(
            f"events seen {len(transcript.events)}  gaps {transcript.gaps}  "
            f"duplicates {transcript.duplicates}  restarts {restarts}  seconds {seconds:.1f}",
            "bold green" if all(checks.values()) else "bold red",
        )
        if not report.is_healthy:
            print_report(report)
        if self._scripted:
            self._screen.line(
                "the answer was scripted: set OPENAI_API_KEY or ANTHROPIC_API_KEY for a real model", "yellow"
            )
        return all(checks.values())

    def _invite(self, url: str, job_id: str) -> None:
        self._screen.say("still serving; try (ctrl-c ends it)")
        for line in (
            f"curl -N {url}/v1/jobs/{job_id}/events?after=0",
            f"curl {url}/v1/jobs/{job_id}",
            f"curl -H 'accept: application/json' '{url}/v1/jobs/{job_id}/events?after=0'",
            f"curl {url}/v1/jobs -H 'content-type: application/json' "
            '-d \'{"kind": "chat", "input": {"prompt": "Hi"}}\'',
            f"curl {url}/metrics",
            f"streamjobs submit --url {url} --prompt Hi --watch",
        ):
            self._screen.line(line, "cyan")


def _never(_event: WatchedEvent) -> bool:
    return False


def _is_whole(view: dict[str, Any]) -> bool:
    return view["status"] == "completed" and view["text"].endswith(view["result"]["text"])


def _as_environment(settings: Settings) -> dict[str, str]:
    """What a child process needs to work with the same settings."""
    defaults = Settings()
    environment: dict[str, str] = {}
    for name in settings.__struct_fields__:
        value = getattr(settings, name)
        if value != getattr(defaults, name):
            environment[PREFIX + name.upper()] = _as_text(value)
    environment[f"{PREFIX}OPS_PORT"] = "0"
    return environment


def _as_text(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(str(part) for part in cast("tuple[object, ...]", value))
    return str(value)


def _free_port(settings: Settings) -> int:
    """The usual port, or any that is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError:
            return 0
    return settings.port
