"""The built-in chat: turns of a model and the tools it calls, until it stops.

Rule 1: a turn's tools start after `turn.completed`, with its calls, is in the log.
Rule 2: `tool.started` is in the log before the tool's effect; a `once` tool that was started and never
recorded is `tool.unknown`, it does not run again.
Rule 3: a turn that was interrupted after it had said something begins again with `turn.restarted`; two
generations are never spliced. One that had said nothing just goes on.
Rule 4: every failure of a tool is a result that the model sees; none fails the job.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

import msgspec
import structlog

from streamjobs import events as ev
from streamjobs import metrics
from streamjobs.agent import Agent
from streamjobs.errors import Invalid, ProviderError, StreamjobsError, WorkflowChanged
from streamjobs.events import Json, ToolCallRequest, Usage, clean_text
from streamjobs.faults import fault
from streamjobs.inputs import ChatInput
from streamjobs.llm.base import Answer, Message, ModelRequest, Piece, TextPiece
from streamjobs.retry import Backoff
from streamjobs.tool import Tool
from streamjobs.worker.context import Context
from streamjobs.worker.described import describe
from streamjobs.worker.outcomes import tool_result_text
from streamjobs.worker.toolcall import ToolCall, shown_arguments

log = structlog.get_logger(__name__)

_MAX_PIECE = 16 * 1024
_MAX_CALL_ID = 40
_FOREIGN = re.compile(r"[^A-Za-z0-9_-]")


_Stream = Callable[[ModelRequest], AsyncGenerator[Piece, None]]


class TooManyRounds(StreamjobsError):  # noqa: N818 - named after what happened, as all our errors
    """The model still asks for tools after the last round."""

    code, http_status = "too_many_rounds", 422


class ChatResult(msgspec.Struct, frozen=True):
    """What a chat job ends with."""

    text: str
    finish_reason: str = ""
    rounds: int = 1
    usage: Usage = Usage()


async def chat(ctx: Context) -> ChatResult:
    """The built-in `chat` workflow."""
    return await converse(ctx, ChatInput.from_json(ctx.history.submission.input))


async def converse(ctx: Context, request: ChatInput, key: str = "") -> ChatResult:
    """Run a conversation to its end; `key` tells a workflow's calls apart.

    Raises `ProviderError`, `TooManyRounds`, `UnknownAgent`, `UnknownTool`.
    """
    if ctx.is_chatting:
        raise Invalid("a job runs one chat at a time")
    ctx.is_chatting = True
    try:
        return await _Conversation(ctx, request, key).run()
    finally:
        ctx.is_chatting = False


class _Conversation:
    def __init__(self, ctx: Context, request: ChatInput, key: str) -> None:
        self._ctx = ctx
        self._key = key
        agent = ctx.app.find_agent(request.agent) if request.agent else None
        self._provider, self._model = ctx.providers.resolve(_model_of(ctx, request, agent), ctx.owner)
        self._parameters: dict[str, Json] = {**(agent.parameters if agent else {}), **request.parameters}
        self._tools = _tools_of(ctx, request, agent)
        self._messages = _opening(request, agent)
        self._usage = Usage()

    async def run(self) -> ChatResult:
        for round_number in range(1, self._ctx.settings.max_rounds + 1):
            turn = await self._turn()
            self._usage += turn.usage
            if not turn.calls:
                return ChatResult(turn.text, turn.finish_reason, round_number, self._usage)
            self._messages.append(Message("assistant", turn.text, calls=turn.calls, extra=turn.extra))
            self._messages.extend(await self._answer_calls(turn))
            await self._ctx.checkpoint()
        raise TooManyRounds(f"the model still asked for tools after {self._ctx.settings.max_rounds} rounds")

    async def _turn(self) -> ev.TurnCompleted:
        ctx = self._ctx
        ctx.turn += 1
        op = ("turn", str(ctx.turn))
        is_known = ctx.replay.is_known(op)
        outcome = ctx.replay.begin(op)
        self._require_same_chat()
        if ctx.replay.has_outcome(op):
            recorded = (await outcome).event
            if isinstance(recorded, ev.TurnFailed):
                raise ProviderError(recorded.error.message, retryable=recorded.error.retryable)
            assert isinstance(recorded, ev.TurnCompleted)
            self._take_over(recorded)
            return recorded
        if not is_known:
            await ctx.begin_new()
        turn = _Turn(ctx, ctx.turn, self._request(), self._provider.stream, self._key)
        with ctx.replay.working():
            try:
                return await turn.run()
            except ProviderError as error:
                if self._key:  # else it ends the attempt, and nobody decides anything by it
                    await ctx.record(op, turn.failed(error))
                raise

    def _require_same_chat(self) -> None:
        """A turn that is recorded for another question is not an answer to this one."""
        recorded = self._ctx.history.chats.get(self._ctx.turn, self._key)
        if recorded != self._key:
            raise WorkflowChanged(
                f"turn {self._ctx.turn} was recorded for {recorded!r}, the code asks for {self._key!r}: "
                "the workflow was changed while this job lived"
            )

    def _take_over(self, recorded: ev.TurnCompleted) -> None:
        """Go on from a turn that an earlier run completed; its calls may not all be in the log yet."""
        for call in recorded.calls:
            self._ctx.call_ids.add(call.call_id)
            if not self._ctx.history.tool(call.call_id).is_called:
                self._ctx.journal.emit(_called(call, recorded))

    def _request(self) -> ModelRequest:
        specs = [tool.spec for tool in self._tools.values()]
        return ModelRequest(self._model, list(self._messages), specs, self._parameters)

    async def _answer_calls(self, turn: ev.TurnCompleted) -> list[Message]:
        """Run a turn's calls, all at once; their results in the order of the calls."""
        limit = self._ctx.settings.max_tool_calls
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._answer(turn.turn, call, is_refused=i >= limit))
                    for i, call in enumerate(turn.calls)
                ]
        except BaseExceptionGroup as failures:
            # tools' own failures are results: what gets here (fenced, over budget) is the same for all
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _answer(self, turn: int, call: ToolCallRequest, *, is_refused: bool) -> Message:
        known = ToolCall(self._ctx, self._tools.get(call.tool), turn, call)
        outcome = await known.run(is_refused=is_refused)
        is_error = outcome.error is not None
        return Message("tool", tool_result_text(outcome), call_id=call.call_id, is_error=is_error)


