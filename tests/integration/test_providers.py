"""Both providers against the scripted one, over real sockets: every fault, every clock, every early end."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any

import httpx
import pytest

from streamjobs.config import Settings
from streamjobs.errors import ConfigError, ProviderError
from streamjobs.llm import Answer, Message, ModelRequest, Providers, ReasoningPiece, TextPiece, ToolSpec
from streamjobs.testing import (
    DEMO,
    Scenario,
    ScriptedCall,
    ScriptedProvider,
    Turn,
    load_scenario,
    parse_scenario,
)
from streamjobs.testing.scenario import (
    ContentTypeFault,
    CutFault,
    DelayFault,
    EndlessFault,
    ErrorFault,
    Fault,
    GarbageFault,
    ScriptedUsage,
    StallFault,
    StatusFault,
)
from tests.conftest import wait_until

KINDS = ["openai", "anthropic"]
TEXT = "The quick brown fox jumps over the lazy dog. \N{GRINNING FACE} Größe \u2028 ok."
HELLO = [Message("user", "hello")]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Every test that takes it runs in both formats."""
    return request.param


def failing(*faults: Fault, text: str | list[str] = TEXT, **turn: Any) -> Scenario:
    return Scenario(turns=[Turn(text=text, faults=list(faults), **turn)])


def settings_for(server: ScriptedProvider, **changes: Any) -> Settings:
    defaults = {
        "openai_base_url": server.openai_url,
        "anthropic_base_url": server.url,
        "openai_api_key": "sk-top-secret",
        "anthropic_api_key": "sk-top-secret",
        "retry_base": 0.01,
    }
    return Settings(**{**defaults, **changes})


@asynccontextmanager
async def scripted(scenario: Scenario, **changes: Any) -> AsyncIterator[tuple[ScriptedProvider, Providers]]:
    async with ScriptedProvider(scenario) as server:
        providers = Providers(settings_for(server, **changes))
        try:
            yield server, providers
        finally:
            await providers.aclose()


def stream(providers: Providers, kind: str, messages: list[Message] = HELLO, **request: Any) -> Any:
    provider, model = providers.resolve(f"{kind}:scripted-1")
    return provider.stream(ModelRequest(model, messages, **request))


async def ask(providers: Providers, kind: str, messages: list[Message] = HELLO, **request: Any) -> Answer:
    pieces: list[Any] = [piece async for piece in stream(providers, kind, messages, **request)]
    assert isinstance(pieces[-1], Answer)
    assert pieces[-1].text == "".join(piece.text for piece in pieces if isinstance(piece, TextPiece))
    return pieces[-1]


async def fails(providers: Providers, kind: str) -> tuple[ProviderError, list[Any]]:
    """The error of a call, and the pieces that came before it."""
    pieces: list[Any] = []
    with pytest.raises(ProviderError) as caught:
        async for piece in stream(providers, kind):
            pieces.append(piece)
    assert "sk-top-secret" not in str(caught.value)
    assert str(caught.value).startswith(f"{kind}: ")
    return caught.value, pieces


# --- answers -----------------------------------------------------------------------------------------


async def test_text_reasoning_and_usage_arrive(kind: str) -> None:
    """The whole way: words, characters of four bytes, the line break that is none, counts."""
    usage = ScriptedUsage(input_tokens=30, output_tokens=12, cached_tokens=10)
    scenario = Scenario(turns=[Turn(text=TEXT, reasoning="thinking about foxes", usage=usage)])
    async with scripted(scenario) as (_, providers):
        pieces = [piece async for piece in stream(providers, kind)]
    reasoning = "".join(piece.text for piece in pieces if isinstance(piece, ReasoningPiece))
    answer = pieces[-1]
    assert isinstance(answer, Answer)
    assert (answer.text, reasoning, answer.finish_reason) == (TEXT, "thinking about foxes", "stop")
    assert (answer.usage.input_tokens, answer.usage.output_tokens, answer.usage.cached_tokens) == (30, 12, 10)
    assert len(pieces) > 10


