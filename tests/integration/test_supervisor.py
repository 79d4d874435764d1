"""The supervisor of several gateway processes, with small programs in their place: who is replaced, when, and
what all of it ends with."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from streamjobs.config import Settings
from streamjobs.gateway import ports, supervisor
from streamjobs.gateway.ports import Port
from streamjobs.gateway.supervisor import Fleet
from tests.conftest import wait_until

PROGRAM = """
import json, os, signal, socket, sys, threading, time
channel = socket.socket(fileno=int(sys.argv[1]))
orders = json.loads(channel.makefile().readline())
slot = os.environ["STREAMJOBS_SERVE_SLOT"]
started = os.path.join(os.environ["PROMETHEUS_MULTIPROC_DIR"], "started")
with open(started, "a") as file:
    file.write(slot)
with open(started) as file:
    count = file.read().count(slot)  # of starts in this slot
def ready():
    channel.send(b"r")
def answer():
    "Say who this is to whoever connects."
    listener = socket.socket(fileno=orders["listeners"][0])
    listener.setblocking(True)
    def loop():
        while True:
            client, _ = listener.accept()
            client.sendall(slot.encode())
            client.close()
    threading.Thread(target=loop, daemon=True).start()
def until_told():
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
exec(orders["app"])
"""


class Run:
    """A fleet that runs, in this loop."""

    def __init__(self, fleet: Fleet, task: asyncio.Task[int]) -> None:
        self.fleet = fleet
        self.task = task

    @property
    def starts(self) -> str:
        """The slots in the order in which programs started in them."""
        file = Path(self.fleet.folder, "started")
        return file.read_text() if file.exists() else ""

    def pid(self, slot: int) -> int:
        process = self.fleet.slots[slot].process
        return 0 if process is None or not process.is_serving else process.pid

    async def all_serve(self) -> None:
        await wait_until(lambda: all(slot.is_serving for slot in self.fleet.slots), 90)

    async def status(self) -> int:
        async with asyncio.timeout(90):
            return await self.task


@contextlib.asynccontextmanager
async def running(folder: Path, program: str, count: int = 2, **changes: object) -> AsyncIterator[Run]:
    """A fleet whose processes do what `program` says."""
    settings = Settings(serve_workers=count, **{"port": 0} | changes)  # pyright: ignore[reportArgumentType]
    command = [sys.executable, "-S", "-c", PROGRAM]
    port = Port(settings, 0)
    fleet = Fleet(settings, textwrap.dedent(program), command, [port], str(folder))
    run = Run(fleet, asyncio.create_task(fleet.run()))
    try:
        yield run
    finally:
        run.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await run.task
        port.close()


async def who_answers(run: Run) -> str:
    """The slot of the process that takes a connection; empty where nobody listens."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", run.fleet.ports[0].number)
    except ConnectionError:
        return ""
    try:
        return (await reader.read()).decode()
    finally:
        writer.close()


def is_alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def freeze(pid: int) -> None:
    """Stop a process, and wait until it has: until then it may still take a connection."""
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)


# --- starting


async def test_what_stops_the_first_from_starting_ends_all(tmp_path: Path):
    """A wrong setting would be printed once a process, and again for ever."""
    async with running(tmp_path, "sys.exit(7)", 3) as run:
        assert await run.status() == 7
        assert run.starts == "0"


async def test_one_that_leaves_before_it_serves_is_no_success(tmp_path: Path):
    """An orchestrator that reads the status would think that all is well."""
    async with running(tmp_path, "sys.exit(0)") as run:
        assert await run.status() == 1


async def test_being_told_while_starting_is_a_clean_end(tmp_path: Path):
    """A rollout that is taken back at once would be reported as a crash."""
    program = "signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM}); time.sleep(60)"
    async with running(tmp_path, program) as run:
        await wait_until(lambda: run.starts, 90)
        run.fleet.stop(signal.SIGINT)
        assert await run.status() == 0


async def test_a_start_that_fails_while_others_serve_is_tried_again(tmp_path: Path):
    """One process that meets Redis's outage would take down those whose streams live through it."""
    program = """
        if slot == "1" and count < 3: sys.exit(9)
        ready(); until_told()
    """
    async with running(tmp_path, program) as run:
        await run.all_serve()
        assert run.starts == "0111"
        run.fleet.stop(signal.SIGTERM)
        assert await run.status() == 0


# --- replacing


async def test_one_that_dies_is_replaced_on_the_same_socket(tmp_path: Path):
    """What had connected to it, and every connection that hashes to its socket, would be lost."""
    async with running(tmp_path, "ready(); answer(); until_told()") as run:
        await run.all_serve()
        killed = run.pid(0)
        freeze(killed)  # from now on nobody takes what comes to its socket
        asked = [asyncio.create_task(who_answers(run)) for _ in range(40)]
        await wait_until(lambda: sum(task.done() for task in asked) > 0)
        os.kill(killed, signal.SIGKILL)
        answers = await asyncio.wait_for(asyncio.gather(*asked), 90)
        assert set(answers) == {"0", "1"}
        assert run.pid(0) != killed
        assert run.starts == "010"


async def test_a_slot_that_waits_for_its_next_process_gets_no_connections(tmp_path: Path):
    """During a pause one browser in two would hang, though the other process could answer it."""
    program = """
        if slot == "1" and count > 1: sys.exit(9)
        ready(); answer(); until_told()
    """
    async with running(tmp_path, program, serve_restart_cap=600.0) as run:
        await run.all_serve()
        os.kill(run.pid(1), signal.SIGKILL)
        await wait_until(lambda: run.starts.count("1") >= 2 and not run.fleet.slots[1].listens, 90)
        assert {await who_answers(run) for _ in range(30)} == {"0"}


