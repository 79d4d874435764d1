"""What the worker's tests share: workers in this loop and in processes, and what became of jobs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from streamjobs.app import App
from streamjobs.cursor import START, Cursor
from streamjobs.events import TERMINAL, encode_json
from streamjobs.job import Fold, JobView
from streamjobs.store import Store, Submission
from streamjobs.store.doctor import Doctor, Report
from streamjobs.store.sweeper import Sweeper
from streamjobs.testing import Scenario, ScriptedProvider, Turn
from streamjobs.worker.worker import Worker
from tests.conftest import fast_settings, wait_until

ROOT = Path(__file__).parent.parent
OUTCOMES = {"tool.completed", "tool.failed", "tool.unknown"}


class Logged(NamedTuple):
    """One event of a log, decoded."""

    cursor: Cursor
    type: str
    data: dict[str, Any]


class Lab:
    """A store, a scripted provider, and jobs on them."""

    def __init__(self, store: Store, provider: ScriptedProvider) -> None:
        self.store = store
        self.provider = provider

    async def submit(self, kind: str, given: Any = None, **fields: Any) -> str:
        raw = encode_json(given)
        return (await self.store.jobs.submit(Submission(**({"kind": kind, "input": raw} | fields)))).job_id

    async def chat(self, prompt: str = "hello", **fields: Any) -> str:
        """Submit a chat; `tools`, `agent`, `model`, `parameters` and `messages` belong to its input."""
        names = ("tools", "agent", "model", "parameters", "messages")
        chosen = {name: fields.pop(name) for name in names if name in fields}
        given = chosen if "messages" in chosen else {"prompt": prompt} | chosen
        return await self.submit("chat", given, **fields)

    async def log(self, job_id: str, after: Cursor = START) -> list[Logged]:
        return [
            Logged(entry.cursor, entry.type, json.loads(entry.data))
            async for page in self.store.log.pages(job_id, after)
            for entry in page.entries
        ]

    async def types(self, job_id: str) -> list[str]:
        return [event.type for event in await self.log(job_id)]

    async def view(self, job_id: str) -> JobView:
        fold = Fold(job_id)
        async for page in self.store.log.pages(job_id):
            fold.apply_all(page.entries)
        return fold.view()

    async def status(self, job_id: str) -> str:
        return (await self.store.jobs.get(job_id)).status

    async def has(self, job_id: str, kind: str, count: int = 1) -> bool:
        return (await self.types(job_id)).count(kind) >= count

    async def until(self, job_id: str, kind: str, count: int = 1, timeout: float = 40.0) -> None:
        """Wait until the job's log holds so many events of a type."""
        await wait_until(lambda: self.has(job_id, kind, count), timeout, f"{kind} in the log of {job_id}")

    async def ended(self, *job_ids: str, timeout: float = 60.0) -> JobView:
        """Wait until all have ended; the view of the last one."""
        for job_id in job_ids:
            try:
                await wait_until(lambda job_id=job_id: self._is_ended(job_id), timeout)
            except TimeoutError:
                tail = [(str(event.cursor), event.type) for event in await self.log(job_id)][-12:]
                status = await self.status(job_id)
                raise AssertionError(
                    f"{job_id} is {status} after {timeout} s; its log ends with {tail}"
                ) from None
        return await self.view(job_ids[-1])

    async def run(self, prompt: str = "hello", **fields: Any) -> JobView:
        """Submit a chat and wait for its end."""
        return await self.ended(await self.chat(prompt, **fields))

    async def expire_lease(self, job_id: str) -> None:
        """Let a job's lease be over now, as if its worker had said nothing for as long as it is."""
        client: Any = self.store.client
        await client.zadd("sj:{0}:leases", {job_id: 1})

    async def _is_ended(self, job_id: str) -> bool:
        return (await self.store.jobs.get(job_id)).is_ended

    async def healthy(self) -> Report:
        """Examine the store; every invariant must hold."""
        report = await Doctor(self.store).examine()
        assert report.is_healthy, report.violations
        return report


@contextlib.asynccontextmanager
async def lab(url: str, scenario: Scenario | None = None, **changes: Any) -> AsyncIterator[Lab]:
    """A lab on the Redis at `url`; `scenario` is what the model says."""
    async with ScriptedProvider(scenario or says("fine")) as provider:
        store = await Store.open(fast_settings(url, **(provider_settings(provider) | changes)))
        try:
            yield Lab(store, provider)
        finally:
            await store.aclose()


