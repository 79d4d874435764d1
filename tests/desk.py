"""One job on a desk: a workflow, its log in memory, and a stop at any event.

The real execution runs over a store that is a list. Nothing here waits for a clock: timers fire when the
test says so, and a job that waits is parked at once. `cut` throws the log's end away, as a crash does with
what was not written yet; the next `run` goes on from what is left.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from types import SimpleNamespace
from typing import Any

from streamjobs.app import App
from streamjobs.config import Settings
from streamjobs.cursor import START, Cursor
from streamjobs.errors import ArtifactNotFound
from streamjobs.events import (
    TERMINAL,
    ChildEnded,
    Event,
    JobLost,
    JobQueued,
    JobRequeued,
    JobStarted,
    SignalReceived,
    TimerFired,
    encode_event,
    encode_json,
)
from streamjobs.llm.base import Answer as ModelAnswer
from streamjobs.llm.base import ModelRequest, Piece, TextPiece
from streamjobs.store import Answer, Batch, Clock, Entry, Lease, Page
from streamjobs.worker.execution import Execution, Services
from streamjobs.worker.recorder import Committer

JOB = f"j0-{'a' * 26}"
PARKED = {"sleep": "scheduled", "wait": "waiting", "retry": "scheduled", "yield": "queued"}

Script = Callable[[ModelRequest], ModelAnswer]


class Desk:
    """A job, its log, and the store around it; `status` is where it stands."""

    def __init__(
        self,
        app: App,
        kind: str,
        given: Any = None,
        *,
        script: Script | None = None,
        job_id: str = JOB,
        **settings: Any,
    ) -> None:
        self.app = app
        self.job_id = job_id
        self.kind = kind
        self.settings = Settings(**({"park_after": 0.0, "replay_timeout": 0.3, "retry_base": 0.0} | settings))
        self.entries: list[Entry] = []
        self.timers: dict[str, int] = {}
        self.artifacts: dict[tuple[str, str], bytes] = {}
        self.children: list[str] = []
        self.status = "queued"
        self.inbox = 0
        self.attempt = 1
        self.calls_in_flight = asyncio.Event()
        self._epoch = 0
        self._batch = 0
        self._script = script
        self._is_due = False
        self._write(JobQueued(kind=kind, owner="ann", input=_raw(given)))

    # --- the log

    @property
    def types(self) -> list[str]:
        """The types of all events."""
        return [entry.type for entry in self.entries]

    @property
    def events(self) -> list[tuple[str, dict[str, Any]]]:
        """Every event's type and content."""
        return self.read(self.entries)

    @staticmethod
    def read(entries: Sequence[Entry]) -> list[tuple[str, dict[str, Any]]]:
        """Every entry's type and content."""
        return [(entry.type, json.loads(entry.data)) for entry in entries]

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The contents of all events of one type."""
        return [content for found, content in self.events if found == kind]

    @property
    def result(self) -> Any:
        """The result of a job that completed."""
        assert self.status == "completed", (self.status, self.events[-1])
        return self.events[-1][1]["result"]

    @property
    def error(self) -> dict[str, Any]:
        """The error of a job that failed."""
        assert self.status == "failed", (self.status, self.events[-1])
        error: dict[str, Any] = self.events[-1][1]["error"]
        return error

    def load(self, entries: Sequence[Entry]) -> None:
        """Take over a log, or a part of one, whose worker was lost behind it."""
        self.entries = list(entries)
        self._epoch = self.entries[-1].cursor.epoch
        self.status = "queued"
        self.inbox = sum(kind in {"signal.received", "timer.fired", "child.ended"} for kind in self.types)
        self.attempt = 1 + self.types.count("job.retrying")
        fired = {content["key"] for content in self.of("timer.fired")}
        self.timers = {
            content["key"]: content["delay_ms"]
            for content in self.of("timer.set")
            if content["key"] not in fired and not content.get("in_worker")
        }
        self.children = [content["job"] for content in self.of("child.spawned")]
        if self.types[-1] not in TERMINAL and "job.started" in self.types:
            self._write(JobLost(worker="before", crashes=1))

    def cut(self, length: int) -> None:
        """Keep the first events only: what came behind was never written, and its worker is lost."""
        self.load(self.entries[:length])

    # --- others

    def signal(self, name: str, payload: Any = None) -> None:
        """Somebody sends a signal."""
        self._from_outside(SignalReceived(name=name, payload=payload, key=str(self.inbox)), "waiting")

    def fire(self, key: str = "") -> None:
        """A timer comes due: the one named, or the earliest."""
        key = key or min(self.timers, key=lambda known: (self.timers[known], known))
        del self.timers[key]
        self._from_outside(TimerFired(key=key), "waiting", "scheduled")

    def end_child(self, job_id: str, result: Any = None, status: str = "completed") -> None:
        """A child ends."""
        self.children.remove(job_id)
        self._from_outside(ChildEnded(job=job_id, status=status, result=result), "waiting")

    def _from_outside(self, event: Event, *wakes: str) -> None:
        self._write(event)
        self.inbox += 1
        if self.status in wakes:
            self._write(JobRequeued(why="outside"))
            self.status = "queued"

    # --- running

    async def run(self, *, meanwhile: Callable[[], None] | None = None, turns: int = 0) -> str:
        """Run the job until it ends or is parked; its status.

        `meanwhile` is called so many turns of the loop after its code has set `calls_in_flight`.
        """
        assert self.status == "queued", self.status
        execution, committer = self._lease()
        task = asyncio.create_task(execution.run())
        commits = asyncio.create_task(committer.run())
        try:
            if meanwhile is not None:
                await self.calls_in_flight.wait()
                for _ in range(turns):
                    await asyncio.sleep(0)
                meanwhile()
                execution.journal.note(self.inbox, "")
            await asyncio.wait_for(task, 60)
        finally:
            commits.cancel()
            await asyncio.gather(commits, return_exceptions=True)
        assert self.status != "running", f"the run gave nothing back: {self.events[-3:]}"
        return self.status

    async def finish(self, **answers: Any) -> str:
        """Run to the end: timers fire, children end with their id, and signals are sent as `answers` says.

        A signal that is waited for and not in `answers` never comes.
        """
        for _ in range(100):
            await self.run()
            if self.status in {"completed", "failed", "cancelled"}:
                return self.status
            self._let_something_happen(answers)
        raise AssertionError(f"it never ends: {self.types[-12:]}")

    def _let_something_happen(self, answers: dict[str, Any]) -> None:
        if self.status == "queued":
            return
        if self._is_due:
            self._write(JobRequeued(why="timer"))
            self.status, self._is_due = "queued", False
            return
        kind, _, name = self.of("job.waiting")[-1]["for"].partition(":")
        if kind == "child":
            self.end_child(name, result=name)
        elif kind == "approval" and "approval" in answers:
            self.signal("approval", {"decision": answers["approval"], "key": name})
        elif kind == "signal" and name in answers:
            self.signal(name, answers[name])
        else:
            self.fire()

    def _lease(self) -> tuple[Execution, Committer]:
        self._epoch, self._batch, self.status = self._epoch + 1, 0, "running"
        self._write(JobStarted(attempt=self.attempt, worker="w"))
        lease = Lease(
            self.job_id,
            self._epoch,
            len(self.entries),
            self.attempt,
            self.inbox,
            crashes=0,
            ms_left=-1,
            kind=self.kind,
            owner="ann",
            queue="default",
            queued=b"",
        )
        committer = Committer(self, 0, self.settings)  # type: ignore[arg-type]
        store = SimpleNamespace(log=self, artifacts=self, jobs=self, permits=self)
        services = Services(
            store,  # type: ignore[arg-type]
            self.app,
            self.settings,
            self,  # type: ignore[arg-type]
            Clock(lambda: 0),
            {},
            lambda: False,
            set(),
        )
        return Execution(lease, services, committer), committer

    # --- what the store is asked

    async def append(self, _partition: int, batches: list[Batch], *, always: bool = False) -> list[Answer]:
        """As the script: refuse, or write and let the outcome be."""
        await asyncio.sleep(0)
        return [self._append(batch) for batch in batches]

    def _append(self, batch: Batch) -> Answer:
        if batch.epoch != self._epoch or self.status != "running":
            return Answer("fenced")
        if batch.outcome in PARKED and batch.seen != self.inbox:
            return Answer("inbox", inbox=self.inbox)
        assert batch.number == self._batch + 1
        self._batch = batch.number
        for kind, data in batch.events:
            self._put(kind, data)
        for key, delay in json.loads(batch.timers or b"{}").items():
            if delay < 0:
                self.timers.pop(key, None)
            else:
                self.timers.setdefault(key, delay)
        assert batch.outcome != "sleep" or self.timers, "it sleeps without a timer"
        if batch.outcome == "retry":
            self.attempt, self._is_due = self.attempt + 1, True
        if batch.outcome == "yield":
            self._write(JobRequeued(why="yield"))
        if batch.outcome != "keep":
            self.status = PARKED.get(batch.outcome, batch.outcome)
        return Answer("ok", len(self.entries), self.inbox)

    async def pages(self, _job_id: str, after: Cursor = START) -> AsyncIterator[Page]:
        """The log behind a cursor, in pages of three."""
        found = after == START or any(entry.cursor == after for entry in self.entries)
        rest = self.entries[after.seq :] if found else self.entries
        last = self.entries[-1].cursor
        for start in range(0, max(1, len(rest)), 3):
            yield Page(found, self.status, last, rest[start : start + 3])

    async def put(self, job_id: str, _epoch: int, name: str, _media_type: str, content: bytes) -> None:
        """Keep an artifact."""
        await asyncio.sleep(0)
        self.artifacts[job_id, name] = content

    async def get(self, job_id: str, name: str) -> tuple[str, bytes]:
        """An artifact's bytes."""
        if (job_id, name) not in self.artifacts:
            raise ArtifactNotFound(name)
        return "", self.artifacts[job_id, name]

    async def submit(self, submission: Any) -> None:
        """Take a child in."""
        await asyncio.sleep(0)
        if submission.job_id not in self.children:
            self.children.append(submission.job_id)

    def resolve(self, model: str, _owner: str = "") -> tuple[Desk, str]:
        """The provider of any model: the desk itself."""
        return self, model

    async def stream(self, request: ModelRequest) -> AsyncGenerator[Piece, None]:
        """What the script says, a word at a time."""
        assert self._script is not None
        answer = self._script(request)
        for word in answer.text.split(" "):
            await asyncio.sleep(0)
            yield TextPiece(word)
        yield answer

    def _write(self, event: Event) -> None:
        self._put(event.type, encode_event(event))

    def _put(self, kind: str, data: bytes) -> None:
        self.entries.append(Entry(Cursor(len(self.entries) + 1, self._epoch), kind, data))


def _raw(given: Any) -> Any:
    import msgspec

    return msgspec.Raw(encode_json(given))
