"""An agent that searches a folder of notes, reads some, and publishes a report once a person agrees.

Rule 1: tools see the notes and nothing else; names come from a model and are looked up, never joined.
Rule 2: publishing is `once`. The report is a file that is named by the call's idempotency key and appears
whole; after a crash `find_report` looks for it, so that a report is published once, and known to be.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import msgspec

from examples.program import app, output
from streamjobs import Context, ToolContext, ToolError

MAX_HITS = 10
BUNDLED = Path(__file__).parent / "notes"


class Hit(msgspec.Struct, frozen=True):
    """A line of a note in which words were found."""

    note: str
    line: int
    text: str
    words: int


class Published(msgspec.Struct, frozen=True):
    """Where a report is."""

    report: str


class Question(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to find out, and which model does."""

    text: Annotated[str, msgspec.Meta(min_length=1, max_length=4000)]
    model: str = ""


def notes() -> dict[str, Path]:
    """Every note by its name: those of EXAMPLES_NOTES, or the bundled ones."""
    folder = Path(os.environ.get("EXAMPLES_NOTES", BUNDLED))
    return {path.stem: path for path in sorted(folder.glob("*.md"))}


@app.tool(effect="pure")
def search_notes(query: str) -> list[Hit]:
    """Find the lines of the notes that have most words of the query."""
    wanted = _words(query)
    hits = [hit for name, path in notes().items() for hit in _hits(name, path, wanted)]
    return sorted(hits, key=lambda hit: -hit.words)[:MAX_HITS]


@app.tool(effect="pure")
def read_note(name: str) -> str:
    """The whole text of a note, by its name."""
    known = notes()
    if name not in known:
        raise ToolError(f"there is no note {name!r}; there are: {', '.join(known)}")
    return known[name].read_text(encoding="utf-8")


def find_report(key: str) -> Published:
    """The report that was published under a key. Raises `LookupError` where none was."""
    path = _report(key)
    if not path.exists():
        raise LookupError(key)
    return Published(str(path))


@app.tool(effect="once", approval="Publish this report?", lookup=find_report)
def publish_report(title: str, markdown: str, context: ToolContext) -> Published:
    """Publish a report, in Markdown, for everybody to read. A person is asked first."""
    path = _report(context.idempotency_key)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, suffix=".draft") as draft:
        draft.write(f"# {title}\n\n{markdown}\n")
        draft.flush()
        os.link(draft.name, path)  # whole or not at all, and never over another
    return Published(str(path))


researcher = app.agent(
    "researcher",
    role="a researcher who answers from notes",
    instructions="Search the notes, read what seems to matter, and answer with the names of the notes that "
    "you used. Publish a report if you are asked for one. If a person refuses it, say so and why.",
    tools=[search_notes, read_note, publish_report],
)


@app.workflow("research")
async def research(ctx: Context, question: Question) -> str:
    """Let the researcher answer a question."""
    ctx.progress(0, "asking the researcher")
    return await ctx.chat(question.text, agent=researcher.name, model=question.model)


def _report(key: str) -> Path:
    return output("reports", f"{key}.md")


def _hits(name: str, path: Path, wanted: set[str]) -> Iterable[Hit]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        found = len(wanted & _words(line))
        if found:
            yield Hit(name, number, line.strip()[:300], found)


def _words(text: str) -> set[str]:
    return {word for word in re.findall(r"\w+", text.lower()) if len(word) > 2}
