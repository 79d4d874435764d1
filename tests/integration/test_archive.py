"""Jobs in the archive: written by a projector before they expire, read through the gateway when they have."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from streamjobs.archive import Archive, name_of
from streamjobs.client import Client, GatewayError
from streamjobs.errors import ArchiveUnavailable, JobNotFound
from streamjobs.events import JobLog
from streamjobs.projections.retention import RetentionProjection
from streamjobs.projections.snapshot import SnapshotProjection
from streamjobs.store import Store
from tests.conftest import RedisProcess, fast_settings, unrestricted, wait_until
from tests.integration.gateway import Script, Served, serving
from tests.projections.bench import projecting

ARCHIVED = "x-streamjobs-archived"


@pytest.fixture(params=["folder", "memory"])
def archive_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "jobs") if request.param == "folder" else f"memory://{uuid4().hex}"


@pytest.fixture
async def served(redis: RedisProcess, archive_url: str) -> AsyncIterator[Served]:
    async with serving(redis.url, archive_url=archive_url) as gateway:
        yield gateway


async def ended(served: Served, words: int = 3) -> Script:
    script = await served.script(owner="anna")
    await script.open_turn()
    await script.say(*(f"word {n} " for n in range(words)))
    await script.write(JobLog(message="for people", level="warning"))
    await script.complete({"answer": 42})
    return script


async def expire(store: Store, job_id: str) -> None:
    """As Redis does when its time has come."""
    async with unrestricted(store) as client:
        names: list[bytes] = await client.keys(f"*job:{job_id}*")
        await client.delete(*(name for name in names if not name.endswith(b":datakey")))


async def archived(served: Served, **more: Any) -> Script:
    script = await ended(served, **more)
    await SnapshotProjection(served.store).advance(script.id)
    await RetentionProjection(served.store).advance(script.id)
    assert (await served.store.jobs.get(script.id)).is_archived
    return script


async def test_an_archived_job_looks_as_it_did(served: Served):
    """What was kept for good could not be read again, or would be another story."""
    script = await archived(served, words=1200)
    client, job = served.client, f"/v1/jobs/{script.id}"
    paths = (job, f"{job}?at=4", f"{job}/result", f"{job}/log", f"{job}/effects", f"{job}?wait=1")
    before = [await client.get(path) for path in paths]
    log = await script.log()
    frames = await served.transcript(script.id, after="0")
    joined = await served.transcript(script.id)
    assert all(ARCHIVED not in answer.headers for answer in before)
    await expire(served.store, script.id)
    for path, was in zip(paths, before, strict=True):
        now = await client.get(path)
        assert (now.status_code, now.json()) == (200, was.json())
        assert now.headers.get("etag") == was.headers.get("etag")
        assert now.headers[ARCHIVED] == "true"
    etag = before[0].headers["etag"]
    assert (await client.get(job, headers={"if-none-match": etag})).status_code == 304
    assert (await client.get(f"{job}?at=99999")).status_code == 422
    replayed = await served.transcript(script.id, after="0")
    assert [frame.row for frame in replayed] == [frame.row for frame in frames]
    assert [frame.row for frame in await served.transcript(script.id)] == [frame.row for frame in joined]
    for at in (0, 3, 700):
        rest = await served.transcript(script.id, log[at][0])
        assert [frame.row for frame in rest] == log[at + 1 :]
    lost = await served.transcript(script.id, "3-99")
    assert [frame.event for frame in lost] == ["reset", "snapshot"]
    async with served.stream(script.id, log[-1][0]) as stream:
        assert (stream.response.status_code, stream.response.headers[ARCHIVED]) == (204, "true")
    head = await client.head(f"{job}/events")
    assert (head.status_code, head.headers[ARCHIVED]) == (200, "true")


async def test_pages_and_lines_of_an_archived_job(served: Served):
    """A program that copies logs would stop at those that are archived."""
    script = await archived(served, words=700)
    log = await script.log()
    events = f"/v1/jobs/{script.id}/events"
    lines = await served.client.get(events, headers={"accept": "application/x-ndjson"})
    page = await served.client.get(events, headers={"accept": "application/json"})
    await expire(served.store, script.id)
    now = await served.client.get(events, headers={"accept": "application/x-ndjson"})
    assert (now.content, now.headers[ARCHIVED]) == (lines.content, "true")
    rows: list[tuple[str, str]] = []
    cursor, more = "0", True
    while more:
        answer = await served.client.get(
            events, params={"after": cursor, "limit": 300}, headers={"accept": "application/json"}
        )
        assert answer.headers[ARCHIVED] == "true"
        said = answer.json()
        rows += [(event["id"], event["type"]) for event in said["events"]]
        cursor, more = said["cursor"], said["more"]
    assert rows == [row[:2] for row in log]
    assert said["status"] == page.json()["status"] == "completed"
    for accept in ("application/json", "application/x-ndjson"):
        lost = await served.client.get(events, params={"after": "3-9"}, headers={"accept": accept})
        assert (lost.status_code, lost.json()["code"]) == (409, "cursor_not_found")


async def test_a_job_that_is_nowhere_is_not_found(served: Served):
    """Somebody would wait for a job that never was."""
    path = "/v1/jobs/j0-" + "a" * 26
    for accept in ("application/json", "application/x-ndjson", "text/event-stream"):
        answer = await served.client.get(f"{path}/events", headers={"accept": accept})
        assert answer.status_code == 404, accept
    for rest in ("", "/result", "/log", "/effects"):
        assert (await served.client.get(path + rest)).status_code == 404
    assert (await served.client.delete(path)).status_code == 404


async def test_deleting_removes_the_file_too(served: Served):
    """What somebody must forget would be in the archive for ever."""
    for is_expired in (False, True):
        script = await archived(served)
        if is_expired:
            await expire(served.store, script.id)
        assert (await served.client.delete(f"/v1/jobs/{script.id}")).status_code == 200
        assert (await served.client.get(f"/v1/jobs/{script.id}")).status_code == 404
        assert (await served.client.delete(f"/v1/jobs/{script.id}")).status_code == 404


async def test_a_job_deleted_while_it_is_archived_stays_deleted(
    served: Served, monkeypatch: pytest.MonkeyPatch
):
    """It would come back from the archive a moment after it was to be forgotten."""
    script = await ended(served)
    write = Archive.write

    async def slow(archive: Archive, *arguments: Any) -> None:
        await write(archive, *arguments)
        await served.store.retention.delete(script.id)

    monkeypatch.setattr(Archive, "write", slow)
    await RetentionProjection(served.store).advance(script.id)
    assert (await served.client.get(f"/v1/jobs/{script.id}")).status_code == 404


async def test_killed_between_file_and_mark_it_writes_the_same_again(
    served: Served, monkeypatch: pytest.MonkeyPatch
):
    """A projector that was killed would leave a job that is never marked, or two files of it."""
    script = await ended(served)
    keep = type(served.store.retention).keep

    async def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(served.store.retention), "keep", killed)
    with pytest.raises(KeyboardInterrupt):
        await RetentionProjection(served.store).advance(script.id)
    monkeypatch.setattr(type(served.store.retention), "keep", keep)
    await RetentionProjection(served.store).advance(script.id)
    log = await script.log()
    await expire(served.store, script.id)
    assert [frame.row for frame in await served.transcript(script.id, after="0")] == log


async def test_it_is_written_once(served: Served, monkeypatch: pytest.MonkeyPatch):
    """Each note about an old job, and each rebuild, would send its file again."""
    script = await archived(served)
    monkeypatch.delattr(Archive, "write")
    await RetentionProjection(served.store).advance(script.id)


async def test_a_live_job_is_not_archived(served: Served):
    """Half a log would stand in the archive as the whole one."""
    script = await served.script()
    await RetentionProjection(served.store).advance(script.id)
    archive = Archive.of(served.store.settings.archive_url, 10.0)
    assert archive is not None
    with pytest.raises(JobNotFound):
        async with archive.reading(script.id):
            pass
    await script.complete()


async def test_export_of_live_ended_and_archived_jobs(served: Served):
    """A backup of one job would need another program for each place where it may be."""
    live = await served.script()
    done = await archived(served)
    async with Client(served.url) as client:
        for script in (live, done):
            log = await script.log()
            content = b"".join([piece async for piece in client.handle(script.id).export()])
            rows = [json.loads(line) for line in content.splitlines()]
            assert [row["id"] for row in rows] == [row[0] for row in log]
        before = b"".join([piece async for piece in client.export(done.id)])
        await expire(served.store, done.id)
        assert b"".join([piece async for piece in client.export(done.id)]) == before
        with pytest.raises(GatewayError, match="no such job"):
            await anext(client.export("j0-" + "a" * 26))
    await live.complete()


async def test_an_archive_that_is_away_is_503_and_streams_come_back(
    redis: RedisProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A browser that is answered 503 never comes back; others could not tell `gone` from `not now`."""
    async with serving(redis.url, archive_url=str(tmp_path / "jobs")) as served:
        script = await archived(served)
        await expire(served.store, script.id)
        path = tmp_path / "jobs" / name_of(script.id)
        content = path.read_bytes()
        path.unlink()
        path.mkdir()
        answer = await served.client.get(f"/v1/jobs/{script.id}")
        assert (answer.status_code, answer.json()["code"]) == (503, "archive_unavailable")
        frames = await served.transcript(script.id, after="0")
        assert [frame.event for frame in frames] == ["handover"]
        path.rmdir()
        path.write_bytes(content)
        assert (await served.transcript(script.id, after="0"))[-1].event == "job.completed"


