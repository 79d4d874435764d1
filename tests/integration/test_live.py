"""Live delivery: no event missed without a word, whatever happens to the connection, and nothing left
behind."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest

from streamjobs.errors import StoreUnavailable
from streamjobs.store import Entry, Store, Submission, keys, live
from tests import acl
from tests.conftest import RedisProcess, fast_settings, wait_until


class Heard:
    """A listener that keeps what it was told."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.gaps = 0

    def on_entries(self, entries: list[Entry]) -> None:
        self.entries += entries

    def on_gap(self) -> None:
        self.gaps += 1

    @property
    def signals(self) -> int:
        return sum(entry.type == "signal.received" for entry in self.entries)


async def submit(store: Store) -> str:
    return (await store.jobs.submit(Submission(kind="noop"))).job_id


def subscribed(server: RedisProcess) -> set[str]:
    with server.client() as client:
        return {name.decode() for name in client.pubsub_channels("*live*")}


def receivers(server: RedisProcess, job_id: str) -> int:
    with server.client() as client:
        return dict(client.pubsub_numsub(keys.live_channel(job_id)))[keys.live_channel(job_id).encode()]


def kill_subscribers(server: RedisProcess) -> int:
    with server.client() as client:
        return client.client_kill_filter(_type="pubsub")


def live_tasks() -> list[str]:
    return [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("live")]


async def test_what_is_written_is_heard(redis: RedisProcess, store: Store):
    """Viewers would see nothing until the next position check."""
    job_id, heard = await submit(store), Heard()
    await store.live.subscribe(job_id, heard)
    await store.jobs.signal(job_id, "hello", {"text": "a\nb \u2028"})
    await wait_until(lambda: heard.entries)
    page = await store.log.page(job_id)
    assert heard.entries == page.entries[1:]
    assert heard.gaps == 0


async def test_a_subscription_is_confirmed_before_it_is_relied_on(redis: RedisProcess, store: Store):
    """Whoever reads the log right after subscribing would miss what was written in between, and never
    know."""
    for _ in range(50):
        job_id, heard = await submit(store), Heard()
        await store.live.subscribe(job_id, heard)
        assert receivers(redis, job_id) == 1
        await store.live.unsubscribe(job_id, heard)


async def test_listeners_of_one_job_share_a_subscription(redis: RedisProcess, store: Store):
    """The first viewer who leaves would take the others' events along."""
    job_id, first, second = await submit(store), Heard(), Heard()
    await asyncio.gather(store.live.subscribe(job_id, first), store.live.subscribe(job_id, second))
    assert (receivers(redis, job_id), store.live.channels) == (1, 1)
    await store.live.unsubscribe(job_id, first)
    await store.live.unsubscribe(job_id, first)
    await store.jobs.signal(job_id, "hello")
    await wait_until(lambda: second.signals)
    assert first.signals == 0
    await store.live.unsubscribe(job_id, second)
    await wait_until(lambda: not subscribed(redis))


async def test_a_thousand_cycles_leave_nothing(redis: RedisProcess, settings: Any):
    """A gateway that has run for a month would be subscribed to every job it ever showed."""
    store = await Store.open(settings)
    before = set(asyncio.all_tasks())
    jobs = [await submit(store) for _ in range(20)]

    async def come_and_go(job_id: str) -> None:
        heard = Heard()
        await store.live.subscribe(job_id, heard)
        await store.live.unsubscribe(job_id, heard)

    for _ in range(10):
        await asyncio.gather(*(come_and_go(job_id) for job_id in jobs for _ in range(5)))
    await wait_until(lambda: not subscribed(redis))
    assert store.live.channels == 0
    await store.aclose()
    assert set(asyncio.all_tasks()) - before == set()
    assert live_tasks() == []


async def test_leaving_and_coming_back_at_once(redis: RedisProcess, store: Store):
    """The last viewer's UNSUBSCRIBE would overtake the next one's SUBSCRIBE: it hears nothing, and is
    told all is well."""
    job_id = await submit(store)
    for _ in range(200):
        first, second = Heard(), Heard()
        await store.live.subscribe(job_id, first)
        if random.random() < 0.5:
            await asyncio.sleep(0)
        leaving = asyncio.create_task(store.live.unsubscribe(job_id, first))
        coming = asyncio.create_task(store.live.subscribe(job_id, second))
        await asyncio.gather(leaving, coming)
        assert receivers(redis, job_id) == 1
        await store.live.unsubscribe(job_id, second)
    await wait_until(lambda: not subscribed(redis))


