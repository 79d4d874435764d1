-- datakey: the wrapped data keys of jobs, each in job:<id>:datakey, for processes that encrypt.
-- ARGV 2 what, then
--   read: jobs -> for each its record, '' where it has none, '-' where that was deleted
--   make: job, record -> {its record as it is then} | {'-'} | {nil} without the job. A record is "<wrapped>[ <parent>]".
--   shred: job -> {"ok"} | {"none"} (it has none) | {"live", status}; also of a job that is in the archive alone
--   rewrap: for each: job, record, its new record -> how many were as they were read
-- Sent twice: make finds what it made; shred finds none, and says so; rewrap finds nothing to do.
-- The key of an archived job outlives the job, as its file does: see retain.lua.

local function name_of(id) return PREFIX .. 'job:' .. id .. ':datakey' end

local function read(id)
  return redis.call('GET', name_of(id)) or redis.call('HGET', PREFIX .. 'job:' .. id, 'datakey') and '-' or ''
end

local acts = {}

function acts.read()
  local records = {}
  for i = 3, #ARGV do records[i - 2] = read(ARGV[i]) end
  return records
end

function acts.make()
  local id, record = ARGV[3], ARGV[4]
  local known = redis.call('HMGET', PREFIX .. 'job:' .. id, 'status', 'datakey', 'parent')
  if not known[1] then return { false } end
  if known[2] then return { read(id) } end
  if known[3] and known[3] ~= '' then record = record .. ' ' .. known[3] end
  redis.call('SET', name_of(id), record)
  redis.call('HSET', PREFIX .. 'job:' .. id, 'datakey', '1')
  if ENDED[known[1]] then redis.call('PEXPIREAT', name_of(id), redis.call('PEXPIRETIME', PREFIX .. 'job:' .. id)) end
  return { record }
end

function acts.shred()
  local status = redis.call('HGET', PREFIX .. 'job:' .. ARGV[3], 'status')
  if status and not ENDED[status] then return { 'live', status } end
  return { redis.call('DEL', name_of(ARGV[3])) == 1 and 'ok' or 'none' }
end

function acts.rewrap()
  local changed = 0
  for i = 3, #ARGV, 3 do
    local name = name_of(ARGV[i])
    if redis.call('GET', name) == ARGV[i + 1] then
      redis.call('SET', name, ARGV[i + 2], 'KEEPTTL')
      changed = changed + 1
    end
  end
  return changed
end

return acts[ARGV[2]]()
