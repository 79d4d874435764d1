"""A private Postgres for one measurement: a free loopback port, a folder of its own, gone afterwards.

Rule 1: an existing Postgres is never used or touched.
Rule 2: it is as fast as it can be: nothing waits for a disk, as nothing in our Redis does.
Rule 3: Postgres refuses to run as root; then it runs as the system's `postgres` or `nobody`.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loadtests.processes import Child, RunError, running
from loadtests.redis_server import free_port

SETTINGS = (
    "fsync=off", "synchronous_commit=off", "full_page_writes=off", "shared_buffers=256MB",
    "max_connections=200", "listen_addresses=127.0.0.1", "unix_socket_directories=",
)  # fmt: skip
INSTALLED = Path("/usr/lib/postgresql")
"""Where Debian keeps what is not on the PATH."""
ACCOUNTS = ("postgres", "nobody")
START_TIMEOUT = 20.0


@dataclass(frozen=True)
class Postgres:
    """A running server: the URL of a database in it, and its process."""

    url: str
    child: Child


def find_binaries() -> Path | None:
    """Return the folder with `initdb` and `postgres`: the PATH's, else that of the newest package."""
    found = shutil.which("initdb")
    packaged = [folder / "bin" for folder in INSTALLED.glob("*") if (folder / "bin" / "initdb").exists()]
    if found:
        return Path(found).parent
    return max(packaged, key=lambda folder: float(folder.parent.name), default=None)


def missing() -> str | None:
    """Return a reason if no private Postgres can run here, else None."""
    if find_binaries() is None:
        return "no `initdb` on the PATH or below /usr/lib/postgresql"
    if os.geteuid() == 0 and (_account() is None or shutil.which("setpriv") is None):
        return "Postgres does not run as root, and there is no `setpriv` or no account `postgres` or `nobody`"
    return None


def version() -> str:
    """Return the server's version, such as `15.18`."""
    ran = subprocess.run([_binary("postgres"), "--version"], capture_output=True, text=True, check=True)
    return next((word for word in ran.stdout.split() if word[0].isdigit()), ran.stdout.strip())


def _binary(name: str) -> str:
    folder = find_binaries()
    assert folder is not None, "missing() has found it"
    return str(folder / name)


def _account() -> pwd.struct_passwd | None:
    for name in ACCOUNTS:
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    return None


def _demoted(argv: list[str]) -> list[str]:
    """The command as another user, where this one is root."""
    account = _account()
    if os.geteuid() != 0 or account is None:
        return argv
    ids = [f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups"]
    return ["setpriv", *ids, *argv]


@contextlib.contextmanager
def fresh_postgres(database: str) -> Iterator[Postgres]:
    """Make a cluster in a temporary folder and run it; whoever connects first makes the database."""
    with tempfile.TemporaryDirectory(prefix="loadtests-postgres-") as folder:
        account = _account()
        if os.geteuid() == 0 and account is not None:
            os.chown(folder, account.pw_uid, account.pw_gid)
        data = str(Path(folder) / "data")
        _initialise(data)
        port = free_port()
        options = [word for setting in SETTINGS for word in ("-c", setting)]
        argv = _demoted([_binary("postgres"), "-D", data, "-p", str(port), *options])
        with running("postgres", argv) as child:
            _wait_until_ready(child)
            yield Postgres(f"postgresql://postgres@127.0.0.1:{port}/{database}", child)


def _initialise(data: str) -> None:
    argv = [_binary("initdb"), "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C"]
    ran = subprocess.run(
        _demoted([*argv, "--no-sync"]), cwd="/", capture_output=True, text=True, timeout=60, check=False
    )
    if ran.returncode != 0:
        raise RunError(f"initdb failed: {' '.join(ran.stderr[-300:].split())}")


def _wait_until_ready(child: Child) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        child.require_alive()
        if "ready to accept connections" in child.output():
            return
        time.sleep(0.02)
    raise RunError(f"postgres was not ready within {START_TIMEOUT:.0f} s: {child.tail()}")