async def test_text_arrives_while_it_is_said(kind: str) -> None:
    """Buffered on the way, tokens would come all at once, at the end."""
    async with scripted(Scenario(turns=[Turn(text=["a", "b", "c"], rate=2)])) as (_, providers):
        times = [time.monotonic() async for _ in stream(providers, kind)]
    assert times[2] - times[0] > 0.2, "a second, if nothing stood still meanwhile"


async def test_a_whole_tool_loop(kind: str) -> None:
    """The demo: three turns; the second calls two tools at once, the third tells what it was."""
    tools = [ToolSpec(name, "", {"type": "object", "properties": {}}) for name in ("list_files", "read_file")]
    script = [
        Turn(match=t.match, text=t.text, tool_calls=t.tool_calls, reasoning=t.reasoning) for t in DEMO.turns
    ]
    messages, asked = list(HELLO), []
    async with scripted(Scenario(turns=script)) as (server, providers):
        for _ in range(3):
            answer = await ask(providers, kind, messages, tools=tools)
            messages.append(Message("assistant", answer.text, answer.calls, extra=answer.extra))
            messages += [Message("tool", "seen", call_id=call.call_id) for call in answer.calls]
            asked.append([(call.tool, json.loads(call.arguments)) for call in answer.calls])
        again = await ask(providers, kind, messages[:3], tools=tools)
        bodies = list(server.requests)
    assert asked == [
        [("list_files", {"path": "."})],
        [("read_file", {"path": "README.md"}), ("read_file", {"path": "pyproject.toml"})],
        [],
    ]
    assert "scripted answer" in messages[-1].content
    assert len({call.call_id for message in messages for call in message.calls}) == 3
    # A worker that starts over is told the same again.
    assert again.text == script[1].text
    assert bodies[3] == bodies[1]


async def test_broken_arguments_reach_the_tool_layer_as_they_are(kind: str) -> None:
    """Repaired in silence, a tool would run with what nobody asked for."""
    calls = [ScriptedCall(name="f", arguments='{"a": '), ScriptedCall(name="g", arguments="")]
    async with scripted(Scenario(turns=[Turn(tool_calls=calls)])) as (_, providers):
        answer = await ask(providers, kind)
    assert [call.arguments for call in answer.calls] == ['{"a": ', "{}"]


async def test_hundreds_of_streams_at_once(kind: str) -> None:
    """One worker holds hundreds of calls; a limit on connections would queue them in silence."""
    async with scripted(failing(StallFault(seconds=90, after=1), text=["x"] * 20)) as (server, providers):
        asking = [asyncio.create_task(ask(providers, kind)) for _ in range(150)]
        await wait_until(lambda: server.open_streams == 150, what="all streams at once")
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
    async with scripted(Scenario(turns=[Turn(text=["x"] * 20, rate=40)])) as (_, providers):
        answers = await asyncio.gather(*(ask(providers, kind) for _ in range(150)))
    assert {answer.text for answer in answers} == {"x" * 20}


async def test_connections_are_used_again(kind: str) -> None:
    """A new TLS handshake for each turn costs a tenth of a second and more."""
    async with scripted(Scenario(turns=[Turn(text="hi")])) as (server, providers):
        for _ in range(5):
            await ask(providers, kind)
        assert server.connections == 1


