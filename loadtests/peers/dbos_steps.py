"""DBOS Transact for Python on a private Postgres.

As a child: `python -m loadtests.peers.dbos_steps work`, or `... submit <first> <count> <rate>`. Environment:
LOADTEST_DBOS_URL, LOADTEST_MARKS.

Tuned: async workflows and steps on uvloop, a queue without limits that is polled every 10 ms (its default is
a second, and submit-to-started cannot be less), a connection for each thread that waits for one, no pings of
the pool. Two executor threads were slower, its default of 64 was no faster and later to start. The client
talks to the database, as its documentation says; there is no call for many workflows at once.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, ClassVar

from loadtests import pacing, postgres_server
from loadtests.bench import Bench
from loadtests.pacing import Plan, Submitted
from loadtests.peers.peer import installed_version, missing_package
from loadtests.processes import Child, RunError, python
from loadtests.step_system import READY_TIMEOUT, Outcome, Site, StepSystem

URL = "LOADTEST_DBOS_URL"
QUEUE, WORKFLOW, RELEASE = "steps", "ten-steps", "1"
POLLING_INTERVAL = 0.01
THREADS = 8
CONNECTIONS = 20
CLIENTS = 8
RECORDED = """
    SELECT w.workflow_uuid, w.completed_at, count(*)
    FROM dbos.workflow_status w JOIN dbos.operation_outputs o ON o.workflow_uuid = w.workflow_uuid
    WHERE w.status = 'SUCCESS' AND w.workflow_uuid = ANY(%s) GROUP BY 1, 2
"""


class DbosSteps(StepSystem):
    """DBOS's workflows and steps, submitted to a queue."""

    name: ClassVar[str] = "DBOS"
    store: ClassVar[str] = "postgres"
    tuning: ClassVar[str] = (
        f"async workflow and steps, uvloop, a queue without limits, polled every {1000 * POLLING_INTERVAL:g} "
        f"ms, {THREADS} executor threads, pool of {CONNECTIONS} without pings; Postgres with fsync, "
        "synchronous_commit and full_page_writes off"
    )

    def prepare(self) -> str | None:
        return missing_package("dbos") or postgres_server.missing()

    def version(self) -> str:
        return f"{installed_version('dbos')} (Postgres {postgres_server.version()})"

    @contextmanager
    def opened(self, bench: Bench) -> Iterator[Site]:
        with postgres_server.fresh_postgres("dbos") as server:
            yield Site(server.url, server.child)

    def env(self, site: Site) -> dict[str, str]:
        return {URL: site.url}

    def worker_command(self) -> list[str]:
        return python("-m", "loadtests.peers.dbos_steps", "work")

    def submit_command(self, plan: Plan) -> list[str]:
        return python("-m", "loadtests.peers.dbos_steps", "submit", *plan.arguments())

    def get_ready(self, site: Site, worker: Child) -> None:
        """Wait until the worker has made its tables and registered its queue."""
        deadline = time.monotonic() + READY_TIMEOUT
        while "ready" not in worker.output():
            worker.require_alive()
            if time.monotonic() > deadline:
                raise RunError(f"the DBOS worker did not get ready: {worker.tail()}")
            time.sleep(0.05)

    def outcomes(self, site: Site, ids: Sequence[str]) -> dict[str, Outcome]:
        import psycopg

        with psycopg.connect(site.url) as connection:
            rows: list[Any] = connection.execute(RECORDED, [list(ids)]).fetchall()
        return {name: Outcome(ended_ms / 1000, steps) for name, ended_ms, steps in rows}


async def work() -> None:
    """Be the worker."""
    from dbos import DBOS

    from loadtests.marks import Pen

    pen = Pen()
    DBOS(
        config={
            "name": "steps",
            "system_database_url": os.environ[URL],
            "application_version": RELEASE,
            "sys_db_pool_size": CONNECTIONS,
            "max_executor_threads": THREADS,
            "db_engine_kwargs": {"pool_pre_ping": False},
            "log_level": "WARNING",
        }
    )

    @DBOS.step()
    async def add(number: int) -> int:
        return number

    @DBOS.workflow(name=WORKFLOW)
    async def ten_steps(number: int) -> int:
        pen.begin(number)
        total = 0
        for i in range(10):
            total += await add(number + i)
        pen.end(number)
        return total

    DBOS.launch()
    await DBOS.register_queue_async(QUEUE, polling_interval_sec=POLLING_INTERVAL)
    print("ready", flush=True)
    await asyncio.Event().wait()


async def submit(plan: Plan) -> Submitted:
    """Be the submitter: `enqueue` of the client, in threads, as its own async form does."""
    from dbos import DBOSClient

    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(CLIENTS))
    client = DBOSClient(system_database_url=os.environ[URL], system_database_pool_size=CLIENTS)

    async def one(number: int) -> str:
        options: Any = {
            "workflow_name": WORKFLOW,
            "queue_name": QUEUE,
            "workflow_id": str(number),
            "app_version": RELEASE,
        }
        handle: Any = await client.enqueue_async(options, number)
        return handle.get_workflow_id()

    try:
        return await pacing.submit_all(plan, one)
    finally:
        client.destroy()


if __name__ == "__main__":
    if sys.argv[1] == "work":
        import uvloop

        uvloop.run(work())
    else:
        pacing.run(submit)
