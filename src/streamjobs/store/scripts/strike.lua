-- strike: an operator stops a queue, a kind or a tool, or lifts that again.
-- ARGV 2 "set" or "lift", 3 queue:<name> | kind:<name> | tool:<name>, 4 "by" and "reason" as JSON fields
-- answer: {"struck"} | {"already"} (who came first stands) | {"lifted"} | {"absent"}
-- A hint is published on sj:{p}:strikes; `take` and `wake` look for themselves. Sent twice, the second does nothing.

local key, what = PREFIX .. 'strikes', ARGV[3]
local verdict
if ARGV[2] == 'set' then
  local fields = '{' .. ARGV[4] .. ',"since_ms":' .. NOW_TEXT .. '}'
  verdict = redis.call('HSETNX', key, what, fields) == 1 and 'struck' or 'already'
else
  verdict = redis.call('HDEL', key, what) == 1 and 'lifted' or 'absent'
end
if verdict == 'struck' or verdict == 'lifted' then redis.call(OPT.publish, key, verdict .. ' ' .. what) end
return { verdict }
