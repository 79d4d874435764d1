-- allowed: which of these commands the user of this connection may not run. Runs none of them.
-- ARGV 2.. a command each, as an ACL names it, and example arguments, by spaces
-- answer: {command, ...}

local refused = {}
for i = 2, #ARGV do
  local words = {}
  for word in string.gmatch(ARGV[i], '%S+') do words[#words + 1] = word end
  local name = table.remove(words, 1)
  local first, second = string.match(name, '^(.-)|(.+)$')
  if second then table.insert(words, 1, second) end
  if not redis.acl_check_cmd(first or name, unpack(words)) then refused[#refused + 1] = name end
end
return refused
