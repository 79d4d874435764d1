"""Encryption at rest: nothing that a job is given or makes is written in the clear, whoever may read it sees
no difference, and without its data key nobody sees anything."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import re
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import zstandard
from click.testing import CliRunner

from streamjobs import events as ev
from streamjobs.archive import name_of
from streamjobs.cli.main import cli
from streamjobs.cron import Timing
from streamjobs.errors import (
    ConfigError,
    DamagedCiphertext,
    EncryptionKeyMissing,
    IdempotencyMismatch,
    JobNotEnded,
    JobNotFound,
    Shredded,
)
from streamjobs.job import Fold
from streamjobs.projections import build
from streamjobs.projections.notify import NotifyProjection
from streamjobs.projections.snapshot import SnapshotProjection
from streamjobs.schedule import Schedule
from streamjobs.store import Batch, Store, Submission, Vault
from streamjobs.store.dead import DeadFilter
from streamjobs.store.doctor import Doctor
from streamjobs.store.owners import START as FEED_START
from streamjobs.testing import Scenario, ScriptedCall, ScriptedProvider, Turn
from streamjobs.webhook import Webhook
from tests.conftest import RedisProcess, fast_settings, unrestricted, wait_until
from tests.harness import Lab, provider_settings, worker_process, working
from tests.integration.gateway import Script, serving
from tests.integration.test_delivery import HTTP, Receiver, receiver
from tests.integration.vault_app import MARK, app, word
from tests.projections.bench import caught_up, projector_process

__all__ = ["receiver"]


def key(name: str) -> str:
    return f"{name}:{base64.b64encode(name.encode().ljust(32, b'.')).decode()}"


KEYS = {"encryption_keys": (key("k1"),)}
SEALS = {"seal_events": 5, "snapshot_min_events": 10}


@contextlib.asynccontextmanager
async def opened(url: str, **changes: Any) -> AsyncIterator[Store]:
    store = await Store.open(fast_settings(url, **({"lease": 60.0} | KEYS | changes)))
    try:
        yield store
    finally:
        await store.aclose()


@pytest.fixture
async def store(redis: RedisProcess) -> AsyncIterator[Store]:
    async with opened(redis.url) as made:
        yield made


# --- where words may be


class Ear:
    """Hears everything that is published."""

    def __init__(self, server: RedisProcess) -> None:
        self.heard: list[bytes] = []
        self._client = server.client()
        self._pubsub: Any = self._client.pubsub()
        self._pubsub.psubscribe("*")
        assert self._pubsub.get_message(timeout=20)["type"] == "psubscribe"
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        while not self._is_over.is_set():
            message = self._pubsub.get_message(timeout=0.1)
            if message is not None:
                self.heard += [message["channel"], message["data"]]

    def close(self) -> None:
        self._is_over.set()
        self._thread.join()
        self._pubsub.close()
        self._client.close()


@contextlib.contextmanager
def ear(server: RedisProcess) -> Iterator[Ear]:
    made = Ear(server)
    try:
        yield made
    finally:
        made.close()


READ = {
    b"hash": lambda client, name: client.hgetall(name),
    b"string": lambda client, name: client.get(name),
    b"set": lambda client, name: client.smembers(name),
    b"zset": lambda client, name: client.zrange(name, 0, -1),
    b"stream": lambda client, name: client.xrange(name),
}


def pieces(value: Any) -> Iterator[bytes]:
    """Every string in a reply."""
    if isinstance(value, bytes):
        yield value
    elif isinstance(value, dict):
        yield from pieces(list(value.items()))
    elif isinstance(value, list | tuple | set):
        for one in value:
            yield from pieces(one)


def unpacked(content: bytes) -> bytes:
    """Content, and what it is where that is compressed."""
    at = content.find(b"\x28\xb5\x2f\xfd")
    if at < 0:
        return content
    try:
        frame = zstandard.ZstdDecompressor().stream_reader(content[at:], read_across_frames=True).read()
    except zstandard.ZstdError:
        return content
    return content + frame


def words_in(contents: Iterator[bytes]) -> set[str]:
    """What of our words is in there, as it is or in base64."""
    found: set[str] = set()
    for content in map(unpacked, contents):
        found |= {hit.decode() for hit in re.findall(rb"\w+-" + MARK.encode() + rb"-\w+", content)}
        found |= {shown for shown in BASE64 if shown.encode() in content}
    return found


BASE64 = [base64.b64encode(b"x" * n + MARK.encode())[(n * 4 + 2) // 3 : -4].decode() for n in range(3)]


def keyspace(server: RedisProcess) -> Iterator[bytes]:
    with server.client() as client:
        for name in client.scan_iter(count=1000):
            yield name
            kind = client.type(name)
            if kind != b"none":  # it has expired since
                yield from pieces(READ[kind](client, name))


def files(folder: Path) -> Iterator[bytes]:
    return (path.read_bytes() for path in folder.rglob("*") if path.is_file())


# --- the whole system

SCENARIO = Scenario(
    turns=[
        Turn(reasoning=word("reasoning", "{run}"), text=word("text", "{run}") + " first",
             tool_calls=[ScriptedCall(name="look", arguments={"query": word("query", "{run}")})]),
        Turn(text=word("answer", "{run}") + " and more"),
    ]
)  # fmt: skip


def scenario(run: str) -> Scenario:
    return msgspec.json.decode(msgspec.json.encode(SCENARIO).replace(b"{run}", run.encode()), type=Scenario)


CHAT = {"prompt", "reasoning", "text", "query", "output", "answer", "metadata"}
WORKFLOW = {"step", "failure", "log", "data", "progress", "own", "given", "child", "error", "question",
            "detail", "comment", "told", "summary", "result", "artifact", "scheduled"}  # fmt: skip


async def play(lab: Lab, run: str) -> list[str]:
    """A chat with a tool, a workflow with all there is, a schedule: their jobs, which have ended."""
    owner = "anna"
    chat = await lab.chat(
        word("prompt", run), tools=["look"], owner=owner, metadata={"m": word("metadata", run)}
    )
    job = await lab.submit("everything", run, owner=owner, idempotency_key=f"key-{run}")
    schedule, _ = await lab.store.schedules.create(
        Schedule(name=f"s-{run}", kind="child", timing=Timing(every=3600.0), owner=owner,
                 input=msgspec.Raw(ev.encode_json({"run": run, "given": word("scheduled", run)})))
    )  # fmt: skip
    ticked = (await lab.store.schedules.trigger(schedule.id)).job_id
    assert (
        word("scheduled", run) in bytes((await lab.store.schedules.get(schedule.id)).schedule.input).decode()
    )
    await lab.until(job, "approval.requested")
    decision = {"decision": "approved", "comment": word("comment", run)}
    await lab.store.jobs.signal(job, "approval", decision, by="a person")
    await lab.store.jobs.signal(job, "news", word("told", run))
    await lab.ended(chat, job, ticked)
    children = [json.loads(e.data)["job"] async for e in entries(lab.store, job) if e.type == "child.spawned"]
    return [chat, job, ticked, *children]


async def entries(store: Store, job_id: str) -> AsyncIterator[Any]:
    async for page in store.log.pages(job_id):
        for entry in page.entries:
            yield entry


async def told(store: Store, run: str) -> bool:
    notices, _ = await store.notices.page("anna")
    return sum(run in bytes(one.about).decode() for one in notices) >= 1


async def all_archived(store: Store, jobs: list[str]) -> bool:
    return all([(await store.jobs.get(job)).is_archived for job in jobs])


async def test_no_word_is_written_in_the_clear(own_redis: RedisProcess, tmp_path: Path, receiver: Receiver):
    """The one thing it is for. Jobs from before show that what is looked for would be found."""
    changes = {"archive_url": str(tmp_path / "archive")} | SEALS | HTTP
    async with ScriptedProvider(scenario("clear")) as provider:
        plain = fast_settings(own_redis.url, **(provider_settings(provider) | changes))
        async with opened(own_redis.url, **changes, encryption_keys=()) as store:
            await store.webhooks.create("anna", Webhook(url=receiver.url, events=("job.completed",)))
            with worker_process(plain, VAULT_APP), projector_process(plain), ear(own_redis) as before:
                await wait_until(lambda: caught_up(store, ("notify",)))
                clear = await play(Lab(store, provider), "clear")
                await wait_until(lambda: all_archived(store, clear))
                await wait_until(lambda: told(store, "clear"))
                await wait_until(lambda: len(set(receiver.ids)) == 4)
    expected = {word(what, "clear") for what in CHAT | WORKFLOW}
    assert words_in(keyspace(own_redis)) | words_in(iter(before.heard)) >= expected
    assert words_in(files(tmp_path / "archive")) >= expected - {word("artifact", "clear")}
    async with ScriptedProvider(scenario("hidden")) as provider:
        changes |= KEYS
        hidden = fast_settings(own_redis.url, **(provider_settings(provider) | changes))
        async with (
            opened(own_redis.url, **changes) as store,
            serving(own_redis.url, **changes) as served,
        ):
            with worker_process(hidden, VAULT_APP), projector_process(hidden), ear(own_redis) as after:
                await wait_until(lambda: caught_up(store, ("notify",)))
                jobs = await play(Lab(store, provider), "hidden")
                await wait_until(lambda: all_archived(store, jobs))
                await wait_until(lambda: told(store, "hidden"))
                await wait_until(lambda: len(set(receiver.ids)) == 8)
            everywhere = itertools.chain(keyspace(own_redis), iter(after.heard), files(tmp_path / "archive"))
            leaks = {found for found in words_in(everywhere) if not found.endswith("-clear")}
            assert leaks == set()
            commands = b"".join(files(own_redis.folder))  # each one that there ever was, and snapshots
            assert word("prompt", "clear").encode() in commands
            assert f"-{MARK}-hidden".encode() not in commands
            seen = await shown(served.client, jobs)
            assert seen >= {word(what, "hidden") for what in (CHAT | WORKFLOW)}
            await expire(store, jobs)
            kept = {word(what, "hidden") for what in CHAT | {"result", "told", "child", "error"}}
            assert await shown(served.client, jobs[:2]) >= kept
            assert words_in(files(tmp_path / "archive")) >= {word("prompt", "clear")}
            await shredded_in_the_archive(served, jobs[0], tmp_path / "archive")


VAULT_APP = "tests.integration.vault_app:app"


async def shown(client: Any, jobs: list[str]) -> set[str]:
    """What viewers see: as a stream from the first event, joined late, as a view, as lines, as a result."""
    faces = [
        ("/events?after=0", "text/event-stream"), ("/events", "text/event-stream"), ("", "application/json"),
        ("/events", "application/x-ndjson"), ("/log", "application/json"), ("/artifacts/file.txt", "*/*"),
    ]  # fmt: skip
    seen: set[str] = set()
    for job, (path, accept) in itertools.product(jobs, faces):
        answer = await client.get(
            f"/v1/jobs/{job}{path}", headers={"accept": accept, "x-streamjobs-owner": "anna"}
        )
        assert answer.status_code in {200, 404}, answer.text
        assert b"enc1:" not in answer.content and b"enc2:" not in answer.content
        seen |= words_in(iter([answer.content]))
    return seen


async def expire(store: Store, jobs: list[str]) -> None:
    """As Redis does when their time has come: the data keys of archived jobs have none."""
    async with unrestricted(store) as client:
        for job in jobs:
            for name in await client.keys(f"*job:{job}*"):
                if await client.pttl(name) != -1:
                    await client.delete(name)


async def shredded_in_the_archive(served: Any, job: str, folder: Path) -> None:
    path = f"/v1/jobs/{job}"
    assert await served.store.vault.shred(job)
    assert (folder / name_of(job)).exists()
    for face in ("", "/result", "/events", "/log"):
        answer = await served.client.get(path + face, headers={"accept": "application/json"})
        assert (answer.status_code, answer.json()["code"]) == (410, "shredded"), face
    assert (await served.client.delete(path)).status_code == 200
    assert not (folder / name_of(job)).exists()
    assert (await served.client.get(path)).status_code == 404


# --- one job at a time


async def live(store: Store, **fields: Any) -> Script:
    script = await Script.start(store, **({"owner": "anna", "input": b'"an input"'} | fields))
    await script.open_turn()
    await script.say("one ", "two ")
    return script


async def ended(store: Store, words: int = 20, **fields: Any) -> Script:
    script = await live(store, **fields)
    await script.say(*(f"word {n} " for n in range(words)))
    await script.complete("a result")
    return script


async def text_of(store: Store, job_id: str) -> str:
    fold = Fold(job_id)
    fold.apply_all([entry async for entry in entries(store, job_id)])
    return fold.view().text


async def raw(store: Store, job_id: str, seq: int) -> tuple[str, dict[bytes, bytes]]:
    rows: Any = await store.client.xrange(f"sj:{{0}}:job:{job_id}:events", f"{seq}-0", str(seq))
    return rows[0][0].decode(), rows[0][1]


async def data_key(store: Store, job_id: str) -> bytes | None:
    return await store.client.get(f"sj:{{0}}:job:{job_id}:datakey")


def vault(store: Store) -> Vault:
    assert store.vault is not None
    return store.vault


async def test_a_job_without_its_data_key_is_shredded(redis: RedisProcess):
    """Deleting one key is how a promise to forget is kept, also of the copies of an archive."""
    async with serving(redis.url, **KEYS, **SEALS) as served:
        store, path = served.store, "/v1/jobs/"
        sealed, fresh = await ended(store), await ended(store)
        await SnapshotProjection(store).advance(sealed.id)
        for job in (sealed.id, fresh.id):
            assert (await served.client.get(path + job)).status_code == 200
            assert await text_of(store, job) == await text_of(store, job)  # decoded, and kept
            assert [await vault(store).shred(job), await vault(store).shred(job)] == [True, False]
            for face in ("", "/result", "/events", "/log", "/effects", "?at=3"):
                answer = await served.client.get(f"{path}{job}{face}", headers={"accept": "application/json"})
                assert (answer.status_code, answer.json()["code"]) == (410, "shredded"), face
            stream = await served.client.get(f"{path}{job}/events", headers={"accept": "text/event-stream"})
            assert (stream.status_code, stream.json()["code"]) == (410, "shredded")
            for projection in build(store.settings.projections, store):
                await advanced(projection, job)
            assert (await served.client.delete(path + job)).status_code == 200
            assert (await served.client.get(path + job)).status_code == 404


async def advanced(projection: Any, job_id: str) -> None:
    """As the runner does, for which a job that is not there is none of its business."""
    with contextlib.suppress(JobNotFound):
        await projection.advance(job_id)


async def test_lists_of_many_jobs_go_on_without_what_is_shredded(store: Store):
    """One shredded job would take an owner's feed, their notices and the dead list with it."""
    gone, kept = await live(store), await live(store)
    for script in (gone, kept):
        await script.fail(ev.ErrorInfo("boom", "why it failed"))
        await NotifyProjection(store).advance(script.id)
    assert await vault(store).shred(gone.id)
    notices, _ = await store.notices.page("anna")
    assert {one.job: json.loads(bytes(one.about))["message"] for one in notices} == {
        gone.id: "",
        kept.id: "why it failed",
    }
    dead, _ = await store.dead.page(DeadFilter())
    assert {one.id: (one.code, one.message) for one in dead} == {
        gone.id: ("boom", ""),
        kept.id: ("boom", "why it failed"),
    }
    page = await store.owners.page("anna", FEED_START)
    contents = {(event.job_id, event.entry.type): event.entry.data for event in page.events}
    assert contents[gone.id, "job.queued"] == contents[gone.id, "job.failed"] == b""
    assert (
        b"an input" in contents[kept.id, "job.queued"] and b"why it failed" in contents[kept.id, "job.failed"]
    )
    assert contents[gone.id, "job.started"] != b""


