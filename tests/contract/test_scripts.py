"""The sharp edges of the scripts, one story each."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any

import msgspec
import pytest
import redis as sync_redis

from streamjobs.config import Settings
from streamjobs.errors import JobNotFound, StoreFull, TooDeep, TooManyChildren
from streamjobs.store import Batch, Store, Submission, keys
from streamjobs.store.log import parse_live
from streamjobs.store.scripts import Limits, flatten
from tests.conftest import RedisProcess
from tests.contract.callers import Ear, ScriptCaller, plain, submit_row
from tests.contract.commands import SLOT_IDS
from tests.contract.keyspace import PREFIX, check_invariants, fact, found, note
from tests.model import NewJob, wire

LIMITS = Limits.of(Settings())
HOUR = 3_600_000
A, B, C, D = SLOT_IDS[:4]


class Partition:
    """The scripts as methods, as shipped but for the clock, which stands still unless told."""

    def __init__(self, client: sync_redis.Redis, limits: Limits = LIMITS) -> None:
        self.client = client
        self.call = ScriptCaller(client, limits)
        self.number = 0

    def notes(self) -> list[tuple[str, int, str]]:
        """What projections are told: job, seq, type."""
        entries: Any = self.client.xrange(f"{PREFIX}feed")
        return [note(line) for _, entry in entries for line in entry[b"n"].decode().split("\n")]

    def submit(self, *jobs: NewJob) -> list[Any]:
        return plain(self.call("submit", len(jobs), *flatten(submit_row(job) for job in jobs)))

    def take(self, wanted: int = 10, *queues: str, weights: str = "8,4,1") -> list[tuple[str, int]]:
        return [(job[0], job[1]) for job in self.take_all(wanted, *queues, weights=weights)[1]]

    def take_all(self, wanted: int = 10, *queues: str, weights: str = "8,4,1") -> list[Any]:
        self.number += 1
        return plain(self.call("take", "w1", self.number, wanted, weights, *(queues or ("fast",))))

    def append(self, *batches: Batch) -> list[Any]:
        return plain(self.call("append", len(batches), *flatten(batch.row() for batch in batches)))

    def end(self, lease: tuple[str, int], number: int = 1, result: Any = None) -> list[Any]:
        return self.append(
            Batch(*lease, number, [("job.completed", wire({"ts": 1, "result": result}))], "completed")
        )

    def wake(self, limit: int = 100) -> list[list[str]]:
        return plain(self.call("wake", limit))[3]

    def cancel(self, job_id: str) -> list[Any]:
        return plain(self.call("cancel", job_id, '"by":"ann","reason":""'))

    def advance(self, ms: int) -> None:
        self.call.now += ms

    def sweep_for(self, ms: int) -> list[list[str]]:
        """Sweep every second for so long; returns all changes."""
        changes: list[list[str]] = []
        for _ in range(ms // 1000):
            self.advance(1000)
            changes += self.wake()
        return changes

    def log(self, job_id: str) -> list[tuple[str, dict[str, Any]]]:
        entries: Any = self.client.xrange(f"{PREFIX}job:{job_id}:events")
        return [(fields[b"t"].decode(), json.loads(fields[b"d"])) for _, fields in entries]

    def types(self, job_id: str) -> list[str]:
        return [kind for kind, _ in self.log(job_id)]

    def field(self, job_id: str, name: str) -> str:
        value: Any = self.client.hget(f"{PREFIX}job:{job_id}", name)
        return value.decode() if value else ""

    def broken(self, key: str) -> None:
        """Put something of another type in a key's place."""
        self.client.delete(PREFIX + key)
        self.client.set(PREFIX + key, "not what it was")


@pytest.fixture
def client(redis: RedisProcess) -> Iterator[sync_redis.Redis]:
    with redis.client() as client:
        yield client


@pytest.fixture
def partition(client: sync_redis.Redis) -> Partition:
    return Partition(client)


@pytest.fixture
def ear(client: sync_redis.Redis) -> Iterator[Ear]:
    ear = Ear(client)
    ear.heard()
    yield ear
    ear.close()


