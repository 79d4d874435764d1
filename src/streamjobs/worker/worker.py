"""A worker process: takes jobs while it has room, runs them, gives them back in order.

Rule 1: it is stateless: whatever it knows can be lost at any instant.
Rule 2: every loop survives Redis being away, without a hot loop.
Rule 3: SIGTERM drains: stop taking, let end what ends within the grace, hand back the rest. It ends within
a bound also when Redis is away or a job's code ignores its cancellation.
Rule 4: a loop that fails ends the worker: one that renews leases and writes nothing is worse than none.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import time
from collections import Counter
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import structlog

from streamjobs import metrics
from streamjobs.app import App
from streamjobs.errors import StreamjobsError
from streamjobs.llm import Providers
from streamjobs.safe_client import SafeClient
from streamjobs.store import Clock, Lease, Renewal, Store, Taken, WorkerInfo, jitter
from streamjobs.store.keys import partition_of_job
from streamjobs.store.sweeper import Sweeper
from streamjobs.worker.calls import abandoned_tasks
from streamjobs.worker.execution import Execution, Services
from streamjobs.worker.isolation.processes import ToolProcesses
from streamjobs.worker.leases import LeaseKeeper, LeaseKey
from streamjobs.worker.recorder import Committer

log = structlog.get_logger(__name__)

_FAILURE_CAP = 2.0
_SHARES = 4
"""Slots are filled in so many takes."""
_ENOUGH_ROOM = 8
_GATHER = 0.02
"""A busy worker takes again when an eighth of its slots is free, or this much later: fewer, fuller takes."""

_HAND_BACK = 5.0
"""Seconds for the last appends of a drain, beyond what code has to end."""

_STOP_TIMEOUT = 3.0


def new_worker_id() -> str:
    """Host, process and chance: readable, and never the same twice."""
    host = "".join(c if c.isalnum() or c in ".-" else "-" for c in socket.gethostname())[:40]
    return f"{host}-{os.getpid()}-{secrets.token_hex(3)}"


class Worker:
    """Runs jobs of some queues until it is drained or cancelled."""

    def __init__(
        self,
        store: Store,
        app: App,
        *,
        queues: Sequence[str] = (),
        queue_limits: Mapping[str, int] = MappingProxyType({}),
        worker_id: str = "",
    ) -> None:
        """`queues` are the ones it works on, by default all.

        `queue_limits` bounds its running jobs of some.
        """
        self.id = worker_id or new_worker_id()
        self._store = store
        self._settings = store.settings
        self._queues = tuple(queues) or self._settings.queues
        SafeClient(self._settings)  # raises now what would fail in every tool
        self._queue_limits = {name: limit for name, limit in queue_limits.items() if name in self._queues}
        self._running_of: Counter[str] = Counter()
        self._struck: frozenset[str] = frozenset()
        self._app = app
        self._clock = Clock(lambda: time.monotonic_ns() // 1_000_000)
        self._executions: dict[LeaseKey, Execution] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._left_behind: set[asyncio.Task[Any]] = set()
        self._numbers = dict.fromkeys(store.partitions, 1)
        self._rotation = 0
        self._slot_freed = asyncio.Event()
        self._draining = asyncio.Event()
        self._processed = 0
        self._started_ms = 0

    @property
    def running(self) -> int:
        """How many jobs it runs now."""
        return len(self._executions)

    def drain(self) -> None:
        """Stop taking; let what ends within the grace end, hand back the rest, then `run` returns."""
        self._draining.set()
        self._slot_freed.set()
        for execution in tuple(self._executions.values()):
            execution.nudge()

    async def run(self) -> None:
        """Work until drained. Cancelling drops everything at once, as kill -9 does.

        Raises `StoreUnavailable` where Redis cannot be reached at the start, and `Invalid` for a schedule of
        the App that does not fit the settings, as one of an unknown queue, or an isolated tool that another
        process would not find.
        """
        processes = ToolProcesses(self._app.tools, self._settings)
        metrics.JOBS_RUNNING.set_function(lambda: self.running)
        self._clock.set(await self._store.now_ms())
        await self._store.schedules.declare(self._app.name, self._app.schedules.values())
        self._started_ms = self._clock.now_ms()
        providers = Providers(self._settings)
        committers = {p: Committer(self._store.work, p, self._settings) for p in self._store.partitions}
        services = Services(
            self._store,
            self._app,
            self._settings,
            providers,
            self._clock,
            committers,
            self._draining.is_set,
            self._left_behind,
            self._is_struck,
            processes,
        )
        keeper = LeaseKeeper(self._settings, self._on_renewals, plain=self._store.is_plain)
        loops = [asyncio.create_task(loop, name=name) for name, loop in self._loops(committers)]
        keeper.start()
        processes.warm()
        work = asyncio.create_task(self._work(services, keeper), name="take")
        try:
            done, _ = await asyncio.wait({work, *loops}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            await self._stop_everything({work, *loops}, keeper, providers, processes)

    async def _work(self, services: Services, keeper: LeaseKeeper) -> None:
        await self._take_until_drained(services, keeper)
        await self._finish_running()

    def _loops(self, committers: dict[int, Committer]) -> list[tuple[str, Coroutine[Any, Any, None]]]:
        return [
            *((f"commit {partition}", committer.run()) for partition, committer in committers.items()),
            ("sweep", Sweeper(self._store).run()),
            ("heartbeat", self._beat()),
            ("inbox", self._hear_of_inboxes()),
            ("strikes", self._watch_strikes()),
        ]

    async def _stop_everything(
        self,
        loops: set[asyncio.Task[None]],
        keeper: LeaseKeeper,
        providers: Providers,
        processes: ToolProcesses,
    ) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_STOP_TIMEOUT)
        await cancel_all(loops)
        await keeper.aclose()
        await providers.aclose()
        await processes.aclose()
        with contextlib.suppress(StreamjobsError):
            await self._store.workers.leave(self.id)
        disown(self._left_behind | abandoned_tasks())

    # --- taking

    async def _take_until_drained(self, services: Services, keeper: LeaseKeeper) -> None:
        waiter = self._store.blocking(self._settings.take_block)
        failures = 0
        while not self._draining.is_set():
            try:
                await self._room()
                ends = await self._take_everywhere(services, keeper)
                failures = 0
                if ends or self._is_limited:
                    await self._for_tickets(waiter, ends)
            except StreamjobsError as error:
                failures += 1
                if failures == 1:
                    log.warning("take.failed", error=str(error))
                await self._until_drained(
                    asyncio.sleep(jitter(min(_FAILURE_CAP, 0.1 * 2 ** min(failures, 6))))
                )

    async def _room(self) -> None:
        """Wait for a free slot, and when busy a moment longer for more of them."""
        if self._settings.concurrency - self.running >= self._enough():
            return
        await self._free_slots(1)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GATHER):
                await self._free_slots(self._enough())

    def _enough(self) -> int:
        return max(1, self._settings.concurrency // _ENOUGH_ROOM)

    async def _free_slots(self, enough: int) -> None:
        while self._settings.concurrency - self.running < enough and not self._draining.is_set():
            self._slot_freed.clear()
            await self._slot_freed.wait()

    async def _take_everywhere(self, services: Services, keeper: LeaseKeeper) -> dict[str, str]:
        """Take from each partition in turn; returns where the streams end, nothing if there may be more."""
        partitions = list(self._store.partitions)
        self._rotation = (self._rotation + 1) % len(partitions)
        ends: dict[str, str] = {}
        is_dry = True
        for partition in (*partitions[self._rotation :], *partitions[: self._rotation]):
            for queues in self._groups:
                wanted = self._room_for(queues)
                if self._draining.is_set() or self._settings.concurrency <= self.running:
                    return {}
                if wanted <= 0:
                    continue
                taken = await self._take(partition, wanted, queues)
                for lease in taken.leases:
                    self._execute(lease, services, keeper)
                is_dry = is_dry and bool(taken.ends)
                ends |= taken.ends
        return ends if is_dry else {}

    @property
    def _groups(self) -> list[tuple[str, ...]]:
        """Queues that are taken from together: those without a limit of their own, and each that has one."""
        shared = tuple(name for name in self._queues if name not in self._queue_limits)
        return [*([shared] if shared else []), *((name,) for name in self._queue_limits)]

    def _room_for(self, queues: tuple[str, ...]) -> int:
        """How many jobs one take may bring.

        Never all slots at once: some jobs run while others are on their way to Redis or back.
        """
        room = min(self._settings.concurrency - self.running, max(1, self._settings.concurrency // _SHARES))
        if queues[0] in self._queue_limits:
            room = min(room, self._queue_limits[queues[0]] - self._running_of[queues[0]])
        return room

    @property
    def _is_limited(self) -> bool:
        """Whether a queue is at its own limit: its next free slot must be heard of."""
        return any(self._running_of[name] >= limit for name, limit in self._queue_limits.items())

    async def _take(self, partition: int, wanted: int, queues: tuple[str, ...]) -> Taken:
        """One take; the number is used up only by an answer, so that a lost reply loses no job."""
        taken = await self._store.work.take(partition, self.id, self._numbers[partition], wanted, queues)
        self._numbers[partition] += 1
        self._clock.set(taken.now_ms)
        metrics.JOBS_TAKEN.inc(len(taken.leases))
        for failure in taken.failures:
            log.error("take.ticket_failed", error=failure)
        return taken

    def _execute(self, lease: Lease, services: Services, keeper: LeaseKeeper) -> None:
        key = (lease.job_id, lease.epoch)
        execution = Execution(lease, services, services.committers[partition_of_job(lease.job_id)])
        self._executions[key] = execution
        self._running_of[lease.queue] += 1
        keeper.add(*key)
        task = asyncio.create_task(execution.run(), name=lease.job_id)
        self._tasks.add(task)

        def done(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            self._executions.pop(key, None)
            self._running_of[lease.queue] -= 1
            keeper.remove(*key)
            self._processed += 1
            self._slot_freed.set()
            if not task.cancelled() and task.exception() is not None:
                log.error("job.crashed_execution", job_id=lease.job_id, exc_info=task.exception())

        task.add_done_callback(done)

    async def _for_tickets(self, waiter: Any, ends: dict[str, str]) -> None:
        """Wait for new tickets; where a queue is at its limit, not longer than until a job of it ends."""
        block = jitter(self._settings.take_block)
        tickets = self._store.work.wait_for_tickets(waiter, ends, block) if ends else asyncio.sleep(block)
        if self._is_limited:
            self._slot_freed.clear()
            tickets = _first_of(tickets, self._slot_freed.wait())
        await self._until_drained(tickets)

    async def _until_drained(self, waiting: Coroutine[Any, Any, Any]) -> None:
        """Wait for `waiting`, but not longer than until the drain begins."""
        task = asyncio.ensure_future(waiting)
        drained = asyncio.ensure_future(self._draining.wait())
        try:
            await asyncio.wait({task, drained}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            drained.cancel()
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        if not task.cancelled():
            task.result()

    # --- draining

    async def _finish_running(self) -> None:
        if not self._tasks:
            return
        log.info("worker.draining", running=self.running, grace=self._settings.drain_grace)
        await asyncio.wait(self._tasks, timeout=self._settings.drain_grace)
        for execution in list(self._executions.values()):
            execution.stop("yield")
        if self._tasks:
            _, left = await asyncio.wait(
                self._tasks, timeout=min(self._settings.cancel_timeout, self._settings.lease) + _HAND_BACK
            )
            if left:
                log.error("worker.not_handed_back", jobs=len(left))

    # --- leases and news from outside

    def _on_renewals(self, now_ms: int, renewals: list[tuple[LeaseKey, Renewal]]) -> None:
        self._clock.set(now_ms)
        for key, renewal in renewals:
            execution = self._executions.get(key)
            if execution is None:
                continue
            if renewal.held:
                execution.journal.note(renewal.inbox, renewal.asked)
            else:
                self._on_lost(execution)

    def _on_lost(self, execution: Execution) -> None:
        if execution.is_ending:  # its last batch says itself what became of it
            return
        metrics.LEASES_LOST.inc()
        log.warning("lease.lost", job_id=execution.lease.job_id)
        execution.stop("fenced")

    async def _hear_of_inboxes(self) -> None:
        """Hints only make hearing faster: each append and renewal carries the same."""
        heard: set[str] = set()
        is_heard = asyncio.Event()

        def hear(job_id: str) -> None:
            heard.add(job_id)
            is_heard.set()

        await self._store.live.on_inbox(self._store.partitions, hear)
        while True:
            await is_heard.wait()
            is_heard.clear()
            keys = [key for key in self._executions if key[0] in heard]
            heard.clear()
            await self._ask(keys)

    async def _ask(self, keys: Sequence[LeaseKey]) -> None:
        """Renew leases of jobs that something came in for.

        The answer says what. A storm of hints is one call.
        """
        by_partition: dict[int, list[LeaseKey]] = {}
        for key in keys:
            by_partition.setdefault(partition_of_job(key[0]), []).append(key)
        for partition, some in by_partition.items():
            with contextlib.suppress(StreamjobsError):
                now_ms, renewals = await self._store.work.renew(partition, some)
                self._on_renewals(now_ms, list(zip(some, renewals, strict=True)))

    def _is_struck(self, tool: str) -> bool:
        return tool in self._struck

    async def _watch_strikes(self) -> None:
        """Know which tools an operator has struck; those that wait for one look again by themselves."""
        while True:
            with contextlib.suppress(StreamjobsError):
                strikes = await self._store.strikes.all()
                self._struck = frozenset(strike.name for strike in strikes if strike.scope == "tool")
            await asyncio.sleep(jitter(self._settings.sweep_interval))

    async def _beat(self) -> None:
        while True:
            with contextlib.suppress(StreamjobsError):
                await self._store.workers.beat(self._info())
            await asyncio.sleep(jitter(self._settings.worker_ttl / 4))

    def _info(self) -> WorkerInfo:
        return WorkerInfo(
            id=self.id,
            host=socket.gethostname(),
            pid=os.getpid(),
            queues=list(self._queues),
            concurrency=self._settings.concurrency,
            running=self.running,
            processed=self._processed,
            started_ms=self._started_ms,
            heartbeat_ms=self._clock.now_ms(),
            draining=self._draining.is_set(),
        )


async def _first_of(*waits: Coroutine[Any, Any, Any]) -> None:
    """Wait for the first of several; the others are cancelled."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def cancel_all(tasks: set[asyncio.Task[None]]) -> None:
    """Cancel tasks until they end: on Python 3.11 `wait_for`, and so redis-py, may swallow a cancellation."""
    deadline = time.monotonic() + _STOP_TIMEOUT
    while tasks and time.monotonic() < deadline:
        for task in tasks:
            task.cancel()
        _, tasks = await asyncio.wait(tasks, timeout=0.1)


def disown(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Make the event loop forget tasks that ignore their cancellation: `asyncio.run` would wait for them."""
    for task in tasks:
        if not task.done():
            asyncio.tasks._unregister_task(task)  # pyright: ignore[reportPrivateUsage, reportUnknownMemberType, reportAttributeAccessIssue]
