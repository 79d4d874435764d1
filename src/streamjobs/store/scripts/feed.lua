-- feed: what projections do with a partition's feed, on which each is a consumer group. It touches no job, so nothing
-- is left to settle.
-- ARGV 2 what, 3 projection, then
--   read: consumer, most -> {{id, notes or ''}, …}: what this consumer has read and not acknowledged (its answer was
--     lost, its batch failed, it claimed them), else what is new. The group is made where it is missing, and `since` says when.
--   ack: n, n entry ids, jobs that were advanced (they leave the quarantine) -> {}
--   quarantine: job, what is known, most -> {"ok"} | {"full"}
--   retry: jobs, none for all of them -> {jobs}; they leave the quarantine and are noted on the feed again
--   claim: consumer, idle, cursor -> {cursor, entries}: takes over what others have not acknowledged for so long
--   reap: consumer, idle -> {consumers that were removed}; with idle 0 itself
--   trim -> {entries}: what every group has read and acknowledged goes
--   lag -> {{name, notes, pending, ms of the oldest or -1, consumers, quarantined, rebuild or ''}, …} of every group, now
--   ask -> {}: a rebuild from nothing
--   begin: consumer, ms -> {request} | {}: holds the rebuild that is asked for, unless another projector does
--   hold: consumer, ms -> {1 or 0}
--   finish: consumer, request -> {}
-- A request is `<why> <when>`: `asked` begins from nothing; `new` and `behind` go over all jobs. A group is behind where
-- notes went that it had not read: only the cap on the feed does that, and what it took is what was ever added, less
-- what is there, less what `trim` took.

local WHAT, NAME = ARGV[2], ARGV[3]
local FEED, KNOWN = PREFIX .. 'feed', PREFIX .. 'projections'
local QUARANTINE, REBUILDING = PREFIX .. 'quarantine:' .. NAME, PREFIX .. 'rebuilding:' .. NAME

local function fields_of(flat)
  local fields = {}
  for i = 1, #flat, 2 do fields[flat[i]] = flat[i + 1] end
  return fields
end

local function groups()
  local found, reply = {}, redis.pcall('XINFO', 'GROUPS', FEED)
  if not reply or reply.err then return found end
  for i, flat in ipairs(reply) do found[i] = fields_of(flat) end
  return found
end

local function group_named(name)
  for _, group in ipairs(groups()) do
    if group.name == name then return group end
  end
end

local function earlier(a, b)
  local ms_a, n_a = string.match(a, '^(%d+)-(%d+)$')
  local ms_b, n_b = string.match(b, '^(%d+)-(%d+)$')
  if ms_a ~= ms_b then return tonumber(ms_a) < tonumber(ms_b) end
  return tonumber(n_a) < tonumber(n_b)
end

local function first_behind(id)
  local entry = redis.call('XRANGE', FEED, '(' .. id, '+', 'COUNT', 1)[1]
  return entry and entry[1]
end

local function oldest_pending(group)
  return tonumber(group.pending) > 0 and redis.call('XPENDING', FEED, group.name)[2] or nil
end

local function ask(why)
  local asked = redis.call('HGET', KNOWN, 'rebuild:' .. NAME)
  if why ~= 'asked' and asked and asked ~= '' then return end
  redis.call('HSET', KNOWN, 'rebuild:' .. NAME, why .. ' ' .. NOW_TEXT)
end

-- What the cap took since this group last looked. Its count of what it has read is put right: Redis 7 takes its lag
-- from that.
local function look_for_holes(group)
  local stream = fields_of(redis.call('XINFO', 'STREAM', FEED))
  local gone = tonumber(stream['entries-added'] or 0) - tonumber(stream.length or 0)
  local known = redis.call('HMGET', KNOWN, 'trimmed', 'capped:' .. NAME)
  local capped = gone - tonumber(known[1] or 0)
  if capped == tonumber(known[2] or 0) then return end
  redis.call('HSET', KNOWN, 'capped:' .. NAME, capped)
  local first, last = first_behind('0-0'), group['last-delivered-id']
  if first and not earlier(last, first) then return end
  ask('behind')
  redis.call('XGROUP', 'SETID', FEED, NAME, last, 'ENTRIESREAD', gone)
end

local function read_group(consumer, most, from)
  local reply = redis.call('XREADGROUP', 'GROUP', NAME, consumer, 'COUNT', most, 'STREAMS', FEED, from)
  if not reply or #reply == 0 then return {} end
  return type(reply[1]) == 'table' and reply[1][2] or reply[2]  -- fakeredis answers without the outer list
end

local function read(consumer, most)
  local group = group_named(NAME)
  if group then
    look_for_holes(group)
  else
    redis.call('XGROUP', 'CREATE', FEED, NAME, '0', 'MKSTREAM')
    redis.call('HSET', KNOWN, 'since:' .. NAME, NOW_TEXT)
    ask('new')
  end
  local entries = read_group(consumer, most, '0')
  if #entries == 0 then entries = read_group(consumer, most, '>') end
  local notes = {}
  for i, entry in ipairs(entries) do
    if not entry[2] then ask('behind') end  -- the cap took what it had read
    notes[i] = { entry[1], entry[2] and entry[2][2] or '' }
  end
  return notes
