"""A worker's side of isolated tools: the fork server, a place for each call, and what comes back.

Rule 1: at most `tool_processes` calls run at once; the others wait before their `tool.started`.
Rule 2: the call is over when nothing of it runs any more: its outcome, and its cancellation, come after that.
Rule 3: what a process says is read as a stranger's: bounded, validated, cleaned.
Rule 4: a fork server that is lost, or hangs, is replaced by the next call.
"""

from __future__ import annotations

import asyncio
import contextlib
import operator
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncGenerator, Generator, Iterator, Mapping
from pathlib import Path

import msgspec
import structlog

from streamjobs.config import Settings
from streamjobs.errors import Invalid, ToolError
from streamjobs.events import ErrorInfo
from streamjobs.inputs import decode_shallow
from streamjobs.tool import Tool, ToolContext, is_importable
from streamjobs.worker.isolation.messages import (
    ENDED,
    HEAD,
    NOT_STARTED,
    REQUEST,
    SAID,
    STARTED,
    Answer,
    End,
    Limits,
    Progress,
    Request,
    frame,
    shown_settings,
)
from streamjobs.worker.outcomes import ToolOutcome, failed, outcome_of, timed_out

log = structlog.get_logger(__name__)

FORK_SERVER = "streamjobs.worker.isolation.forkserver"
DIED = "tool_died"

_EVERY_TOOL = "*"
_TRIES = 2
"""A fork server that turns out to be gone is replaced once."""
_OVERDUE = 10.0
"""Seconds beyond the timeout after which the supervisor itself is given up."""
_HANG_UP_TIMEOUT = 5.0
"""Seconds that a supervisor has to end its call."""
_CODE = re.compile(r"[a-z][a-z0-9_]{0,63}", re.ASCII)
_LINE = msgspec.json.Decoder(Progress | Answer)
_END = msgspec.json.Decoder(End)


def is_isolated(tool: Tool, settings: Settings) -> bool:
    """Whether the tool runs in a process of its own."""
    names = settings.isolated_tools
    return tool.isolated or tool.name in names or _EVERY_TOOL in names


def where_found(tool: Tool) -> tuple[str, str]:
    """The module and the name under which another process finds the tool's function.

    Raises `Invalid` where they name something else, or nothing.
    """
    function = tool.function
    module, name = getattr(function, "__module__", ""), getattr(function, "__qualname__", "")
    try:
        is_it = is_importable(function) and operator.attrgetter(name)(sys.modules[module]) is function
    except (KeyError, AttributeError):
        is_it = False
    if not is_it:
        raise Invalid(
            f"tool {tool.name!r} cannot be isolated: {name!r} of module {module!r} is not its function"
        )
    return _importable(module), name


def _importable(module: str) -> str:
    """A module's name for an import; a program's own one is called `__main__` only where it runs."""
    if module != "__main__":
        return module
    main = sys.modules[module]
    return main.__spec__.name if main.__spec__ else Path(main.__file__ or "").stem


