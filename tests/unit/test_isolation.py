"""Isolated tools: whatever one does, its call has an outcome, nothing of it stays, and the worker goes on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from streamjobs.app import App, ToolContext
from streamjobs.config import Settings
from streamjobs.errors import Invalid
from streamjobs.events import ErrorInfo
from streamjobs.worker.isolation import processes as worker_side
from streamjobs.worker.isolation.descendants import children
from streamjobs.worker.isolation.processes import ToolProcesses
from streamjobs.worker.outcomes import ToolOutcome
from streamjobs.worker.tools import call_tool
from tests import hostile, moody
from tests.conftest import wait_until
from tests.orphans import OF_A_TOOL, all_gone, is_gone, written

SETTINGS = Settings(
    redis_url="redis://:secret@example.invalid",
    tool_timeout=60.0,
    max_tool_output=1000,
    tool_processes=2,
    tool_process_memory=128 << 20,
    tool_process_file=1 << 20,
    tool_process_files=32,
    tool_process_output=1 << 20,
)


@pytest.fixture(scope="module")
def processes() -> Iterator[ToolProcesses]:
    """One fork server for all tests that do not hurt it: its start takes a while."""
    opened = ToolProcesses(hostile.app.tools, SETTINGS)
    yield opened
    asyncio.run(opened.aclose())


@contextlib.asynccontextmanager
async def opened(app: App, **changes: Any) -> AsyncIterator[ToolProcesses]:
    """Processes of one test's own."""
    own = ToolProcesses(app.tools, msgspec.structs.replace(SETTINGS, **changes))
    try:
        yield own
    finally:
        await own.aclose()


async def call(
    processes: ToolProcesses | None, name: str, *, app: App = hostile.app, context: Any = None, **given: Any
) -> ToolOutcome:
    return await call_tool(app, SETTINGS, name, given, context or ToolContext(), processes)


async def error_of(processes: ToolProcesses, name: str, **given: Any) -> ErrorInfo:
    outcome = await call(processes, name, **given)
    assert outcome.error is not None, outcome
    return outcome.error


async def still_works(processes: ToolProcesses) -> None:
    assert (await call(processes, "add", point={"x": 1})).output == 9


# --- what works as everywhere ---------------------------------------------------------------------------


async def test_arguments_arrive_as_their_types_and_the_result_comes_back(processes: ToolProcesses):
    """Isolating a tool would mean to write it anew."""
    assert (await call(processes, "add", point={"x": 1}, more=2)).output == 10
    text = await call_tool(hostile.app, SETTINGS, "add", '{"point": {"x": 2}}', ToolContext(), processes)
    assert text.output == 10
    error = await error_of(processes, "add", point={"x": "1"})
    assert error.code == "invalid_arguments"
    assert "point.x" in error.message


async def test_an_async_tool_reports_progress_and_knows_its_call_but_no_setting_of_ours(
    processes: ToolProcesses,
):
    """A long one would be silent; or the way to Redis would be handed to it with its context."""
    heard: list[tuple[float | None, str]] = []
    context = ToolContext(
        job_id="job", owner="ann", call_id="c1", idempotency_key="k", attempt=3,
        on_progress=lambda percent, message: heard.append((percent, message)),
    )  # fmt: skip
    outcome = await call(processes, "tell", context=context)
    assert outcome.output == {
        "job_id": "job", "owner": "ann", "call_id": "c1", "attempt": 3, "key": "k", "redis_url": "",
    }  # fmt: skip
    assert heard[:2] == [(10.0, "at 10"), (20.0, "at 20")]
    assert heard[2][0] is None
    assert len(heard[2][1]) == 500


@pytest.mark.parametrize(
    ("how", "code", "message"),
    [
        ("refusal", "too_rude", "not in that tone"),
        ("exit", "tool_error", "SystemExit: bye"),
        ("interrupt", "tool_error", "KeyboardInterrupt"),
        ("error", "tool_error", "ZeroDivisionError: by nothing"),
    ],
)
async def test_what_it_raises_is_told_as_of_any_tool(
    processes: ToolProcesses, how: str, code: str, message: str
):
    """The model could not correct itself."""
    error = await error_of(processes, "raises", how=how)
    assert (error.code, error.message) == (code, message)