async def test_what_the_archive_refuses_is_shown_kept_and_tried_again(redis: RedisProcess, tmp_path: Path):
    """A disk that was full for an hour would cost jobs for good, or stop the other projections' work."""
    place = tmp_path / "jobs"
    place.write_bytes(b"no folder")
    policies = ("*=0.001s",)
    store = await Store.open(
        fast_settings(
            redis.url, archive_url=str(place), retention_policies=policies, projections=("retention",)
        )
    )
    job = await Script.start(store)
    await job.complete()
    projection = RetentionProjection(store, shortest=0.05)

    async def is_refused() -> bool:
        return bool(await store.feed.quarantined(0, "retention"))

    async with projecting(store, projection):
        await wait_until(is_refused)
        (failed,) = await store.feed.quarantined(0, "retention") or [None]
        assert failed is None or failed.error.startswith("ArchiveUnavailable")
        assert (await store.jobs.get(job.id)).is_ended, "its policy says a millisecond"
        assert await store.retention.relieve(0, 10, fresh=0.0) == 0, "it is nowhere else"
        place.unlink()

        async def is_there() -> bool:
            return (place / name_of(job.id)).exists() and not await is_refused()

        await wait_until(is_there)

        async def is_gone() -> bool:
            return not await store.client.exists(f"sj:{{0}}:job:{job.id}")

        await wait_until(is_gone)
    await store.aclose()


