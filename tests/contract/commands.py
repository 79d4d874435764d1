"""The steps of a duel's program.

Rule: a command names jobs by slot and leases by index, so that any part of a program is a program.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from streamjobs import segments
from streamjobs.cursor import Cursor
from streamjobs.store.scripts import flatten
from streamjobs.store.work import Batch
from tests.contract.callers import LEASE, submit_row
from tests.contract.keyspace import PREFIX, spliced
from tests.model import Kept, NewJob, Piece

if TYPE_CHECKING:
    from tests.contract.duel import Duel

OWNERS = ("ann", "bob")
QUEUES = ("fast", "slow")
WORKERS = ("w1", "w2")
WEIGHTS = (2, 1, 1)
BY = {"by": "ann", "reason": ""}
SLOT_IDS = [f"j0-{'a' * 25}{letter}" for letter in "abcdefghijklmnopqrstuvwxyz234567"]


class Command(Protocol):
    """One step of a program."""

    def play(self, duel: Duel) -> None: ...


@dataclass(frozen=True)
class Submission:
    """A job to be, by small numbers; 0 is no key, parent -1 no parent."""

    slot: int = 0
    owner: int = 0
    queue: int = 0
    priority: str = "default"
    delay: int = 0
    start_timeout: int = 0
    timeout: int = 0
    ckey: int = 0
    idem: int = 0
    body: int = 0
    parent: int = -1
    kind: str = "work"

    def row(self) -> NewJob:
        owner = OWNERS[self.owner]
        return NewJob(
            SLOT_IDS[self.slot], owner, QUEUES[self.queue], self.priority, self.kind,
            delay=self.delay, start_timeout=self.start_timeout, timeout=self.timeout,
            ckey=f"{owner}-key{self.ckey}" if self.ckey else "",
            idem=f"{owner}-idem{self.idem}" if self.idem else "",
            body=f"body{self.body}" if self.idem else "",
            parent=SLOT_IDS[self.parent] if self.parent >= 0 else "",
            fields={"kind": self.kind, "owner": owner},
        )  # fmt: skip


@dataclass(frozen=True)
class Submit:
    """Submit jobs in one call."""

    jobs: tuple[Submission, ...]

    def play(self, duel: Duel) -> None:
        rows = [job.row() for job in self.jobs]
        arguments = flatten(submit_row(row) for row in rows)
        duel.compare("submit", lambda: duel.model.submit(rows), len(rows), *arguments)


@dataclass(frozen=True)
class Take:
    """Take jobs as a worker; `again` sends the worker's last number once more."""

    worker: int = 0
    wanted: int = 2
    queues: tuple[str, ...] = QUEUES
    again: bool = False

    def play(self, duel: Duel) -> None:
        worker = WORKERS[self.worker]
        duel.numbers[worker] += not self.again
        number = duel.numbers[worker]
        duel.compare(
            "take", lambda: duel.model.take(worker, number, self.wanted, WEIGHTS, self.queues),
            worker, number, self.wanted, ",".join(map(str, WEIGHTS)), *self.queues,
        )  # fmt: skip