async def test_deleting_a_job_shreds_it(store: Store):
    """A copy of its file could still be read, wherever that is."""
    script = await ended(store)
    assert await data_key(store, script.id)
    assert vault(store).known(script.id) is not None
    await store.retention.delete(script.id)
    assert await data_key(store, script.id) is None
    assert vault(store).known(script.id) is None, "this process could still read a copy of it"
    archived = await ended(store)
    await store.retention.keep(archived.id, 60.0, archive="archived")
    assert await store.retention.relieve(0, 10, fresh=0.0) == 1
    assert await data_key(store, archived.id), "its file was kept, only the memory was short"
    assert await vault(store).shred(archived.id)


async def test_a_live_job_is_not_shredded_and_ends_where_it_was(redis: RedisProcess, store: Store):
    """It would be taken by one worker after the other for ever."""
    job = (await store.jobs.submit(Submission(kind="child", input=b'{"run":"r"}'))).job_id
    with pytest.raises(JobNotEnded):
        await vault(store).shred(job)
    await store.client.delete(f"sj:{{0}}:job:{job}:datakey")
    async with opened(redis.url, lease=1.5) as other, working(other, app):
        await wait_until(lambda: is_ended(store, job))
    (found,), _ = await store.dead.page(DeadFilter())
    assert (found.id, found.code) == (job, "shredded")


