#!/usr/bin/env python3
"""Is everything below PATH on two machines? Ends with 0 when it is. Usage: fence.py /srv/mail/anna [STATE]"""
import socket, sys, urllib.parse

agent = socket.socket(socket.AF_UNIX)
agent.connect((sys.argv[2] if len(sys.argv) > 2 else "/var/lib/twinbox") + "/admin.sock")
agent.sendall(b"FENCE timeout=10s path=%s\n" % urllib.parse.quote_from_bytes(sys.argv[1].encode(errors="surrogateescape")).encode())
answer = agent.makefile().readline()
sys.exit(None if answer.startswith("OK ") else answer.strip())