end

local function acknowledge(n, ...)
  local ids, jobs = {}, {}
  for i, word in ipairs({ ... }) do
    if i <= tonumber(n) then ids[#ids + 1] = word else jobs[#jobs + 1] = word end
  end
  for i = 1, #ids, 4000 do redis.call('XACK', FEED, NAME, unpack(ids, i, math.min(i + 3999, #ids))) end
  in_slices('HDEL', QUARANTINE, jobs)
  return {}
end

local function quarantine(job, known, most)
  if redis.call('HLEN', QUARANTINE) >= tonumber(most) and redis.call('HEXISTS', QUARANTINE, job) == 0 then
    return { 'full' }
  end
  redis.call('HSET', QUARANTINE, job, known)
  return { 'ok' }
end

local function retry(...)
  local asked, jobs, lines = { ... }, {}, {}
  for _, job in ipairs(#asked > 0 and asked or redis.call('HKEYS', QUARANTINE)) do
    if redis.call('HDEL', QUARANTINE, job) == 1 then
      jobs[#jobs + 1] = job
      lines[#lines + 1] = job .. ' 0 retry'
    end
  end
  for i = 1, #lines, 100 do
    redis.call('XADD', FEED, '*', 'n', table.concat(lines, '\n', i, math.min(i + 99, #lines)))
  end
  return jobs
end

local function claim(consumer, idle, cursor)
  if not group_named(NAME) then return { '0-0', 0 } end
  local reply = redis.call('XAUTOCLAIM', FEED, NAME, consumer, idle, cursor, 'COUNT', 100, 'JUSTID')
  if reply[3] and #reply[3] > 0 then ask('behind') end
  return { reply[1], #reply[2] }
end

-- Deleting one drops what it has pending, so only one that has nothing goes
local function reap(consumer, idle)
  local reaped = {}
  if not group_named(NAME) then return reaped end
  for _, flat in ipairs(redis.call('XINFO', 'CONSUMERS', FEED, NAME)) do
    local one = fields_of(flat)
    local is_due = tonumber(idle) == 0 and one.name == consumer
      or tonumber(idle) > 0 and one.name ~= consumer and tonumber(one.idle) > tonumber(idle)
    if is_due and tonumber(one.pending) == 0 then
      redis.call('XGROUP', 'DELCONSUMER', FEED, NAME, one.name)
      reaped[#reaped + 1] = one.name
    end
  end
  return reaped
end

local function trim()
  local keep
  for _, group in ipairs(groups()) do
    local first = oldest_pending(group) or first_behind(group['last-delivered-id'])
    if not first then
      local ms, n = string.match(group['last-delivered-id'], '^(%d+)-(%d+)$')
      first = ms .. '-' .. string.format('%d', n + 1)
    end
    if not keep or earlier(first, keep) then keep = first end
  end
  if not keep then return { 0 } end
  local trimmed = redis.call('XTRIM', FEED, 'MINID', keep)
  if trimmed > 0 then redis.call('HINCRBY', KNOWN, 'trimmed', trimmed) end
  return { trimmed }
end

local function lag()
  local rows = {}
  for i, group in ipairs(groups()) do
    local oldest = oldest_pending(group) or first_behind(group['last-delivered-id'])
    local unread = tonumber(group.lag or nil) or redis.call('XLEN', FEED)
    rows[i] = { group.name, unread + group.pending, tonumber(group.pending),
      oldest and math.max(0, NOW - string.match(oldest, '^%d+')) or -1, tonumber(group.consumers),
      redis.call('HLEN', PREFIX .. 'quarantine:' .. group.name),
      redis.call('HGET', KNOWN, 'rebuild:' .. group.name) or '' }
  end
  return rows
end

local function begin(consumer, ms)
  local asked = redis.call('HGET', KNOWN, 'rebuild:' .. NAME)
  if not asked then return {} end
  local holder = redis.call('GET', REBUILDING)
  if holder and holder ~= consumer then return {} end
  redis.call('SET', REBUILDING, consumer, 'PX', ms)
  return { asked }
end

local function hold(consumer, ms)
  if redis.call('GET', REBUILDING) ~= consumer then return { 0 } end
  redis.call('PEXPIRE', REBUILDING, ms)
  return { 1 }
end

-- One that was asked for meanwhile stays asked for
local function finish_rebuild(consumer, request)
  if redis.call('GET', REBUILDING) ~= consumer then return {} end
  redis.call('DEL', REBUILDING)
  if redis.call('HGET', KNOWN, 'rebuild:' .. NAME) == request then redis.call('HDEL', KNOWN, 'rebuild:' .. NAME) end
  return {}
end

local function ask_anew()
  ask('asked')
  return {}
end

local act = { read = read, ack = acknowledge, quarantine = quarantine, retry = retry, claim = claim, reap = reap,
  trim = trim, lag = lag, ask = ask_anew, begin = begin, hold = hold, finish = finish_rebuild }
return act[WHAT](unpack(ARGV, 4))
