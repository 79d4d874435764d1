"""What is in Redis, what the model says should be, and what must hold whatever the model says.

`found` reads a whole store in one call; `expected` is a model's state in the same form, without the ids
that Redis's own clock made; `check_invariants` judges what was found by itself (design, section 11).
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NamedTuple

import redis

from streamjobs import segments
from streamjobs.store import keys
from tests.model import ENDED, TERMINAL, Job, Model, wire

PREFIX = keys.prefix(0)
FAR = 3_000_000_000_000
"""Expiries above this were computed by the tests' clock, the others by Redis's own."""

DUMP = """#!lua flags=no-writes
local read = {
  hash = function(key) return redis.call('HGETALL', key) end,
  string = function(key) return redis.call('GET', key) end,
  set = function(key) return redis.call('SMEMBERS', key) end,
  zset = function(key) return redis.call('ZRANGE', key, 0, -1, 'WITHSCORES') end,
  stream = function(key) return redis.call('XRANGE', key, '-', '+') end,
}
local all = {}
for _, key in ipairs(redis.call('KEYS', '*')) do
  local kind = redis.call('TYPE', key).ok
  all[#all + 1] = { key, kind, read[kind](key), redis.call('PEXPIRETIME', key) }
end
return all
"""


class Found(NamedTuple):
    """One key: its value (streams as (id, fields) pairs) and its expiry, -1 for none."""

    value: Any
    expiry: int


def found(client: redis.Redis) -> dict[str, Found]:
    """Every key of the store, without its prefix."""
    rows: Any = client.eval(DUMP, 0)
    return {row[0].decode().removeprefix(PREFIX): Found(VALUES[row[1]](row[2]), row[3]) for row in rows}


def pairs(flat: list[bytes]) -> dict[str, str]:
    words = [word.decode(errors="surrogateescape") for word in flat]
    return dict(zip(words[::2], words[1::2], strict=True))


VALUES: dict[bytes, Any] = {
    # a field that is gone is stored empty
    b"hash": lambda flat: {name: value for name, value in pairs(flat).items() if value},
    b"string": bytes.decode,
    b"set": lambda members: {member.decode() for member in members},
    b"zset": lambda flat: {member: int(float(score)) for member, score in pairs(flat).items()},
    b"stream": lambda entries: [(entry_id.decode(), pairs(fields)) for entry_id, fields in entries],
}

# --- what the model expects ------------------------------------------------------------------------------


def expected(model: Model) -> dict[str, Found]:
    """The model's state as keys; expiries by Redis's own clock are 1."""
    state: dict[str, Found] = {}
    for job in model.jobs.values():
        state |= {
            f"job:{job.id}{rest}": Found(value, job.expiry or -1)
            for rest, value in job_keys(model, job).items()
        }
        state |= (
            {f"ckey:{job.ckey}": Found(job.id, -1)} if job.ckey and model.key_holder(job.ckey) is job else {}
        )
    for key, record in model.records.items():
        state[f"idem:{key}"] = Found(f"{record.job} {record.body}", record.expiry or -1)
    for worker, filed in model.filed.items():
        leases = (f"{job_id}:{epoch}" for job_id, epoch in filed.leases)
        state[f"take:{worker}"] = Found(" ".join([str(filed.number), *leases]), 1)
    for name, (full, written) in model.buckets.items():
        state[name] = Found(f"{full:.3f} {written}", math.ceil(full))
    for owner, entries in model.owner_feeds.items():
        state[f"owner:{owner}:events"] = Found([(*entry[:3], entry[3].decode()) for entry in entries], 1)
    return state | {name: Found(value, -1) for name, value in shared_keys(model).items() if value}


def job_keys(model: Model, job: Job) -> dict[str, Any]:
    log = [(entry.id, entry.type, entry.content.decode()) for entry in job.stream]
    artifacts = {name: content.decode() for name, (_, content) in job.artifacts.items()}
    artifacts |= {f"{name}/": media_type for name, (media_type, _) in job.artifacts.items()}
    optional = {":children": set(job.children), ":seen": job.seen, ":artifacts": artifacts}
    if job.segments:
        optional[":sealed"] = sealed_hash(job)
    if log or not job.is_ended:
        optional[":events"] = log
    return {"": job_hash(model, job)} | {
        rest: value for rest, value in optional.items() if value or rest == ":events"
    }


def sealed_hash(job: Job) -> dict[str, str]:
    fields: dict[str, Any] = {str(piece.last_seq): piece.blob for piece in job.segments}
    fields["index"] = "".join(f"{piece.line}\n" for piece in job.segments).encode()
    if job.snap:
        fields["snap"] = job.snapshot
    return {name: value.decode(errors="surrogateescape") for name, value in fields.items()}


def job_hash(model: Model, job: Job) -> dict[str, str]:
    fields = {
        "owner": job.owner, "kind": job.kind, "queue": job.queue, "priority": job.priority,
        "status": job.status, "created": job.created, "ended": job.ended,
        "error": job.error or None, "rerun": job.rerun or None, "unpaid": job.is_unpaid or None,
        "seq": job.seq, "last": job.log[-1].id, "bytes": job.size,
        "fed": job.fed or None, "epoch": job.epoch or None, "lease": job.epoch if job.is_running else None,
        "worker": job.worker or None, "batch": job.batch if job.has_started else None,
        "commit": "{}:{}:{} {}".format(*job.commit) if job.commit else None, "inbox": job.inbox or None,
        "attempt": job.attempt, "crashes": job.crashes or None, "lost": job.is_lost or None,
        "started": job.has_started or None, "since": job.since, "ticket": job.ticket and job.ticket.priority,
        "held": job.held or None, "order": job.order, "wake": job.wake, "timeout": job.timeout or None,
        "timers": json.dumps(job.timers, sort_keys=True) if job.timers else None, "deadline": job.deadline,
        "start_by": job.start_by, "due": model.timers().get(job.id), "cancel": job.cancelled_at,
        "cancel_by": None if job.cancelled_at is None else spliced(job.cancel_fields),
        "late": job.late or None, "pause": None if job.pause is None else spliced(job.pause),
        "ckey": job.ckey or None,
        "idem": job.idem or None, "parent": job.parent or None, "family": bool(job.children) or None,
        "depth": job.depth or None, "asked": bool(job.seen) or None,
        "artifacts": sum(len(content) for _, content in job.artifacts.values()) if job.artifacts else None,
        "sealed": job.sealed or None, "snap": job.snap or None,
    }  # fmt: skip
    return {name: str(1 if value is True else value) for name, value in fields.items() if value is not None}


def spliced(fields: dict[str, Any]) -> str:
    """JSON fields without the braces."""
    return wire(fields)[1:-1].decode()


def shared_keys(model: Model) -> dict[str, Any]:
    live = model.live_jobs()
    queued = [job for job in live if job.ticket]
    counts = [f"waiting:{job.queue}" for job in queued]
    counts += [f"held:{job.queue}" for job in live if job.held]
    counts += [f"running:{job.queue}" for job in live if job.is_running]
    work = {
        f"work:{queue}:{kind}": [ticket.job for ticket in line] for (queue, kind), line in model.work.items()
    }
    held = {f"held:{name}": {job.id: job.order for job in model.held_jobs(name)} for name in model.looked_at}
    running = {f"running:{owner}": model.running(owner) for owner in {job.owner for job in live}}
    sweep = {} if model.last_sweep is None else {"last": str(model.last_sweep), "grace": str(model.grace)}
    return work | held | running | {
        "leases": model.leases(), "timers": model.timers(), "held": model.looked_at, "sweep": sweep,
        "dead": model.dead, "strikes": {what: fields.decode() for what, fields in model.strikes.items()},
        "tickets": tally(f"{job.queue}|{job.owner}" for job in queued), "feed": model.feed,
        "counts": tally(counts) | ({"order": str(model.holds_made)} if model.holds_made else {}),
    }  # fmt: skip


def tally(names: Any) -> dict[str, str]:
    counted: dict[str, int] = {}
    for name in names:
        counted[name] = counted.get(name, 0) + 1
    return {name: str(n) for name, n in counted.items()}


# --- what was found, in the same form --------------------------------------------------------------------

ENTRY_FORMS: list[tuple[re.Pattern[str], Any]] = [
    (re.compile(r"job:[^:]+:events"), lambda entry_id, e: [(entry_id, e["t"], e["d"])]),
    (re.compile(r"work:.*"), lambda _, e: [e["j"]]),
    (re.compile(r"feed"), lambda _, e: [note(line) for line in e["n"].split("\n")]),
    (re.compile(r"owner:.*:events"), lambda _, e: [fact(line) for line in e["e"].split("\n")]),
]
"""Name of a stream -> what one of its entries says; the feeds' hold a line for each event."""


def note(line: str) -> tuple[str, int, str]:
    job_id, seq, kind = line.split(" ")
    return job_id, int(seq), kind


def fact(line: str) -> tuple[str, str, str, str]:
    job_id, event_id, kind, *content = line.split(" ", 3)
    return job_id, event_id, kind, content[0] if content else ""


def comparable(state: dict[str, Found]) -> dict[str, Found]:
    """Without ids of Redis's own clock, counts of nothing, and the empty streams that a take leaves."""
    compared = {name: Found(meaning(name, key.value), expiry_of(key)) for name, key in state.items()}
    return {
        name: key for name, key in compared.items() if key.value or not name.startswith(("work:", "counts"))
    }


def meaning(name: str, value: Any) -> Any:
    if isinstance(value, list):
        form = next(form for pattern, form in ENTRY_FORMS if pattern.fullmatch(name))
        return [said for entry_id, fields in value for said in form(entry_id, fields)]
    if name == "counts":
        return {field: count for field, count in value.items() if count != "0"}
    if re.fullmatch("job:[^:]+", name):
        return meaning_of_hash(value)
    return value


def meaning_of_hash(value: dict[str, str]) -> dict[str, str]:
    fields = dict(value)
    if "ticket" in fields:
        fields["ticket"] = fields["ticket"].partition("|")[0]
    timers = json.loads(fields.pop("timers", "{}"))
    return fields | ({"timers": json.dumps(timers, sort_keys=True)} if timers else {})


def expiry_of(key: Found) -> int:
    return 1 if 0 < key.expiry < FAR else key.expiry


# --- what must hold --------------------------------------------------------------------------------------


def check_invariants(state: dict[str, Found]) -> None:
    """Dense logs, one end, one writer, one place, one expiry; no place of a job that is not there."""
    hashes = {name[4:]: key.value for name, key in state.items() if re.fullmatch("job:[^:]+", name)}
    for job_id, fields in hashes.items():
        log = whole_log(job_id, fields, state)
        check_log(job_id, fields, log)
        check_writers(job_id, log)
        check_place(job_id, fields, state)
        check_expiry(job_id, fields["status"] in ENDED, state)
    check_members(hashes, state)


def whole_log(job_id: str, fields: dict[str, str], state: dict[str, Found]) -> list[tuple[str, str]]:
    """Ids and types of all events, those in segments too; nothing is in both, nothing in neither."""
    stream = members(state, f"job:{job_id}:events")
    history: dict[str, str] = dict(members(state, f"job:{job_id}:sealed"))
    index = segments.parse_index(history.get("index", ""))
    names = {"index", *(str(segment.last.seq) for segment in index)} if index else set[str]()
    assert set(history) == names | ({"snap"} if "snap" in fields else set()), f"{job_id}: {set(history)}"
    sealed = [
        entry
        for segment in index
        for entry in segments.decode(history[str(segment.last.seq)].encode(errors="surrogateescape"))
    ]
    last = str(sealed[-1].cursor) if sealed else None
    assert fields.get("sealed") == last, f"{job_id}: sealed up to {last}, says {fields.get('sealed')}"
    assert fields.get("snap", last) == last, f"{job_id}: a snapshot at {fields['snap']}, sealed up to {last}"
    return [(str(entry.cursor), entry.type) for entry in sealed] + [(i, e["t"]) for i, e in stream]


def check_log(job_id: str, fields: dict[str, str], log: list[tuple[str, str]]) -> None:
    seqs = [int(entry_id.partition("-")[0]) for entry_id, _ in log]
    assert seqs == list(range(1, len(log) + 1)), f"{job_id}: not dense: {seqs}"
    assert (fields["seq"], fields["last"]) == (str(len(log)), log[-1][0]), (
        f"{job_id}: the hash is not at the log's end"
    )
    ends = [(seq, TERMINAL[kind]) for seq, (_, kind) in enumerate(log, 1) if kind in TERMINAL]
    wanted = [(len(log), fields["status"])] if fields["status"] in ENDED else []
    assert ends == wanted, f"{job_id}: is {fields['status']}, its log ends {ends}"


def check_writers(job_id: str, log: list[tuple[str, str]]) -> None:
    """What only a lease holder writes carries the epoch of the last start; after a cancel no tool starts."""
    kinds = [kind for _, kind in log]
    if "job.cancel_requested" in kinds:
        assert "tool.started" not in kinds[kinds.index("job.cancel_requested") :], f"{job_id}: {kinds}"
    holder = 0
    for entry_id, kind in log:
        epoch = int(entry_id.partition("-")[2])
        if kind == "job.started":
            assert epoch > holder, f"{job_id}: lease {epoch} after {holder}"
            holder = epoch
        if kind.startswith(("text.", "step.", "tool.", "x.")) or kind in {
            "job.progress",
            "job.log",
            "job.completed",
        }:
            assert epoch == holder, f"{job_id}: {entry_id} was written under lease {holder}"


def check_place(job_id: str, fields: dict[str, str], state: dict[str, Found]) -> None:
    places = {
        "ticket": has_ticket(fields, state),
        "held": any(job_id in key.value for name, key in state.items() if name.startswith("held:")),
        "lease": job_id in members(state, "leases"),
        "running set": job_id in members(state, f"running:{fields['owner']}"),
        "timer": job_id in members(state, "timers"),
    }
    status = fields["status"]
    allowed = {
        "queued": [{"ticket"}, {"held"}],
        "running": [{"lease", "running set"}],
        "scheduled": [{"timer"}],
    }.get(status, [set[str]()])
    is_in = {place for place, is_there in places.items() if is_there}
    if status != "scheduled" and status not in ENDED:
        is_in.discard("timer")
    assert is_in in allowed, f"{job_id}: {status}, and in {is_in or 'no place'}"
    assert places["timer"] == ("due" in fields), (
        f"{job_id}: due {fields.get('due')}, timer: {places['timer']}"
    )


def has_ticket(fields: dict[str, str], state: dict[str, Found]) -> bool:
    kind, _, entry_id = fields.get("ticket", "").partition("|")
    return any(entry_id == found_id for found_id, _ in members(state, f"work:{fields['queue']}:{kind}"))


def check_expiry(job_id: str, is_ended: bool, state: dict[str, Found]) -> None:
    own = {name: key.expiry for name, key in state.items() if name.startswith(f"job:{job_id}")}
    assert len(set(own.values())) == 1, f"{job_id}: its keys expire apart: {own}"
    assert (own[f"job:{job_id}"] > 0) == is_ended, f"{job_id}: ended is {is_ended}, expiries {own}"


def check_members(hashes: dict[str, dict[str, str]], state: dict[str, Found]) -> None:
    """No place names a job that is not there; what is counted is right."""
    statuses = {job_id: fields["status"] for job_id, fields in hashes.items()}
    for job_id in members(state, "leases"):
        assert statuses.get(job_id) == "running", f"{job_id} has a lease and is {statuses.get(job_id)}"
    for job_id, at in dict(members(state, "timers")).items():
        assert hashes.get(job_id, {}).get("due") == str(at), f"{job_id} has a timer at {at}"
    for name, key in state.items():
        if name.startswith("held:"):
            assert name[5:] in members(state, "held"), f"{name} is not looked at by wake"
            assert all(hashes.get(job_id, {}).get("held") for job_id in key.value), f"{name}: {key.value}"
    for name, count in dict(members(state, "counts")).items():
        if name != "order":
            assert int(count) == counted(name, hashes), f"{name} counts {count}"


def counted(name: str, hashes: dict[str, dict[str, str]]) -> int:
    what, _, queue = name.partition(":")
    marks = {"waiting": "ticket", "held": "held", "running": "lease"}
    return sum(1 for fields in hashes.values() if marks[what] in fields and fields["queue"] == queue)


def members(state: dict[str, Found], name: str) -> Any:
    key = state.get(name)
    return key.value if key else ()
