"""Jobs with long logs, written as a worker would: batches under a lease. For the scenarios of sealed history.

As a child, `python -m loadtests.streamjobs_history` and one of
    long <deltas>                          writes one chat of so many tokens, waits for the projector at each
                                           tenth, leaves it running; prints what it was, how its keys grew
    begin <jobs>                           takes so many chats and leaves them running; prints them
    end <job> <epoch> <batches> <deltas>   ends it; prints what its keys hold then
    copy <job> <stream>                    writes its events to a plain stream
    plain                                  prints the bytes of all jobs in plain streams: events, texts alone
    wave <seed> <jobs> <tokens>            writes finished chats; prints their bytes of text and of zstd
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import uvloop
import zstandard
from msgspec import Raw

from loadtests import prose
from loadtests.streamjobs_peer import OWNERS, QUEUE, events_key, hash_key, opened, sealed_key
from streamjobs.events import (
    Event,
    JobCompleted,
    TextDelta,
    TurnCompleted,
    TurnStarted,
    Usage,
    encode_event,
    encode_json,
)
from streamjobs.store import Batch, Lease, Store, Submission

BATCH = 1000
"""Events in one batch, and batches of different jobs in one call."""
INPUT = json.dumps({"prompt": "Say something about durable jobs.", "model": "a-model"}).encode()
STREAM = "plain"
SETTLE_TIMEOUT = 60.0
POLL_INTERVAL = 0.02


@dataclass(frozen=True)
class Sample:
    """Memory while a job runs: its deltas so far, the bytes of their text, and those of its keys."""

    deltas: int
    text: int
    held: int


@dataclass(frozen=True)
class Written:
    """A job that runs: `last` is the id of its last event."""

    job_id: str
    epoch: int
    batches: int
    last: str
    text: int
    curve: list[Sample]


@dataclass(frozen=True)
class Wave:
    """Jobs that have ended: their events, their texts in bytes, and compressed, each by itself."""

    jobs: int
    events: int
    text: int
    compressed: int


class Writer:
    """Writes logs through the store."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._takes = 0

    async def begin(self, count: int) -> list[Lease]:
        """Submit and take chats."""
        await self.store.jobs.submit_many(
            [Submission(kind="chat", owner=f"owner-{n % OWNERS}", input=INPUT) for n in range(count)]
        )
        leases: list[Lease] = []
        while len(leases) < count:
            self._takes += 1
            taken = await self.store.work.take(0, "writer", self._takes, count - len(leases), [QUEUE])
            leases += taken.leases
        return leases

    async def append(self, batches: Sequence[Batch]) -> list[int]:
        """Write batches; returns the seq at which each job stands."""
        answers = await self.store.work.append(0, batches)
        bad = [answer for answer in answers if answer.verdict != "ok"]
        if bad:
            raise RuntimeError(f"a batch was answered {bad[0]}")
        return [answer.seq for answer in answers]

    async def settled(self) -> None:
        """Wait until no projection has anything left to do."""
        deadline = time.monotonic() + SETTLE_TIMEOUT
        while not await self._is_settled():
            if time.monotonic() > deadline:
                raise RuntimeError("the projector does not get level")
            await asyncio.sleep(POLL_INTERVAL)

    async def _is_settled(self) -> bool:
        infos = await self.store.feed.all()
        return bool(infos) and all(info.consumers and not info.notes for info in infos)

    async def held(self, job_id: str) -> int:
        """Bytes of all keys of a job."""
        client: Any = self.store.client
        names = [hash_key(job_id), events_key(job_id), sealed_key(job_id)]
        sizes = [await client.memory_usage(name, samples=0) for name in names]
        return sum(size or 0 for size in sizes)


def deltas(words: Sequence[str], begin_ms: int, choice: random.Random) -> Iterator[TextDelta]:
    """A delta for each word, about 20 ms apart, as a recorder would have written them."""
    ts = begin_ms
    for word in words:
        ts += choice.randint(18, 26)
        yield TextDelta(ts=ts, turn=1, text=word)


def rows(events: Sequence[Event]) -> list[tuple[str, bytes]]:
    return [(event.type, encode_event(event)) for event in events]


# --- one long job


