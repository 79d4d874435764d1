"""A canary: a job and its viewers through the whole system, to see that nothing is missed, repeated or late.

One viewer watches from the first event, is cut off in the middle on purpose and comes back by its cursor; one
comes late and begins with a snapshot. What they saw must be the log, as its JSON pages give it.

Rule 1: it reads frames itself: the client's `watch` would hide a repeat.
Rule 2: a run ends in one outcome. `Flaw` says which, and in a sentence what was seen.
Rule 3: how late an event is is measured against the quickest one of the run, so no clocks are compared.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import httpx
import msgspec

from streamjobs import metrics
from streamjobs.canary import CANARY, EVENT
from streamjobs.cursor import parse_cursor
from streamjobs.errors import StreamjobsError
from streamjobs.events import TERMINAL
from streamjobs.llm.sse import EventParser

OWNER = "canary"
OUTCOMES = ("ok", "unreachable", "refused", "timeout", "hole", "repeat", "content", "failed")
"""All is well; or: no answer, an error for an answer, no end in time, an event missed, an event twice or out
of order, an event that differs from the log, the job did not complete."""

_ENDED = 204


class Flaw(StreamjobsError):  # noqa: N818 - named after what happened, as all of ours
    """What a canary found."""

    code = "canary"

    def __init__(self, outcome: str, message: str) -> None:
        super().__init__(message)
        self.outcome = outcome


class Seen(NamedTuple):
    """An event as a viewer got it, and when, in seconds."""

    id: str
    type: str
    data: str
    at: float


class Song(NamedTuple):
    """A run in which all was well: seconds to the first event and to the end, and how late each event was."""

    first: float
    whole: float
    late: list[float]


class Canary:
    """Sings to a gateway. `events` over `seconds`, given up after `timeout` seconds."""

    def __init__(
        self, http: httpx.AsyncClient, events: int = 20, seconds: float = 1.0, timeout: float = 30.0
    ):
        self._http = http
        self._input = {"events": events, "seconds": seconds}
        self._timeout = timeout

    async def sing(self) -> Song:
        """Run once and count it. Raises `Flaw`."""
        try:
            song = await self._sung()
        except Flaw as flaw:
            metrics.CANARY_RUNS.labels(flaw.outcome).inc()
            raise
        metrics.CANARY_RUNS.labels("ok").inc()
        metrics.CANARY_FIRST_SECONDS.observe(song.first)
        metrics.CANARY_WHOLE_SECONDS.observe(song.whole)
        for late in song.late:
            metrics.CANARY_LATE_SECONDS.observe(late)
        metrics.CANARY_LAST_OK.set_to_current_time()
        return song

    async def _sung(self) -> Song:
        try:
            async with asyncio.timeout(self._timeout):
                return await self._run()
        except TimeoutError:
            raise Flaw(
                "timeout", f"the job has not ended within {self._timeout:g} s: is a worker there?"
            ) from None
        except httpx.TransportError as error:
            raise Flaw(
                "unreachable", f"no answer from {self._http.base_url}: {type(error).__name__}"
            ) from error

    async def _run(self) -> Song:
        began = time.monotonic()
        job = f"/v1/jobs/{await self._submit()}"
        try:
            early, late = await self._watched(job)
            log = await self._log(job)
        finally:
            await self._forget(job)
        check_whole(early, log)
        check_tail(late, log)
        self._check_content(early)
        written = [msgspec.json.decode(seen.data)["ts"] / 1000 for seen in early]
        took = [seen.at - ts for seen, ts in zip(early, written, strict=True)]
        return Song(early[0].at - began, early[-1].at - began, [each - min(took) for each in took])

    async def _submit(self) -> str:
        answer = await self._http.post("/v1/jobs", json={"kind": CANARY, "input": self._input})
        return _body(answer)["id"]

    async def _watched(self, job: str) -> tuple[list[Seen], list[Seen]]:
        """What the viewer who was cut off saw, and the one who came late."""
        early: list[Seen] = []
        middle = self._input["events"] / 2
        async with contextlib.aclosing(self._frames(job, "0")) as frames:
            async for frame in frames:
                early.append(frame)
                if frame.type in TERMINAL or len(early) >= middle:
                    break
        late = asyncio.create_task(self._to_the_end(job, None))
        try:
            early += await self._to_the_end(job, early[-1].id) if early else []
            return early, await late
        finally:
            late.cancel()

    async def _to_the_end(self, job: str, cursor: str | None) -> list[Seen]:
        """Everything behind a cursor; connections that end before the job are followed by others."""
        seen: list[Seen] = []
        while True:
            async with contextlib.aclosing(self._frames(job, cursor)) as frames:
                async for frame in frames:
                    if frame.type == "reset":
                        raise Flaw("hole", f"the gateway does not know the cursor {cursor} that it gave")
                    seen.append(frame)
                    cursor = frame.id
                    if frame.type in TERMINAL or _is_ended_view(frame):
                        return seen
            if not seen and cursor is not None:
                return seen  # the cut was at the end

    async def _frames(self, job: str, cursor: str | None) -> AsyncGenerator[Seen]:
        headers = {"accept": "text/event-stream"} | ({} if cursor is None else {"last-event-id": cursor})
        async with self._http.stream("GET", f"{job}/events", headers=headers) as answer:
            if answer.status_code == _ENDED:
                return
            if answer.is_error:
                await answer.aread()
                _body(answer)
            parser = EventParser()
            async for chunk in answer.aiter_bytes():
                for event in parser.feed(chunk):
                    if event.event == "error":
                        raise Flaw("refused", f"the stream said {event.data}")
                    if event.id or event.event == "reset":
                        yield Seen(event.id, event.event, event.data.decode(), time.monotonic())

    async def _log(self, job: str) -> list[dict[str, Any]]:
        """The log as JSON pages give it."""
        events: list[dict[str, Any]] = []
        cursor, more = "0", True
        while more:
            headers = {"accept": "application/json"}
            page = _body(await self._http.get(f"{job}/events", params={"after": cursor}, headers=headers))
            events += page["events"]
            cursor, more = page["cursor"], page["more"]
        return events

    async def _forget(self, job: str) -> None:
        """Leave nothing behind; what cannot be deleted now goes with its retention."""
        with contextlib.suppress(httpx.TransportError):
            await self._http.delete(job)

    def _check_content(self, early: Sequence[Seen]) -> None:
        if early[-1].type != "job.completed":
            raise Flaw("failed", f"the job ended with {early[-1].type}: {early[-1].data}")
        said = [msgspec.json.decode(seen.data)["data"]["n"] for seen in early if seen.type == f"x.{EVENT}"]
        if said != list(range(int(self._input["events"]))):
            raise Flaw("content", f"the job said {said}")


def check_whole(early: Sequence[Seen], log: Sequence[dict[str, Any]]) -> None:
    """Refuse a transcript that is not the whole log. Raises `Flaw`."""
    if not early or parse_cursor(early[0].id).seq != 1:
        raise Flaw("hole", "the first event is missing")
    _check_order(early)
    _check_against(early, log)
    if len(early) < len(log):
        raise Flaw("hole", f"{len(log) - len(early)} events at the end are missing")


def check_tail(late: Sequence[Seen], log: Sequence[dict[str, Any]]) -> None:
    """Refuse what is not a snapshot and the rest of the log behind it. Raises `Flaw`."""
    if not late or late[0].type != "snapshot":
        raise Flaw("content", "who comes late gets no snapshot")
    _check_order(late)
    _check_against(late[1:], log)
    if late[-1].id != log[-1]["id"]:
        raise Flaw("hole", f"who came late has {late[-1].id}, the log ends at {log[-1]['id']}")


def _check_order(seen: Sequence[Seen]) -> None:
    for before, after in pairwise(seen):
        step = parse_cursor(after.id).seq - parse_cursor(before.id).seq
        if step != 1:
            raise Flaw("hole" if step > 1 else "repeat", f"{after.id} came after {before.id}")


def _check_against(seen: Sequence[Seen], log: Sequence[dict[str, Any]]) -> None:
    known = {event["id"]: event for event in log}
    for one in seen:
        event = known.get(one.id)
        if event is None or (one.type, msgspec.json.decode(one.data)) != (event["type"], event["data"]):
            raise Flaw("content", f"event {one.id} is not what the log says")


def _is_ended_view(frame: Seen) -> bool:
    return frame.type == "snapshot" and msgspec.json.decode(frame.data)["status"] in {
        "completed",
        "failed",
        "cancelled",
    }


def _body(answer: httpx.Response) -> dict[str, Any]:
    try:
        body: dict[str, Any] = msgspec.json.decode(answer.content, type=dict[str, Any])
    except msgspec.MsgspecError:
        body = {}
    if answer.is_error or not body:
        raise Flaw(
            "refused", f"{answer.request.url.path} answered {answer.status_code} {body.get('detail', '')}"
        )
    return body