# --- what it may not take -------------------------------------------------------------------------------


async def test_memory_has_a_cap_and_reaching_it_is_told(processes: ToolProcesses):
    """The kernel would choose whom to kill, and take the worker with all its jobs."""
    outcome = await call(processes, "takes_memory", how="own")
    assert outcome.error is not None
    assert outcome.error.code == "tool_memory"
    assert "128 MB" in outcome.error.message
    assert not outcome.is_lost
    await still_works(processes)


async def test_shared_memory_counts_too(processes: ToolProcesses):
    """What is mapped as shared escapes limits on private data."""
    error = await error_of(processes, "takes_memory", how="shared")
    assert "Cannot allocate memory" in error.message


async def test_a_loop_that_ignores_signals_ends_at_the_timeout(processes: ToolProcesses):
    """A thread could not be ended at all, and would use a core for ever."""
    error = await error_of(processes, "spins")
    assert (error.code, error.retryable) == ("tool_timeout", True)
    assert "0.5 s" in error.message
    await still_works(processes)


async def test_limits_are_what_the_settings_say_and_stay_it(processes: ToolProcesses):
    """Whoever runs as root in a container could lift them."""
    found = (await call(processes, "limits")).output
    assert found.pop("AS") > 128 << 20
    assert found == {"CPU": 61, "FSIZE": 1 << 20, "NOFILE": 32, "CORE": 0}


@pytest.mark.parametrize(("how", "said"), [("file", "File too large"), ("files", "Too many open files")])
async def test_files_have_a_cap_in_size_and_number(processes: ToolProcesses, how: str, said: str):
    """A disk that a tool has filled stops whoever writes to it."""
    error = await error_of(processes, "fills", how=how)
    assert said in error.message


async def test_what_it_leaves_in_its_folder_is_removed(processes: ToolProcesses):
    """Each call would leave something behind, for the next job's to find."""
    folder = Path((await call(processes, "litters")).output)
    await wait_until(lambda: not folder.exists(), what="the folder's removal")


async def test_a_worker_whose_folder_was_tidied_away_makes_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Systems clear what was long untouched in /tmp: after a quiet week each call would fail."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    async with opened(hostile.app) as processes:
        await still_works(processes)
        (folder,) = tmp_path.iterdir()
        for _ in range(2):
            await wait_until(lambda: list(folder.iterdir()) == [], what="the removal of the call's own")
            folder.rmdir()
            await still_works(processes)
        await wait_until(lambda: list(folder.iterdir()) == [], what="the removal of the call's own")
        folder.rmdir()
        folder.write_text("no folder")
        error = await error_of(processes, "litters")
        assert (error.code, error.retryable) == ("tool_not_started", True)
        folder.unlink()
    assert list(tmp_path.iterdir()) == []


async def test_calls_leave_no_files_open_in_the_worker(processes: ToolProcesses):
    """After some thousands of them it could take no job any more."""

    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    async def several() -> None:
        given = [("add", {"point": {"x": 1}}), ("raises", {"how": "error"}), ("dies", {"how": "exit"})]
        await asyncio.gather(*(call(processes, name, **arguments) for name, arguments in given * 4))

    await several()
    before = open_files()
    await several()
    await wait_until(lambda: open_files() <= before, what="the end of the calls' connections")


# --- how it may end -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("exit", "status 7"),
        ("quietly", "status 0"),
        ("segfault", "SIGSEGV"),
        ("kill", "SIGKILL, as the system does where memory is short"),
    ],
)
async def test_a_process_that_dies_is_a_failure_that_says_how(processes: ToolProcesses, how: str, said: str):
    """The call would hang, or the job fail with it."""
    outcome = await call(processes, "dies", how=how)
    assert outcome.error is not None
    assert outcome.error.code == "tool_died"
    assert said in outcome.error.message
    assert outcome.is_lost
    await still_works(processes)


