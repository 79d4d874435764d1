"""Delivery to webhooks and mailboxes: at least once, in the end, to a receiver that checks signatures."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import standardwebhooks
from aiosmtpd.smtp import SMTP
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router

from streamjobs.config import Settings
from streamjobs.gateway.app import url_of
from streamjobs.gateway.server import Server, listen
from streamjobs.outgoing import Answer
from streamjobs.projections.delivery import DELAYS, Deliverer, delay_after, judged
from streamjobs.projections.mail import Mail, message_of
from streamjobs.projections.notify import NotifyProjection
from streamjobs.store import Claimed, Store, Submission
from streamjobs.store.deliveries import TRIES
from streamjobs.webhook import Webhook
from tests.conftest import RedisProcess, fast_settings, unrestricted, wait_until

HTTP = {"webhook_http": True, "webhook_allow": ("127.0.0.1",), "webhook_timeout": 20.0}


class Receiver:
    """What a user runs: it answers what it is told to, and keeps what came."""

    def __init__(self) -> None:
        self.url = ""
        self.answers: list[int] = []
        self.got: list[tuple[dict[str, str], bytes]] = []

    async def take(self, request: Request) -> Response:
        self.got.append((dict(request.headers), await request.body()))
        return Response(status_code=self.answers.pop(0) if self.answers else 204)

    @property
    def ids(self) -> list[str]:
        return [headers["webhook-id"] for headers, _ in self.got]


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    made = Receiver()
    listener = listen(Settings(), 0)
    server = Server(Router([Route("/hook", made.take, methods=["POST"])]), Settings())
    task = asyncio.create_task(server.serve([listener]))
    made.url = f"{url_of(listener)}/hook"
    yield made
    server.should_exit = True
    await task


@pytest.fixture
async def store(redis: RedisProcess) -> AsyncIterator[Store]:
    opened = await Store.open(fast_settings(redis.url, **HTTP))
    yield opened
    await opened.aclose()


async def hooked(store: Store, url: str, **fields: Any) -> tuple[str, str]:
    record, secret = await store.webhooks.create("anonymous", Webhook(url=url, **fields))
    return record.id, secret


async def ended(store: Store, count: int = 1) -> list[str]:
    """Jobs that have ended, and of which the projection has told."""
    jobs = []
    for _ in range(count):
        jobs.append((await store.jobs.submit(Submission(kind="chat"))).job_id)
        await store.jobs.cancel(jobs[-1])
        await NotifyProjection(store).advance(jobs[-1])
    return jobs


async def make_due(store: Store) -> None:
    """As if every delay and every lease had passed."""
    for raw in await store.client.zrange("sj:{0}:deliveries", 0, -1):
        await store.client.zadd("sj:{0}:deliveries", {raw: 1})


async def waiting(store: Store) -> int:
    return await store.client.zcard("sj:{0}:deliveries")


async def test_what_comes_verifies_and_says_what_happened(store: Store, receiver: Receiver):
    """A receiver could not tell us from a stranger."""
    _, secret = await hooked(store, receiver.url)
    (job_id,) = await ended(store)
    await Deliverer(store).tick()
    ((headers, body),) = receiver.got
    said = standardwebhooks.Webhook(secret).verify(body, headers)
    assert (said["type"], said["data"]["id"]) == ("job.cancelled", job_id)
    assert headers["content-type"] == "application/json"
    assert await waiting(store) == 0
    async with unrestricted(store) as client:
        assert await client.keys("sj:*:delivery:*") == []


async def test_a_refusal_is_tried_again_under_the_same_id(store: Store, receiver: Receiver):
    """A receiver that restarts would miss what happened; one that was too slow would count it twice."""
    _, secret = await hooked(store, receiver.url)
    await ended(store)
    receiver.answers = [500, 302, 429, 204]
    deliverer = Deliverer(store)
    for _ in range(4):
        await deliverer.tick()
        await deliverer.tick()  # nothing is due before its delay
        await make_due(store)
    assert len(receiver.got) == 4
    assert len(set(receiver.ids)) == 1
    for headers, body in receiver.got:
        standardwebhooks.Webhook(secret).verify(body, headers)
    assert await waiting(store) == 0


async def test_what_is_never_taken_is_listed_and_can_be_sent_again(store: Store, receiver: Receiver):
    """After a day's outage of the receiver nobody would know what it missed."""
    webhook_id, _ = await hooked(store, receiver.url)
    (job_id,) = await ended(store)
    receiver.answers = [500] * TRIES
    deliverer = Deliverer(store)
    for _ in range(TRIES + 2):
        await deliverer.tick()
        await make_due(store)
    assert len(receiver.got) == TRIES
    (lost,) = await store.deliveries.undelivered("anonymous", webhook_id)
    assert (lost.job, lost.tried, lost.error) == (job_id, TRIES, "answered 500")
    assert await store.deliveries.undelivered("bob", webhook_id) == [lost]  # routes look the owner up first
    assert await store.deliveries.rerun("bob", webhook_id, ["msg_none"]) == 0
    receiver.answers = [500, 204]
    assert await store.deliveries.rerun("anonymous", webhook_id, [lost.id, "msg_none"]) == 1
    for _ in range(3):
        await deliverer.tick()
        await make_due(store)
    assert receiver.ids == [lost.id] * (TRIES + 2)
    assert await store.deliveries.undelivered("anonymous", webhook_id) == []


