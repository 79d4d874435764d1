"""The built-in chat, through a real worker and a provider on a real socket, in both wire formats."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from streamjobs.app import App, ToolContext
from streamjobs.testing import Scenario, ScriptedCall, Turn
from streamjobs.testing.scenario import ScriptedUsage
from tests.conftest import RedisProcess
from tests.harness import Lab, lab, one_outcome_each, says, talking, working

FORMATS = ["openai:scripted", "anthropic:scripted"]


def calls(*made: ScriptedCall, text: str = "") -> Turn:
    return Turn(text=text, tool_calls=list(made))


def a_call(name: str, call_id: str = "", **arguments: Any) -> ScriptedCall:
    return ScriptedCall(name=name, arguments=arguments, id=call_id)


def tool_app() -> App:
    app = App(builtin_tools=False)

    @app.tool
    async def add(a: int, b: int) -> int:
        """Add."""
        return a + b

    @app.tool
    async def echo(text: str, delay: float = 0.0) -> str:
        """Say it again, later."""
        await asyncio.sleep(delay)
        return text

    return app


def tool_messages(bench: Lab, request: int = -1) -> list[Any]:
    """What the provider was told of tools, whichever the format: one dict of id and content each."""
    told: list[Any] = []
    for message in bench.provider.requests[request]["messages"]:
        if message["role"] == "tool":
            told.append({"id": message["tool_call_id"], "content": message["content"]})
        elif isinstance(message["content"], list):
            told += [
                {"id": part["tool_use_id"], "content": _joined(part["content"])}
                for part in message["content"]
                if part["type"] == "tool_result"
            ]
    return told


def _joined(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


# --- answers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", FORMATS)
async def test_an_answer_streams_and_is_recorded_whole(redis: RedisProcess, model: str):
    """What was streamed, what the job's result says, and what the turn recorded are the same text."""
    words = "Grüße aus 東京 \N{GRINNING FACE}, and a line\nmore. " * 20
    async with talking(redis.url, says(words, rate=2000.0)) as bench:
        job_id = await bench.chat("Hi", model=model)
        view = await bench.ended(job_id)
        log = await bench.log(job_id)
        assert (view.status, view.text) == ("completed", words)
        assert view.result["text"] == words
        assert view.turns[0].finish_reason == view.result["finish_reason"] == "stop"
        deltas = [event.data["text"] for event in log if event.type == "text.delta"]
        assert "".join(deltas) == words
        assert len(deltas) > 1
        kinds = [event.type for event in log]
        assert kinds[:3] == ["job.queued", "job.started", "turn.started"]
        assert kinds[-2:] == ["turn.completed", "job.completed"]
        await bench.healthy()


@pytest.mark.parametrize("model", FORMATS)
async def test_reasoning_is_kept_apart(redis: RedisProcess, model: str):
    """A model's thoughts must never be shown as its answer."""
    async with talking(redis.url, Scenario(turns=[Turn(reasoning="Let me see.", text="42")])) as bench:
        view = await bench.run(model=model)
        assert (view.text, view.reasoning) == ("42", "Let me see.")


async def test_an_empty_answer_is_an_answer(redis: RedisProcess):
    """A model that has nothing to say ends its job; it does not hang it."""
    async with talking(redis.url, says("")) as bench:
        view = await bench.run()
        assert (view.status, view.text, view.result["text"]) == ("completed", "", "")


async def test_usage_is_summed_over_turns(redis: RedisProcess):
    """What a job cost is what all its calls of the model cost."""
    scenario = Scenario(
        turns=[
            Turn(tool_calls=[a_call("add", a=1, b=2)], usage=ScriptedUsage(input_tokens=10, output_tokens=3)),
            Turn(text="3", usage=ScriptedUsage(input_tokens=20, output_tokens=4, reasoning_tokens=2)),
        ]
    )
    async with talking(redis.url, scenario, tool_app()) as bench:
        view = await bench.run(tools=["add"])
        for usage in (view.usage, bench_usage(view.result["usage"])):
            assert (usage.input_tokens, usage.output_tokens, usage.reasoning_tokens) == (30, 7, 2)
        assert view.result["rounds"] == 2


def bench_usage(usage: dict[str, int]) -> ScriptedUsage:
    return ScriptedUsage(**usage)


async def test_no_model_named_fails_and_says_so(redis: RedisProcess):
    """A missing setting is told in words, at once, and not retried."""
    async with talking(redis.url, default_model="") as bench:
        view = await bench.run()
        assert view.error is not None
        assert (view.status, view.error.code, view.attempt) == ("failed", "invalid", 1)
        assert "default_model" in view.error.message
        assert not bench.provider.requests