async def test_processor_time_runs_out_too(processes: ToolProcesses):
    """A stopped supervisor must not give a loop all the time there is."""
    error = await error_of(processes, "dies", how="processor")
    assert error.code == "tool_timeout"
    assert "processor time" in error.message


async def test_threads_that_nobody_waits_for_do_not_keep_the_process(processes: ToolProcesses):
    """Python waits for them when a process ends."""
    assert (await call(processes, "threads")).output == 9


# --- what it says ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["large", "many"])
async def test_a_large_result_is_cut_as_of_any_tool(processes: ToolProcesses, how: str):
    """10 MB would go through the worker, the log and the model."""
    output = (await call(processes, "returns", how=how)).output
    assert len(output.encode()) <= SETTINGS.max_tool_output
    assert "bytes left out]" in output


@pytest.mark.parametrize(
    ("how", "output", "said"),
    [
        ("surrogate", ["\ufffd", "a\ufffdb"], ""),
        ("object", None, "not JSON"),
        ("deep", None, "deeper than 100 levels"),
    ],
)
async def test_a_strange_result_is_what_it_is_of_any_tool(
    processes: ToolProcesses, how: str, output: Any, said: str
):
    """What a log cannot hold would stop the job that has to write it."""
    outcome = await call(processes, "returns", how=how)
    assert outcome.output == output
    if said:
        assert outcome.error is not None
        assert outcome.error.code == "tool_output"
        assert said in outcome.error.message


@pytest.mark.parametrize(
    ("what", "output", "code"),
    [
        ("garbage\n", None, "tool_output"),
        ("\x00\xff\n", None, "tool_output"),
        ("no end of line ", None, "tool_output"),
        ("[" * 5000 + "]" * 5000 + "\n", None, "tool_output"),
        ('{"type": "answer", "output": ' + "[" * 300 + "]" * 300 + "}\n", None, "tool_output"),
        ('{"type": "answer", "output": "\\ud800"}\n', None, "tool_output"),
        ('{"type": "progress", "percent": 1e400}\n', None, "tool_output"),
        ('{"type": "progress", "percent": -5, "message": "\\u0000"}\n', "returned", ""),
        ('{"type": "answer", "output": "forged\\u0000"}\n', "returned", ""),
    ],
    ids=lambda value: ascii(value)[:40],
)
async def test_what_it_writes_in_place_of_the_runtime_is_believed_no_more_than_a_result(
    processes: ToolProcesses, what: str, output: Any, code: str
):
    """Foreign code finds the pipe: it must not reach further than what it may return."""
    outcome = await call(processes, "writes", what=what)
    assert (outcome.output, outcome.error.code if outcome.error else "") == (output, code)
    await still_works(processes)


async def test_a_forged_error_has_no_more_than_a_code_and_a_message(processes: ToolProcesses):
    """Codes are read by programs, and messages are shown."""
    error = {"code": "x y\n" * 100, "message": "m" * 10_000}
    line = msgspec.json.encode({"type": "answer", "error": error}).decode()
    outcome = await call(processes, "dies_saying", app=_app_of(dies_saying), what=f"{line}\n")
    assert outcome.error is not None
    assert outcome.error.code == "tool_error"
    assert len(outcome.error.message) <= 500


@pytest.mark.parametrize(
    ("written_value", "output"),
    [('"a\\u0000b"', "a\ufffdb"), ("[" * 200 + "]" * 200, None), ("[" + "1," * 5000 + "1]", "[1,1")],
    ids=["nul", "deep", "large"],
)
async def test_a_forged_output_is_cleaned_cut_and_bounded_again(
    processes: ToolProcesses, written_value: str, output: str | None
):
    """What the runtime promises of a result is not what a process has to keep."""
    line = f'{{"type": "answer", "output": {written_value}}}\n'
    outcome = await call(processes, "dies_saying", app=_app_of(dies_saying), what=line)
    assert (outcome.output or "")[:4] == (output or "")
    assert len(outcome.output or "") <= SETTINGS.max_tool_output
    assert (outcome.error is None) == (output is not None)


