"""The registry: what can be registered, what a model is told, what a submission may say."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, TypedDict

import msgspec
import pytest

from streamjobs.app import MAX_DEPTH, Agent, App, ChatInput, Tool, ToolContext, Workflow, load_app
from streamjobs.config import Settings
from streamjobs.errors import ConfigError, Invalid, UnknownAgent, UnknownKind, UnknownTool


class Project(msgspec.Struct, forbid_unknown_fields=True):
    """A project."""

    path: str
    depth: Annotated[int, msgspec.Meta(ge=1)] = 1


@dataclasses.dataclass
class Person:
    name: str
    age: int = 0


class Options(TypedDict):
    fast: bool


class Ctx:
    """Stands for the context of a workflow."""


@pytest.fixture
def app() -> App:
    return App(builtin_tools=False)


def schema_of(function: Any) -> dict[str, Any]:
    return Tool.of(function).parameters


# --- tools -------------------------------------------------------------------------------------------


def test_schema_says_types_defaults_and_choices(app: App) -> None:
    """Without this a model would guess what a tool takes."""

    @app.tool
    async def get_weather(
        city: Annotated[str, msgspec.Meta(min_length=1, description="where")],
        unit: Literal["c", "f"] = "c",
        days: Optional[int] = None,  # noqa: UP045 - users write it so
    ) -> str:
        """The weather in a city,
        now.

        Not for the model.
        """
        return city

    tool = app.tools["get_weather"]
    assert tool.description == "The weather in a city, now."
    assert tool.parameters == {
        "type": "object",
        "properties": {
            "city": {"type": "string", "minLength": 1, "description": "where"},
            "unit": {"enum": ["c", "f"], "default": "c"},
            "days": {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None},
        },
        "required": ["city"],
        "additionalProperties": False,
    }
    assert tool.is_async
    assert tool.spec.name == "get_weather"


def test_every_reference_in_a_schema_resolves() -> None:
    """Without this a provider would refuse every request that offers a tool with a struct in it."""

    def plan(
        project: Project, people: list[Person], options: Options, again: Project | None = None
    ) -> None: ...

    schema = schema_of(plan)
    text = json.dumps(schema)
    named = {part.split('"')[0] for part in text.split('"#/$defs/')[1:]}
    assert named == set(schema["$defs"]) == {"Project", "Person", "Options"}
    assert "arguments_of" not in text
    assert schema["$defs"]["Project"]["properties"]["depth"]["minimum"] == 1


def test_defaults_that_are_lists_or_structs_are_fresh_in_each_call() -> None:
    """Without this one call's list would be the next call's default."""

    def collect(into: list[int] = [1], project: Project = Project("here")) -> None: ...  # noqa: B006, B008

    tool = Tool.of(collect)
    first, second = (msgspec.json.decode(b"{}", type=tool.arguments_type) for _ in range(2))
    assert first == second
    assert first.into is not second.into  # type: ignore[attr-defined]
    assert tool.parameters["required"] == []


def test_a_type_named_like_ours_does_no_harm() -> None:
    """Without this a user's own `Arguments` class would break the schema."""

    class Arguments(msgspec.Struct):
        x: int

    def act(a: Any) -> None: ...

    act.__annotations__["a"] = Arguments
    assert schema_of(act)["properties"]["a"] == {"$ref": "#/$defs/Arguments"}


def test_the_context_is_no_argument_of_the_model() -> None:
    """Without this a model could fill in the context, or be asked to."""

    def act(x: int, context: ToolContext) -> None: ...

    tool = Tool.of(act)
    assert tool.context_parameter == "context"
    assert set(tool.parameters["properties"]) == {"x"}
    assert not tool.is_async


def test_a_decorated_function_stays_itself(app: App) -> None:
    """Without this users could not test or reuse their tools as functions."""

    @app.tool(name="twice", description="Doubles.", timeout=3, effect="once")
    def double(x: int) -> int:
        return 2 * x

    assert double(4) == 8
    tool = app.find_tool(double)
    assert (tool.name, tool.description, tool.timeout, tool.effect) == ("twice", "Doubles.", 3, "once")


def positional_only(x: int, /) -> None: ...
def variadic(*x: int) -> None: ...
def keywords(**x: int) -> None: ...
def unresolved(x: Missing) -> None: ...  # type: ignore[name-defined] # noqa: F821
def foreign(x: Ctx) -> None: ...
def two_contexts(a: ToolContext, b: ToolContext) -> None: ...
def generator(x: int) -> Iterator[int]:
    yield x