async def test_a_dead_archive_is_not_asked_for_each_job(
    redis: RedisProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Each job would wait for the timeout, and a thousand of them would stop the projector."""
    store = await Store.open(fast_settings(redis.url, archive_url=str(tmp_path)))
    asked: list[str] = []

    async def dead(_archive: Archive, header: Any, _pages: Any) -> None:
        asked.append(header.id)
        raise ArchiveUnavailable("the archive: down")

    monkeypatch.setattr(Archive, "write", dead)
    projection = RetentionProjection(store, shortest=60.0)
    for _ in range(3):
        job = await Script.start(store)
        await job.complete()
        with pytest.raises(ArchiveUnavailable):
            await projection.advance(job.id)
    await projection.sweep(0)
    assert len(asked) == 1
    await store.aclose()


async def test_a_projector_archives_everything_that_ends(redis: RedisProcess, tmp_path: Path):
    """Only jobs that somebody looks at would be in the archive; those that were there before it, never."""
    store = await Store.open(
        fast_settings(redis.url, archive_url=str(tmp_path), projections=("snapshot", "retention"))
    )
    jobs = [await Script.start(store) for _ in range(5)]
    for job in jobs[:3]:
        await job.complete()
    projections = (SnapshotProjection(store), RetentionProjection(store))
    async with projecting(store, *projections), asyncio.timeout(30):
        for job in jobs[3:]:
            await job.complete()

        async def are_all_there() -> bool:
            return all((tmp_path / name_of(job.id)).exists() for job in jobs)

        await wait_until(are_all_there)
    await store.aclose()