async def test_pauses_grow_up_to_the_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A process that dies as soon as it serves would be started some ten times a second, for ever."""
    paused: list[float] = []

    async def note(seconds: float, waiting: object) -> None:
        paused.append(seconds)
        waiting.close()  # pyright: ignore[reportAttributeAccessIssue]

    monkeypatch.setattr(supervisor, "_within", note)
    program = """
        ready()
        if slot == "1": time.sleep(0.05); sys.exit(3)
        until_told()
    """
    async with running(tmp_path, program, serve_restart_cap=4.0) as run:
        await wait_until(lambda: len(paused) >= 5, 90)
    assert 0.25 <= paused[0] <= 0.5
    assert 0.5 <= paused[1] <= 1.0
    assert 2.0 <= paused[4] <= 4.0
    assert run.starts.count("1") >= len(paused) + 1, "no pause before the first one"


async def test_a_process_that_stands_still_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A loop that is stuck would keep its share of all connections, and no probe would tell."""
    monkeypatch.setattr(supervisor, "BEAT_INTERVAL", 0.1)
    program = """
        ready(); answer()
        if slot == "0" and count == 1: time.sleep(60)
        def beat():
            while True: channel.send(b"."); time.sleep(0.1)
        threading.Thread(target=beat, daemon=True).start()
        until_told()
    """
    async with running(tmp_path, program, serve_hang_timeout=3.0) as run:
        await run.all_serve()
        stuck = run.pid(0)
        await wait_until(lambda: run.pid(0) not in {0, stuck}, 90)
        assert not is_alive(stuck)


# --- ending


async def test_who_still_drains_gets_what_connects(tmp_path: Path):
    """Clients that come back while one process still drains would wait for one that has gone."""
    program = """
        ready(); answer(); until_told()
        if slot == "1": until_told()
    """
    async with running(tmp_path, program) as run:
        await run.all_serve()
        run.fleet.stop(signal.SIGTERM)
        await wait_until(lambda: run.fleet.slots[0].process is None, 90)
        assert {await who_answers(run) for _ in range(30)} == {"1"}
        run.fleet.stop(signal.SIGTERM)
        assert await run.status() == 0
        assert await who_answers(run) == ""


async def test_signals_are_passed_on_as_they_are_and_once(tmp_path: Path):
    """Ctrl-C would wait for the grace, or, heard twice, cut off whom the processes take leave of."""
    program = """
        ready(); first = signal.sigwait({signal.SIGTERM, signal.SIGINT})
        sys.exit(0 if first == signal.SIGINT and not signal.sigpending() else 6)
    """
    async with running(tmp_path, program) as run:
        await run.all_serve()
        assert os.getsid(run.pid(0)) != os.getsid(0), "else a terminal would signal it as well"
        run.fleet.stop(signal.SIGINT)
        assert await run.status() == 0


async def test_an_end_that_went_wrong_shows_in_the_status(tmp_path: Path):
    """A drain that broke off would look like one that worked."""
    async with running(tmp_path, "ready(); until_told(); sys.exit(int(slot) * 5)") as run:
        await run.all_serve()
        run.fleet.stop(signal.SIGTERM)
        assert await run.status() == 5
        assert run.starts == "01", "nothing is started during a drain"


async def test_nothing_is_left_when_the_supervisor_fails(tmp_path: Path):
    """Processes without a supervisor hold the port against the next one."""
    async with running(tmp_path, "ready(); until_told(); time.sleep(60)") as run:
        await run.all_serve()
        pids = [run.pid(0), run.pid(1)]
    assert [is_alive(pid) for pid in pids] == [False, False]


# --- the address


@pytest.mark.parametrize("spreads", [True, False])
async def test_a_port_is_held_against_all_others(spreads: bool, monkeypatch: pytest.MonkeyPatch):
    """Two gateways of different settings would each get half of the requests."""
    monkeypatch.setattr(ports, "SPREADS", spreads and ports.SPREADS)
    with contextlib.closing(Port(Settings(), 0)) as port:
        assert_taken(port.number)
        with port.open(), port.open():
            assert_taken(port.number)
        assert_taken(port.number)
    Port(Settings(), port.number).close()


def assert_taken(number: int) -> None:
    with pytest.raises(OSError, match="in use"):
        Port(Settings(), number)
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", number))
        other.listen()


@pytest.mark.parametrize("spreads", [True, False])
async def test_every_platform_serves_from_several_processes(
    tmp_path: Path, spreads: bool, monkeypatch: pytest.MonkeyPatch
):
    """Where the kernel does not spread connections, all processes must still be able to take them."""
    monkeypatch.setattr(ports, "SPREADS", spreads and ports.SPREADS)
    async with running(tmp_path, "ready(); answer(); until_told()") as run:
        await run.all_serve()
        if spreads:
            assert {await who_answers(run) for _ in range(60)} == {"0", "1"}
        else:  # whoever is quicker: here the one that runs
            freeze(run.pid(0))
            assert {await who_answers(run) for _ in range(10)} == {"1"}
            os.kill(run.pid(0), signal.SIGCONT)
        run.fleet.stop(signal.SIGTERM)
        assert await run.status() == 0


async def test_an_address_of_ipv6_has_brackets():
    with contextlib.closing(Port(Settings(host="::1"), 0)) as port:
        assert port.url == f"http://[::1]:{port.number}"