async def is_ended(store: Store, job_id: str) -> bool:
    return (await store.jobs.get(job_id)).is_ended


async def test_a_parent_keeps_what_its_child_found(redis: RedisProcess, store: Store):
    """A parent that goes on after its child was deleted would have lost its memory."""
    async with working(store, app):
        parent = (await store.jobs.submit(Submission(kind="everything", input=b'"r"'))).job_id
        await wait_until(lambda: has(store, parent, "approval.requested"))
    ends = [json.loads(e.data) async for e in entries(store, parent) if e.type == "child.ended"]
    assert ends[0]["result"] == word("child", "r")
    assert ends[1]["error"] == {"code": "permanent", "message": word("error", "r"), "retryable": False}
    for end in ends:
        await store.retention.delete(end["job"])
    async with opened(redis.url) as other:
        again = [json.loads(e.data) async for e in entries(other, parent) if e.type == "child.ended"]
    assert again == ends


async def has(store: Store, job_id: str, kind: str) -> bool:
    return kind in [entry.type async for entry in entries(store, job_id)]


# --- keys


def keys_rotate(url: str, *names: str, **options: str) -> tuple[int, str]:
    settings = {"encryption_keys": ",".join(map(key, names))} | options
    arguments = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    run = CliRunner().invoke(cli, ["keys", "rotate", "--batch", "5", "--redis-url", url, *arguments])
    return run.exit_code, run.output


