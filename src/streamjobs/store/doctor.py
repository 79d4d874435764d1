"""Checks the invariants on a live store: what must hold of every job at every instant.

Each job is looked at as it is at one instant (one script), and its log as far as it went then; so a
store may be checked while it works. Only the totals need a quiet moment: they are compared where nothing
moved during the check, and left out, saying so, where something did.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec

from streamjobs import events as ev
from streamjobs.cursor import START
from streamjobs.errors import (
    DamagedCiphertext,
    EncryptionKeyMissing,
    Invalid,
    JobNotFound,
    StoreUnavailable,
    StreamjobsError,
)
from streamjobs.job import Fold
from streamjobs.segments import DamagedSegment, parse_index
from streamjobs.store import Store, keys
from streamjobs.store.log import Entry
from streamjobs.store.permissions import require_permissions
from streamjobs.store.scripts import text, translated

CHECKS: dict[str, str] = {
    "known_keys": "every key is declared, of its type, and expires where it must",
    "dense_log": "seqs are 1, 2, 3 … without gap or repetition, and end where the job's head says",
    "sealed_history": "what has left the stream is in segments, and the snapshot is what they fold to",
    "readable": "what is encrypted opens with the keys that there are",
    "one_end": "nothing after the terminal event, exactly one where the job has ended",
    "lifecycle": "every event may follow the one before, and folding them gives the job's status",
    "one_writer": "what a worker writes carries the epoch of the latest lease",
    "one_place": "a live job is in exactly one place, an ended one in none",
    "one_expiry": "all keys of an ended job expire together, those of a live job do not",
    "one_result": "a tool call has at most one recorded outcome",
    "no_tool_after_cancel": "no tool starts after a cancel was asked for",
    "no_ghosts": "leases, timers and held lists name live jobs only",
    "totals": "the counters for each queue equal what is there",
}

# What only the holder of a lease writes.
_HOLDERS = ("turn.", "text.", "reasoning.", "tool.", "step.", "artifact.", "x.")
_HOLDERS_JOB = {"job.progress", "job.log", "job.retrying", "job.waiting", "job.completed"}
_OUTCOMES = {"tool.completed", "tool.failed", "tool.unknown"}
_ENDED = {"completed", "failed", "cancelled"}
_NEEDED = {"status", "seq", "last", "owner", "kind", "queue", "created"}


class Violation(msgspec.Struct, frozen=True):
    """One thing that does not hold: which check, of what, and what was found."""

    check: str
    subject: str
    found: str


class Report(msgspec.Struct):
    """What the doctor saw."""

    jobs: int = 0
    events: int = 0
    keys: int = 0
    statuses: dict[str, int] = {}
    violations: list[Violation] = []
    notes: list[str] = []

    @property
    def is_healthy(self) -> bool:
        """Whether every check held."""
        return not self.violations


class Head(msgspec.Struct):
    """A job as inspect.lua shows it."""

    job_id: str
    fields: dict[str, str]
    length: int
    first: str
    last: str
    lease_score: str
    timer_score: str
    has_ticket: bool
    held_score: str
    ttl: int
    log_ttl: int
    in_running_set: bool
    index: str = ""
    history: list[str] = []
    """Fields of its sealed history."""
    history_ttl: int = -2

    @property
    def is_sealed_whole(self) -> bool:
        """Whether nothing of its log is in the stream."""
        return self.fields.get("sealed") == self.fields.get("last")

    @property
    def status(self) -> str:
        """Where the hash says it is."""
        return self.fields.get("status", "")


class Doctor:
    """One examination of a store."""

    def __init__(self, store: Store, on_progress: Callable[[int], None] = lambda _: None) -> None:
        self._store = store
        self._on_progress = on_progress
        self._seen: set[str] = set()
        self.report = Report()

    async def examine(self) -> Report:
        """Check everything; raises `StoreUnavailable` only, `MissingPermission` where not all may be seen."""
        await require_permissions(self._store)
        before = await self._totals()
        found: Counter[str] = Counter()
        async for name in self._keys():
            self.report.keys += 1
            job_id = await self._check_key(name)
            if job_id is not None and job_id not in self._seen:  # a scan may name a key twice
                self._seen.add(job_id)
                await self._guarded(job_id, self._check_job(job_id, found))
        for partition in self._store.partitions:
            await self._guarded(keys.prefix(partition), self._check_ghosts(partition))
        self._compare(before, await self._totals(), found)
        return self.report

    async def _guarded(self, subject: str, check: Awaitable[None]) -> None:
        """Where damage goes so far that a check cannot be made, that is what was found."""
        try:
            await check
        except StoreUnavailable:
            raise
        except (StreamjobsError, ValueError, LookupError) as error:
            self._violation("known_keys", subject, f"cannot be examined: {error}")

    def _violation(self, check: str, subject: str, what: str) -> None:
        self.report.violations.append(Violation(check, subject, what))

    # --- keys

    async def _keys(self) -> AsyncIterator[str]:
        with translated():
            async for raw in self._store.client.scan_iter(match="sj:*", count=1000):
                yield text(raw)

    async def _check_key(self, name: str) -> str | None:
        """Check one key; returns the job's id for the key of a job's hash."""
        if name == keys.META:
            return None
        key = keys.classify(name)
        if key is None:
            self._violation("known_keys", name, "nobody declared this key")
            return None
        with translated():
            kind = text(await self._store.client.type(name))
            ttl: int = await self._store.client.pttl(name)
        if kind not in {key.type, "none"}:
            self._violation("known_keys", name, f"a {kind}, not a {key.type}")
        if key.lifetime == "ttl" and ttl == -1:
            self._violation("known_keys", name, "never expires")
        return name.rpartition(":")[2] if key is keys.HEAD else None

    # --- jobs

    async def _check_job(self, job_id: str, found: Counter[str]) -> None:
        try:
            raw = await self._store.work.inspect(job_id)
            if not raw:
                return
            head = _head(job_id, raw)
            if missing := sorted(_NEEDED - set(head.fields)):
                self._violation("known_keys", job_id, f"its head lacks {', '.join(missing)}")
                return
            entries, wrong = await self._log_of(head)
        except JobNotFound:
            return
        self.report.jobs += 1
        self.report.events += len(entries)
        self.report.statuses[head.status] = self.report.statuses.get(head.status, 0) + 1
        self._count(head, found)
        for check, what in (*wrong, *check_place(head), *check_expiry(head)):
            self._violation(check, job_id, what)
        self._on_progress(self.report.jobs)

    async def _log_of(self, head: Head) -> tuple[list[Entry], list[tuple[str, str]]]:
        """A job's log and what is wrong with it; no log where its segments cannot be read."""
        wrong = check_sealed(head)
        if wrong:
            return [], wrong
        try:
            entries = await self._log(head)
            wrong = await self._check_snapshot(head, entries) if head.fields.get("snap") else []
        except DamagedSegment as error:
            return [], [("sealed_history", str(error))]
        except (DamagedCiphertext, EncryptionKeyMissing) as error:
            return [], [("readable", str(error))]
        return entries, check_log(head, entries) + wrong

    async def _log(self, head: Head) -> list[Entry]:
        end = int(head.fields["seq"])
        entries: list[Entry] = []
        after = START
        while len(entries) < end:
            page = await self._store.log.page(head.job_id, after)
            entries.extend(entry for entry in page.entries if entry.cursor.seq <= end)
            if page.is_up_to_date:
                break
            after = page.entries[-1].cursor
        return entries

    async def _check_snapshot(self, head: Head, entries: list[Entry]) -> list[tuple[str, str]]:
        """What is wrong with the snapshot as it is now, which may be a later one than the head's."""
        stored = await self._store.snapshots.load(head.job_id)
        end = stored.fold.cursor.seq
        if end > len(entries):
            return []
        if not stored.weight:
            return [("sealed_history", "the snapshot cannot be read by this release")]
        fold = Fold(head.job_id, self._store.snapshots.caps)
        try:
            fold.apply_all(entries[:end])
        except StreamjobsError:
            return []  # the check of the log says so
        found, wanted = stored.fold.view(), fold.view()
        if found == wanted or (found.truncated and found.cursor == wanted.cursor):  # under other settings
            return []
        return [("sealed_history", f"the snapshot at {found.cursor} is not what the log folds to")]

    def _count(self, head: Head, found: Counter[str]) -> None:
        queue = head.fields.get("queue", "")
        if head.status == "running":
            found[f"running:{queue}"] += 1
        elif head.status == "queued":
            found[f"{'held' if 'held' in head.fields else 'waiting'}:{queue}"] += 1

    # --- the store as a whole

    async def _check_ghosts(self, partition: int) -> None:
        prefix = keys.prefix(partition)
        lists = [f"{prefix}leases", f"{prefix}timers"]
        with translated():
            client: Any = self._store.client
            lists += [f"{prefix}held:{text(name)}" for name in await client.zrange(f"{prefix}held", 0, -1)]
            for name in lists:
                for member in [text(m) for m in await client.zrange(name, 0, -1)]:
                    status = await client.hget(f"{prefix}job:{member}", "status")
                    if status is None or text(status) in _ENDED:
                        self._violation("no_ghosts", name, f"names {member}, which is gone or has ended")

    async def _totals(self) -> Counter[str]:
        totals: Counter[str] = Counter()
        for partition in self._store.partitions:
            totals.update(await self._store.work.backlog(partition))
        return totals

    def _compare(self, before: Counter[str], after: Counter[str], found: Counter[str]) -> None:
        if before != after:
            self.report.notes.append("totals: not compared, jobs moved during the check")
            return
        for name in sorted(set(after) | set(found)):
            if after[name] != found[name]:
                self._violation("totals", name, f"the counter says {after[name]}, there are {found[name]}")


