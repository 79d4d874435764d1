"""Tools that misbehave, each in its own way; all are isolated. What they start, they write down."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import mmap
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec

from streamjobs.app import App, ToolContext
from streamjobs.errors import StreamjobsError, ToolError
from streamjobs.worker.isolation.descendants import parent_of

app = App(name="hostile", builtin_tools=False)
LONG = 3600.0


class Point(msgspec.Struct):
    x: int
    y: int = 7


class Refusal(ToolError):
    code = "too_rude"


@app.tool(isolated=True)
def add(point: Point, more: int = 1) -> int:
    """Add."""
    return point.x + point.y + more


@app.tool(isolated=True)
async def tell(context: ToolContext) -> dict[str, Any]:
    """Tell what it is told."""
    for percent in (10, 20):
        context.progress(percent, f"at {percent}")
        await asyncio.sleep(0)
    context.progress(None, "x" * 10_000)
    shown = {name: getattr(context, name) for name in ("job_id", "owner", "call_id", "attempt")}
    return shown | {"key": context.idempotency_key, "redis_url": context.settings.redis_url}


@app.tool(isolated=True)
def raises(how: str) -> None:
    """Raise."""
    match how:
        case "refusal":
            raise Refusal("not in that tone")
        case "exit":
            sys.exit("bye")
        case "interrupt":
            raise KeyboardInterrupt
        case _:
            raise ZeroDivisionError("by nothing")


@app.tool(isolated=True)
def takes_memory(how: str) -> int:
    """Take more memory than there is for it."""
    if how == "shared":
        return len(mmap.mmap(-1, 1 << 31))
    held: list[str] = []
    while True:
        held.append("x" * 1_000_000)


@app.tool(isolated=True, timeout=0.5)
def spins() -> None:
    """Never end, whatever it is told."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGXCPU, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)
    while True:
        pass


@app.tool(isolated=True)
def dies(how: str) -> None:
    """End without an answer."""
    match how:
        case "exit":
            os._exit(7)
        case "quietly":
            os._exit(0)
        case "segfault":
            ctypes.string_at(0)
        case "processor":
            os.kill(os.getpid(), signal.SIGXCPU)  # as the kernel does, some seconds later
        case _:
            os.kill(os.getpid(), signal.SIGKILL)


@app.tool(isolated=True)
def returns(how: str) -> Any:
    """Return what is hard to write down."""
    return {
        "large": "ä" * 5_000_000,
        "many": list(range(1_000_000)),
        "surrogate": ["\ud800", "a\x00b"],
        "object": object(),
        "deep": _nested(500),
    }[how]


def _nested(levels: int) -> list[Any]:
    return [_nested(levels - 1)] if levels else []


@app.tool(isolated=True)
def writes(what: str, times: int = 1) -> str:
    """Write to whatever is open, as if it were the runtime; then return."""
    for number in range(3, 64):
        with contextlib.suppress(OSError):
            for _ in range(times):
                os.write(number, what.encode())
    return "returned"


@app.tool(isolated=True)
def prints() -> str:
    """Print, in every way there is."""
    print("printed \x1b[31m")  # noqa: T201
    print("printed", file=sys.stderr)  # noqa: T201
    os.write(1, b"printed")
    os.write(2, b"printed")
    return "done"


@app.tool(isolated=True)
def limits() -> dict[str, int]:
    """Tell the limits, and what it may not do about them."""
    names = ("AS", "CPU", "FSIZE", "NOFILE", "CORE")
    found = {name: resource.getrlimit(getattr(resource, f"RLIMIT_{name}")) for name in names}
    with contextlib.suppress(ValueError, PermissionError):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 40, 1 << 40))
        raise AssertionError("it may raise its limits")
    return {name: soft for name, (soft, _) in found.items()}


@app.tool(isolated=True)
def fills(how: str) -> str:
    """Write a large file, or open many."""
    if how == "file":
        Path("large").write_bytes(b"x" * 10_000_000)
    opened = [os.open("/dev/null", os.O_RDONLY) for _ in range(1000)]
    return f"{len(opened)} files"


@app.tool(isolated=True)
def litters() -> str:
    """Leave files behind; says where."""
    Path("left").mkdir()
    Path("left", "behind").write_text("litter")
    return str(Path.cwd())


@app.tool(isolated=True)
def environment() -> dict[str, str]:
    """Tell the environment."""
    return dict(os.environ)


