"""The scripts as a specification: naive Python over plain objects, the clock passed in.

Rule 1: a job knows where it is; leases, timers, held lists, running sets and counts are views of the jobs.
Rule 2: written from the design, not from the Lua; where the two differ, one of them is wrong.
Rule 3: nothing here is fast, stored twice, or clever.

Each script's method answers what the script answers, as lists of str, int and bytes.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, NamedTuple

from streamjobs.store.scripts import Limits
from streamjobs.store.work import Batch

TERMINAL = {"job.completed": "completed", "job.failed": "failed", "job.cancelled": "cancelled"}
ENDED = frozenset(TERMINAL.values())
DELTAS = frozenset({"text.delta", "reasoning.delta"})
PROGRESS = frozenset({"turn.completed", "tool.completed", "step.completed"})
PARKING = frozenset({"retry", "sleep", "wait", "yield"})
CLASSES = ("high", "default", "low")
RANKS = {"resume": 0, "high": 1, "default": 2, "low": 3}


def wire(fields: dict[str, Any]) -> bytes:
    """An event's content as it is stored."""
    return json.dumps(fields, separators=(",", ":")).encode()


class Entry(NamedTuple):
    """One event of a log."""

    seq: int
    epoch: int
    type: str
    content: bytes

    @property
    def id(self) -> str:
        return f"{self.seq}-{self.epoch}"


class Ticket(NamedTuple):
    """A job's entry in a work stream; stale once the job names another one, or none."""

    number: int
    job: str
    priority: str


class Record(NamedTuple):
    """What an Idempotency-Key stands for."""

    job: str
    body: str
    expiry: int | None


class Kept(NamedTuple):
    """An artifact."""

    name: str
    media_type: str
    content: bytes


class Piece(NamedTuple):
    """A segment as its writer describes it: seq of its first event, id of its last, and what it holds."""

    first: int
    last: str
    size: int
    blob: bytes

    @property
    def last_seq(self) -> int:
        return int(self.last.partition("-")[0])

    @property
    def line(self) -> str:
        return f"{self.first} {self.last} {self.size}"


class Filed(NamedTuple):
    """A worker's last take, for its resend."""

    number: int
    leases: list[tuple[str, int]]
    until: int


@dataclass(frozen=True)
class NewJob:
    """One row of submit; durations in ms, 0 for none; `fields` is `job.queued` without its ts."""

    id: str
    owner: str = "ann"
    queue: str = "fast"
    priority: str = "default"
    kind: str = "work"
    delay: int = 0
    start_timeout: int = 0
    timeout: int = 0
    ckey: str = ""
    idem: str = ""
    body: str = ""
    parent: str = ""
    tick: str = ""
    fields: dict[str, Any] = field(default_factory=lambda: {"kind": "work"})


@dataclass
class Job:
    """A job and where it is: one of `lease_until`, `ticket`, `held` and the parked statuses applies."""

    id: str
    owner: str
    kind: str
    queue: str
    priority: str
    created: int
    timeout: int = 0
    ckey: str = ""
    idem: str = ""
    parent: str = ""
    depth: int = 0

    log: list[Entry] = field(default_factory=list)
    news: list[Entry] = field(default_factory=list)
    status: str = ""
    attempt: int = 1
    inbox: int = 0
    fed: int = 0

    epoch: int = 0
    worker: str = ""
    lease_until: int | None = None
    batch: int = 0
    commit: tuple[int, int, int, int] | None = None
    crashes: int = 0
    is_lost: bool = False
    has_started: bool = False

    ticket: Ticket | None = None
    held: str = ""
    order: int | None = None
    is_unpaid: bool = False
    since: int | None = None

    wake: int | None = None
    timers: dict[str, int] = field(default_factory=dict)
    deadline: int | None = None
    start_by: int | None = None

    cancelled_at: int | None = None
    cancel_fields: dict[str, str] = field(default_factory=lambda: {"by": "", "reason": ""})
    late: int = 0
    pause: dict[str, str] | None = None

    children: list[str] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    artifacts: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    segments: list[Piece] = field(default_factory=list)
    snap: str = ""
    snapshot: bytes = b""
    ended: int | None = None
    error: str = ""
    rerun: str = ""
    expiry: int | None = None

    @property
    def is_running(self) -> bool:
        return self.lease_until is not None

    @property
    def is_ended(self) -> bool:
        return self.status in ENDED

    @property
    def seq(self) -> int:
        return len(self.log)

    @property
    def size(self) -> int:
        return sum(len(entry.content) for entry in self.log)

    @property
    def sealed(self) -> str:
        return self.segments[-1].last if self.segments else ""

    @property
    def sealed_seq(self) -> int:
        return self.segments[-1].last_seq if self.segments else 0

    @property
    def stream(self) -> list[Entry]:
        """What of the log is not in segments."""
        return self.log[self.sealed_seq :]

    @property
    def asked(self) -> str:
        """What its worker is asked to do."""
        return "cancel" if self.cancelled_at is not None else "pause" if self.pause is not None else ""

    @property
    def ticket_class(self) -> str:
        """Jobs that ran before do not queue behind the backlog."""
        return "resume" if self.has_started else self.priority

    @property
    def held_list(self) -> str:
        why = {"concurrency_key": f"|{self.ckey}", "struck": f"|kind:{self.kind}"}.get(self.held, "")
        return f"{self.queue}|{self.owner}{why}"

    def due(self, lease: int) -> int | None:
        """The earliest instant at which time does something to it.

        A running job is ended by its worker; the sweep steps in one lease later.
        """
        deadline = self.deadline
        if deadline is not None and self.is_running:
            deadline += lease
        instants = [self.wake, deadline, self.start_by, *self.timers.values()]
        return min((at for at in instants if at is not None), default=None)