def check_log(head: Head, entries: list[Entry]) -> list[tuple[str, str]]:
    """What is wrong with a job's log."""
    wrong: list[tuple[str, str]] = []
    seqs = [entry.cursor.seq for entry in entries]
    if not seqs or seqs != list(range(1, len(seqs) + 1)) or str(len(seqs)) != head.fields.get("seq"):
        wrong.append(
            ("dense_log", f"{len(seqs)} events end at {seqs[-1:]}, the head says {head.fields.get('seq')}")
        )
        return wrong
    said = head.fields.get("last")
    ends_at = (said or "") if head.is_sealed_whole and not head.length else head.last
    others = sorted({ends_at, str(entries[-1].cursor)} - {said})
    wrong += [("dense_log", f"ends at {last}, the head says {said}") for last in others]
    ends = [entry.type for entry in entries if entry.type in ev.TERMINAL]
    if len(ends) != int(head.status in _ENDED) or (ends and entries[-1].type != ends[-1]):
        wrong.append(("one_end", f"terminal events {ends} in a job that is {head.status}"))
    wrong += _check_fold(head, entries) + _check_writers(entries) + _check_tools(entries)
    return wrong


def check_sealed(head: Head) -> list[tuple[str, str]]:
    """What is wrong with a job's segments and with where the stream goes on."""
    try:
        index = parse_index(head.index)
    except DamagedSegment as error:
        return [("sealed_history", str(error))]
    wrong: list[str] = []
    seqs = [0, *(segment.last.seq for segment in index)]
    if any(segment.first != end + 1 for segment, end in zip(index, seqs, strict=False)):
        wrong.append("its segments do not follow one another")
    sealed, snap = head.fields.get("sealed"), head.fields.get("snap")
    if sealed != (str(index[-1].last) if index else None):
        wrong.append(f"sealed up to {sealed}, the segments end at {seqs[-1]}")
    names = {"index", *map(str, seqs[1:])} if index else set[str]()
    if set(head.history) != names | ({"snap"} if snap else set()):
        wrong.append(f"holds {sorted(head.history)} for {len(index)} segments, snapshot at {snap}")
    if snap not in {None, sealed}:
        wrong.append(f"the snapshot stands at {snap}, sealed is up to {sealed}")
    if head.first and int(head.first.partition("-")[0]) != seqs[-1] + 1:
        wrong.append(f"the stream begins at {head.first}, the segments end at {seqs[-1]}")
    return [("sealed_history", what) for what in wrong]


