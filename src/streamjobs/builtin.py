"""The tools that come with every App: the time, a calculator, and one folder to read.

Rule 1: arguments come from a model, and so from whoever wrote what it read: all of them are hostile.
Rule 2: a refusal is a `ToolError` in words that help the model to ask better, without the machine's paths.
Rule 3: every call is bounded in time and memory before it starts, not by its timeout.

The folder is walked one component at a time, each opened relative to the one before and never through a
symbolic link, so there is no moment between a check and its use. Hard links and mounts are the operator's.

Rejected: resolving the path and comparing its prefix. A directory that becomes a symbolic link in between
passes the comparison. Rejected: `eval` with emptied builtins, which attributes of any number escape.
"""

from __future__ import annotations

import ast
import contextlib
import errno
import itertools
import math
import os
import re
import stat
import zoneinfo
from collections.abc import Callable, Generator, Mapping
from datetime import UTC, datetime, tzinfo

import msgspec

from streamjobs.errors import ToolError
from streamjobs.tool import Tool, ToolContext

Number = int | float

MAX_EXPRESSION = 200
MAX_LEVELS = 120
"""Of an expression's tree; a sum of a hundred terms has a hundred."""
MAX_BITS = 1024
"""Of a whole number, about what a float can reach (308 digits)."""

DEFAULT_LIMIT = 16 * 1024
MAX_ENTRIES = 1000
MAX_SCAN = 10_000
"""Entries of a folder that are looked at, so that a huge one answers too."""


# --- time --------------------------------------------------------------------------------------------


class Moment(msgspec.Struct, frozen=True):
    """A time as a model reads it best."""

    time: str
    timezone: str
    weekday: str


def get_current_time(timezone: str = "UTC") -> Moment:
    """The date and time now, in an IANA time zone such as Europe/Paris."""
    now = datetime.now(_zone(timezone))
    return Moment(now.isoformat(timespec="seconds"), timezone, now.strftime("%A"))


def _zone(name: str) -> tzinfo:
    if name.upper() in {"UTC", "Z", "GMT"}:
        return UTC  # known without a time zone database, which small images lack
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise ToolError(f"unknown time zone {name[:100]!r}, use an IANA name such as Europe/Paris") from error


# --- arithmetic --------------------------------------------------------------------------------------


def calculate(expression: str) -> Number:
    """Calculate an arithmetic expression: numbers, + - * / // % ** and parentheses, pi, e and tau,
    and the functions abs, ceil, cos, exp, floor, log, log10, log2, max, min, round, sin, sqrt and tan.
    """
    if len(expression) > MAX_EXPRESSION:
        raise ToolError(f"the expression is longer than {MAX_EXPRESSION} characters")
    if strange := re.search(r"[^0-9A-Za-z_.+\-*/%(),\s]", expression):
        raise ToolError(f"{strange[0]!r} is not arithmetic; a power is written **")
    return _value(_parse(expression), MAX_LEVELS)


def _parse(expression: str) -> ast.expr:
    try:
        return ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ToolError("the expression is not well-formed") from error


def _value(node: ast.expr, levels: int) -> Number:
    """The value of an expression; every step of it is finite, real and within `MAX_BITS`."""
    if levels == 0:
        raise ToolError("the expression is nested too deep")
    try:
        return _bounded(_evaluate(node, levels - 1))
    except ZeroDivisionError as error:
        raise ToolError("division by zero") from error
    except OverflowError as error:
        raise ToolError("the number is too large") from error
    except (ValueError, TypeError) as error:
        raise ToolError(f"not defined: {error}") from error