@pytest.mark.parametrize(
    ("function", "word"),
    [
        (positional_only, "'x'"),
        (variadic, "*x"),
        (keywords, "**x"),
        (unresolved, "Missing"),
        (foreign, "Ctx"),
        (two_contexts, "a, b"),
        (generator, "generator"),
    ],
)
def test_what_a_model_cannot_call_is_refused_at_registration(app: App, function: Any, word: str) -> None:
    """Without this a tool that never can work would be found by a user's job."""
    with pytest.raises(TypeError) as refused:
        app.tool(function)
    assert function.__name__ in str(refused.value)
    assert word in str(refused.value)


@pytest.mark.parametrize(
    "options",
    [
        {"name": "with space"},
        {"name": "x" * 65},
        {"name": "n\n"},
        {"effect": "twice"},
        {"timeout": 0},
        {"timeout": -1},
    ],
)
def test_options_that_do_not_fit_are_refused(app: App, options: dict[str, Any]) -> None:
    """Without this a provider would refuse the name, or a crash would meet an unknown policy."""
    with pytest.raises(ValueError, match="tool"):
        app.tool(**options)(lambda: None)
    assert not app.tools


def test_a_name_is_taken_once() -> None:
    """Without this one of two tools would silently be the other."""
    app = App()
    with pytest.raises(ValueError, match="'calculate' is already registered"):

        @app.tool
        def calculate() -> None: ...

    own = App(builtin_tools=False)
    own.tool(name="calculate")(lambda: 1)
    assert list(own.tools) == ["calculate"]


def test_a_function_that_was_never_registered_is_named(app: App) -> None:
    """Without this a forgotten decorator would be looked for in the wrong place."""
    app.tool(name="other")(lambda: 1)
    with pytest.raises(UnknownTool, match="'schema_of' is not registered"):
        app.find_tool(schema_of)
    with pytest.raises(TypeError, match="has no name"):
        app.tool(functools.partial(schema_of, 1))


def test_two_types_of_one_name_are_told_apart_or_refused(app: App) -> None:
    """Without this one of the two would have the other's schema."""
    one, two = (msgspec.defstruct("Same", [(field, int)]) for field in "ab")

    def act(x: Any, y: Any) -> None: ...

    act.__annotations__.update(x=one, y=two)
    with pytest.raises(TypeError, match="two types have the name"):
        app.tool(act)


def test_mappings_are_read_only(app: App) -> None:
    """Without this a caller could slip in a tool that nobody checked."""
    for mapping in (app.tools, app.agents, app.workflows):
        with pytest.raises(TypeError):
            mapping["x"] = None  # type: ignore[index]


def test_file_tools_are_offered_only_with_a_root(tmp_path: Path) -> None:
    """Without this every model would be told of files it may not see."""
    app = App()
    assert set(app.tools) == {"get_current_time", "calculate", "read_file", "list_files"}
    assert set(app.offered_tools(Settings())) == {"get_current_time", "calculate"}
    assert set(app.offered_tools(Settings(files_root=str(tmp_path)))) == set(app.tools)


def test_progress_is_made_fit_for_an_event() -> None:
    """Without this a tool's NaN or half a surrogate pair would break the log."""
    seen: list[tuple[float | None, str]] = []
    context = ToolContext(on_progress=lambda percent, message: seen.append((percent, message)))
    context.progress(float("nan"), "a\ud800b")
    context.progress(140)
    context.progress(-1, "x" * 10_000)
    context.progress(None)
    assert seen[0] == (None, "a\ufffdb")
    assert seen[1] == (100.0, "")
    assert seen[2][0] == 0.0
    assert len(seen[2][1]) == 500
    assert seen[3] == (None, "")
    assert not context.is_cancelled
    ToolContext().progress(1)  # nobody listens


def test_a_context_shows_no_secrets() -> None:
    """Without this a logged context would hold the provider's keys."""
    assert "sk-secret" not in repr(ToolContext(settings=Settings(openai_api_key="sk-secret")))


# --- agents ------------------------------------------------------------------------------------------


def test_an_agent_composes_its_prompt(app: App) -> None:
    """Without this role and backstory would be decoration."""

    @app.tool
    def search(query: str) -> str:
        return query

    agent = app.agent(
        name="editor", role="an editor", backstory="You have seen much.", instructions="Be brief.",
        model="m", parameters={"temperature": 0}, tools=[search],
    )  # fmt: skip
    assert app.agents["editor"] is agent
    assert agent.system_prompt() == "You are an editor.\n\nYou have seen much.\n\nBe brief."
    assert agent.tools == ("search",)
    assert Agent(name="a", role="You are a pirate").system_prompt() == "You are a pirate"
    assert Agent(name="a").system_prompt() == ""


