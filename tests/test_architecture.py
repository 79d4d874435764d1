"""What keeps the code readable when nobody is looking: where imports may point, and how large things may
grow."""

from __future__ import annotations

import ast
import functools
import gc
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "streamjobs"

LAYERS = [
    {"errors", "redaction"},
    {"cursor", "events", "faults", "cron", "bounded", "encryption"},
    {"approvals", "segments", "retention", "targets", "confidential"},
    {"job", "effects", "retry", "config", "metrics", "schedule", "webhook", "outgoing", "archive"},
    {"logs", "identity", "safe_client"},
    {"store", "llm"},
    {"inputs"},
    {"tool"},
    {"agent", "builtin", "workflow"},
    {"canary"},
    {"app"},
    {"worker", "projections"},
    {"gateway"},
    {"client"},
    {"web"},
    {"cli"},
]
ANYTHING = {"testing", "__main__", "__init__"}
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
MAY_IMPORT_TESTING = {"testing", "cli"}
STRANGERS = [{"worker", "gateway"}, {"worker", "projections"}, {"projections", "gateway"}]
FILES = sorted(SOURCE.rglob("*.py"))


@functools.cache
def tree(path: Path) -> ast.Module:
    gc.disable()  # one that runs meanwhile makes CPython 3.11 count its recursion wrong: a SystemError
    try:
        return ast.parse(path.read_text())
    finally:
        gc.enable()


def part(path: Path) -> str:
    """The package or module right under streamjobs that a file belongs to."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def name_of(path: Path) -> str:
    return str(path.relative_to(SOURCE))


def imports(module: ast.AST) -> Iterator[str]:
    """Every module imported anywhere in a file, in functions and for type checking too."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they point"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_parts(path: Path) -> set[str]:
    found = {name.split(".")[1] for name in imports(tree(path)) if name.startswith("streamjobs.")}
    return {name for name in found if name in RANK or name in ANYTHING}


def test_every_part_has_its_place():
    """A new package would be free to import whatever it likes."""
    assert {part(path) for path in FILES} <= set(RANK) | ANYTHING


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_down(path: Path):
    """A cycle: then nothing can be read, tested or replaced alone."""
    own = part(path)
    if own in ANYTHING:
        return
    for other in imported_parts(path) - {own} - ANYTHING:
        assert RANK[other] < RANK[own], other


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_roles_are_strangers(path: Path):
    """The three roles run in processes of their own: a shortcut between them would work in `dev` only."""
    own = part(path)
    assert not any({own, other} in STRANGERS for other in imported_parts(path))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_that_is_shipped_needs_the_testing_kit(path: Path):
    """A scripted provider would be one import away from production."""
    if part(path) not in MAY_IMPORT_TESTING:
        assert "testing" not in imported_parts(path)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_the_store_talks_to_redis(path: Path):
    """State would change past the scripts, and the invariants with it."""
    used = {name.split(".")[0] for name in imports(tree(path))}
    if part(path) != "store":
        assert used & {"redis", "hiredis", "fakeredis"} == set()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_stay_small(path: Path):
    """The worker becomes one file of 1,800 lines, as everywhere else, and nobody dares to change it."""
    source = path.read_text()
    assert len(source.splitlines()) <= 750
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, node.name


def test_few_lines_are_excused_from_coverage():
    """The figure would be bought with exceptions."""
    excused = itertools.chain.from_iterable(path.read_text().splitlines() for path in FILES)
    assert sum("pragma: no cover" in line for line in excused) <= 10


def test_the_rules_here_can_fail():
    """Each of the above passes for ever if its way of reading the source finds nothing."""
    assert imported_parts(SOURCE / "worker" / "worker.py") >= {"store", "app"}
    assert "redis" in {name.split(".")[0] for name in imports(tree(SOURCE / "store" / "live.py"))}
    assert "testing" in imported_parts(SOURCE / "cli" / "local.py")
    assert len(FILES) > 40
