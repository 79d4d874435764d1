"""`/v1/ws`: many jobs on one connection, each exactly its log, and a client that can hurt nobody else."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from streamjobs.errors import StreamjobsError
from streamjobs.events import JobProgress
from streamjobs.gateway import websocket
from streamjobs.gateway.ring import CHUNK_BYTES
from tests.conftest import RedisProcess, unrestricted, wait_until
from tests.integration.gateway import Script, Served, serving
from tests.integration.sockets import Message, Talk, rows, talking
from tests.integration.test_archive import archived, expire
from tests.integration.test_events import finished, metric, text_of


@pytest.fixture
async def served(redis: RedisProcess) -> AsyncIterator[Served]:
    async with serving(redis.url, position_interval=600.0) as gateway:
        yield gateway


def ops(messages: list[Message]) -> list[str]:
    return [message.op for message in messages]


def is_idle(served: Served) -> bool:
    """Nothing is left of anybody who watched."""
    hub = served.gateway.hub
    return hub.viewers == hub.channels == hub.snapshots.held == 0


def watched(served: Served) -> int:
    """How many subscriptions there are, over all jobs and connections."""
    return sum(len(channel.watchers) for channel in served.gateway.hub._channels.values())


# --- the same as the other transports


async def test_a_resume_from_every_position_is_the_exact_suffix(served: Served):
    """What SSE says from a cursor and what the WebSocket says are the same bytes."""
    script = await finished(served)
    log = await script.log()
    async with talking(served) as talk:
        for n in range(len(log)):
            cursor = log[n - 1][0] if n else "0"
            heard = await talk.transcript(script.id, cursor)
            assert (
                rows(heard) == log[n:] == [frame.row for frame in await served.transcript(script.id, cursor)]
            )
            assert (heard[0].op, heard[-1].id) == ("subscribed", log[-1][0])


async def test_a_snapshot_is_the_one_that_a_stream_begins_with(served: Served):
    script = await finished(served)
    (frame,) = await served.transcript(script.id)
    async with talking(served) as talk:
        heard = await talk.transcript(script.id)
    assert ops(heard) == ["subscribed", "snapshot", "ended"]
    assert (heard[1].id, bytes(heard[1].data).decode()) == (frame.id, frame.data)


async def test_merged_events_are_those_of_a_merged_stream(served: Served):
    script = await finished(served, words=300)
    log = await script.log()
    async with talking(served) as talk:
        merged = rows(await talk.transcript(script.id, "0", merge=True))
        assert merged == [frame.row for frame in await served.transcript(script.id, "0", merge="1")]
        assert len(merged) < len(log) / 10
        for cursor in (row[0] for row in merged[:-1]):
            behind = next(n for n, event in enumerate(log, 1) if event[0] == cursor)
            assert text_of(rows(await talk.transcript(script.id, cursor))) == text_of(log[behind:])


async def test_a_slower_pace_means_fewer_messages_and_no_other_end(redis: RedisProcess):
    async with serving(redis.url, flush_interval=0.001, flush_max=3600.0) as served, talking(served) as quick:
        script = await served.script()
        async with talking(served) as slow, asyncio.TaskGroup() as group:
            reading = [
                group.create_task(quick.transcript(script.id, "0")),
                group.create_task(slow.transcript(script.id, "0", flush=900_000)),
            ]
            await wait_until(lambda: watched(served) == 2)
            await script.open_turn()
            for n in range(60):
                await script.say(f"{n} ")
            await script.complete()
        quickly, slowly = (task.result() for task in reading)
        assert rows(quickly) == rows(slowly) == await script.log()
        assert len(slowly) < len(quickly) / 2


async def test_snapshot_and_tail_meet_without_a_hole_under_load(served: Served):
    """Whoever joins at any moment: the snapshot's end is where the tail begins."""
    script = await served.script()
    await script.open_turn()

    async def write() -> None:
        for n in range(200):
            await script.say(f"{n} ")
        await script.complete()

    async def join(delay: float) -> list[Message]:
        await asyncio.sleep(delay)
        async with talking(served) as talk:
            return await talk.transcript(script.id)

    async with asyncio.TaskGroup() as group:
        group.create_task(write())
        joining = [group.create_task(join(n * 0.01)) for n in range(20)]
    log = await script.log()
    ids = [event_id for event_id, _, _ in log]
    for task in joining:
        _, snapshot, *tail = task.result()
        assert snapshot.op == "snapshot"
        assert rows(tail) == log[ids.index(snapshot.id) + 1 :]