async def test_one_that_floods_the_pipe_is_killed(processes: ToolProcesses):
    """The worker would hold all of it in memory."""
    error = await error_of(processes, "writes", what="x" * 100_000, times=100)
    assert error.code == "tool_output"
    assert "more than 1048576 bytes" in error.message
    await still_works(processes)


async def test_what_it_prints_is_seen_by_nobody(capfd: pytest.CaptureFixture[str]):
    """Foreign text would stand among the worker's records, escape sequences included."""
    async with opened(hostile.app) as processes:
        assert (await call(processes, "prints")).output == "done"
    assert capfd.readouterr() == ("", "")


# --- what it starts -------------------------------------------------------------------------------------


async def test_what_it_has_started_ends_with_its_answer(processes: ToolProcesses, tmp_path: Path):
    """Each call could leave a process that lives as long as the machine."""
    assert (await call(processes, "leaves", file=str(tmp_path / "pids"))).output == "returned"
    numbers = await written(tmp_path / "pids")
    assert [name for name in OF_A_TOOL if not is_gone(numbers[name])] == [], "they end before the answer"


async def test_a_cancelled_call_ends_all_of_it(processes: ToolProcesses, tmp_path: Path):
    """A cancelled job would go on costing."""
    calling = asyncio.create_task(call(processes, "lingers", file=str(tmp_path / "pids")))
    numbers = await written(tmp_path / "pids")
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling
    await all_gone(numbers, [*OF_A_TOOL, "supervisor"])
    await still_works(processes)


async def test_a_supervisor_that_is_killed_takes_all_of_its_call_along(
    processes: ToolProcesses, tmp_path: Path
):
    """The tool, and what it has started, would have nobody left to end it."""
    calling = asyncio.create_task(call(processes, "lingers", file=str(tmp_path / "pids")))
    numbers = await written(tmp_path / "pids")
    os.kill(numbers["supervisor"], signal.SIGKILL)
    outcome = await calling
    assert outcome.error is not None
    assert outcome.error.code == "tool_died"
    assert outcome.is_lost
    await all_gone(numbers, [*OF_A_TOOL, "supervisor"])
    folder = Path((tmp_path / "pids.folder").read_text())
    await wait_until(lambda: not folder.exists(), what="the folder's removal")
    await still_works(processes)