async def test_a_response_that_ends_late_keeps_its_connection_and_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The end of a body often comes a moment after `[DONE]`; closing before it costs a handshake a turn."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    monkeypatch.setattr("streamjobs.llm.http._DRAIN_TIMEOUT", 1.5)
    pauses, connections = [0.02, 0.02, 60.0], 0
    asked, closed = asyncio.Event(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while pauses:
            await reader.readuntil(b"\r\n\r\n")
            await reader.read(65536)
            writer.write(head + b"e\r\ndata: [DONE]\n\n\r\n")
            with suppress(TimeoutError):
                await asyncio.wait_for(asked.wait(), pauses.pop(0))
            writer.write(b"0\r\n\r\n")
        writer.close()
        closed.set()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        providers = Providers(Settings(openai_base_url=url))
        started = time.monotonic()
        for _ in range(3):
            await ask(providers, "openai")
        assert (connections, time.monotonic() - started < 30) == (1, True)
        await providers.aclose()
        asked.set()
        await closed.wait()


# --- faults ------------------------------------------------------------------------------------------

BEFORE_TEXT: dict[str, Fault] = {
    "429": StatusFault(status=429, times=1),
    "408": StatusFault(status=408, times=1),
    "500": StatusFault(status=500, times=1),
    "502": StatusFault(status=502, times=1),
    "503": StatusFault(status=503, times=1),
    "504": StatusFault(status=504, times=1),
    "529": StatusFault(status=529, times=1),
    "error event": ErrorFault(after=0, times=1),
    "cut": CutFault(after=0, times=1),
    "cut cleanly": CutFault(after=0, where="clean", times=1),
    "cut in a character": CutFault(after=0, where="character", times=1),
    "garbage": GarbageFault(after=0, times=1),
    "HTML": ContentTypeFault(times=1),
}


@pytest.mark.parametrize("fault", BEFORE_TEXT.values(), ids=BEFORE_TEXT.keys())
async def test_what_fails_before_any_text_is_tried_again(kind: str, fault: Fault) -> None:
    """Each happens at every provider on a bad day; none of them should cost a job an attempt."""
    async with scripted(failing(fault)) as (server, providers):
        assert (await ask(providers, kind)).text == TEXT
        assert len(server.requests) == 2


AFTER_TEXT: dict[str, Fault] = {
    "error event": ErrorFault(after=3),
    "cut": CutFault(after=3),
    "cut cleanly": CutFault(after=3, where="clean"),
    "cut in a character": CutFault(after=3, where="character"),
    "garbage": GarbageFault(after=3),
}


@pytest.mark.parametrize("fault", AFTER_TEXT.values(), ids=AFTER_TEXT.keys())
async def test_what_fails_after_text_is_raised_at_once(kind: str, fault: Fault) -> None:
    """Tried again in here, a viewer would read two beginnings as one answer."""
    async with scripted(failing(fault)) as (server, providers):
        error, pieces = await fails(providers, kind)
        assert error.is_retryable
        assert len(server.requests) == 1
    said = "".join(piece.text for piece in pieces)
    assert said and TEXT.startswith(said)


@pytest.mark.parametrize("fault", BEFORE_TEXT.values(), ids=BEFORE_TEXT.keys())
async def test_retries_come_to_an_end(kind: str, fault: Fault) -> None:
    """A provider that is down must give the job back to its own back-off, not hold the worker's place."""
    async with scripted(failing(type(fault)(**_lasting(fault))), provider_attempts=3) as (server, providers):
        error, pieces = await fails(providers, kind)
        assert (error.is_retryable, pieces, len(server.requests)) == (True, [], 3)


def _lasting(fault: Fault) -> dict[str, Any]:
    return {name: getattr(fault, name) for name in fault.__struct_fields__ if name != "times"}


async def test_what_cannot_succeed_is_not_tried_again(kind: str) -> None:
    """A wrong key tried four times gets an account blocked."""
    async with scripted(failing(StatusFault(status=401))) as (server, providers):
        error, _ = await fails(providers, kind)
        assert (error.is_retryable, error.status, len(server.requests)) == (False, 401, 1)


@pytest.mark.parametrize(("form", "wish"), [("seconds", 0.3), ("ms", 0.3), ("date", 30.0)])
async def test_retry_after_is_honoured_in_each_form(kind: str, form: Any, wish: float) -> None:
    """Coming back early makes a rate limit last; the date form is what proxies send."""
    fault = StatusFault(status=429, retry_after=wish, form=form, times=1)
    async with scripted(failing(fault), provider_max_retry_after=0.3) as (_, providers):
        started = time.monotonic()
        await ask(providers, kind)
    assert 0.29 <= time.monotonic() - started < 20


async def test_the_wish_of_the_provider_is_on_the_error(kind: str) -> None:
    """The caller parks the job for so long; capped here is only the wait inside the worker."""
    fault = StatusFault(status=529, retry_after=120)
    async with scripted(failing(fault), provider_attempts=1) as (_, providers):
        error, _ = await fails(providers, kind)
    assert (error.status, error.retry_after) == (529, 120.0)


async def test_a_refused_connection_is_retryable_and_names_no_secret(kind: str) -> None:
    """A provider that restarts is the most common fault of a local model server."""
    with socket.socket() as nobody:  # a port that is taken, and on which nobody listens
        nobody.bind(("127.0.0.1", 0))
        server = ScriptedProvider()
        server.url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        providers = Providers(settings_for(server, provider_attempts=2))
        try:
            error, _ = await fails(providers, kind)
        finally:
            await providers.aclose()
    assert error.is_retryable and "refused" in str(error)


# --- clocks ------------------------------------------------------------------------------------------


async def test_silence_before_the_first_data_ends(kind: str) -> None:
    """A provider that accepts and says nothing would hold a worker's place for ever."""
    started = time.monotonic()
    async with scripted(failing(DelayFault(seconds=90, times=1)), provider_first_byte_timeout=1.0) as (
        _,
        providers,
    ):
        assert (await ask(providers, kind)).text == TEXT
    assert time.monotonic() - started < 45


async def test_comments_are_no_first_data(kind: str) -> None:
    """A router's keep-alives would hide that no model ever answers."""
    fault = StallFault(after=0, seconds=30, comments=True)
    changes = {"provider_first_byte_timeout": 0.3, "provider_idle_timeout": 0.3, "provider_attempts": 1}
    async with scripted(failing(fault), **changes) as (_, providers):
        error, pieces = await fails(providers, kind)
    assert pieces == [] and "within 0.3 s" in str(error)


@pytest.mark.parametrize("comments", [False, True])
async def test_silence_in_the_middle_ends(kind: str, comments: bool) -> None:
    """DeepSeek is known to stall on an open socket, with keep-alive comments, for ever."""
    async with scripted(failing(StallFault(seconds=90, comments=comments)), provider_idle_timeout=0.8) as (
        server,
        providers,
    ):
        started = time.monotonic()
        error, pieces = await fails(providers, kind)
        assert 0.7 < time.monotonic() - started < 45
        assert error.is_retryable and "no more data within 0.8 s" in str(error) and pieces
        await wait_until(lambda: server.closed_early == 1)


async def test_an_endless_answer_ends_for_good(kind: str) -> None:
    """Tried again, it would be as endless; without a bound it would cost money until somebody looks."""
    async with scripted(failing(EndlessFault(), rate=100), provider_total_timeout=1.5) as (server, providers):
        error, pieces = await fails(providers, kind)
        assert not error.is_retryable and len(pieces) > 10 and "no end" in str(error)
        await wait_until(lambda: server.closed_early == 1)
    async with scripted(failing(EndlessFault()), provider_max_bytes=100_000) as (server, providers):
        error, _ = await fails(providers, kind)
        assert not error.is_retryable and "over 100000 bytes" in str(error)
        await wait_until(lambda: server.closed_early == 1)


async def test_a_slow_reader_is_not_a_silent_provider(kind: str) -> None:
    """While Redis is slow we stop reading; the provider must not be blamed for it."""
    async with scripted(Scenario(turns=[Turn(text=["a", "b"], rate=50)]), provider_idle_timeout=0.6) as (
        _,
        providers,
    ):
        pieces = []
        async for piece in stream(providers, kind):
            pieces.append(piece)
            await asyncio.sleep(0.8 if isinstance(piece, TextPiece) else 0)
    assert pieces[-1].text == "ab"


async def test_retries_stay_within_the_total(kind: str) -> None:
    """Otherwise four tries with long pauses outlast the job's lease on its user's patience."""
    fault = StatusFault(status=503, retry_after=50)
    async with scripted(failing(fault), provider_total_timeout=20.0) as (server, providers):
        started = time.monotonic()
        error, _ = await fails(providers, kind)
        assert time.monotonic() - started < 20
        assert error.is_retryable and len(server.requests) == 1


async def test_a_server_that_does_not_accept_ends_by_the_connect_clock() -> None:
    """A host behind a firewall that drops packets, for a minute and more."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener, socket.socket() as first:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        first.connect(listener.getsockname())  # the queue of one is full: further connections hang
        others = [socket.socket() for _ in range(4)]
        try:
            for other in others:
                other.setblocking(False)
                other.connect_ex(listener.getsockname())
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
            changes = {
                "provider_connect_timeout": 0.2,
                "provider_attempts": 1,
                "provider_first_byte_timeout": 90.0,
            }
            providers = Providers(Settings(openai_base_url=url, **changes))
            started = time.monotonic()
            error, _ = await fails(providers, "openai")
            await providers.aclose()
        finally:
            for other in others:
                other.close()
    assert error.is_retryable and time.monotonic() - started < 45


# --- early ends --------------------------------------------------------------------------------------


async def _close(generator: Any) -> None:
    async with aclosing(generator) as pieces:
        async for _ in pieces:
            break


async def _cancel(generator: Any) -> None:
    seen: list[Any] = []

    async def read() -> None:
        async for piece in generator:
            seen.append(piece)

    task = asyncio.create_task(read())
    await wait_until(lambda: len(seen) >= 2, what="the first pieces of an answer")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("leave", [_close, _cancel])
@pytest.mark.parametrize("rate", [0, 50])
async def test_the_provider_sees_at_once_that_we_left(
    kind: str, leave: Callable[[Any], Any], rate: float
) -> None:
    """A cancelled job would go on generating, and be paid for, to the end."""
    async with scripted(failing(EndlessFault(), rate=rate)) as (server, providers):
        await leave(stream(providers, kind))
        left = time.monotonic()
        await wait_until(lambda: server.closed_early == 1)
        assert time.monotonic() - left < 20
        assert server.open_streams == 0


async def test_leaving_during_a_silence_is_seen_too(kind: str) -> None:
    """Cancel must work just then: it is when people press it."""
    async with scripted(failing(StallFault(seconds=60, after=2))) as (server, providers):
        await _cancel(stream(providers, kind))
        await wait_until(lambda: server.closed_early == 1)


async def test_closing_the_providers_leaves_nothing_open(kind: str) -> None:
    """Warnings about unclosed sessions are errors in these tests; connections at the provider count too."""
    async with scripted(Scenario(turns=[Turn(text="hi")])) as (server, providers):
        await ask(providers, kind)
        await providers.aclose()
        await wait_until(lambda: server.connections == 0)


# --- which provider ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "model", "expected"),
    [
        ({"openai_api_key": "k"}, "gpt-x", ("OpenAI", "gpt-x")),
        ({"anthropic_api_key": "k"}, "claude-x", ("Anthropic", "claude-x")),
        ({"openai_api_key": "k", "anthropic_api_key": "k"}, "m", ("OpenAI", "m")),
        ({"openai_api_key": "k", "anthropic_api_key": "k", "provider": "anthropic"}, "m", ("Anthropic", "m")),
        ({"openai_api_key": "k", "anthropic_api_key": "k"}, "anthropic:m", ("Anthropic", "m")),
        (
            {"openai_api_key": "k", "anthropic_api_key": "k", "provider": "anthropic"},
            "openai:m",
            ("OpenAI", "m"),
        ),
        ({"openai_api_key": "k"}, "anthropic/claude", ("OpenAI", "anthropic/claude")),
        ({"openai_api_key": "k"}, "openai/gpt-oss", ("OpenAI", "openai/gpt-oss")),
        ({"openai_api_key": "k"}, "llama3:8b", ("OpenAI", "llama3:8b")),
        ({"openai_api_key": "k"}, "openai:ft:gpt:x", ("OpenAI", "ft:gpt:x")),
        ({"openai_base_url": "http://localhost:11434/v1"}, "m", ("OpenAI", "m")),
        (
            {"openai_api_key": "k", "default_model": "anthropic:m", "anthropic_api_key": "k"},
            "",
            ("Anthropic", "m"),
        ),
    ],
)
async def test_which_provider_a_model_means(settings: Any, model: str, expected: tuple[str, str]) -> None:
    """A prompt sent to the wrong company is worse than one not sent."""
    providers = Providers(Settings(**settings))
    provider, name = providers.resolve(model)
    assert (type(provider).__name__, name) == expected
    assert providers.resolve(model)[0] is provider
    await providers.aclose()


async def test_a_tenant_is_served_with_its_own_key(kind: str) -> None:
    """One customer's requests would be on another one's bill."""
    keys: list[str] = []

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        keys.append(next(key for key in ("sk-of-acme", "sk-common") if key in head))
        writer.write(b"HTTP/1.1 401 no\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        changes = {f"{kind}_base_url": url, f"{kind}_api_key": "sk-common"}
        providers = Providers(Settings(provider_keys=(f"acme/{kind}=sk-of-acme",), **changes))
        for owner in ("acme/anna", "globex/anna", "acme", ""):
            provider, model = providers.resolve(f"{kind}:m", owner)
            with pytest.raises(ProviderError):
                [piece async for piece in provider.stream(ModelRequest(model, HELLO))]
        await providers.aclose()
    assert keys == ["sk-of-acme", *["sk-common"] * 3]


@pytest.mark.parametrize(
    ("settings", "model", "words"),
    [
        ({}, "gpt-x", "OPENAI_API_KEY"),
        ({"openai_api_key": "k"}, "anthropic:x", "ANTHROPIC_API_KEY"),
        ({"openai_api_key": " "}, "x", "no API key"),
        ({"openai_api_key": "k"}, "", "no model"),
        ({"openai_api_key": "k"}, "openai:", "no model"),
    ],
)
def test_what_is_missing_is_said(settings: Any, model: str, words: str) -> None:
    """A 401 from a public API, with a prompt in the request, is a bad way to learn that no key is set."""
    with pytest.raises(ProviderError, match=words) as caught:
        Providers(Settings(**settings)).resolve(model)
    assert not caught.value.is_retryable


# --- the scripted provider itself --------------------------------------------------------------------


async def post(server: ScriptedProvider, path: str, body: Any) -> httpx.Response:
    async with httpx.AsyncClient(trust_env=False) as client:
        return await client.post(
            server.url + path, content=body if isinstance(body, bytes) else json.dumps(body)
        )


async def test_answers_that_are_not_streamed() -> None:
    """Other clients, and a look with curl, ask without `stream`."""
    scenario = Scenario(turns=[Turn(text="hi", tool_calls=[ScriptedCall(name="f", arguments={"a": 1})])])
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    async with ScriptedProvider(scenario) as server:
        chat = (await post(server, "/v1/chat/completions", body)).json()
        message = (await post(server, "/v1/messages", body)).json()
    assert chat["choices"][0]["message"]["content"] == "hi"
    assert chat["choices"][0]["message"]["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"a":1}'}
    assert chat["choices"][0]["finish_reason"] == "tool_calls"
    assert message["content"][0] == {"type": "text", "text": "hi"}
    assert (message["content"][1]["input"], message["stop_reason"]) == ({"a": 1}, "tool_use")


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"[" * 100_000, b'{"messages": 5}', b'{"messages": [5]}'])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
async def test_requests_that_are_none_are_refused(path: str, body: bytes) -> None:
    """A test that sends nonsense should learn it from a 400, not from a dead server."""
    async with ScriptedProvider() as server:
        response = await post(server, path, body)
    assert response.status_code == 400 and response.json()["error"]["message"]


async def test_turns_are_chosen_by_the_request(kind: str) -> None:
    """A restarted worker, or another one, must be told the same again."""
    scenario = parse_scenario(
        """
        turns:
          - text: first
          - match: {user: "weather in .*berlin", model: "scripted-.*"}
            text: rain
          - text: second
          - match: {tools: [f], turn: 2}
            text: with tools
        """
    )
    said = [*HELLO, Message("assistant", "first"), Message("user", "and?")]
    later = [*said, Message("assistant", "second"), Message("user", "so?")]
    async with scripted(scenario) as (_, providers):
        assert (await ask(providers, kind)).text == "first"
        assert (await ask(providers, kind, said)).text == "second"
        assert (await ask(providers, kind)).text == "first"
        assert (await ask(providers, kind, [Message("user", "The WEATHER in\nold Berlin?")])).text != "rain"
        assert (await ask(providers, kind, [Message("user", "The WEATHER in old Berlin?")])).text == "rain"
        assert (await ask(providers, kind, later, tools=[ToolSpec("f", "", {})])).text == "with tools"
        assert "You said: “so?”" in (await ask(providers, kind, later)).text


async def test_a_scenario_can_start_over(kind: str) -> None:
    """Load tests hold conversations longer than their script."""
    said = [
        *HELLO,
        Message("assistant", "a"),
        Message("user", "x"),
        Message("assistant", "b"),
        Message("user", "y"),
    ]
    async with scripted(Scenario(turns=[Turn(text="a"), Turn(text="b")], repeat=True)) as (_, providers):
        assert (await ask(providers, kind, said)).text == "a"


async def test_faults_follow_each_other_and_count_for_each_conversation(kind: str) -> None:
    """One conversation's bad luck must not use up another's."""
    faults = [StatusFault(status=503, times=1), CutFault(after=0, times=2)]
    async with scripted(failing(*faults), provider_attempts=1) as (_, providers):
        for _ in range(3):
            await fails(providers, kind)
        assert (await ask(providers, kind)).text == TEXT
        with pytest.raises(ProviderError):
            await ask(providers, kind, [Message("user", "another")])


async def test_the_record_of_requests(kind: str) -> None:
    """Tests look at what was sent."""
    async with scripted(failing()) as (server, providers):
        await ask(providers, kind, parameters={"temperature": 0.5})
        assert [(body["model"], body["temperature"]) for body in server.requests] == [("scripted-1", 0.5)]
        assert (server.open_streams, server.closed_early) == (0, 0)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("turns: [{textt: x}]", "textt"),
        ("turns: [{text: 5}]", r"turns\[0\].text"),
        ("turns: [{faults: [{kind: explode}]}]", "explode"),
        ("turns: [{faults: [{kind: cut, seconds: 1}]}]", "seconds"),
        ("turns: [{match: {user: '('}}]", "unterminated"),
        ("turns: {", "scenario"),
        ("5", "object"),
    ],
)
def test_mistakes_in_a_scenario_are_named(content: str, words: str) -> None:
    """A misspelt fault that is ignored makes a test pass that tests nothing."""
    with pytest.raises(ConfigError, match=words):
        parse_scenario(content)


def test_scenarios_are_read_from_json_and_yaml(tmp_path: Any) -> None:
    """The command line takes either."""
    content = {"turns": [{"text": ["a"], "faults": [{"kind": "stall", "seconds": 1.5, "times": 2}]}]}
    (tmp_path / "s.json").write_text(json.dumps(content))
    (tmp_path / "s.yaml").write_text(
        "turns:\n- text: [a]\n  faults:\n  - {kind: stall, seconds: 1.5, times: 2}\n"
    )
    expected = Scenario(turns=[Turn(text=["a"], faults=[StallFault(seconds=1.5, times=2)])])
    assert load_scenario(tmp_path / "s.json") == load_scenario(tmp_path / "s.yaml") == expected
    with pytest.raises(ConfigError, match="nowhere"):
        load_scenario(tmp_path / "nowhere.yaml")