def delta(text: str) -> tuple[str, bytes]:
    return "text.delta", wire({"ts": 1, "turn": 1, "text": text})


# --- tickets ---------------------------------------------------------------------------------------------


def test_low_priority_gets_its_share(partition: Partition) -> None:
    """Without it, one busy producer of urgent jobs keeps the others' jobs waiting for ever."""
    partition = Partition(partition.client, Limits.of(Settings(owner_limit=0)))
    jobs = [
        NewJob(f"j0-{p[0] * 24}{'abcdefgh'[i]}a", priority=p)
        for p in ("high", "default", "low")
        for i in range(8)
    ]
    partition.submit(*jobs)
    taken = [job for _ in range(8) for job, _ in partition.take(1, weights="2,1,1")]
    assert Counter(job[3] for job in taken) == {"h": 4, "d": 2, "l": 2}


def test_the_ticket_of_a_cancelled_job_is_skipped(partition: Partition) -> None:
    """Without it, cancelled jobs start, or stop the queue behind them."""
    partition.submit(NewJob(A), NewJob(B))
    partition.cancel(A)
    assert [job for job, _ in partition.take()] == [B]
    assert partition.types(A) == ["job.queued", "job.cancel_requested", "job.cancelled"]


def test_a_group_that_is_gone_is_made_again(partition: Partition) -> None:
    """Without it, a failover to an empty replica or a curious operator stops every worker."""
    partition.submit(NewJob(A))
    partition.take()
    partition.submit(NewJob(B), NewJob(C))
    partition.client.xgroup_destroy(f"{PREFIX}work:fast:default", "workers")
    assert [job for job, _ in partition.take()] == [B, C]
    partition.client.delete(f"{PREFIX}work:fast:default")
    partition.submit(NewJob(D))
    assert [job for job, _ in partition.take()] == [D]


def test_the_backlog_is_what_standard_tools_read(partition: Partition) -> None:
    """Without it, an autoscaler that reads `lag` scales to zero over a backlog."""
    partition.submit(*(NewJob(job_id) for job_id in SLOT_IDS[:7]))
    partition.take(3)
    partition.cancel(SLOT_IDS[5])
    groups: Any = partition.client.xinfo_groups(f"{PREFIX}work:fast:default")
    assert (groups[0]["lag"], groups[0]["pending"]) == (4, 0)
    assert partition.client.xlen(f"{PREFIX}work:fast:default") == 4
    assert partition.client.hget(f"{PREFIX}counts", "waiting:fast") == b"3"
    partition.take()
    groups = partition.client.xinfo_groups(f"{PREFIX}work:fast:default")
    assert (groups[0]["lag"], groups[0]["pending"]) == (0, 0)


def test_many_stale_tickets_do_not_put_a_worker_to_sleep(client: sync_redis.Redis) -> None:
    """Without it, after a mass cancellation a worker waits a second for each 2,000 stale tickets."""
    partition = Partition(client, Limits(**{**as_dict(LIMITS), "scan": 3}))
    partition.submit(*(NewJob(job_id) for job_id in SLOT_IDS[:6]))
    for job_id in SLOT_IDS[:5]:
        partition.cancel(job_id)
    _, jobs, ends, _ = partition.take_all()
    assert jobs == []
    behind: Any = client.xread(dict(zip(ends[::2], ends[1::2], strict=True)))
    assert behind, "the blocked read that follows would not return"
    assert [job for job, _ in partition.take()] == [SLOT_IDS[5]]
    _, _, ends, _ = partition.take_all()
    assert not client.xread(dict(zip(ends[::2], ends[1::2], strict=True)))


def as_dict(limits: Limits) -> dict[str, Any]:
    return {name: getattr(limits, name) for name in limits.__struct_fields__}


def test_a_wait_counts_from_its_start(client: sync_redis.Redis) -> None:
    """Without it, the jobs that waited longest, held ones, look as if they had not waited."""
    partition = Partition(client, Limits.of(Settings(owner_limit=1)))
    partition.submit(NewJob(A), NewJob(B))
    (lease,) = partition.take()
    partition.advance(5_000)
    partition.end(lease)
    partition.advance(1_000)
    partition.take()
    assert partition.log(B)[-1][1]["waited_ms"] == 6_000