class ToolProcesses:
    """Runs isolated tools of one worker."""

    def __init__(self, tools: Mapping[str, Tool], settings: Settings) -> None:
        """Raises `Invalid` for an isolated tool that another process would not find."""
        isolated = [tool for tool in tools.values() if is_isolated(tool, settings)]
        self._modules = sorted({where_found(tool)[0] for tool in isolated})
        self._settings = settings
        self._places = asyncio.Semaphore(settings.tool_processes)
        self._server: _ForkServer | None = None
        self._folder = ""

    def warm(self) -> None:
        """Start importing the modules of isolated tools, if there are any."""
        if self._modules:
            with contextlib.suppress(OSError):  # the first call says so
                self._running_server()

    async def aclose(self) -> None:
        """End the fork server. Calls have ended, or are cancelled, before."""
        if self._server is not None:
            self._server.kill()
        if self._folder:
            await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)

    @contextlib.asynccontextmanager
    async def place(self, tool: Tool) -> AsyncGenerator[None]:
        """Wait for the tool's turn where it is isolated, and take a place."""
        if is_isolated(tool, self._settings):
            async with self._places:
                yield
        else:
            yield

    async def run(self, tool: Tool, arguments: bytes, context: ToolContext, timeout: float) -> ToolOutcome:
        """Run a call to its end, and until nothing of it runs any more.

        Raises `CancelledError` when the calling task is cancelled, and nothing else.
        """
        try:
            request = frame(REQUEST, msgspec.json.encode(self._request(tool, arguments, context, timeout)))
            call = await self._started(request)
        except Invalid as error:
            return failed(NOT_STARTED, str(error))
        except OSError as error:
            why = str(error) or type(error).__name__
            return failed(NOT_STARTED, f"the tool's process did not start: {why}", retryable=True)
        try:
            async with asyncio.timeout(timeout + _OVERDUE):
                return await _Hearing(context, self._settings, timeout).of(call)
        except TimeoutError:
            return timed_out(timeout, "")
        finally:
            await call.hang_up()

    def _request(self, tool: Tool, arguments: bytes, context: ToolContext, timeout: float) -> Request:
        module, function = where_found(tool)
        return Request(
            module=module,
            function=function,
            tool=tool.name,
            arguments=msgspec.Raw(arguments),
            limits=Limits.of(self._settings, timeout),
            settings=shown_settings(self._settings),
            context={
                "job_id": context.job_id,
                "owner": context.owner,
                "call_id": context.call_id,
                "idempotency_key": context.idempotency_key,
                "attempt": context.attempt,
            },
        )

    async def _started(self, request: bytes) -> _Channel:
        """Have a call started. Raises `OSError`."""
        for _ in range(_TRIES - 1):
            with contextlib.suppress(ConnectionError):
                return await self._start(request)
        return await self._start(request)

    async def _start(self, request: bytes) -> _Channel:
        server = self._running_server()
        ours, theirs = socket.socketpair()
        with theirs:
            channel = await _Channel.open(ours)
            try:
                server.send(theirs)
                theirs.close()
                async with asyncio.timeout(self._settings.tool_process_start_timeout):
                    await channel.begin(request)
            except BaseException as error:
                if isinstance(error, OSError):  # timeouts and broken connections
                    self._give_up(server, error)
                await channel.hang_up()
                raise
        return channel

    def _running_server(self) -> _ForkServer:
        if self._server is not None and not self._server.is_alive:
            self._server.kill()  # closes it
            self._server = None
        if self._server is None:
            self._folder = self._folder or tempfile.mkdtemp(prefix="streamjobs-tools-")
            self._server = _ForkServer(self._folder, self._modules, self._settings)
        return self._server

    def _give_up(self, server: _ForkServer, error: OSError) -> None:
        log.error("tools.fork_server_lost", error=str(error) or type(error).__name__, pid=server.pid)
        server.kill()


class _ForkServer:
    """The process that forks, from outside."""

    def __init__(self, folder: str, modules: list[str], settings: Settings) -> None:
        """Start it. Raises `OSError`, also where there can be none."""
        _require_fork()
        _hide_memory()
        self._orders, theirs = socket.socketpair()
        self._orders.setblocking(False)
        with theirs, _closing_on_error(self._orders):
            # -P: a file of the current folder that is named like one of ours must not hide it
            self._process = subprocess.Popen(  # noqa: S603 - our own program
                [sys.executable, "-P", "-m", FORK_SERVER, str(theirs.fileno()), folder, *modules],
                env=_environment(settings),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # a terminal's Ctrl-C is for the worker
            )
        self.pid = self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether it can be asked."""
        return self._process.poll() is None

    def send(self, channel: socket.socket) -> None:
        """Have a supervisor forked for a channel. Raises `OSError`."""
        socket.send_fds(self._orders, [b"c"], [channel.fileno()])

    def kill(self) -> None:
        """End it at once. What it has forked goes on."""
        self._orders.close()
        self._process.kill()
        self._process.wait()


def _require_fork() -> None:
    """Raises `PermissionError`."""
    if not hasattr(os, "fork"):
        raise PermissionError("this system cannot fork")
    main = getattr(sys.modules["__main__"], "__spec__", None)
    if main is not None and main.name == FORK_SERVER:
        raise PermissionError("an isolated tool cannot run another one")


@contextlib.contextmanager
def _closing_on_error(opened: socket.socket) -> Generator[None]:
    try:
        yield
    except BaseException:
        opened.close()
        raise


def _environment(settings: Settings) -> dict[str, str]:
    """The variables that isolated tools see; and how Python is to find what the worker has found."""
    allowed = {name: os.environ[name] for name in settings.tool_process_env if name in os.environ}
    path = os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path)
    return allowed | {"PYTHONPATH": path, "MALLOC_ARENA_MAX": "1"}  # an arena a thread maps 64 MB each


def _hide_memory() -> None:
    """A tool's process has the worker's user: its memory and environment must not be open to that."""
    from streamjobs.worker.isolation import confinement  # not on Windows

    confinement.hide_memory()


class _Channel:
    """A call's connection to its supervisor."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._supervisor = 0

    @classmethod
    async def open(cls, ours: socket.socket) -> _Channel:
        """Take over a socket."""
        ours.setblocking(False)
        return cls(*await asyncio.open_unix_connection(sock=ours))

    async def begin(self, request: bytes) -> None:
        """Say what to run, and wait until there is a supervisor. Raises `ConnectionError`."""
        self._writer.write(request)
        kind, payload = await self.read()
        if kind != STARTED:
            raise ConnectionAbortedError("the fork server is gone")
        self._supervisor = int(payload)

    async def read(self) -> tuple[bytes, bytes]:
        """The next message; none at the end."""
        try:
            kind, size = HEAD.unpack(await self._reader.readexactly(HEAD.size))
            return kind, await self._reader.readexactly(size)
        except (asyncio.IncompleteReadError, ConnectionError):
            return b"", b""

    async def hang_up(self) -> None:
        """Have the call ended, if it has not, and wait for that."""
        try:
            with contextlib.suppress(OSError, RuntimeError):  # it has hung up itself
                self._writer.write_eof()
            async with asyncio.timeout(_HANG_UP_TIMEOUT):
                while await self._reader.read(1 << 16):
                    pass
        except TimeoutError:
            self._kill_supervisor()
        except ConnectionError:
            pass
        finally:
            self._writer.close()

    def _kill_supervisor(self) -> None:
        """It was stopped, perhaps: its tool dies with it, and the fork server kills the orphans."""
        log.error("tools.supervisor_hangs", pid=self._supervisor)
        if self._supervisor:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._supervisor, signal.SIGKILL)