async def test_a_key_is_rotated_out_while_jobs_run(redis: RedisProcess):
    """Whoever took the old key could read everything for ever, or changing it would mean an outage."""
    async with opened(redis.url) as before:
        old = [(await ended(before)).id for _ in range(12)]
    ring = {"encryption_keys": (key("k2"), key("k1"))}
    async with opened(redis.url, **ring) as during, working(during, app):
        job = (await during.jobs.submit(Submission(kind="patient", input=b'"r"'))).job_id
        await wait_until(lambda: has(during, job, "job.waiting"))
        await during.jobs.signal(job, "first", "before")
        done = await asyncio.to_thread(keys_rotate, redis.url, "k2", "k1")
        assert done == (0, "13 data keys, 12 wrapped anew, 0 could not be unwrapped\n")
        again = await asyncio.to_thread(keys_rotate, redis.url, "k2", "k1")
        assert again == (0, "13 data keys, 0 wrapped anew, 0 could not be unwrapped\n")
        assert (await data_key(during, old[0]) or b"").startswith(b"1:k2:")
        async with opened(redis.url, encryption_keys=(key("k2"),)) as after:
            assert (await text_of(after, old[0])).startswith("one two word 0")
            await after.jobs.signal(job, "second", "after")
            await wait_until(lambda: is_ended(after, job))
            last = json.loads((await after.log.last(job)).data)
            assert last["result"] == ["r", "before", "after"]
    with pytest.raises(EncryptionKeyMissing, match="'k2'"):
        async with opened(redis.url):
            pass


