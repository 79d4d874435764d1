-- take: leases jobs whose tickets are next; skips stale tickets, holds jobs that may not start. A struck queue is
-- not read: its tickets stay.
-- ARGV 2 worker, 3 take number (1, 2, …), 4 jobs wanted, 5 weights as high,default,low, 6… queues, first served first
-- answer: {now, jobs, ends, failures}
--   ends: stream, id, … for the blocked read that follows when fewer came than wanted: where each ends, or, of stale
--   tickets beyond what one call looks at, where this take stopped; failures: why, …
-- job: {id, epoch, seq, attempt, inbox, crashes, ms left or -1, kind, owner, queue, job.queued or ''}; job.queued
--   comes along, out of the ticket, where it is short and, beside job.started, all there is
--   and, where the caller encrypts, the record of its data key: '' where it has none, '-' where that was deleted
-- The number makes it safe to send twice: its leases are filed for one lease time and answered again.

local WORKER, NUMBER, WANTED = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local FILE = PREFIX .. 'take:' .. WORKER
local failures, read_to = {}, {}
local CLASSES = { 'high', 'default', 'low' }

-- The class this take begins with: each gets its weight's share of the takes, so none starves
local function classes_in_turn()
  local weights, total = {}, 0
  for weight in string.gmatch(ARGV[5], '%d+') do
    weights[#weights + 1] = tonumber(weight)
    total = total + tonumber(weight)
  end
  local slot, turn = NUMBER % total, { 'resume' }
  for i, weight in ipairs(weights) do
    if slot >= 0 and slot < weight then turn[2] = CLASSES[i] end
    slot = slot - weight
  end
  for _, class in ipairs(CLASSES) do
    if class ~= turn[2] then turn[#turn + 1] = class end
  end
  return turn
end

local function streams_in_turn()
  local streams, queues = {}, #ARGV - 5
  for _, class in ipairs(classes_in_turn()) do
    for i = 0, queues - 1 do
      local queue = ARGV[6 + (NUMBER + i) % queues]
      streams[#streams + 1] = { PREFIX .. 'work:' .. queue .. ':' .. class, class, is_struck('queue:' .. queue) }
    end
  end
  return streams
end

local function read(stream, n)
  local reply = redis.pcall('XREADGROUP', 'GROUP', 'workers', 'take', 'COUNT', n, 'STREAMS', stream, '>')
  if reply and reply.err then
    if not string.find(reply.err, 'NOGROUP', 1, true) then error(reply) end
    redis.call('XGROUP', 'CREATE', stream, 'workers', '0', 'MKSTREAM')
    reply = redis.call('XREADGROUP', 'GROUP', 'workers', 'take', 'COUNT', n, 'STREAMS', stream, '>')
  end
  return reply and reply[1] and reply[1][2] or {}
end

-- The delivered prefix goes, so the stream holds waiting jobs only
local function forget(stream, entries)
  local ids = {}
  for i, entry in ipairs(entries) do ids[i] = entry[1] end
  redis.call('XACK', stream, 'workers', unpack(ids))
  local ms, n = string.match(ids[#ids], '^(%d+)-(%d+)$')
  redis.call('XTRIM', stream, 'MINID', ms .. '-' .. (tonumber(n) + 1))
end

local function described(job, queued)
  local left = job.h.deadline and math.max(0, tonumber(job.h.deadline) - NOW) or -1
  local lease = { job.id, tonumber(job.h.lease), number(job, 'seq'), number(job, 'attempt'), number(job, 'inbox'),
    number(job, 'crashes'), left, job.h.kind, job.h.owner, job.h.queue, queued }
  if OPT.encrypts then lease[12] = job.h.datakey and (redis.call('GET', job.key .. ':datakey') or '-') or '' end
  return lease
end

local LEASE_END = string.format('%d', NOW + OPT.lease)

local function lease(job, queued)
  local h = job.h
  local epoch = string.format('%d', math.max(number(job, 'epoch') + 1, NOW))
  local fields = '"attempt":' .. h.attempt .. ',"worker":"' .. WORKER .. '","waited_ms":' .. math.max(0, NOW - number(job, 'since'))
  if h.lost then
    fields = fields .. ',"resumed_from":' .. h.seq
    put(job, 'lost', nil)
  end
  emit(job, epoch, 'job.started', stamped(fields))
  park(job, 'running')
  put(job, 'epoch', epoch)
  put(job, 'lease', epoch)
  put(job, 'worker', WORKER)
  put(job, 'batch', 0)
  put(job, 'since', nil)
  put(job, 'started', '1')
  if h.order then put(job, 'order', nil) end
  if h.unpaid then pay(job) end
  if h.start_by then put(job, 'start_by', nil) end
  if h.timeout and not h.deadline then put(job, 'deadline', NOW + h.timeout) end
  if h.ckey then redis.call('SET', PREFIX .. 'ckey:' .. h.ckey, job.id) end
  arm(job)
  gathered.leased[job.id] = LEASE_END
  local began = runners(h.owner).began
  began[#began + 1] = job.id
  count('running:' .. h.queue, 1)
  save(job)
  return described(job, number(job, 'seq') == 2 and queued or '')
end

-- One that has still to pay comes after those of its owner that wait to
local function passes_by(job)
  return job.h.unpaid and redis.call('EXISTS', PREFIX .. 'held:' .. held_list(job, 'owner_limit')) == 1
end

-- {"stale"} | {"held"} | a lease
local function admit(id, ticket, queued)
  local job = fetch(id)
  if not job or job.h.status ~= 'queued' or job.h.ticket ~= ticket then return { 'stale' } end
  local reason = obstacle(job) or passes_by(job) and 'owner_limit'
  if reason then
    set_aside(job, reason)
    return { 'held' }
  end
  return lease(job, queued)
end

local function drain(stream, class, jobs)
  local scanned = 0
  while #jobs < WANTED and scanned < OPT.scan do
    local asked = math.min(WANTED - #jobs, 500, OPT.scan - scanned)
    local entries = read(stream, asked)
    if #entries == 0 then return end
    scanned = scanned + #entries
    for _, entry in ipairs(entries) do
      local answer = guarded(admit, entry[2][2], class .. '|' .. entry[1], entry[2][4])
      if #answer > 2 then jobs[#jobs + 1] = answer end
      if answer[1] == 'error' then failures[#failures + 1] = entry[2][2] .. ': ' .. answer[2] end
    end
    forget(stream, entries)
    read_to[stream] = entries[#entries][1]
    if #entries < asked then return end
  end
end

local function answered_before()
  local filed = redis.call('GET', FILE)
  if not filed then return nil end
  local number_filed, rest = string.match(filed, '^(%d+)(.*)$')
  if tonumber(number_filed) ~= NUMBER then return nil end
  local jobs = {}
  for id, epoch in string.gmatch(rest, ' (%S+):(%d+)') do
    local job = fetch(id)
    if job and job.h.lease == epoch then jobs[#jobs + 1] = described(job, '') end
  end
  return jobs
end

local function file(jobs)
  local lines = { tostring(NUMBER) }
  for i, job in ipairs(jobs) do lines[i + 1] = job[1] .. ':' .. job[2] end
  redis.call('SET', FILE, table.concat(lines, ' '), 'PX', OPT.lease)
end

local function ends_of(streams)
  local ends = {}
  for _, stream in ipairs(streams) do
    local info = redis.pcall('XINFO', 'STREAM', stream[1])
    local last = '0-0'
    for i = 1, (info.err and 0 or #info), 2 do
      if info[i] == 'last-generated-id' then last = info[i + 1] end
    end
    ends[#ends + 1] = stream[1]
    ends[#ends + 1] = read_to[stream[1]] or last
  end
  return ends
end

local before = answered_before()
if before then return { NOW, before, {}, {} } end
local jobs, streams = {}, streams_in_turn()
for _, stream in ipairs(streams) do
  local failed = #jobs < WANTED and not stream[3] and guarded(drain, stream[1], stream[2], jobs)
  if failed then failures[#failures + 1] = stream[1] .. ': ' .. failed[2] end
end
if #jobs > 0 then file(jobs) end
settle()
return { NOW, jobs, #jobs < WANTED and ends_of(streams) or {}, failures }
