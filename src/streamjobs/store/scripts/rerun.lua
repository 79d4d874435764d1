-- rerun: notes on an ended job which job runs it again, and takes it off the dead list. That job is submitted before.
-- ARGV 2 job, 3 the new job
-- answer: {"ok"} | {"live", status} | {"gone"};  sent twice it says the same

local function note(id, new)
  local job = fetch(id)
  if not job then return { 'gone' } end
  if not ENDED[job.h.status] then return { 'live', job.h.status } end
  put(job, 'rerun', new)
  save(job)
  redis.call('ZREM', PREFIX .. 'dead', id)
  return { 'ok' }
end

return note(ARGV[2], ARGV[3])
