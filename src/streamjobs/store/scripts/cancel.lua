-- cancel: records the wish; ends the job where nobody runs it, tells its worker otherwise; children too.
-- ARGV 2 job, 3 "by" and "reason" as JSON fields
-- answer: {"cancelled"} | {"requested"} | {"already", status} | {"gone"}
-- Sent twice: the second finds the first's wish or its end.

local function cancel(id)
  local job = fetch(id)
  if not job then return { 'gone' } end
  if ENDED[job.h.status] then return { 'already', job.h.status } end
  if job.h.cancel then return { 'requested' } end
  emit(job, bystander(job), 'job.cancel_requested', stamped(ARGV[3]))
  put(job, 'cancel', NOW)
  put(job, 'cancel_by', ARGV[3])
  if job.h.lease then
    count_inbox(job)
    save(job)
    return { 'requested' }
  end
  finish_cancelled(job, bystander(job))
  return { 'cancelled' }
end

local answer = cancel(ARGV[2])
local generation = { ARGV[2] }
while #generation > 0 and (answer[1] == 'cancelled' or answer[1] == 'requested') do
  local below = {}
  for _, parent in ipairs(generation) do
    for _, child in ipairs(redis.call('SMEMBERS', PREFIX .. 'job:' .. parent .. ':children')) do
      guarded(cancel, child)
      below[#below + 1] = child
    end
  end
  generation = below
end
settle()
return answer
