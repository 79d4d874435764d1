-- renew: extends many leases; says which are lost, which are asked to stop, how much came in.
-- ARGV 2 n, then per row 2: job, epoch
-- answer: {now, rows}; row: {"ok", inbox, "cancel"|"pause"|""} | {"lost"}

local function given(value) return value and value ~= '' end

local function renew(at)
  local id, epoch = ARGV[at], ARGV[at + 1]
  local h = redis.call('HMGET', PREFIX .. 'job:' .. id, 'lease', 'inbox', 'cancel', 'pause')
  if h[1] ~= epoch then return { 'lost' } end
  gathered.leased[id] = NOW + OPT.lease
  return { 'ok', tonumber(h[2] or 0), given(h[3]) and 'cancel' or given(h[4]) and 'pause' or '' }
end

local rows = {}
for i = 1, tonumber(ARGV[2]) do rows[i] = guarded(renew, 1 + 2 * i) end
settle()
return { NOW, rows }
