-- artifact: keeps something that a job made, under its lease; the same name replaces.
-- ARGV 2 job, 3 epoch, 4 name, 5 media type, 6 content, 7 bytes that one may have, 8 that all of the job may have
-- answer: {"ok", bytes of all} | {"fenced"} | {"limit", "one"|"all"} | {"gone"}
-- Kept in job:<id>:artifacts as <name> -> content and <name>/ -> media type; no name has a slash.

local function keep(id, epoch, name, media_type, content)
  local job = fetch(id)
  if not job then return { 'gone' } end
  if job.h.lease ~= epoch then return { 'fenced' } end
  if #content > tonumber(ARGV[7]) then return { 'limit', 'one' } end
  local all = number(job, 'artifacts') - redis.call('HSTRLEN', job.key .. ':artifacts', name) + #content
  if all > tonumber(ARGV[8]) then return { 'limit', 'all' } end
  redis.call('HSET', job.key .. ':artifacts', name, content, name .. '/', media_type)
  put(job, 'artifacts', all)
  save(job)
  return { 'ok', all }
end

return keep(unpack(ARGV, 2, 6))