class SlowRedis:
    """A connection whose answers a test gives, when it likes."""

    def __init__(self) -> None:
        self.is_connected = False
        self.sent: list[str] = []
        self.answers: asyncio.Queue[list[bytes | int]] = asyncio.Queue()
        self.connection_pool = self

    def make_connection(self) -> SlowRedis:
        return self

    async def connect(self) -> None:
        self.is_connected = True

    async def disconnect(self, *, nowait: bool) -> None:
        self.is_connected = False

    async def send_command(self, command: str, *channels: str) -> None:
        self.sent += [f"{command} {channel}" for channel in channels]

    async def read_response(self, *, timeout: float) -> list[bytes | int]:
        return await self.answers.get()

    async def answer(self, kind: str, channel: str) -> None:
        """Answer, and let everybody who waited for it go on."""
        self.answers.put_nowait([kind.encode(), channel.encode(), 1])
        for _ in range(10):
            await asyncio.sleep(0)


async def test_an_old_confirmation_does_not_speak_for_a_new_subscription():
    """SUBSCRIBE, UNSUBSCRIBE, SUBSCRIBE are under way: the first answer is no promise for what the third
    one asks."""
    slow = SlowRedis()
    watching: Any = live.Live(slow)  # pyright: ignore[reportArgumentType]
    job_id = keys.new_job_id(0)
    name = keys.live_channel(job_id)
    gone, back = Heard(), Heard()
    first = asyncio.create_task(watching.subscribe(job_id, gone))
    await wait_until(lambda: slow.sent == [f"SUBSCRIBE {name}"])
    await watching.unsubscribe(job_id, gone)
    await wait_until(lambda: slow.sent[1:] == [f"UNSUBSCRIBE {name}"])
    second = asyncio.create_task(watching.subscribe(job_id, back))
    await wait_until(lambda: slow.sent[2:] == [f"SUBSCRIBE {name}"])
    await first
    await slow.answer("subscribe", name)
    assert not second.done()
    await slow.answer("unsubscribe", name)
    assert not second.done()
    await slow.answer("subscribe", name)
    assert second.done()
    assert back.gaps == 0
    await watching.aclose()


async def test_a_subscription_that_still_stands_is_used_again():
    """Each reload of a page would cost Redis an UNSUBSCRIBE and a SUBSCRIBE, and its viewer a round trip."""
    slow = SlowRedis()
    watching: Any = live.Live(slow)  # pyright: ignore[reportArgumentType]
    job_id = keys.new_job_id(0)
    first = asyncio.create_task(watching.subscribe(job_id, old := Heard()))
    await wait_until(lambda: slow.sent)
    await slow.answer("subscribe", keys.live_channel(job_id))
    await first
    await watching.unsubscribe(job_id, old)
    await watching.subscribe(job_id, new := Heard())
    await slow.answer("pong", "")
    assert len(slow.sent) == 1
    assert new.gaps == 0
    await watching.aclose()


async def test_a_cancelled_subscription_leaves_no_listener(redis: RedisProcess, store: Store):
    """A request that was dropped while Redis was slow would be subscribed for ever."""
    job_id = await submit(store)
    waiting = asyncio.create_task(store.live.subscribe(job_id, Heard()))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert store.live.channels == 0
    heard = Heard()
    await store.live.subscribe(job_id, heard)
    await store.jobs.signal(job_id, "x")
    await wait_until(lambda: heard.signals)


async def test_a_killed_connection_is_made_again_and_told(redis: RedisProcess, store: Store):
    """Redis closes subscribers that are too slow: what was published meanwhile is gone, and listeners
    must read on."""
    jobs = [await submit(store) for _ in range(5)]
    listeners = [Heard() for _ in jobs]
    for job_id, heard in zip(jobs, listeners, strict=True):
        await store.live.subscribe(job_id, heard)
    for round_number in range(1, 4):
        assert kill_subscribers(redis) == 1
        await wait_until(lambda n=round_number: all(heard.gaps == n for heard in listeners))
    await store.jobs.signal(jobs[3], "x")
    await wait_until(lambda: listeners[3].signals)
    assert subscribed(redis) == {keys.live_channel(job_id) for job_id in jobs}
    assert store.live.connections == 4


async def test_changes_while_the_connection_is_away_are_not_lost(redis: RedisProcess, store: Store):
    """Who came during the gap would hear nothing, and who left would be subscribed again."""
    leaving, coming = await submit(store), await submit(store)
    old, new = Heard(), Heard()
    await store.live.subscribe(leaving, old)
    kill_subscribers(redis)
    await wait_until(lambda: not store.live.connected)
    await store.live.unsubscribe(leaving, old)
    await store.live.subscribe(coming, new)
    assert subscribed(redis) == {keys.live_channel(coming)}
    assert (old.gaps, new.gaps) == (0, 0)


