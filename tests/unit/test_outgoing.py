"""Requests to addresses that strangers chose: what they may reach, and what they never do."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator
from ipaddress import ip_address

import httpx
import pytest
import trustme

from streamjobs.errors import ConfigError, RefusedTarget
from streamjobs.outgoing import MAX_ANSWER, Outgoing, Policy, is_public, resolve_by_system

# what names mean in these tests; nothing is asked of a real resolver
NAMES = {
    "localhost": ["127.0.0.1"],
    "localhost6": ["::1"],
    "private.example": ["10.1.2.3"],
    "metadata.example": ["169.254.169.254"],
    "mixed.example": ["93.184.216.34", "192.168.1.1"],
    "mapped.example": ["::ffff:127.0.0.1"],
    "nat64.example": ["64:ff9b::7f00:1"],
    "sixtofour.example": ["2002:7f00:1::"],
    "linklocal.example": ["fe80::1%eth0"],
    "unique.example": ["fd00::1"],
    "zero.example": ["0.0.0.0"],
    "odd.example": ["not-an-address"],
    "none.example": [],
    "127.0.0.1.nip.io": ["127.0.0.1"],
    "cluster.local": ["10.96.0.1"],
    "good.example": ["93.184.216.34"],
}

REFUSED = """
    http://good.example/  ftp://good.example/  file:///etc/passwd  gopher://good.example:70/  unix:///run/redis.sock
    https:///path  https://  good.example  //good.example/  https:good.example  javascript:alert(1)  ws://good.example/
    https://user@good.example/  https://user:password@good.example/  https://good.example@127.0.0.1/
    https://127.0.0.1/  https://127.0.0.1:443/  https://127.1/  https://127.0.1/  https://2130706433/
    https://0x7f000001/  https://0x7f.0.0.1/  https://0x7f.1/  https://017700000001/  https://0177.0.0.1/
    https://127.0.0.1./  https://0/  https://0.0.0.0/  https://00000.0/  https://127.127.127.127/
    https://10.0.0.1/  https://172.16.0.1/  https://172.31.255.255/  https://192.168.0.1/  https://100.64.0.1/
    https://100.127.255.254/  https://169.254.169.254/latest/meta-data/  https://192.0.0.192/  https://192.0.2.1/
    https://198.18.0.1/  https://198.51.100.1/  https://203.0.113.1/  https://192.88.99.1/  https://224.0.0.1/
    https://239.255.255.250/  https://240.0.0.1/  https://255.255.255.255/
    https://[::]/  https://[::1]/  https://[::ffff:127.0.0.1]/  https://[::ffff:7f00:1]/  https://[::127.0.0.1]/
    https://[64:ff9b::7f00:1]/  https://[64:ff9b:1::a00:1]/  https://[2002:7f00:1::]/  https://[2001::1]/
    https://[2001:db8::1]/  https://[fe80::1]/  https://[fe80::1%25eth0]/  https://[fc00::1]/  https://[fd00:ec2::254]/
    https://[fec0::1]/  https://[ff02::1]/  https://[100::1]/  https://[3fff::1]/  https://[5f00::1]/
    https://localhost/  https://LOCALHOST/  https://localhost./  https://localhost6/  https://private.example/
    https://metadata.example/  https://mixed.example/  https://mapped.example/  https://nat64.example/
    https://sixtofour.example/  https://linklocal.example/  https://unique.example/  https://zero.example/
    https://odd.example/  https://none.example/  https://127.0.0.1.nip.io/  https://cluster.local/
    https://good.example:0/  https://[2606:4700::1%25eth0]/
    https://@good.example/  https://[2606:4700::1]443/  https://good.example:+443/  https://good.example:/
    https://good.example:22/  https://good.example:6379/  https://good.example:25/  https://good.example:80/
    https://127%2e0%2e0%2e1/  https://%6cocalhost/  https://①②⑦.⓪.⓪.①/  https://good.example\\@127.0.0.1/
    https://good..example/  https://-good.example/  https://good.example:99999/  https://[good.example]/
