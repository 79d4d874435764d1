-- deliver: hands due deliveries to whoever asks, under a lease, and records what became of them.
-- ARGV 2 "claim", 3 how many at most, 4 lease (ms), 5 how long an undelivered one is kept (ms), 6 how many of them
--   answer: {now, ms when the next is due or -1, rows}, row: {id, number of the try, owner, webhook, definition, secret,
--   content}
-- or "settle", 3 id, 4 number of the try, 5 "done"|"retry"|"dead"|"gone", 6 delay (ms), 7 why, 8 and 9 as 5 and 6 above
--   answer: {"ok"} | {"stale"} (another try has begun, or it was settled);  "gone" disables the webhook
-- or "rerun", 3 owner, 4 webhook, 5 tries, 6 how long it is kept (ms), then ids of undelivered ones
--   answer: how many were there
-- In delivery:<id>: owner, webhook, content, job, created, tried (how often), tries (how often it may be), error.
-- A claim that is never settled comes due again with the end of its lease, and counts as a try.

local DUE = PREFIX .. 'deliveries'

local function delivery(id)
  local flat = redis.call('HGETALL', PREFIX .. 'delivery:' .. id)
  if #flat == 0 then return nil end
  local d = { id = id, key = PREFIX .. 'delivery:' .. id }
  for i = 1, #flat, 2 do d[flat[i]] = flat[i + 1] end
  return d
end

local function drop(id)
  redis.call('ZREM', DUE, id)
  redis.call('UNLINK', PREFIX .. 'delivery:' .. id)
end

-- The oldest leave the list where it is full
local function bury(d, why, ttl, cap)
  local list = PREFIX .. 'undelivered:' .. d.webhook
  redis.call('ZREM', DUE, d.id)
  redis.call('HSET', d.key, 'error', why)
  redis.call('ZADD', list, NOW_TEXT, d.id)
  redis.call('PEXPIRE', d.key, ttl)
  redis.call('PEXPIRE', list, ttl)
  for _, old in ipairs(redis.call('ZRANGE', list, 0, -cap - 1)) do
    redis.call('ZREM', list, old)
    redis.call('UNLINK', PREFIX .. 'delivery:' .. old)
  end
end

local function claimed(id)
  local d = delivery(id)
  if not d then return drop(id) end
  local names = { d.webhook, d.webhook .. '/secret', d.webhook .. '/disabled' }
  local webhook = redis.call('HMGET', PREFIX .. 'webhooks:' .. d.owner, unpack(names))
  if not webhook[1] then return drop(id) end
  if webhook[3] then return bury(d, 'the webhook is disabled', ARGV[5], ARGV[6]) end
  if tonumber(d.tried) >= tonumber(d.tries) then
    return bury(d, d.error or 'no answer was recorded', ARGV[5], ARGV[6])
  end
  local number = redis.call('HINCRBY', d.key, 'tried', 1)
  redis.call('ZADD', DUE, NOW + ARGV[4], id)
  return { id, number, d.owner, d.webhook, webhook[1], webhook[2], d.content }
end

local acts = {}

function acts.claim()
  local rows = {}
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', DUE, '-inf', NOW_TEXT, 'LIMIT', 0, ARGV[3])) do
    local row = claimed(id)
    if row then rows[#rows + 1] = row end
  end
  local next_due = redis.call('ZRANGE', DUE, 0, 0, 'WITHSCORES')[2]
  return { NOW, next_due and tonumber(next_due) or -1, rows }
end

function acts.settle()
  local d = delivery(ARGV[3])
  if not d or d.tried ~= ARGV[4] or not redis.call('ZSCORE', DUE, d.id) then return { 'stale' } end
  local verdict, why = ARGV[5], ARGV[7]
  if verdict == 'gone' and redis.call('HEXISTS', PREFIX .. 'webhooks:' .. d.owner, d.webhook) == 1 then
    redis.call('HSETNX', PREFIX .. 'webhooks:' .. d.owner, d.webhook .. '/disabled', NOW_TEXT .. ' ' .. why)
  end
  if verdict == 'done' then
    drop(d.id)
  elseif verdict == 'retry' and tonumber(d.tried) < tonumber(d.tries) then
    redis.call('HSET', d.key, 'error', why)
    redis.call('ZADD', DUE, NOW + ARGV[6], d.id)
  else
    bury(d, why, ARGV[8], ARGV[9])
  end
  return { 'ok' }
end

function acts.rerun()
  local list, count = PREFIX .. 'undelivered:' .. ARGV[4], 0
  for i = 7, #ARGV do
    local d = delivery(ARGV[i])
    local was_there = redis.call('ZREM', list, ARGV[i]) == 1
    if was_there and d and d.owner == ARGV[3] then
      redis.call('HSET', d.key, 'tries', d.tried + ARGV[5])
      redis.call('PEXPIRE', d.key, ARGV[6])
      redis.call('ZADD', DUE, NOW_TEXT, d.id)
      count = count + 1
    end
  end
  return count
end

return acts[ARGV[2]]()
