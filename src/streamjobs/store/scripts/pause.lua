-- pause: parks a job until it is resumed; a running one at its next recorded point.
-- ARGV 2 job, 3 dedupe key, 4 "by" and "reason" as JSON fields
-- answer: {"paused"} | {"requested"} | {"dup"} | {"already", status} | {"limit", "events"} | {"gone"}

local function pause(id, key)
  local job = fetch(id)
  if not job then return { 'gone' } end
  if redis.call('SISMEMBER', job.key .. ':seen', key) == 1 then return { 'dup' } end
  if ENDED[job.h.status] or job.h.status == 'paused' then return { 'already', job.h.status } end
  if job.h.pause then return { 'requested' } end
  -- each that is taken back leaves events, or at least its key; resume needs no budget: it comes after a pause
  if number(job, 'seq') >= OPT.max_events or redis.call('SCARD', job.key .. ':seen') >= OPT.max_events then
    return { 'limit', 'events' }
  end
  put(job, 'asked', '1')
  if job.h.lease then
    put(job, 'pause', ARGV[4])
    count_inbox(job)
  else
    emit(job, bystander(job), 'job.paused', stamped(ARGV[4]))
    park(job, 'paused')
    arm(job)
  end
  save(job)
  redis.call('SADD', job.key .. ':seen', key)
  return { job.h.lease and 'requested' or 'paused' }
end

local answer = pause(ARGV[2], ARGV[3])
settle()
return answer
