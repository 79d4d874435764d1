"""One text at a steady rate, written as each system is written to.

As a child: `python -m loadtests.speaker <way> <where> <tokens> <rate>`, the ways being
    log <job>:<epoch>      appends to a job as a worker's recorder does: what 20 ms have brought is one event
    events <job>:<epoch>   as well, with an event for each token, a batch every 20 ms
    stream <key>           XADDs each token
    post <url>             sends each token by HTTP
Prints how many seconds late the last token was.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

import uvloop
from redis.asyncio import Redis

from loadtests.crowd import TOKEN
from streamjobs.config import load_settings
from streamjobs.events import TextDelta, encode_event
from streamjobs.store import Batch, Store

WINDOW = 0.02

Say = Callable[[int, int], Awaitable[None]]
"""Writes tokens from one number up to, and without, another one."""


def now_ms() -> int:
    return int(1000 * time.time())


async def speak(say: Say, tokens: int, rate: float, window: float = 0.0) -> float:
    """Write tokens when they are due, at most every `window` seconds; returns how late the last one was."""
    started, said = time.perf_counter(), 0
    while said < tokens:
        due = min(tokens, int((time.perf_counter() - started) * rate) + 1)
        if due > said:
            await say(said, due)
            said = due
        await asyncio.sleep(max(window, started + said / rate - time.perf_counter()))
    return time.perf_counter() - started - tokens / rate


async def to_log(where: str, tokens: int, rate: float, per_event: int = 1 << 30) -> float:
    """Append to a job that somebody has taken: a batch each `WINDOW`, of events of so many tokens at most."""
    job_id, _, epoch = where.partition(":")
    store, number = await Store.open(load_settings()), 1  # its turn was opened by batch 1

    async def say(start: int, end: int) -> None:
        nonlocal number
        number += 1
        parts = [range(at, min(end, at + per_event)) for at in range(start, end, per_event)]
        rows = [
            ("text.delta", encode_event(TextDelta(ts=now_ms(), turn=1, text=text_of(part)))) for part in parts
        ]
        (answer,) = await store.work.append(0, [Batch(job_id, int(epoch), number, rows)])
        if answer.verdict != "ok":
            raise RuntimeError(f"a batch was answered {answer}")

    try:
        return await speak(say, tokens, rate, WINDOW)
    finally:
        await store.aclose()


async def to_log_singly(where: str, tokens: int, rate: float) -> float:
    """As `to_log`, with an event for each token."""
    return await to_log(where, tokens, rate, 1)


def text_of(numbers: range) -> str:
    return "".join(f"{TOKEN}{number} " for number in numbers)


def payload(number: int) -> bytes:
    return b'{"ts":%d,"turn":1,"text":"%b%d "}' % (now_ms(), TOKEN.encode(), number)


async def to_stream(where: str, tokens: int, rate: float) -> float:
    """XADD each token."""
    client = Redis.from_url(os.environ["LOADTEST_REDIS_URL"])

    async def say(start: int, end: int) -> None:
        for number in range(start, end):
            await client.xadd(where, {"d": payload(number)})

    try:
        return await speak(say, tokens, rate)
    finally:
        await client.aclose()


async def to_url(where: str, tokens: int, rate: float) -> float:
    """POST each token over one connection."""
    url = urlsplit(where)
    reader, writer = await asyncio.open_connection(url.hostname, url.port)

    async def say(start: int, end: int) -> None:
        for number in range(start, end):
            body = payload(number)
            head = f"POST {url.path}?{url.query} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            length = answer.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
            await reader.readexactly(int(length or 0))
            if not answer.startswith(b"HTTP/1.1 20"):
                raise RuntimeError(f"answered {answer.splitlines()[0].decode()}")

    try:
        return await speak(say, tokens, rate)
    finally:
        writer.close()


WAYS: dict[str, Callable[[str, int, float], Awaitable[float]]] = {
    "log": to_log,
    "events": to_log_singly,
    "stream": to_stream,
    "post": to_url,
}

if __name__ == "__main__":
    _, way, where, tokens, rate = sys.argv
    print(json.dumps({"late": uvloop.run(WAYS[way](where, int(tokens), float(rate)))}))