async def test_gone_is_gone(store: Store, receiver: Receiver):
    """A receiver that was taken down for good would be knocked at for ever; what it missed would be lost."""
    webhook_id, _ = await hooked(store, receiver.url)
    await ended(store, 2)
    receiver.answers = [410]
    deliverer = Deliverer(store)
    (first,) = (await store.deliveries.claim(0, 1)).claimed
    assert await store.deliveries.settle(first, "gone", why="answered 410")
    record = await store.webhooks.get("anonymous", webhook_id)
    assert record.is_disabled
    assert record.disabled_why == "answered 410"
    await deliverer.tick()
    assert receiver.got == []
    lost = await store.deliveries.undelivered("anonymous", webhook_id)
    assert sorted(one.error for one in lost) == ["answered 410", "the webhook is disabled"]
    assert judged(410).verdict == "gone"
    await ended(store)  # nothing is filed while it is disabled
    assert await waiting(store) == 0
    await store.webhooks.enable("anonymous", webhook_id)
    receiver.answers = []
    assert await store.deliveries.rerun("anonymous", webhook_id, [one.id for one in lost]) == 2
    await deliverer.tick()
    assert sorted(receiver.ids) == sorted(one.id for one in lost)


async def test_after_a_rotation_the_secret_before_stays_good_for_a_while(
    redis: RedisProcess, receiver: Receiver
):
    """Until the receiver knows the new one nothing would verify; or the old one would for ever."""
    store = await Store.open(fast_settings(redis.url, webhook_grace=2.5, **HTTP))
    webhook_id, old = await hooked(store, receiver.url)
    new = await store.webhooks.rotate("anonymous", webhook_id)
    await ended(store)
    await Deliverer(store).tick()
    for secret in (old, new):
        standardwebhooks.Webhook(secret).verify(receiver.got[0][1], receiver.got[0][0])
    await asyncio.sleep(2.6)
    await ended(store)
    await Deliverer(store).tick()
    headers, body = receiver.got[1]
    standardwebhooks.Webhook(new).verify(body, headers)
    with pytest.raises(standardwebhooks.WebhookVerificationError):
        standardwebhooks.Webhook(old).verify(body, headers)
    await store.aclose()


async def test_a_forbidden_address_is_given_up_at_once(redis: RedisProcess, receiver: Receiver):
    """A name that meant something public when the webhook was made would reach our own network."""
    store = await Store.open(fast_settings(redis.url, webhook_http=True))
    webhook_id, _ = await hooked(store, receiver.url.replace("127.0.0.1", "localhost"))
    await ended(store)
    await Deliverer(store).tick()
    assert receiver.got == []
    (lost,) = await store.deliveries.undelivered("anonymous", webhook_id)
    assert lost.tried == 1
    assert lost.error.startswith("url: ")
    await store.aclose()


async def test_a_deleted_webhook_gets_nothing_more(store: Store, receiver: Receiver):
    """Somebody who took a receiver out would still be sent what waits."""
    webhook_id, _ = await hooked(store, receiver.url)
    await ended(store, 2)
    (one,) = (await store.deliveries.claim(0, 1)).claimed
    await store.deliveries.settle(one, "dead", why="x")
    await store.webhooks.delete("anonymous", webhook_id)
    await Deliverer(store).tick()
    assert receiver.got == []
    async with unrestricted(store) as client:
        assert await client.keys("sj:*deliver*") == []


