-- seal: moves the oldest events of a job's stream into segments, and keeps the snapshot that covers them.
-- ARGV 2 job, 3 `sealed` as the caller read it ('' for none), 4 `snap` likewise, 5 the snapshot of the last of these
--      events ('' for none), 6 n, then per segment 2: its line of the index ("<first seq> <last id> <bytes>"), the segment
-- answer: {"ok"|"already", sealed, snap} | {"stale", sealed, snap} | {"bad", why} | {"gone"}
-- stale: another one was first. The stream is trimmed by exactly what the segments hold; after the end it goes as a whole.

local function seq_of(id) return tonumber(string.match(id, '^%d+')) end

-- The segments join what is sealed, each other and the stream; returns why they do not
local function misfit(log, sealed, segments)
  local stored = redis.call('XRANGE', log, '-', '+', 'COUNT', 1)[1]
  local before = sealed and seq_of(sealed) or 0
  if not stored or seq_of(stored[1]) ~= before + 1 then return 'the stream does not go on where sealing ended' end
  for _, segment in ipairs(segments) do
    if segment.first ~= before + 1 then return 'a hole before ' .. segment.line end
    if #redis.call('XRANGE', log, segment.last, segment.last) == 0 then return 'not in the stream: ' .. segment.last end
    before = seq_of(segment.last)
    if before < segment.first then return 'backwards: ' .. segment.line end
  end
end

local function parse()
  local segments = {}
  for i = 1, tonumber(ARGV[6]) do
    local line, blob = ARGV[5 + 2 * i], ARGV[6 + 2 * i]
    local first, last = string.match(line, '^(%d+) (%d+%-%d+) %d+$')
    if not first then return nil end
    segments[i] = { line = line, first = tonumber(first), last = last, blob = blob }
  end
  return segments
end

local function write(job, segments, snapshot)
  local history = job.key .. ':sealed'
  local index = redis.call('HGET', history, 'index') or ''
  for _, segment in ipairs(segments) do
    redis.call('HSET', history, string.match(segment.last, '^%d+'), segment.blob)
    index = index .. segment.line .. '\n'
  end
  redis.call('HSET', history, 'index', index)
  local last = segments[#segments].last
  if snapshot ~= '' then
    redis.call('HSET', history, 'snap', snapshot)
    put(job, 'snap', last)
  end
  put(job, 'sealed', last)
  local log = job.key .. ':events'
  if ENDED[job.h.status] and last == job.h.last then
    redis.call('UNLINK', log)
  else
    redis.call('XTRIM', log, 'MINID', '=', string.format('%d', seq_of(last) + 1) .. '-0')
  end
  if ENDED[job.h.status] then redis.call('PEXPIREAT', history, redis.call('PEXPIRETIME', job.key)) end
  save(job)
end

local function seal(id, sealed, snap, snapshot)
  local job = fetch(id)
  if not job then return { 'gone' } end
  local segments = parse()
  if not segments or #segments == 0 then return { 'bad', 'no segments' } end
  local last = segments[#segments].last
  local function answer(verdict) return { verdict, job.h.sealed or '', job.h.snap or '' } end
  if job.h.sealed == last and (snapshot == '' or job.h.snap == last) then return answer('already') end
  if (job.h.sealed or '') ~= sealed or (job.h.snap or '') ~= snap then return answer('stale') end
  -- a reader goes from the snapshot on in the stream: what is trimmed is behind it
  if job.h.snap and snapshot == '' then return { 'bad', 'the snapshot would stay behind' } end
  local why = misfit(job.key .. ':events', job.h.sealed, segments)
  if why then return { 'bad', why } end
  write(job, segments, snapshot)
  return answer('ok')
end

return seal(unpack(ARGV, 2, 5))