async def test_rotation_goes_on_past_what_is_damaged(redis: RedisProcess, store: Store):
    """One bad record would keep all others under a key that is known to be stolen."""
    jobs = [(await ended(store)).id for _ in range(3)]
    await store.client.set(f"sj:{{0}}:job:{jobs[0]}:datakey", "1:k1:AAAA")
    await store.client.set(f"sj:{{0}}:job:{jobs[1]}:datakey", "1:k0:AAAA")
    await store.client.pexpire(f"sj:{{0}}:job:{jobs[2]}:datakey", 60_000)
    code, said = await asyncio.to_thread(keys_rotate, redis.url, "k2", "k1")
    assert (code, said.splitlines()[-1]) == (1, "3 data keys, 1 wrapped anew, 2 could not be unwrapped")
    assert "'k1'" in said and "'k0'" in said
    assert 0 < await store.client.pttl(f"sj:{{0}}:job:{jobs[2]}:datakey") <= 60_000
    async with unrestricted(store) as client:
        await client.flushall()


async def test_keys_are_read_from_a_file_and_shred_by_hand(redis: RedisProcess, tmp_path: Path):
    """Keys in the environment are seen by everybody who may look at a process."""
    file = tmp_path / "keys"
    file.write_text(f"# the first wraps\n{key('k2')}\n\n  {key('k1')}\n")
    async with opened(redis.url) as before:
        job = (await ended(before)).id
    async with opened(redis.url, encryption_keys=(), encryption_keys_file=str(file)) as store:
        assert vault(store).ring.names == ["k2", "k1"]
        assert (await text_of(store, job)).startswith("one two")
        arguments = ["keys", "shred", "--redis-url", redis.url, "--set", f"encryption_keys_file={file}", job]
        said = [(await asyncio.to_thread(CliRunner().invoke, cli, arguments)).output for _ in range(2)]
        assert said == [f"{job} shredded\n", f"{job} has no data key\n"]
        with pytest.raises(Shredded):
            await text_of(store, job)
    with pytest.raises(ConfigError, match="encryption_keys_file"):
        async with opened(redis.url, encryption_keys_file=str(tmp_path / "none")):
            pass


