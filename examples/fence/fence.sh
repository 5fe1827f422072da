#!/bin/sh
# Is everything below PATH on two machines? Ends with 0 when it is. Needs socat. Usage: fence.sh /srv/mail/anna [STATE]
path=$1 socket=${2:-/var/lib/twinbox}/admin.sock
answer=$(printf 'FENCE timeout=10s path=%s\n' "$(printf %s "$path" | sed 's/%/%25/g; s/ /%20/g')" | socat -t 15 - "UNIX-CONNECT:$socket")
case $answer in OK\ *) exit 0 ;; *) echo "$answer" >&2; exit 1 ;; esac
