"""What the README and the guides show must work: code runs, commands exist, links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from streamjobs import App
from streamjobs.cli.main import cli

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("loadtests/*.md")])
README = (ROOT / "README.md").read_text()


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", blocks(README, "python"))
def test_python_of_the_readme_runs(code: str) -> None:
    """Without it, the first thing that a Python developer copies raises."""
    namespace: dict[str, object] = {"__name__": "readme"}
    exec(compile(code, "README.md", "exec"), namespace)
    assert isinstance(namespace["app"], App)


def commands(page: str) -> list[list[str]]:
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("streamjobs ")]


@pytest.mark.parametrize("words", commands(README), ids=" ".join)
def test_commands_of_the_readme_exist(words: list[str]) -> None:
    """Without it, the README tells people to type options that are not there."""
    with click.Context(cli) as context:
        command = cli.get_command(context, words[1])
        assert command is not None, words[1]
        command.make_parser(context).parse_args(words[2:])


def test_make_targets_of_the_readme_exist() -> None:
    """Without it, `make demo` may be a promise of the README alone."""
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for target in re.findall(r"`?\bmake ([a-z]+)\b(?:`| ARGS|$)", page.read_text(), re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page.name}: make {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """Without it, a renamed file leaves readers at a dead end."""
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target
