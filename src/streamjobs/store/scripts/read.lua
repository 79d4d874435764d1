-- read: a bounded page of one job's log behind a cursor, with what is needed to trust it. Writes nothing.
-- KEYS 1 the job's hash
-- ARGV 1 cursor ('0-0': from the first event; 'snap': behind the stored snapshot, or from the first event without one;
--        'last': the last event only), 2 events at most, 3 bytes at most, 4 index line of a segment that the caller has,
--        5 there only where the caller encrypts
-- answer: {status, last id, found, entries, index line, segment, sealed, snap, snapshot, record of the job's data key (only
--        where the caller encrypts; '' for none, '-' where it was deleted)} | {} without the job
--   found: 1 if the cursor is in the log or 0-0, 2 if it is where it should be in the segment, which the caller looks up
--   a segment that holds what follows comes whole, and then no entries do; '' for the segment that the caller has
-- At least one entry comes where there is one; further ones while they fit the bytes.

local head = redis.call('HMGET', KEYS[1], 'status', 'last', 'sealed', 'snap')
if not head[1] then return {} end
local log, history = KEYS[1] .. ':events', KEYS[1] .. ':sealed'
local sealed, snap, snapshot = head[3] or '', head[4] or '', ''
local record
if ARGV[5] then
  record = redis.call('GET', KEYS[1] .. ':datakey') or redis.call('HGET', KEYS[1], 'datakey') and '-' or ''
end
local cursor, limit, budget = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])

local function page(found, entries, line, segment)
  return { head[1], head[2], found, entries, line or '', segment or '', sealed, snap, snapshot, record }
end

local function seq_of(id) return tonumber(string.match(id, '^%d+')) end

local function kept(field)
  return redis.call('HGET', history, field) or error({ err = 'sealed history without ' .. field .. ': ' .. history })
end

-- The segment that holds what follows the cursor
local function from_segment()
  local before, wanted = '0-0', seq_of(cursor) + 1
  for line in string.gmatch(kept('index'), '[^\n]+') do
    local first, last = string.match(line, '^(%d+) (%S+) %d+$')
    if wanted <= seq_of(last) then
      if wanted == tonumber(first) and before ~= cursor then return page(0, {}) end
      local segment = line == ARGV[4] and '' or kept(string.match(last, '^%d+'))
      return page(wanted == tonumber(first) and 1 or 2, {}, line, segment)
    end
    before = last
  end
  error({ err = 'sealed history ends before ' .. sealed .. ': ' .. history })
end

local function from_stream()
  local entries, size, from = {}, 0, '(' .. cursor
  while #entries < limit do
    local asked = math.min(50, limit - #entries)
    local chunk = redis.call('XRANGE', log, from, '+', 'COUNT', asked)
    for _, entry in ipairs(chunk) do
      size = size + #entry[2][4]
      if #entries > 0 and size > budget then return page(1, entries) end
      entries[#entries + 1] = { entry[1], entry[2][2], entry[2][4] }
    end
    if #chunk < asked then break end
    from = '(' .. chunk[#chunk][1]
  end
  return page(1, entries)
end

if cursor == 'snap' then
  cursor = '0-0'
  if snap ~= '' then cursor, snapshot = snap, kept('snap') end
elseif cursor == 'last' then
  local entry = redis.call('XREVRANGE', log, '+', '-', 'COUNT', 1)[1]
  if entry then return page(1, { { entry[1], entry[2][2], entry[2][4] } }) end
  local line = string.match(kept('index'), '([^\n]+)\n$')
  return page(1, {}, line, kept(string.match(sealed, '^%d+')))
end
if sealed ~= '' and seq_of(cursor) < seq_of(sealed) then return from_segment() end
if cursor ~= '0-0' and cursor ~= sealed and #redis.call('XRANGE', log, cursor, cursor) == 0 then return page(0, {}) end
return from_stream()