def _check_fold(head: Head, entries: list[Entry]) -> list[tuple[str, str]]:
    fold = Fold(head.job_id)
    try:
        fold.apply_all(entries)
    except StreamjobsError as error:
        return [("lifecycle", str(error))]
    if fold.status != head.status:
        return [("lifecycle", f"folds to {fold.status}, the head says {head.status}")]
    return []


def _check_writers(entries: list[Entry]) -> list[tuple[str, str]]:
    epoch = 0
    for entry in entries:
        if entry.type == "job.started":
            if entry.cursor.epoch <= epoch:
                return [("one_writer", f"the lease at {entry.cursor} is not newer than {epoch}")]
            epoch = entry.cursor.epoch
        elif (entry.type.startswith(_HOLDERS) or entry.type in _HOLDERS_JOB) and entry.cursor.epoch != epoch:
            return [("one_writer", f"{entry.type} at {entry.cursor} under the lease {epoch}")]
    return []


def _check_tools(entries: list[Entry]) -> list[tuple[str, str]]:
    wrong: list[tuple[str, str]] = []
    outcomes: Counter[str] = Counter()
    cancelled = False
    for entry in entries:
        cancelled = cancelled or entry.type == "job.cancel_requested"
        if entry.type == "tool.started" and cancelled:
            wrong.append(("no_tool_after_cancel", f"tool.started at {entry.cursor}"))
        elif entry.type in _OUTCOMES:
            outcomes[_call_of(entry)] += 1
    wrong += [("one_result", f"{call} has {n} outcomes") for call, n in outcomes.items() if n > 1]
    return wrong