async def test_errors_name_the_key(redis: RedisProcess, store: Store):
    """Somebody would be called at night, and not know which key to look for."""
    script = await ended(store)
    async with opened(redis.url, encryption_keys=(key("k3"), key("k1"))) as other:
        newer = await ended(other)
    with pytest.raises(EncryptionKeyMissing, match="'k3'"):
        await text_of(store, newer.id)
    _, fields = await raw(store, script.id, 4)
    damaged = fields[b"d"].replace(b"enc1:", b"enc1:AAAA")
    await renew(store, script.id, {4: damaged})
    with pytest.raises(DamagedCiphertext, match="'k1'"):
        await text_of(store, script.id)
    found = {(violation.check, violation.subject) for violation in (await Doctor(store).examine()).violations}
    assert {("readable", newer.id), ("readable", script.id)} <= found


async def renew(store: Store, job_id: str, changed: dict[int, bytes]) -> None:
    """A job's stream with other contents, as somebody makes it who can write to Redis."""
    name = f"sj:{{0}}:job:{job_id}:events"
    rows: Any = await store.client.xrange(name)
    await store.client.delete(name)
    for cursor, fields in rows:
        seq = int(cursor.decode().partition("-")[0])
        content = changed.get(seq, fields[b"d"])
        await store.client.xadd(name, {"t": fields[b"t"], "d": content}, id=cursor)
    await store.client.pexpireat(name, await store.client.pexpiretime(f"sj:{{0}}:job:{job_id}"))