""".split()  # noqa: SIM905 - a table
WITH_SPACES = [
    "https://good.example/ x",
    "https://good.example\t/",
    "https://good.example/\r\nHost: x",
    "\x00",
]


async def stub(host: str, port: int) -> list[str]:
    if host not in NAMES:
        raise socket.gaierror(host)
    return NAMES[host]


class Listener:
    """A server that counts who comes, answers one thing to all, and keeps what it was sent."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer
        self.connections = 0
        self.requests: list[bytes] = []
        self.names: list[str | None] = []
        self.port = 0
        self.is_silent = False
        self.serving: set[asyncio.Task[None]] = set()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self.serving.add(task)
        with contextlib.suppress(ConnectionError, EOFError):
            try:
                await self._serve(reader, writer)
            finally:
                writer.close()
                await writer.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        lines = head.lower().split(b"\r\n")
        length = next(int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length"))
        self.requests.append(head + await reader.readexactly(length))
        if self.is_silent:
            await reader.read()
        writer.write(self.answer)
        await writer.drain()


@contextlib.asynccontextmanager
async def listening(
    answer: bytes = b"HTTP/1.1 204 No Content\r\n\r\n", tls: ssl.SSLContext | None = None, port: int = 0
) -> AsyncIterator[Listener]:
    listener = Listener(answer)
    if tls is not None:
        tls.sni_callback = lambda _socket, name, _context: listener.names.append(name)
    server = await asyncio.start_server(listener, "127.0.0.1", port, ssl=tls)
    listener.port = server.sockets[0].getsockname()[1]
    async with server:
        yield listener
        if listener.serving:
            await asyncio.wait(listener.serving)


async def post(url: str, policy: Policy | None = None, **options: object) -> int:
    outgoing = Outgoing(policy or Policy(), 5.0, **{"resolve": stub, **options})  # pyright: ignore[reportArgumentType]
    return (await outgoing.post(url, {"x-a": "b"}, b"{}")).status


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> list[httpx.URL]:
    """Everything that would have been connected to; nothing is."""
    urls: list[httpx.URL] = []

    async def handle(_transport: object, request: httpx.Request) -> httpx.Response:
        urls.append(request.url)
        return httpx.Response(204, stream=httpx.ByteStream(b""))

    monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", handle)
    return urls


def test_the_table_is_long():
    """It would be a sample, not a table."""
    assert len(set(REFUSED)) >= 60


@pytest.mark.parametrize("url", [*REFUSED, *WITH_SPACES], ids=repr)
async def test_nothing_reaches_a_network_that_is_not_public(url: str, reached: list[httpx.URL]):
    """Whoever may make a webhook may talk to our Redis, and to the cloud's metadata for our keys."""
    with pytest.raises((RefusedTarget, OSError)) as refusal:
        await post(url)
    assert isinstance(refusal.value, RefusedTarget), "it was not refused, only not found"
    assert reached == []


@pytest.mark.parametrize(
    ("url", "to"),
    [
        ("https://good.example/a?b=c#d", "https://93.184.216.34/a?b=c"),
        ("https://GOOD.example:8443/", "https://93.184.216.34:8443/"),
        ("https://good.example./", "https://93.184.216.34/"),
        ("https://93.184.216.34/", "https://93.184.216.34/"),
        ("https://[2606:2800:220:1::1]/x", "https://[2606:2800:220:1::1]/x"),
    ],
)
async def test_a_public_address_is_connected_to_as_it_was_resolved(
    url: str, to: str, reached: list[httpx.URL]
):
    """No webhook would work; or the name would be resolved a second time, to something else."""
    assert await post(url) == 204
    assert [str(one) for one in reached] == [to]


async def test_a_name_is_resolved_once(reached: list[httpx.URL]):
    """A resolver that answers well at first and 127.0.0.1 then (rebinding) would get through."""
    answers = [["93.184.216.34"], ["127.0.0.1"]]

    async def rebinding(host: str, port: int) -> list[str]:
        return answers.pop(0)

    assert await post("https://rebind.example/", resolve=rebinding) == 204
    assert [one.host for one in reached] == ["93.184.216.34"]
    assert answers == [["127.0.0.1"]]


async def test_the_receiver_sees_the_name_and_not_the_address():
    """No virtual host would be found."""
    async with listening() as listener:
        policy = Policy.of(("127.0.0.0/8",), http=True)
        assert await post(f"http://localhost:{listener.port}/hook?x=1", policy) == 204
    assert listener.requests[0].startswith(b"POST /hook?x=1 HTTP/1.1\r\n")
    assert f"\r\nhost: localhost:{listener.port}\r\n".encode() in listener.requests[0].lower()


async def test_the_certificate_must_be_the_names():
    """Whoever answers at an address of the receiver's network could read what is sent, and say it came."""
    authority = trustme.CA()
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    for name, is_trusted in (("hooks.example", True), ("other.example", False)):
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(name).configure_cert(server)
        NAMES["hooks.example"] = ["127.0.0.1"]
        async with listening(tls=server) as listener:
            posting = post(
                f"https://hooks.example:{listener.port}/",
                Policy.of(("hooks.example",), http=False),
                trust=trust,
            )
            if is_trusted:
                assert await posting == 204
            else:
                with pytest.raises(httpx.ConnectError):
                    await posting
            assert listener.names == ["hooks.example"]


async def test_a_redirect_is_an_answer_and_is_not_followed():
    """A good host could send us anywhere."""
    async with listening() as forbidden:
        location = (
            f"HTTP/1.1 307 Moved\r\nlocation: http://127.0.0.1:{forbidden.port}/\r\ncontent-length: 0\r\n\r\n"
        )
        async with listening(location.encode()) as listener:
            policy = Policy.of(("127.0.0.1/32",), http=True)
            assert await post(f"http://127.0.0.1:{listener.port}/", policy) == 307
        assert forbidden.connections == 0


async def test_a_proxy_of_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch):
    """The proxy would resolve the name itself, wherever it stands."""
    async with listening() as proxy, listening() as listener:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        policy = Policy.of(("127.0.0.1/32",), http=True)
        assert await post(f"http://127.0.0.1:{listener.port}/", policy) == 204
        assert proxy.connections == 0


