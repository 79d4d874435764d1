"""HTTP for tools: what it reaches, where redirects may lead, and what it never gives away."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple

import httpx
import pytest

from streamjobs import outgoing
from streamjobs.app import App
from streamjobs.config import Settings
from streamjobs.errors import ConfigError, RefusedTarget, ResponseTooLarge
from streamjobs.outgoing import Outgoing, Policy
from streamjobs.safe_client import SafeClient
from streamjobs.tool import ToolContext
from streamjobs.worker.tools import call_tool
from tests.unit.test_outgoing import REFUSED

OPEN = {"hop.example": ["127.0.0.1"], "other.example": ["127.0.0.1"]}
"""Names that the operator of these tests lets through; everything else at 127.0.0.1 stays forbidden."""

FORBIDDEN = """
    http://127.0.0.1:{port}/  http://127.0.0.2:{port}/  http://127.255.255.254:{port}/  http://127.1:{port}/  http://127.0.1:{port}/
    http://2130706433:{port}/  http://0x7f000001:{port}/  http://0x7F.0.0.1:{port}/  http://0x7f.1:{port}/  http://017700000001:{port}/
    http://0177.0.0.1:{port}/  http://0177.1:{port}/  http://00000177.0.0.01:{port}/  http://127.0.0.1.:{port}/  http://0:{port}/
    http://0.0.0.0:{port}/  http://0x0:{port}/  http://00.0.0.0:{port}/  http://127.00.00.01:{port}/  http://127.0.0.0x1:{port}/
    http://127.0.0.1%00:{port}/  http://127.0.0.1%20:{port}/  http://127.0.0.1%2eexample:{port}/  http://%31%32%37.0.0.1:{port}/
    http://[::1]:{port}/  http://[::]:{port}/  http://[0:0:0:0:0:0:0:1]:{port}/  http://[::ffff:127.0.0.1]:{port}/
    http://[::ffff:7f00:1]:{port}/  http://[0:0:0:0:0:ffff:7f00:0001]:{port}/  http://[::127.0.0.1]:{port}/  http://[::7f00:1]:{port}/
    http://[::ffff:0:127.0.0.1]:{port}/  http://[64:ff9b::127.0.0.1]:{port}/  http://[64:ff9b::7f00:1]:{port}/
    http://[64:ff9b:1::7f00:1]:{port}/  http://[2002:7f00:1::1]:{port}/  http://[2001:0:7f00:1::]:{port}/  http://[::1%25lo]:{port}/
    http://[fe80::1%25lo]:{port}/  http://[2606:4700::1%25lo]:{port}/  http://[2606:4700::1%25lo%25]:{port}/  http://[::1]%2e:{port}/
    http://localhost:{port}/  http://LocalHost:{port}/  http://localhost.:{port}/  http://%6c%6fcalhost:{port}/  http://localhost%2f:{port}/
    http://loopback.example:{port}/  http://loopback6.example:{port}/  http://mapped.example:{port}/  http://zero.example:{port}/
    http://half.example:{port}/  http://nat64.example:{port}/  http://compatible.example:{port}/  http://any6.example:{port}/
    http://xn--lclhst-bua.example:{port}/  http://ⓛocalhost:{port}/  http://①②⑦.⓪.⓪.①:{port}/  http://127。0。0。1:{port}/  http://loc\u00adalhost:{port}/
    http://hop.example@127.0.0.1:{port}/  http://hop.example:80@127.0.0.1:{port}/  http://hop.example%40127.0.0.1:{port}/
    http://hop.example#@127.0.0.1:{port}/  http://hop.example\\\\@127.0.0.1:{port}/  http://hop.example\\\\.127.0.0.1:{port}/
    http:127.0.0.1:{port}/  http:/127.0.0.1:{port}/  http:///127.0.0.1:{port}/  http:\\\\\\\\127.0.0.1:{port}/  //127.0.0.1:{port}/  127.0.0.1:{port}
    ftp://127.0.0.1:{port}/  gopher://127.0.0.1:{port}/_x  ws://127.0.0.1:{port}/  unix:///tmp/x.sock  http+unix://%2Ftmp%2Fx.sock/
    file:///etc/passwd  dict://127.0.0.1:{port}/  data:,x  jar:http://127.0.0.1:{port}!/  http://hop.example:0/
    http://hop.example:{port}  http://hop.example:{port}/%0d%0aHost:%20127.0.0.1  https://127.0.0.1:{port}/  https://[::1]:{port}/  https://localhost:{port}/
