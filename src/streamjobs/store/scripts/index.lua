-- index: an owner's jobs, newest first, with what lists filter by. It touches no job, so nothing is left to settle.
-- ARGV 2 what, then
--   put: job, or job, thread, message -> {"ok"} | {"unknown"} (its first row needs thread and message) | {"gone"}
--   list: owner, created and job of the cursor or '' '', limit, rows to look at, since, until (ms, 0 for none), status,
--     kind, queue, thread, message ('' for any) -> {cursor or '', rows}
--     row: {id, status, kind, queue, thread, message, created, last, 1 if cancelling was asked for}
--   counts: owner -> {status, n, …}
--   sweep: rows -> {rows looked at, rows dropped}, of the owner that was looked at the longest ago
--   forget: owner, jobs -> {}
--   reset: owners -> {owners that are left}
-- A row is `<status>|<seq>|<kind>|<queue>|<length of thread>|<thread><message>`, the status as one letter. It is always
-- written from the job as it stands in the same instant: writers may race and notes may come twice or out of order.

local LETTER = { queued = 'q', running = 'r', scheduled = 's', waiting = 'w', paused = 'p', completed = 'c', failed = 'f',
  cancelled = 'x' }
local STATUS = {}
for status, letter in pairs(LETTER) do STATUS[letter] = status end

local OWNERS = PREFIX .. 'indexes'

local function keys_of(owner)
  return { owner = owner, index = PREFIX .. 'index:' .. owner, rows = PREFIX .. 'indexed:' .. owner,
    counts = PREFIX .. 'indexed_counts:' .. owner }
end

local function count_row(at, letter, by)
  if redis.call('HINCRBY', at.counts, letter, by) <= 0 then redis.call('HDEL', at.counts, letter) end
end

local function head_of(id)
  local head = redis.call('HMGET', PREFIX .. 'job:' .. id, 'owner', 'status', 'seq', 'kind', 'queue', 'created', 'last',
    'cancel')
  return head[1] and head
end