async def test_a_large_view_and_a_large_event_come_whole(redis: RedisProcess):
    """Their size is in no relation to what a connection takes at once."""
    async with serving(redis.url, send_buffer=4096) as served, talking(served) as talk:
        script = await served.script()
        await script.open_turn()
        for _ in range(10):
            await script.say("w\u00f6rter " * 10_000)
        await script.complete()
        assert rows(await talk.transcript(script.id, "0")) == await script.log()
        _, snapshot, _ = await talk.transcript(script.id)
        assert snapshot.json["text"] == "w\u00f6rter " * 100_000


async def test_an_archived_job_is_shown_from_its_file(redis: RedisProcess, tmp_path: Any):
    """Long after its retention, by the same messages."""
    async with serving(redis.url, archive_url=str(tmp_path)) as served, talking(served) as talk:
        script = await archived(served, words=300)
        log = await script.log()
        stored = await talk.transcript(script.id)
        await expire(served.store, script.id)
        assert served.gateway.hub.channels == 0
        for n in (0, 1, 150, len(log)):
            heard = await talk.transcript(script.id, log[n - 1][0] if n else "0")
            assert rows(heard) == log[n:]
            assert heard[-1].id == log[-1][0]
        heard = await talk.transcript(script.id)
        assert ops(heard) == ["subscribed", "snapshot", "ended"]
        assert heard[1].json["text"] == stored[1].json["text"]
        assert ops(await talk.transcript(script.id, "5-5")) == ["subscribed", "reset", "snapshot", "ended"]


# --- cursors


async def test_a_cursor_of_another_history_gets_a_reset_and_a_snapshot(served: Served):
    """Never a silent jump, never a silent replay of everything."""
    script = await served.script()
    await script.open_turn()
    await script.say("a", "b")
    seq, epoch = (await script.log())[-1][0].split("-")
    async with talking(served) as talk:
        for cursor in (f"{seq}-{int(epoch) - 1}", f"{int(seq) + 50}-{epoch}", f"2-{int(epoch) + 5}"):
            await talk.subscribe(script.id, cursor)
            _, reset, snapshot = await talk.until("snapshot")
            assert (reset.op, reset.reason, reset.cursor) == ("reset", "unknown_cursor", cursor)
            assert (snapshot.id, snapshot.json["text"]) == (f"{seq}-{epoch}", "ab")
            await talk.say("unsubscribe", job=script.id)
            await talk.until("unsubscribed")
    await script.complete()


async def test_behind_the_terminal_event_there_is_nothing(served: Served):
    script = await finished(served)
    last = (await script.log())[-1][0]
    async with talking(served) as talk:
        heard = await talk.transcript(script.id, last)
        assert ops(heard) == ["subscribed", "ended"]
        assert heard[-1].id == last
    assert served.store.live.connections == 0


@pytest.mark.parametrize(
    "cursor", ["x", "-1", "1", "1-1-1", "01-1", "9" * 40, "1-1\n", "\u0661-\u0661", " 1-1"]
)
async def test_what_is_no_cursor_is_refused(served: Served, cursor: str):
    script = await served.script()
    async with talking(served) as talk:
        await talk.subscribe(script.id, cursor)
        refusal = await talk.hear()
        assert (refusal.op, refusal.code, refusal.job) == ("error", "invalid_cursor", script.id)
        assert await talk.is_alive()


# --- several jobs on one connection


async def test_each_job_is_its_own_log(served: Served):
    """A dashboard of many jobs costs one connection, and none is mixed up with another."""
    scripts = [await served.script() for _ in range(10)]

    async def write(script: Script, words: int) -> None:
        await script.open_turn()
        for n in range(words):
            await script.say(f"{script.id} {n}")
        await script.complete()

    async with talking(served) as talk, asyncio.TaskGroup() as group:
        for n, script in enumerate(scripts):
            await talk.subscribe(script.id, "0")
            group.create_task(write(script, 5 * n))
        heard: list[Message] = []
        while ops(heard).count("ended") < len(scripts):
            heard.append(await talk.hear())
    for script in scripts:
        assert rows(heard, script.id) == await script.log()
    assert is_idle(served)