# --- memory ----------------------------------------------------------------------------------------------


@pytest.fixture
async def full(store: Store, client: sync_redis.Redis) -> AsyncIterator[sync_redis.Redis]:
    """`client`; Redis is full once it says so, and no longer afterwards."""
    yield client
    client.config_set("maxmemory", 0)


async def test_a_full_store_drains(store: Store, full: sync_redis.Redis) -> None:
    """Without it, a Redis at its limit never gets empty again: what would free it is refused."""
    ids = [(await store.jobs.submit(Submission(kind="work"))).job_id for _ in range(3)]
    leases = (await store.work.take(0, "w1", 1, 2, ["default"])).leases
    full.config_set("maxmemory", 1)
    with pytest.raises(StoreFull):
        await store.jobs.submit(Submission(kind="work"))
    with pytest.raises(StoreFull):
        await store.jobs.signal(ids[0], "go")
    words = Batch(leases[0].job_id, leases[0].epoch, 1, [delta("word")])
    with pytest.raises(StoreFull):
        await store.work.append(0, [words])
    end = Batch(leases[0].job_id, leases[0].epoch, 1, [("job.completed", wire({"ts": 1}))], "completed")
    assert [answer.verdict for answer in await store.work.append(0, [end], always=True)] == ["ok"]
    assert await store.jobs.cancel(leases[1].job_id) == "requested"
    assert (await store.work.renew(0, [leases[1][:2]]))[1][0].asked == "cancel"
    assert [lease.job_id for lease in (await store.work.take(0, "w1", 2, 5, ["default"])).leases] == [ids[2]]
    assert (await store.work.wake(0)).changes == []
    assert len(await store.log.load(ids[0])) == 3


# --- rows fail alone -------------------------------------------------------------------------------------


def test_a_row_that_fails_harms_no_other(partition: Partition) -> None:
    """Without it, one corrupt job stops the writing of all jobs of its worker."""
    partition.submit(NewJob(A), NewJob(B), NewJob(C))
    leases = partition.take()
    partition.broken(f"job:{B}:events")
    answers = partition.append(*(Batch(*lease, 1, [delta("word")], "yield") for lease in leases))
    assert [answer[0] for answer in answers] == ["ok", "error", "ok"]
    assert sorted(job for job, _ in partition.take()) == [A, C]
    assert partition.client.zscore(f"{PREFIX}leases", B), "a job that could not be moved is where it was"
    partition.client.delete(f"{PREFIX}job:{B}:events", f"{PREFIX}job:{B}")


def test_a_corrupt_waiter_does_not_stop_the_sweep(client: sync_redis.Redis) -> None:
    """Without it, one corrupt job that is held keeps every timer and every lost job from being found."""
    partition = Partition(client, Limits.of(Settings(owner_limit=1)))
    partition.submit(NewJob(A), NewJob(B), NewJob(C, owner="bob", delay=1_000))
    (lease,) = partition.take()
    partition.broken(f"job:{B}:events")
    assert partition.end(lease)[0][0] == "ok"
    partition.advance(2_000)
    changes = partition.wake()
    assert [C, "woken"] in changes
    assert any(what.startswith("error") for _, what in changes)
    assert [job for job, _ in partition.take()] == [C]
    partition.client.delete(f"{PREFIX}job:{B}:events", f"{PREFIX}job:{B}")


def test_a_corrupt_parent_does_not_hold_its_child(partition: Partition) -> None:
    """Without it, a job whose parent is corrupt ends in its log and stays in the counts."""
    partition.submit(NewJob(A), NewJob(B, parent=A))
    leases = dict(partition.take())
    partition.broken(f"job:{A}:events")
    assert partition.end((B, leases[B]))[0][0] == "ok"
    assert partition.client.hget(f"{PREFIX}counts", "running:fast") == b"1"
    assert partition.client.zscore(f"{PREFIX}leases", B) is None
    partition.client.delete(f"{PREFIX}job:{A}:events", f"{PREFIX}job:{A}:children", f"{PREFIX}job:{A}")


