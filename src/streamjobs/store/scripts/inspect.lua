-- inspect: one job as the store has it at one instant, for the doctor. Writes nothing.
-- ARGV 2 job
-- answer: {hash, log length, first id, last id, lease score or '', timer score or '', 1 if its ticket is there,
--          held score or '', ttl of the hash, ttl of the log, 1 if in the owner's running set,
--          index of its segments or '', fields of the sealed history, ttl of that} | {}

local job = fetch(ARGV[2])
if not job then return {} end
local h, log, history = job.h, job.key .. ':events', job.key .. ':sealed'
local function end_of(order, from, to)
  local entry = redis.call(order, log, from, to, 'COUNT', 1)[1]
  return entry and entry[1] or ''
end
local ticket = 0
if h.ticket then
  local class, entry = string.match(h.ticket, '^(.*)|(.*)$')
  ticket = #redis.call('XRANGE', PREFIX .. 'work:' .. h.queue .. ':' .. class, entry, entry)
end
local held = h.held and redis.call('ZSCORE', PREFIX .. 'held:' .. held_list(job, h.held), job.id) or ''
return { redis.call('HGETALL', job.key), redis.call('XLEN', log), end_of('XRANGE', '-', '+'), end_of('XREVRANGE', '+', '-'),
  redis.call('ZSCORE', KEYS[1], job.id) or '', redis.call('ZSCORE', PREFIX .. 'timers', job.id) or '', ticket, held or '',
  redis.call('PTTL', job.key), redis.call('PTTL', log), redis.call('SISMEMBER', PREFIX .. 'running:' .. h.owner, job.id),
  redis.call('HGET', history, 'index') or '', redis.call('HKEYS', history), redis.call('PTTL', history) }