async def test_a_long_replay_does_not_hold_up_the_others(redis: RedisProcess):
    """Who opens a job of a million words still sees the live one beside it."""
    async with (
        serving(redis.url, ring_bytes=1 << 23) as served,
        talking(served) as talk,
        talking(served) as keeper,
    ):
        long, short = await served.script(), await served.script()
        start = (await long.log())[-1][0]
        for script in (long, short):
            await keeper.subscribe(script.id)  # so that all of it is in memory, and nothing else gives turns
            await keeper.until("snapshot", script.id)
        reading = asyncio.create_task(keeper.until("ended", short.id))
        await long.open_turn()
        for _ in range(20):
            await long.say(*["x" * 1000] * 100)
        await long.write(JobProgress(percent=99))
        await short.say("here")
        for script in (long, short):
            last = (await script.log())[-1][0]
            await wait_until(lambda script=script, last=last: shown(served, script) == last)
        await talk.subscribe(long.id, start)
        await talk.subscribe(short.id, "0")
        pieces = [message for message in await talk.until("events", short.id) if message.op == "events"]
        while pieces[-1].rows[-1][1] != "job.progress":
            pieces.append(await talk.hear())
        assert len(pieces) > 50
        assert [message.job for message in pieces].index(short.id) < len(pieces) / 2
        assert rows(pieces, long.id) == (await long.log())[2:]
        for script in (short, long):
            await script.complete()
        await reading


def shown(served: Served, script: Script) -> str:
    """The last event that a watched job's viewers can see."""
    channel = served.gateway.hub.find(script.id)
    assert channel is not None
    return str(channel.ring.top)


async def test_leaving_a_job_frees_it(served: Served):
    script, other = await served.script(), await served.script()
    hub = served.gateway.hub
    async with talking(served) as talk:
        for job in (script.id, other.id):
            await talk.subscribe(job)
            await talk.until("snapshot", job)
        assert (hub.channels, watched(served)) == (2, 2)
        await talk.say("unsubscribe", job=script.id)
        assert (await talk.hear()).op == "unsubscribed"
        assert (hub.channels, watched(served)) == (1, 1)
        await script.open_turn()
        await script.say("unheard")
        await other.complete()
        assert {message.job for message in await talk.until("ended")} == {other.id}
        await wait_until(lambda: served.store.live.channels == 0)
        await talk.subscribe(script.id)
        assert (await talk.until("snapshot"))[-1].json["text"] == "unheard"
    await wait_until(lambda: is_idle(served))
    await script.complete()


async def test_leaving_a_job_that_is_just_being_looked_up(served: Served, monkeypatch: pytest.MonkeyPatch):
    script = await served.script()
    never = asyncio.Event()

    async def stuck(_: str) -> object:
        await never.wait()
        raise AssertionError

    async with talking(served) as talk:
        with monkeypatch.context() as slow:
            slow.setattr(served.gateway.hub, "head", stuck)
            await talk.subscribe(script.id)
            await talk.say("unsubscribe", job=script.id)
            assert (await talk.hear()).op == "unsubscribed"
        assert served.gateway.hub.channels == 0
        await talk.subscribe(script.id)
        assert ops(await talk.until("snapshot")) == ["subscribed", "snapshot"]
    await script.complete()


# --- what cannot be done is said, and the connection goes on


