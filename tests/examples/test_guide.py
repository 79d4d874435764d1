"""docs/workflows.md: its program is one, every workflow of it is run, its commands exist."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import click
import pytest

from streamjobs import App
from streamjobs.cli.main import cli
from tests.conftest import RedisProcess
from tests.harness import says, talking
from tests.test_readme import blocks, commands

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "workflows.md").read_text()
EXAMPLES = (ROOT / "examples" / "README.md").read_text()


class Case(NamedTuple):
    """What is put into a workflow, what it is told from outside, and what comes out."""

    given: Any
    result: Any
    signals: Mapping[str, Any] = {}


ORDER = {"id": "o1", "items": ["pen", "book"]}
YES, NO = {"decision": "approve"}, {"decision": "deny", "comment": "too late"}

CASES = {
    "checkout": [Case(ORDER, {"order": "o1", "total": 700})],
    "raffle": [Case(["Ada"], "Ada")],
    "reserve": [
        Case("pen", "reserved pen"),
        Case("unicorn", "not reserved: step 'reserve': there are no unicorns"),
    ],
    "pay_order": [Case(5, "paid 5", {"approval": YES}), Case(5, "denied: too late", {"approval": NO})],
    "reply": [Case("It broke.", "We are sorry.")],
    "deliver": [
        Case("o1", "o1: handed over", {"parcel": {"weight": 2}, "approval": YES}),
        Case("o1", "o1: kept, too late", {"parcel": {"weight": 2}, "approval": NO}),
    ],
    "checkout_all": [Case([ORDER, ORDER | {"id": "o2"}], 1400)],
    "inventory": [Case({"pens": 3, "books": 9}, 12)],
}


@pytest.fixture(scope="module")
def program() -> Iterator[ModuleType]:
    """The guide's code, as one module."""
    module = ModuleType("shop_of_the_guide")
    sys.modules[module.__name__] = module  # where its type hints are looked up
    exec(compile("\n\n".join(blocks(GUIDE, "python")), "docs/workflows.md", "exec"), module.__dict__)
    yield module
    del sys.modules[module.__name__]


def test_every_workflow_of_the_guide_is_run_here(program: ModuleType):
    """A workflow could be added to the guide that nobody has ever run."""
    app: App = program.app
    assert set(app.workflows) == set(CASES)


@pytest.mark.parametrize(
    ("kind", "case"), [(kind, case) for kind, cases in CASES.items() for case in cases], ids=str
)
async def test_workflows_of_the_guide_do_what_it_says(
    redis: RedisProcess, program: ModuleType, kind: str, case: Case
):
    """What people copy first would not work."""
    async with talking(redis.url, says("We are sorry."), program.app, park_after=0.1) as bench:
        job_id = await bench.submit(kind, case.given)
        for name, payload in case.signals.items():
            if name == "approval":
                await bench.until(job_id, "approval.requested")
            await bench.store.jobs.signal(job_id, name, payload, by="a person")
        view = await bench.ended(job_id)
    assert view.status == "completed", view.error
    assert view.result == case.result


@pytest.mark.parametrize("words", commands(EXAMPLES), ids=" ".join)
def test_commands_of_the_examples_exist(words: list[str]):
    """The examples' page would tell people to type options that are not there."""
    with click.Context(cli) as context:
        command: Any = cli
        while isinstance(command, click.Group):
            command = command.get_command(context, words[1])
            assert command is not None, words[1]
            words = words[1:]
        command.make_parser(context).parse_args(words[1:])


def test_links_of_the_examples_lead_somewhere():
    """A renamed example would leave readers at a dead end."""
    targets = re.findall(r"\]\(([^)#]+)", EXAMPLES)
    assert len(targets) > 5
    for target in targets:
        assert (ROOT / "examples" / target).exists(), target