def provider_settings(provider: ScriptedProvider) -> dict[str, Any]:
    return {
        "openai_base_url": provider.openai_url,
        "anthropic_base_url": provider.url,
        "default_model": "openai:scripted",
    }


def says(*texts: str, **options: Any) -> Scenario:
    """A scenario of plain turns, one for each text."""
    return Scenario(turns=[Turn(text=text, **options) for text in texts])


@contextlib.asynccontextmanager
async def working(store: Store, app: App | None = None, **options: Any) -> AsyncIterator[Worker]:
    """A worker in this loop; it is dropped, as by kill -9, when the block ends."""
    worker = Worker(store, app or App(), **options)
    task = asyncio.create_task(worker.run(), name="worker under test")
    try:
        yield worker
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@contextlib.asynccontextmanager
async def talking(
    url: str, scenario: Scenario | None = None, app: App | None = None, **changes: Any
) -> AsyncIterator[Lab]:
    """A lab with a worker in this loop."""
    async with lab(url, scenario, **changes) as opened, working(opened.store, app):
        yield opened


@contextlib.asynccontextmanager
async def sweeping(store: Store) -> AsyncIterator[None]:
    """Sweep, as every role does, so that expired leases are seen while no worker is there."""
    task = asyncio.create_task(Sweeper(store).run(), name="sweeper under test")
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def drained(worker: Worker, store: Store, timeout: float = 40.0) -> None:
    """Drain a worker and wait until it has left the registry."""
    worker.drain()

    async def has_left() -> bool:
        return worker.id not in {info.id for info in await store.workers.all()}

    await wait_until(has_left, timeout, "the worker's leaving")


class WorkerProcess:
    """A worker in a process of its own, as `streamjobs worker` starts it."""

    def __init__(
        self,
        settings: Any,
        app: str = "tests.faults.app:app",
        *,
        fault: str = "",
        env: dict[str, str] | None = None,
        output: Path | None = None,
    ) -> None:
        self._output = output
        self._env = environment(settings) | ({"STREAMJOBS_FAULT": fault} if fault else {}) | (env or {})
        self._app = app
        self.process = self._spawn()

    @property
    def pid(self) -> int:
        return self.process.pid

    def _spawn(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "streamjobs", "worker", self._app]
        if self._output is None:
            return subprocess.Popen(command, env=self._env, cwd=ROOT)
        with self._output.open("ab") as output:
            return subprocess.Popen(command, env=self._env, cwd=ROOT, stdout=output, stderr=output)

    def restart(self) -> None:
        assert self.process.poll() is not None
        self.process = self._spawn()

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(20)

    def terminate(self) -> None:
        self.send(signal.SIGTERM)

    async def ended(self, timeout: float = 40.0) -> int:
        """Wait for the process's end; its exit status."""
        await wait_until(lambda: self.process.poll() is not None, timeout, "the end of the worker's process")
        assert self.process.returncode is not None
        return self.process.returncode


@contextlib.contextmanager
def worker_process(
    settings: Any, app: str = "tests.faults.app:app", **options: Any
) -> Iterator[WorkerProcess]:
    """A worker process that is gone, whatever happened to it, when the block ends."""
    worker = WorkerProcess(settings, app, **options)
    try:
        yield worker
    finally:
        if worker.process.poll() is None:
            worker.kill()


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def environment(settings: Any) -> dict[str, str]:
    """This process's environment, with the settings that differ from the defaults in place of our own."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("STREAMJOBS_")}
    defaults = type(settings)()
    for name, value in msgspec.structs.asdict(settings).items():
        if value != getattr(defaults, name):
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            env[f"STREAMJOBS_{name.upper()}"] = text
    return env


def one_outcome_each(log: Sequence[Logged]) -> None:
    """Every tool call of a completed job has exactly one recorded outcome."""
    called = [event.data["call_id"] for event in log if event.type == "tool.called"]
    outcomes = Counter(event.data["call_id"] for event in log if event.type in OUTCOMES)
    assert len(called) == len(set(called)), called
    assert outcomes == dict.fromkeys(called, 1), (called, outcomes)


def one_end(log: Sequence[Logged]) -> str:
    """The type of the only terminal event, which must be the last one."""
    ends = [event.type for event in log if event.type in TERMINAL]
    assert len(ends) == 1, ends
    assert log[-1].type == ends[0]
    return ends[0]
