-- permit: one use of something of which there is only so much a time, shared by all who ask (a token bucket).
-- ARGV 2 name, 3 ms that one permit takes to come back, 4 permits that may be used at once, 5 ms the caller would wait
-- answer: {"go", ms} (it is reserved; the caller waits that long first) | {"later", ms} (nothing is reserved)
-- Sent twice it reserves two, and one is lost: slower than allowed, never faster.

local key, period, burst = PREFIX .. 'bucket:' .. ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local wait, full = bucket_wait(key, period, burst)
local answer = { wait > tonumber(ARGV[5]) and 'later' or 'go', math.ceil(wait) }
if answer[1] == 'go' then take_token(key, period, full) end
return answer