""".split()  # noqa: SIM905, E501 - a table, of characters that look like others
WITH_SPACES = [
    "http://hop.example:{port}/\r\nHost: 127.0.0.1",
    "http://127.0.0.1\t:{port}/",
    " http://127.0.0.1:{port}/",
    "http://127.0.0.1:{port}/\n",
    "http://hop.example /@127.0.0.1:{port}/",
]
ALLOWED = ("http://hop.example:{port}", "http://hop.example:{port}/%0d%0aHost:%20127.0.0.1")
"""What is let through to the forbidden port by name: there to see that the listener would be heard of."""

NAMES = {
    "localhost": ["127.0.0.1"],
    "loopback.example": ["127.0.0.1"],
    "loopback6.example": ["::1"],
    "mapped.example": ["::ffff:127.0.0.1"],
    "zero.example": ["0.0.0.0"],
    "half.example": ["93.184.216.34", "127.0.0.1"],
    "nat64.example": ["64:ff9b::7f00:1"],
    "compatible.example": ["::127.0.0.1"],
    "any6.example": ["::"],
    "xn--lclhst-bua.example": ["127.0.0.1"],
} | OPEN


async def stub(host: str, port: int) -> list[str]:
    """What names mean here. Whatever it does not know is at a forbidden address, if it is asked at all."""
    return NAMES.get(host, ["127.0.0.1"])


Answering = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def serving(answering: Answering, *listeners: socket.socket) -> AsyncIterator[int]:
    """A server on these sockets, by default on one of its own; nothing is left open. The port."""
    tasks: set[asyncio.Task[Any]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            try:
                await answering(reader, writer)
            finally:
                writer.close()
                await writer.wait_closed()

    sockets = listeners or (socket.create_server(("127.0.0.1", 0)),)
    async with contextlib.AsyncExitStack() as stack:
        for listener in sockets:
            await stack.enter_async_context(await asyncio.start_server(serve, sock=listener))
        yield sockets[0].getsockname()[1]
        if tasks:
            await asyncio.wait(tasks)


class Forbidden(NamedTuple):
    """A listener on every loopback address of this machine, and those who came."""

    port: int
    came: list[str]


@pytest.fixture
async def forbidden(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Forbidden]:
    """What must not be reached. Its port is one of the web's here, or ports alone would keep us off."""
    came: list[str] = []

    async def tell(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.append(str(writer.get_extra_info("sockname")[0]))
        await reader.read(1)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nsecret")
        await writer.drain()

    listeners = [socket.create_server(("0.0.0.0", 0))]
    port = listeners[0].getsockname()[1]
    with contextlib.suppress(OSError):  # a machine without IPv6 has nothing to be reached there
        listeners.append(socket.create_server(("::1", port), family=socket.AF_INET6))
    ports = {scheme: frozenset({*known, port}) for scheme, known in outgoing._PORTS.items()}
    monkeypatch.setattr(outgoing, "_PORTS", ports)
    async with serving(tell, *listeners):
        yield Forbidden(port, came)


def client(allow: tuple[str, ...] = (), resolve: Any = stub, **changes: Any) -> SafeClient:
    settings = Settings(fetch_http=True, fetch_allow=allow, **({"fetch_timeout": 20.0} | changes))
    return SafeClient(settings, resolve=resolve)


def test_the_table_is_long():
    """It would be a sample, not a table."""
    assert len({*FORBIDDEN, *WITH_SPACES}) >= 80
    assert len(REFUSED) + len(FORBIDDEN) >= 180


async def test_the_listener_is_there(forbidden: Forbidden):
    """Every row below would pass without one."""
    for url in ALLOWED:
        reply = await client(tuple(OPEN)).get(url.format(port=forbidden.port))
        assert (reply.status, reply.content) == (200, b"secret")
    assert forbidden.came == ["127.0.0.1"] * len(ALLOWED)


async def test_no_url_of_the_table_reaches_a_listener(forbidden: Forbidden):
    """A model that reads a page could be told to ask Redis, or the cloud for its keys."""
    for url in [one.format(port=forbidden.port) for one in (*FORBIDDEN, *WITH_SPACES)]:
        posting = Outgoing(Policy(http=True), 20.0, resolve=stub)
        for send in (client().get(url), client().post(url, json={}), posting.post(url, {}, b"{}")):
            with pytest.raises(RefusedTarget):
                await send
        assert forbidden.came == [], url


# --- redirects

NOT_FOUND = b"HTTP/1.1 404 No\r\ncontent-length: 0\r\n\r\n"


class Web:
    """A server that answers by path, and keeps what it was asked."""

    def __init__(self) -> None:
        self.answers: dict[str, bytes] = {}
        self.heads: list[bytes] = []
        self.port = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head.lower())
        self.heads.append(head + await reader.readexactly(int(length[1]) if length else 0))
        writer.write(self.answers.get(head.split(b" ")[1].decode(), NOT_FOUND))
        await writer.drain()

    def redirect(self, path: str, to: str, status: int = 302) -> None:
        self.answers[path] = f"HTTP/1.1 {status} X\r\nlocation: {to}\r\ncontent-length: 0\r\n\r\n".encode()

    def answer(self, path: str, content: bytes, head: str = "") -> None:
        lines = f"HTTP/1.1 200 OK\r\n{head}content-length: {len(content)}\r\n\r\n"
        self.answers[path] = lines.encode() + content

    def url(self, path: str, host: str = "hop.example") -> str:
        return f"http://{host}:{self.port}{path}"


