"""Every key: pattern, type, lifetime. The doctor and the tests' leak checker read this same table.

Rule 1: all keys of a partition carry its hash tag `{p}` and so live in one cluster slot.
Rule 2: scripts derive every key from the prefix of `sj:{p}:leases`; what they write stands here.
Rule 3: what belongs to a job expires with it; what belongs to the system is bounded by live jobs or a cap.
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
import zlib
from typing import Literal, NamedTuple

from streamjobs.errors import JobNotFound, ScheduleNotFound

Lifetime = Literal["job", "live", "ttl", "capped", "forever"]
"""job: expires when its job's retention ends · live: gone when empty · ttl: always has an expiry ·
capped: bounded by a cap · forever: one a store"""


class Key(NamedTuple):
    """One kind of key: a pattern over its full name, the Redis type, how long it lives, what it is."""

    pattern: re.Pattern[str]
    type: str
    lifetime: Lifetime
    meaning: str


def _key(form: str, kind: str, lifetime: Lifetime, meaning: str) -> Key:
    escaped = re.escape(form).replace("<job>", _JOB).replace("<schedule>", _SCHEDULE).replace("<any>", ".+")
    return Key(re.compile(r"sj:\{\d+\}:" + escaped), kind, lifetime, meaning)


_JOB = r"j\d{1,4}-[a-z2-7]{26}"
_SCHEDULE = r"s\d{1,4}-[a-z2-7]{26}"
_JOB_ID = re.compile(r"j(0|[1-9]\d{0,3})-[a-z2-7]{26}", re.ASCII)
_SCHEDULE_ID = re.compile(r"s(0|[1-9]\d{0,3})-[a-z2-7]{26}", re.ASCII)

KEYS: tuple[Key, ...] = (
    _key("job:<job>", "hash", "job", "the job's state, see FIELDS"),
    _key("job:<job>:events", "stream", "job", "the job's log, or what of it is not sealed"),
    _key("job:<job>:sealed", "hash", "job", "segments by last seq; `index`: a line for each; `snap`: a fold"),
    _key("job:<job>:children", "set", "job", "jobs it spawned"),
    _key("job:<job>:seen", "set", "job", "dedupe keys of signals, pauses and resumes"),
    _key("job:<job>:artifacts", "hash", "job", "what it made: name -> content, name/ -> media type"),
    _key(
        "job:<job>:datakey", "string", "job", "its data key, wrapped; of an archived job it outlives the job"
    ),
    _key("idem:<any>", "string", "job", "digest of (owner, Idempotency-Key) -> job id and body digest"),
    _key("ckey:<any>", "string", "live", "digest of (owner, concurrency_key) -> the job that holds it"),
    _key("work:<any>", "stream", "live", "tickets of one queue and class; group `workers`"),
    _key("leases", "zset", "live", "running jobs by the end of their lease"),
    _key("timers", "zset", "live", "jobs by the earliest instant at which something is due"),
    _key("held", "zset", "live", "lists of held jobs, by when they were last looked at"),
    _key(
        "held:<any>",
        "zset",
        "live",
        "held jobs of one queue and owner (and concurrency key, or struck kind), in order",
    ),
    _key("apikeys", "hash", "capped", "API keys by id: digest, whose, scopes, until when"),
    _key("strikes", "hash", "live", "queues, kinds and tools that an operator has stopped"),
    _key("dead", "zset", "capped", "failed jobs that nobody has run again, by their end"),
    _key("running:<any>", "set", "live", "an owner's running jobs"),
    _key("tickets", "hash", "live", "tickets for each queue and owner"),
    _key("counts", "hash", "forever", "waiting, held, running for each queue"),
    _key("sweep", "hash", "forever", "when the last sweep was; until when no lease expires"),
    _key("feed", "stream", "capped", "notes for projections"),
    _key(
        "projections",
        "hash",
        "forever",
        "of each: since when, rebuild asked for, cap seen; what was trimmed; see feed.lua",
    ),
    _key("quarantine:<any>", "hash", "capped", "jobs on which a projection failed, and how"),
    _key("rebuilding:<any>", "string", "ttl", "the projector that rebuilds a projection"),
    _key("index:<any>", "zset", "live", "an owner's jobs by when they were made"),
    _key("indexed:<any>", "hash", "live", "what lists show and filter of each, see index.lua"),
    _key("indexed_counts:<any>", "hash", "live", "how many of them are where; how far they are swept"),
    _key("indexes", "zset", "live", "owners with jobs in the index, by when they were last swept"),
    _key("totals:<any>", "hash", "forever", "statistics for each kind and queue, of one generation"),
    _key("history:<any>", "hash", "ttl", "the same for five minutes or an hour"),
    _key("owner:<any>:events", "stream", "ttl", "lifecycle and progress of all of an owner's jobs"),
    _key("rate:<any>", "string", "ttl", "an owner's submissions: when a whole minute's are there again"),
    _key("bucket:<any>", "string", "ttl", "permits of one name: when all are there again"),
    _key("take:<any>", "string", "ttl", "a worker's last take, for its resend"),
    _key("worker:<any>", "string", "ttl", "a worker's registration"),
    _key("workers", "zset", "live", "worker ids by heartbeat"),
    _key("schedule:<schedule>", "hash", "live", "a schedule until it is deleted, see SCHEDULE_FIELDS"),
    _key("schedules", "zset", "live", "schedules that are not paused, by the tick they wait for"),
    _key("owner:<any>:schedules", "zset", "live", "all of an owner's schedules, by when they were made"),
    _key("ended", "zset", "live", "ended jobs whose retention is set, by when they expire"),
    _key("notices:<any>", "stream", "ttl", "what an owner is told of jobs"),
    _key("unread:<any>", "zset", "ttl", "the notices that an owner has not read, by instant"),
    _key("webhooks:<any>", "hash", "live", "an owner's webhooks: definition, secret, why disabled"),
    _key("deliveries", "zset", "live", "deliveries to webhooks by when the next try is due"),
    _key("delivery:<any>", "hash", "ttl", "one delivery: its content, its tries, the last error"),
    _key(
        "undelivered:<any>",
        "zset",
        "ttl",
        "deliveries that one webhook never took, by when they were given up",
    ),
)

HEAD = KEYS[0]
"""The kind of key that every job has one of."""

META = "sj:meta"
"""Hash: what a store was created with (partitions, format). One a store."""

META_DATA_KEY = "datakey"
"""Its field with the data key of what belongs to no job, wrapped. It is there where jobs are encrypted."""

FIELDS: dict[str, str] = {
    "owner": "whose job it is",
    "kind": "workflow",
    "queue": "queue",
    "priority": "high, default or low",
    "status": "where it is",
    "created": "ms; also the epoch half of its first event's id",
    "ended": "ms",
    "error": "code of what it failed with",
    "rerun": "the newest job that runs it again",
    "seq": "of its last event",
    "last": "id of its last event",
    "bytes": "of all event contents",
    "fed": "bytes of deltas since the last note on the feed",
    "epoch": "of its last lease",
    "lease": "the epoch, while and only while it is running",
    "worker": "who had the last lease",
    "batch": "number of the last batch within the lease",
    "commit": "fingerprint of that batch, and the seq it ended at",
    "inbox": "how many things came from outside",
    "attempt": "1 and up",
    "crashes": "leases lost in a row without progress",
    "lost": "set from a lost lease to the next one",
    "started": "set once it ran",
    "since": "ms, queued since",
    "ticket": "class and entry id of its ticket",
    "held": "why it is held",
    "order": "its place among held jobs",
    "unpaid": "set while its owner's rate has no token for it",
    "wake": "ms, when a scheduled job goes on",
    "timers": "JSON, key -> ms",
    "timeout": "ms, from first start to end",
    "deadline": "ms, the instant that makes",
    "start_by": "ms, queue timeout",
    "due": "its score in `timers`",
    "cancel": "ms, when cancelling was asked for",
    "cancel_by": "by whom and why, as JSON fields",
    "late": "deltas written since",
    "pause": "by whom and why, as JSON fields, until carried out",
    "ckey": "digest of owner and concurrency key",
    "idem": "digest of owner and Idempotency-Key",
    "parent": "job that spawned it",
    "depth": "1 for a child, one more for each generation below",
    "family": "set if it has children",
    "asked": "set if it has a `seen` key",
    "artifacts": "bytes of all its artifacts; set if it has any",
    "told": "id of the last event that its owner's notices and webhooks were told of",
    "sealed": "id of the last event that is in a segment; those above are in the stream",
    "snap": "id of the event at which the stored snapshot stands: none, or the same",
    "archived": "set once its file is in the archive",
    "datakey": "set if it has a data key, also after that was deleted",
    "stats": "how far its log is counted, see stats.lua",
}
"""Fields of a job's hash, all optional but the first few."""

