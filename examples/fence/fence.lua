-- Is everything below PATH on two machines? Ends with 0 when it is. Needs lua-socket. Usage: lua fence.lua /srv/mail/anna [STATE]
local agent = assert(require("socket.unix")())
assert(agent:connect((arg[2] or "/var/lib/twinbox") .. "/admin.sock"))
agent:send("FENCE timeout=10s path=" .. arg[1]:gsub("[^%w/._~-]", function(c) return ("%%%02X"):format(c:byte()) end) .. "\n")
local answer = agent:receive("*l")
if not (answer or ""):find("^OK ") then io.stderr:write(tostring(answer), "\n") os.exit(1) end