async def test_an_endless_answer_is_cut():
    """One receiver could fill our memory."""
    endless = b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 10_000_000
    async with listening(endless) as listener:
        outgoing = Outgoing(Policy.of(("127.0.0.1/32",), http=True), 5.0)
        answer = await outgoing.post(f"http://127.0.0.1:{listener.port}/", {}, b"{}")
    assert (answer.status, len(answer.text)) == (200, MAX_ANSWER)


async def test_a_receiver_that_says_nothing_is_left():
    """A handful of silent receivers would stop all deliveries."""

    async with listening(b"") as listener:
        listener.is_silent = True
        outgoing = Outgoing(Policy.of(("127.0.0.1/32",), http=True), 0.1)
        with pytest.raises((TimeoutError, httpx.TimeoutException)):
            await outgoing.post(f"http://127.0.0.1:{listener.port}/", {}, b"{}")


async def test_the_next_address_is_tried_where_one_does_not_answer():
    """A host whose IPv6 does not work from here would get nothing."""
    NAMES["two.example"] = ["127.0.0.2", "127.0.0.1"]
    async with listening() as listener:
        assert (
            await post(f"http://two.example:{listener.port}/", Policy.of(("two.example",), http=True)) == 204
        )


async def test_an_allowed_network_lets_nothing_else_through(reached: list[httpx.URL]):
    """An operator who opens one network would have opened all."""
    policy = Policy.of(("10.1.0.0/16", "internal.example"), http=False)
    NAMES["internal.example"] = ["10.9.9.9"]
    assert await post("https://10.1.2.3:9000/", policy) == 204
    assert await post("https://private.example:9000/", policy) == 204
    assert await post("https://internal.example:9000/", policy) == 204
    for url in ("https://10.2.0.1/", "https://localhost/", "https://good.example:9000/", "http://10.1.2.3/"):
        with pytest.raises(RefusedTarget):
            await post(url, policy)


@pytest.mark.parametrize("one", ["", "10.0.0.0/33", "10.0.0.1/8", "a b", "http://x", "0x7f.1", "*.example"])
def test_an_allowance_that_means_nothing_is_refused(one: str):
    """A typo would open nothing, or something else, in silence."""
    with pytest.raises(ConfigError, match="webhook_allow"):
        Policy.of((one,), http=False)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "2a00:1450::1"])
def test_public_addresses_are_public(address: str):
    """Webhooks would reach nobody."""
    assert is_public(ip_address(address))


async def test_the_systems_resolver_gives_addresses():
    """Everything above would hold for a stub only."""
    assert "127.0.0.1" in await resolve_by_system("localhost", 80)