SCHEDULE_FIELDS: dict[str, str] = {
    "owner": "whose jobs it makes",
    "definition": "what and when, as JSON",
    "digest": "of the definition, to see whether it changed",
    "overlap": "allow or skip, as in the definition: for the script that makes its jobs",
    "created": "ms",
    "app": "name of the App whose code declares it; empty for one made by a call",
    "declared": "ms, when a worker last declared it",
    "paused": "set while it is",
    "last_tick": "ms, the last tick that gave a job",
    "last_job": "the job that was made last, also out of turn",
    "runs": "how many jobs it made",
    "skipped": "how many ticks gave no job",
    "error": "why the last tick gave no job, where its definition was at fault",
}
"""Fields of a schedule's hash."""


def classify(name: str) -> Key | None:
    """The kind of a key, None for one that nobody declared."""
    return next((key for key in KEYS if key.pattern.fullmatch(name)), None)


def prefix(partition: int) -> str:
    """What every key of a partition begins with."""
    return f"sj:{{{partition}}}:"


def partition_of_owner(owner: str, partitions: int) -> int:
    """The partition that holds everything of an owner."""
    return zlib.crc32(owner.encode()) % partitions


def partition_of_job(job_id: str) -> int:
    """The partition written into a job's id.

    Raises `JobNotFound` for what cannot be an id.
    """
    match = _JOB_ID.fullmatch(job_id)
    if match is None:
        raise JobNotFound("no such job")
    return int(match[1])