def _evaluate(node: ast.expr, levels: int) -> object:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name) if name in CONSTANTS:
            return CONSTANTS[name]
        case ast.UnaryOp(op=op, operand=operand) if type(op) in UNARY:
            return UNARY[type(op)](_value(operand, levels))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in BINARY:
            return BINARY[type(op)](_value(left, levels), _value(right, levels))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in FUNCTIONS:
            return FUNCTIONS[name](*(_value(argument, levels) for argument in arguments))
        case ast.Name(id=name) | ast.Call(func=ast.Name(id=name)) if name not in FUNCTIONS:
            raise ToolError(f"{name!r} is not known; known are {', '.join((*CONSTANTS, *FUNCTIONS))}")
        case _:
            raise ToolError(
                "only numbers, + - * / // % **, parentheses and calls such as sqrt(2) are understood"
            )


def _bounded(value: object) -> Number:
    if type(value) is int:
        if value.bit_length() > MAX_BITS:
            raise OverflowError
        return value
    if type(value) is float:
        if not math.isfinite(value):
            raise OverflowError
        return value
    raise ToolError("only real numbers are understood")


def _power(base: Number, exponent: Number) -> object:
    if isinstance(base, int) and isinstance(exponent, int) and (base.bit_length() - 1) * exponent > MAX_BITS:
        raise OverflowError  # refused before it is computed: 9**9**9 would take minutes
    return base**exponent


def _round(number: Number, digits: Number = 0) -> Number:
    if not isinstance(digits, int) or abs(digits) > 20:
        raise ToolError("round takes up to 20 digits")
    return round(number, digits) if digits else round(number)


CONSTANTS: Mapping[str, float] = {"pi": math.pi, "e": math.e, "tau": math.tau}

UNARY: Mapping[type[ast.unaryop], Callable[[Number], Number]] = {
    ast.UAdd: lambda a: +a,
    ast.USub: lambda a: -a,
}

BINARY: Mapping[type[ast.operator], Callable[[Number, Number], object]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.FloorDiv: lambda a, b: a // b,
    ast.Mod: lambda a, b: a % b,
    ast.Pow: _power,
}

FUNCTIONS: Mapping[str, Callable[..., object]] = {
    "abs": abs,
    "ceil": math.ceil,
    "cos": math.cos,
    "exp": math.exp,
    "floor": math.floor,
    "log": math.log,
    "log10": math.log10,
    "log2": math.log2,
    "max": max,
    "min": min,
    "round": _round,
    "sin": math.sin,
    "sqrt": math.sqrt,
    "tan": math.tan,
}


# --- one folder --------------------------------------------------------------------------------------


class FilePart(msgspec.Struct, frozen=True):
    """A part of a text file; `next_offset` is where to go on, None at the end."""

    text: str
    offset: int
    size: int
    next_offset: int | None


