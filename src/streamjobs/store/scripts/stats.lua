-- stats: adds what one job's new events count for, once.
-- ARGV 2 what, then
--   fold: job, position before or '', position after, kind, queue, then (slot, field, by) … -> {"ok"} | {"moved"} (another
--     was here first: read again) | {"gone"}
--     slot: when the events happened, as the start of five minutes in ms; 0 for what stands now and has no history
--   reset -> {generation}: all is counted again from the logs
-- A position is `<generation> …`: how far the job's log is counted. It is kept in the job's hash and changed by the call
-- that adds, so no event counts twice; one of an earlier generation counts as none.

local KNOWN = PREFIX .. 'projections'
local FINE, COARSE = 300000, 3600000
local FINE_TTL, COARSE_TTL = 86400000, 14 * 86400000
local MAX_FIELDS = 50000

local function generation() return tonumber(redis.call('HGET', KNOWN, 'stats') or 1) end

-- Kinds and queues are the operators' own, but what submits may be anybody: beyond so many they are one
local function group_of(totals, kind, queue)
  local group = kind .. '|' .. queue .. '|'
  if redis.call('HLEN', totals) < MAX_FIELDS or redis.call('HEXISTS', totals, group .. 'submitted') == 1 then return group end
  return '~other|~other|'
end

local function add_to_history(scale, start, ttl, field, by)
  if start + ttl < NOW then return end
  local key = PREFIX .. 'history:' .. generation() .. ':' .. scale .. ':' .. string.format('%d', start)
  redis.call('HINCRBY', key, field, by)
  redis.call('PEXPIREAT', key, string.format('%d', start + ttl))
end

local function fold(id, before, after, kind, queue, ...)
  local key, now = PREFIX .. 'job:' .. id, generation()
  local known = redis.call('HMGET', key, 'status', 'stats')
  if not known[1] then return { 'gone' } end
  if (known[2] or '') ~= before or tonumber(string.match(after, '^%d+')) ~= now then return { 'moved' } end
  local totals = PREFIX .. 'totals:' .. now
  local group, rows = group_of(totals, kind, queue), { ... }
  redis.call('HSET', key, 'stats', after)
  for i = 1, #rows, 3 do
    local slot, field, by = tonumber(rows[i]), group .. rows[i + 1], rows[i + 2]
    redis.call('HINCRBY', totals, field, by)
    if slot > 0 then
      add_to_history('fine', slot, FINE_TTL, field, by)
      add_to_history('coarse', slot - slot % COARSE, COARSE_TTL, field, by)
    end
  end
  return { 'ok' }
end

local function reset()
  local old = generation()
  redis.call('HSET', KNOWN, 'stats', old + 1)
  redis.call('UNLINK', PREFIX .. 'totals:' .. old)
  return { old + 1 }
end

local act = { fold = fold, reset = reset }
return act[ARGV[2]](unpack(ARGV, 3))
