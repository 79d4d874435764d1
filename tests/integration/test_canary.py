"""The canary: sings where all is well, and says what is wrong where it is not."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest

from streamjobs import metrics
from streamjobs.app import App
from streamjobs.client.canary import OWNER, Canary, Flaw, Seen, check_tail, check_whole
from streamjobs.gateway import channel
from streamjobs.gateway.sse import event_frame
from streamjobs.store import Entry
from tests.conftest import RedisProcess, free_port
from tests.harness import working
from tests.integration.gateway import Served, serving


@pytest.fixture
async def served(redis: RedisProcess) -> AsyncIterator[Served]:
    async with serving(redis.url) as gateway:
        yield gateway


def singer(served: Served, **options: float) -> Canary:
    served.client.headers["x-streamjobs-owner"] = OWNER
    return Canary(served.client, **({"events": 10, "seconds": 0.3} | options))  # type: ignore[arg-type]


def count(outcome: str) -> float:
    return metrics.REGISTRY.get_sample_value("streamjobs_canary_runs_total", {"outcome": outcome}) or 0.0


async def test_it_sings_through_the_whole_system(served: Served):
    """A canary that fails where all is well is switched off within a week."""
    before = count("ok")
    async with working(served.store, App()):
        song = await singer(served).sing()
        await singer(served, seconds=0.0).sing()  # over before anybody looks
    assert 0 < song.first <= song.whole
    assert min(song.late) == 0.0
    assert count("ok") == before + 2
    jobs = (await served.client.get("/v1/jobs")).json()["jobs"]
    assert jobs == [], "nothing is left of it"


async def test_it_says_that_nobody_works(served: Served):
    before = count("timeout")
    with pytest.raises(Flaw, match="is a worker there") as found:
        await singer(served, timeout=0.5).sing()
    assert found.value.outcome == "timeout"
    assert count("timeout") == before + 1


async def test_it_says_that_nobody_answers():
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{free_port()}") as http:
        with pytest.raises(Flaw) as found:
            await Canary(http).sing()
    assert found.value.outcome == "unreachable"


async def test_it_says_that_it_is_refused(served: Served):
    await served.gateway.drain(0.0)
    async with httpx.AsyncClient(base_url=f"{served.url}/nowhere") as http:
        with pytest.raises(Flaw, match="404") as found:
            await Canary(http).sing()
    assert found.value.outcome == "refused"


async def test_it_hears_a_gateway_that_loses_an_event(served: Served, monkeypatch: pytest.MonkeyPatch):
    """The one thing it is for."""

    def lossy(entry: Entry) -> bytes:
        return b"" if b'"n":7}' in entry.data else event_frame(entry)

    monkeypatch.setattr(channel, "event_frame", lossy)
    async with working(served.store, App()):
        with pytest.raises(Flaw) as found:
            await singer(served, seconds=1.0).sing()
    assert found.value.outcome == "hole"


def seen(*numbers: int, text: str = "a") -> list[Seen]:
    return [Seen(f"{n}-1", "x.canary", f'{{"n":"{text}"}}', 0.0) for n in numbers]


LOG = [{"id": f"{n}-1", "type": "x.canary", "data": {"n": "a"}} for n in range(1, 6)]
VIEW = Seen("2-1", "snapshot", "{}", 0.0)


@pytest.mark.parametrize(
    ("transcript", "outcome"),
    [
        (seen(1, 2, 4, 5), "hole"),
        (seen(2, 3, 4, 5), "hole"),
        (seen(1, 2, 3, 4), "hole"),
        (seen(), "hole"),
        (seen(1, 2, 2, 3, 4, 5), "repeat"),
        (seen(1, 2, 3, 2, 3, 4, 5), "repeat"),
        (seen(1, 2, 3, 4, 5, text="b"), "content"),
        (seen(1, 2, 3, 4, 5, 6), "content"),
    ],
)
def test_a_transcript_that_is_not_the_log_is_found_out(transcript: list[Seen], outcome: str):
    with pytest.raises(Flaw) as found:
        check_whole(transcript, LOG)
    assert found.value.outcome == outcome
    check_whole(seen(1, 2, 3, 4, 5), LOG)


@pytest.mark.parametrize(
    ("transcript", "outcome"),
    [
        (seen(1, 2, 3, 4, 5), "content"),
        ([VIEW, *seen(4, 5)], "hole"),
        ([VIEW, *seen(3, 4)], "hole"),
        ([VIEW, *seen(2, 3, 4, 5)], "repeat"),
        ([VIEW, *seen(3, 4, 5, text="b")], "content"),
    ],
)
def test_who_comes_late_must_have_the_rest(transcript: list[Seen], outcome: str):
    with pytest.raises(Flaw) as found:
        check_tail(transcript, LOG)
    assert found.value.outcome == outcome
    check_tail([VIEW, *seen(3, 4, 5)], LOG)