def test_a_broken_queue_does_not_lose_what_was_taken_from_another(partition: Partition) -> None:
    """Without it, jobs would be running in their hashes and in no lease, and nobody would look for them."""
    partition.submit(NewJob(A), NewJob(B, queue="slow"))
    partition.broken("work:slow:default")
    _, jobs, _, failures = partition.take_all(10, "slow", "fast")
    assert [job[0] for job in jobs] == [A]
    assert len(failures) == 1
    assert partition.client.zscore(f"{PREFIX}leases", A)
    partition.client.delete(f"{PREFIX}work:slow:default")


# --- time ------------------------------------------------------------------------------------------------


def test_a_clock_that_steps_back_freezes_no_job(partition: Partition) -> None:
    """Without it, a corrected clock keeps jobs of dead workers running for as long as it was wrong."""
    partition.submit(NewJob(A))
    partition.take()
    partition.wake()
    partition.advance(-HOUR)
    assert partition.wake() == [], "nobody is declared dead at once"
    assert partition.sweep_for(LIMITS.lease - 1_000) == []
    assert partition.sweep_for(1_000) == [[A, "lost"]]


def test_a_clock_that_steps_back_while_stopping_takes_no_negative_time(partition: Partition) -> None:
    """Without it, dashboards of stop times show minus an hour."""
    partition.submit(NewJob(A))
    (lease,) = partition.take()
    partition.cancel(A)
    partition.advance(-HOUR)
    partition.append(Batch(*lease, 1, [], "cancelled"))
    assert partition.log(A)[-1][1]["effective_ms"] == 0


def test_after_an_outage_nobody_is_declared_dead(partition: Partition) -> None:
    """Without it, Redis being away for a minute restarts every running job of the fleet."""
    partition.submit(NewJob(A), NewJob(B))
    alive, dead = partition.take()
    partition.wake()
    partition.advance(3 * LIMITS.lease)
    assert partition.sweep_for(LIMITS.lease - 1_000) == []
    assert plain(partition.call("renew", 1, *alive))[1] == [["ok", 0, ""]]
    assert partition.sweep_for(3_000) == [[dead[0], "lost"]]


def test_a_timer_does_not_cut_a_back_off_short(partition: Partition) -> None:
    """Without it, a job that set a timer hammers the provider it should leave alone."""
    partition.submit(NewJob(A))
    (lease,) = partition.take()
    partition.append(Batch(*lease, 1, [], "retry", delay_ms=60_000, timers=b'{"t":5000}'))
    assert partition.sweep_for(59_000) == []
    assert partition.types(A)[-1] == "timer.fired"
    assert partition.sweep_for(1_000) == [[A, "woken"]]


def test_a_sleeper_without_a_timer_is_refused(partition: Partition) -> None:
    """Without it, a job sleeps in no place, and nothing ever wakes it."""
    partition.submit(NewJob(A))
    (lease,) = partition.take()
    assert partition.append(Batch(*lease, 1, [], "sleep"))[0] == ["bad"]
    assert partition.append(Batch(*lease, 1, [], "sleep", timers=b'{"t":5000}'))[0][0] == "ok"


def test_a_sleeper_whose_timer_has_fired_meanwhile_has_news(partition: Partition) -> None:
    """Without it, a timer that fires while its job lies down costs that job its lease."""
    partition.submit(NewJob(A))
    (lease,) = partition.take()
    partition.append(Batch(*lease, 1, [], timers=b'{"t":500}'))
    partition.advance(500)
    partition.wake()
    assert partition.append(Batch(*lease, 2, [], "sleep", seen=0))[0][:2] == ["inbox", 1]
    assert partition.append(Batch(*lease, 2, [], "sleep", seen=1))[0][0] == "bad"


