-- notify: what of a stretch of a job's log its owner and the owner's webhooks hear of, and how far that now is.
-- ARGV 2 job, 3 id of the last event told of before ('' for none), 4 id of the last one of this stretch,
--   5 notices that an owner keeps, 6 how long (ms), 7 how long a delivery is kept (ms), 8 its tries, 9 number of notices,
--   then for each notice: event id, type, content as JSON; then for each delivery: id, webhook, content as JSON
-- answer: {"ok"} | {"told", id} (somebody was faster, or this call came twice) | {"gone"}
-- A notice's id is its instant in ms, or one more than the last one's: unique, and its score among the unread.

local HEAD = 9

local function file_notices(job, count)
  local feed, unread = PREFIX .. 'notices:' .. job.h.owner, PREFIX .. 'unread:' .. job.h.owner
  local top = redis.call('XREVRANGE', feed, '+', '-', 'COUNT', 1)[1]
  local at = math.max(NOW, top and tonumber(string.match(top[1], '^%d+')) + 1 or 0)
  for i = 0, count - 1 do
    local row = HEAD + 3 * i
    local id = string.format('%d', at + i)
    redis.call('XADD', feed, id .. '-0', 'j', job.id, 'e', ARGV[row + 1], 't', ARGV[row + 2], 'd', ARGV[row + 3])
    redis.call('ZADD', unread, id, id)
  end
  redis.call('XTRIM', feed, 'MAXLEN', ARGV[5])
  redis.call('XTRIM', feed, 'MINID', string.format('%d', NOW - ARGV[6]))
  local oldest = redis.call('XRANGE', feed, '-', '+', 'COUNT', 1)[1]
  redis.call('ZREMRANGEBYSCORE', unread, '-inf', oldest and '(' .. string.match(oldest[1], '^%d+') or '+inf')
  redis.call('PEXPIRE', feed, ARGV[6])
  redis.call('PEXPIRE', unread, ARGV[6])
end

local function file_delivery(job, id, webhook, content)
  local key = PREFIX .. 'delivery:' .. id
  if redis.call('HEXISTS', PREFIX .. 'webhooks:' .. job.h.owner, webhook) == 0 then return end
  if redis.call('EXISTS', key) == 1 then return end
  redis.call('HSET', key, 'owner', job.h.owner, 'webhook', webhook, 'content', content, 'job', job.id,
    'created', NOW_TEXT, 'tried', 0, 'tries', ARGV[8])
  redis.call('PEXPIRE', key, ARGV[7])
  redis.call('ZADD', PREFIX .. 'deliveries', NOW_TEXT, id)
end

local function tell(id, before, after)
  local job = fetch(id)
  if not job then return { 'gone' } end
  if (job.h.told or '') ~= before then return { 'told', job.h.told or '' } end
  local count = tonumber(ARGV[9])
  put(job, 'told', after)
  save(job)
  if count > 0 then file_notices(job, count) end
  for i = HEAD + 3 * count + 1, #ARGV, 3 do file_delivery(job, ARGV[i], ARGV[i + 1], ARGV[i + 2]) end
  return { 'ok' }
end

return tell(ARGV[2], ARGV[3], ARGV[4])