async def long(count: int) -> Written:
    async with opened() as store:
        writer = Writer(store)
        (lease,) = await writer.begin(1)
        said = list(deltas(prose.tokens(1, count), await store.now_ms(), random.Random(1)))
        await writer.append(
            [Batch(lease.job_id, lease.epoch, 1, rows([TurnStarted(turn=1, model="a-model")]))]
        )
        curve, number, text = list[Sample](), 1, 0
        tenth = max(1, count // 10)
        for start in range(0, count, tenth):
            part = said[start : start + tenth]
            for at in range(0, len(part), BATCH):
                number += 1
                await writer.append([Batch(lease.job_id, lease.epoch, number, rows(part[at : at + BATCH]))])
            await writer.settled()
            text += sum(len(delta.text.encode()) for delta in part)
            curve.append(Sample(start + len(part), text, await writer.held(lease.job_id)))
        record = await store.jobs.get(lease.job_id)
        return Written(lease.job_id, lease.epoch, number, str(record.last), text, curve)


async def begin(count: int) -> dict[str, list[str]]:
    """Take chats that nobody goes on with, each with an open turn."""
    async with opened() as store:
        writer = Writer(store)
        leases = await writer.begin(count)
        turn = rows([TurnStarted(turn=1, model="a-model")])
        for start in range(0, count, BATCH):
            part = leases[start : start + BATCH]
            await writer.append([Batch(lease.job_id, lease.epoch, 1, turn) for lease in part])
    return {"jobs": [f"{lease.job_id}:{lease.epoch}" for lease in leases]}


async def end(job_id: str, epoch: int, batches: int, count: int) -> dict[str, int]:
    async with opened() as store:
        writer = Writer(store)
        turn = TurnCompleted(turn=1, finish_reason="stop", text="".join(prose.tokens(1, count)))
        await writer.append([Batch(job_id, epoch, batches + 1, rows([turn, JobCompleted()]), "completed")])
        await writer.settled()
        return {"held": await writer.held(job_id)}


async def copy(job_id: str, stream: str) -> dict[str, str]:
    """Write a job's events to a plain stream."""
    async with opened() as store:
        await copy_to(store, job_id, stream)
    return {"stream": stream}


async def copy_to(store: Store, job_id: str, stream: str, *, texts: bool = False) -> None:
    """Write a job's events to a plain stream, or of its deltas the texts alone."""
    client: Any = store.client
    async for page in store.log.pages(job_id):
        async with client.pipeline(transaction=False) as pipe:
            for entry in page.entries:
                if not texts:
                    pipe.xadd(stream, {"t": entry.type, "d": entry.data})
                elif entry.type == TextDelta.type:
                    pipe.xadd(stream, {"text": json.loads(entry.data)["text"]})
            await pipe.execute()


async def plain() -> dict[str, int]:
    """Write the events of all jobs to plain streams, and their texts alone; returns the bytes of both."""
    sizes = {"events": 0, "texts": 0}
    async with opened() as store:
        client: Any = store.client
        async for ids in store.feed.jobs(0):
            for job_id in ids:
                await copy_to(store, job_id, STREAM)
                sizes["events"] += await client.memory_usage(STREAM, samples=0)
                await client.delete(STREAM)
                await copy_to(store, job_id, STREAM, texts=True)
                sizes["texts"] += await client.memory_usage(STREAM, samples=0)
                await client.delete(STREAM)
    return sizes


# --- many that have ended


async def wave(seed: int, jobs: int, count: int) -> Wave:
    async with opened() as store:
        writer = Writer(store)
        leases = await writer.begin(jobs)
        texts = [prose.tokens(seed + n, count) for n in range(jobs)]
        events = 0
        for start in range(0, jobs, max(1, BATCH // count)):
            part = list(zip(leases, texts, strict=True))[start : start + max(1, BATCH // count)]
            events += sum(await writer.append([_life(lease, words) for lease, words in part]))
    raw = ["".join(words).encode() for words in texts]
    packer = zstandard.ZstdCompressor(level=6)
    return Wave(jobs, events, sum(map(len, raw)), sum(len(packer.compress(text)) for text in raw))


def _life(lease: Lease, words: Sequence[str]) -> Batch:
    """Everything that a chat says, and its end, in one batch: its text thrice, as in the built-in chat's."""
    said = list(deltas(words, lease.epoch, random.Random(lease.job_id)))
    usage, text = Usage(12, len(words)), "".join(words)
    result = {"text": text, "finish_reason": "stop", "usage": usage, "rounds": 1}
    log = [
        TurnStarted(ts=lease.epoch, turn=1, model="a-model"),
        *said,
        TurnCompleted(ts=said[-1].ts, turn=1, finish_reason="stop", usage=usage, text=text),
        JobCompleted(ts=said[-1].ts + 1, result=Raw(encode_json(result))),
    ]
    return Batch(lease.job_id, lease.epoch, 1, rows(log), "completed")


if __name__ == "__main__":
    _, verb, *given = sys.argv
    match verb:
        case "long":
            result: Any = asdict(uvloop.run(long(int(given[0]))))
        case "begin":
            result = uvloop.run(begin(int(given[0])))
        case "end":
            result = uvloop.run(end(given[0], *map(int, given[1:])))
        case "plain":
            result = uvloop.run(plain())
        case "copy":
            result = uvloop.run(copy(*given))
        case _:
            result = asdict(uvloop.run(wave(*map(int, given))))
    print(json.dumps(result))