@pytest.fixture
async def web() -> AsyncIterator[Web]:
    served = Web()
    async with serving(served) as served.port:
        yield served


async def test_redirects_are_followed_and_checked_anew(web: Web, forbidden: Forbidden):
    """A page that is let through could send us to one that is not, at once or after some steps."""
    web.answer("/end", b"here")
    web.redirect("/2", "/end")
    web.redirect("/1", web.url("/2", "other.example"), 307)
    reply = await client(tuple(OPEN)).get(web.url("/1"))
    assert (reply.content, reply.url) == (b"here", web.url("/end", "other.example"))
    for url in [one.format(port=forbidden.port) for one in FORBIDDEN]:
        if "hop.example" in url or not url.isascii():
            continue  # relative to a name that is let through, or no header's value
        web.redirect("/away", url)
        web.redirect("/far", "/away")
        with contextlib.suppress(RefusedTarget):
            # what is no URL of its own is a path of the server that said it
            assert (await client(tuple(OPEN)).get(web.url("/far"))).status == 404
        assert forbidden.came == [], url


async def test_a_host_that_means_something_else_after_a_redirect_is_refused(web: Web, forbidden: Forbidden):
    """A name server of a stranger's could answer well at first, and with our own network then."""
    web.redirect("/", f"http://rebinding.example:{forbidden.port}/")
    answers = [["127.0.0.1"], ["127.0.0.2"]]

    async def rebinding(host: str, port: int) -> list[str]:
        assert host == "rebinding.example"
        return answers.pop(0)

    with pytest.raises(RefusedTarget, match="public address"):
        await client(("127.0.0.1/32",), rebinding).get(web.url("/", "rebinding.example"))
    assert (len(web.heads), answers, forbidden.came) == (1, [], [])


async def test_a_chain_of_redirects_ends(web: Web):
    """Two pages that point at each other would hold a worker's slot."""
    web.redirect("/", "/")
    with pytest.raises(RefusedTarget, match="more than 3 redirects"):
        await client(tuple(OPEN), fetch_max_redirects=3).get(web.url("/"))
    assert len(web.heads) == 4


async def test_secrets_do_not_follow_a_redirect_to_another_origin(web: Web):
    """Whoever may place a redirect would be sent the tool's credentials."""
    for path, host in (("/same", "hop.example"), ("/other", "other.example")):
        web.redirect(path, web.url("/end", host))
    web.answer("/end", b"")
    secrets = {
        "Authorization": "Bearer s3cret",
        "X-Api-Key": "s3cret",
        "Cookie": "s3cret",
        "User-Agent": "ours",
    }
    await client(tuple(OPEN)).get(web.url("/same"), headers=secrets)
    assert web.heads[1].count(b"s3cret") == 3
    await client(tuple(OPEN)).get(web.url("/other"), headers=secrets)
    assert b"s3cret" not in web.heads[3]
    assert b"user-agent: ours" in web.heads[3].lower()


@pytest.mark.parametrize(
    ("status", "method", "body"),
    [
        (301, b"GET", b""),
        (302, b"GET", b""),
        (303, b"GET", b""),
        (307, b"POST", b'{"a":1}'),
        (308, b"POST", b'{"a":1}'),
    ],
)
async def test_a_body_stays_at_its_origin(web: Web, status: int, method: bytes, body: bytes):
    """A form for one host would be sent to whichever one it names."""
    web.redirect("/here", "/end", status)
    web.redirect("/there", web.url("/end", "other.example"), status)
    web.answer("/end", b"ok")
    assert (await client(tuple(OPEN)).post(web.url("/here"), json={"a": 1})).content == b"ok"
    assert web.heads[-1].startswith(method)
    assert web.heads[-1].endswith(b"\r\n\r\n" + body)
    posting = client(tuple(OPEN)).post(web.url("/there"), json={"a": 1})
    if body:
        with pytest.raises(RefusedTarget, match="another origin"):
            await posting
    else:
        assert (await posting).content == b"ok"
        assert b"content-type" not in web.heads[-1].lower()


# --- caps