class Model:
    """One partition. `now` is Redis's clock in ms: set it before each call."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.now = 0
        self.jobs: dict[str, Job] = {}
        self.work: dict[tuple[str, str], list[Ticket]] = defaultdict(list)
        self.looked_at: dict[str, int] = {}
        self.records: dict[str, Record] = {}
        self.filed: dict[str, Filed] = {}
        self.dead: dict[str, int] = {}
        self.strikes: dict[str, bytes] = {}
        self.buckets: dict[str, tuple[float, int]] = {}
        self.last_sweep: int | None = None
        self.grace = 0
        self.feed: list[tuple[str, int, str]] = []
        self.owner_feeds: dict[str, list[tuple[str, str, str, bytes]]] = defaultdict(list)
        self.published: list[tuple[str, bytes]] = []
        self.hinted: set[str] = set()
        self.tickets_made = 0
        self.holds_made = 0

    # --- views -------------------------------------------------------------------------------------------

    def live_jobs(self) -> list[Job]:
        return [job for job in self.jobs.values() if not job.is_ended]

    def leases(self) -> dict[str, int]:
        return {job.id: job.lease_until for job in self.jobs.values() if job.lease_until is not None}

    def timers(self) -> dict[str, int]:
        due = {job.id: job.due(self.limits.lease) for job in self.live_jobs()}
        return {job_id: at for job_id, at in due.items() if at is not None}

    def running(self, owner: str) -> set[str]:
        return {job.id for job in self.jobs.values() if job.is_running and job.owner == owner}

    def tickets(self, queue: str, owner: str) -> int:
        return sum(1 for job in self.jobs.values() if job.ticket and (job.queue, job.owner) == (queue, owner))

    def held_jobs(self, name: str) -> list[Job]:
        held = [job for job in self.jobs.values() if job.held and job.held_list == name]
        return sorted(held, key=lambda job: (job.order, job.id))

    def key_holder(self, ckey: str) -> Job | None:
        """A concurrency key is its job's from first start to the end."""
        return next((job for job in self.live_jobs() if job.ckey == ckey and job.has_started), None)

    def expired(self) -> tuple[list[Job], list[str], list[str]]:
        """Ended jobs, idempotency records and filed takes whose time has passed."""
        jobs = [job for job in self.jobs.values() if job.expiry is not None and job.expiry <= self.now]
        records = [key for key, r in self.records.items() if r.expiry is not None and r.expiry <= self.now]
        takes = [worker for worker, filed in self.filed.items() if filed.until <= self.now]
        return jobs, records, takes

    def forget_expired(self) -> None:
        jobs, records, takes = self.expired()
        for job in jobs:
            del self.jobs[job.id]
        for key in records:
            del self.records[key]
        for worker in takes:
            del self.filed[worker]

    # --- events ------------------------------------------------------------------------------------------

    def content(self, **fields: Any) -> bytes:
        return wire({"ts": self.now, **fields})

    def bystander(self, job: Job) -> int:
        """The second half of ids of events that are not the lease holder's."""
        return max(self.now, job.epoch)

    def write(self, job: Job, epoch: int, kind: str, content: bytes) -> None:
        entry = Entry(job.seq + 1, epoch, kind, content)
        job.log.append(entry)
        job.news.append(entry)
        if kind in DELTAS:
            job.late += job.cancelled_at is not None
        elif kind.startswith("job.") and kind != "job.log":
            shown = content if len(content) <= self.limits.owner_feed_bytes else b""
            self.owner_feeds[job.owner].append((job.id, entry.id, kind, shown))
            self.hinted.add(job.owner)

    def say(self, job: Job, kind: str, /, **fields: Any) -> None:
        """Write an event that is the script's own."""
        self.write(job, self.bystander(job), kind, self.content(**fields))

    def announce(self, job: Job) -> None:
        """Tell viewers all that was written, and projections unless it was a few deltas only."""
        news, job.news = job.news, []
        if not news:
            return
        facts = [entry for entry in news if entry.type not in DELTAS]
        job.fed += sum(len(entry.content) for entry in news if entry.type in DELTAS)
        if facts or job.fed >= self.limits.feed_bytes:
            self.feed.append((job.id, job.seq, facts[-1].type if facts else "text.delta"))
            job.fed = 0
        lines = [b"%s %s %s" % (entry.id.encode(), entry.type.encode(), entry.content) for entry in news]
        self.published.append((f"live:{job.id}", b"\n".join(lines)))

    def count_inbox(self, job: Job) -> None:
        job.inbox += 1
        if job.is_running:
            self.published.append(("inbox", job.id.encode()))

    # --- places ------------------------------------------------------------------------------------------

    def leave(self, job: Job) -> None:
        if job.held:
            self.unhold(job)
        job.lease_until = job.ticket = job.wake = None

    def park(self, job: Job, status: str) -> None:
        self.leave(job)
        job.status = status

    def enqueue(self, job: Job) -> None:
        self.tickets_made += 1
        job.ticket = Ticket(self.tickets_made, job.id, job.ticket_class)
        self.work[job.queue, job.ticket_class].append(job.ticket)
        self.mark_queued(job)

    def requeue(self, job: Job, why: str) -> None:
        self.leave(job)
        self.say(job, "job.requeued", why=why)
        self.enqueue(job)

    def mark_queued(self, job: Job) -> None:
        """Its wait counts from when it began, however often it is held and released."""
        if job.status != "queued":
            job.since = self.now
        job.status = "queued"

    def hold(self, job: Job, reason: str) -> None:
        """Wait in the owner's list of that queue, by priority, then in the order of coming."""
        if job.order is None:
            self.holds_made += 1
            job.order = RANKS[job.ticket_class] * 10**12 + self.holds_made + job.is_unpaid * 5 * 10**11
        job.held = reason
        self.looked_at.setdefault(job.held_list, self.now)
        self.mark_queued(job)

    def unhold(self, job: Job) -> None:
        name, job.held = job.held_list, ""
        if not self.held_jobs(name):
            del self.looked_at[name]

    def is_full(self, owner: str, tickets: int = 0) -> bool:
        limit = self.limits.owner_limit
        return limit > 0 and len(self.running(owner)) + tickets >= limit

    def obstacle(self, job: Job) -> str:
        """What keeps this job from starting now, if anything."""
        if f"kind:{job.kind}" in self.strikes:
            return "struck"
        if self.is_full(job.owner) or (job.is_unpaid and not self.has_token(job.owner)):
            return "owner_limit"
        holder = self.key_holder(job.ckey) if job.ckey else None
        return "concurrency_key" if holder and holder is not job else ""

    def set_aside(self, job: Job, reason: str) -> None:
        self.leave(job)
        self.say(job, "job.requeued", why="held", held=reason)
        self.hold(job, reason)
        self.announce(job)

    def release(self, name: str) -> bool:
        """Give the first job of a held list that may start its ticket back.

        One whose concurrency key is taken, or whose kind is struck meanwhile, waits out of the others' way.
        """
        queue, owner = name.split("|")[:2]
        if self.is_full(owner, self.tickets(queue, owner)):
            return False
        for job in self.held_jobs(name)[: self.limits.scan]:
            reason = self.obstacle(job)
            if not reason:
                self.pay(job)
                self.requeue(job, "released")
                self.announce(job)
                return True
            if reason == job.held:
                return False
            self.set_aside(job, reason)
        return False

    def offer(self, job: Job, *, with_key: bool = False) -> None:
        """Offer the place that this job left to one waiter (and one for its concurrency key)."""
        if with_key and job.ckey:
            self.release(f"{job.queue}|{job.owner}|{job.ckey}")
        self.release(f"{job.queue}|{job.owner}")

    # --- the end -----------------------------------------------------------------------------------------

    def finish(self, job: Job, epoch: int, kind: str, content: bytes) -> None:
        was_running = job.is_running
        self.write(job, epoch, kind, content)
        self.park(job, TERMINAL[kind])
        job.timers, job.deadline, job.start_by, job.pause, job.order = {}, None, None, None, None
        job.is_unpaid = False
        job.ended = self.now
        if kind == "job.failed":
            self.bury(job, json.loads(content)["error"]["code"])
        job.expiry = self.now + self.limits.retention
        self.announce(job)
        if job.idem:
            record = self.records[job.idem]
            until = max(job.expiry, job.created + self.limits.idempotency)
            self.records[job.idem] = record._replace(expiry=until)
        self.tell_parent(job, kind, json.loads(content))
        if was_running or job.ckey:
            self.offer(job, with_key=True)

    def bury(self, job: Job, code: str) -> None:
        job.error = code
        self.dead[job.id] = self.now
        for name in first_of(self.dead, len(self.dead) - self.limits.dead_cap):
            del self.dead[name]

    def finish_failed(self, job: Job, code: str, message: str) -> None:
        error = {"code": code, "message": message, "retryable": False}
        self.finish(job, self.bystander(job), "job.failed", self.content(error=error))

    def finish_cancelled(self, job: Job, epoch: int) -> None:
        asked = self.now if job.cancelled_at is None else job.cancelled_at
        took = max(0, self.now - asked)
        content = self.content(**job.cancel_fields, effective_ms=took, deltas_after=job.late)
        self.finish(job, epoch, "job.cancelled", content)

    def tell_parent(self, job: Job, kind: str, fields: dict[str, Any]) -> None:
        parent = self.jobs.get(job.parent)
        if parent is None or parent.is_ended:
            return
        name = {"job.completed": "result", "job.failed": "error"}.get(kind, "")
        outcome = {name: fields[name]} if name in fields else {}
        self.say(parent, "child.ended", job=job.id, status=job.status, **outcome)
        self.count_inbox(parent)
        if parent.status == "waiting":
            self.requeue(parent, "child")
        self.announce(parent)

    def park_by_wish(self, job: Job, epoch: int) -> bool:
        """Once a lease is given up, the wishes that came meanwhile go first."""
        if job.cancelled_at is not None:
            self.finish_cancelled(job, epoch)
            return True
        if job.pause is not None:
            self.say(job, "job.paused", **job.pause)
            job.pause = None
            self.park(job, "paused")
            return True
        return False

    # --- submit ------------------------------------------------------------------------------------------

    def submit(self, rows: Iterable[NewJob]) -> list[list[Any]]:
        return [self.submit_one(row) for row in rows]

    def submit_one(self, row: NewJob) -> list[Any]:
        record = self.records.get(row.idem) if row.idem else None
        if record and record.body != row.body:
            return ["mismatch", record.job]
        if record or row.id in self.jobs:
            return self.submitted("same", record.job if record else row.id)
        if not row.parent and self.is_crowded(row.owner, row.queue):
            return ["waiting", self.limits.owner_waiting]
        parent = self.jobs.get(row.parent)
        if row.parent and (refused := self.refused_child(parent, row.owner)):
            return refused
        job = Job(row.id, row.owner, row.kind, row.queue, row.priority, self.now)
        job.timeout, job.ckey, job.idem, job.parent = row.timeout, row.ckey, row.idem, row.parent
        job.depth = parent.depth + 1 if parent else 0
        self.jobs[job.id] = job
        self.place(job, row)
        self.announce(job)
        if row.idem:
            self.records[row.idem] = Record(row.id, row.body, None)
        if parent:
            parent.children.append(job.id)
        return self.submitted("ok", job.id)

    def submitted(self, verdict: str, job_id: str) -> list[Any]:
        job = self.jobs.get(job_id)
        return [verdict, job_id, job.log[0].id if job else "1-0"]

    def is_crowded(self, owner: str, queue: str) -> bool:
        waiting = self.tickets(queue, owner) + len(self.held_jobs(f"{queue}|{owner}"))
        return 0 < self.limits.owner_waiting <= waiting

    def refused_child(self, parent: Job | None, owner: str) -> list[Any]:
        if parent is None:
            return ["parent", "gone"]
        if parent.owner != owner:
            return ["parent", "foreign"]
        if parent.is_ended or parent.cancelled_at is not None:
            return ["parent", parent.status if parent.is_ended else "cancelled"]
        if parent.depth >= self.limits.max_depth:
            return ["depth", self.limits.max_depth]
        if len(parent.children) >= self.limits.max_children:
            return ["children", self.limits.max_children]
        return []

    def place(self, job: Job, row: NewJob) -> None:
        if row.start_timeout:
            job.start_by = self.now + row.delay + row.start_timeout
        limit = self.limits.owner_limit
        self.pay_on_submission(job, row.delay)
        is_full = limit > 0 and self.tickets(job.queue, job.owner) >= limit
        is_held = not row.delay and (is_full or job.is_unpaid)
        stamp = ({"depth": job.depth} if job.depth else {}) | ({"held": "owner_limit"} if is_held else {})
        self.write(job, self.now, "job.queued", self.content(**stamp, **row.fields))
        if row.delay:
            job.status, job.wake = "scheduled", self.now + row.delay
        elif is_held:
            self.hold(job, "owner_limit")
        else:
            self.enqueue(job)

    # --- take --------------------------------------------------------------------------------------------

    def take(
        self, worker: str, number: int, wanted: int, weights: Sequence[int], queues: Sequence[str]
    ) -> list[Any]:
        filed = self.filed.get(worker)
        if filed and filed.number == number:
            held = [self.jobs[job_id] for job_id, epoch in filed.leases if self.holds(job_id, epoch)]
            return [self.now, [self.described(job, first_time=False) for job in held], [], []]
        streams = [
            (queues[(number + i) % len(queues)], priority)
            for priority in self.classes_in_turn(number, weights)
            for i in range(len(queues))
        ]
        taken: list[Job] = []
        for stream in streams:
            if f"queue:{stream[0]}" in self.strikes:
                continue
            self.drain(stream, worker, wanted, taken)
        if taken:
            leases = [(job.id, job.epoch) for job in taken]
            self.filed[worker] = Filed(number, leases, self.now + self.limits.lease)
        ends = [f"work:{queue}:{priority}" for queue, priority in streams] if len(taken) < wanted else []
        return [self.now, [self.described(job, first_time=True) for job in taken], ends, []]

    @staticmethod
    def classes_in_turn(number: int, weights: Sequence[int]) -> list[str]:
        """`resume`, then the class whose turn it is by its weight, then the others by priority."""
        turns = [name for name, weight in zip(CLASSES, weights, strict=True) for _ in range(weight)]
        first = turns[number % len(turns)]
        return ["resume", first, *(name for name in CLASSES if name != first)]

    def drain(self, stream: tuple[str, str], worker: str, wanted: int, taken: list[Job]) -> None:
        looked_at = 0
        while len(taken) < wanted and looked_at < self.limits.scan and self.work[stream]:
            looked_at += 1
            ticket = self.work[stream].pop(0)
            job = self.jobs.get(ticket.job)
            if job is None or job.ticket != ticket:
                continue
            waits_behind = job.is_unpaid and self.held_jobs(f"{job.queue}|{job.owner}")
            if reason := self.obstacle(job) or ("owner_limit" if waits_behind else ""):
                self.set_aside(job, reason)
            else:
                self.lease(job, worker)
                taken.append(job)

    def lease(self, job: Job, worker: str) -> None:
        epoch = max(job.epoch + 1, self.now)
        waited = max(0, self.now - (job.since or 0))
        resumed = {"resumed_from": job.seq} if job.is_lost else {}
        content = self.content(attempt=job.attempt, worker=worker, waited_ms=waited, **resumed)
        self.pay(job)
        self.write(job, epoch, "job.started", content)
        self.park(job, "running")
        job.epoch, job.worker, job.batch, job.lease_until = epoch, worker, 0, self.now + self.limits.lease
        job.has_started, job.is_lost = True, False
        job.since = job.order = job.start_by = None
        if job.timeout and job.deadline is None:
            job.deadline = self.now + job.timeout
        self.announce(job)

    def described(self, job: Job, *, first_time: bool) -> list[Any]:
        """A lease as a worker is told of it; job.queued comes along where it is short and all there is."""
        left = -1 if job.deadline is None else max(0, job.deadline - self.now)
        content = job.log[0].content
        is_fresh = first_time and job.seq == 2 and len(content) <= self.limits.inline_bytes
        queued = content if is_fresh else b""
        head = [job.id, job.epoch, job.seq, job.attempt, job.inbox, job.crashes, left]
        return [*head, job.kind, job.owner, job.queue, queued]

    def holds(self, job_id: str, epoch: int) -> bool:
        """Whether this epoch is the job's lease; one that ran out and was not swept still is."""
        job = self.jobs.get(job_id)
        return job is not None and job.is_running and job.epoch == epoch

    # --- append and renew --------------------------------------------------------------------------------

    def append(self, batches: Iterable[Batch]) -> list[list[Any]]:
        return [self.append_one(batch) for batch in batches]

    def append_one(self, batch: Batch) -> list[Any]:
        job = self.jobs.get(batch.job_id)
        if job is None:
            return ["gone"]
        if refused := self.refusal(job, batch):
            return refused
        terminal = batch.events[-1] if batch.outcome in {"completed", "failed"} else None
        for kind, content in batch.events[:-1] if terminal else batch.events:
            self.write(job, batch.epoch, kind, content)
            if kind in PROGRESS:
                job.crashes = 0
        job.timers = timers_after(job, batch, self.now)
        job.batch = batch.number
        seq = job.seq + (batch.outcome in ENDED)
        job.commit = (*fingerprint(batch), seq)
        if terminal:
            self.finish(job, batch.epoch, *terminal)
        elif batch.outcome == "cancelled":
            self.finish_cancelled(job, batch.epoch)
        else:
            self.go_on(job, batch)
        return ["ok", seq, job.inbox, job.asked]

    def refusal(self, job: Job, batch: Batch) -> list[Any]:
        if job.commit and batch.number == job.batch and job.commit[:3] == fingerprint(batch):
            return ["dup", job.commit[3], job.inbox, job.asked]
        if not self.holds(job.id, batch.epoch):
            return ["fenced"]
        if batch.number > job.batch + 1:
            return ["gap", job.batch + 1]
        if batch.number < job.batch + 1:
            return ["conflict"]
        if why := misplaced(batch):
            return ["bad", why]
        starts_tool = any(kind == "tool.started" for kind, _ in batch.events)
        if starts_tool and job.cancelled_at is not None:
            return ["inbox", job.inbox, "cancel"]
        if batch.outcome in PARKING and batch.seen != job.inbox:
            return ["inbox", job.inbox, job.asked]
        if batch.outcome == "sleep" and not timers_after(job, batch, self.now):
            return ["bad", "sleep without a timer"]
        if which := self.over_budget(job, batch):
            return ["limit", which]
        return []

    def over_budget(self, job: Job, batch: Batch) -> str:
        """Terminal events are exempt."""
        sizes = [len(content) for kind, content in batch.events if kind not in TERMINAL]
        if sizes and job.seq + len(sizes) > self.limits.max_events:
            return "events"
        if sizes and job.size + sum(sizes) > self.limits.max_bytes:
            return "bytes"
        return ""

    def go_on(self, job: Job, batch: Batch) -> None:
        if batch.outcome == "retry":
            job.attempt += 1
        is_parked = batch.outcome in PARKING
        if not (is_parked and self.park_by_wish(job, batch.epoch)):
            self.move(job, batch)
        if not job.is_ended:
            self.announce(job)
            if is_parked:
                self.offer(job)

    def move(self, job: Job, batch: Batch) -> None:
        if batch.outcome == "yield" or (batch.outcome == "retry" and batch.delay_ms == 0):
            self.requeue(job, batch.outcome)
        elif batch.outcome == "retry":
            self.park(job, "scheduled")
            job.wake = self.now + batch.delay_ms
        elif batch.outcome == "sleep":
            self.park(job, "scheduled")
        elif batch.outcome == "wait":
            self.park(job, "waiting")

    def renew(self, pairs: Iterable[tuple[str, int]]) -> list[Any]:
        return [self.now, [self.renew_one(job_id, epoch) for job_id, epoch in pairs]]

    def renew_one(self, job_id: str, epoch: int) -> list[Any]:
        if not self.holds(job_id, epoch):
            return ["lost"]
        job = self.jobs[job_id]
        job.lease_until = self.now + self.limits.lease
        return ["ok", job.inbox, job.asked]

    def artifact(self, job_id: str, epoch: int, kept: Kept, most: tuple[int, int]) -> list[Any]:
        if job_id not in self.jobs:
            return ["gone"]
        if not self.holds(job_id, epoch):
            return ["fenced"]
        if len(kept.content) > most[0]:
            return ["limit", "one"]
        artifacts = self.jobs[job_id].artifacts | {kept.name: (kept.media_type, kept.content)}
        size = sum(len(content) for _, content in artifacts.values())
        if size > most[1]:
            return ["limit", "all"]
        self.jobs[job_id].artifacts = artifacts
        return ["ok", size]

    def run_again(self, job_id: str, new_id: str) -> list[Any]:
        job = self.jobs.get(job_id)
        if job is None:
            return ["gone"]
        if not job.is_ended:
            return ["live", job.status]
        job.rerun = new_id
        self.dead.pop(job_id, None)
        return ["ok"]

    # --- sealed history ----------------------------------------------------------------------------------

    def seal(
        self, job_id: str, sealed: str, snap: str, snapshot: bytes, pieces: Sequence[Piece]
    ) -> list[Any]:
        job = self.jobs.get(job_id)
        if job is None:
            return ["gone"]
        if not pieces:
            return ["bad"]
        last = pieces[-1].last
        if job.sealed == last and (not snapshot or job.snap == last):
            return ["already", job.sealed, job.snap]
        if (job.sealed, job.snap) != (sealed, snap):
            return ["stale", job.sealed, job.snap]
        if (job.snap and not snapshot) or not self.fits(job, pieces):
            return ["bad"]
        job.segments += pieces
        if snapshot:
            job.snap, job.snapshot = last, snapshot
        return ["ok", job.sealed, job.snap]

    def fits(self, job: Job, pieces: Sequence[Piece]) -> bool:
        """Each piece begins where the one before ended, and ends at an event that is in the stream."""
        end, ids = job.sealed_seq, {entry.id for entry in job.stream}
        for piece in pieces:
            if piece.first != end + 1 or piece.last not in ids or piece.last_seq < piece.first:
                return False
            end = piece.last_seq
        return True

    # --- strikes -----------------------------------------------------------------------------------------

    def strike(self, act: str, what: str, fields: dict[str, str]) -> list[Any]:
        if (what in self.strikes) == (act == "set"):
            return ["already" if act == "set" else "absent"]
        verdict = "struck" if act == "set" else "lifted"
        if act == "set":
            self.strikes[what] = wire({**fields, "since_ms": self.now})
        else:
            del self.strikes[what]
        self.published.append(("strikes", f"{verdict} {what}".encode()))
        return [verdict]

    # --- token buckets -----------------------------------------------------------------------------------

    def token_in(self, name: str, period: float, burst: int) -> float:
        """How long until the bucket has a token: it fills by one each period, up to `burst`."""
        return max(0.0, self.full_at(name) - period * (burst - 1) - self.now)

    def full_at(self, name: str) -> float:
        """When it is full again; a clock that stepped back takes that along."""
        full, written = self.buckets.get(name, (self.now, self.now))
        return max(self.now, full + min(0, self.now - written))

    def take_token(self, name: str, period: float) -> None:
        self.buckets[name] = float(f"{self.full_at(name) + period:.3f}"), self.now

    # an owner's rate: a minute's submissions may come at once, and come back one after the other

    def has_token(self, owner: str) -> bool:
        rate = self.limits.owner_rate
        return rate == 0 or self.token_in(f"rate:{owner}", 60_000 / rate, min(rate, 1000)) == 0

    def pay(self, job: Job) -> None:
        if job.is_unpaid and self.limits.owner_rate:
            self.take_token(f"rate:{job.owner}", 60_000 / self.limits.owner_rate)
        job.is_unpaid = False

    def pay_on_submission(self, job: Job, delay: int) -> None:
        """At once, unless it is delayed or others of its owner and queue wait already."""
        job.is_unpaid = self.limits.owner_rate > 0
        if self.has_token(job.owner) and not delay and not self.held_jobs(f"{job.queue}|{job.owner}"):
            self.pay(job)

    def permit(self, name: str, period: float, burst: int, patience: int) -> list[Any]:
        wait = self.token_in(f"bucket:{name}", period, burst)
        if wait > patience:
            return ["later", math.ceil(wait)]
        self.take_token(f"bucket:{name}", period)
        return ["go", math.ceil(wait)]

    # --- wake --------------------------------------------------------------------------------------------

    def wake(self, limit: int) -> list[Any]:
        """Work on what is due when the call begins: leases, then timers, then held lists."""
        expired, far = ({}, {}) if self.in_grace() else self.ended_leases()
        timers = {job_id: at for job_id, at in self.timers().items() if at <= self.now}
        lost, frozen, due = (first_of(some, limit) for some in (expired, far, timers))
        changes = [[job_id, self.lose(self.jobs[job_id])] for job_id in (*lost, *frozen)]
        changes += [[job_id, self.ring(self.jobs[job_id])] for job_id in due]
        changes += [[name, self.release_many(name, limit)] for name in first_of(self.looked_at, limit)]
        for name in takewhile(lambda name: not self.is_failed(name), first_of(self.dead, limit)):
            del self.dead[name]
        is_more = any(len(some) >= limit for some in (lost, frozen, due))
        next_due = min(self.timers().values(), default=-1)
        return [self.now, next_due, int(is_more), [change for change in changes if change[1]]]

    def is_failed(self, job_id: str) -> bool:
        return job_id in self.jobs and self.jobs[job_id].status == "failed"

    def in_grace(self) -> bool:
        """After an outage, or when the clock stepped back, nobody is declared dead for one lease time."""
        last = self.now if self.last_sweep is None else self.last_sweep
        if self.now < last or self.now - last > max(self.limits.lease / 2, 3 * self.limits.sweep):
            self.grace = self.now + self.limits.lease
        self.last_sweep = self.now
        return self.now < self.grace

    def ended_leases(self) -> tuple[dict[str, int], dict[str, int]]:
        """Leases that ran out, and those so far away that the clock must have stepped back."""
        leases = self.leases()
        expired = {job_id: until for job_id, until in leases.items() if until <= self.now}
        far = {job_id: until for job_id, until in leases.items() if until > self.now + 2 * self.limits.lease}
        return expired, far

    def lose(self, job: Job) -> str:
        job.crashes += job.batch > 0
        delay = self.crash_delay(job.crashes)
        self.say(job, "job.lost", worker=job.worker, crashes=job.crashes, delay_ms=delay)
        job.is_lost = True
        what = "lost"
        if self.park_by_wish(job, self.bystander(job)):
            what = job.status
        elif job.crashes > self.limits.max_crashes:
            what = "poisoned"
            self.finish_failed(job, what, f"its workers died {job.crashes} times in a row without progress")
        elif delay:
            self.park(job, "scheduled")
            job.wake = self.now + delay
        else:
            self.leave(job)
            self.enqueue(job)
        if not job.is_ended:
            self.announce(job)
            self.offer(job)
        return what

    def crash_delay(self, crashes: int) -> int:
        """None for the first crash, then doubling."""
        return 0 if crashes < 2 else min(self.limits.crash_cap, self.limits.crash_base * 2 ** (crashes - 2))

    def ring(self, job: Job) -> str:
        """Do what is due for one job; answers what became of it, if anything."""
        if job.is_ended:
            return ""
        grace = self.limits.lease if job.is_running else 0
        if job.deadline is not None and self.now >= job.deadline + grace:
            self.finish_failed(job, "timeout", "the job did not end within its timeout")
            return "timeout"
        if job.start_by is not None and self.now >= job.start_by:
            self.finish_failed(job, "queue_timeout", "no worker started the job in time")
            return "queue_timeout"
        what = self.ring_timers(job)
        self.announce(job)
        return what

    def ring_timers(self, job: Job) -> str:
        """A job that waits or sleeps goes on with its first timer, one that was given a time only then."""
        due = sorted((at, key) for key, at in job.timers.items() if at <= self.now)
        for _, key in due:
            del job.timers[key]
            self.say(job, "timer.fired", key=key)
        is_awake = self.now >= job.wake if job.wake is not None else bool(due)
        if job.status in {"scheduled", "waiting"} and is_awake:
            self.requeue(job, "timer")
            return "woken"
        if due:
            self.count_inbox(job)
        return ""

    def release_many(self, name: str, limit: int) -> str:
        if name in self.looked_at:
            self.looked_at[name] = self.now
        released = 0
        while released < limit and self.release(name):
            released += 1
        return "released" if released else ""

    # --- cancel, signal, pause, resume -------------------------------------------------------------------

    def cancel(self, job_id: str, fields: dict[str, str]) -> list[Any]:
        answer = self.cancel_one(job_id, fields)
        if answer[0] in {"cancelled", "requested"}:
            generation = [job_id]
            while generation:
                generation = [child for parent in generation for child in self.children(parent)]
                for child in generation:
                    self.cancel_one(child, fields)
        return answer

    def children(self, job_id: str) -> list[str]:
        job = self.jobs.get(job_id)
        return job.children if job else []

    def cancel_one(self, job_id: str, fields: dict[str, str]) -> list[Any]:
        job = self.jobs.get(job_id)
        if job is None:
            return ["gone"]
        if job.is_ended:
            return ["already", job.status]
        if job.cancelled_at is not None:
            return ["requested"]
        self.say(job, "job.cancel_requested", **fields)
        job.cancelled_at, job.cancel_fields = self.now, fields
        if not job.is_running:
            self.finish_cancelled(job, self.bystander(job))
            return ["cancelled"]
        self.count_inbox(job)
        self.announce(job)
        return ["requested"]

    def signal(self, job_id: str, key: str, fields: dict[str, Any]) -> list[Any]:
        job = self.jobs.get(job_id)
        if job is None:
            return ["gone"]
        if key in job.seen:
            return ["dup"]
        if job.is_ended:
            return ["already", job.status]
        if job.seq >= self.limits.max_events:
            return ["limit", "events"]
        if job.size >= self.limits.max_bytes:
            return ["limit", "bytes"]
        self.say(job, "signal.received", **fields)
        seq = job.seq
        job.seen.add(key)
        self.count_inbox(job)
        if job.status == "waiting":
            self.requeue(job, "signal")
        self.announce(job)
        return ["ok", seq]

    def pause(self, job_id: str, key: str, fields: dict[str, str]) -> list[Any]:
        job = self.jobs.get(job_id)
        if job is None:
            return ["gone"]
        if key in job.seen:
            return ["dup"]
        if job.is_ended or job.status == "paused":
            return ["already", job.status]
        if job.pause is not None:
            return ["requested"]
        if max(job.seq, len(job.seen)) >= self.limits.max_events:
            return ["limit", "events"]
        job.seen.add(key)
        if job.is_running:
            job.pause = fields
            self.count_inbox(job)
            return ["requested"]
        self.say(job, "job.paused", **fields)
        self.park(job, "paused")
        self.announce(job)
        return ["paused"]

    def resume(self, job_id: str, key: str, fields: dict[str, str]) -> list[Any]:
        job = self.jobs.get(job_id)
        if job is None:
            return ["gone"]
        if key in job.seen:
            return ["dup"]
        if job.status != "paused" and job.pause is None:
            return ["already", job.status]
        job.seen.add(key)
        if job.status == "paused":
            self.say(job, "job.resumed", **fields)
            self.enqueue(job)
            self.announce(job)
        else:
            job.pause = None
            self.count_inbox(job)
        return ["resumed"]


def fingerprint(batch: Batch) -> tuple[int, int, int]:
    """What a resend has in common with the first: epoch, count, size."""
    return batch.epoch, len(batch.events), sum(len(content) for _, content in batch.events)


def timers_after(job: Job, batch: Batch, now: int) -> dict[str, int]:
    """A timer that is known stays as it is; a delay below 0 takes one back."""
    asked = json.loads(batch.timers or b"{}")
    new = {key: now + delay for key, delay in asked.items() if delay >= 0}
    return {key: at for key, at in (new | job.timers).items() if asked.get(key, 0) >= 0}


def misplaced(batch: Batch) -> str:
    """The terminal event comes last, where the outcome says so and nowhere else."""
    terminal = [(at, kind) for at, (kind, _) in enumerate(batch.events) if kind in TERMINAL]
    wanted = (
        [(len(batch.events) - 1, f"job.{batch.outcome}")] if batch.outcome in {"completed", "failed"} else []
    )
    if terminal != wanted:
        return "terminal event"
    if batch.outcome not in {"keep", *PARKING, *ENDED}:
        return "outcome"
    return ""


def first_of(scores: dict[str, int], limit: int) -> list[str]:
    return sorted(scores, key=lambda name: (scores[name], name))[: max(0, limit)]