def test_an_agent_can_be_a_function(app: App) -> None:
    """Without this instructions could not depend on the input."""

    @app.agent(role="a critic")
    def critic(chat: ChatInput) -> str | None:
        """Be harsh."""
        return "Be kind." if chat.model == "kind" else None

    @app.agent
    def plain() -> None:
        """Say hello."""

    @app.agent("named", instructions="Given.")
    def function() -> None:
        """Not used."""

    assert set(app.agents) == {"critic", "plain", "named"}
    assert critic.system_prompt() == "You are a critic.\n\nBe harsh."
    assert app.agents["critic"].system_prompt(ChatInput(prompt="x")) == "You are a critic.\n\nBe harsh."
    assert critic.system_prompt(ChatInput(prompt="x", model="kind")) == "You are a critic.\n\nBe kind."
    assert plain.system_prompt() == "Say hello."
    assert app.agents["named"].system_prompt() == "Given."


def test_agents_that_cannot_work_are_refused(app: App) -> None:
    """Without this the mistake would show in a user's chat."""
    with pytest.raises(UnknownTool, match="serch"):
        app.agent("a", tools=["serch"])
    with pytest.raises(ValueError, match="stream"):
        app.agent("a", parameters={"stream": False})
    with pytest.raises(ValueError, match="name"):
        app.agent("a b")
    app.agent("a")
    with pytest.raises(ValueError, match="already"):
        app.agent("a")
    with pytest.raises(TypeError, match="async"):

        @app.agent  # type: ignore[arg-type]
        async def b() -> str:
            return ""

    with pytest.raises(TypeError, match="ChatInput"):
        app.agent("c")(lambda x, y: "")
    with pytest.raises(TypeError, match="int"):
        app.agent("d")(lambda: 5).system_prompt()  # type: ignore[arg-type, return-value]


# --- workflows ---------------------------------------------------------------------------------------


def test_a_workflow_knows_its_types(app: App) -> None:
    """Without this every workflow would have to check its own input."""

    @app.workflow("review", timeout=60, max_attempts=2, queue="slow")
    async def review(ctx: Ctx, project: Project) -> Person:
        """Review a project."""
        return Person(project.path)

    flow = app.workflows["review"]
    assert (flow.input_type, flow.result_type, flow.function) == (Project, Person, review)
    assert (flow.timeout, flow.max_attempts, flow.queue) == (60, 2, "slow")
    assert flow.description == "Review a project."
    assert flow.input_schema["$ref"] == "#/$defs/Project"
    assert flow.arguments(b'{"path":"x"}') == (Project("x"),)
    assert app.kinds == ("chat", "review")


def test_input_may_be_absent(app: App) -> None:
    """Without this a workflow without input could not be written, or not be submitted."""

    @app.workflow("tick")
    async def tick(ctx: Ctx) -> None: ...

    @app.workflow("anything")
    async def anything(ctx, value): ...  # type: ignore[no-untyped-def]

    @app.workflow("with-default")
    async def with_default(ctx: Ctx, project: Project = Project("here")) -> None: ...  # noqa: B008

    assert app.workflows["tick"].arguments(b"null") == ()
    assert app.workflows["tick"].arguments(b'{"ignored":1}') == ()
    assert app.workflows["anything"].arguments(b"[1]") == ([1],)
    assert app.workflows["with-default"].arguments(b"null") == ()
    assert app.workflows["with-default"].arguments(b'{"path":"x"}') == (Project("x"),)


def test_workflows_that_cannot_work_are_refused(app: App) -> None:
    """Without this a worker would find out, job after job."""

    def sync(ctx: Ctx) -> None: ...
    async def no_context() -> None: ...
    async def too_many(ctx: Ctx, a: int, b: int) -> None: ...
    async def by_name(ctx: Ctx, *, a: int) -> None: ...
    async def foreign_input(ctx: Ctx, a: Ctx) -> None: ...

    for function in (sync, no_context, too_many, by_name, foreign_input):
        with pytest.raises(TypeError, match="'kind'"):
            app.workflow("kind")(function)
    with pytest.raises(ValueError, match="timeout"):
        Workflow.of("kind", too_many, timeout=0)

    async def fine(ctx: Ctx) -> None: ...

    app.workflow("kind")(fine)
    for taken in ("kind", "chat", "a b", ""):
        with pytest.raises(ValueError, match="workflow"):
            app.workflow(taken)(fine)


