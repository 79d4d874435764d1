-- webhook: an owner's webhooks: make, delete, disable, enable, give another secret.
-- ARGV 2 "create", 3 owner, 4 webhook, 5 definition as JSON, 6 secret, 7 how many an owner may have
--   or "delete" | "enable", 3 owner, 4 webhook;  "disable", 3 owner, 4 webhook, 5 why
--   or "rotate", 3 owner, 4 webhook, 5 secret, 6 how long the one before stays good (ms)
-- answer: {"ok"} | {"gone"} | {"limit"};  sent twice it says the same
-- In webhooks:<owner>: <webhook> -> definition, <webhook>/secret -> "secret[ one before, good until ms]",
-- <webhook>/disabled -> "ms why", where it is.

local owner, id = ARGV[3], ARGV[4]
local key = PREFIX .. 'webhooks:' .. owner

local acts = {}

function acts.create()
  if redis.call('HEXISTS', key, id) == 1 then return { 'ok' } end
  local count = 0
  for _, field in ipairs(redis.call('HKEYS', key)) do
    if not string.find(field, '/', 1, true) then count = count + 1 end
  end
  if count >= tonumber(ARGV[7]) then return { 'limit' } end
  redis.call('HSET', key, id, ARGV[5], id .. '/secret', ARGV[6])
  return { 'ok' }
end

-- What still waits to be delivered to it is dropped when it comes due
function acts.delete()
  redis.call('HDEL', key, id, id .. '/secret', id .. '/disabled')
  local undelivered = PREFIX .. 'undelivered:' .. id
  for _, delivery in ipairs(redis.call('ZRANGE', undelivered, 0, -1)) do
    redis.call('UNLINK', PREFIX .. 'delivery:' .. delivery)
  end
  redis.call('UNLINK', undelivered)
  return { 'ok' }
end

function acts.disable()
  redis.call('HSETNX', key, id .. '/disabled', NOW_TEXT .. ' ' .. ARGV[5])
  return { 'ok' }
end

function acts.enable()
  redis.call('HDEL', key, id .. '/disabled')
  return { 'ok' }
end

function acts.rotate()
  local current = string.match(redis.call('HGET', key, id .. '/secret'), '^%S+')
  if current ~= ARGV[5] then
    local good_until = string.format('%d', NOW + ARGV[6])
    redis.call('HSET', key, id .. '/secret', ARGV[5] .. ' ' .. current .. ' ' .. good_until)
  end
  return { 'ok' }
end

if ARGV[2] ~= 'create' and ARGV[2] ~= 'delete' and redis.call('HEXISTS', key, id) == 0 then return { 'gone' } end
return acts[ARGV[2]]()
