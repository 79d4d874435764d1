"""One job a tick: the guard of submit.lua and the moves of schedule.lua, at instants of a test's choosing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import redis as sync_redis

from streamjobs.store import Tick
from streamjobs.store.scripts import flatten
from tests.conftest import RedisProcess
from tests.contract.callers import START, ScriptCaller, plain, submit_row
from tests.contract.commands import SLOT_IDS
from tests.contract.keyspace import PREFIX, check_invariants, found
from tests.model import NewJob

S, OTHER = (f"s0-{letter * 26}" for letter in "ab")
A, B, C = SLOT_IDS[:3]
T1, T2, T3 = (START + 1000 * i for i in (1, 2, 3))


class Partition:
    """The scripts as methods."""

    def __init__(self, client: sync_redis.Redis) -> None:
        self.client = client
        self.call = ScriptCaller(client)

    def define(
        self, what: str, name: str = S, digest: str = "d1", *, overlap: str = "allow", app: str = "",
        after: int = T1, limit: int = 10,
    ) -> str:  # fmt: skip
        definition = f'{{"digest":"{digest}"}}'
        row = (what, name, "ann", definition, digest, overlap, app, after, limit)
        return plain(self.call("schedule", *row))[0]

    def act(self, what: str, *arguments: str | int) -> str:
        return plain(self.call("schedule", what, S, *arguments))[0]

    def tick(self, job: str, due: int, after: int, name: str = S) -> list[Any]:
        return plain(self.submit(job, Tick(name, due, after).guard()))[:2]

    def submit(self, job: str, tick: str = "") -> list[Any]:
        return plain(self.call("submit", 1, *flatten([submit_row(NewJob(job, tick=tick))])))[0]

    def end(self, job: str) -> None:
        self.call("cancel", job, '"by":"","reason":""')

    def waits_for(self, name: str = S) -> int | None:
        score: Any = self.client.zscore(f"{PREFIX}schedules", name)
        return None if score is None else int(score)

    def record(self, name: str = S) -> dict[str, str]:
        fields: Any = self.client.hgetall(f"{PREFIX}schedule:{name}")
        return {key.decode(): value.decode() for key, value in fields.items() if value}


@pytest.fixture
def partition(redis: RedisProcess) -> Iterator[Partition]:
    with redis.client() as client:
        yield Partition(client)
        check_invariants(found(client))


@pytest.fixture
def made(partition: Partition) -> Partition:
    assert partition.define("new") == "made"
    return partition


# --- ticks


def test_a_tick_gives_one_job(made: Partition):
    """Five sweepers see the same tick and send five reports."""
    assert made.tick(A, T1, T2) == ["ok", A]
    for job in (B, C):
        assert made.tick(job, T1, T2) == ["tick", "moved"]
    assert made.waits_for() == T2
    assert (made.record()["runs"], made.record()["last_tick"], made.record()["last_job"]) == ("1", str(T1), A)


def test_a_tick_sent_twice_is_one(made: Partition):
    """A reply that got lost makes a second job, or an error out of one that went well."""
    assert made.tick(A, T1, T2) == ["ok", A]
    assert made.tick(A, T1, T2) == ["same", A]
    assert (made.waits_for(), made.record()["runs"]) == (T2, "1")


def test_a_refused_tick_leaves_nothing(made: Partition):
    """Jobs of refused ticks would be found half filed."""
    before = found(made.client)
    for due, after in ((T2, T3), (T1 - 1, T2)):
        assert made.tick(A, due, after) == ["tick", "moved"]
    assert made.tick(A, T1, T2, OTHER) == ["tick", "gone"]
    assert found(made.client) == before


def test_paused_meanwhile(made: Partition):
    """An operator pauses what does harm, and a sweeper that had looked before runs it again."""
    made.act("pause")
    assert made.tick(A, T1, T2) == ["tick", "moved"]
    assert made.waits_for() is None


def test_deleted_meanwhile(made: Partition):
    """A deleted schedule comes back to life by the tick that was under way."""
    assert made.act("delete") == "deleted"
    assert made.tick(A, T1, T2) == ["tick", "gone"]
    assert found(made.client) == {}


def test_ticks_of_one_call_follow_each_other(made: Partition):
    """What was missed would come in pieces, each in a call of its own."""
    rows = [NewJob(A, tick=Tick(S, T1, T2).guard()), NewJob(B, tick=Tick(S, T2, T3).guard())]
    answers = plain(made.call("submit", 2, *flatten(submit_row(row) for row in rows)))
    assert [answer[0] for answer in answers] == ["ok", "ok"]
    assert (made.waits_for(), made.record()["runs"]) == (T3, "2")


def test_a_job_without_a_schedule_needs_none(partition: Partition):
    """Every ordinary submission would be refused."""
    assert partition.submit(A)[0] == "ok"
    assert not any("schedule" in key for key in found(partition.client))


# --- overlap


def test_no_second_job_beside_a_live_one(partition: Partition):
    """A backup that takes longer than its interval runs twice at once."""
    partition.define("new", overlap="skip")
    assert partition.tick(A, T1, T2) == ["ok", A]
    assert partition.tick(B, T2, T3) == ["tick", "overlap"]
    assert (partition.waits_for(), partition.record()["skipped"], partition.record()["runs"]) == (
        T3,
        "1",
        "1",
    )
    partition.end(A)
    assert partition.tick(C, T3, T3 + 1000) == ["ok", C]


def test_a_skipped_tick_sent_twice_is_skipped_once(partition: Partition):
    """A lost reply would skip the next tick too."""
    partition.define("new", overlap="skip")
    partition.tick(A, T1, T2)
    assert partition.tick(B, T2, T3) == ["tick", "overlap"]
    assert partition.tick(B, T2, T3) == ["tick", "moved"]
    assert (partition.waits_for(), partition.record()["skipped"]) == (T3, "1")


def test_a_job_out_of_turn_is_one_to_wait_for(partition: Partition):
    """Somebody triggers the backup by hand, and the nightly one starts on top of it."""
    partition.define("new", overlap="skip")
    assert partition.submit(A, Tick(S).guard())[0] == "ok"
    assert partition.tick(B, T1, T2) == ["tick", "overlap"]


def test_jobs_out_of_turn_move_no_tick(made: Partition):
    """Triggering a schedule by hand takes its next tick away."""
    assert made.submit(A, Tick(S).guard())[0] == "ok"
    made.act("pause")
    assert made.submit(B, Tick(S).guard())[0] == "ok"
    assert made.submit(B, Tick(S).guard())[0] == "same"
    assert (made.record()["runs"], made.record()["last_job"], made.record().get("last_tick")) == (
        "2",
        B,
        None,
    )
    assert made.submit(C, Tick(OTHER).guard())[:2] == ["tick", "gone"]


def test_a_previous_job_that_is_gone_is_no_hindrance(partition: Partition):
    """Once the retention of its last job has passed, a schedule would stand still for ever."""
    partition.define("new", overlap="skip")
    partition.tick(A, T1, T2)
    partition.end(A)
    partition.client.delete(f"{PREFIX}job:{A}", f"{PREFIX}job:{A}:events")
    assert partition.tick(B, T2, T3) == ["ok", B]


# --- making


def test_made_twice_is_one(partition: Partition):
    """A lost reply makes two schedules, and every tick two jobs."""
    assert [partition.define("new"), partition.define("new", after=T2)] == ["made", "same"]
    assert partition.waits_for() == T1
    assert partition.define("new", digest="d2") == "mismatch"
    assert partition.record()["digest"] == "d1"


def test_an_owner_has_so_many(partition: Partition):
    """A loop in a client fills Redis with schedules that tick for ever."""
    assert partition.define("new", limit=1) == "made"
    assert partition.define("new", OTHER, limit=1) == "limit"
    assert partition.record(OTHER) == {}
    assert partition.define("new", limit=1) == "same"
    assert partition.define("declare", digest="d2", limit=1) == "changed"


def test_declaring_what_is_there_changes_nothing(partition: Partition):
    """Each start of a worker moves the next tick away; with many restarts it never comes."""
    assert partition.define("declare", app="reports") == "made"
    partition.call.now += 5
    assert partition.define("declare", app="reports", after=T2) == "same"
    assert partition.waits_for() == T1
    assert partition.record()["app"] == "reports"
    assert int(partition.record()["declared"]) == int(partition.record()["created"]) + 5


def test_declaring_something_else_changes_it(partition: Partition):
    """Code says four o'clock, and the job goes on at three."""
    partition.define("declare", app="reports")
    assert partition.define("declare", digest="d2", app="reports", after=T2, overlap="skip") == "changed"
    assert partition.waits_for() == T2
    record = partition.record()
    assert (record["digest"], record["definition"], record["overlap"]) == ("d2", '{"digest":"d2"}', "skip")


