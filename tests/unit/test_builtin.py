"""The built-in tools under attack: a model, or whoever wrote what it read, chooses every argument."""

from __future__ import annotations

import ast
import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamjobs import builtin
from streamjobs.app import ToolContext
from streamjobs.builtin import calculate, get_current_time, list_files, read_file
from streamjobs.config import Settings
from streamjobs.errors import ToolError


def short(value: object) -> str:
    """A test's id: what is long or no text is cut, and escaped."""
    return ascii(value)[:40]


# --- time --------------------------------------------------------------------------------------------


def test_the_time_is_told_in_a_zone() -> None:
    """Without this a model would have to guess what day it is."""
    now = get_current_time()
    assert datetime.fromisoformat(now.time).utcoffset().total_seconds() == 0  # type: ignore[union-attr]
    assert now.weekday.endswith("day")
    there = get_current_time("Asia/Kolkata")
    assert there.time.endswith("+05:30")


@pytest.mark.parametrize(
    "name",
    ["Mars/Olympus", "", "../../etc/passwd", "/etc/passwd", "a\x00b", "x" * 5000, "Europe", "\ud800"],
    ids=short,
)
def test_a_wrong_zone_is_refused(name: str) -> None:
    """Without this a zone's name could reach other files, or fail in words that help nobody."""
    with pytest.raises(ToolError, match="IANA name"):
        get_current_time(name)


# --- arithmetic --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1 + 2 * 3", 7),
        (" (1+2)*3 ", 9),
        ("7 // 2 - 7 % 4", 0),
        ("-2 ** 2", -4),
        ("2 ** -1", 0.5),
        ("1_000 / 8", 125.0),
        ("sqrt(16) + abs(-3)", 7.0),
        ("round(pi, 2)", 3.14),
        ("round(2.5)", 2),
        ("round(1234, -2)", 1200),
        ("min(3, 1, 2) + max(1, 2)", 3),
        ("log(8, 2)", 3.0),
        ("floor(e) + ceil(e)", 5),
        ("10 ** 300", 10**300),
        ("1 ** 10 ** 100", 1),
        ("+".join(["1"] * 100), 100),
    ],
)
def test_arithmetic_is_right(expression: str, value: float) -> None:
    """Without this a model would be told wrong sums."""
    assert calculate(expression) == value
    assert type(calculate(expression)) is type(value)


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("9**9**9", "too large"),
        ("9**9**9**9", "too large"),
        ("2**1025", "too large"),
        ("(2**1000)*(2**1000)", "too large"),
        ("10.0**400", "too large"),
        ("1e999", "too large"),
        ("1 / 2.2250738585e-313", "too large"),
        ("exp(1e9)", "too large"),
        ("2.0**(2**1000)", "too large"),
        ("round(1, -9999999999)", "up to 20 digits"),
        ("round(1.5, 1e9)", "up to 20 digits"),
        ("factorial(9999999999)", "'factorial' is not known"),
        ("1/0", "division by zero"),
        ("0 ** -1", "division by zero"),
        ("1 % 0.0", "division by zero"),
        ("sqrt(-1)", "not defined"),
        ("(-8) ** 0.5", "real numbers"),
        ("log(0)", "not defined"),
        ("max(1)", "not defined"),
        ("sqrt()", "not defined"),
        ("1j", "real numbers"),
        ("True", "real numbers"),
        ("None", "real numbers"),
        ("...", "real numbers"),
        ("pi.real", "only numbers"),
        ("(1).__class__", "only numbers"),
        ("pi.__class__.__mro__", "only numbers"),
        ("__import__(1)", "not known"),
        ("open(1)", "not known"),
        ("x", "'x' is not known"),
        ("sqrt", "calls such as"),
        ("pi(2)", "'pi' is not known"),
        ("max(*pi)", "only numbers"),
        ("max(1, 2, key=abs)", "not arithmetic"),
        ("lambda: 1", "not arithmetic"),
        ("'a' * 3", "not arithmetic"),
        ("[1] * 9", "not arithmetic"),
        ("2 ^ 8", "a power is written"),
        ("1 if 1 else 2", "only numbers"),
        ("1 and 2", "only numbers"),
        ("(1, 2)", "only numbers"),
        ("1 @ 2", "not arithmetic"),
        ("٣ + 1", "not arithmetic"),
        ("1\x00", "not arithmetic"),
        ("\ud800", "not arithmetic"),
        ("", "well-formed"),
        ("1 +", "well-formed"),
        ("1\n+ 2", "well-formed"),
        ("0777", "well-formed"),
        ("(" * 99 + "1" + ")" * 100, "well-formed"),
        ("-" * 199 + "1", "nested too deep"),
        ("sqrt(" * 33 + "1" + ")" * 33, None),
        ("1" * 201, "longer than"),
        ("x" * 10_000_000, "longer than"),
    ],
    ids=short,
)
def test_everything_else_is_refused_at_once(expression: str, said: str | None) -> None:
    """Without this a model could run code, or keep a worker busy for ever."""
    started = time.process_time()  # of this process alone: others may use the machine
    if said is None:
        calculate(expression)
    else:
        with pytest.raises(ToolError) as refused:
            calculate(expression)
        assert said in str(refused.value)
        assert len(str(refused.value)) < 300
    assert time.process_time() - started < 2