async def test_what_is_pasted_from_elsewhere_is_refused(store: Store):
    """Who can write to Redis, and read one job of their own, could read all others through it."""
    mine, theirs = await ended(store), await ended(store)
    rows = {seq: (await raw(store, theirs.id, seq))[1] for seq in (1, 4, 26)}
    own = {seq: (await raw(store, mine.id, seq))[1] for seq in (1, 4, 26)}
    text, given, result = (
        re.search(rb'"enc1:[^"]*"', row[b"d"])[0]  # type: ignore[index]
        for row in (own[4], own[1], own[26])
    )
    assert [own[seq][b"t"] for seq in (1, 4, 26)] == [b"job.queued", b"text.delta", b"job.completed"]
    for seq, content in [
        (4, rows[4][b"d"]),  # another job's
        (4, own[4][b"d"].replace(text, given)),  # another field of this job
        (26, own[26][b"d"].replace(result, text)),  # another type of event
    ]:
        before = (await raw(store, mine.id, seq))[1][b"d"]
        await renew(store, mine.id, {seq: content})
        with pytest.raises(DamagedCiphertext):
            await text_of(store, mine.id)
        await renew(store, mine.id, {seq: before})
    record = await data_key(store, theirs.id)
    assert (await text_of(store, mine.id)).startswith("one two")
    await store.client.set(f"sj:{{0}}:job:{mine.id}:datakey", record, keepttl=True)
    with pytest.raises(DamagedCiphertext, match="another job's"):
        await text_of(store, mine.id)


async def test_blobs_pasted_from_elsewhere_are_refused(redis: RedisProcess):
    async with opened(redis.url, **SEALS) as store:
        mine, theirs = await ended(store), await ended(store)
        for script in (mine, theirs):
            await SnapshotProjection(store).advance(script.id)
        fields: Any = await store.client.hgetall(f"sj:{{0}}:job:{theirs.id}:sealed")
        await store.client.hset(f"sj:{{0}}:job:{mine.id}:sealed", "snap", fields[b"snap"])
        with pytest.raises(DamagedCiphertext, match="snapshot"):
            await store.snapshots.load(mine.id)
        await store.client.hset(f"sj:{{0}}:job:{mine.id}:sealed", "26", fields[b"26"])
        with pytest.raises(DamagedCiphertext, match="segment"):
            await store.log.page(mine.id)


# --- turning it on


async def test_jobs_from_before_are_read_and_go_on(redis: RedisProcess):
    """Turning encryption on would lose everything, or ask for an empty store."""
    async with opened(redis.url, encryption_keys=()) as plain:
        old, script = await ended(plain), await live(plain)
        await plain.artifacts.put(script.id, script.epoch, "before", "text/plain", b"made before")
        schedule, _ = await plain.schedules.create(hourly())
    async with opened(redis.url, **SEALS) as store:
        going_on = script.under(store)
        await going_on.say("three")
        await going_on.keep("after", "text/plain", b"made after")
        await store.jobs.signal(script.id, "go", "a payload")
        assert [b"enc1:" in (await raw(store, script.id, seq))[1][b"d"] for seq in (1, 4, 5, 6, 7)] == [
            False, False, False, True, True,
        ]  # fmt: skip
        assert await store.artifacts.names(script.id) == {"after": 10, "before": 11}
        assert await store.artifacts.get(script.id, "before") == ("text/plain", b"made before")
        assert await store.artifacts.get(script.id, "after") == ("text/plain", b"made after")
        assert bytes((await store.schedules.get(schedule.id)).schedule.input) == b'"an input"'
        await going_on.complete("a result")
        for job in (old.id, script.id):
            text = await text_of(store, job)
            await SnapshotProjection(store).advance(job)
            assert await text_of(store, job) == text
        assert await text_of(store, script.id) == "one two three"
    with pytest.raises(ConfigError, match="'k1'"):
        async with opened(redis.url, encryption_keys=()):
            pass


def hourly() -> Schedule:
    return Schedule(
        name="s", kind="child", owner="anna", timing=Timing(every=3600.0), input=msgspec.Raw(b'"an input"')
    )