def test_a_timer_can_be_taken_back(partition: Partition) -> None:
    """Without it, the timeout of a wait that was answered wakes the job long after, for nothing."""
    partition.submit(NewJob(A))
    (lease,) = partition.take()
    answers = partition.append(
        Batch(*lease, 1, [], timers=b'{"wait":5000,"other":9000}'),
        Batch(*lease, 2, [], timers=b'{"wait":-1,"unknown":-1}'),
    )
    assert [answer[0] for answer in answers] == ["ok", "ok"]
    assert partition.client.zscore(f"{PREFIX}timers", A) == partition.call.now + 9_000
    partition.append(Batch(*lease, 3, [], timers=b'{"other":-1}'))
    assert partition.client.zscore(f"{PREFIX}timers", A) is None
    partition.sweep_for(10_000)
    assert "timer.fired" not in partition.types(A)


def test_a_pause_does_not_give_a_failed_attempt_back(partition: Partition) -> None:
    """Without it, pausing and resuming a failing job lets it fail for ever."""
    partition.submit(NewJob(A))
    (lease,) = partition.take()
    partition.call("pause", A, "key", '"by":"","reason":""')
    partition.append(Batch(*lease, 1, [], "retry", seen=1))
    assert (partition.field(A, "status"), partition.field(A, "attempt")) == ("paused", "2")


# --- held jobs -------------------------------------------------------------------------------------------


def test_a_concurrency_key_that_is_taken_holds_up_its_own_jobs_only(client: sync_redis.Redis) -> None:
    """Without it, one job that waits a day for an approval stops everything its owner submits."""
    partition = Partition(client, Limits.of(Settings(owner_limit=2)))
    partition.submit(NewJob(A, ckey="k"), NewJob(B), NewJob(C, ckey="k"), NewJob(D))
    keyed, plain_one = partition.take()
    partition.append(Batch(*keyed, 1, [], "wait"))
    partition.end(plain_one)
    partition.wake()
    assert [job for job, _ in partition.take()] == [D]
    partition.cancel(A)
    assert [job for job, _ in partition.take()] == [C]


def test_submissions_over_the_rate_wait_their_turn(client: sync_redis.Redis) -> None:
    """Without it, one client in a loop has all the workers; or what it sent too fast is lost."""
    partition = Partition(client, Limits.of(Settings(owner_rate=6, owner_limit=0, lease=600.0)))
    partition.submit(*(NewJob(job_id) for job_id in SLOT_IDS[:9]), NewJob(SLOT_IDS[9], owner="bob"))
    assert partition.log(SLOT_IDS[6])[0][1]["held"] == "owner_limit"
    assert [job for job, _ in partition.take()] == [*SLOT_IDS[:6], SLOT_IDS[9]]
    partition.sweep_for(9_000)
    partition.submit(NewJob(SLOT_IDS[10]))
    assert partition.take() == []
    taken: list[str] = []
    for _ in range(45):
        partition.sweep_for(1_000)
        taken += [job for job, _ in partition.take()]
    assert taken == [*SLOT_IDS[6:9], SLOT_IDS[10]], "in the order in which they came"
    check_invariants(found(client))


# --- families --------------------------------------------------------------------------------------------


def test_a_parent_is_told_how_its_child_ended(partition: Partition) -> None:
    """Without it, a parent would have to read its children's logs, and may wait for ever."""
    partition.submit(NewJob(A))
    (parent,) = partition.take()
    partition.submit(NewJob(B, parent=A), NewJob(C, parent=A))
    first, second = partition.take()
    partition.append(Batch(*parent, 1, [], "wait"))
    partition.end(first, result={"result": [1, {"a": "}"}]})
    error = {"code": "boom", "message": "}", "retryable": False}
    partition.append(Batch(*second, 1, [("job.failed", wire({"ts": 1, "error": error}))], "failed"))
    told = [fields for kind, fields in partition.log(A) if kind == "child.ended"]
    assert [(t["job"], t["status"], t.get("result"), t.get("error")) for t in told] == [
        (B, "completed", {"result": [1, {"a": "}"}]}, None),
        (C, "failed", None, error),
    ]
    assert partition.field(A, "inbox") == "2"
    assert [job for job, _ in partition.take()] == [A]


