-- read: a bounded page of one job's log behind a cursor, with what is needed to trust it. Writes nothing.
-- KEYS 1 the job's hash      ARGV 1 cursor ('0-0': from the first event), 2 events at most, 3 bytes at most
-- answer: {status, last id, 1 if the cursor is in the log or 0-0, entries} | {} without the job
-- At least one entry comes where there is one; further ones while they fit the bytes.

local head = redis.call('HMGET', KEYS[1], 'status', 'last')
if not head[1] then return {} end
local log, cursor = KEYS[1] .. ':events', ARGV[1]
local limit, budget = tonumber(ARGV[2]), tonumber(ARGV[3])
if cursor ~= '0-0' and #redis.call('XRANGE', log, cursor, cursor) == 0 then return { head[1], head[2], 0, {} } end

local entries, size, from = {}, 0, '(' .. cursor
while #entries < limit do
  local asked = math.min(50, limit - #entries)
  local chunk = redis.call('XRANGE', log, from, '+', 'COUNT', asked)
  for _, entry in ipairs(chunk) do
    size = size + #entry[2][4]
    if #entries > 0 and size > budget then return { head[1], head[2], 1, entries } end
    entries[#entries + 1] = { entry[1], entry[2][2], entry[2][4] }
  end
  if #chunk < asked then break end
  from = '(' .. chunk[#chunk][1]
end
return { head[1], head[2], 1, entries }