async def test_many_deliverers_send_each_once(store: Store, receiver: Receiver):
    """Two projectors would send everything twice."""
    await hooked(store, receiver.url)
    await ended(store, 30)
    deliverers = [Deliverer(store) for _ in range(4)]
    for _ in range(3):
        await asyncio.gather(*(one.tick() for one in deliverers))
    assert len(receiver.ids) == len(set(receiver.ids)) == 30


async def test_a_claim_that_nobody_settles_comes_again(store: Store, receiver: Receiver):
    """A projector that dies with a delivery in hand would lose it; its late word would undo the other's."""
    await hooked(store, receiver.url)
    await ended(store)
    (lost,) = (await store.deliveries.claim(0, 10)).claimed
    assert (await store.deliveries.claim(0, 10)).claimed == []
    await make_due(store)
    (again,) = (await store.deliveries.claim(0, 10)).claimed
    assert (again.id, again.number) == (lost.id, lost.number + 1)
    assert not await store.deliveries.settle(lost, "done")
    assert await store.deliveries.settle(again, "done")
    assert not await store.deliveries.settle(again, "done")
    assert await waiting(store) == 0


async def test_one_that_kills_its_deliverers_is_given_up(store: Store, receiver: Receiver):
    """It would kill them for ever."""
    webhook_id, _ = await hooked(store, receiver.url)
    await ended(store)
    for _ in range(TRIES):
        assert len((await store.deliveries.claim(0, 10)).claimed) == 1
        await make_due(store)
    assert (await store.deliveries.claim(0, 10)).claimed == []
    (lost,) = await store.deliveries.undelivered("anonymous", webhook_id)
    assert lost.error == "no answer was recorded"


async def test_the_loop_delivers_and_one_slow_receiver_stops_nobody_else(store: Store, receiver: Receiver):
    """Everybody's webhooks would wait for the slowest."""
    await hooked(store, receiver.url)
    await hooked(store, receiver.url + "?slow", events=("job.cancelled",))
    fast = Slow(receiver)
    task = asyncio.create_task(Deliverer(store, outgoing=fast).run())  # pyright: ignore[reportArgumentType]
    await ended(store, 5)
    await wait_until(lambda: (fast.done, fast.held) == (5, 5), what="deliveries to the fast one")
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


class Slow:
    """Answers at once but for one receiver, which never does."""

    def __init__(self, receiver: Receiver) -> None:
        self.receiver = receiver
        self.done = self.held = 0

    async def post(self, url: str, _headers: dict[str, str], _body: bytes) -> Answer:
        if url.endswith("?slow"):
            self.held += 1
            await asyncio.Event().wait()
        self.done += 1
        return Answer(204, "")


def test_eight_tries_take_about_a_day():
    """An outage of a night would lose what happened in it."""
    assert len(DELAYS) == TRIES - 1
    assert 0.8 * 86400 < sum(DELAYS) < 1.2 * 86400
    assert all(0.8 * delay <= delay_after(n) <= 1.2 * delay for n, delay in enumerate(DELAYS, 1))
    assert delay_after(TRIES + 1) <= 1.2 * DELAYS[0]


@pytest.mark.parametrize(("status", "verdict"), [(200, "done"), (204, "done"), (299, "done"), (301, "retry"),
                                                  (400, "retry"), (410, "gone"), (503, "retry")])  # fmt: skip
def test_what_an_answer_means(status: int, verdict: str):
    """What was refused would count as delivered."""
    assert judged(status).verdict == verdict


# --- killed in the middle

CHILD = """
import asyncio, sys
from streamjobs.config import load_settings
from streamjobs.projections.delivery import Deliverer
from streamjobs.projections.notify import NotifyProjection
from streamjobs.store import Store

async def main():
    store = await Store.open(load_settings())
    for job_id in sys.argv[1:]:
        await NotifyProjection(store).advance(job_id)
    await Deliverer(store).tick()
    await store.aclose()

asyncio.run(main())
"""


