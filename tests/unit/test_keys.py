"""The key table: what is not in it leaks, and what can be guessed or mixed up is somebody else's."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamjobs.errors import JobNotFound
from streamjobs.store import keys

JOB = "j3-abcdefghijklmnopqrstuvwxy2"

# by hand: a name of each kind, its type, its lifetime
NAMES = {
    f"sj:{{3}}:job:{JOB}": ("hash", "job"),
    f"sj:{{3}}:job:{JOB}:events": ("stream", "job"),
    f"sj:{{3}}:job:{JOB}:sealed": ("hash", "job"),
    f"sj:{{3}}:job:{JOB}:children": ("set", "job"),
    f"sj:{{3}}:job:{JOB}:seen": ("set", "job"),
    f"sj:{{3}}:job:{JOB}:artifacts": ("hash", "job"),
    f"sj:{{3}}:job:{JOB}:datakey": ("string", "job"),
    "sj:{0}:idem:0123456789abcdef0123456789abcdef": ("string", "job"),
    "sj:{0}:ckey:0123456789abcdef0123456789abcdef": ("string", "live"),
    "sj:{0}:work:default:high": ("stream", "live"),
    "sj:{0}:leases": ("zset", "live"),
    "sj:{0}:timers": ("zset", "live"),
    "sj:{0}:held": ("zset", "live"),
    "sj:{0}:held:default|anna": ("zset", "live"),
    "sj:{0}:apikeys": ("hash", "capped"),
    "sj:{0}:strikes": ("hash", "live"),
    "sj:{0}:dead": ("zset", "capped"),
    "sj:{0}:running:anna@example.org": ("set", "live"),
    "sj:{0}:tickets": ("hash", "live"),
    "sj:{0}:counts": ("hash", "forever"),
    "sj:{0}:sweep": ("hash", "forever"),
    "sj:{0}:feed": ("stream", "capped"),
    "sj:{0}:projections": ("hash", "forever"),
    "sj:{0}:quarantine:index": ("hash", "capped"),
    "sj:{0}:rebuilding:index": ("string", "ttl"),
    "sj:{0}:index:anna": ("zset", "live"),
    "sj:{0}:indexed:anna": ("hash", "live"),
    "sj:{0}:indexed_counts:anna": ("hash", "live"),
    "sj:{0}:indexes": ("zset", "live"),
    "sj:{0}:totals:1": ("hash", "forever"),
    "sj:{0}:history:1:fine:1760000000000": ("hash", "ttl"),
    "sj:{0}:owner:anna:events": ("stream", "ttl"),
    "sj:{0}:rate:anna": ("string", "ttl"),
    "sj:{0}:bucket:tool:search": ("string", "ttl"),
    "sj:{0}:take:w1": ("string", "ttl"),
    "sj:{0}:worker:w1": ("string", "ttl"),
    "sj:{0}:workers": ("zset", "live"),
    "sj:{0}:schedule:s0-abcdefghijklmnopqrstuvwxy2": ("hash", "live"),
    "sj:{0}:schedules": ("zset", "live"),
    "sj:{0}:owner:anna:schedules": ("zset", "live"),
    "sj:{0}:ended": ("zset", "live"),
    "sj:{0}:notices:anna": ("stream", "ttl"),
    "sj:{0}:unread:anna": ("zset", "ttl"),
    "sj:{0}:webhooks:anna": ("hash", "live"),
    "sj:{0}:deliveries": ("zset", "live"),
    "sj:{0}:delivery:msg_abc": ("hash", "ttl"),
    "sj:{0}:undelivered:wh_abc": ("zset", "ttl"),
}


@pytest.mark.parametrize("name", NAMES)
def test_every_form_of_key_is_known(name: str):
    """The doctor and the leak check after each test would call a good key a leak, or look for the wrong
    thing."""
    key = keys.classify(name)
    assert key is not None
    assert (key.type, key.lifetime) == NAMES[name]
    assert key.meaning


def test_every_declared_key_has_an_example_here():
    """A kind of key that no example names may be declared wrong and nobody sees it."""
    assert {keys.classify(name) for name in NAMES} == set(keys.KEYS)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "leases",
        "sj:leases",
        "sj:{}:leases",
        "sj:{0}leases",
        "sj:{0}:leases2",
        "sj:{0}:leases:x",
        "xsj:{0}:leases",
        "sj:{a}:leases",
        "sj:{0}:job:",
        "sj:{0}:job:j0-short",
        f"sj:{{0}}:job:{JOB}:other",
        f"sj:{{0}}:job:{JOB.upper()}",
        "sj:{0}:idem:",
        "sj:{0}:owner:anna",
        "sj:{0}:work",
        "sj:{0}:leases\n",
        "sj:meta:x",
    ],
)
def test_any_other_name_is_unknown(name: str):
    """A key that a script writes by mistake would pass for one of ours, and stay for ever."""
    assert keys.classify(name) is None


@given(st.integers(0, 9999))
def test_a_new_id_says_its_partition_and_nothing_else(partition: int):
    """A job would be looked for in another slot than its keys are in; or its id could be guessed."""
    job_id = keys.new_job_id(partition)
    assert keys.partition_of_job(job_id) == partition
    assert keys.classify(keys.job_key(job_id)) == keys.classify(f"sj:{{3}}:job:{JOB}")
    assert len(base64.b32decode(job_id.partition("-")[2].upper() + "======")) == 16
    assert job_id != keys.new_job_id(partition)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "j0",
        "j0-",
        "j-aaaaaaaaaaaaaaaaaaaaaaaaaa",
        "j00-aaaaaaaaaaaaaaaaaaaaaaaaaa",
        "j0-" + "a" * 25,
        "j0-" + "a" * 27,
        "j0-" + "A" * 26,
        "j0-" + "a" * 25 + "1",
        "j0-" + "a" * 25 + "\n",
        "j0-" + "a" * 26 + "\n",
        "j12345-" + "a" * 26,
        "j٣-" + "a" * 26,
        "j0-" + "a" * 25 + "}",
        "../j0-" + "a" * 26,
        "j0-" + "a" * 26 + ":events",
    ],
)
def test_what_cannot_be_an_id_is_not_found(text: str):
    """Text from a URL would become part of a key: of somebody else's, or of one that is none of ours."""
    with pytest.raises(JobNotFound):
        keys.partition_of_job(text)