def partition_of_schedule(schedule_id: str) -> int:
    """The partition written into a schedule's id.

    Raises `ScheduleNotFound` for what cannot be an id.
    """
    match = _SCHEDULE_ID.fullmatch(schedule_id)
    if match is None:
        raise ScheduleNotFound("no such schedule")
    return int(match[1])


def schedule_key(schedule_id: str) -> str:
    """The key of a schedule's hash."""
    return f"{prefix(partition_of_schedule(schedule_id))}schedule:{schedule_id}"


def job_key(job_id: str) -> str:
    """The key of a job's hash; its log is the same with `:events` behind."""
    return f"{prefix(partition_of_job(job_id))}job:{job_id}"


def live_channel(job_id: str) -> str:
    """The pub/sub channel of a job's new events."""
    return f"{prefix(partition_of_job(job_id))}live:{job_id}"


def owner_feed_key(owner: str, partitions: int) -> str:
    """The stream of an owner's feed."""
    return f"{prefix(partition_of_owner(owner, partitions))}owner:{owner}:events"


def owner_channel(owner: str, partitions: int) -> str:
    """The pub/sub channel that says, with an empty message, that an owner's feed has more."""
    return f"{prefix(partition_of_owner(owner, partitions))}owner:{owner}:live"


def new_job_id(partition: int) -> str:
    """A random id: 128 bits, nothing to guess."""
    return _format_id(partition, secrets.token_bytes(16))


def child_job_id(parent_id: str, key: str) -> str:
    """The id of a parent's child: the same for the same key, so that spawning again finds it."""
    digest = hashlib.blake2b(f"{parent_id}\0{key}".encode(), digest_size=16).digest()
    return _format_id(partition_of_job(parent_id), digest)


def rerun_job_id(job_id: str, key: str) -> str:
    """The id of the job that runs another one again: the same for the same key."""
    digest = hashlib.blake2b(
        f"{job_id}\0{key}".encode(errors="surrogatepass"), digest_size=16, person=b"rerun"
    )
    return _format_id(partition_of_job(job_id), digest.digest())


def tick_job_id(schedule_id: str, tick_ms: int) -> str:
    """The id of the job that a tick gives: the same for all who see the tick."""
    return _format_id(partition_of_schedule(schedule_id), _digest(schedule_id, str(tick_ms)))


def new_schedule_id(partition: int, *names: str) -> str:
    """A schedule's id: random, or with names the same for the same ones."""
    return _format_id(partition, _digest(*names) if names else secrets.token_bytes(16), "s")


def new_webhook_id() -> str:
    """A random id; a webhook is looked for among its owner's only."""
    return f"wh_{_base32(secrets.token_bytes(16))}"


def delivery_id(job_id: str, cursor: str, webhook_id: str) -> str:
    """The id of what is delivered to a webhook of one event: the same for all who see the event."""
    return f"msg_{_base32(_digest(job_id, cursor, webhook_id))}"


def _digest(*words: str) -> bytes:
    return hashlib.blake2b("\0".join(words).encode(errors="surrogatepass"), digest_size=16).digest()


def _format_id(partition: int, random: bytes, letter: str = "j") -> str:
    return f"{letter}{partition}-{_base32(random)}"


def _base32(raw: bytes) -> str:
    return base64.b32encode(raw).decode().lower().rstrip("=")


def scoped_digest(owner: str, key: str) -> str:
    """What a caller's key becomes: scoped to its owner, of fixed length and form."""
    return hashlib.blake2b(f"{owner}\0{key}".encode(errors="surrogatepass"), digest_size=16).hexdigest()
