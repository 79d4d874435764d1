"""Plays the same commands on the model and on real Redis, and compares all that comes of them.

Rule 1: time stands still unless a command moves it; the scripts read the tests' clock, nothing else is changed.
Rule 2: a command names jobs by slot and leases by index, so that any part of a program is a program.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import msgspec
import redis

from streamjobs.store.scripts import Limits, Script, Scripts, flatten
from streamjobs.store.work import Batch
from tests.contract.keyspace import PREFIX, check_invariants, comparable, expected, found, spliced
from tests.model import Model, NewJob, wire

LEASE = 60_000
START = 4_000_000_000_000
"""Far in the future: keys with an expiry stay until the duel takes them away."""

LIMITS = Limits(
    lease=LEASE, sweep=1_000, retention=300_000, idempotency=600_000, owner_limit=2, max_crashes=2,
    crash_base=5_000, crash_cap=8_000, max_events=40, max_bytes=3_000, feed_cap=100_000, feed_bytes=150,
    owner_feed_cap=100_000, owner_feed_bytes=90, owner_feed_ttl=600_000, inline_bytes=300, scan=3,
)  # fmt: skip
"""Small enough that random programs meet every one of them."""

CLOCK = ("local TIME = redis.call('TIME')", "local TIME = OPT.clock")

SCRIPTS: dict[str, Script] = {
    "submit": Scripts.SUBMIT, "take": Scripts.TAKE, "append": Scripts.APPEND, "always": Scripts.APPEND_ALWAYS,
    "renew": Scripts.RENEW, "wake": Scripts.WAKE, "cancel": Scripts.CANCEL, "signal": Scripts.SIGNAL,
    "pause": Scripts.PAUSE, "resume": Scripts.RESUME,
}  # fmt: skip


class Mutation(NamedTuple):
    """A change to the text of one script (or of several, through what they share)."""

    script: str
    old: str
    new: str


class Difference(AssertionError):
    """Model and Redis disagree."""


class Command(Protocol):
    """One step of a program."""

    def play(self, duel: Duel) -> None: ...


def replaced(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, f"{text.count(old)} times in the script: {old}"
    return text.replace(old, new)


def script_texts(mutation: Mutation | None = None) -> dict[str, str]:
    """Every script reading the tests' clock; with a mutation, broken on purpose."""
    texts = {name: replaced(script.text, *CLOCK) for name, script in SCRIPTS.items()}
    if mutation is not None:
        broken = SCRIPTS if mutation.script == "common" else mutation.script.split()
        texts |= {name: replaced(texts[name], mutation.old, mutation.new) for name in broken}
    return texts


def plain(reply: Any) -> Any:
    """A reply with text for bytes, and without the words that explain a refusal to people."""
    if isinstance(reply, bytes):
        return reply.decode()
    if not isinstance(reply, list | tuple):
        return reply
    words = [plain(word) for word in reply]
    return words[:1] if words[:1] in (["bad"], ["error"]) else words


class Ear:
    """Hears everything that scripts publish."""

    END = "test:heard"

    def __init__(self, client: redis.Redis) -> None:
        self.client = client
        self.pubsub: Any = client.pubsub(ignore_subscribe_messages=True)
        self.pubsub.psubscribe(f"{PREFIX}*", self.END)

    def heard(self) -> list[tuple[str, bytes]]:
        """Channel and message of each publish since the last call, in order."""
        self.client.publish(self.END, "")
        messages: list[tuple[str, bytes]] = []
        for message in self.pubsub.listen():
            channel = message["channel"].decode()
            if channel == self.END:
                return messages
            messages.append((channel.removeprefix(PREFIX), message["data"]))
        raise AssertionError("the subscription ended")

    def close(self) -> None:
        self.pubsub.close()


class ScriptCaller:
    """Calls the scripts on one Redis at a time of the caller's choosing."""

    def __init__(
        self, client: redis.Redis, limits: Limits = LIMITS, mutation: Mutation | None = None
    ) -> None:
        self.client = client
        self.now = START
        self._limits = msgspec.json.encode(limits)[:-1]
        self._shas = {name: client.script_load(text) for name, text in script_texts(mutation).items()}

    def __call__(self, name: str, *arguments: str | bytes | int) -> Any:
        seconds, rest = divmod(self.now, 1000)
        options = self._limits + b',"clock":[%d,%d]}' % (seconds, rest * 1000)
        key = f"{PREFIX}leases"
        return self.client.execute_command("EVALSHA", self._shas[name], 1, key, options, *arguments)


def submit_row(row: NewJob) -> list[str | bytes | int]:
    head = [row.id, row.owner, row.kind, row.queue, row.priority, row.delay, row.start_timeout, row.timeout]
    return [*head, row.ckey, row.idem, row.body, row.parent, wire(row.fields)]