def _call_of(entry: Entry) -> str:
    try:
        return str(getattr(ev.decode_event(entry.type, entry.data), "call_id", ""))
    except Invalid:
        return f"the call at {entry.cursor}"


def check_place(head: Head) -> list[tuple[str, str]]:
    """What is wrong with where a job is."""
    places = {
        "ticket": head.has_ticket,
        "held": bool(head.held_score),
        "lease": bool(head.lease_score),
        "timer": bool(head.timer_score),
    }
    due = head.fields.get("due")
    wrong = (
        [("one_place", f"timer at {head.timer_score}, due {due}")] if (due or "") != head.timer_score else []
    )
    allowed = _ALLOWED.get(head.status)
    if allowed is None:
        return [("one_place", f"unknown status {head.status!r}")]
    present = frozenset(place for place, is_there in places.items() if is_there) - {"timer"}
    if present not in allowed or (head.status == "scheduled" and not head.timer_score):
        wrong.append(("one_place", f"{head.status} and in {sorted(present) or 'no place'}"))
    if head.status in _ENDED and head.timer_score:
        wrong.append(("one_place", f"{head.status} with a timer"))
    is_running, lease = head.status == "running", head.fields.get("lease")
    if is_running != head.in_running_set or is_running != (lease is not None):
        found = f"{head.status}, lease {lease}, in its owner's running set: {head.in_running_set}"
        wrong.append(("one_place", found))
    return wrong


_NOWHERE = frozenset({frozenset[str]()})
_ALLOWED: dict[str, frozenset[frozenset[str]]] = {
    "queued": frozenset({frozenset({"ticket"}), frozenset({"held"})}),
    "running": frozenset({frozenset({"lease"})}),
    "scheduled": _NOWHERE,
    "waiting": _NOWHERE,
    "paused": _NOWHERE,
    "completed": _NOWHERE,
    "failed": _NOWHERE,
    "cancelled": _NOWHERE,
}
"""Status -> the places it may be in, timers apart: those are reminders for queued and running jobs."""


def check_expiry(head: Head) -> list[tuple[str, str]]:
    """What is wrong with how long a job's keys live."""
    # a key that is not there is -2: before anything is sealed, and once everything is
    others = [ttl for ttl in (head.log_ttl, head.history_ttl) if ttl != -2]
    if head.status not in _ENDED:
        if all(ttl == -1 for ttl in (head.ttl, *others)):
            return []
        return [("one_expiry", f"{head.status} and expires in {head.ttl} / {head.log_ttl} ms")]
    if head.ttl < 0 or not others or any(abs(head.ttl - ttl) > 1 for ttl in others):
        return [("one_expiry", f"head expires in {head.ttl} ms, log in {' / '.join(map(str, others))} ms")]
    return []


def _head(job_id: str, raw: list[Any]) -> Head:
    flat = [text(value) for value in raw[0]]
    fields = {name: value for name, value in zip(flat[::2], flat[1::2], strict=True) if value}
    first, last, lease, timer = (text(value) for value in raw[2:6])
    return Head(
        job_id,
        fields,
        raw[1],
        first,
        last,
        lease,
        timer,
        bool(raw[6]),
        text(raw[7]),
        raw[8],
        raw[9],
        bool(raw[10]),
        text(raw[11]),
        [text(field) for field in raw[12]],
        raw[13],
    )