@given(st.text(max_size=220) | st.text("0123456789.+-*/%(), epiabsqrtlogmxn_", max_size=220))
def test_calculate_only_ever_refuses(expression: str) -> None:
    """Without this some expression would show the model a traceback of ours."""
    try:
        value = calculate(expression)
    except ToolError:
        return
    assert type(value) in {int, float}


_numbers = st.integers(0, 10**9).map(str) | st.floats(1e-9, 1e9).map(repr)
_sums = st.recursive(
    _numbers,
    lambda inner: (
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/", "//", "%"]), inner).map(
            lambda t: f"({t[0]}{t[1]}{t[2]})"
        )
        | inner.map(lambda text: f"(-{text})")
    ),
    max_leaves=8,
)


@given(_sums)
def test_calculate_agrees_with_python(expression: str) -> None:
    """Without this a mistake in the operator table would stay unseen."""
    if len(expression) > builtin.MAX_EXPRESSION:
        return
    try:
        expected = eval(compile(ast.parse(expression, mode="eval"), "sum", "eval"), {})
    except ZeroDivisionError:
        with pytest.raises(ToolError, match="zero"):
            calculate(expression)
        return
    assert calculate(expression) == expected


# --- one folder --------------------------------------------------------------------------------------

SECRET = "nobody may read this"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A shared folder with a secret beside it."""
    folder = tmp_path / "shared"
    (folder / "docs" / "deep").mkdir(parents=True)
    (folder / "docs" / "deep" / "a.txt").write_text("hello\n")
    (tmp_path / "secret.txt").write_text(SECRET)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.txt").write_text(SECRET)
    return folder


@pytest.fixture
def context(root: Path) -> ToolContext:
    return ToolContext(settings=Settings(files_root=str(root)))


def test_a_file_is_read_in_parts_that_join(root: Path, context: ToolContext) -> None:
    """Without this a model could not read a file that is longer than one answer."""
    text = "".join(chr(0x20AC + n % 50) + "añ🎉"[n % 3] for n in range(500))
    (root / "long.txt").write_text(text)
    parts, offset, rounds = "", 0, 0
    while offset is not None:
        part = read_file(context, "long.txt", offset, 7 + rounds % 5)
        parts, offset, rounds = parts + part.text, part.next_offset, rounds + 1
    assert parts == text
    part = read_file(context, "long.txt")
    assert part.size == len(text.encode())
    assert read_file(context, "docs//./deep/a.txt").text == "hello\n"
    assert read_file(context, "long.txt", 10**30) == builtin.FilePart("", 10**30, part.size, None)
    assert read_file(context, "long.txt", 0, 1).text  # at least one character, or a loop would never end


def test_a_large_file_answers_a_part(root: Path, context: ToolContext) -> None:
    """Without this one file could fill a worker's memory, or a model's context."""
    with (root / "huge.txt").open("wb") as huge:
        huge.write(b"a" * 200_000)
        huge.truncate(1 << 40)
    part = read_file(context, "huge.txt", 0, 10**12)
    assert len(part.text) == part.next_offset == context.settings.max_tool_output // 2
    assert part.size == 1 << 40


@pytest.mark.parametrize(
    "path",
    [
        "../secret.txt", "docs/../../secret.txt", "docs/../docs/deep/a.txt", "..", "docs/..", "/etc/passwd",
        "//etc/passwd", "docs/deep/a.txt\x00.png", "\x00", "missing.txt", "docs/deep/a.txt/x", "docs", ".",
        "", "x" * 300, "x/" * 5000, "\ud800", "~/x", "$HOME",
    ],
    ids=short,
)  # fmt: skip
def test_paths_that_lead_elsewhere_are_refused(context: ToolContext, root: Path, path: str) -> None:
    """Without this a model could read the machine's secrets."""
    with pytest.raises(ToolError) as refused:
        read_file(context, path)
    assert SECRET not in str(refused.value)
    assert str(root) not in str(refused.value)
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("target", ["../secret.txt", "docs/deep/a.txt", "/etc/passwd", "loop", "missing"])
def test_a_link_to_a_file_is_not_followed(root: Path, context: ToolContext, target: str) -> None:
    """Without this whoever can write in the folder could show the model any file."""
    (root / "loop").symlink_to(target)
    with pytest.raises(ToolError, match="symbolic link"):
        read_file(context, "loop")
    with pytest.raises(ToolError, match="symbolic link"):
        list_files(context, "loop")