@pytest.mark.parametrize("model", FORMATS)
async def test_an_agent_brings_prompt_model_tools_and_parameters(redis: RedisProcess, model: str):
    """An agent that loses its instructions on the way is somebody else."""
    app = tool_app()
    app.agent(
        "editor",
        role="an editor",
        instructions="Cut adverbs.",
        model=model,
        tools=["add"],
        parameters={"top_p": 0.5},
    )
    async with talking(redis.url, says("ok"), app, default_model="openai:other") as bench:
        await bench.run("Edit this", agent="editor", parameters={"temperature": 0.25})
        request = bench.provider.requests[-1]
        system = request.get("system") or request["messages"][0]["content"]
        assert "You are an editor.\n\nCut adverbs." in json.dumps(system).replace("\\n", "\n")
        assert (request["model"], request["top_p"], request["temperature"]) == ("scripted", 0.5, 0.25)
        offered = request["tools"][0]
        assert (offered.get("function") or offered)["name"] == "add"


async def test_an_unknown_agent_or_tool_fails_the_job(redis: RedisProcess):
    """A worker of an older release says what it does not know; it does not answer as somebody else."""
    async with talking(redis.url, app=tool_app()) as bench:
        for code, options in (
            ("unknown_agent", {"agent": "nobody"}),
            ("unknown_tool", {"tools": ["nothing"]}),
        ):
            view = await bench.run(**options)
            assert view.error is not None
            assert (view.status, view.error.code) == ("failed", code)


async def test_a_whole_conversation_is_passed_on(redis: RedisProcess):
    """A client that brings its history gets an answer to that history."""
    said = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Three?"},
    ]
    async with talking(redis.url, Scenario(turns=[Turn(text="no"), Turn(text="Four.")])) as bench:
        view = await bench.run(messages=said)
        assert view.text == "Four."
        assert bench.provider.requests[-1]["messages"] == said


# --- tools ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", FORMATS)
async def test_parallel_calls_run_at_once_and_are_told_in_order(redis: RedisProcess, model: str):
    """The slowest call comes first here: results in the order of ending would answer the wrong questions."""
    made = [
        a_call("echo", text="slow", delay=0.3),
        a_call("echo", text="quick", delay=0.15),
        a_call("add", a=2, b=3),
    ]
    async with talking(
        redis.url, Scenario(turns=[calls(*made, text="Wait. "), Turn(text="Done.")]), tool_app()
    ) as bench:
        job_id = await bench.chat(model=model, tools=["echo", "add"])
        view = await bench.ended(job_id)
        log = await bench.log(job_id)
        assert view.text == "Wait. Done."
        assert [told["content"] for told in tool_messages(bench)] == ["slow", "quick", "5"]
        assert [told["id"] for told in tool_messages(bench)] == [call.call_id for call in view.tool_calls]
        assert [(call.tool, call.state, call.output) for call in view.tool_calls] == [
            ("echo", "completed", "slow"), ("echo", "completed", "quick"), ("add", "completed", 5),
        ]  # fmt: skip
        one_outcome_each(log)
        started = [i for i, event in enumerate(log) if event.type == "tool.started"]
        ended = [i for i, event in enumerate(log) if event.type == "tool.completed"]
        assert max(started) < min(i for i in ended if log[i].data["output"] == "slow")
        _require_tools_after_their_turn([event.type for event in log])


def _require_tools_after_their_turn(kinds: list[str]) -> None:
    assert kinds.index("turn.completed") < kinds.index("tool.called") < kinds.index("tool.started")


@pytest.mark.parametrize("model", FORMATS)
async def test_the_second_turn_gets_the_conversation_as_it_was(redis: RedisProcess, model: str):
    """A model that is not shown its own call and the result calls again, or invents."""
    first = Turn(reasoning="I must add.", text="Adding.", tool_calls=[a_call("add", a=1, b=2)])
    async with talking(redis.url, Scenario(turns=[first, Turn(text="3")]), tool_app()) as bench:
        view = await bench.run("What is 1 + 2?", model=model, tools=["add"])
        assert view.status == "completed"
        one, two = bench.provider.requests
        assert two["messages"][: len(one["messages"])] == one["messages"]
        added = two["messages"][len(one["messages"]) :]
        assert [message["role"] for message in added] in (["assistant", "tool"], ["assistant", "user"])
        assistant = json.dumps(added[0])
        for part in ("Adding.", "add", view.tool_calls[0].call_id):
            assert part in assistant
        assert tool_messages(bench)[0] == {"id": view.tool_calls[0].call_id, "content": "3"}