async def test_while_keys_are_rolled_out_new_jobs_stay_plain(redis: RedisProcess):
    """Processes that have no key yet would be given ciphertext for an input."""
    quiet = {"encryption_new_jobs": False}
    async with opened(redis.url, **quiet) as store:
        script = await live(store)
        await script.say("more")
        assert await data_key(store, script.id) is None
        async with opened(redis.url, encryption_keys=()) as plain:
            assert await text_of(plain, script.id) == "one two more"
        async with opened(redis.url) as encrypting:
            hidden = await live(encrypting)
        await hidden.under(store).say("more")
        assert b"enc1:" in (await raw(store, hidden.id, 6))[1][b"d"], "what has a data key goes on with it"


async def test_two_that_make_a_data_key_make_the_same(redis: RedisProcess):
    """What one of them wrote could never be read again."""
    async with opened(redis.url, encryption_keys=()) as plain:
        jobs = [(await live(plain)).id for _ in range(10)]
    async with opened(redis.url) as one, opened(redis.url) as other:
        for job in jobs:
            made = await asyncio.gather(vault(one).ensure(job), vault(other).ensure(job))
            assert made[0] is not None and made[1] is not None
            assert made[1].open(made[0].seal(b"words", b""), b"") == b"words"


async def test_a_writer_asks_for_a_data_key_now_and_then(store: Store, monkeypatch: pytest.MonkeyPatch):
    """A job would be asked about at each write, or go on for ever with a key that is gone."""
    now = 1000.0
    monkeypatch.setattr("streamjobs.store.vault.time", SimpleNamespace(monotonic=lambda: now))
    script = await live(store)
    record = await data_key(store, script.id)
    name = f"sj:{{0}}:job:{script.id}:datakey"
    for later in (59.0, 59.0 + 61.0):
        now = 1000.0 + later
        await vault(store).ensure(script.id)
        await store.client.delete(name)
        assert await vault(store).ensure(script.id), "asked for a moment ago"
        await store.client.set(name, record)
    now += 61.0
    await store.client.delete(name)
    with pytest.raises(Shredded):
        await vault(store).ensure(script.id)


async def test_the_same_submission_is_the_same_job(store: Store):
    """A client that sends again would be refused, or make a job that nobody can read."""
    sub = Submission(kind="child", owner="anna", input=b'"an input"', idempotency_key="k")
    first = await store.jobs.submit(sub)
    record = await data_key(store, first.job_id)
    again = await store.jobs.submit(sub)
    assert (again.job_id, again.repeated, await data_key(store, first.job_id)) == (first.job_id, True, record)
    with pytest.raises(IdempotencyMismatch):
        await store.jobs.submit(msgspec.structs.replace(sub, input=b'"another"'))
    assert await first_input(store, first.job_id) == "an input"


async def first_input(store: Store, job_id: str) -> Any:
    return json.loads((await store.log.page(job_id)).entries[0].data)["input"]


async def test_a_batch_sent_again_is_the_same(store: Store):
    """A reply that was lost would cost a job its lease."""
    script = await live(store)
    batch = Batch(script.id, script.epoch, 3, [("text.delta", b'{"ts":1,"turn":1,"text":"once"}')])
    first = await store.work.append(0, [batch])
    sent = list(batch.stored)
    again = await store.work.append(0, [batch])
    assert [answer.verdict for answer in (*first, *again)] == ["ok", "dup"]
    assert batch.stored == sent != list(batch.events)


async def test_a_viewer_sees_a_live_job_although_its_key_was_forgotten_here(redis: RedisProcess):
    """Streams of long jobs would stop when the data keys of others push theirs out."""
    async with serving(redis.url, **KEYS, encryption_cache=1) as served:
        script = await live(served.store)
        async with served.stream(script.id, after="0") as stream:
            await stream.until("text.delta")
            for number in range(3):
                await ended(served.store, words=1)
                await script.say(f"piece {number}")
            await script.complete()
            frames = await stream.until("job.completed")
        texts = [frame.json["text"] for frame in frames if frame.event == "text.delta"]
        assert texts == ["two ", "piece 0", "piece 1", "piece 2"]