async def test_mistakes_are_answered_by_name(redis: RedisProcess):
    """A client's author sees what was wrong, and its users' other jobs go on."""
    async with (
        serving(redis.url, ws_subscriptions=1, ws_message_rate=1000) as served,
        talking(served) as talk,
    ):
        script = await served.script()
        await talk.subscribe(script.id)
        await talk.until("snapshot")
        job = "j0-" + "a" * 26
        for fields, code in [
            ({"op": "subscribe", "job": script.id}, "already_subscribed"),
            ({"op": "subscribe", "job": job}, "too_many_subscriptions"),
            ({"op": "unsubscribe", "job": job}, "not_subscribed"),
            ({"op": "subscribe", "job": script.id, "afer": "0"}, "invalid"),
            ({"op": "subscribe", "job": 7}, "invalid"),
            ({"op": "shout"}, "invalid"),
            ({"op": []}, "invalid"),
            ({}, "invalid"),
            ({"op": "ping", "data": "x" * 300}, "invalid"),
        ]:
            await talk.connection.send(json.dumps(fields))
            assert (await talk.hear()).code == code, fields
        for text in (
            "",
            "x",
            "[]",
            "null",
            '"subscribe"',
            '{"op":' + "[" * 2000,
            '{"op":"ping","data":"\\ud800"}',
        ):
            await talk.connection.send(text)
            assert (await talk.hear()).code == "bad_request", text
        await talk.say("unsubscribe", job=script.id)
        await talk.until("unsubscribed")
        for fields, field in [
            ({"flush": 1}, "flush"),
            ({"flush": "x"}, "flush"),
            ({"merge": "yes"}, "merge"),
        ]:
            await talk.subscribe(script.id, **fields)
            refusal = await talk.hear()
            assert (refusal.code, refusal.field, refusal.job) == ("invalid", field, script.id)
        for missing in (job, "nonsense", "\u0000", "j0-" + "a" * 3000):
            await talk.subscribe(missing)
            refusal = await talk.hear()
            assert (refusal.code, refusal.status) == ("not_found", 404)
        assert await talk.is_alive()
        await script.complete()


async def test_a_ping_is_answered_with_its_data(served: Served):
    async with talking(served) as talk:
        for data in (None, 1, "\u00e9\u2028", {"at": [1.5, True]}):
            await talk.say("ping", data=data)
            assert (await talk.hear()).json == data


async def test_a_job_that_is_deleted_ends_its_subscription(served: Served):
    script = await served.script()
    async with talking(served) as talk:
        await talk.subscribe(script.id)
        await talk.until("snapshot")
        async with unrestricted(served.store) as client:
            await client.flushall()
            await client.script_flush()
        await served.gateway.hub.check_positions()
        error = await talk.hear()
        assert (error.op, error.code, error.job) == ("error", "not_found", script.id)
        assert watched(served) == 0
        assert await talk.is_alive()


async def test_a_fault_of_ours_is_told_and_logged_and_the_connection_goes_on(
    served: Served, monkeypatch: pytest.MonkeyPatch
):
    script = await served.script()

    async def broken(_: str) -> object:
        raise StreamjobsError("not today")

    async with talking(served) as talk:
        with monkeypatch.context() as fault:
            fault.setattr(served.gateway.hub, "head", broken)
            await talk.subscribe(script.id)
            assert (await talk.hear()).code == "internal"
        await talk.subscribe(script.id)
        await talk.until("snapshot")
    await script.complete()


# --- who may send what


@pytest.mark.parametrize(
    ("sent", "code"),
    [(b"{}", 1003), ("x" * 5000, 1009), ([b"\xff\xfe"], 1007), (["a" * 3000, "b" * 3000], 1009)],
    ids=["binary", "large", "no text", "large in parts"],
)
async def test_what_is_no_message_closes_the_connection(served: Served, sent: Any, code: int):
    """And says why; a client that goes on would only guess."""
    async with talking(served) as talk:
        if sent == [b"\xff\xfe"]:
            await talk.connection.send(sent[0], text=True)
        else:
            await talk.connection.send(sent)
        assert (await talk.end())[0] == code
    assert await talk_anew(served)


async def talk_anew(served: Served) -> bool:
    async with talking(served) as talk:
        return await talk.is_alive()


async def test_a_message_in_parts_is_one(served: Served):
    async with talking(served) as talk:
        await talk.connection.send(['{"op":', '"pi', 'ng"', "", "}"])
        assert (await talk.hear()).op == "pong"


@pytest.mark.parametrize("what", ["messages", "pings", "empty parts"])
async def test_a_flood_is_cut_off(redis: RedisProcess, what: str):
    """One client in an endless loop must not cost the others their gateway."""
    async with serving(redis.url, ws_message_rate=5, ws_subscriptions=5) as served, talking(served) as talk:
        script = await served.script()
        await talk.subscribe(script.id)
        await talk.until("snapshot")
        before = metric("streams_closed_total", why="flood")
        await flood(talk, what)
        assert await talk.end() == (1008, "too many messages")
        assert metric("streams_closed_total", why="flood") == before + 1
        await wait_until(lambda: is_idle(served))
        await script.complete()


