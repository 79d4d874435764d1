"""TLS to Redis, ended by a proxy that speaks nothing else: whatever reaches Redis came through it."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from streamjobs.errors import ConfigError, StoreUnavailable
from streamjobs.store import Store, Submission
from streamjobs.store.renewer import Renewer
from tests.conftest import RedisProcess, fast_settings, wait_until
from tests.harness import lab, says, working
from tests.proxy import Proxy, proxying


class Papers:
    """An authority, and what it has signed, as files."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.authority = trustme.CA()
        self.ca, self.cert, self.key = (str(folder / f"{name}.pem") for name in ("ca", "cert", "key"))
        self.authority.cert_pem.write_to_path(self.ca)
        ours = self.authority.issue_cert("streamjobs")
        ours.cert_chain_pems[0].write_to_path(self.cert)
        ours.private_key_pem.write_to_path(self.key)

    def server(self, name: str = "127.0.0.1") -> ssl.SSLContext:
        """What a Redis with a certificate for `name` speaks, that asks its clients for one as well."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.authority.issue_cert(name).configure_cert(context)
        self.authority.configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED
        return context

    @property
    def settings(self) -> dict[str, str]:
        return {"redis_tls_ca": self.ca, "redis_tls_cert": self.cert, "redis_tls_key": self.key}


@pytest.fixture
def papers(tmp_path: Path) -> Papers:
    return Papers(tmp_path / "papers")


@pytest.fixture
async def proxy(redis: RedisProcess, papers: Papers) -> AsyncIterator[Proxy]:
    async with proxying(redis.port, papers.server()) as opened:
        yield opened


async def test_everything_goes_through_tls(proxy: Proxy, papers: Papers):
    """Prompts, and the password of Redis, would be read by whoever shares the network."""
    async with lab(proxy.url, says("over TLS"), **papers.settings) as bench, working(bench.store):
        view = await bench.run()
        assert view.text == "over TLS"
        await wait_until(lambda: bench.store.live.connected, what="the worker's subscription")
        await bench.healthy()
    # read and write, a subscription, and a loop that blocks
    assert proxy.connections >= 3


async def test_the_thread_that_keeps_leases_uses_tls(proxy: Proxy, papers: Papers):
    """Every job of a worker would be lost after one lease, and only there."""
    settings = fast_settings(proxy.url, **papers.settings)
    store = await Store.open(settings)
    job_id = (await store.jobs.submit(Submission(kind="chat"))).job_id
    (lease,) = (await store.work.take(0, "w", 1, 1, ["default"])).leases
    renewer = Renewer(settings)
    try:
        _, (renewal,) = await asyncio.to_thread(renewer.renew, 0, [(job_id, lease.epoch)])
        assert renewal.held
    finally:
        renewer.close()
        await store.aclose()


async def refusal(url: str, **changes: Any) -> str:
    """Why a store does not open, which must be the same for the thread that keeps leases."""
    settings = fast_settings(url, redis_connect_timeout=20.0, **changes)
    with pytest.raises(StoreUnavailable) as opened:
        await Store.open(settings)
    with contextlib.closing(Renewer(settings)) as renewer, pytest.raises(StoreUnavailable) as renewed:
        await asyncio.to_thread(renewer.renew, 0, [])
    assert str(opened.value) == str(renewed.value)
    return str(opened.value)


async def test_a_certificate_of_a_strangers_is_refused(proxy: Proxy, papers: Papers, tmp_path: Path):
    """Anybody on the way could be Redis: read every prompt, and answer what they like."""
    stranger = Papers(tmp_path / "stranger")
    wrong = papers.settings | {"redis_tls_ca": stranger.ca}
    assert "its certificate is refused (self-signed" in await refusal(proxy.url, **wrong)
    assert "its certificate is refused (self-signed" in await refusal(proxy.url)


async def test_a_certificate_for_another_name_is_refused(redis: RedisProcess, papers: Papers):
    """Any service with a certificate of the same authority could be Redis."""
    async with proxying(redis.port, papers.server("elsewhere.example")) as proxy:
        said = await refusal(proxy.url, **papers.settings)
    assert "its certificate is refused (IP address mismatch" in said


@pytest.mark.parametrize("tls", [True, False])
async def test_who_shows_no_certificate_is_not_let_in(proxy: Proxy, papers: Papers, tls: bool):
    """The other tests would pass with a server that asks for nothing, and say nothing of our certificate."""
    url = proxy.url if tls else proxy.url.replace("rediss://", "redis://")
    with pytest.raises(StoreUnavailable, match="Redis cannot be reached"):
        await Store.open(fast_settings(url, redis_tls_ca=papers.ca if tls else ""))


async def test_a_broken_link_comes_back_with_tls(proxy: Proxy, papers: Papers):
    """The first restart of Redis would be the last thing that its subscribers hear."""
    store = await Store.open(fast_settings(proxy.url, **papers.settings))
    try:
        await store.live.on_inbox([0], lambda _: None)
        await wait_until(lambda: store.live.connected)
        proxy.abort_all()
        await wait_until(lambda: store.live.connections > 1)
        await store.ping()
    finally:
        await store.aclose()


@pytest.mark.parametrize(
    ("url", "changes", "said"),
    [
        ("redis://h", {"redis_tls_ca": "CA"}, "certificates are for rediss://"),
        ("unix:///s", {"redis_tls_cert": "CERT"}, "certificates are for rediss://"),
        ("rediss://h", {"redis_tls_ca": "/nowhere"}, "'redis_tls_ca': /nowhere: No such file"),
        ("rediss://h", {"redis_tls_ca": "KEY"}, "'redis_tls_ca': "),
        ("rediss://h", {"redis_tls_cert": "CERT"}, "'redis_tls_cert': "),
        ("rediss://h", {"redis_tls_cert": "CERT", "redis_tls_key": "CA"}, "'redis_tls_cert': "),
        ("rediss://h", {"redis_tls_key": "KEY"}, "'redis_tls_key': without redis_tls_cert"),
    ],
)
async def test_files_that_do_not_fit_are_told_at_the_start(
    papers: Papers, url: str, changes: dict[str, str], said: str
):
    """Certificates would be left out in silence, or fail one by one in loops that try again for ever."""
    files = {"CA": papers.ca, "CERT": papers.cert, "KEY": papers.key}
    with pytest.raises(ConfigError, match=said):
        await Store.open(
            fast_settings(url, **{name: files.get(file, file) for name, file in changes.items()})
        )


@pytest.mark.parametrize(
    "url",
    [
        "redis://u:ca@nary#x@h:1",
        "redis://u:pass@h:canary",
        "redis://canary[@h",
        "canary",
        "redis://h?canary=1",
    ],
)
async def test_what_is_wrong_with_the_url_is_told_without_it(url: str):
    """A password with a `#` or an `@` makes a URL that does not parse: the error would quote it."""
    with pytest.raises((ConfigError, StoreUnavailable)) as caught:
        await Store.open(fast_settings(url))
    assert "canary" not in str(caught.value).replace("unexpected keyword argument 'canary'", "")
