-- schedule: makes, changes and ends one schedule, and moves it past ticks that give no job; submit.lua moves it past
-- those that do. It touches no job, so nothing is left to settle.
-- ARGV 2 what, 3 schedule, then
--   new, declare: owner, definition, its digest, overlap, app, next, most that an owner may have
--     -> {"made"} | {"same"} | {"limit"} | new: {"mismatch"} (it is there, with another definition) | declare: {"changed"}
--   pause -> {"paused"} | {"gone"}
--   resume: digest, next -> {"resumed"} | {"changed"} (the definition, so `next` may be wrong) | {"gone"}
--   advance: due, next, ticks skipped, error -> {"advanced"} | {"moved"} (it waits for another tick, or none) | {"gone"}
--   delete -> {"deleted"} | {"gone"}
-- Sent twice: new and declare find what they made, the others find what they left.
-- A schedule is in `schedules`, scored with the tick it waits for, unless it is paused.

local WHAT, ID = ARGV[2], ARGV[3]
local KEY, WAITING = PREFIX .. 'schedule:' .. ID, PREFIX .. 'schedules'

local function field(name)
  local value = redis.call('HGET', KEY, name)
  return value and value ~= '' and value or nil
end

local function define(owner, definition, digest, overlap, app, after, limit)
  local known, all = field('digest'), PREFIX .. 'owner:' .. owner .. ':schedules'
  if known and WHAT == 'new' then return { known == digest and 'same' or 'mismatch' } end
  if not known and redis.call('ZCARD', all) >= tonumber(limit) then return { 'limit' } end
  if app ~= '' then redis.call('HSET', KEY, 'app', app, 'declared', NOW_TEXT) end
  if known == digest then return { 'same' } end
  redis.call('HSET', KEY, 'owner', owner, 'definition', definition, 'digest', digest, 'overlap', overlap, 'error', '')
  if not known then
    redis.call('HSET', KEY, 'created', NOW_TEXT)
    redis.call('ZADD', all, NOW_TEXT, ID)
  end
  if not field('paused') then redis.call('ZADD', WAITING, after, ID) end
  return { known and 'changed' or 'made' }
end

local function pause()
  if not field('owner') then return { 'gone' } end
  redis.call('ZREM', WAITING, ID)
  redis.call('HSET', KEY, 'paused', '1')
  return { 'paused' }
end

local function resume(digest, after)
  local known = field('digest')
  if not known then return { 'gone' } end
  if not field('paused') then return { 'resumed' } end
  if known ~= digest then return { 'changed' } end
  redis.call('HSET', KEY, 'paused', '', 'error', '')
  redis.call('ZADD', WAITING, after, ID)
  return { 'resumed' }
end

local function advance(due, after, skipped, message)
  if not field('owner') then
    redis.call('ZREM', WAITING, ID)
    return { 'gone' }
  end
  if tonumber(redis.call('ZSCORE', WAITING, ID) or -1) ~= tonumber(due) then return { 'moved' } end
  redis.call('ZADD', WAITING, after, ID)
  redis.call('HINCRBY', KEY, 'skipped', skipped)
  redis.call('HSET', KEY, 'error', message)
  return { 'advanced' }
end

local function delete()
  local owner = field('owner')
  if not owner then return { 'gone' } end
  redis.call('ZREM', WAITING, ID)
  redis.call('ZREM', PREFIX .. 'owner:' .. owner .. ':schedules', ID)
  redis.call('DEL', KEY)
  return { 'deleted' }
end

local act = { new = define, declare = define, pause = pause, resume = resume, advance = advance, delete = delete }
return act[WHAT](unpack(ARGV, 4))