async def flood(talk: Talk, what: str) -> None:
    protocol, transport = talk.connection.protocol, talk.connection.transport
    for n in range(200):
        if what == "messages":
            protocol.send_text(b'{"op":"ping"}')
        elif what == "pings":
            protocol.send_ping(b"%d" % n)
        elif n:
            protocol.send_continuation(b"", fin=False)
        else:
            protocol.send_text(b"", fin=False)
    transport.write(b"".join(protocol.data_to_send()))


async def test_a_connection_that_nobody_uses_is_closed(redis: RedisProcess):
    async with serving(redis.url, ws_idle_timeout=2.0) as served, talking(served) as talk:
        script = await served.script()
        assert await talk.is_alive()
        await talk.subscribe(script.id)
        await talk.until("snapshot")
        async with talking(served) as other:
            assert await other.end() == (1000, "idle")
        await script.complete()
        await talk.until("ended")
        assert await talk.end() == (1000, "idle")


# --- signs of life


async def test_a_peer_that_does_not_answer_pings_is_gone(redis: RedisProcess):
    """A telephone that lost its network says nothing; its subscriptions must not stay."""
    async with serving(redis.url, heartbeat_interval=0.1, ws_pong_timeout=0.3) as served:
        script = await served.script()
        _, writer = await silent_peer(served, {"op": "subscribe", "job": script.id})
        await wait_until(lambda: watched(served) == 1)
        await wait_until(lambda: is_idle(served))
        writer.close()
        await script.complete()


async def test_a_peer_that_answers_pings_stays(redis: RedisProcess):
    """Longer than it may take to send a request's head."""
    async with serving(redis.url, head_timeout=1.5, heartbeat_interval=0.05, ws_pong_timeout=5.0) as served:
        script = await served.script()
        async with talking(served) as talk:
            await talk.subscribe(script.id)
            await talk.until("snapshot")
            pings = heard_pings(talk)
            began = asyncio.get_running_loop().time()
            await wait_until(lambda: len(pings) > 10 and asyncio.get_running_loop().time() - began > 2.0)
            await script.complete()
            await talk.until("ended")


def heard_pings(talk: Talk) -> list[bytes]:
    """Pings as they come."""
    pings: list[bytes] = []
    received = talk.connection.protocol.recv_frame

    def counted(frame: Any) -> None:
        if frame.opcode == websocket.Opcode.PING:
            pings.append(bytes(frame.data))
        received(frame)

    talk.connection.protocol.recv_frame = counted
    return pings


async def silent_peer(served: Served, *said: object) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Someone who says these things after the handshake, and then neither reads nor answers."""
    host, port = served.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=2048)
    writer.write(handshake())
    assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
    for message in said:
        writer.write(masked(json.dumps(message).encode()))
    return reader, writer


def handshake(key: bytes = b"dGhlIHNhbXBsZSBub25jZQ==", version: bytes = b"13") -> bytes:
    return (
        b"GET /v1/ws HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: keep-alive, Upgrade\r\n"
        b"Sec-WebSocket-Key: %b\r\nSec-WebSocket-Version: %b\r\n\r\n" % (key, version)
    )


def masked(text: bytes) -> bytes:
    """A client's frame, under a mask that changes nothing."""
    assert len(text) < 126
    return bytes((0x81, 0x80 | len(text), 0, 0, 0, 0)) + text


# --- slow clients


async def test_clients_that_do_not_read_hold_little_and_are_closed(redis: RedisProcess):
    """What they were to get is in the log: neither memory nor a socket is theirs for ever."""
    async with serving(redis.url, send_timeout=1.0, send_buffer=4096, ring_bytes=8192) as served:
        script = await served.script()
        await script.open_turn()
        for _ in range(10):
            await script.say(*["x" * 1000] * 200)
        before = metric("streams_closed_total", why="slow")
        stalled = [
            await silent_peer(served, {"op": "subscribe", "job": script.id, "after": "0"}) for _ in range(20)
        ]
        sockets = list(served.gateway.hub._streams)
        assert len(sockets) == 20
        held: list[int] = []
        while not is_idle(served):
            await script.say("more " * 1000)  # which is one more reason to look, each time
            held.append(max(map(waiting_in, sockets)))
        assert 0 < max(held) < 2 * CHUNK_BYTES
        assert metric("streams_closed_total", why="slow") == before + 20
        for _, writer in stalled:
            writer.close()
        await script.complete()
        async with talking(served) as talk:
            assert rows(await talk.transcript(script.id, "0")) == await script.log()


