-- resume: a paused job gets a ticket; a wish to pause that was not carried out yet is taken back.
-- ARGV 2 job, 3 dedupe key, 4 "by" and "reason" as JSON fields
-- answer: {"resumed"} | {"dup"} | {"already", status} | {"gone"}

local function resume(id, key)
  local job = fetch(id)
  if not job then return { 'gone' } end
  if redis.call('SISMEMBER', job.key .. ':seen', key) == 1 then return { 'dup' } end
  if job.h.status == 'paused' then
    emit(job, bystander(job), 'job.resumed', stamped(ARGV[4]))
    leave(job)
    enqueue(job)
    arm(job)
  elseif job.h.pause then
    put(job, 'pause', nil)
    count_inbox(job)
  else
    return { 'already', job.h.status }
  end
  put(job, 'asked', '1')
  save(job)
  redis.call('SADD', job.key .. ':seen', key)
  return { 'resumed' }
end

local answer = resume(ARGV[2], ARGV[3])
settle()
return answer
