-- retain: how long ended jobs are kept.
-- ARGV 2 "keep", 3 job, 4 how long after its end (ms), 5 "", "archived" (its file is) or "held" (its file is yet to be):
--   sets the expiry of everything of the job
-- or "delete", 3 job, 4 JSON fields of the note;  or "relieve", 3 how many at most, 4 how long ended at least (ms)
-- answer: {"ok"} | {"live", status} | {"gone"};  relieve: how many jobs went. Sent twice, keep says the same, delete "gone".
-- The data key of an archived job stays when the job goes, because its file does: until it is deleted.
-- `ended` names kept jobs by when they expire: those that would go first go first when memory is short. Held ones are
-- not there: they would be nowhere then.

local KEPT = PREFIX .. 'ended'

local function keys_of(job)
  local keys = { job.key }
  for _, part in ipairs({ 'events', 'sealed', 'children', 'seen', 'artifacts' }) do
    keys[#keys + 1] = job.key .. ':' .. part
  end
  return keys
end

-- Projections are told, so that lists lose it at once
local function drop(job, has_file)
  redis.call('UNLINK', unpack(keys_of(job)))
  if job.h.datakey and not has_file then redis.call('DEL', job.key .. ':datakey') end
  if job.h.idem then redis.call('UNLINK', PREFIX .. 'idem:' .. job.h.idem) end
  redis.call('ZREM', PREFIX .. 'dead', job.id)
  redis.call('ZREM', KEPT, job.id)
  gathered.notes[#gathered.notes + 1] = job.id .. ' ' .. job.h.seq .. ' job.deleted'
end

local acts = {}

function acts.keep()
  local job = fetch(ARGV[3])
  if not job then return { 'gone' } end
  if not ENDED[job.h.status] then return { 'live', job.h.status } end
  if ARGV[5] == 'archived' and not job.h.archived then
    put(job, 'archived', '1')
    save(job)
  end
  local expiry = string.format('%d', math.max(number(job, 'ended') + ARGV[4], NOW + 1))
  for _, key in ipairs(keys_of(job)) do redis.call('PEXPIREAT', key, expiry) end
  if job.h.datakey and job.h.archived then
    redis.call('PERSIST', job.key .. ':datakey')
  elseif job.h.datakey then
    redis.call('PEXPIREAT', job.key .. ':datakey', expiry)
  end
  if job.h.idem then
    local remembered = number(job, 'created') + OPT.idempotency
    redis.call('PEXPIREAT', PREFIX .. 'idem:' .. job.h.idem, string.format('%d', math.max(tonumber(expiry), remembered)))
  end
  if ARGV[5] == 'held' and not job.h.archived then
    redis.call('ZREM', KEPT, job.id)
  else
    redis.call('ZADD', KEPT, expiry, job.id)
  end
  redis.call('ZREMRANGEBYSCORE', KEPT, '-inf', NOW_TEXT)
  return { 'ok' }
end

function acts.delete()
  local job = fetch(ARGV[3])
  if not job then return { 'gone' } end
  if not ENDED[job.h.status] then return { 'live', job.h.status } end
  drop(job)
  return { 'ok' }
end

function acts.relieve()
  redis.call('ZREMRANGEBYSCORE', KEPT, '-inf', NOW_TEXT)
  local count = 0
  for _, id in ipairs(redis.call('ZRANGE', KEPT, 0, ARGV[3] - 1)) do
    local job = fetch(id)
    if not job then
      redis.call('ZREM', KEPT, id)
    elseif ENDED[job.h.status] and number(job, 'ended') <= NOW - ARGV[4] then
      drop(job, job.h.archived)
      count = count + 1
    end
  end
  return count
end

local answer = acts[ARGV[2]]()
settle()
return answer