async def test_a_supervisor_that_hangs_is_given_up(
    processes: ToolProcesses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A tool that could stop it would have all the time there is."""
    monkeypatch.setattr(worker_side, "_HANG_UP_TIMEOUT", 0.1)
    calling = asyncio.create_task(call(processes, "lingers", file=str(tmp_path / "pids")))
    numbers = await written(tmp_path / "pids")
    os.kill(numbers["supervisor"], signal.SIGSTOP)
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling
    await all_gone(numbers, [*OF_A_TOOL, "supervisor"])
    await still_works(processes)


async def test_a_call_survives_the_fork_server_and_the_next_one_has_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The system may kill any process: no call may depend on one that has done its part."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    async with opened(hostile.app) as processes:
        calling = asyncio.create_task(call(processes, "lingers", file=str(tmp_path / "pids")))
        numbers = await written(tmp_path / "pids")
        os.kill(numbers["server"], signal.SIGKILL)
        await still_works(processes)
        assert not is_gone(numbers["tool"])
        assert not calling.done()
        os.kill(numbers["supervisor"], signal.SIGKILL)
        assert (await calling).is_lost
        await all_gone(numbers, ["tool"])  # even now: it dies with its parent
        for name in ("child", "grandchild"):
            os.kill(numbers[name], signal.SIGKILL)
    assert list(tmp_path.glob("streamjobs-tools-*")) == []


async def test_the_timeout_is_kept_though_the_worker_stands_still(processes: ToolProcesses, tmp_path: Path):
    """Another tool that blocks the worker's event loop would give this one all the time that it takes."""
    file, lingers = tmp_path / "pids", hostile.app.tools["lingers"]
    arguments = msgspec.json.encode({"file": str(file)})
    for timeout in (0.5, 2.0, 8.0, 32.0):  # a busy machine needs more to begin
        calling = asyncio.create_task(processes.run(lingers, arguments, ToolContext(), timeout))
        await wait_until(lambda: file.exists() or calling.done())  # noqa: B023 - it is asked here
        if file.exists():
            break
    numbers = await written(file)
    deadline = time.monotonic() + 40
    while not all(is_gone(numbers[name]) for name in OF_A_TOOL) and time.monotonic() < deadline:
        time.sleep(0.01)  # the event loop does not run
    assert [name for name in OF_A_TOOL if not is_gone(numbers[name])] == []
    outcome = await calling
    assert outcome.error is not None
    assert outcome.error.code == "tool_timeout"


async def test_one_that_attacks_those_above_it_harms_itself_at_most(processes: ToolProcesses):
    """One call could end the worker's other ones, or the worker."""
    program = """
import sys
from streamjobs.worker.isolation import confinement
confinement.drop_privileges()
sys.exit(confinement.leave_others_alone())
"""
    keeps_signals_inside = await asyncio.to_thread(subprocess.call, [sys.executable, "-c", program])
    for who in ("supervisor", "server"):
        outcome = await call(processes, "attacks", who=who)
        said = outcome.output or (outcome.error and outcome.error.message) or ""
        if keeps_signals_inside:  # Linux 6.12 and later
            assert "Operation not permitted" in said
        else:
            assert "its supervisor was killed" in said or who == "server"
        await still_works(processes)


# --- what it sees ---------------------------------------------------------------------------------------


async def test_its_environment_is_a_list(monkeypatch: pytest.MonkeyPatch):
    """Keys and the address of Redis are in the worker's."""
    monkeypatch.setenv("OPENAI_API_KEY", "canary")
    monkeypatch.setenv("STREAMJOBS_REDIS_URL", "redis://:canary@127.0.0.1")
    monkeypatch.setenv("SHOWN", "seen")
    async with opened(hostile.app, tool_process_env=("SHOWN", "ABSENT")) as processes:
        found = (await call(processes, "environment")).output
    own = {"PYTHONPATH", "MALLOC_ARENA_MAX", "TMPDIR", "LC_CTYPE"}  # the last one is Python's
    assert found.keys() - own == {"SHOWN"}
    assert "canary" not in str(found)


async def test_a_process_without_rights_reads_no_other_ones_environment():
    """Where the kernel has no Landlock, being of one user must not be enough, nor being root."""
    program = """
import os, sys
from streamjobs.worker.isolation import confinement
confinement.drop_privileges()  # as those who are not root: the kernel would refuse for that alone
confinement.hide_memory()
child = os.fork()
if child == 0:
    confinement.drop_privileges()
    try:
        open(f"/proc/{os.getppid()}/environ").read()
    except OSError:
        os._exit(3)
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert await asyncio.to_thread(subprocess.call, [sys.executable, "-c", program]) == 3
    shown = program.replace("confinement.hide_memory()", "")
    assert await asyncio.to_thread(subprocess.call, [sys.executable, "-c", shown]) == 0


# --- how many -------------------------------------------------------------------------------------------


async def test_calls_over_the_number_of_processes_wait_for_their_turn(processes: ToolProcesses):
    """A chat with sixteen calls would start sixteen processes, and a thousand chats as many more."""

    async def one() -> list[float]:
        async with processes.place(hostile.app.tools["overlaps"]):
            return (await call(processes, "overlaps")).output

    ran = await asyncio.gather(*(one() for _ in range(6)))
    for begun, _ in ran:
        assert sum(start <= begun < end for start, end in ran) <= SETTINGS.tool_processes


# --- how it is declared, and started --------------------------------------------------------------------


def test_what_another_process_could_not_find_is_refused_where_it_is_declared():
    """Each call would fail, in production, with a message about pickles or names."""
    app = App(builtin_tools=False)
    with pytest.raises(TypeError, match="must be a function of a module"):
        app.tool(name="short", isolated=True)(lambda: 1)

    def inner() -> int:
        return 1

    with pytest.raises(TypeError, match="must be a function of a module"):
        app.tool(isolated=True)(inner)


def test_a_name_that_means_something_else_is_refused_before_any_call():
    """Another function would run in its place."""
    app = _app_of(dies_saying)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "dies_saying", print)
        with pytest.raises(Invalid, match="'dies_saying'"):
            ToolProcesses(app.tools, SETTINGS)


def test_a_setting_isolates_tools_that_were_not_declared_so():
    """An operator would have to change the program."""
    app = App(builtin_tools=False)

    @app.tool
    def inner() -> int:
        return 1

    ToolProcesses(app.tools, SETTINGS)
    for names in (("*",), ("other", "inner")):
        with pytest.raises(Invalid, match="'inner' cannot be isolated"):
            ToolProcesses(app.tools, msgspec.structs.replace(SETTINGS, isolated_tools=names))


async def test_the_included_tools_can_be_isolated(tmp_path: Path):
    """They read files that a model names."""
    (tmp_path / "note.txt").write_text("hello")
    root = os.path.relpath(tmp_path)  # from where the worker is, not the tool
    settings = msgspec.structs.replace(SETTINGS, isolated_tools=("*",), files_root=root)
    app = App()
    processes = ToolProcesses(app.tools, settings)
    outcome = await call_tool(app, settings, "read_file", {"path": "note.txt"}, ToolContext(), processes)
    await processes.aclose()
    assert outcome.output["text"] == "hello"


async def test_without_processes_an_isolated_tool_does_not_run():
    """It would run in the caller."""
    outcome = await call(None, "add", point={"x": 1})
    assert outcome.error is not None
    assert outcome.error.code == "tool_not_started"


async def test_a_module_that_cannot_be_imported_there_is_told(monkeypatch: pytest.MonkeyPatch):
    """A program that reads its settings from variables at import would fail without a reason."""
    monkeypatch.setenv("MOOD", "raises")
    async with opened(moody.app, tool_process_env=("MOOD",)) as processes:
        outcome = await call(processes, "answers", app=moody.app)
    assert outcome.error == ErrorInfo(
        "tool_not_started", "its process cannot load it: KeyError: 'DATABASE_URL'"
    )


@pytest.mark.parametrize("mood", ["exits", "hangs"])
async def test_a_fork_server_that_does_not_start_fails_the_call_in_time(
    monkeypatch: pytest.MonkeyPatch, mood: str
):
    """The job would wait for ever; and all later ones with it."""
    monkeypatch.setenv("MOOD", mood)
    timeout = 0.2 if mood == "hangs" else 60.0
    changes = {"tool_process_env": ("MOOD",), "tool_process_start_timeout": timeout}
    before = children()
    async with opened(moody.app, **changes) as processes:
        outcome = await call(processes, "answers", app=moody.app)
        assert children() == before or mood == "exits", "the next call has another one"
    assert outcome.error is not None
    assert (outcome.error.code, outcome.error.retryable) == ("tool_not_started", True)
    assert not outcome.is_lost


async def test_an_isolated_tool_runs_no_other_one(processes: ToolProcesses):
    """A program without a guard would start fork servers of fork servers."""
    outcome = await call(processes, "nests")
    assert "cannot run another one" in outcome.output["message"]


def test_a_workflow_that_runs_inline_has_isolated_tools():
    """Tests of a program would need Redis for them."""
    settings = msgspec.structs.replace(SETTINGS, redis_url="")
    given = {"tool": "add", "arguments": {"point": {"x": 1}}}
    assert hostile.app.run_inline("use", given, settings=settings) == 9


def _app_of(function: Any) -> App:
    app = App(builtin_tools=False)
    app.tool(isolated=True)(function)
    return app


def dies_saying(what: str) -> None:
    """Write an answer that is not the runtime's, and die."""
    for number in range(3, 64):
        with contextlib.suppress(OSError):
            os.write(number, what.encode())
    os._exit(0)