class _Turn:
    """One call of the model, recorded as it comes."""

    def __init__(self, ctx: Context, turn: int, request: ModelRequest, stream: _Stream, chat: str) -> None:
        self._ctx = ctx
        self._chat = chat
        self._journal = ctx.journal
        self._turn = turn
        self._request = request
        self._stream = stream
        self._attempt = 1
        self._started: asyncio.Future[int] | None = None
        self._first_seq = 0
        self._has_text = False
        self._pieces = 0

    async def run(self) -> ev.TurnCompleted:
        backoff = Backoff(self._ctx.settings.retry_base, self._ctx.settings.provider_max_retry_after)
        self._start()
        for attempt in range(1, self._ctx.settings.provider_attempts + 1):
            try:
                return await self._complete(await self._generate())
            except ProviderError as error:
                metrics.TURNS.labels("error").inc()
                # the provider itself tries again while nothing was said
                is_last = not self._has_text or attempt == self._ctx.settings.provider_attempts
                if is_last or not error.is_retryable:
                    raise
                log.info("turn.retrying", turn=self._turn, error=str(error))
                await asyncio.sleep(backoff.delay(attempt, at_least=error.retry_after))
                await self._restart(str(error))
        raise AssertionError("unreachable")

    def failed(self, error: ProviderError) -> ev.TurnFailed:
        """What the log says where no answer came."""
        now = self._ctx.clock.now_ms()
        return ev.TurnFailed(ts=now, turn=self._turn, attempt=self._attempt, error=describe(error))

    def _start(self) -> None:
        """Record that the turn starts, or starts again where an earlier run of it had said something."""
        known = self._ctx.history.open_turns.get(self._turn)
        if known is None:
            self._started = self._journal.emit_tracked(
                ev.TurnStarted(
                    ts=self._ctx.clock.now_ms(), turn=self._turn, model=self._request.model, chat=self._chat
                )
            )
        else:
            self._first_seq, self._attempt = known.seq, known.attempt
            if known.has_text:
                self._emit_restart(self._ctx.history.interruption)
        fault("after_turn_started")

    async def _restart(self, why: str) -> None:
        if self._started is not None:
            self._first_seq, self._started = await self._started, None
        self._emit_restart(why)

    def _emit_restart(self, why: str) -> None:
        self._attempt += 1
        self._has_text = False
        self._journal.emit(
            ev.TurnRestarted(
                ts=self._ctx.clock.now_ms(),
                turn=self._turn,
                attempt=self._attempt,
                supersedes_from=self._first_seq,
                model=self._request.model,
                why=clean_text(why),
            )
        )

    async def _generate(self) -> Answer:
        async with aclosing(self._stream(self._request)) as pieces:
            async for piece in pieces:
                if isinstance(piece, Answer):
                    return piece
                kind = ev.TextDelta if isinstance(piece, TextPiece) else ev.ReasoningDelta
                self._record(kind, piece.text)
                if self._journal.is_full:
                    await self._journal.room()
        raise ProviderError("the provider's stream ended without an answer", retryable=True)

    def _record(self, kind: type[ev.TextDelta] | type[ev.ReasoningDelta], text: str) -> None:
        ts = self._ctx.clock.now_ms()
        self._has_text = True
        for start in range(0, len(text), _MAX_PIECE):
            piece = text[start : start + _MAX_PIECE]
            self._journal.emit_delta(kind(ts=ts, turn=self._turn, text=piece, attempt=self._attempt))
        self._pieces += 1
        if self._pieces == 3:  # some deltas are in the log by then
            fault("mid_turn")

    async def _complete(self, answer: Answer) -> ev.TurnCompleted:
        """Commit the answer and its calls: only then may tools start."""
        calls = [_distinct(call, self._turn, i, self._ctx.call_ids) for i, call in enumerate(answer.calls)]
        event = ev.TurnCompleted(
            ts=self._ctx.clock.now_ms(),
            turn=self._turn,
            attempt=self._attempt,
            finish_reason=answer.finish_reason,
            usage=answer.usage,
            text=answer.text,
            calls=calls,
            extra=answer.extra,
        )
        fault("before_turn_completed")
        committed = self._journal.emit_tracked(event)
        for call in calls:
            self._journal.emit(_called(call, event))
        await self._ctx.tell_in_turn(("turn", str(self._turn)), committed, event)
        metrics.TURNS.labels("completed").inc()
        metrics.TOKENS.labels("in").inc(answer.usage.input_tokens)
        metrics.TOKENS.labels("out").inc(answer.usage.output_tokens)
        fault("after_turn_completed")
        return event