def test_cancelling_a_parent_cancels_all_below(partition: Partition) -> None:
    """Without it, stopping a run leaves its agents working, and paying."""
    partition.submit(NewJob(A), NewJob(B, parent=A), NewJob(C, parent=B), NewJob(D, parent=B, delay=HOUR))
    lease = next(lease for lease in partition.take(2) if lease[0] == A)
    assert partition.cancel(A) == ["requested"]
    assert [partition.field(job, "cancel") != "" for job in (A, B, C, D)] == [True] * 4
    assert [partition.field(job, "status") for job in (C, D)] == ["cancelled"] * 2
    assert partition.submit(NewJob(SLOT_IDS[5], parent=A)) == [["parent", "cancelled"]]
    seen = int(partition.field(A, "inbox"))
    partition.append(Batch(*lease, 1, [], "yield", seen=seen))
    assert partition.field(A, "status") == "cancelled"


async def test_a_family_is_bounded(store: Store) -> None:
    """Without it, a workflow that spawns itself fills the store; or one owner hangs jobs below another's."""
    store = await Store.open(msgspec.structs.replace(store.settings, max_depth=1, max_children=1))
    parent = (await store.jobs.submit(Submission(kind="work"))).job_id
    first = Submission(kind="work", parent=parent, job_id=keys.child_job_id(parent, "a"))
    child = (await store.jobs.submit(first)).job_id
    assert msgspec.json.decode((await store.log.load(child))[0].data)["depth"] == 1
    with pytest.raises(TooDeep):
        await store.jobs.submit(Submission(kind="work", parent=child))
    with pytest.raises(TooManyChildren):
        await store.jobs.submit(Submission(kind="work", parent=parent))
    assert (await store.jobs.submit(first)).repeated, "a replay finds its child, whatever the limits"
    for foreign in (Submission(kind="work", owner="bob", parent=parent), Submission(kind="work", parent="x")):
        with pytest.raises(JobNotFound):
            await store.jobs.submit(foreign)
    await store.aclose()


# --- what stays, and for how long ------------------------------------------------------------------------


@pytest.mark.parametrize(("runs_for", "lives_for"), [(HOUR, LIMITS.idempotency), (10 * 24 * HOUR, None)])
def test_an_idempotency_key_is_known_for_long_enough(
    partition: Partition, runs_for: int, lives_for: int | None
) -> None:
    """Without it, a client that retries after a day makes a second job, or is refused for ever."""
    partition = Partition(partition.client, Limits(**{**as_dict(LIMITS), "retention": HOUR}))
    start = partition.call.now
    partition.submit(NewJob(A, idem="key", body="body"))
    assert partition.client.pttl(f"{PREFIX}idem:key") == -1, "while the job lives, its key does"
    (lease,) = partition.take()
    partition.advance(runs_for)
    partition.end(lease)
    expiry = partition.client.pexpiretime(f"{PREFIX}idem:key")
    assert expiry == start + (lives_for or runs_for + HOUR)
    assert partition.submit(NewJob(B, idem="key", body="body"))[0][:2] == ["same", A]
    assert partition.submit(NewJob(B, idem="key", body="other"))[0] == ["mismatch", A]


def test_all_keys_of_an_ended_job_expire_together(partition: Partition) -> None:
    """Without it, a job half expires: a log without a head, or keys that stay for ever."""
    partition.submit(NewJob(A, idem="key", body="body", ckey="k"))
    (lease,) = partition.take()
    partition.submit(NewJob(B, parent=A, delay=HOUR))
    partition.call("signal", A, "s", '"name":"go","payload":null,"key":"s"')
    partition.advance(5_000)
    partition.end(lease)
    expiry = partition.call.now + LIMITS.retention
    state = found(partition.client)
    own = {name: key.expiry for name, key in state.items() if A in name}
    assert own == dict.fromkeys([f"job:{A}{rest}" for rest in ("", ":events", ":children", ":seen")], expiry)
    assert "ckey:k" not in state
    check_invariants(state)


# --- who hears of it -------------------------------------------------------------------------------------