def secrets_found(canary: str) -> dict[str, Any]:
    """Where a secret can be read: the own environment, or processes that show theirs or their memory."""
    shown: list[str] = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if canary.encode() in (folder / "environ").read_bytes():
                shown.append(folder.name)
    above: list[str] = []
    pid = parent_of(os.getpid())
    for _ in range(3):  # supervisor, fork server, worker
        with contextlib.suppress(OSError), Path(f"/proc/{pid}/mem").open("rb"):
            above.append(str(pid))
        pid = parent_of(pid)
    return {"environ": canary in os.environ.values(), "processes": shown, "memory": above}


@app.tool(isolated=True)
def snoops(canary_of: str) -> dict[str, Any]:
    """Look for a secret, whose parts come separately: the arguments are no find."""
    return secrets_found("-".join(canary_of.split(" ")))


@app.tool()
def snoops_inside(canary_of: str) -> dict[str, Any]:
    """The same, in the worker."""
    return secrets_found("-".join(canary_of.split(" ")))


@app.tool(isolated=True, timeout=60.0)
def lingers(file: str, context: ToolContext) -> None:
    """Start processes that try to get away, write down everybody's number, and stay."""
    own = os.getpid()
    numbers = {"tool": own, "supervisor": parent_of(own), "server": parent_of(parent_of(own))}
    _write_down(file, numbers | _get_away())
    context.progress(1, "lingering")
    time.sleep(LONG)


@app.tool(isolated=True)
def leaves(file: str) -> str:
    """Start processes that try to get away, and return."""
    numbers = {"tool": os.getpid()} | _get_away()
    _write_down(file, numbers)
    return "returned"


@app.tool(isolated=True, effect="once", timeout=60.0)
def pays(file: str, context: ToolContext) -> None:
    """Take effect, and die before it can say so."""
    with Path(file).open("a") as opened:
        opened.write(f"{context.idempotency_key}\n")
    os._exit(1)


def find_payment(_key: str) -> str:
    """What the bank says."""
    return "paid, says the bank"


def find_nothing(_key: str) -> str:
    """What the bank says where there was no payment."""
    raise LookupError


app.tool(name="pays_known", isolated=True, effect="once", lookup=find_payment)(pays)
app.tool(name="pays_again", isolated=True, effect="once", lookup=find_nothing)(pays)
app.tool(name="pays_asked", isolated=True, effect="once", recovery="ask")(pays)


def _write_down(file: str, numbers: dict[str, int]) -> None:
    Path(f"{file}.folder").write_text(str(Path.cwd()))
    part = Path(f"{file}.part")
    part.write_bytes(msgspec.json.encode(numbers))
    part.rename(file)


def _get_away() -> dict[str, int]:
    """A child of the same group, and a grandchild of a session of its own whose parent has ended."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        _stay()
    if os.fork() == 0:
        os.setsid()
        grandchild = os.fork()
        if grandchild:
            os.write(theirs, str(grandchild).encode())
            os._exit(0)
        os.setsid()
        _stay()
    return {"child": child, "grandchild": int(os.read(ours, 20))}


def _stay() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    time.sleep(LONG)
    os._exit(0)


@app.tool(isolated=True)
def attacks(who: str) -> str:
    """Kill those above."""
    supervisor = parent_of(os.getpid())
    os.kill(parent_of(supervisor) if who == "server" else supervisor, signal.SIGKILL)
    return "survived"


@app.tool(isolated=True)
def overlaps() -> list[float]:
    """Say when it ran."""
    begun = time.monotonic()
    time.sleep(0.05)
    return [begun, time.monotonic()]


@app.tool(isolated=True)
def threads() -> int:
    """Start threads that nobody waits for, one of which never ends."""
    for _ in range(8):
        threading.Thread(target=time.sleep, args=(LONG,)).start()
    return threading.active_count()


@app.tool(isolated=True)
async def nests() -> Any:
    """Run an isolated tool."""
    from streamjobs.config import Settings
    from streamjobs.worker.isolation.processes import ToolProcesses

    processes = ToolProcesses(app.tools, Settings())
    outcome = await processes.run(app.tools["add"], b'{"point": {"x": 1}}', ToolContext(), 10.0)
    return outcome.error


@app.workflow("use")
async def use(ctx: Any, given: dict[str, Any]) -> Any:
    """Call a tool and return what comes of it, or the code of its failure."""
    try:
        return await ctx.tool(given["tool"], **given["arguments"])
    except StreamjobsError as error:
        return f"{type(error).__name__}: {error}"