EVENTS = {
    "delta": ("text.delta", {"turn": 1, "text": "word"}),
    "long": ("text.delta", {"turn": 1, "text": "word " * 20}),
    "step": ("step.completed", {"key": "s", "output": 1}),
    "call": ("tool.started", {"call_id": "c", "idempotency_key": "k", "effect": "once"}),
    "tool": ("tool.completed", {"call_id": "c", "output": 1}),
    "progress": ("job.progress", {"percent": 50}),
    "log": ("job.log", {"message": "x" * 100}),
    "note": ("x.note", {"a": {"b": [1, 2]}}),
    "completed": ("job.completed", {"result": {"answer": 42}}),
    "failed": ("job.failed", {"error": {"code": "boom", "message": "", "retryable": False}}),
    "cancelled": ("job.cancelled", {"by": ""}),
}
TIMERS = {
    "": b"", "soon": b'{"a":100,"b":15000}', "late": b'{"b":20000,"c":90000}', "none": b"{}",
    "back": b'{"a":-1,"b":-1}', "instead": b'{"b":-1,"c":-1,"d":4000}',
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A batch for a lease, by index from the newest; `number` is relative to the one that is expected.

    `sent` is the batch this lease sent last, once more. The terminal event comes with the outcome.
    """

    lease: int = 0
    stale: bool = False
    sent: bool = False
    number: int = 0
    events: tuple[str, ...] = ()
    outcome: str = "keep"
    unread: int = 0
    delay: int = 0
    timers: str = ""

    def batch(self, duel: Duel) -> Batch:
        job_id, epoch = duel_lease(duel, self.lease, self.stale)
        if self.sent and (job_id, epoch) in duel.sent:
            return duel.sent[job_id, epoch]
        job = duel.model.jobs.get(job_id)
        ends = (self.outcome,) if self.outcome in {"completed", "failed"} else ()
        events = [(EVENTS[name][0], duel.model.content(**EVENTS[name][1])) for name in (*self.events, *ends)]
        batch = Batch(
            job_id, epoch, (job.batch if job else 0) + 1 + self.number, events, outcome=self.outcome,  # type: ignore[arg-type]
            seen=(job.inbox if job else 0) - self.unread, delay_ms=self.delay, timers=TIMERS[self.timers],
        )  # fmt: skip
        duel.sent[job_id, epoch] = batch
        return batch


def duel_lease(duel: Duel, index: int, stale: bool) -> tuple[str, int]:
    """A lease that holds, or any that was ever given; a made-up one where there is none."""
    holding = [lease for lease in duel.leases if duel.model.holds(*lease)]
    leases = (duel.leases if stale or not holding else holding) or [(SLOT_IDS[31], 1)]
    return leases[-1 - index % len(leases)]


@dataclass(frozen=True)
class Append:
    """Append batches in one call; batches are frozen when the call is made."""

    rows: tuple[Row, ...]
    always: bool = False

    def play(self, duel: Duel) -> None:
        batches = [row.batch(duel) for row in self.rows]
        arguments = flatten(batch.row() for batch in batches)
        script = "always" if self.always else "append"
        duel.compare(script, lambda: duel.model.append(batches), len(batches), *arguments)


@dataclass(frozen=True)
class Renew:
    """Renew some leases, also ones that are lost."""

    leases: tuple[int, ...] = (0,)
    stale: bool = False

    def play(self, duel: Duel) -> None:
        pairs = [duel_lease(duel, index, self.stale) for index in self.leases]
        duel.compare("renew", lambda: duel.model.renew(pairs), len(pairs), *flatten(pairs))


@dataclass(frozen=True)
class Keep:
    """Store an artifact under a lease."""

    lease: int = 0
    stale: bool = False
    name: str = "a"
    size: int = 1

    def play(self, duel: Duel) -> None:
        job_id, epoch = duel_lease(duel, self.lease, self.stale)
        kept, most = Kept(self.name, "text/plain", b"x" * self.size), (20, 30)
        duel.compare(
            "artifact", lambda: duel.model.artifact(job_id, epoch, kept, most), job_id, epoch, *kept, *most
        )


@dataclass(frozen=True)
class Seal:
    """Seal what is not sealed of a job but the last `leave` events, `size` to a segment.

    `known` is what the sealer read: `now`, or `before` what was sealed last; `hole` leaves an event out at
    the beginning, `foreign` names an end that is of another history, `empty` has no segments.
    """

    slot: int = 0
    size: int = 3
    leave: int = 0
    snapshot: bool = False
    known: str = "now"
    flaw: str = ""

    def play(self, duel: Duel) -> None:
        job_id = SLOT_IDS[self.slot]
        job = duel.model.jobs.get(job_id)
        sealed, snap = (job.sealed, job.snap) if job else ("", "")
        if self.known == "before" and job:
            sealed = job.segments[-2].last if len(job.segments) > 1 else ""
            snap = ""
        pieces = self.pieces(job.stream[: len(job.stream) - self.leave]) if job else []
        if self.flaw == "again" and job:
            pieces = job.segments[-1:]
        snapshot = b"a fold at %d \xff" % (pieces[-1].last_seq if pieces else 0) if self.snapshot else b""
        rows = flatten((piece.line, piece.blob) for piece in pieces)
        duel.compare(
            "seal", lambda: duel.model.seal(job_id, sealed, snap, snapshot, pieces),
            job_id, sealed, snap, snapshot, len(pieces), *rows,
        )  # fmt: skip

    def pieces(self, stream: list[Any]) -> list[Piece]:
        entries = [segments.Entry(Cursor(e.seq, e.epoch), e.type, e.content) for e in stream]
        entries = entries[1:] if self.flaw == "hole" else entries
        entries = [] if self.flaw == "empty" else entries
        parts = [entries[at : at + self.size] for at in range(0, len(entries), self.size)]
        if self.flaw == "gap" and len(parts) > 2:
            del parts[1]
        pieces = [
            Piece(*map_described(segments.describe(part)), segments.encode(part)) for part in parts if part
        ]
        if self.flaw == "foreign" and pieces:
            seq = pieces[-1].last_seq
            pieces[-1] = pieces[-1]._replace(last=f"{seq}-12345")
        return pieces


def map_described(segment: segments.Segment) -> tuple[int, str, int]:
    return segment.first, str(segment.last), segment.size


@dataclass(frozen=True)
class Permit:
    """Ask for one of two permits, each of which comes back after seven seconds and a third."""

    name: str = "a"
    patience: int = 0

    def play(self, duel: Duel) -> None:
        arguments: Any = self.name, 7333.333333, 2, self.patience
        duel.compare("permit", lambda: duel.model.permit(*arguments), *arguments)


@dataclass(frozen=True)
class Strike:
    """Stop something, or let it go on."""

    act: str = "set"
    what: str = "kind:work"

    def play(self, duel: Duel) -> None:
        arguments = self.act, self.what
        duel.compare("strike", lambda: duel.model.strike(*arguments, BY), *arguments, spliced(BY))


@dataclass(frozen=True)
class Rerun:
    """Note which job runs another one again."""

    slot: int = 0
    new: int = 1

    def play(self, duel: Duel) -> None:
        ids = SLOT_IDS[self.slot], SLOT_IDS[self.new]
        duel.compare("rerun", lambda: duel.model.run_again(*ids), *ids)


@dataclass(frozen=True)
class Wake:
    """Sweep once."""

    limit: int = 100

    def play(self, duel: Duel) -> None:
        duel.compare("wake", lambda: duel.model.wake(self.limit), self.limit)


@dataclass(frozen=True)
class Cancel:
    """Cancel a job and its children, in the order in which Redis knows them."""

    slot: int

    def play(self, duel: Duel) -> None:
        for job in duel.model.jobs.values():
            if len(job.children) > 1:
                key = f"{PREFIX}job:{job.id}:children"
                members: Any = duel.client.eval("return redis.call('SMEMBERS', KEYS[1])", 1, key)
                job.children.sort(key=[member.decode() for member in members].index)
        job_id = SLOT_IDS[self.slot]
        duel.compare("cancel", lambda: duel.model.cancel(job_id, BY), job_id, spliced(BY))


@dataclass(frozen=True)
class Ask:
    """Signal, pause or resume a job, with a dedupe key."""

    script: str
    slot: int
    key: int = 0

    def play(self, duel: Duel) -> None:
        job_id, key = SLOT_IDS[self.slot], f"{self.script}{self.key}"
        fields = {"name": "go", "payload": 1, "key": key} if self.script == "signal" else BY
        ask = getattr(duel.model, self.script)
        duel.compare(self.script, lambda: ask(job_id, key, fields), job_id, key, spliced(fields))


@dataclass(frozen=True)
class Again:
    """Send the last call once more: its reply was lost."""

    def play(self, duel: Duel) -> None:
        duel.last()


@dataclass(frozen=True)
class Advance:
    """Let time pass, or jump; back too."""

    by: int

    def play(self, duel: Duel) -> None:
        duel.set_clock(duel.model.now + self.by)


@dataclass(frozen=True)
class Idle:
    """Let time pass while only the sweep works: leases run out, timers come due."""

    leases: int = 1
    parts: int = field(default=3, repr=False)

    def play(self, duel: Duel) -> None:
        for _ in range(self.leases * self.parts):
            Advance(LEASE // self.parts).play(duel)
            Wake().play(duel)