class _Hearing:
    """What one call says, up to its outcome."""

    def __init__(self, context: ToolContext, settings: Settings, timeout: float) -> None:
        self._context = context
        self._settings = settings
        self._timeout = timeout
        self._begun = bytearray()
        self._answer: Answer | None = None

    async def of(self, call: _Channel) -> ToolOutcome:
        """Listen to the end."""
        try:
            while True:
                kind, payload = await call.read()
                if kind != SAID:
                    break
                for line in self._lines(payload):
                    self._take(line)
        except Invalid as error:
            return failed("tool_output", f"the tool's process wrote what is no answer: {error}")
        return self._outcome(_END.decode(payload) if kind == ENDED else None)

    def _lines(self, payload: bytes) -> Iterator[bytes]:
        """The lines that are complete; what is begun waits for its end."""
        self._begun += payload
        if b"\n" in payload:
            *complete, rest = bytes(self._begun).split(b"\n")
            self._begun = bytearray(rest)
            yield from complete

    def _take(self, line: bytes) -> None:
        said = decode_shallow(_LINE, line)
        if isinstance(said, Answer):
            self._answer = said
        elif self._answer is None:
            self._context.progress(said.percent, said.message)

    # --- what came of it

    def _outcome(self, end: End | None) -> ToolOutcome:
        """The outcome that the process named; if it named none, how it ended."""
        if end is None:
            return self._died("its supervisor was killed")
        match end.reason:
            case "not_started":
                return failed(NOT_STARTED, f"the tool's process did not start: {end.error}", retryable=True)
            case "timeout":
                return timed_out(self._timeout, "; its process was killed")
            case "too_much":
                most = self._settings.tool_process_output
                return failed("tool_output", f"the tool's process sent more than {most} bytes")
            case "exited" if self._answer is not None:
                return self._checked(self._answer)
            case _:
                return self._ended_silently(end.status)

    def _checked(self, answer: Answer) -> ToolOutcome:
        if answer.error is None:
            return outcome_of(answer.output, self._settings.max_tool_output)
        code = answer.error.code if _CODE.fullmatch(answer.error.code) else ToolError.code
        return failed(code, answer.error.message, retryable=answer.error.retryable)

    def _ended_silently(self, status: int) -> ToolOutcome:
        if status == -signal.SIGXCPU:
            return timed_out(self._timeout, " of processor time; its process was killed")
        if status >= 0:
            return self._died(f"it ended with status {status}, without an answer")
        name = next((one.name for one in signal.Signals if one == -status), f"signal {-status}")
        hint = ", as the system does where memory is short" if name == "SIGKILL" else ""
        return self._died(f"it was killed by {name}{hint}")

    def _died(self, how: str) -> ToolOutcome:
        why = f"the tool's process died: {how}"
        return ToolOutcome(error=ErrorInfo(DIED, why), is_lost=True)