async def test_an_answer_over_the_cap_is_an_error(web: Web):
    """Half a document would be taken for a whole one, or a large one fill the worker's memory."""
    web.answer("/fits", b"x" * 1000)
    web.answer("/over", b"x" * 1001)
    web.answers["/endless"] = b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 5_000_000
    web.answers["/headers"] = b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 200_000 + b"\r\n"
    http = client(tuple(OPEN), fetch_max_bytes=1000)
    assert (await http.get(web.url("/fits"))).content == b"x" * 1000
    for path in ("/over", "/endless"):
        with pytest.raises(ResponseTooLarge):
            await http.get(web.url(path))
    with pytest.raises(httpx.RemoteProtocolError):
        await http.get(web.url("/headers"))


async def test_a_compressed_answer_is_not_unpacked(web: Web):
    """A few kilobytes would become gigabytes."""
    web.answer("/", b"\x1f\x8b" + b"z" * 50, "content-encoding: gzip\r\n")
    assert (await client(tuple(OPEN)).get(web.url("/"))).content.startswith(b"\x1f\x8b")
    assert b"accept-encoding: identity" in web.heads[0].lower()


async def test_a_slow_answer_ends_with_the_time():
    """A server that says one byte a minute would hold a worker's slot for ever."""

    async def drip(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.01)

    async with serving(drip) as port:
        with pytest.raises(TimeoutError):
            await client(tuple(OPEN), fetch_timeout=0.3).get(f"http://hop.example:{port}/")


# --- what is sent


async def test_no_header_of_the_callers_changes_the_message(web: Web):
    """A model could name another host, or hide a second request behind the first."""
    web.answer("/", b"")
    ours = {
        "Host": "evil",
        "Content-Length": "99",
        "Transfer-Encoding": "chunked",
        "Connection": "upgrade",
        "Accept-Encoding": "gzip",
    }
    await client(tuple(OPEN)).get(web.url("/"), headers=ours)
    head = web.heads[0].lower()
    assert head.count(b"\r\nhost:") == 1
    assert f"\r\nhost: hop.example:{web.port}\r\n".encode() in head
    assert not any(word in head for word in (b"evil", b"99", b"chunked", b"upgrade", b"gzip"))


@pytest.mark.parametrize(
    "headers",
    [
        {"x": "a\r\nhost: b"},
        {"x\r\ny": "a"},
        {"x": "\x00"},
        {"": "a"},
        {"x y": "a"},
        {"x": "é"},
        {"x": "a" * 5000},
    ],
    ids=repr,
)
async def test_a_header_that_is_none_is_refused(web: Web, headers: dict[str, str]):
    """A value with a line end is a header more, or a request more."""
    with pytest.raises(RefusedTarget, match="headers"):
        await client(tuple(OPEN)).get(web.url("/"), headers=headers)
    assert web.heads == []


@pytest.mark.parametrize("method", ["CONNECT", "TRACE", "get", "GET / HTTP/1.1\r\n\r\nGET", ""])
async def test_a_method_that_is_none_is_refused(web: Web, method: str):
    """CONNECT makes tunnels, TRACE shows credentials, and a method with a line end is two requests."""
    with pytest.raises(RefusedTarget, match="method"):
        await client(tuple(OPEN)).request(method, web.url("/"))
    assert web.heads == []


async def test_an_empty_post_says_so(web: Web):
    """Servers answer 411 to a POST without a length."""
    web.answer("/", b"")
    await client(tuple(OPEN)).post(web.url("/"))
    assert b"content-length: 0" in web.heads[0].lower()


# --- where it is


async def test_a_tool_has_it(web: Web):
    """Whoever writes a tool would reach for a client that goes anywhere."""
    app = App()

    @app.tool
    async def look(url: str, context: ToolContext) -> Any:
        reply = await context.http.get(url)
        return [reply.status, reply.json(), reply.text]

    web.answer("/", b'{"a":1}')
    settings = Settings(fetch_http=True, fetch_allow=("127.0.0.1/32",))
    for url, is_reached in ((f"http://127.0.0.1:{web.port}/", True), ("http://127.0.0.2/", False)):
        outcome = await call_tool(app, settings, "look", {"url": url}, ToolContext(settings=settings))
        if is_reached:
            assert outcome.output == [200, {"a": 1}, '{"a":1}']
        else:
            assert outcome.error is not None
            assert "public address" in outcome.error.message


@pytest.mark.parametrize("make", [SafeClient, lambda settings: ToolContext(settings=settings).http])
def test_an_allowance_that_means_nothing_names_its_setting(make: Callable[[Settings], Any]):
    """Somebody would look for the typo in another setting."""
    with pytest.raises(ConfigError, match="fetch_allow"):
        make(Settings(fetch_allow=("http://x",)))