@pytest.mark.parametrize("target", ["../outside", "docs", "/", "."])
def test_a_link_to_a_folder_is_not_followed(root: Path, context: ToolContext, target: str) -> None:
    """Without this a link in the middle of a path would lead outside."""
    (root / "docs" / "way").symlink_to(target)
    for path in ("docs/way/secret.txt", "docs/way/./x"):
        with pytest.raises(ToolError, match="symbolic link"):
            read_file(context, path)
    with pytest.raises(ToolError, match="symbolic link"):
        list_files(context, "docs/way")


@pytest.mark.parametrize("place", ["docs", "docs/deep"])
def test_a_folder_swapped_for_a_link_in_the_middle_leads_nowhere(
    root: Path, context: ToolContext, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Without this the moment between a check and its use would be a way out."""
    (root.parent / "outside" / "deep").mkdir()
    for folder in (root.parent / "outside", root.parent / "outside" / "deep"):
        (folder / "a.txt").write_text(SECRET)
    steps = 0

    def swap_after(step: int, really: Callable[..., int] = os.open) -> Callable[..., int]:
        def opened(*args: object, **options: object) -> int:
            nonlocal steps
            steps += 1
            if steps == step:
                (root / place).rename(root / "moved")
                (root / place).symlink_to(root.parent / "outside")
            return really(*args, **options)

        return opened

    monkeypatch.setattr(os, "open", swap := swap_after(place.count("/") + 2))
    monkeypatch.setattr(os, "supports_dir_fd", os.supports_dir_fd | {swap})
    with pytest.raises(ToolError, match="symbolic link"):
        read_file(context, "docs/deep/a.txt")
    assert steps == place.count("/") + 2


def test_swapping_at_random_never_shows_the_secret(root: Path, context: ToolContext) -> None:
    """Without this the test above would only show the moments that we thought of."""
    (root.parent / "outside" / "a.txt").write_text(SECRET)
    (root / "docs" / "a.txt").write_text("fine")
    link, stop = root / "link", threading.Event()
    link.symlink_to(root.parent / "outside")

    def swap() -> None:
        while not stop.is_set():
            (root / "docs").rename(root / "aside")
            link.rename(root / "docs")
            (root / "docs").rename(link)
            (root / "aside").rename(root / "docs")

    swapping = threading.Thread(target=swap)
    swapping.start()
    try:
        seen = set()
        for _ in range(2000):
            try:
                seen.add(read_file(context, "docs/a.txt").text)
            except ToolError:
                seen.add("refused")
    finally:
        stop.set()
        swapping.join()
    assert seen <= {"fine", "refused"}


def test_what_is_not_a_regular_file_neither_hangs_nor_opens(root: Path, context: ToolContext) -> None:
    """Without this a pipe in the folder would hold a thread for ever."""
    os.mkfifo(root / "pipe")
    listening = socket.socket(socket.AF_UNIX)
    here = Path.cwd()
    try:
        os.chdir(root)  # a socket's path must be short
        listening.bind("socket")
    finally:
        os.chdir(here)
    for name in ("pipe", "socket", "docs"):
        with pytest.raises(ToolError, match=name) as refused:
            read_file(context, name)
        assert ("not a regular file" in str(refused.value)) == (name != "socket")
    assert [(one.name, one.type) for one in list_files(context).entries] == [
        ("docs", "directory"), ("pipe", "other"), ("socket", "other"),
    ]  # fmt: skip
    listening.close()


@pytest.mark.parametrize("content", [b"a\x00b", b"\x89PNG\r\n", b"caf\xe9", b"a" * 50 + b"\xff" * 50])
def test_what_is_no_text_is_refused(root: Path, context: ToolContext, content: bytes) -> None:
    """Without this a model would be fed noise."""
    (root / "x.bin").write_bytes(content)
    with pytest.raises(ToolError, match="not a UTF-8 text file"):
        read_file(context, "x.bin")


@pytest.mark.parametrize(("offset", "limit"), [(-1, 10), (0, 0), (0, -5)])
def test_numbers_that_do_not_fit_are_refused(context: ToolContext, offset: int, limit: int) -> None:
    """Without this a negative offset would be the system's error, told in its words."""
    with pytest.raises(ToolError, match="offset"):
        read_file(context, "docs/deep/a.txt", offset, limit)
    with pytest.raises(ToolError, match="limit"):
        list_files(context, ".", limit - 10)


def test_a_folder_is_listed_in_order(root: Path, context: ToolContext) -> None:
    """Without this a model could not find what to read."""
    (root / "b.txt").write_text("12345")
    (root / "a").symlink_to("/etc")
    listing = list_files(context)
    assert [(one.name, one.type, one.size) for one in listing.entries] == [
        ("a", "symlink", None), ("b.txt", "file", 5), ("docs", "directory", None),
    ]  # fmt: skip
    assert not listing.more
    assert [one.name for one in list_files(context, "docs/deep").entries] == ["a.txt"]
    short = list_files(context, ".", 2)
    assert [one.name for one in short.entries] == ["a", "b.txt"]
    assert short.more
    for path in ("..", "/", "docs/../..", "missing", "b.txt", "\x00"):
        with pytest.raises(ToolError):
            list_files(context, path)


def test_a_huge_folder_answers(root: Path, context: ToolContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this a folder of millions would hold a thread and its memory."""
    monkeypatch.setattr(builtin, "MAX_SCAN", 20)
    for n in range(30):
        (root / f"{n:03}").touch()
    listing = list_files(context)
    assert len(listing.entries) == 20
    assert listing.more


def test_names_that_are_no_text_do_no_harm(root: Path, context: ToolContext) -> None:
    """Without this one odd file name would make its folder unreadable."""
    (root / os.fsdecode(b"caf\xe9")).write_text("x")
    assert len(list_files(context).entries) == 2


@pytest.mark.parametrize("files_root", ["", "missing-folder"])
def test_without_a_folder_nothing_is_read(files_root: str) -> None:
    """Without this an unset root could mean the current directory."""
    context = ToolContext(settings=Settings(files_root=files_root))
    for act in (lambda: read_file(context, "README.md"), lambda: list_files(context)):
        with pytest.raises(ToolError, match="files_root"):
            act()


def test_no_descriptor_is_left_open(root: Path, context: ToolContext) -> None:
    """Without this a worker would run out of descriptors after some thousand calls."""

    def count() -> int:
        descriptors = Path("/proc/self/fd")
        return len(list(descriptors.iterdir())) if descriptors.exists() else 0

    (root / "link").symlink_to("docs")
    before = count()
    for path in ("docs/deep/a.txt", "docs/deep/missing", "link/x", "docs", "missing/x"):
        for act in (read_file, list_files):
            with contextlib.suppress(ToolError):
                act(context, path)
    assert count() == before