def test_keys_of_a_partition_share_its_slot():
    """On a cluster every script would fail with CROSSSLOT."""
    assert keys.prefix(3) == "sj:{3}:"
    assert keys.job_key(JOB) == f"sj:{{3}}:job:{JOB}"
    assert keys.live_channel(JOB) == f"sj:{{3}}:live:{JOB}"


@given(st.text(max_size=30), st.integers(1, 64))
def test_an_owner_has_one_partition(owner: str, partitions: int):
    """An owner's limit would be counted in two places."""
    partition = keys.partition_of_owner(owner, partitions)
    assert 0 <= partition < partitions
    assert partition == keys.partition_of_owner(owner, partitions)


def test_owners_stay_where_they_are():
    """After an update every owner's jobs, limits and idempotency keys would be looked for elsewhere."""
    assert [keys.partition_of_owner(owner, 16) for owner in ("anonymous", "anna", "bob@example.org", "")] == [
        14,
        7,
        12,
        0,
    ]


def test_a_child_is_found_again_by_its_key():
    """A workflow that is replayed after a crash would spawn its children a second time."""
    child = keys.child_job_id(JOB, "part-1")
    assert child == keys.child_job_id(JOB, "part-1") == "j3-iv5evn6m7755zqutymttoxesee"
    assert keys.partition_of_job(child) == 3
    assert (
        len({child, keys.child_job_id(JOB, "part-2"), keys.child_job_id("j3-" + "a" * 26, "part-1"), JOB})
        == 4
    )


def test_an_owners_keys_are_its_own():
    """Two tenants that use the same Idempotency-Key would get each other's jobs."""
    ours = keys.scoped_digest("anna", "order-1")
    assert ours == keys.scoped_digest("anna", "order-1")
    assert ours != keys.scoped_digest("bob", "order-1")
    assert keys.scoped_digest("ab", "c") != keys.scoped_digest("a", "bc")
    assert len(ours) == 32


@given(st.text(max_size=300), st.text(alphabet=st.characters(exclude_categories=()), max_size=300))
def test_a_digest_fits_a_key_whatever_goes_in(owner: str, key: str):
    """A key of 255 strange characters would become part of a Redis key, or end a script's pattern."""
    assert keys.classify(f"sj:{{0}}:idem:{keys.scoped_digest(owner, key)}") is not None
