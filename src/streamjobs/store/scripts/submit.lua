-- submit: new jobs; each gets its log, its hash, and a ticket, a timer or a hold. One over its owner's rate is held
-- until there is a token for it, behind those that wait already. A delayed one pays when it wakes: what the rate
-- protects is the work, and a thousand jobs for tonight take nothing from today's.
-- ARGV 2 n, then per row 14: id, owner, kind, queue, priority, delay, start_timeout, timeout, ckey, idem, body, parent, event,
--   tick
--   ckey, idem: digests scoped to the owner, or ''; body: digest of the request; durations in ms, 0 for none;
--   event: job.queued as JSON without ts
--   tick: '' or "schedule due next": the schedule must wait for the tick `due`, and then waits for `next`; both are '-'
--   for a job out of turn, which needs the schedule only
-- behind the rows, where the caller encrypts: for each the record of its data key, or ''
-- row: {"ok", id, cursor} | {"same", id, cursor} (this submission came before) | {"mismatch", id}
--      (its key came with another body) | {"parent", status} (the parent takes no more children, is gone, or is
--      "foreign": its owner is another) | {"depth"|"children", the most there may be} | {"error", why}
--      | {"waiting", the most there may be} (one owner's; a child is not refused)
--      | {"tick", "gone"} | {"tick", "moved"} (somebody had it, or it is paused) | {"tick", "overlap"} (skipped: the
--      job before is live)

local WIDTH = 14

local function first_cursor(id, created) return '1-' .. (created or '0') end

local function repeated(id, idem, body)
  if idem ~= '' then
    local record = redis.call('GET', PREFIX .. 'idem:' .. idem)
    if record then
      local known, digest = string.match(record, '^(%S+) (%S+)$')
      if digest ~= body then return { 'mismatch', known } end
      return { 'same', known, first_cursor(known, redis.call('HGET', PREFIX .. 'job:' .. known, 'created')) }
    end
  end
  local created = redis.call('HGET', PREFIX .. 'job:' .. id, 'created')
  if created then return { 'same', id, first_cursor(id, created) } end
end

-- Why the parent may not have this child, if anything; a repeated submission never comes here
local function orphaned(family, owner)
  if not family then return { 'parent', 'gone' } end
  local h = family.h
  if h.owner ~= owner then return { 'parent', 'foreign' } end
  if ENDED[h.status] then return { 'parent', h.status } end
  if h.cancel then return { 'parent', 'cancelled' } end
  if number(family, 'depth') + 1 > OPT.max_depth then return { 'depth', OPT.max_depth } end
  if h.family and redis.call('SCARD', family.key .. ':children') >= OPT.max_children then
    return { 'children', OPT.max_children }
  end
end

-- Whether as many jobs of the owner wait as may: in this queue as of now; in all, delayed ones too, as the projection
-- `index` last knew. A child is its parent's business: refusing it would fail work that is under way.
local function is_crowded(owner, queue)
  if OPT.owner_waiting == 0 then return false end
  local held = redis.call('ZCARD', PREFIX .. 'held:' .. queue .. '|' .. owner)
  if tickets(queue, owner) + held >= OPT.owner_waiting then return true end
  local known = redis.call('HMGET', PREFIX .. 'indexed_counts:' .. owner, 'q', 's')
  return tonumber(known[1] or 0) + tonumber(known[2] or 0) >= OPT.owner_waiting
end

-- Whether it waits its turn from the start
local function admit(job, delay)
  local queue, owner = job.h.queue, job.h.owner
  if OPT.owner_rate > 0 then
    local list = PREFIX .. 'held:' .. queue .. '|' .. owner
    if delay > 0 or redis.call('EXISTS', list) == 1 or not token_for(owner) then put(job, 'unpaid', '1') else pay(job) end
  end
  if delay > 0 then return end
  local is_full = OPT.owner_limit > 0 and tickets(queue, owner) >= OPT.owner_limit
  if job.h.unpaid or is_full then put(job, 'held', 'owner_limit') end
end

local function place(job, delay, start_timeout, queued)
  if start_timeout > 0 then put(job, 'start_by', NOW + delay + start_timeout) end
  if delay > 0 then
    put(job, 'status', 'scheduled')
    put(job, 'wake', NOW + delay)
  elseif job.h.held then
    hold(job, job.h.held)
  else
    enqueue(job, queued)
  end
  arm(job)
end

-- What becomes of the job's schedule, or the refusal. A skipped tick is written here: nothing else of it will be.
local function turn_of(tick)
  local id, due, after = string.match(tick, '^(%S+) (%S+) (%S+)$')
  local turn = { id = id, due = due, after = after, key = PREFIX .. 'schedule:' .. id, waiting = PREFIX .. 'schedules' }
  local known = redis.call('HMGET', turn.key, 'owner', 'overlap', 'last_job')
  if not known[1] then return nil, { 'tick', 'gone' } end
  if due == '-' then return turn end
  if tonumber(redis.call('ZSCORE', turn.waiting, id) or -1) ~= tonumber(due) then return nil, { 'tick', 'moved' } end
  if known[2] == 'skip' and known[3] then
    local status = redis.call('HGET', PREFIX .. 'job:' .. known[3], 'status')
    if status and not ENDED[status] then
      redis.call('ZADD', turn.waiting, after, id)
      redis.call('HINCRBY', turn.key, 'skipped', 1)
      return nil, { 'tick', 'overlap' }
    end
  end
  return turn
end

local function take_turn(turn, job)
  if turn.due ~= '-' then
    redis.call('ZADD', turn.waiting, turn.after, turn.id)
    redis.call('HSET', turn.key, 'last_tick', turn.due, 'error', '')
  end
  redis.call('HSET', turn.key, 'last_job', job)
  redis.call('HINCRBY', turn.key, 'runs', 1)
end

local function submit(at, record)
  local id, owner, kind, queue, priority = unpack(ARGV, at, at + 4)
  local delay, start_timeout, timeout = tonumber(ARGV[at + 5]), tonumber(ARGV[at + 6]), tonumber(ARGV[at + 7])
  local ckey, idem, body, parent, event, tick = unpack(ARGV, at + 8, at + 13)
  local answer = repeated(id, idem, body)
  if answer then return answer end
  if parent == '' and is_crowded(owner, queue) then return { 'waiting', OPT.owner_waiting } end
  local family
  if parent ~= '' then
    family = fetch(parent)
    local refused = orphaned(family, owner)
    if refused then return refused end
  end
  local turn
  if tick ~= '' then
    local refusal
    turn, refusal = turn_of(tick)
    if refusal then return refusal end
  end

  local job = { id = id, key = PREFIX .. 'job:' .. id, h = {}, changes = {}, at = {}, lines = {} }
  put(job, 'owner', owner)
  put(job, 'kind', kind)
  put(job, 'queue', queue)
  put(job, 'priority', priority)
  put(job, 'created', NOW_TEXT)
  put(job, 'attempt', 1)
  if timeout > 0 then put(job, 'timeout', timeout) end
  if ckey ~= '' then put(job, 'ckey', ckey) end
  if idem ~= '' then put(job, 'idem', idem) end
  local stamp = '{"ts":' .. NOW_TEXT .. ','
  if family then
    local depth = number(family, 'depth') + 1
    put(job, 'parent', parent)
    put(job, 'depth', depth)
    stamp = stamp .. '"depth":' .. depth .. ','
  end
  if record and record ~= '' then
    redis.call('SET', job.key .. ':datakey', parent ~= '' and record .. ' ' .. parent or record)
    put(job, 'datakey', '1')
  end
  admit(job, delay)
  if job.h.held then stamp = stamp .. '"held":"owner_limit",' end
  local queued = stamp .. string.sub(event, 2)
  emit(job, NOW_TEXT, 'job.queued', queued)
  place(job, delay, start_timeout, #queued <= OPT.inline_bytes and queued)
  save(job)
  if idem ~= '' then redis.call('SET', PREFIX .. 'idem:' .. idem, id .. ' ' .. body) end
  if family then
    redis.call('SADD', family.key .. ':children', id)
    put(family, 'family', '1')
    save(family)
  end
  if turn then take_turn(turn, id) end
  return { 'ok', id, job.h.last }
end

local answers = {}
local ROWS = tonumber(ARGV[2])
for i = 1, ROWS do answers[i] = guarded(submit, 3 + (i - 1) * WIDTH, ARGV[2 + ROWS * WIDTH + i]) end
settle()
return answers
