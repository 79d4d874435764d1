"""Restate: its server from npm, its Node SDK; installed once into an ignored folder of the repository.

As a child: `python -m loadtests.peers.restate_steps <first> <count> <rate>` submits over the server's HTTP
ingress. Environment: LOADTEST_RESTATE_INGRESS.

Tuned: one node, no fsync, bidirectional HTTP/2 to the service, the SDK's production mode. Fewer partitions
than its default made no difference that could be told from noise.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

import aiohttp

from loadtests import pacing
from loadtests.bench import Bench
from loadtests.pacing import Plan, Submitted
from loadtests.peers import node
from loadtests.processes import Child, RunError, python, running
from loadtests.redis_server import free_port
from loadtests.step_system import READY_TIMEOUT, Outcome, Site, StepSystem

FOLDER = node.CACHE / "restate"
PACKAGES = ("@restatedev/restate-server@latest", "@restatedev/restate-sdk@latest")
SCRIPT = Path(__file__).with_suffix(".mjs")
INGRESS = "LOADTEST_RESTATE_INGRESS"
OLDEST_NODE = 22
OWN_ENTRIES = 2
"""Commands in a journal beside the steps: input and output."""
RECORDED = (
    "SELECT id, completed_at, journal_commands_size FROM sys_invocation WHERE completion_result = 'success'"
)


class RestateSteps(StepSystem):
    """A Restate service whose handler does ten `ctx.run`s."""

    name: ClassVar[str] = "Restate"
    store: ClassVar[str] = "restate-server"
    tuning: ClassVar[str] = "one node, no fsync; a Node service over HTTP/2; submitted with HTTP /send"

    def __init__(self) -> None:
        self._ingress = self._admin = ""
        self._port = 0

    def prepare(self) -> str | None:
        why = node.missing(FOLDER, PACKAGES)
        if why is None and int(node.node_version().partition(".")[0]) < OLDEST_NODE:
            why = f"its SDK needs node {OLDEST_NODE}, this is {node.node_version()}"
        return why or (None if _server() else "npm has no restate-server binary for this machine")

    def version(self) -> str:
        server, sdk = (
            node.package_version(FOLDER, f"@restatedev/restate-{name}") for name in ("server", "sdk")
        )
        return f"{server} (SDK {sdk}, node {node.node_version()})"

    @contextmanager
    def opened(self, bench: Bench) -> Iterator[Site]:
        ports = {name: free_port() for name in ("ingress", "admin", "fabric")}
        self._ingress = f"http://127.0.0.1:{ports['ingress']}"
        self._admin = f"http://127.0.0.1:{ports['admin']}"
        self._port = free_port()
        with (
            tempfile.TemporaryDirectory(prefix="loadtests-restate-") as folder,
            running(
                "restate-server", [str(_server()), "--no-logo", "--base-dir", folder], _settings(ports)
            ) as server,
        ):
            yield Site(self._ingress, server)

    def env(self, site: Site) -> dict[str, str]:
        return {
            INGRESS: site.url,
            "LOADTEST_NODE_MODULES": str(FOLDER),
            "LOADTEST_PORT": str(self._port),
            "NODE_ENV": "production",
            "RESTATE_LOGGING": "ERROR",
        }

    def worker_command(self) -> list[str]:
        return [*node.node(), str(SCRIPT)]

    def submit_command(self, plan: Plan) -> list[str]:
        return python("-m", "loadtests.peers.restate_steps", *plan.arguments())

    def get_ready(self, site: Site, worker: Child) -> None:
        """Register the service, as soon as both sides listen."""
        deadline = time.monotonic() + READY_TIMEOUT
        while True:
            worker.require_alive()
            site.store.require_alive()
            try:
                self._ask("/deployments", {"uri": f"http://127.0.0.1:{self._port}"})
            except (urllib.error.URLError, OSError) as error:
                if time.monotonic() > deadline:
                    raise RunError(
                        f"the service could not be registered: {error}: {site.store.tail()}"
                    ) from None
                time.sleep(0.1)
            else:
                return

    def outcomes(self, site: Site, ids: Sequence[str]) -> dict[str, Outcome]:
        rows = self._ask("/query", {"query": RECORDED})["rows"]
        wanted = set(ids)
        return {
            row["id"]: Outcome(
                datetime.fromisoformat(row["completed_at"]).timestamp(),
                row["journal_commands_size"] - OWN_ENTRIES,
            )
            for row in rows
            if row["id"] in wanted
        }

    def _ask(self, path: str, body: dict[str, str]) -> Any:
        headers = {"content-type": "application/json", "accept": "application/json"}
        request = urllib.request.Request(self._admin + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=10) as response:
            return json.loads(response.read())


def _server() -> Path | None:
    """Return the binary, which npm puts into a package for each platform."""
    return next((FOLDER / "node_modules" / "@restatedev").glob("restate-server-*/bin/restate-server"), None)


def _settings(ports: dict[str, int]) -> dict[str, str]:
    """Return the server's settings, as environment variables."""
    return {
        "DO_NOT_TRACK": "1",
        "RESTATE_DISABLE_TELEMETRY": "true",
        "RESTATE_ADMIN__DISABLE_WEB_UI": "true",
        "RESTATE_LOG_FILTER": "warn",
        "RESTATE_LOG_DISABLE_ANSI_CODES": "true",
        "RESTATE_LISTEN_MODE": "tcp",
        "RESTATE_INGRESS__BIND_ADDRESS": f"127.0.0.1:{ports['ingress']}",
        "RESTATE_ADMIN__BIND_ADDRESS": f"127.0.0.1:{ports['admin']}",
        "RESTATE_BIND_ADDRESS": f"127.0.0.1:{ports['fabric']}",
        "RESTATE_LOG_SERVER__ROCKSDB_DISABLE_WAL_FSYNC": "true",
    }


async def submit(plan: Plan) -> Submitted:
    """Be the submitter: one-way calls, answered when the server has them."""
    url = f"{os.environ[INGRESS]}/steps/ten/send"
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:

        async def one(number: int) -> str:
            async with session.post(url, json=number) as response:
                response.raise_for_status()
                return (await response.json())["invocationId"]

        return await pacing.submit_all(plan, one)


if __name__ == "__main__":
    pacing.run(submit)
