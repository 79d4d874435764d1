-- submit: new jobs; each gets its log, its hash, and a ticket, a timer or a hold.
-- ARGV 2 n, then per row 13: id, owner, kind, queue, priority, delay, start_timeout, timeout, ckey, idem, body, parent, event
--   ckey, idem: digests scoped to the owner, or ''; body: digest of the request; durations in ms, 0 for none;
--   event: job.queued as JSON without ts
-- row: {"ok", id, cursor} | {"same", id, cursor} (this submission came before) | {"mismatch", id}
--      (its key came with another body) | {"parent", status} (the parent takes no more children, is gone, or is
--      "foreign": its owner is another) | {"depth"|"children", the most there may be} | {"error", why}

local WIDTH = 13

local function first_cursor(id, created) return '1-' .. (created or '0') end

local function repeated(id, idem, body)
  if idem ~= '' then
    local record = redis.call('GET', PREFIX .. 'idem:' .. idem)
    if record then
      local known, digest = string.match(record, '^(%S+) (%S+)$')
      if digest ~= body then return { 'mismatch', known } end
      return { 'same', known, first_cursor(known, redis.call('HGET', PREFIX .. 'job:' .. known, 'created')) }
    end
  end
  local created = redis.call('HGET', PREFIX .. 'job:' .. id, 'created')
  if created then return { 'same', id, first_cursor(id, created) } end
end

-- Why the parent may not have this child, if anything; a repeated submission never comes here
local function orphaned(family, owner)
  if not family then return { 'parent', 'gone' } end
  local h = family.h
  if h.owner ~= owner then return { 'parent', 'foreign' } end
  if ENDED[h.status] then return { 'parent', h.status } end
  if h.cancel then return { 'parent', 'cancelled' } end
  if number(family, 'depth') + 1 > OPT.max_depth then return { 'depth', OPT.max_depth } end
  if h.family and redis.call('SCARD', family.key .. ':children') >= OPT.max_children then
    return { 'children', OPT.max_children }
  end
end

local function place(job, delay, start_timeout, queued)
  if start_timeout > 0 then put(job, 'start_by', NOW + delay + start_timeout) end
  if delay > 0 then
    put(job, 'status', 'scheduled')
    put(job, 'wake', NOW + delay)
  elseif job.h.held then
    hold(job, job.h.held)
  else
    enqueue(job, queued)
  end
  arm(job)
end

local function submit(at)
  local id, owner, kind, queue, priority = unpack(ARGV, at, at + 4)
  local delay, start_timeout, timeout = tonumber(ARGV[at + 5]), tonumber(ARGV[at + 6]), tonumber(ARGV[at + 7])
  local ckey, idem, body, parent, event = unpack(ARGV, at + 8, at + 12)
  local answer = repeated(id, idem, body)
  if answer then return answer end
  local family
  if parent ~= '' then
    family = fetch(parent)
    local refused = orphaned(family, owner)
    if refused then return refused end
  end

  local job = { id = id, key = PREFIX .. 'job:' .. id, h = {}, changes = {}, at = {}, lines = {} }
  put(job, 'owner', owner)
  put(job, 'kind', kind)
  put(job, 'queue', queue)
  put(job, 'priority', priority)
  put(job, 'created', NOW_TEXT)
  put(job, 'attempt', 1)
  if timeout > 0 then put(job, 'timeout', timeout) end
  if ckey ~= '' then put(job, 'ckey', ckey) end
  if idem ~= '' then put(job, 'idem', idem) end
  local stamp = '{"ts":' .. NOW_TEXT .. ','
  if family then
    local depth = number(family, 'depth') + 1
    put(job, 'parent', parent)
    put(job, 'depth', depth)
    stamp = stamp .. '"depth":' .. depth .. ','
  end
  if delay == 0 and OPT.owner_limit > 0 and tickets(queue, owner) >= OPT.owner_limit then
    put(job, 'held', 'owner_limit')
    stamp = stamp .. '"held":"owner_limit",'
  end
  local queued = stamp .. string.sub(event, 2)
  emit(job, NOW_TEXT, 'job.queued', queued)
  place(job, delay, start_timeout, #queued <= OPT.inline_bytes and queued)
  save(job)
  if idem ~= '' then redis.call('SET', PREFIX .. 'idem:' .. idem, id .. ' ' .. body) end
  if family then
    redis.call('SADD', family.key .. ':children', id)
    put(family, 'family', '1')
    save(family)
  end
  return { 'ok', id, job.h.last }
end

local answers = {}
for i = 1, tonumber(ARGV[2]) do answers[i] = guarded(submit, 3 + (i - 1) * WIDTH) end
settle()
return answers
