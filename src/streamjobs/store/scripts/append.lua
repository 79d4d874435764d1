-- append: batches of events under a lease, each with what becomes of the job after it.
-- ARGV 2 n, then per row 8 + 2e: job, epoch, batch, inbox seen, outcome, delay, timers, e, then e times type, event
--   batch: 1, 2, … within the lease; a refused one is not used up
--   outcome: keep | completed | failed (the last event is the terminal one) | cancelled (the script writes the event)
--            | retry (scheduled; after delay ms) | sleep (scheduled, by a timer it must have) | wait (waiting) | yield (queued again at once)
--   timers: {key: delay ms, …} as JSON, set unless known already, taken back where the delay is below 0; or ''
-- After a cancel was asked for no tool starts: a row with tool.started is then answered as unread inbox.
-- row: {"ok"|"dup", seq, inbox, asked} | {"fenced"} | {"gap", expected} | {"conflict"} | {"inbox", n, asked}
--      | {"limit", "events"|"bytes"} | {"bad", why} | {"gone"} | {"error", why};  asked: "cancel" | "pause" | ""
-- Loaded twice: plain rows are refused when Redis is full, those that end, park or record a tool's outcome are not.

local HEAD = 8
local PARKS = { retry = true, sleep = true, wait = true, yield = true }
local ENDS = { completed = true, failed = true, cancelled = true }
local PROGRESS = { ['turn.completed'] = true, ['tool.completed'] = true, ['step.completed'] = true }

local function parse(at)
  local row = {
    id = ARGV[at], epoch = ARGV[at + 1], batch = tonumber(ARGV[at + 2]), seen = tonumber(ARGV[at + 3]),
    outcome = ARGV[at + 4], delay = tonumber(ARGV[at + 5]), timers = ARGV[at + 6], events = {}, size = 0,
  }
  for i = 1, tonumber(ARGV[at + 7]) do
    local event = { ARGV[at + HEAD + 2 * i - 2], ARGV[at + HEAD + 2 * i - 1] }
    row.events[i] = event
    row.size = row.size + #event[2]
  end
  return row
end

local function asked(job) return job.h.cancel and 'cancel' or job.h.pause and 'pause' or '' end

local function fingerprint(row) return row.epoch .. ':' .. #row.events .. ':' .. row.size end

-- The terminal event, alone and last, where the outcome says so and nowhere else
local function misplaced(row)
  local expected = (row.outcome == 'completed' or row.outcome == 'failed') and row.outcome or nil
  for i, event in ipairs(row.events) do
    local ends = TERMINAL[event[1]]
    if ends and (i < #row.events or ends ~= expected) then return 'misplaced ' .. event[1] end
  end
  if expected and (#row.events == 0 or TERMINAL[row.events[#row.events][1]] ~= expected) then return 'no terminal event' end
  if not (expected or row.outcome == 'keep' or row.outcome == 'cancelled' or PARKS[row.outcome]) then return 'no such outcome' end
end

-- Terminal events are exempt: a job over its budget can still end
local function over_budget(job, row)
  local n, size = #row.events, row.size
  if n > 0 and TERMINAL[row.events[n][1]] then n, size = n - 1, size - #row.events[n][2] end
  if n == 0 then return nil end
  if number(job, 'seq') + n > OPT.max_events then return 'events' end
  if number(job, 'bytes') + size > OPT.max_bytes then return 'bytes' end
end

local function starts_tool(row)
  for _, event in ipairs(row.events) do
    if event[1] == 'tool.started' then return true end
  end
  return false
end

local function refusal(job, row)
  if row.batch == number(job, 'batch') and job.h.commit then
    local print, seq = string.match(job.h.commit, '^(.*) (%d+)$')
    if print == fingerprint(row) then return { 'dup', tonumber(seq), number(job, 'inbox'), asked(job) } end
  end
  if job.h.lease ~= row.epoch then return { 'fenced' } end
  local expected = number(job, 'batch') + 1
  if row.batch > expected then return { 'gap', expected } end
  if row.batch < expected then return { 'conflict' } end
  local why = misplaced(row)
  if why then return { 'bad', why } end
  if PARKS[row.outcome] and row.seen ~= number(job, 'inbox') then return { 'inbox', number(job, 'inbox'), asked(job) } end
  if job.h.cancel and starts_tool(row) then return { 'inbox', number(job, 'inbox'), 'cancel' } end
  -- behind the inbox: a timer that fired meanwhile is news, no fault
  if row.outcome == 'sleep' and not next(timers_after(job, row.timers)) then return { 'bad', 'sleep without a timer' } end
  local which = over_budget(job, row)
  if which then return { 'limit', which } end
end

local function write(job, row)
  local last = ENDS[row.outcome] and row.outcome ~= 'cancelled' and #row.events - 1 or #row.events
  for i = 1, last do
    local event = row.events[i]
    emit(job, row.epoch, event[1], event[2])
    if PROGRESS[event[1]] and job.h.crashes then put(job, 'crashes', nil) end
  end
  put(job, 'batch', row.batch)
  if row.outcome == 'retry' then put(job, 'attempt', number(job, 'attempt') + 1) end
  if row.timers ~= '' then set_timers(job, row.timers) end
end

local move = {
  keep = function() end,
  yield = function(job) requeue(job, 'yield') end,
  sleep = function(job) park(job, 'scheduled') end,
  wait = function(job) park(job, 'waiting') end,
  retry = function(job, row)
    if row.delay == 0 then return requeue(job, 'retry') end
    park(job, 'scheduled')
    put(job, 'wake', NOW + row.delay)
  end,
}

local function append(at)
  local row = parse(at)
  local job = fetch(row.id)
  if not job then return { 'gone' } end
  local refused = refusal(job, row)
  if refused then return refused end
  local terminal = row.events[#row.events]
  write(job, row)
  -- what a resend is told: nothing of the job comes after its end, else this batch's own last event
  local seq = number(job, 'seq') + (ENDS[row.outcome] and 1 or 0)
  put(job, 'commit', fingerprint(row) .. ' ' .. seq)
  if row.outcome == 'cancelled' then
    finish_cancelled(job, row.epoch)
  elseif ENDS[row.outcome] then
    finish(job, row.epoch, terminal[1], terminal[2])
  elseif not (PARKS[row.outcome] and parked_by_wish(job, row.epoch)) then
    move[row.outcome](job, row)
  end
  if not ENDED[job.h.status] then
    if row.outcome ~= 'keep' or row.timers ~= '' then arm(job) end
    save(job)
    if job.left_running then offer(job.h.queue, job.h.owner) end
  end
  return { 'ok', seq, number(job, 'inbox'), asked(job) }
end

local answers, at = {}, 3
for i = 1, tonumber(ARGV[2]) do
  answers[i] = guarded(append, at)
  at = at + HEAD + 2 * tonumber(ARGV[at + 7])
end
settle()
return answers
