#!/bin/sh
# Unpacks Debian's PostgreSQL server, with the libraries that this system lacks, into a folder, without
# installing it, so that no service starts and no root is needed: unpack_postgres.sh FOLDER. Where the
# system has a server, nothing is done; where none can be had it says so, and the tests that need one skip.
set -u
for server in /usr/lib/postgresql/*/bin/initdb; do
    [ -x "$server" ] && exit 0
done
command -v initdb >/dev/null 2>&1 && exit 0
server=$(apt-cache depends postgresql 2>/dev/null | sed -n 's/^ *Depends: *\(postgresql-[0-9]*\)$/\1/p' | head -n 1)
if [ -z "$server" ] && [ "$(id -u)" = 0 ] && apt-get -q update >/dev/null 2>&1; then
    server=$(apt-cache depends postgresql | sed -n 's/^ *Depends: *\(postgresql-[0-9]*\)$/\1/p' | head -n 1)
fi
if [ -z "$server" ]; then
    echo "note: no PostgreSQL package to be had here; tests that need it will be skipped" >&2
    exit 0
fi
# What an installation would bring is what is missing here.
missing=$(apt-get -q -s --no-install-recommends install "$server" 2>/dev/null | sed -n 's/^Inst \([^ ]*\) .*/\1/p')
# shellcheck disable=SC2086
exec "$(dirname "$0")/unpack_debian.sh" "$1" ${missing:-$server}