class Duel:
    """A model and a Redis under the same commands. Empties the database first."""

    def __init__(self, call: ScriptCaller, ear: Ear, seen: Counter[str] | None = None) -> None:
        self.call = call
        self.ear = ear
        ear.heard()
        self.client = call.client
        self.client.flushdb()
        self.model = Model(LIMITS)
        self.seen: Counter[str] = Counter() if seen is None else seen
        self.leases: list[tuple[str, int]] = []
        self.sent: dict[tuple[str, int], Batch] = {}
        self.numbers: Counter[str] = Counter()
        self.last: Callable[[], None] = lambda: None
        self.set_clock(START)

    def set_clock(self, now: int) -> None:
        """Move both clocks, and take away what expires by then."""
        self.call.now = self.model.now = now
        jobs, records, takes = self.model.expired()
        gone = [f"job:{job.id}{rest}" for job in jobs for rest in ("", ":events", ":children", ":seen")]
        gone += [f"idem:{key}" for key in records] + [f"take:{worker}" for worker in takes]
        if gone:
            self.client.delete(*(PREFIX + name for name in gone))
        self.model.forget_expired()

    def compare(self, script: str, answer: Callable[[], Any], *arguments: str | bytes | int) -> None:
        """Call a script and the model, and compare what they say. `last` does the same again."""

        def play() -> None:
            said = without_stream_ends(script, plain(self.call(script, *arguments)))
            wanted = plain(answer())
            if said != wanted:
                raise Difference(f"{script}{arguments}\n  redis: {said}\n  model: {wanted}")
            self.seen.update(verdicts(script, said))
            if script == "take":
                self.remember(said)

        self.last = play
        play()

    def remember(self, taken: list[Any]) -> None:
        leases = [(job[0], job[1]) for job in taken[1]]
        is_repeated = any(lease in self.leases for lease in leases)
        self.seen["take answered again"] += is_repeated
        self.leases += [lease for lease in leases if lease not in self.leases]

    def check(self) -> None:
        """Compare everything that is stored and was published, and judge what is stored."""
        heard, self.model.published = self.model.published, []
        compare_states({"published": self.ear.heard()}, {"published": heard})
        state = found(self.client)
        compare_states(comparable(state), expected(self.model))
        try:
            check_invariants(state)
        except AssertionError as error:
            raise Difference(str(error)) from error

    def run(self, program: Sequence[Command], *, check_every: int = 8) -> None:
        for number, command in enumerate(program, 1):
            command.play(self)
            if number % check_every == 0:
                self.check()
        self.check()
        self.seen.update(self.told())

    def told(self) -> Counter[str]:
        """What the logs say happened, for scripts that do several things without a word for each."""
        whys: Counter[str] = Counter()
        for job in self.model.jobs.values():
            for entry in job.log:
                why = msgspec.json.decode(entry.content).get("why", "")
                whys[f"{entry.type} {why}".strip()] += 1
        return whys


def without_stream_ends(script: str, reply: Any) -> Any:
    """A take's answer with the streams' names only: where they end is by Redis's own clock."""
    if script == "take":
        reply[2] = [name.removeprefix(PREFIX) for name in reply[2][::2]]
    return reply


def compare_states(said: dict[str, Any], wanted: dict[str, Any]) -> None:
    if said == wanted:
        return
    names = sorted(name for name in {*said, *wanted} if said.get(name) != wanted.get(name))
    lines = [f"{name}\n  redis: {said.get(name)}\n  model: {wanted.get(name)}" for name in names]
    raise Difference("\n".join(lines))


def verdicts(script: str, said: Any) -> list[str]:
    """Each thing that a reply says, by name."""
    rows: dict[str, Callable[[], list[str]]] = {
        "submit": lambda: [row[0] for row in said],
        "append": lambda: [" ".join(row[:2]) if row[0] == "limit" else row[0] for row in said],
        "renew": lambda: [row[0] for row in said[1]],
        "take": lambda: ["leased" if said[1] else "nothing"] + ["ends"] * bool(said[2]),
        "wake": lambda: [what for _, what in said[3]] + ["more"] * said[2],
    }
    script = "append" if script == "always" else script
    return [f"{script} {word}" for word in rows.get(script, lambda: [said[0]])()]


# --- commands --------------------------------------------------------------------------------------------

OWNERS = ("ann", "bob")
QUEUES = ("fast", "slow")
WORKERS = ("w1", "w2")
WEIGHTS = (2, 1, 1)
BY = {"by": "ann", "reason": ""}


def slot_id(slot: int) -> str:
    return f"j0-{'a' * 25}{'abcdefghijklmnopqrstuvwxyz234567'[slot]}"


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

    def row(self) -> NewJob:
        owner = OWNERS[self.owner]
        return NewJob(
            slot_id(self.slot), owner, QUEUES[self.queue], self.priority,
            delay=self.delay, start_timeout=self.start_timeout, timeout=self.timeout,
            ckey=f"{owner}-key{self.ckey}" if self.ckey else "",
            idem=f"{owner}-idem{self.idem}" if self.idem else "", body=f"body{self.body}" if self.idem else "",
            parent=slot_id(self.parent) if self.parent >= 0 else "", fields={"kind": "work", "owner": owner},
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
    "tool": ("tool.completed", {"call_id": "c", "output": 1}),
    "progress": ("job.progress", {"percent": 50}),
    "log": ("job.log", {"message": "x" * 100}),
    "note": ("x.note", {"a": {"b": [1, 2]}}),
    "completed": ("job.completed", {"result": {"answer": 42}}),
    "failed": ("job.failed", {"error": {"code": "boom", "message": "", "retryable": False}}),
    "cancelled": ("job.cancelled", {"by": ""}),
}
TIMERS = {"": b"", "soon": b'{"a":100,"b":15000}', "late": b'{"b":20000,"c":90000}', "none": b"{}"}


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
    leases = [lease for lease in duel.leases if stale or duel.model.holds(*lease)] or [(slot_id(31), 1)]
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
        job_id = slot_id(self.slot)
        duel.compare("cancel", lambda: duel.model.cancel(job_id, BY), job_id, spliced(BY))


@dataclass(frozen=True)
class Ask:
    """Signal, pause or resume a job, with a dedupe key."""

    script: str
    slot: int
    key: int = 0

    def play(self, duel: Duel) -> None:
        job_id, key = slot_id(self.slot), f"{self.script}{self.key}"
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