class Entry(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a folder holds under a name: file, directory, symlink (never followed) or other."""

    name: str
    type: str
    size: int | None = None


class Listing(msgspec.Struct, frozen=True):
    """A folder's entries by name; `more` says that there are others."""

    entries: list[Entry]
    more: bool


def read_file(context: ToolContext, path: str, offset: int = 0, limit: int = DEFAULT_LIMIT) -> FilePart:
    """Read a text file, or `limit` bytes of it from byte `offset` on."""
    if offset < 0 or limit < 1:
        raise ToolError("offset must be 0 or more, and limit at least 1")
    # JSON escapes may double a text; half the limit keeps an answer whole.
    limit = max(4, min(limit, context.settings.max_tool_output // 2))
    with _refusing(path), _opened(context, "read_file", path) as file:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise ToolError(f"{_shown(path)} is not a regular file")
        raw = os.pread(file, limit, min(offset, status.st_size))
    text, used = _text_of(raw, path, is_end=offset + len(raw) >= status.st_size)
    end = offset + used
    return FilePart(text, offset, status.st_size, end if used and end < status.st_size else None)


def list_files(context: ToolContext, path: str = ".", limit: int = 200) -> Listing:
    """List a folder: names, types and sizes, sorted by name."""
    if not 1 <= limit <= MAX_ENTRIES:
        raise ToolError(f"limit must be from 1 to {MAX_ENTRIES}")
    with _refusing(path), _opened(context, "list_files", path, is_folder=True) as folder:
        with os.scandir(folder) as found:
            scanned = list(itertools.islice(found, MAX_SCAN))
            is_whole = next(found, None) is None
        entries = sorted(scanned, key=lambda entry: entry.name)[:limit]
        return Listing([_entry(one) for one in entries], more=not is_whole or len(scanned) > limit)


def _entry(found: os.DirEntry[str]) -> Entry:
    if found.is_symlink():
        return Entry(found.name, "symlink")
    if found.is_dir(follow_symlinks=False):
        return Entry(found.name, "directory")
    if not found.is_file(follow_symlinks=False):
        return Entry(found.name, "other")
    try:
        return Entry(found.name, "file", found.stat(follow_symlinks=False).st_size)
    except FileNotFoundError:  # removed meanwhile
        return Entry(found.name, "other")


def _text_of(raw: bytes, path: str, *, is_end: bool) -> tuple[str, int]:
    """The text, and how many bytes it takes: a character that the limit cut is left for the next part."""
    if b"\x00" not in raw:
        for cut in range(1 if is_end else 4):
            with contextlib.suppress(UnicodeDecodeError):
                return raw[: len(raw) - cut].decode(), max(len(raw) - cut, 0)
    raise ToolError(f"{_shown(path)} is not a UTF-8 text file, or the offset is inside a character")


@contextlib.contextmanager
def _opened(context: ToolContext, tool: str, path: str, *, is_folder: bool = False) -> Generator[int]:
    """Open a path under the root without ever following a symbolic link; gives a file descriptor."""
    names = _components(path)
    with contextlib.ExitStack() as stack:
        here = _root(context, tool)
        stack.callback(os.close, here)
        for place, name in enumerate(names, start=1):
            # O_NONBLOCK keeps a FIFO from waiting for its writer.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
            if is_folder or place < len(names):
                flags |= os.O_DIRECTORY
            here = os.open(name, flags, dir_fd=here)
            stack.callback(os.close, here)
        yield here


def _root(context: ToolContext, tool: str) -> int:
    if not context.settings.files_root:
        raise ToolError(f"{tool} is not configured: the setting files_root names the folder it may see")
    if os.open not in os.supports_dir_fd:
        raise ToolError(f"{tool} does not work on this operating system")
    try:
        return os.open(context.settings.files_root, os.O_RDONLY | os.O_DIRECTORY)
    except (OSError, ValueError) as error:
        raise ToolError(f"{tool} is not available: the folder files_root cannot be opened") from error


def _components(path: str) -> list[str]:
    """The names of a relative path, at least one. Raises `ToolError` for what could lead outside."""
    if "\x00" in path:
        raise ToolError("a path cannot have a NUL in it")
    if path.startswith("/"):
        raise ToolError(f"{_shown(path)} is absolute; paths are relative to the shared folder")
    names = [name for name in path.split("/") if name not in {"", "."}]
    if ".." in names:
        raise ToolError(f"{_shown(path)} has '..' in it; paths cannot leave the shared folder")
    if len(path) > 4096:
        raise ToolError("the path is too long")
    return names or ["."]


@contextlib.contextmanager
def _refusing(path: str) -> Generator[None]:
    """Tell what the system refused, without the machine's own paths."""
    try:
        yield
    except UnicodeError as error:
        raise ToolError(f"{_shown(path)} is not a possible name") from error
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.ENOTDIR, errno.EMLINK}:
            reason = "Not a directory, or a symbolic link, which is not followed"
        else:
            reason = os.strerror(error.errno or errno.EIO)
        raise ToolError(f"{_shown(path)}: {reason}") from error


def _shown(path: str) -> str:
    return repr(path if len(path) <= 200 else path[:200] + "…")


BUILTIN_TOOLS = (
    Tool.of(get_current_time, effect="pure"),
    Tool.of(calculate, effect="pure"),
    Tool.of(read_file, effect="pure", needs="files_root"),
    Tool.of(list_files, effect="pure", needs="files_root"),
)