async def test_ids_that_a_provider_gives_twice_are_told_apart(redis: RedisProcess):
    """Some providers count calls anew in each turn: by id, the second call would look done already."""
    ids = ["call_0", "call_0", "x" * 60, "sp ace/é"]
    turns = [calls(a_call("add", call_id, a=place, b=0)) for place, call_id in enumerate(ids)]
    async with talking(redis.url, Scenario(turns=[*turns, Turn(text="ok")]), tool_app()) as bench:
        job_id = await bench.chat(tools=["add"])
        view = await bench.ended(job_id)
        assert [call.output for call in view.tool_calls] == [0, 1, 2, 3]
        seen = [call.call_id for call in view.tool_calls]
        assert len(set(seen)) == 4
        assert all(len(call_id) <= 40 and call_id.isascii() for call_id in seen)
        one_outcome_each(await bench.log(job_id))
        assert [told["id"] for told in tool_messages(bench)] == seen


def failing_app() -> App:
    app = tool_app()

    @app.tool(timeout=0.1)
    async def slow() -> str:
        """Never ends."""
        await asyncio.sleep(3600)
        return ""

    @app.tool
    async def broken() -> str:
        """Raises."""
        raise RuntimeError("it broke\x00\ud800")

    @app.tool
    def leaves() -> str:
        """Wants to end the process."""
        raise SystemExit(3)

    @app.tool
    async def strange() -> Any:
        """Returns what JSON does not know."""
        return object()

    @app.tool
    async def large() -> str:
        """Says too much."""
        return "x" * 1_000_000

    @app.tool
    async def progressing(ctx: ToolContext) -> str:
        """Says how far it is."""
        ctx.progress(50, "half")
        return "whole"

    return app


FAILURES = {
    "unknown_tool": a_call("nothing"),
    "invalid_arguments": a_call("add", a="one", b=2),
    "tool_timeout": a_call("slow"),
    "RuntimeError": a_call("broken"),
    "SystemExit": a_call("leaves"),
    "tool_output": a_call("strange"),
    "not JSON": ScriptedCall(name="add", arguments='{"a": 1, "b": tru'),
    "cut:": a_call("large"),
}


@pytest.mark.parametrize("model", FORMATS)
async def test_every_failure_of_a_tool_is_told_to_the_model(redis: RedisProcess, model: str):
    """One bad tool call must not cost a user the job: the model can say what went wrong, or try again."""
    made = list(FAILURES.values())
    app = failing_app()
    tools = list(app.tools)
    async with talking(redis.url, Scenario(turns=[calls(*made), Turn(text="I see.")]), app) as bench:
        job_id = await bench.chat(model=model, tools=tools)
        view = await bench.ended(job_id)
        assert (view.status, view.text) == ("completed", "I see.")
        told = [message["content"] for message in tool_messages(bench)]
        for expected, content in zip(FAILURES, told, strict=True):
            assert expected in content
        assert len(told[-1]) <= bench.store.settings.max_tool_output
        assert [call.state for call in view.tool_calls] == ["failed"] * 7 + ["completed"]
        one_outcome_each(await bench.log(job_id))


async def test_a_tools_progress_is_recorded_while_it_runs(redis: RedisProcess):
    """A viewer sees that a long tool moves; and nothing of it after its end."""
    scenario = Scenario(turns=[calls(a_call("progressing")), Turn(text="ok")])
    async with talking(redis.url, scenario, failing_app()) as bench:
        job_id = await bench.chat(tools=["progressing"])
        await bench.ended(job_id)
        kinds = [kind for kind in await bench.types(job_id) if kind.startswith("tool.")]
        assert kinds == ["tool.called", "tool.started", "tool.progress", "tool.completed"]


async def test_a_tool_waits_until_its_start_is_in_the_log(
    redis: RedisProcess, monkeypatch: pytest.MonkeyPatch
):
    """An effect before its record is one that a crash forgets, and the next worker repeats."""
    runs: list[str] = []
    app = App(builtin_tools=False)

    @app.tool(effect="once")
    async def pays() -> str:
        """Pay."""
        runs.append("paid")
        return "paid"

    scenario = Scenario(turns=[calls(a_call("pays")), Turn(text="ok")])
    async with lab(redis.url, scenario) as bench:
        held, may_go, append = asyncio.Event(), asyncio.Event(), bench.store.work.append

        async def slow_append(partition: int, batches: Any, **options: Any) -> Any:
            if any(kind == "tool.started" for batch in batches for kind, _ in batch.events):
                held.set()
                await may_go.wait()
            return await append(partition, batches, **options)

        monkeypatch.setattr(bench.store.work, "append", slow_append)
        async with working(bench.store, app):
            job_id = await bench.chat(tools=["pays"])
            await held.wait()
            await asyncio.sleep(0.1)
            assert runs == []
            may_go.set()
            assert (await bench.ended(job_id)).text == "ok"
            assert runs == ["paid"]