def _model_of(ctx: Context, request: ChatInput, agent: Agent | None) -> str:
    model = request.model or (agent.model if agent else "") or ctx.settings.default_model
    if not model:
        raise Invalid("no model: name one in the input, in the agent, or as the setting default_model")
    return model


def _tools_of(ctx: Context, request: ChatInput, agent: Agent | None) -> dict[str, Tool]:
    names: Sequence[str] = request.tools if request.tools is not None else (agent.tools if agent else ())
    return {name: ctx.app.find_tool(name) for name in names}


def _opening(request: ChatInput, agent: Agent | None) -> list[Message]:
    system = agent.system_prompt(request) if agent else ""
    messages = [Message("system", clean_text(system))] if system else []
    if request.prompt is not None:
        return [*messages, Message("user", request.prompt)]
    return [*messages, *(Message(message.role, message.content) for message in request.messages)]


def _distinct(call: ToolCallRequest, turn: int, index: int, taken: set[str]) -> ToolCallRequest:
    """Make a call's id unique over the job, as some providers count anew in each turn, and fit for all."""
    wanted = _FOREIGN.sub("_", call.call_id)[:_MAX_CALL_ID] or f"call_{turn}_{index}"
    call_id, tries = wanted, 0
    while call_id in taken:
        suffix = f"_{turn}_{index}" + (f"_{tries}" if tries else "")
        call_id, tries = wanted[: _MAX_CALL_ID - len(suffix)] + suffix, tries + 1
    taken.add(call_id)
    return msgspec.structs.replace(call, call_id=call_id)


def _called(call: ToolCallRequest, turn: ev.TurnCompleted) -> ev.ToolCalled:
    arguments = shown_arguments(call.arguments)
    return ev.ToolCalled(
        ts=turn.ts, call_id=call.call_id, tool=call.tool, arguments=arguments, turn=turn.turn
    )