async def test_answers_do_not_pile_up_for_who_does_not_read(redis: RedisProcess):
    """They cost their sender, not us."""
    async with serving(redis.url, send_timeout=0.5, send_buffer=4096, ws_message_rate=1 << 30) as served:
        _, writer = await silent_peer(served)
        (stream,) = served.gateway.hub._streams
        said = masked(json.dumps({"op": "ping", "data": "y" * 90}).encode())
        held: list[int] = []
        while not is_idle(served):
            await shout(writer, said)
            held.append(len(stream._answers) * 100 + waiting_in(stream))  # type: ignore[attr-defined]
        assert 0 < max(held) < 1 << 17
        writer.close()


async def test_pongs_do_not_pile_up_for_who_does_not_read(redis: RedisProcess):
    """Only the newest one is owed."""
    async with serving(redis.url, send_buffer=4096, ws_message_rate=1 << 30) as served:
        _, writer = await silent_peer(served)
        (stream,) = served.gateway.hub._streams
        held: list[int] = []
        while len(held) < 60 or not max(held):
            await shout(writer, b"\x89\xe4\0\0\0\0" + b"z" * 100)
            held.append(waiting_in(stream))
        assert 0 < max(held) < 1 << 14
        writer.transport.abort()


async def shout(writer: asyncio.StreamWriter, said: bytes) -> None:
    """Say something many times, unless what was said before is not out yet."""
    if writer.transport.get_write_buffer_size() < 1 << 18 and not writer.is_closing():
        writer.write(said * 500)
    await asyncio.sleep(0.001)


def waiting_in(stream: Any) -> int:
    """Bytes that wait for a connection's socket."""
    size: int = stream._wire._transport.get_write_buffer_size()
    return size


# --- the end of a connection that is not its jobs'


async def test_an_old_connection_is_handed_over(redis: RedisProcess):
    async with serving(redis.url, max_connection_age=0.3) as served:
        script = await served.script()
        async with talking(served) as talk:
            await talk.subscribe(script.id)
            *_, snapshot, handover = await talk.until("handover")
            assert (handover.reason, await talk.end()) == ("age", (1001, "old"))
            assert 500 <= handover.retry <= 5000
        await script.complete()
        async with talking(served) as talk:
            assert rows(await talk.transcript(script.id, snapshot.id)) == (await script.log())[-1:]


async def test_a_drain_hands_every_connection_over(served: Served):
    """At different moments, so that they do not all come to the next gateway in the same instant."""
    script = await served.script()
    loop = asyncio.get_running_loop()
    ends: list[float] = []

    async def view() -> tuple[list[Message], tuple[int, str]]:
        async with talking(served) as talk:
            await talk.subscribe(script.id)
            heard, end = await talk.until("handover"), await talk.end()
            ends.append(loop.time())
            return heard, end

    viewing = [asyncio.create_task(view()) for _ in range(20)]
    await wait_until(lambda: watched(served) == 20)
    await served.gateway.drain(1.0)
    for task in viewing:
        heard, end = await task
        assert (heard[-1].reason, end) == ("drain", (1012, "restarting"))
    assert max(ends) - min(ends) > 0.3
    assert is_idle(served)
    async with talking(served) as late:
        assert (await late.hear()).op == "handover"
    await script.complete()


async def test_a_drain_in_the_middle_of_a_replay_loses_nothing(redis: RedisProcess):
    async with serving(redis.url, send_buffer=4096) as served:
        script = await served.script()
        await script.open_turn()
        for _ in range(10):
            await script.say(*["x" * 1000] * 200)
        await script.complete()
        log = await script.log()
        async with talking(served) as talk:
            await talk.subscribe(script.id, "0")
            first = await talk.until("events")
            draining = asyncio.create_task(served.gateway.drain(0.0))
            heard = [*first, *await talk.until("handover")]
            await draining
        seen = rows(heard)
        assert seen == log[: len(seen)]
        assert len(seen) < len(log)


# --- Redis in trouble