async def test_tools_wait_until_their_turn_is_in_the_log(
    redis: RedisProcess, monkeypatch: pytest.MonkeyPatch
):
    """A call that nobody recorded must not act: a restarted turn may call something else."""
    runs: list[str] = []
    app = App(builtin_tools=False)

    @app.tool(effect="pure")
    async def looks() -> str:
        """Look."""
        runs.append("looked")
        return "seen"

    scenario = Scenario(turns=[calls(a_call("looks")), Turn(text="ok")])
    async with lab(redis.url, scenario) as bench:
        held, may_go, append = asyncio.Event(), asyncio.Event(), bench.store.work.append

        async def slow_append(partition: int, batches: Any, **options: Any) -> Any:
            kinds = [kind for batch in batches for kind, _ in batch.events]
            if "turn.completed" in kinds and not may_go.is_set():
                assert "tool.started" not in kinds
                held.set()
                await may_go.wait()
            return await append(partition, batches, **options)

        monkeypatch.setattr(bench.store.work, "append", slow_append)
        async with working(bench.store, app):
            job_id = await bench.chat(tools=["looks"])
            await held.wait()
            await asyncio.sleep(0.1)
            assert runs == []
            may_go.set()
            assert (await bench.ended(job_id)).text == "ok"


async def test_rounds_are_limited(redis: RedisProcess):
    """A model that calls tools for ever is stopped before the bill is."""
    scenario = Scenario(turns=[calls(a_call("add", a=1, b=1))], repeat=True)
    async with talking(redis.url, scenario, tool_app(), max_rounds=3) as bench:
        view = await bench.run(tools=["add"])
        assert view.error is not None
        assert (view.status, view.error.code, view.attempt) == ("failed", "too_many_rounds", 1)
        assert len(bench.provider.requests) == 3


async def test_calls_in_one_round_are_limited(redis: RedisProcess):
    """Those over the limit are not run, and the model is told which."""
    made = [a_call("add", a=n, b=0) for n in range(5)]
    async with talking(
        redis.url, Scenario(turns=[calls(*made), Turn(text="ok")]), tool_app(), max_tool_calls=3
    ) as bench:
        job_id = await bench.chat(tools=["add"])
        view = await bench.ended(job_id)
        assert [call.state for call in view.tool_calls] == ["completed"] * 3 + ["failed"] * 2
        assert [message["content"] for message in tool_messages(bench)][:3] == ["0", "1", "2"]
        assert all("too_many_tool_calls" in message["content"] for message in tool_messages(bench)[3:])
        assert (await bench.types(job_id)).count("tool.started") == 3


async def test_hostile_arguments_are_shown_as_they_came(redis: RedisProcess):
    """What a model writes ends in the log and in viewers: depth and nonsense must not break either."""
    deep = '{"a": ' + "[" * 3000 + "]" * 3000 + "}"
    made = [ScriptedCall(name="add", arguments=deep), ScriptedCall(name="add", arguments="[1")]
    async with talking(redis.url, Scenario(turns=[calls(*made), Turn(text="ok")]), tool_app()) as bench:
        view = await bench.run(tools=["add"])
        assert view.status == "completed", view.error
        assert [call.arguments for call in view.tool_calls] == [deep, "[1"]


# --- workflows that chat ---------------------------------------------------------------------------------


async def test_a_workflow_may_chat_more_than_once(redis: RedisProcess):
    """Turns are numbered over the job, so a replay finds each where it was."""
    app = tool_app()

    @app.workflow("two")
    async def two(ctx: Any) -> list[str]:
        return [await ctx.chat("first", data={"n": 1}, tools=["add"]), await ctx.chat("second")]

    scenario = Scenario(turns=[calls(a_call("add", a=1, b=1)), Turn(text="two")])
    async with talking(redis.url, scenario, app) as bench:
        view = await bench.ended(await bench.submit("two"))
        assert view.status == "completed", view.error
        assert view.result[0] == "two"
        assert [turn.turn for turn in view.turns] == [1, 2, 3, 4]
        assert bench.provider.requests[0]["messages"][0]["content"] == 'first\n\n{"n":1}'


async def test_a_job_runs_one_chat_at_a_time(redis: RedisProcess):
    """Two at once would mix their words in one stream; the second is refused in words."""
    app = App()

    @app.workflow("both")
    async def both(ctx: Any) -> None:
        await asyncio.gather(ctx.chat("one"), ctx.chat("two"))

    async with talking(redis.url, says("slow answer " * 20, rate=50.0), app) as bench:
        view = await bench.ended(await bench.submit("both"))
        assert view.error is not None
        assert (view.status, view.error.code) == ("failed", "invalid")
        assert "one chat at a time" in view.error.message
