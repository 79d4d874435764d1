-- wake: what time does to jobs. Expired leases, due timers, held jobs that may start; expired jobs leave the dead
-- list. Every role calls it.
-- ARGV 2 how many of each at most
-- answer: {now, next due or -1, 1 if more is due now, changes}; change: {id, what}
--   what: lost | poisoned | cancelled | paused | woken | timeout | queue_timeout | released | error: why
-- Sent twice it works on what is due then. Atomic and bounded, so it needs no lock around it.

local LIMIT = tonumber(ARGV[2])
local SWEEP = PREFIX .. 'sweep'
local changes = {}

local function changed(id, what) changes[#changes + 1] = { id, what } end

-- After Redis was away, its clock jumped, or nobody swept, nobody is declared dead for one lease time
local function in_grace()
  local known = redis.call('HMGET', SWEEP, 'last', 'grace')
  local last, grace = tonumber(known[1] or NOW), tonumber(known[2] or 0)
  if NOW < last or NOW - last > math.max(OPT.lease / 2, 3 * OPT.sweep) then
    grace = NOW + OPT.lease
  end
  redis.call('HSET', SWEEP, 'last', NOW, 'grace', grace)
  return NOW < grace
end

-- none for the first crash: one kill must not delay a job
local function crash_delay(crashes)
  if crashes < 2 then return 0 end
  return math.min(OPT.crash_cap, OPT.crash_base * 2 ^ math.min(crashes - 2, 30))
end

local function lose(id)
  local job = fetch(id)
  if not job or not job.h.lease then
    gathered.unleased[id] = true
    return
  end
  -- before its first append a lease did nothing, so nothing of the job can have crashed it
  local crashes = number(job, 'crashes') + (number(job, 'batch') > 0 and 1 or 0)
  local delay = crash_delay(crashes)
  emit(job, bystander(job), 'job.lost',
    stamped('"worker":"' .. (job.h.worker or '') .. '","crashes":' .. crashes .. ',"delay_ms":' .. delay))
  if crashes > 0 then put(job, 'crashes', crashes) end
  put(job, 'lost', '1')
  local what = 'lost'
  if parked_by_wish(job, bystander(job)) then
    what = job.h.status
  elseif crashes > OPT.max_crashes then
    what = 'poisoned'
    finish_failed(job, what, 'its workers died ' .. crashes .. ' times in a row without progress')
  elseif delay > 0 then
    park(job, 'scheduled')
    put(job, 'wake', NOW + delay)
  else
    leave(job)
    enqueue(job)
  end
  if not ENDED[job.h.status] then
    arm(job)
    save(job)
    offer(job.h.queue, job.h.owner)
  end
  changed(id, what)
end

local function fire_timers(job)
  local due, timers = {}, timers_of(job)
  for key, at in pairs(timers) do
    if at <= NOW then due[#due + 1] = key end
  end
  table.sort(due, function(a, b) return timers[a] < timers[b] or timers[a] == timers[b] and a < b end)
  for _, key in ipairs(due) do
    emit(job, bystander(job), 'timer.fired', stamped('"key":' .. cjson.encode(key)))
    timers[key] = nil
  end
  if #due > 0 then put(job, 'timers', next(timers) and cjson.encode(timers) or nil) end
  return #due > 0
end

local function overdue(job)
  local h = job.h
  if h.deadline and NOW >= h.deadline + (h.lease and OPT.lease or 0) then
    return 'timeout', 'the job did not end within its timeout'
  end
  if h.start_by and NOW >= tonumber(h.start_by) then return 'queue_timeout', 'no worker started the job in time' end
end

local function ring(id)
  local job = fetch(id)
  if not job or ENDED[job.h.status] then
    gathered.disarmed[id] = true
    return
  end
  local code, message = overdue(job)
  if code then
    finish_failed(job, code, message)
    return changed(id, code)
  end
  local fired = fire_timers(job)
  local status, awake = job.h.status, fired
  -- a delay or a back-off is not cut short by a timer of the job's own
  if job.h.wake then awake = NOW >= tonumber(job.h.wake) end
  if awake and (status == 'scheduled' or status == 'waiting') then
    requeue(job, 'timer')
    changed(id, 'woken')
  elseif fired then
    count_inbox(job)
  end
  put(job, 'due', nil)
  arm(job)
  if not job.h.due then gathered.disarmed[id] = true end
  save(job)
end

local function release_from(list)
  local released = 0
  redis.call('ZADD', PREFIX .. 'held', 'XX', NOW, list)
  while released < LIMIT and release(list) do released = released + 1 end
  if released > 0 then changed(list, 'released') end
end

local function each(ids, act)
  for _, id in ipairs(ids) do
    local answer = guarded(act, id)
    if answer and answer[1] == 'error' then changed(id, 'error: ' .. answer[2]) end
  end
  return #ids >= LIMIT
end

-- The oldest expire first, so the first that is still there ends the search; an id may have come back as a new job
local function forget_expired()
  for _, id in ipairs(redis.call('ZRANGE', PREFIX .. 'dead', 0, LIMIT - 1)) do
    if redis.call('HGET', PREFIX .. 'job:' .. id, 'status') == 'failed' then return end
    redis.call('ZREM', PREFIX .. 'dead', id)
  end
end

local more = false
if not in_grace() then
  more = each(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', NOW, 'LIMIT', 0, LIMIT), lose)
  -- a clock that stepped back must not freeze jobs for hours
  more = each(redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. NOW + 2 * OPT.lease, '+inf', 'LIMIT', 0, LIMIT), lose) or more
end
more = each(redis.call('ZRANGEBYSCORE', PREFIX .. 'timers', '-inf', NOW, 'LIMIT', 0, LIMIT), ring) or more
each(redis.call('ZRANGE', PREFIX .. 'held', 0, LIMIT - 1), release_from)
local failed = guarded(forget_expired)
if failed then changed('dead', 'error: ' .. failed[2]) end
settle()
local first = redis.call('ZRANGE', PREFIX .. 'timers', 0, 0, 'WITHSCORES')
return { NOW, first[2] and tonumber(first[2]) or -1, more and 1 or 0, changes }