async def projector(url: str, jobs: list[str], fault: str = "") -> int:
    """A projector in a process of its own; its exit status."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("STREAMJOBS_")}
    env |= {
        "STREAMJOBS_REDIS_URL": url,
        "STREAMJOBS_WEBHOOK_HTTP": "true",
        "STREAMJOBS_WEBHOOK_ALLOW": "127.0.0.1",
    }
    env |= {"STREAMJOBS_FAULT": fault} if fault else {}
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", CHILD, *jobs, env=env)
    return await process.wait()


@pytest.mark.parametrize(("fault", "most"), [("after_told", 3), ("after_told:2", 3), ("after_delivery", 6)])
async def test_a_projector_killed_there_loses_nothing(
    store: Store, redis: RedisProcess, receiver: Receiver, fault: str, most: int
):
    """The one event that mattered would be the one that nobody was told of."""
    await hooked(store, receiver.url)
    jobs = [(await store.jobs.submit(Submission(kind="chat"))).job_id for _ in range(3)]
    for job_id in jobs:
        await store.jobs.cancel(job_id)
    assert await projector(redis.url, jobs, fault) == -signal.SIGKILL
    await make_due(store)
    assert await projector(redis.url, jobs) == 0
    assert len({json.loads(body)["data"]["id"] for _, body in receiver.got}) == 3
    assert len(set(receiver.ids)) == 3
    assert len(receiver.ids) <= most
    notices, _ = await store.notices.page("anonymous")
    assert sorted(one.job for one in notices) == sorted(jobs)


# --- mail


class Sink:
    """An SMTP server's other side: keeps the mail it takes, refuses what it is told to."""

    def __init__(self) -> None:
        self.mail: list[Any] = []
        self.refusal = ""

    async def handle_DATA(self, _server: Any, _session: Any, envelope: Any) -> str:
        if self.refusal:
            return self.refusal
        self.mail.append(envelope)
        return "250 OK"


@pytest.fixture
async def sink() -> AsyncIterator[tuple[Sink, str]]:
    kept, loop = Sink(), asyncio.get_running_loop()
    server = await loop.create_server(lambda: SMTP(kept, loop=loop, hostname="sink"), "127.0.0.1", 0)
    async with server:
        yield kept, f"smtp://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_mail_says_what_happened_once(redis: RedisProcess, sink: tuple[Sink, str]):
    """An owner without a server of their own would hear of nothing."""
    kept, url = sink
    store = await Store.open(
        fast_settings(redis.url, smtp_url=url, notify_from="jobs@s.example", public_url="https://s.example/")
    )
    await hooked(store, "mailto:anna@mail.example", events=("job.cancelled",))
    (job_id,) = await ended(store)
    await Deliverer(store).tick()
    await Deliverer(store).tick()
    (mail,) = kept.mail
    assert (mail.mail_from, mail.rcpt_tos) == ("jobs@s.example", ["anna@mail.example"])
    text = mail.content.decode()
    assert "Subject: chat: cancelled" in text
    assert f"https://s.example/v1/jobs/{job_id}" in text
    assert "Message-ID: <msg_" in text
    await store.aclose()


@pytest.mark.parametrize(("refusal", "lost"), [("450 later", 0), ("550 no such mailbox", 1)])
async def test_a_mail_server_may_refuse_for_now_or_for_good(
    redis: RedisProcess, sink: tuple[Sink, str], refusal: str, lost: int
):
    """A busy mail server would lose mail; a mailbox that is no more would be tried for a day."""
    kept, url = sink
    kept.refusal = refusal
    store = await Store.open(fast_settings(redis.url, smtp_url=url, notify_from="jobs@s.example"))
    webhook_id, _ = await hooked(store, "mailto:anna@mail.example")
    await ended(store)
    await Deliverer(store).tick()
    assert len(await store.deliveries.undelivered("anonymous", webhook_id)) == lost
    assert await waiting(store) == 1 - lost
    await store.aclose()


async def test_without_a_mail_server_mail_is_given_up(store: Store):
    """Deliveries would wait for a setting that is not there."""
    webhook_id, _ = await hooked(store, "mailto:anna@mail.example")
    await ended(store)
    await Deliverer(store, mail=Mail("", "", 1.0)).tick()
    (lost,) = await store.deliveries.undelivered("anonymous", webhook_id)
    assert lost.error == "mail is not set up"


def test_a_kind_cannot_write_headers():
    """Whoever submits a job could send mail to others through its name."""
    content = msgspec.json.encode({"type": "x.a", "timestamp": "t", "data": {
        "id": "j", "kind": "a\r\nBcc: bob@b.example", "links": {"self": "/"}}})  # fmt: skip
    letter = Claimed(0, "msg_1", 1, "anna", "wh_1", Webhook(url="mailto:a@a.example"), ("s",), content, 0)
    with pytest.raises(ValueError, match=r"header|linefeed|newline"):
        message_of(letter, "jobs@s.example")
