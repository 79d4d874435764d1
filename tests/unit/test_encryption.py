"""Keys and ciphertexts: what was written for one place opens there and nowhere else; errors name the key."""

from __future__ import annotations

import base64
import contextlib
import subprocess
import sys

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamjobs import confidential
from streamjobs.encryption import Cipher, Keyring, has_envelope, is_sealed_blob
from streamjobs.errors import ConfigError, DamagedCiphertext, EncryptionKeyMissing, Invalid
from streamjobs.events import EVENTS, encode_json

JOB, OTHER, PARENT = "j0-" + "a" * 26, "j0-" + "b" * 26, "j0-" + "c" * 26
PLACE = b"text.delta\0text"


def key(letter: str) -> str:
    return base64.b64encode(letter.encode() * 32).decode()


OLD, NEW = f"old:{key('o')}", f"new:{key('n')}"
RING = Keyring.parse([OLD])


def cipher(job_id: str = JOB) -> Cipher:
    return RING.new_key(job_id)[1]


# --- master keys


@pytest.mark.parametrize(
    "entry",
    [
        "",
        "old",
        "old:",
        ":" + key("o"),
        "old:abc",
        "old:" + key("o")[:-4],
        f"a b:{key('o')}",
        "old:!" + key("o"),
    ],
)
def test_a_key_that_is_none_is_refused_at_the_start(entry: str):
    """A short key would encrypt less well than everybody believes; a wrong one would be shown in the log."""
    with pytest.raises(ConfigError, match="encryption_keys") as found:
        Keyring.parse([NEW, entry])
    assert key("o")[:8] not in str(found.value)


def test_two_keys_of_one_name_are_refused():
    """Which of them opens what would be chance."""
    with pytest.raises(ConfigError, match="entry 2"):
        Keyring.parse([OLD, f"old:{key('x')}"])


def test_the_first_key_wraps_and_all_unwrap():
    """A rotation would lock everybody out."""
    record, sealing = RING.new_key(JOB)
    sealed = sealing.seal(b"words", PLACE)
    both = Keyring.parse([NEW, OLD])
    assert both.cipher(JOB, record).open(sealed, PLACE) == b"words"
    assert both.new_key(JOB)[0].startswith("1:new:")
    assert (both.is_current(record), both.is_current(both.rewrapped(JOB, record))) == (False, True)
    again = Keyring.parse([NEW]).cipher(JOB, both.rewrapped(JOB, record))
    assert again.open(sealed, PLACE) == b"words"
    assert again.name == "new"


def test_a_master_key_that_is_not_there_is_named():
    """Nobody would know which of the old keys to look for."""
    record, _ = RING.new_key(JOB)
    with pytest.raises(EncryptionKeyMissing, match="'old'") as found:
        Keyring.parse([NEW]).cipher(JOB, record)
    assert JOB in str(found.value)


def test_a_data_key_is_of_one_job_and_one_master_key():
    """Who can write to Redis could give a job the data key of a job that they may read."""
    record, _ = RING.new_key(JOB)
    for ring, job, wrapped in [
        (RING, OTHER, record),
        (Keyring.parse([f"old:{key('x')}"]), JOB, record),
        (RING, JOB, record[:-8] + "AAAAAAA="),
        (RING, JOB, "1:old:***"),
        (RING, JOB, "2:old:AAAA"),
        (RING, JOB, "1"),
    ]:
        with pytest.raises(DamagedCiphertext):
            ring.cipher(job, wrapped)