async def test_connections_dying_while_viewers_come_and_go(redis: RedisProcess, store: Store):
    """Each of these happens alone in the tests above; in a night of trouble they happen together."""
    jobs = [await submit(store) for _ in range(10)]

    async def viewer(job_id: str) -> None:
        for _ in range(15):
            heard = Heard()
            with contextlib.suppress(StoreUnavailable):
                await store.live.subscribe(job_id, heard)
            await store.live.unsubscribe(job_id, heard)

    is_over = asyncio.Event()

    async def trouble() -> None:
        while not is_over.is_set():
            await asyncio.to_thread(kill_subscribers, redis)
            await asyncio.sleep(0.02)

    killing = asyncio.create_task(trouble())
    await asyncio.gather(*(viewer(job_id) for job_id in jobs for _ in range(2)))
    is_over.set()
    await killing  # its last blow has fallen
    heard = Heard()
    await store.live.subscribe(jobs[0], heard)
    await store.jobs.signal(jobs[0], "x")
    await wait_until(lambda: heard.signals)
    await wait_until(lambda: subscribed(redis) == {keys.live_channel(jobs[0])})
    assert store.live.channels == 1


async def test_a_restarted_redis_is_found_again(own_redis: RedisProcess):
    """Every open stream would stay silent after an update of Redis."""
    store = await Store.open(fast_settings(own_redis.url))
    job_id, heard = await submit(store), Heard()
    await store.live.subscribe(job_id, heard)
    own_redis.kill(signal.SIGTERM)
    await wait_until(lambda: not store.live.connected)
    own_redis.start()
    await wait_until(lambda: heard.gaps)
    await store.jobs.signal(job_id, "x")
    await wait_until(lambda: heard.signals)
    await store.aclose()


async def test_a_redis_that_is_away_is_an_error_in_time(
    own_redis: RedisProcess, monkeypatch: pytest.MonkeyPatch
):
    """A request would hang as long as Redis does; and once it is back, the listener must hear of it."""
    monkeypatch.setattr(live, "CONFIRM_TIMEOUT", 0.2)
    store = await Store.open(fast_settings(own_redis.url))
    job_id, heard = await submit(store), Heard()
    own_redis.kill(signal.SIGTERM)
    with pytest.raises(StoreUnavailable, match="does not confirm"):
        await store.live.subscribe(job_id, heard)
    own_redis.start()
    await wait_until(lambda: heard.gaps)
    await store.jobs.signal(job_id, "x")
    await wait_until(lambda: heard.signals)
    await store.aclose()


# --- closing


async def test_closing_leaves_no_task_and_no_connection(redis: RedisProcess, settings: Any):
    """A gateway that reloads, and every test, would leave sockets behind."""
    store = await Store.open(settings)
    await store.live.subscribe(await submit(store), Heard())
    await store.live.aclose()
    assert live_tasks() == []
    await store.aclose()
    await wait_until(lambda: not subscribed(redis))
    with pytest.raises(StoreUnavailable):
        await store.live.subscribe(keys.new_job_id(0), Heard())
    assert live_tasks() == []
    await store.live.aclose()


async def test_closing_frees_who_waits(own_redis: RedisProcess):
    """A shutdown would wait out every timeout."""
    store = await Store.open(fast_settings(own_redis.url))
    job_id = await submit(store)
    own_redis.kill(signal.SIGTERM)
    waiting = asyncio.create_task(store.live.subscribe(job_id, Heard()))
    await asyncio.sleep(0)
    await store.aclose()
    async with asyncio.timeout(20):
        with pytest.raises(StoreUnavailable):
            await waiting


# --- links that die without a word


class Proxy:
    """A TCP proxy that can be told to swallow everything, as a link does whose other end is gone."""

    def __init__(self, port: int) -> None:
        self.swallows = False
        self.connections = 0
        self._target = port
        self._tasks: set[asyncio.Task[Any]] = set()

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        try:
            yield f"redis://{acl.USER}:{acl.PASSWORD}@127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        there, back = await asyncio.open_connection("127.0.0.1", self._target)
        try:
            await asyncio.gather(self._pump(reader, back), self._pump(there, writer), return_exceptions=True)
        finally:
            for one in (writer, back):
                one.close()
            self._tasks.discard(task)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            if not self.swallows:
                writer.write(data)
                await writer.drain()
        writer.close()