def test_a_batch_is_one_message_with_a_line_an_event(partition: Partition, ear: Ear) -> None:
    """Without it, viewers get a message for each token, or events that they cannot take apart."""
    partition.submit(NewJob(A))
    (lease,) = partition.take()
    ear.heard()
    partition.append(Batch(*lease, 1, [delta("one"), delta("two"), ("x.note", b'{"ts":1}')]))
    ((channel, message),) = ear.heard()
    assert channel == f"live:{A}"
    assert [(entry.cursor.seq, entry.type, entry.data) for entry in parse_live(message)] == [
        (3, *delta("one")),
        (4, *delta("two")),
        (5, "x.note", b'{"ts":1}'),
    ]


def test_projections_hear_of_facts_and_of_every_4_kb_of_text(partition: Partition) -> None:
    """Without it, projections read a job again for each token, or miss that a long answer grows."""
    partition.submit(NewJob(A))
    (lease,) = partition.take()
    before = len(partition.notes())
    for number in range(1, 10):
        partition.append(Batch(*lease, number, [delta("x" * 1000)]))
    assert partition.notes()[before:] == [(A, 6, "text.delta"), (A, 10, "text.delta")]
    partition.append(Batch(*lease, 10, [("x.note", b'{"ts":1}'), delta("y")]))
    assert partition.notes()[-1][2] == "x.note"


def test_an_owner_sees_lifecycle_and_progress_of_all_jobs(partition: Partition) -> None:
    """Without it, a page with all of one's jobs has to follow each of them, tokens and all."""
    partition.submit(NewJob(A), NewJob(B), NewJob(C, owner="bob"))
    leases = partition.take()
    noise = [delta("word"), ("tool.started", b'{"ts":1}'), ("job.log", b'{"ts":1}')]
    long = wire({"ts": 1, "message": "x" * LIMITS.owner_feed_bytes})
    partition.append(Batch(*leases[0], 1, [*noise, ("job.progress", wire({"ts": 1, "percent": 5}))]))
    partition.append(Batch(*leases[1], 1, [("job.progress", long)]))
    key = f"{PREFIX}owner:ann:events"
    entries: Any = partition.client.xrange(key)
    facts = [fact(line.decode()) for _, entry in entries for line in entry[b"e"].split(b"\n")]
    assert [(job, event_id.partition("-")[0], kind) for job, event_id, kind, _ in facts] == [
        (A, "1", "job.queued"),
        (B, "1", "job.queued"),
        (A, "2", "job.started"),
        (B, "2", "job.started"),
        (A, "6", "job.progress"),
        (B, "3", "job.progress"),
    ]
    assert json.loads(facts[-2][3])["percent"] == 5
    assert facts[-1][3] == "", "too long for the feed: read it from the job"
    ttl: Any = partition.client.pttl(key)
    assert LIMITS.owner_feed_ttl - 60_000 < ttl <= LIMITS.owner_feed_ttl


def test_inspect_shows_a_job_where_it_is(partition: Partition) -> None:
    """Without it, `doctor` reports healthy jobs, or does not see a lost one."""
    partition.submit(NewJob(A), NewJob(B), NewJob(C, delay=HOUR))
    partition.take(1)
    shown = {job: plain(partition.call("inspect", job)) for job in (A, B, C, D)}
    assert shown[D] == []
    assert [shown[job][1] for job in (A, B, C)] == [2, 1, 1]
    places = {job: (bool(s[4]), bool(s[5]), s[6], bool(s[7]), s[10]) for job, s in shown.items() if s}
    assert places == {
        A: (True, False, 0, False, 1),
        B: (False, False, 1, False, 0),
        C: (False, True, 0, False, 0),
    }


def test_a_batch_of_thousands_of_events_is_written_whole(partition: Partition) -> None:
    """Without it, a long batch fails after its events were written, and log and head differ for ever."""
    partition.submit(NewJob(A))
    (lease,) = partition.take()
    answer = partition.append(Batch(*lease, 1, [delta("word")] * 3000))
    assert plain(answer[0])[:2] == ["ok", 3002]
    assert partition.client.xlen(f"{PREFIX}job:{A}:events") == 3002
    check_invariants(found(partition.client))