def test_without_the_package_it_says_what_to_install():
    """Somebody who sets a key would get an ImportError out of the depths."""
    code = (
        "import sys; sys.modules['cryptography'] = None\n"
        "import streamjobs.store\n"
        "from streamjobs.encryption import Keyring\n"
        f"Keyring.parse(['{OLD}'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "install streamjobs[encryption]" in done.stderr


# --- ciphertexts


@given(st.binary(max_size=200))
def test_what_is_sealed_opens(content: bytes):
    sealing = cipher()
    blob = sealing.seal_blob(content, PLACE)
    assert is_sealed_blob(blob)
    assert sealing.open_blob(blob, PLACE) == content
    assert len(blob) == len(sealing.seal_blob(content, PLACE)), "sent again it would be another batch"
    assert blob != sealing.seal_blob(content, PLACE)


def test_a_blob_from_before_is_as_it_is():
    """Turning encryption on would lose every job there is."""
    assert cipher().open_blob(b"(\xb5/\xfdplain", PLACE) == b"(\xb5/\xfdplain"


@pytest.mark.parametrize("place", [b"text.delta\0turn", b"reasoning.delta\0text", b""])
def test_it_opens_in_its_own_place_only(place: bytes):
    """A tool's output could be put where an input was."""
    sealing = cipher()
    with pytest.raises(DamagedCiphertext):
        sealing.open(sealing.seal(b"words", PLACE), place)
    with pytest.raises(DamagedCiphertext):
        sealing.value(sealing.envelope(b'"words"', PLACE), place)


def test_it_opens_in_its_own_job_only():
    """The same key under another job's id must not do either: that is what binds it."""
    own = cipher()
    with pytest.raises(DamagedCiphertext):
        own.of("another").open(own.seal(b"words", PLACE), PLACE)
    with pytest.raises(DamagedCiphertext, match=OTHER):
        cipher(OTHER).value(own.envelope(b'"words"', PLACE), PLACE)


@pytest.mark.parametrize(
    "damage", [b'"enc1:"', b'"enc1:AAAA"', b'"enc1:%%%%"', b'"enc2:AAAA"', b'"enc1:\xff"']
)
def test_what_is_damaged_says_of_which_job_and_key(damage: bytes):
    """It would be taken for the text, or break whoever reads it."""
    with pytest.raises(DamagedCiphertext, match="'old'") as found:
        cipher().value(damage, PLACE)
    assert JOB in str(found.value)


def test_one_flipped_bit_is_seen():
    sealing = cipher()
    sealed = bytearray(sealing.seal(b"words", PLACE))
    for at in range(len(sealed)):
        sealed[at] ^= 1
        with pytest.raises(DamagedCiphertext):
            sealing.open(bytes(sealed), PLACE)
        sealed[at] ^= 1


def test_a_digest_needs_the_key():
    """An input that is one of a few could be told from its digest by trying them."""
    record, sealing = RING.new_key(JOB)
    assert sealing.digest(b"yes") == RING.cipher(JOB, record).digest(b"yes") != sealing.digest(b"no")
    assert cipher().digest(b"yes") != sealing.digest(b"yes")


# --- events

MEMBERS = st.sampled_from(["ts", "text", "result", "error", "message", "code", "job", "sealed", "input"])
READER = cipher()
EXAMPLES: dict[str, dict[str, object]] = {
    "job.queued": {"ts": 1, "kind": "chat", "input": {"a": "secret"}, "metadata": {"b": "secret"}},
    "job.progress": {"ts": 1, "percent": 50.0, "message": "secret"},
    "job.log": {"ts": 1, "level": "info", "message": "secret", "data": ["secret"]},
    "job.retrying": {"ts": 1, "error": {"code": "boom", "message": "secret", "retryable": True}},
    "job.completed": {"ts": 1, "result": "secret", "summary": "secret"},
    "job.failed": {"ts": 1, "error": {"code": "boom", "message": "secret", "retryable": False}},
    "signal.received": {"ts": 1, "name": "go", "payload": "secret", "key": "k"},
    "approval.requested": {"ts": 1, "key": "k", "message": "secret", "detail": {"x": "secret"}},
    "turn.restarted": {"ts": 1, "turn": 1, "why": "secret"},
    "turn.completed": {"ts": 1, "turn": 1, "text": "secret", "calls": ["secret"], "extra": {"t": "secret"}},
    "turn.failed": {"ts": 1, "turn": 1, "error": {"code": "boom", "message": "secret"}},
    "text.delta": {"ts": 1, "turn": 1, "text": "secret \u2028 \U0001f600", "attempt": 2},
    "reasoning.delta": {"ts": 1, "turn": 1, "text": "secret"},
    "tool.called": {"ts": 1, "call_id": "c", "tool": "t", "arguments": {"x": "secret"}},
    "tool.progress": {"ts": 1, "call_id": "c", "percent": 3.0, "message": "secret"},
    "tool.completed": {"ts": 1, "call_id": "c", "output": "secret", "ms": 3},
    "tool.failed": {"ts": 1, "call_id": "c", "error": {"code": "boom", "message": "secret"}},
    "tool.unknown": {"ts": 1, "call_id": "c", "message": "secret"},
    "step.completed": {"ts": 1, "key": "s", "output": ["secret"]},
    "step.failed": {"ts": 1, "key": "s", "error": {"code": "boom", "message": "secret"}},
    "step.unknown": {"ts": 1, "key": "s", "message": "secret"},
    "x.mine": {"ts": 1, "name": "mine", "data": "secret", "within": "step"},
    "y.of.tomorrow": {"ts": 1, "anything": "secret"},
}


@pytest.mark.parametrize("kind", EXAMPLES)
def test_no_word_of_an_event_is_left_and_all_of_it_comes_back(kind: str):
    """The one thing it is for; and a viewer must not be able to tell."""
    sealing, content = cipher(), encode_json(EXAMPLES[kind])
    stored = confidential.encrypt(sealing, kind, content)
    assert b"secret" in content and b"secret" not in stored
    assert stored.startswith(b'{"ts":1,') and b"\n" not in stored
    assert has_envelope(stored)
    assert confidential.decrypt(sealing, kind, stored) == content


def test_every_type_of_event_is_judged():
    """A new event's text would be written in the clear, and nobody would be asked."""
    judged = set(confidential.FIELDS) | confidential.READABLE | {confidential.CHILD_ENDED}
    assert set(EVENTS) == judged
    assert set(confidential.FIELDS) <= set(EXAMPLES)
    for kind, fields in confidential.FIELDS.items():
        assert set(fields) <= {f.encode_name for f in msgspec.structs.fields(EVENTS[kind])}, kind


def test_what_scripts_cut_out_of_an_event_is_left():
    """A failed job would be on the dead list without a code, and a parent would not hear of its child."""
    stored = confidential.encrypt(cipher(), "job.failed", encode_json(EXAMPLES["job.failed"]))
    assert b'"error":{"code":"boom","message":"enc1:' in stored
    stored = confidential.encrypt(cipher(), "job.completed", encode_json(EXAMPLES["job.completed"]))
    assert stored.startswith(b'{"ts":1,"result":"enc1:')


def moved(kind: str, stored: bytes, child: str = JOB) -> bytes:
    """As tell_parent in common.lua does."""
    outcome = stored[stored.index(b'"result"' if kind == "job.completed" else b'"error"') : -1]
    return b'{"ts":2,"job":"%b","status":"completed",%b}' % (child.encode(), outcome)


@pytest.mark.parametrize("kind", ["job.completed", "job.failed"])
def test_a_childs_outcome_opens_in_both_logs_with_either_key(kind: str):
    """A parent that waits for weeks would lose what its children found, with their retention."""
    child, parent, content = cipher(), cipher(PARENT), encode_json(EXAMPLES[kind])
    stored = confidential.encrypt(child, kind, content, parent)
    assert b"secret" not in stored
    assert confidential.decrypt(child, kind, stored) == content
    assert confidential.decrypt(parent, "child.ended", moved(kind, stored)) == moved(kind, content)


def test_a_childs_outcome_opens_nowhere_else():
    """Somebody's result could be told to another parent, or as another child's."""
    child, parent, content = cipher(), cipher(PARENT), encode_json(EXAMPLES["job.completed"])
    shared = confidential.encrypt(child, "job.completed", content, parent)
    own = confidential.encrypt(child, "job.completed", content)
    for reader, kind, stored in [
        (parent, "child.ended", moved("job.completed", shared, OTHER)),
        (cipher(OTHER), "child.ended", moved("job.completed", shared)),
        (parent, "job.completed", shared),
        (parent, "child.ended", moved("job.completed", own)),
        (child, "step.completed", shared.replace(b'"result"', b'"output"')),
    ]:
        with pytest.raises(DamagedCiphertext):
            confidential.decrypt(reader, kind, stored)


def test_plain_events_are_as_they_are():
    """Jobs from before encryption was turned on would be lost, and what scripts write as well."""
    for kind, example in EXAMPLES.items():
        content = encode_json(example)
        assert confidential.decrypt(cipher(), kind, content) == content
    assert confidential.encrypt(cipher(), "job.started", b'{"ts":1}') == b'{"ts":1}'


def test_a_text_that_looks_like_an_envelope_is_text():
    """A user who pastes one would break a job."""
    sealing = cipher()
    content = encode_json({"ts": 1, "turn": 1, "text": "enc1:AAAA"})
    assert (
        confidential.decrypt(sealing, "text.delta", confidential.encrypt(sealing, "text.delta", content))
        == content
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from(["enc1:AAAA", "enc2:", "enc1:%"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(MEMBERS, inner, max_size=4),
    max_leaves=8,
)


@given(st.sampled_from([*EXAMPLES, "child.ended"]), st.binary(max_size=60) | JSON.map(encode_json))
def test_whatever_is_there_it_opens_is_plain_or_damaged(kind: str, content: bytes):
    """One mangled event would bring down whoever reads it, again and again."""
    with contextlib.suppress(DamagedCiphertext):
        assert confidential.decrypt(cipher(), kind, content + b' "enc1:') or True
    with contextlib.suppress(DamagedCiphertext):
        opened = confidential.decrypt(cipher(), kind, content)
        assert opened == content or has_envelope(content)
    with contextlib.suppress(Invalid):
        confidential.decrypt(READER, kind, confidential.encrypt(READER, kind, content))


def test_without_envelopes_it_can_still_be_shown():
    """A list of notices would end at the first one of a job that is gone."""
    sealing = cipher()
    stored = confidential.encrypt(sealing, "notice", b'{"kind":"chat","message":"secret"}')
    assert confidential.without("notice", stored) == b'{"kind":"chat","message":""}'
