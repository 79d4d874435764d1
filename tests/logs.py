"""Random logs of jobs: any events that may follow one another, of names and sizes that make them meet."""

from __future__ import annotations

from random import Random

import msgspec

from streamjobs import events as ev
from streamjobs.cursor import Cursor
from streamjobs.events import ErrorInfo, Event, Usage
from streamjobs.segments import Entry

ERROR = ErrorInfo("provider_error", "503", True)


class LogWriter:
    """Writes a log of a job that runs, dies, is retried and paused, and says all kinds of things."""

    def __init__(self, seed: int | str) -> None:
        self.random = Random(seed)
        self.status = "queued"
        self.turn = 0
        self.attempt = 1
        self.events: list[Event] = [
            ev.JobQueued(ts=1, kind="chat", owner="anna", input=msgspec.Raw(b'{"prompt":"Hi"}'))
        ]

    def log(self, length: int, *, ends: bool = False) -> list[Event]:
        while len(self.events) < length:
            self.step()
        if ends:
            self.start()
            self.events.append(ev.JobCompleted(ts=self.now, result=msgspec.Raw(b'{"text":"x"}')))
        return self.events

    @property
    def now(self) -> int:
        return 10 * len(self.events)

    def add(self, *events: Event) -> None:
        self.events.extend(msgspec.structs.replace(event, ts=self.now) for event in events)

    def start(self) -> None:
        if self.status != "running":
            self.add(ev.JobStarted(attempt=1, worker="w"))
            self.status = "running"

    def step(self) -> None:
        if self.status == "queued":
            self.start()
        if self.random.random() < 0.04:
            self.move()
        else:
            self.add(self.random.choice([self.said, self.said, self.said, self.told, self.done])())

    def move(self) -> None:
        """Away from the worker and back to the queue."""
        by = self.random.choice(["lost", "retry", "pause", "wait"])
        moves: dict[str, tuple[Event, ...]] = {
            "lost": (ev.JobLost(worker="w", crashes=1),),
            "retry": (ev.JobRetrying(attempt=1, error=ERROR, delay_ms=5), ev.JobRequeued(why="timer")),
            "pause": (ev.JobPaused(by="anna"), ev.JobResumed(by="anna")),
            "wait": (
                ev.ApprovalRequested(key=self.name(), subject="s", message="may I?", detail={"a": 1}),
                ev.JobWaiting(waits_for="approval"),
                ev.SignalReceived(name="approval", payload={"approved": True}, by="bob"),
                ev.JobRequeued(why="signal"),
            ),
        }
        self.add(*moves[by])
        self.status = "queued"

    def said(self) -> Event:
        """What a model says."""
        roll = self.random.randrange(12)
        if self.turn == 0 or roll == 0:
            self.turn, self.attempt = self.random.choice([self.turn + 1, max(1, self.turn)]), 1
            return ev.TurnStarted(turn=self.turn, model="m")
        if roll == 1:
            self.attempt += 1
            return ev.TurnRestarted(turn=self.turn, attempt=self.attempt, supersedes_from=2)
        if roll == 2:
            return ev.TurnCompleted(
                turn=self.turn, attempt=self.attempt, finish_reason="stop", usage=Usage(1, 2)
            )
        attempt = self.attempt if roll > 3 else self.random.randint(1, 3)
        kind = ev.ReasoningDelta if roll > 9 else ev.TextDelta
        return kind(turn=self.turn, attempt=attempt, text=self.word())

    def told(self) -> Event:
        """What a job reports."""
        return self.random.choice([
            ev.JobLog(level="info", message=self.word(), data=self.value()),
            ev.JobProgress(percent=float(self.random.randint(0, 100)), message="m"),
            ev.ArtifactCreated(name=self.name(), media_type="t", size=1, where="w"),
            ev.ChildSpawned(job=self.name(), kind="k"),
            ev.ChildEnded(job=self.name(), status="failed", error=ERROR),
            ev.TimerFired(key=f"approval:{self.name()}"),
            ev.Unknown(),
        ])  # fmt: skip

    def done(self) -> Event:
        """Tool calls and steps."""
        name = self.name()
        return self.random.choice([
            ev.ToolCalled(call_id=name, tool="t", turn=self.turn, arguments=self.value()),
            ev.ToolCalled(call_id=name, tool="t", turn=self.turn, arguments=self.value()),
            ev.ToolStarted(call_id=name, idempotency_key="k", effect="once"),
            ev.ToolCompleted(call_id=name, output=self.value(), ms=3),
            ev.ToolFailed(call_id=name, error=ERROR),
            ev.StepStarted(key=name, name="n"),
            ev.StepCompleted(key=name, output=self.value(), ms=1),
            ev.StepFailed(key=name, error=ERROR, will_retry=True),
            ev.StepUnknown(key=name, message="m"),
        ])  # fmt: skip

    def name(self) -> str:
        return f"n{self.random.randrange(9)}"

    def word(self) -> str:
        return self.random.choice(["a", "be ", "Zürich ", "𝄞", "x" * 40, ""])

    def value(self) -> object:
        return self.random.choice([None, 1, 1.5, "s", "y" * 60, ["z" * 60], {"k": [1, {"l": None}]}])


def random_log(seed: int | str, length: int, *, ends: bool = False) -> list[Event]:
    """The events of this seed: about `length`, an end comes on top."""
    return LogWriter(seed).log(length, ends=ends)


def stored(events: list[Event], epoch: int = 7) -> list[Entry]:
    """Events as a log has them; each life of the job has a later epoch."""
    entries: list[Entry] = []
    for seq, event in enumerate(events, 1):
        epoch += isinstance(event, ev.JobStarted)
        entries.append(Entry(Cursor(seq, epoch), type(event).type or "x.note", ev.encode_event(event)))
    return entries
