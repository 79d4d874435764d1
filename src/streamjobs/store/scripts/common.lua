-- common: put in front of every script. One way to write an event, one way to move a job between places.
--
-- KEYS 1 sj:{p}:leases, for routing; every other key is derived from its prefix and stays in {p}.
-- ARGV 1 limits and lifetimes as a JSON object (scripts.py, Limits); all durations in ms.
--
-- A job is fetched once into `job.h`, changed by put(), written back by save(). What many jobs of one
-- call share (timers, leases, counts, notes, owners' feeds) is gathered and written by settle(), which ends
-- every script. A field that is gone is stored as '': one HSET writes all, and fetch() takes '' for nothing.
-- Every call of a command costs about a microsecond, every number made text a fifth of one: hence both.
-- Hash fields: keys.py. Places: queued (a ticket, or held), running (a lease), scheduled, waiting, paused, ended.

local PREFIX = string.match(KEYS[1], '^(sj:{[^}]*}:)')
local OPT = cjson.decode(ARGV[1])
local TIME = redis.call('TIME')
local NOW = TIME[1] * 1000 + math.floor(TIME[2] / 1000)
local NOW_TEXT = string.format('%d', NOW)

local ENDED = { completed = true, failed = true, cancelled = true }
local TERMINAL = { ['job.completed'] = 'completed', ['job.failed'] = 'failed', ['job.cancelled'] = 'cancelled' }
local DELTA = { ['text.delta'] = true, ['reasoning.delta'] = true }
local RANK = { resume = 0, high = 1, default = 2, low = 3 }

local gathered = { leased = {}, unleased = {}, armed = {}, disarmed = {}, counts = {}, tickets = {}, running = {},
  feeds = {}, notes = {} }

-- A row fails alone: what it raises becomes its answer
local function guarded(row, ...)
  local ok, answer = pcall(row, ...)
  if ok then return answer end
  return { 'error', type(answer) == 'table' and answer.err or tostring(answer) }
end

-- Fetch, change, save ---------------------------------------------------------------------------------

local function fetch(id)
  local flat = redis.call('HGETALL', PREFIX .. 'job:' .. id)
  if #flat == 0 then return nil end
  local h = {}
  for i = 1, #flat, 2 do
    local value = flat[i + 1]
    if value ~= '' then h[flat[i]] = value end
  end
  return { id = id, key = PREFIX .. 'job:' .. id, h = h, changes = {}, at = {}, lines = {} }
end

local function number(job, field) return tonumber(job.h[field] or 0) end

-- nil removes the field
local function put(job, field, value)
  job.h[field] = value
  local changes, at = job.changes, job.at[field]
  if not at then
    at = #changes + 2
    changes[at - 1], job.at[field] = field, at
  end
  changes[at] = value or ''
end

local function count(field, by) gathered.counts[field] = (gathered.counts[field] or 0) + by end

local function note_for_projections(job)
  if job.note == nil then
    if number(job, 'fed') < OPT.feed_bytes then return end
    job.note = 'text.delta'
  end
  if job.h.fed ~= nil then put(job, 'fed', nil) end
  gathered.notes[#gathered.notes + 1] = job.id .. ' ' .. job.h.seq .. ' ' .. job.note
end

local function save(job)
  if #job.lines > 0 then
    note_for_projections(job)
    redis.call(OPT.publish, PREFIX .. 'live:' .. job.id, table.concat(job.lines, '\n'))
  end
  if #job.changes > 0 then redis.call('HSET', job.key, unpack(job.changes)) end
  job.changes, job.at, job.lines, job.note = {}, {}, {}, nil
end

-- Events ----------------------------------------------------------------------------------------------

-- The id's second half for events that are not the lease holder's: Redis's clock, at least the last epoch.
local function bystander(job) return math.max(NOW, number(job, 'epoch')) end

-- `fields` is JSON without its closing brace and without ts, such as '"why":"yield"'; may be empty
local function stamped(fields) return '{"ts":' .. NOW_TEXT .. (fields ~= '' and ',' .. fields or '') .. '}' end

local function emit(job, epoch, event, content)
  local seq = number(job, 'seq') + 1
  local id = seq .. '-' .. epoch
  redis.call('XADD', job.key .. ':events', id, 't', event, 'd', content)
  put(job, 'seq', seq)
  put(job, 'last', id)
  put(job, 'bytes', number(job, 'bytes') + #content)
  job.lines[#job.lines + 1] = id .. ' ' .. event .. ' ' .. content
  if DELTA[event] then
    put(job, 'fed', number(job, 'fed') + #content)
    if job.h.cancel then put(job, 'late', number(job, 'late') + 1) end
    return
  end
  job.note = event
  if string.sub(event, 1, 4) == 'job.' and event ~= 'job.log' then
    local feed = gathered.feeds[job.h.owner]
    if not feed then
      feed = {}
      gathered.feeds[job.h.owner] = feed
    end
    feed[#feed + 1] = job.id .. ' ' .. id .. ' ' .. event .. (#content <= OPT.owner_feed_bytes and ' ' .. content or '')
  end
end

-- Tells the worker that holds the job; only a hint, every append and renewal carries the count.
local function count_inbox(job)
  put(job, 'inbox', number(job, 'inbox') + 1)
  if job.h.lease then redis.call(OPT.publish, PREFIX .. 'inbox', job.id) end
end

-- Token buckets --------------------------------------------------------------------------------------

-- A bucket is the instant at which it will be full again, and when that was written: where the clock stepped back
-- since, the instant goes back with it. Returns how long until there is a token, and that instant.
local function bucket_wait(key, period, burst)
  local full, known = NOW, redis.call('GET', key)
  if known then
    local at, written = string.match(known, '^(%S+) (%d+)$')
    full = math.max(NOW, tonumber(at) + math.min(0, NOW - tonumber(written)))
  end
  return math.max(0, full - period * (burst - 1) - NOW), full
end

-- `full` is as bucket_wait returned it; the key goes when it would say no more than its absence
local function take_token(key, period, full)
  local at = string.format('%.3f', full + period)
  redis.call('SET', key, at .. ' ' .. NOW_TEXT, 'PXAT', string.format('%d', math.ceil(tonumber(at))))
end

-- An owner's submissions. A job that came over the rate is `unpaid` until a token was taken for it, and until then
-- it does not start.
local function token_for(owner)
  if OPT.owner_rate == 0 then return true end
  local period = 60000 / OPT.owner_rate
  local wait, full = bucket_wait(PREFIX .. 'rate:' .. owner, period, math.min(OPT.owner_rate, 1000))
  return wait == 0, period, full
end

local function pay(job)
  local _, period, full = token_for(job.h.owner)
  if period then take_token(PREFIX .. 'rate:' .. job.h.owner, period, full) end
  if job.h.unpaid then put(job, 'unpaid', nil) end
end

-- Timers: at most one member a job, the earliest of what it waits for -----------------------------------

local function timers_of(job) return job.h.timers and cjson.decode(job.h.timers) or {} end

local function sooner(a, b)
  b = tonumber(b)
  if a == nil or b ~= nil and b < a then return b end
  return a
end

local function earliest(job)
  local h = job.h
  local due = sooner(sooner(nil, h.wake), h.start_by)
  -- a running job is ended by its worker; the sweep steps in one lease later
  if h.deadline then due = sooner(due, h.deadline + (h.lease and OPT.lease or 0)) end
  if h.timers then
    for _, at in pairs(timers_of(job)) do due = sooner(due, at) end
  end
  return due
end

local function arm(job)
  local due = earliest(job)
  if due == tonumber(job.h.due) then return end
  put(job, 'due', due)
  gathered.armed[job.id], gathered.disarmed[job.id] = due, nil
  if due == nil then gathered.disarmed[job.id] = true end
end

-- What the job's timers become: a delay below 0 takes a timer back, one that is known already stays as it is
local function timers_after(job, encoded)
  local timers = timers_of(job)
  for key, delay in pairs(encoded ~= '' and cjson.decode(encoded) or {}) do
    if delay < 0 then
      timers[key] = nil
    elseif timers[key] == nil then
      timers[key] = NOW + delay
    end
  end
  return timers
end

local function set_timers(job, encoded)
  local timers = timers_after(job, encoded)
  put(job, 'timers', next(timers) and cjson.encode(timers) or nil)
end

-- Places ----------------------------------------------------------------------------------------------

-- tickets of this owner in this queue; read once a call, written back by settle()
local function tickets(queue, owner)
  local field = queue .. '|' .. owner
  local known = gathered.tickets[field]
  if known == nil then
    known = tonumber(redis.call('HGET', PREFIX .. 'tickets', field) or 0)
    gathered.tickets[field] = known
  end
  return known
end

local function count_ticket(job, by)
  local h = job.h
  gathered.tickets[h.queue .. '|' .. h.owner] = tickets(h.queue, h.owner) + by
  count('waiting:' .. h.queue, by)
end

-- an owner's running jobs: what this call changes is written by settle()
local function runners(owner)
  local known = gathered.running[owner]
  if not known then
    known = { began = {}, left = {} }
    gathered.running[owner] = known
  end
  return known
end

local function running(owner)
  local known = runners(owner)
  if not known.before then known.before = redis.call('SCARD', PREFIX .. 'running:' .. owner) end
  return known.before + #known.began - #known.left
end

-- A wait counts from when it began, however often the job is held and released
local function mark_queued(job)
  if job.h.status ~= 'queued' then put(job, 'since', NOW_TEXT) end
  put(job, 'status', 'queued')
end

-- `queued` is job.queued where it is short: the worker then need not read the log of a fresh job
local function enqueue(job, queued)
  local class = job.h.started and 'resume' or job.h.priority
  local stream = PREFIX .. 'work:' .. job.h.queue .. ':' .. class
  local entry = redis.call('XADD', stream, '*', 'j', job.id, 'd', queued or '')
  put(job, 'ticket', class .. '|' .. entry)
  mark_queued(job)
  count_ticket(job, 1)
end

local function held_list(job, reason)
  local list = job.h.queue .. '|' .. job.h.owner
  if reason == 'concurrency_key' then list = list .. '|' .. job.h.ckey end
  if reason == 'struck' then list = list .. '|kind:' .. job.h.kind end
  return list
end

-- Whether an operator has stopped a queue or a kind; read once a call, and only by one that starts or releases jobs
local function is_struck(what)
  local struck = gathered.struck
  if not struck then
    struck = {}
    gathered.struck = struck
    for _, name in ipairs(redis.call('HKEYS', PREFIX .. 'strikes')) do struck[name] = true end
  end
  return struck[what]
end

local function hold(job, reason)
  local order = job.h.order
  if not order then
    local class = job.h.started and 'resume' or job.h.priority
    order = RANK[class] * 1e12 + redis.call('HINCRBY', PREFIX .. 'counts', 'order', 1)
    -- what is paid for does not wait for the tokens of what is not
    if job.h.unpaid then order = order + 5e11 end
    put(job, 'order', order)
  end
  local list = held_list(job, reason)
  redis.call('ZADD', PREFIX .. 'held:' .. list, order, job.id)
  redis.call('ZADD', PREFIX .. 'held', 'NX', NOW, list)
  gathered.held = true
  mark_queued(job)
  put(job, 'held', reason)
  count('held:' .. job.h.queue, 1)
end

local function unhold(job)
  local list = held_list(job, job.h.held)
  redis.call('ZREM', PREFIX .. 'held:' .. list, job.id)
  if redis.call('EXISTS', PREFIX .. 'held:' .. list) == 0 then redis.call('ZREM', PREFIX .. 'held', list) end
  put(job, 'held', nil)
  count('held:' .. job.h.queue, -1)
end

-- What keeps this job from starting now, if anything
local function obstacle(job)
  if is_struck('kind:' .. job.h.kind) then return 'struck' end
  if OPT.owner_limit > 0 and running(job.h.owner) >= OPT.owner_limit then return 'owner_limit' end
  if job.h.unpaid and not token_for(job.h.owner) then return 'owner_limit' end
  if job.h.ckey then
    local holder = redis.call('GET', PREFIX .. 'ckey:' .. job.h.ckey)
    if holder and holder ~= job.id then return 'concurrency_key' end
  end
end

-- Takes the job out of the place it is in; its next place is the caller's to give
local function leave(job)
  local h = job.h
  if h.lease then
    put(job, 'lease', nil)
    gathered.unleased[job.id], gathered.leased[job.id] = true, nil
    local left = runners(h.owner).left
    left[#left + 1] = job.id
    count('running:' .. h.queue, -1)
    job.left_running = true
  elseif h.held then
    unhold(job)
  elseif h.ticket then
    put(job, 'ticket', nil)
    count_ticket(job, -1)
  end
  if h.wake then put(job, 'wake', nil) end
end

local function requeue(job, why)
  emit(job, bystander(job), 'job.requeued', stamped('"why":"' .. why .. '"'))
  leave(job)
  enqueue(job)
end

local function set_aside(job, reason)
  emit(job, bystander(job), 'job.requeued', stamped('"why":"held","held":"' .. reason .. '"'))
  leave(job)
  hold(job, reason)
  save(job)
end

local function park(job, status)
  leave(job)
  put(job, 'status', status)
end

-- Gives the first of a held list that may start its ticket back; returns whether it did. One whose concurrency key
-- was taken or whose kind was struck meanwhile goes to the list of those, out of the way of those behind it.
local function release(list)
  local queue, owner = string.match(list, '^([^|]*)|([^|]*)')
  if OPT.owner_limit > 0 and running(owner) + tickets(queue, owner) >= OPT.owner_limit then return false end
  for _, id in ipairs(redis.call('ZRANGE', PREFIX .. 'held:' .. list, 0, OPT.scan - 1)) do
    local job = fetch(id)
    local reason = job and job.h.held and obstacle(job)
    if not job or not job.h.held then
      redis.call('ZREM', PREFIX .. 'held:' .. list, id)
    elseif not reason then
      if job.h.unpaid then pay(job) end
      requeue(job, 'released')
      save(job)
      return true
    elseif reason == job.h.held then
      return false
    else
      set_aside(job, reason)
    end
  end
  if redis.call('EXISTS', PREFIX .. 'held:' .. list) == 0 then redis.call('ZREM', PREFIX .. 'held', list) end
  return false
end

-- Only a hint, so what is wrong with a waiter does no harm to the job that made room for it
local function offer(queue, owner, ckey)
  if gathered.held == nil then gathered.held = redis.call('EXISTS', PREFIX .. 'held') == 1 end
  if not gathered.held then return end
  local list = queue .. '|' .. owner
  if ckey and redis.call('EXISTS', PREFIX .. 'held:' .. list .. '|' .. ckey) == 1 then guarded(release, list .. '|' .. ckey) end
  if redis.call('EXISTS', PREFIX .. 'held:' .. list) == 1 then guarded(release, list) end
end

-- The end ---------------------------------------------------------------------------------------------

local function tell_parent(job, event, content)
  local parent = job.h.parent and fetch(job.h.parent)
  if not parent or ENDED[parent.h.status] then return end
  local fields = '"job":"' .. job.id .. '","status":"' .. job.h.status .. '"'
  local outcome = event == 'job.completed' and string.match(content, '("result":.*)}$')
    or event == 'job.failed' and string.match(content, '("error":.*)}$')
  if outcome then fields = fields .. ',' .. outcome end
  emit(parent, bystander(parent), 'child.ended', stamped(fields))
  count_inbox(parent)
  if parent.h.status == 'waiting' then
    requeue(parent, 'child')
    arm(parent)
  end
  save(parent)
end

-- The dead list names failed jobs by their end; the oldest leave it where it is full
local function bury(job, content)
  put(job, 'error', string.match(content, '"error":{"code":"([^"]*)"') or 'unknown')
  redis.call('ZADD', PREFIX .. 'dead', NOW, job.id)
  redis.call('ZREMRANGEBYRANK', PREFIX .. 'dead', 0, -OPT.dead_cap - 1)
end

-- Writes the terminal event and lets go of everything; every key of the job gets the same expiry.
local function finish(job, epoch, event, content)
  emit(job, epoch, event, content)
  park(job, TERMINAL[event])
  if event == 'job.failed' then bury(job, content) end
  for _, field in ipairs({ 'timers', 'deadline', 'start_by', 'pause', 'order', 'unpaid' }) do
    if job.h[field] then put(job, field, nil) end
  end
  arm(job)
  put(job, 'ended', NOW_TEXT)
  local ckey = job.h.ckey
  if ckey and redis.call('GET', PREFIX .. 'ckey:' .. ckey) == job.id then redis.call('DEL', PREFIX .. 'ckey:' .. ckey) end
  save(job)
  local expiry = NOW + OPT.retention
  redis.call('PEXPIREAT', job.key, expiry)
  redis.call('PEXPIREAT', job.key .. ':events', expiry)
  if job.h.sealed then redis.call('PEXPIREAT', job.key .. ':sealed', expiry) end
  if job.h.family then redis.call('PEXPIREAT', job.key .. ':children', expiry) end
  if job.h.asked then redis.call('PEXPIREAT', job.key .. ':seen', expiry) end
  if job.h.artifacts then redis.call('PEXPIREAT', job.key .. ':artifacts', expiry) end
  if job.h.datakey then redis.call('PEXPIREAT', job.key .. ':datakey', expiry) end
  if job.h.idem then
    redis.call('PEXPIREAT', PREFIX .. 'idem:' .. job.h.idem, math.max(expiry, number(job, 'created') + OPT.idempotency))
  end
  if job.h.parent then guarded(tell_parent, job, event, content) end
  if job.left_running or ckey then offer(job.h.queue, job.h.owner, ckey) end
end

local function finish_cancelled(job, epoch)
  local asked = job.h.cancel or NOW
  local fields = job.h.cancel_by or '"by":"","reason":""'
  finish(job, epoch, 'job.cancelled', stamped(fields .. ',"effective_ms":' .. math.max(0, NOW - asked)
    .. ',"deltas_after":' .. number(job, 'late')))
end

local function finish_failed(job, code, message)
  finish(job, bystander(job), 'job.failed',
    stamped('"error":{"code":"' .. code .. '","message":"' .. message .. '","retryable":false}'))
end

-- After a lease is given up: the wishes that came meanwhile go first
local function parked_by_wish(job, epoch)
  if job.h.cancel then
    finish_cancelled(job, epoch)
    return true
  end
  if job.h.pause then
    emit(job, bystander(job), 'job.paused', stamped(job.h.pause))
    put(job, 'pause', nil)
    park(job, 'paused')
    return true
  end
  return false
end

-- Answers --------------------------------------------------------------------------------------------

local function in_slices(command, key, values)
  for i = 1, #values, 4000 do
    redis.call(command, key, unpack(values, i, math.min(i + 3999, #values)))
  end
end

local function members(set)
  local list = {}
  for id in pairs(set) do list[#list + 1] = id end
  return list
end

local function scored(set)
  local list = {}
  for id, score in pairs(set) do
    list[#list + 1] = score
    list[#list + 1] = id
  end
  return list
end

local function settle()
  in_slices('ZADD', KEYS[1], scored(gathered.leased))
  in_slices('ZREM', KEYS[1], members(gathered.unleased))
  in_slices('ZADD', PREFIX .. 'timers', scored(gathered.armed))
  in_slices('ZREM', PREFIX .. 'timers', members(gathered.disarmed))
  for field, by in pairs(gathered.counts) do
    if by ~= 0 then redis.call('HINCRBY', PREFIX .. 'counts', field, by) end
  end
  for field, n in pairs(gathered.tickets) do
    if n > 0 then redis.call('HSET', PREFIX .. 'tickets', field, n) else redis.call('HDEL', PREFIX .. 'tickets', field) end
  end
  for owner, known in pairs(gathered.running) do
    in_slices('SADD', PREFIX .. 'running:' .. owner, known.began)
    in_slices('SREM', PREFIX .. 'running:' .. owner, known.left)
  end
  if #gathered.notes > 0 then
    redis.call('XADD', PREFIX .. 'feed', 'MAXLEN', '~', OPT.feed_cap, '*', 'n', table.concat(gathered.notes, '\n'))
  end
  for owner, lines in pairs(gathered.feeds) do
    local feed = PREFIX .. 'owner:' .. owner .. ':events'
    redis.call('XADD', feed, 'MAXLEN', '~', OPT.owner_feed_cap, '*', 'e', table.concat(lines, '\n'))
    redis.call('PEXPIRE', feed, OPT.owner_feed_ttl)
    redis.call(OPT.publish, PREFIX .. 'owner:' .. owner .. ':live', '')
  end
end
