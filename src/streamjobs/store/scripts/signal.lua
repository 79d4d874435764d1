-- signal: a value from outside for a live job; wakes it where it waits.
-- ARGV 2 job, 3 dedupe key, 4 "name", "payload" and "key" as JSON fields
-- answer: {"ok", seq} | {"dup"} | {"already", status} | {"limit", "events"|"bytes"} | {"gone"}

local function signal(id, key)
  local job = fetch(id)
  if not job then return { 'gone' } end
  if redis.call('SISMEMBER', job.key .. ':seen', key) == 1 then return { 'dup' } end
  if ENDED[job.h.status] then return { 'already', job.h.status } end
  if number(job, 'seq') >= OPT.max_events then return { 'limit', 'events' } end
  if number(job, 'bytes') >= OPT.max_bytes then return { 'limit', 'bytes' } end
  emit(job, bystander(job), 'signal.received', stamped(ARGV[4]))
  local seq = number(job, 'seq')
  redis.call('SADD', job.key .. ':seen', key)
  put(job, 'asked', '1')
  count_inbox(job)
  if job.h.status == 'waiting' then
    requeue(job, 'signal')
    arm(job)
  end
  save(job)
  return { 'ok', seq }
end

local answer = signal(ARGV[2], ARGV[3])
settle()
return answer