def test_a_paused_one_stays_so(partition: Partition):
    """An operator pauses a schedule at night, and the next deployment starts it again."""
    partition.define("declare", app="reports")
    assert partition.act("pause") == "paused"
    assert partition.define("declare", digest="d2", app="reports") == "changed"
    assert partition.waits_for() is None


# --- pause, resume, advance, delete


def test_pause_and_resume_twice(made: Partition):
    """Asking twice would be an error, or undo what was asked."""
    assert [made.act("pause"), made.act("pause")] == ["paused", "paused"]
    assert [made.act("resume", "d1", T2), made.act("resume", "d1", T3)] == ["resumed", "resumed"]
    assert made.waits_for() == T2


def test_resume_waits_for_no_tick_of_another_rule(made: Partition):
    """A schedule that was changed while it was being resumed would run once by its old rule."""
    made.act("pause")
    made.define("declare", digest="d2")
    assert made.act("resume", "d1", T2) == "changed"
    assert made.waits_for() is None


def test_advance_compares(made: Partition):
    """Two sweepers that skip the same tick would skip two."""
    assert made.act("advance", T1, T2, 1, "no such queue") == "advanced"
    assert made.act("advance", T1, T2, 1, "") == "moved"
    assert (made.waits_for(), made.record()["skipped"], made.record()["error"]) == (T2, "1", "no such queue")
    assert made.tick(A, T2, T3) == ["ok", A]
    assert "error" not in made.record()


@pytest.mark.parametrize("what", [("pause",), ("resume", "d1", T2), ("advance", T1, T2, 0, ""), ("delete",)])
def test_what_is_not_there(partition: Partition, what: tuple[str, ...]):
    """A deleted schedule would be brought back in parts."""
    partition.client.zadd(f"{PREFIX}schedules", {S: T1})
    assert partition.act(*what) == "gone"
    assert partition.record() == {}
    partition.act("advance", T1, T2, 0, "")
    assert found(partition.client) == {}


def test_a_broken_key_makes_no_job(made: Partition):
    """A job would be filed for a tick that is then not taken, again at every sweep."""
    made.client.delete(f"{PREFIX}schedules")
    made.client.set(f"{PREFIX}schedules", "not what it was")
    assert made.tick(A, T1, T2)[0] == "error"
    made.client.delete(f"{PREFIX}schedules")
    assert not any(key.startswith("job:") for key in found(made.client))