async def test_transcripts_are_exact_while_subscriptions_are_killed(redis: RedisProcess):
    async with (
        serving(redis.url, flush_interval=0.02, position_interval=600.0) as served,
        talking(served) as talk,
    ):
        scripts = [await served.script() for _ in range(4)]
        for script in scripts:
            await talk.subscribe(script.id, "0")

        async def write(script: Script) -> None:
            await script.open_turn()
            for n in range(100):
                await script.say(f"{n} ", "and ")
            await script.complete()

        async def cut() -> None:
            with redis.client() as client:
                for _ in range(4):
                    heard.extend(await talk.until("events"))
                    client.client_kill_filter(_type="pubsub")

        heard: list[Message] = []
        async with asyncio.TaskGroup() as group:
            group.create_task(cut())
            for script in scripts:
                group.create_task(write(script))
        while ops(heard).count("ended") < len(scripts):
            heard.append(await talk.hear())
        for script in scripts:
            assert rows(heard, script.id) == await script.log()


async def test_a_subscription_stands_while_redis_is_away(own_redis: RedisProcess):
    """And is told when the job turns out not to exist."""
    async with serving(own_redis.url, redis_timeout=1.0) as served, talking(served) as talk:
        script = await served.script()
        missing = "j0-" + "a" * 26
        own_redis.kill()
        for job in (script.id, missing):
            await talk.subscribe(job, "0")
            assert ops(await talk.until("subscribed", job))
        assert await talk.is_alive()
        own_redis.start()
        heard = [await talk.hear(), await talk.hear()]
        assert {(message.job, message.op, message.code) for message in heard} == {
            (script.id, "events", ""),
            (missing, "error", "not_found"),
        }
        assert rows(heard) == await script.log()


# --- connections come and go


async def test_handshakes_that_are_none_are_answered(served: Served):
    """A person with curl, and a client of an older draft, are told what is meant."""
    for request, status in [
        (handshake(version=b"8"), b"426"),
        (handshake(key=b"x"), b"426"),
        (b"GET /v1/ws HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", b"426"),
        (handshake().replace(b"GET", b"POST"), b"405"),
        (handshake().replace(b"HTTP/1.1", b"HTTP/1.0"), b"426"),
        (handshake().replace(b"/v1/ws", b"/v1/jobs"), b"403"),
    ]:
        host, port = served.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(request)
        assert (await reader.readline()).split()[1] == status, request
        writer.close()


async def test_nothing_is_compressed_and_routes_are_counted(served: Served):
    """A compressor for each connection would cost more memory than everything else about it."""
    opened = metric("http_requests_total", route="/v1/ws", status="101")
    async with talking(served, compression="deflate") as talk:
        assert talk.connection.protocol.extensions == []
        assert metric("websockets") == 1
    assert metric("http_requests_total", route="/v1/ws", status="101") == opened + 1
    refused = metric("http_requests_total", route="none", status="403")
    with pytest.raises(InvalidStatus):
        await connect(served.url.replace("http", "ws") + "/v1/nothing")
    assert metric("http_requests_total", route="none", status="403") == refused + 1


async def test_quick_connections_leave_nothing(redis: RedisProcess):
    """Neither tasks nor channels nor memory, however they leave."""
    async with serving(redis.url, owner_limit=0) as served:
        scripts = [await served.script() for _ in range(5)]
        async with talking(served) as talk:
            await talk.subscribe(scripts[0].id)
            await talk.until("snapshot")
        await wait_until(lambda: is_idle(served) and served.store.live.channels == 0)
        tasks = len(asyncio.all_tasks())

        async def visit(n: int) -> None:
            reader, writer = await silent_peer(served, *visits(n, scripts))
            if n % 3:
                await reader.readuntil(b"}")
            if n % 2:
                writer.transport.abort()
            else:
                writer.write(b"\x88\x80\0\0\0\0")
                writer.close()

        for start in range(0, 1000, 50):
            async with asyncio.TaskGroup() as group:
                for n in range(start, start + 50):
                    group.create_task(visit(n))
        await wait_until(lambda: is_idle(served))
        await wait_until(lambda: served.store.live.channels == 0 and len(asyncio.all_tasks()) <= tasks)
        assert metric("websockets") == 0
        with redis.client() as client:
            await wait_until(lambda: client.pubsub_channels() == [])


def visits(n: int, scripts: list[Script]) -> list[dict[str, str]]:
    """What a visitor says: one or two subscriptions, to what is there and what is not."""
    script = scripts[n % len(scripts)]
    first = {"op": "subscribe", "job": script.id if n % 7 else "none"}
    return [first] if n % 4 else [first, {"op": "subscribe", "job": scripts[(n + 1) % 5].id, "after": "0"}]