@pytest.fixture
async def proxied(redis: RedisProcess, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Proxy, Store]]:
    monkeypatch.setattr(live, "WATCHDOG", 1.0)
    proxy = Proxy(redis.port)
    async with proxy.serving() as url:
        store = await Store.open(fast_settings(url))
        yield proxy, store
        await store.aclose()
        assert live_tasks() == []


async def test_a_link_that_died_without_a_word_is_noticed(proxied: tuple[Proxy, Store]):
    """TCP says nothing for a quarter of an hour; every viewer of this gateway would stare at a standing
    answer."""
    proxy, store = proxied
    job_id, heard = await submit(store), Heard()
    await store.live.subscribe(job_id, heard)
    assert store.live.connections == 1
    proxy.swallows = True
    loop = asyncio.get_running_loop()
    began = loop.time()
    await wait_until(lambda: not store.live.connected)
    assert loop.time() - began < 20 * live.WATCHDOG
    proxy.swallows = False
    await wait_until(lambda: heard.gaps)
    assert loop.time() - began < 40 * live.WATCHDOG
    await store.jobs.signal(job_id, "x")
    await wait_until(lambda: heard.signals)


async def test_a_link_that_is_dead_from_the_beginning_is_noticed(proxied: tuple[Proxy, Store]):
    """The handshake waits for an answer too: the process would never be live again."""
    proxy, store = proxied
    job_id, heard = await submit(store), Heard()
    proxy.swallows = True
    connections = proxy.connections
    waiting = asyncio.create_task(store.live.subscribe(job_id, heard))
    await wait_until(lambda: proxy.connections >= connections + 2)
    proxy.swallows = False
    await waiting
    assert heard.gaps == 0


async def test_a_quiet_link_is_left_alone(proxied: tuple[Proxy, Store]):
    """Whenever nothing happens for a few seconds all viewers would read their logs again."""
    _, store = proxied
    job_id, heard = await submit(store), Heard()
    await store.live.subscribe(job_id, heard)
    pings = 0
    send = live._send  # pyright: ignore[reportPrivateUsage]

    async def count(connection: Any, *command: str) -> None:
        nonlocal pings
        pings += command == ("PING",)
        await send(connection, *command)

    live._send = count  # pyright: ignore[reportPrivateUsage]
    try:
        await wait_until(lambda: pings >= 3)
    finally:
        live._send = send  # pyright: ignore[reportPrivateUsage]
    assert (store.live.connections, heard.gaps) == (1, 0)


# --- what listeners and publishers may do


async def test_a_listener_that_fails_takes_nobody_with_it(redis: RedisProcess, store: Store):
    """One bug in one viewer would end live delivery for the whole process."""
    job_id, heard = await submit(store), Heard()

    class Broken(Heard):
        def on_entries(self, entries: list[Entry]) -> None:
            raise RuntimeError("a bug")

    await store.live.subscribe(job_id, Broken())
    await store.live.subscribe(job_id, heard)
    await store.jobs.signal(job_id, "x")
    await wait_until(lambda: heard.signals)
    assert (store.live.connections, heard.gaps) == (1, 0)


async def test_a_foreign_message_is_passed_over(redis: RedisProcess, store: Store):
    """Anybody who may publish could stop live delivery with one message."""
    job_id, heard = await submit(store), Heard()
    await store.live.subscribe(job_id, heard)
    with redis.client() as client:
        for nonsense in (b"", b"x", b"1 2 3", b"\xff\xfe", b"1-1 \xff {}"):
            client.publish(keys.live_channel(job_id), nonsense)
    await store.jobs.signal(job_id, "x")
    await wait_until(lambda: heard.signals)
    assert store.live.connections == 1


async def test_hints_name_jobs_that_something_came_in_for(redis: RedisProcess, store: Store):
    """A worker would hear of a cancel only with its next append or renewal."""
    named: list[str] = []
    await store.live.on_inbox(store.partitions, named.append)
    await wait_until(lambda: store.live.connected and not store.live._unanswered)  # pyright: ignore[reportPrivateUsage]
    await wait_until(lambda: "sj:{0}:inbox" in store.live._told)  # pyright: ignore[reportPrivateUsage]
    job_id = await submit(store)
    await store.work.take(0, "w1", 1, 1, ["default"])
    await wait_until(lambda: not store.live._unanswered)  # pyright: ignore[reportPrivateUsage]
    await store.jobs.cancel(job_id)
    await wait_until(lambda: named == [job_id])
