"""Scripts broken on purpose: the model must notice each, or its agreement means nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from tests.conftest import RedisProcess
from tests.contract.callers import Ear, Mutation, ScriptCaller
from tests.contract.commands import Command
from tests.contract.duel import Difference, Duel
from tests.contract.programs import random_program
from tests.contract.stories import STORIES

PROGRAMS = 60
LENGTH = 120

APPEND = "append always"

MUTATIONS: dict[str, Mutation] = {
    "an approval is lost between 'I wait' and 'here it is'": Mutation(
        APPEND, "if PARKS[row.outcome] and row.seen ~= number(job, 'inbox') then", "if false then"
    ),
    "a batch that is sent twice is written twice": Mutation(
        APPEND, "if row.batch < expected then return { 'conflict' } end", ""
    ),
    "a resend is not recognised": Mutation(APPEND, "if print == fingerprint(row) then", "if false then"),
    "a worker that lost its lease writes on": Mutation(
        APPEND, "if job.h.lease ~= row.epoch then return { 'fenced' } end", ""
    ),
    "a tool starts after a cancel": Mutation(
        APPEND, "if job.h.cancel and starts_tool(row) then", "if false then"
    ),
    "artifacts of a job that ended stay for ever": Mutation(
        "common", "if job.h.artifacts then", "if false then"
    ),
    "a worker that lost its lease replaces an artifact": Mutation(
        "artifact", "if job.h.lease ~= epoch then", "if not job.h.epoch then"
    ),
    "an artifact that is replaced is counted twice": Mutation(
        "artifact", " - redis.call('HSTRLEN', job.key .. ':artifacts', name)", ""
    ),
    "an artifact has any size": Mutation("artifact", "if #content > tonumber(ARGV[7]) then", "if false then"),
    "artifacts of one job fill the store": Mutation(
        "artifact", "if all > tonumber(ARGV[8]) then", "if false then"
    ),
    "a clock that stepped back stops a tool for as long": Mutation(
        "common", " + math.min(0, NOW - tonumber(written))", ""
    ),
    "permits are saved up while nobody asks": Mutation(
        "common", "full = math.max(NOW, tonumber(at)", "full = (tonumber(at)"
    ),
    "a bucket is never empty": Mutation(
        "permit", "if answer[1] == 'go' then take_token", "if false then take_token"
    ),
    "who is sent away has used a permit": Mutation("permit", "if answer[1] == 'go' then", "if true then"),
    "a struck queue is worked on": Mutation("take", "and not stream[3] and", "and"),
    "a struck kind starts": Mutation("common", "if is_struck('kind:' .. job.h.kind) then", "if false then"),
    "a struck kind holds up its owner's other jobs": Mutation(
        "common", "if reason == 'struck' then list = list .. '|kind:' .. job.h.kind end", ""
    ),
    "who struck it last is named": Mutation("strike", "'HSETNX'", "'HSET'"),
    "nobody hears of a strike": Mutation("strike", "if verdict == 'struck' or", "if"),
    "failed jobs are listed without end": Mutation(
        "common", "redis.call('ZREMRANGEBYRANK', PREFIX .. 'dead', 0, -OPT.dead_cap - 1)", ""
    ),
    "the newest failed jobs leave the full list": Mutation(
        "common", "0, -OPT.dead_cap - 1)", "OPT.dead_cap, -1)"
    ),
    "failed jobs that expired stay listed": Mutation("wake", "redis.call('ZREM', PREFIX .. 'dead', id)", ""),
    "jobs that are there leave the list": Mutation(
        "wake", "== 'failed' then return end", "== '' then return end"
    ),
    "what is run again stays listed": Mutation("rerun", "redis.call('ZREM', PREFIX .. 'dead', id)", ""),
    "a live job is taken for one that is run again": Mutation(
        "rerun", "if not ENDED[job.h.status] then", "if false then"
    ),
    "a job that is gone comes back as a field": Mutation(
        "rerun",
        "if not job then return { 'gone' } end",
        "if not job then redis.call('HSET', PREFIX .. 'job:' .. id, 'rerun', new) return { 'gone' } end",
    ),
    "a log is trimmed of what no segment holds": Mutation(
        "seal",
        "string.format('%d', seq_of(last) + 1) .. '-0'",
        "string.format('%d', seq_of(last) + 2) .. '-0'",
    ),
    "what is sealed stays in the stream": Mutation("seal", "seq_of(last) + 1) .. '-0'", "0) .. '-0'"),
    "the stream of a live job goes with what is not sealed": Mutation(
        "seal", "if ENDED[job.h.status] and last == job.h.last then", "if true then"
    ),
    "the stream of an ended job goes before all is sealed": Mutation(
        "seal", "if ENDED[job.h.status] and last == job.h.last then", "if ENDED[job.h.status] then"
    ),
    "a projector that is behind seals again": Mutation(
        "seal", "if (job.h.sealed or '') ~= sealed or (job.h.snap or '') ~= snap then", "if false then"
    ),
    "a trim passes the snapshot": Mutation(
        "seal",
        "if job.h.snap and snapshot == '' then return { 'bad', 'the snapshot would stay behind' } end",
        "",
    ),
    "a segment with a hole before it is taken": Mutation(
        "seal", "if segment.first ~= before + 1 then return 'a hole before ' .. segment.line end", ""
    ),
    "a segment of another history is taken": Mutation(
        "seal",
        "if #redis.call('XRANGE', log, segment.last, segment.last) == 0 then"
        " return 'not in the stream: ' .. segment.last end",
        "",
    ),
    "a segment is lost from the index": Mutation(
        "seal", "local index = redis.call('HGET', history, 'index') or ''", "local index = ''"
    ),
    "sealing that is sent twice is called stale": Mutation(
        "seal", "if job.h.sealed == last and (snapshot == '' or job.h.snap == last) then", "if false then"
    ),
    "the sealed history of an ended job stays for ever": Mutation(
        "common", "if job.h.sealed then redis.call('PEXPIREAT'", "if false then redis.call('PEXPIREAT'"
    ),
    "what is sealed after the end stays for ever": Mutation(
        "seal", "if ENDED[job.h.status] then redis.call('PEXPIREAT'", "if false then redis.call('PEXPIREAT'"
    ),
    "a rate limits nothing": Mutation("submit", "or not token_for(owner) then", "then"),
    "who comes later has the token of those that wait": Mutation(
        "submit", "or redis.call('EXISTS', list) == 1", ""
    ),
    "a job that wakes has the token of those that wait": Mutation(
        "take", "or passes_by(job) and 'owner_limit'", ""
    ),
    "delayed jobs are over no rate": Mutation("submit", "if delay > 0 or redis", "if redis"),
    "what is unpaid starts": Mutation(
        "common", "if job.h.unpaid and not token_for(job.h.owner) then", "if false then"
    ),
    "what is released has cost nothing": Mutation("common", "if job.h.unpaid then pay(job) end", ""),
    "what starts has cost nothing": Mutation("take", "if h.unpaid then pay(job) end", ""),
    "what is paid for waits for what is not": Mutation(
        "common", "if job.h.unpaid then order = order + 5e11 end", ""
    ),
    "a lost lease is renewed": Mutation("renew", "if h[1] ~= epoch then", "if not h[1] then"),
    "a terminal event is over the budget": Mutation(
        APPEND, "if n > 0 and TERMINAL[row.events[n][1]] then", "if false then"
    ),
    "a job that ended keeps its owner's place": Mutation("common", "left[#left + 1] = job.id", ""),
    "the log of an ended job never expires": Mutation(
        "common", "redis.call('PEXPIREAT', job.key .. ':events', expiry)", ""
    ),
    "an idempotency record goes with the job": Mutation(
        "common", "math.max(expiry, number(job, 'created') + OPT.idempotency)", "expiry"
    ),
    "tickets are counted up only": Mutation("common", "count_ticket(job, -1)", ""),
    "timers stay armed": Mutation("common", "if due == nil then gathered.disarmed[job.id] = true end", ""),
    "a timer is not armed when a job parks": Mutation(
        APPEND, "if row.outcome ~= 'keep' or row.timers ~= '' then arm(job) end", ""
    ),
    "a timer that is set again starts over": Mutation("common", "if timers[key] == nil then", "if true then"),
    "a timer that was taken back fires": Mutation("common", "timers[key] = nil\n    elseif", "elseif"),
    "a sleeper's only timer is taken back with the same breath": Mutation(
        APPEND,
        "if row.outcome == 'sleep' and not next(",
        "if row.outcome == 'sleep' and not next(timers_of(job)) and not next(",
    ),
    "one job whose key is taken holds up all behind it": Mutation(
        "common", "elseif reason == job.h.held then", "elseif reason then"
    ),
    "a concurrency key is never given back": Mutation(
        "common",
        "== job.id then redis.call('DEL', PREFIX .. 'ckey:' .. ckey) end",
        "== job.id then return end",
    ),
    "a place that is free is offered to nobody": Mutation(
        "common", "if job.left_running or ckey then offer(", "if false then offer("
    ),
    "a child's end does not wake its parent": Mutation(
        "common", "if parent.h.status == 'waiting' then", "if false then"
    ),
    "grandchildren are not cancelled": Mutation("cancel", "below[#below + 1] = child", ""),
    "a signal is delivered twice": Mutation("signal", "redis.call('SADD', job.key .. ':seen', key)", ""),
    "another body under the same key is taken for the same": Mutation(
        "submit", "if digest ~= body then", "if false then"
    ),
    "a job that has ended gets children": Mutation(
        "submit", "if ENDED[h.status] then return { 'parent', h.status } end", ""
    ),
    "a job that is being cancelled gets children": Mutation("submit", "if h.cancel then", "if false then"),
    "somebody else's job gets children": Mutation("submit", "if h.owner ~= owner then", "if false then"),
    "children have children without end": Mutation("submit", "+ 1 > OPT.max_depth", "> OPT.max_depth"),
    "a job spawns without end": Mutation("submit", ">= OPT.max_children", "> OPT.max_children"),
    "a ticket of a cancelled job starts it": Mutation(
        "take", "if not job or job.h.status ~= 'queued' or job.h.ticket ~= ticket then", "if not job then"
    ),
    "an epoch comes back when the clock steps back": Mutation(
        "take", "math.max(number(job, 'epoch') + 1, NOW)", "NOW"
    ),
    "the owner limit holds for submissions only": Mutation(
        "take", "obstacle(job) or passes_by(job)", "passes_by(job)"
    ),
    "a resent take leases other jobs": Mutation("take", "if #jobs > 0 then file(jobs) end", ""),
    "low priority starves": Mutation("take", "local slot, turn = NUMBER % total,", "local slot, turn = 0,"),
    "jobs that do nothing wrong are called poison": Mutation(
        "wake", "(number(job, 'batch') > 0 and 1 or 0)", "1"
    ),
    "an outage is every worker's death": Mutation("wake", "grace = NOW + OPT.lease", "grace = 0"),
    "a clock that stepped back freezes jobs": Mutation(
        "wake", "NOW + 2 * OPT.lease", "NOW + 200 * OPT.lease"
    ),
    "a cancelled job is queued when its worker dies": Mutation(
        "wake", "if parked_by_wish(job, bystander(job)) then", "if false then"
    ),
    "an owner's backlog has no end": Mutation(
        "submit", "if tickets(queue, owner) + held >= OPT.owner_waiting then", "if false then"
    ),
    "a child is refused for its owner's backlog": Mutation(
        "submit", "if parent == '' and is_crowded", "if is_crowded"
    ),
    "a job's log is filled from outside by pausing it": Mutation(
        "pause", "if number(job, 'seq') >= OPT.max_events or", "if"
    ),
    "a job's keys fill the store": Mutation(
        "pause", " or redis.call('SCARD', job.key .. ':seen') >= OPT.max_events", ""
    ),
    "a job's log is filled with large signals": Mutation(
        "signal", "if number(job, 'bytes') >= OPT.max_bytes then", "if false then"
    ),
    "a due timer stays due": Mutation("wake", "timers[key] = nil\n  end", "end"),
}


@pytest.fixture
def ear(redis: RedisProcess) -> Iterator[Ear]:
    with redis.client() as client:
        ear = Ear(client)
        yield ear
        ear.close()
        client.flushdb()


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_model_notices(name: str, ear: Ear) -> None:
    """Without it, the model could agree with anything, and nobody would know."""
    call = ScriptCaller(ear.client, mutation=MUTATIONS[name])
    programs = [random_program(f"mutation-{number}", LENGTH) for number in range(PROGRAMS)]
    assert any(is_noticed(program, call, ear) for program in (*STORIES.values(), *programs))


def is_noticed(program: Sequence[Command], call: ScriptCaller, ear: Ear) -> bool:
    try:
        Duel(call, ear).run(program)
    except Difference:
        return True
    return False