# --- submissions -------------------------------------------------------------------------------------


@pytest.fixture
def ready(app: App) -> App:
    @app.tool
    def search(query: str) -> str:
        return query

    @app.workflow("review")
    async def review(ctx: Ctx, project: Project) -> None: ...

    app.agent("editor")
    return app


@pytest.mark.parametrize(
    "chat",
    [
        {"prompt": "hi"},
        {"prompt": "hi", "messages": []},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]},
        {
            "prompt": "hi",
            "agent": "editor",
            "tools": ["search"],
            "model": "m",
            "parameters": {"temperature": 1},
        },
        {"prompt": "hi", "tools": []},
    ],
)
def test_chats_that_fit_are_accepted(ready: App, chat: dict[str, Any]) -> None:
    """Without this good requests would be refused."""
    ready.check_submission("chat", json.dumps(chat).encode())
    ready.check_submission("chat", msgspec.Raw(json.dumps(chat).encode()))


@pytest.mark.parametrize(
    ("chat", "said"),
    [
        ({}, "exactly one of `prompt` and `messages`"),
        ({"prompt": "hi", "messages": [{"role": "user", "content": "x"}]}, "exactly one"),
        ({"messages": []}, "exactly one"),
        ({"prompt": " \n"}, "`prompt` must not be empty"),
        ({"prompt": 5}, "input.prompt: Expected `str | null`, got `int`"),
        ({"messages": [{"role": "user", "content": " "}]}, "input.messages[0]: `content` must not be empty"),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            "input.messages[0].role: Invalid enum value 'tool'",
        ),
        ({"messages": [{"role": "system", "content": "x"}]}, "one of role `user`"),
        ({"prompt": "hi", "promt": 1}, "input: Object contains unknown field `promt`"),
        ({"prompt": "hi", "model": "a\x00b"}, "`model`"),
        ({"prompt": "hi", "agent": "a\n"}, "`agent`"),
        ({"prompt": "hi", "tools": ["a\x00"]}, "`tools`"),
        ({"prompt": "hi", "model": "m" * 201}, "`model`"),
        ({"prompt": "hi", "parameters": {"stream": False}}, "`parameters`"),
        ([], "input: Expected `object`, got `array`"),
    ],
)
def test_chats_that_do_not_fit_are_refused_by_field(ready: App, chat: Any, said: str) -> None:
    """Without this a bad request would become a failed job, or one that asks a model for nonsense."""
    with pytest.raises(Invalid) as refused:
        ready.check_submission("chat", json.dumps(chat).encode())
    assert said in str(refused.value)


def test_unknown_names_come_with_the_one_that_was_meant(ready: App) -> None:
    """Without this a typo would cost a search through the code."""
    with pytest.raises(UnknownKind, match="'revew', did you mean 'review'"):
        ready.check_submission("revew", b"{}")
    with pytest.raises(UnknownAgent, match="did you mean 'editor'"):
        ready.check_submission("chat", b'{"prompt":"x","agent":"editr"}')
    with pytest.raises(UnknownTool, match="did you mean 'search'"):
        ready.check_submission("chat", b'{"prompt":"x","tools":["serch"]}')
    with pytest.raises(UnknownKind) as refused:
        ready.check_submission("x" * 1_000_000, b"{}")
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b'{"path": 5}', "input.path: Expected `str`, got `int`"),
        (b'{"path": "x", "depth": 0}', "input.depth: "),
        (b"{}", "input: Object missing required field `path`"),
        (b"{", "input: not JSON"),
        (b"", "input: not JSON"),
        (b'{"path": "\xff"}', "input: "),
        (b'{"path": "\\ud800"}', "input: not JSON"),
        (b"[" * 100_000 + b"]" * 100_000, "nested deeper"),
        (b'{"x":' * 100_000 + b"1" + b"}" * 100_000, "nested deeper"),
        (b'{"' + b"x" * 100_000 + b'": 1}', "input: Object contains unknown field"),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_hostile_input_is_refused_in_few_words(ready: App, raw: bytes, said: str) -> None:
    """Without this one request could bring a gateway down, or fill its logs."""
    with pytest.raises(Invalid) as refused:
        ready.check_submission("review", raw)
    assert said in str(refused.value)
    assert len(str(refused.value)) <= 500


def test_depth_is_refused_before_a_decoder_gives_up(app: App) -> None:
    """Without this the gateway would accept what a worker, deeper in its stack, cannot read."""

    @app.workflow("any")
    async def anything(ctx: Ctx, value: Any) -> None: ...

    app.check_submission("any", b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)
    app.check_submission("any", b'"' + b"[" * 1000 + b'"')
    app.check_submission("any", b"[" + b"[]," * 1000 + b"[]]")
    with pytest.raises(Invalid, match="nested deeper"):
        app.check_submission("any", b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1))