local function packed(head, thread, message)
  return table.concat({ LETTER[head[2]], head[3], head[4], head[5], #thread, thread .. message }, '|')
end

local function unpacked(row)
  local letter, seq, kind, queue, length, texts = string.match(row, '^(.)|(%d+)|([^|]*)|([^|]*)|(%d+)|(.*)$')
  local thread = string.sub(texts, 1, tonumber(length))
  return { letter = letter, seq = seq, kind = kind, queue = queue, thread = thread,
    message = string.sub(texts, #thread + 1) }
end

local function drop(at, id)
  local row = redis.call('HGET', at.rows, id)
  redis.call('ZREM', at.index, id)
  if row then
    redis.call('HDEL', at.rows, id)
    count_row(at, string.sub(row, 1, 1), -1)
  end
  if redis.call('EXISTS', at.index) == 0 then
    redis.call('DEL', at.counts)
    redis.call('ZREM', OWNERS, at.owner)
  end
end

local function write_row(at, id, head, before, thread, message)
  local row = packed(head, thread, message)
  if row == before then return row end
  redis.call('HSET', at.rows, id, row)
  if not before then
    redis.call('ZADD', at.index, head[6], id)
    redis.call('ZADD', OWNERS, 'NX', 0, at.owner)
  end
  local was, is = before and string.sub(before, 1, 1), string.sub(row, 1, 1)
  if was ~= is then
    if was then count_row(at, was, -1) end
    count_row(at, is, 1)
  end
  return row
end

local function put(id, thread, message)
  local head = head_of(id)
  if not head then return { 'gone' } end
  local at = keys_of(head[1])
  local before = redis.call('HGET', at.rows, id)
  if before then
    local known = unpacked(before)
    thread, message = known.thread, known.message
  elseif not thread then
    return { 'unknown' }
  end
  write_row(at, id, head, before, thread, message)
  return { 'ok' }
end

-- Where in the list what follows a job begins, whether the job is still there or not
local function rank_behind(at, created, id)
  local low = redis.call('ZCOUNT', at.index, '(' .. created, '+inf')
  local high = low + redis.call('ZCOUNT', at.index, created, created)
  while low < high do
    local middle = math.floor((low + high) / 2)
    if redis.call('ZREVRANGE', at.index, middle, middle)[1] >= id then low = middle + 1 else high = middle end
  end
  return low
end

-- Calls visit(id, created, row) on rows from a rank on until it returns true; answers how many it looked at, and
-- the last one's id and created where there are more
local function walk(at, rank, most, visit)
  local total, seen = redis.call('ZCARD', at.index), 0
  while seen < most and rank + seen < total do
    local from = rank + seen
    local flat = redis.call('ZREVRANGE', at.index, from, from + math.min(200, most - seen) - 1, 'WITHSCORES')
    local ids = {}
    for i = 1, #flat, 2 do ids[#ids + 1] = flat[i] end
    local rows = redis.call('HMGET', at.rows, unpack(ids))
    for i, id in ipairs(ids) do
      seen = seen + 1
      if visit(id, flat[2 * i], rows[i]) or seen == most then
        return seen, rank + seen < total and id or nil, flat[2 * i]
      end
    end
  end
  return seen
end

local function list(owner, created, id, limit, most, since, before, status, kind, queue, thread, message)
  local at, found, gone, is_over = keys_of(owner), {}, {}, false
  local rank = created ~= '' and rank_behind(at, created, id) or 0
  if before ~= '0' then rank = math.max(rank, redis.call('ZCOUNT', at.index, before, '+inf')) end
  limit, since = tonumber(limit), tonumber(since)

  local function fits(row)
    return (status == '' or row.letter == LETTER[status]) and (kind == '' or row.kind == kind)
      and (queue == '' or row.queue == queue) and (thread == '' or row.thread == thread)
      and (message == '' or row.message == message)
  end

  local _, last, last_created = walk(at, rank, tonumber(most), function(job, made, line)
    if tonumber(made) < since then
      is_over = true
      return true
    end
    local row = line and unpacked(line)
    if row and not fits(row) then return false end
    local head = row and head_of(job)
    if not head then
      gone[#gone + 1] = job
      return false
    end
    if head[3] ~= row.seq then
      row = unpacked(write_row(at, job, head, line, row.thread, row.message))
      if not fits(row) then return false end
    end
    found[#found + 1] = { job, STATUS[row.letter], row.kind, row.queue, row.thread, row.message, made, head[7],
      head[8] and head[8] ~= '' and 1 or 0 }
    return #found == limit
  end)
  for _, job in ipairs(gone) do drop(at, job) end
  return { last and not is_over and last_created .. '-' .. last or '', found }
end

local function counts(owner)
  local flat, answer = redis.call('HGETALL', keys_of(owner).counts), {}
  for i = 1, #flat, 2 do
    if STATUS[flat[i]] then
      answer[#answer + 1] = STATUS[flat[i]]
      answer[#answer + 1] = tonumber(flat[i + 1])
    end
  end
  return answer
end

-- Goes round by round through all of an owner's rows, newest first; the field `swept` says how far this round is
local function sweep(most)
  local owner = redis.call('ZRANGE', OWNERS, 0, 0)[1]
  if not owner then return { 0, 0 } end
  local at, gone = keys_of(owner), {}
  if redis.call('EXISTS', at.index) == 0 then
    redis.call('ZREM', OWNERS, owner)
    return { 0, 0 }
  end
  local created, id = string.match(redis.call('HGET', at.counts, 'swept') or '', '^(%d+)-(.*)$')
  local rank = created and rank_behind(at, created, id) or 0
  local seen, last, last_created = walk(at, rank, tonumber(most), function(job, _, line)
    local head = line and head_of(job)
    local row = head and unpacked(line)
    if not head then
      gone[#gone + 1] = job
    elseif head[3] ~= row.seq then
      write_row(at, job, head, line, row.thread, row.message)
    end
  end)
  redis.call('ZADD', OWNERS, NOW_TEXT, owner)
  if last then
    redis.call('HSET', at.counts, 'swept', last_created .. '-' .. last)
  else
    redis.call('HDEL', at.counts, 'swept')
  end
  for _, job in ipairs(gone) do drop(at, job) end
  return { seen, #gone }
end

local function forget(owner, ...)
  local at = keys_of(owner)
  for _, job in ipairs({ ... }) do drop(at, job) end
  return {}
end

local function reset(most)
  for _, owner in ipairs(redis.call('ZRANGE', OWNERS, 0, most - 1)) do
    local at = keys_of(owner)
    redis.call('UNLINK', at.index, at.rows, at.counts)
    redis.call('ZREM', OWNERS, owner)
  end
  return { redis.call('ZCARD', OWNERS) }
end

local act = { put = put, list = list, counts = counts, sweep = sweep, forget = forget, reset = reset }
return act[ARGV[2]](unpack(ARGV, 3))
