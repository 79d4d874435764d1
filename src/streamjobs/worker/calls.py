"""Running one function of the user's: async in a task, sync in a thread, within a timeout.

Rule 1: whatever it raises, and that it took too long, is an answer; only the cancellation of the caller's own
task is raised.
Rule 2: what ignores its cancellation is left behind, and counted. A thread cannot be killed: past its timeout
it is abandoned, and replaced as long as not too many hang.

A function runs under a guard that catches everything, so a `CancelledError` that it raises by itself is told
from ours, and a `SystemExit` does not reach the event loop.

Rejected: `ThreadPoolExecutor` (and `asyncio.to_thread` on it) waits for its threads when the process ends, so
one hanging function would keep a drained worker from ending. These threads are daemons.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import queue
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

MAX_THREADS = 64
"""Sync calls that run at once; as many again may hang and be replaced."""

CANCEL_GRACE = 1.0
"""Seconds that a cancelled async function has for its clean-up before it is left behind."""


class Returned(NamedTuple):
    """The function returned."""

    value: Any


class Raised(NamedTuple):
    """The function raised."""

    error: BaseException


class TimedOut(NamedTuple):
    """The function did not end in time; `why` is what more there is to say of it."""

    why: str


CallResult = Returned | Raised | TimedOut


async def call(function: Callable[[], Any], *, is_async: bool, timeout: float | None = None) -> CallResult:
    """Run a function of no arguments to its end, or for `timeout` seconds.

    Raises `CancelledError` when the calling task is cancelled, and nothing else.
    """
    return await (_run_async if is_async else _run_in_thread)(function, timeout)


async def _run_async(function: Callable[[], Awaitable[Any]], timeout: float | None) -> CallResult:
    task = asyncio.create_task(_guarded_async(function))
    try:
        done, _ = await asyncio.wait({task}, timeout=timeout)
        if done:
            return task.result()
    finally:
        await _stop(task)
    return TimedOut("" if task.done() else "; it ignores its cancellation and still runs")


async def _stop(task: asyncio.Task[CallResult]) -> None:
    """Cancel a function's task and give it the grace; if that is not enough, leave it behind."""
    if task.done():
        return
    _abandoned_tasks.add(task)
    task.add_done_callback(_abandoned_tasks.discard)
    task.cancel()
    await asyncio.wait({task}, timeout=CANCEL_GRACE)


async def _run_in_thread(function: Callable[[], Any], timeout: float | None) -> CallResult:
    variables = contextvars.copy_context()
    future = _threads.submit(lambda: variables.run(_guarded, function))
    waiter = asyncio.wrap_future(future)
    try:
        done, _ = await asyncio.wait({waiter}, timeout=timeout)
        if done:
            return waiter.result()
    finally:
        waiter.cancel()
        has_run = _threads.abandon(future)
    if has_run:
        return TimedOut("; its thread cannot be stopped and still runs")
    return TimedOut(f": no thread was free, {abandoned_calls()} hang in calls that timed out")


async def _guarded_async(function: Callable[[], Awaitable[Any]]) -> CallResult:
    try:
        return Returned(await function())
    except BaseException as error:  # noqa: BLE001 - rule 1: whatever it raises is an answer
        return Raised(error)


def _guarded(function: Callable[[], Any]) -> CallResult:
    try:
        return Returned(function())
    except BaseException as error:  # noqa: BLE001 - rule 1: whatever it raises is an answer
        return Raised(error)


class _Threads:
    """Daemon threads that take calls from one queue; started when needed, kept, bounded."""

    def __init__(self, limit: int = MAX_THREADS) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._started = 0
        self._hanging: set[Future[Any]] = set()

    @property
    def hanging(self) -> int:
        """Calls that were given up and still run."""
        return len(self._hanging)

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        """Run a call, which never raises, as soon as a thread is free."""
        future: Future[Any] = Future()
        self._calls.put((future, call))
        with self._lock:
            may_start = self._started < self._limit + min(len(self._hanging), self._limit)
            if may_start and not self._idle.acquire(blocking=False):
                with contextlib.suppress(RuntimeError):  # the system has no thread left: wait for one of ours
                    threading.Thread(target=self._work, name=f"tool-{self._started}", daemon=True).start()
                    self._started += 1
        return future

    def abandon(self, call: Future[Any]) -> bool:
        """Give a call up. False if it never began, and so never will; one that runs is counted to its end."""
        if call.cancel():
            return False
        with self._lock:
            self._hanging.add(call)
        call.add_done_callback(self._forget)  # at once, if it is done
        return True

    def _forget(self, call: Future[Any]) -> None:
        with self._lock:
            self._hanging.discard(call)

    def _work(self) -> None:
        while True:
            try:
                future, call = self._calls.get_nowait()
            except queue.Empty:
                self._idle.release()
                future, call = self._calls.get()
            if future.set_running_or_notify_cancel():
                future.set_result(call())
            del future, call  # keep no result while waiting


_threads = _Threads()
_abandoned_tasks: set[asyncio.Task[Any]] = set()


def abandoned_calls() -> int:
    """Calls of this process that were given up and still run; a number that grows means a broken tool."""
    return _threads.hanging + len(_abandoned_tasks)


def abandoned_tasks() -> frozenset[asyncio.Task[Any]]:
    """The async calls among them."""
    return frozenset(_abandoned_tasks)