# --- loading -----------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    before, path = set(sys.modules), list(sys.path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if name.startswith("sj_"):
            del sys.modules[name]


def test_an_app_is_found_in_the_current_directory(project: Path) -> None:
    """Without this `streamjobs worker mypkg:app` would need an installed package."""
    (project / "sj_fine.py").write_text(
        "from __future__ import annotations\nfrom streamjobs.app import App\napp = App(name='mine')\n"
        "class holder:\n    app = app\n@app.tool\ndef f(x: int) -> int:\n    'F.'\n    return x\n"
    )
    assert load_app("sj_fine:app").name == "mine"
    assert load_app("sj_fine:holder.app").tools["f"].description == "F."


@pytest.mark.parametrize(
    ("source", "target", "said"),
    [
        ("", "sj_bad", "expected module:attribute"),
        ("", ":app", "expected module:attribute"),
        ("", "sj_absent:app", "cannot import 'sj_absent'"),
        ("import sj_not_there", "sj_bad:app", "ModuleNotFoundError: No module named 'sj_not_there'"),
        ("x = (", "sj_bad:app", "SyntaxError"),
        ("raise SystemExit('two\\nlines')", "sj_bad:app", "SystemExit: two lines"),
        ("from streamjobs.app import App\nmine = App()", "sj_bad:app", "did you mean 'sj_bad:mine'?"),
        ("", "sj_bad:app", "sj_bad has no 'app'"),
        ("app = 5", "sj_bad:app", "expected a streamjobs.App, found a int"),
        ("", "..:app", "cannot import"),
    ],
)
def test_a_wrong_app_is_explained_in_one_line(project: Path, source: str, target: str, said: str) -> None:
    """Without this a typo on the command line would be a traceback."""
    (project / "sj_bad.py").write_text(source)
    with pytest.raises(ConfigError) as refused:
        load_app(target)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


# --- schedules


def reporting() -> App:
    app = App(builtin_tools=False)

    @app.workflow("report", timeout=30.0, max_attempts=4, queue="slow")
    async def report(_ctx: Any, day: str = "today") -> str:
        return day

    return app


def test_a_schedule_is_what_its_workflow_says():
    """A nightly report would run without the limits that the same report has by day."""
    app = reporting()
    made = app.schedule("nightly", "report", cron="0 3 * * *", timezone="Europe/Berlin", input="monday")
    assert app.schedules == {"nightly": made}
    assert (made.owner, made.queue, made.timeout, made.max_attempts) == ("system", "slow", 30.0, 4)
    assert (bytes(made.input), made.missed, made.overlap) == (b'"monday"', "skip", "allow")
    own = app.schedule("own", "report", every=60, queue="fast", timeout=5.0, owner="ann", missed="all")
    assert (own.owner, own.queue, own.timeout, own.max_attempts) == ("ann", "fast", 5.0, 4)
    assert app.schedule("talk", "chat", every=60, input={"prompt": "hi"}).timeout is None


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        (r"^cron: ", {}),
        (r"^cron: .* does not parse", {"cron": "every day"}),
        (r"^timezone: ", {"cron": "@daily", "timezone": "Berlin"}),
        (r"^every: ", {"every": 0.1}),
        (r"^missed: ", {"every": 5, "missed": "sometimes"}),
        (r"^priority: ", {"every": 5, "priority": "urgent"}),
        (r"^input: ", {"every": 5, "input": 7}),
    ],
)
def test_a_schedule_that_cannot_work_is_refused_at_import(message: str, fields: dict[str, Any]):
    """It would be found at three in the morning."""
    app = reporting()
    with pytest.raises(Invalid, match=message):
        app.schedule("nightly", "report", **fields)
    assert app.schedules == {}


def test_a_schedule_of_nothing_is_refused():
    """Every tick would give a job that fails."""
    with pytest.raises(UnknownKind, match="did you mean 'report'"):
        reporting().schedule("nightly", "reprot", every=60)


def test_names_of_schedules_are_taken_once():
    """The second would silently replace the first."""
    app = reporting()
    app.schedule("nightly", "report", every=60)
    with pytest.raises(ValueError, match="already registered"):
        app.schedule("nightly", "report", every=90)
    with pytest.raises(ValueError, match="must match"):
        app.schedule("every night", "report", every=90)
