#!/bin/sh
# Unpacks Debian packages into a folder without installing them, so that no service starts and no
# root is needed: unpack_debian.sh FOLDER PACKAGE… Where that can't be done it says so, and the
# tests that need the programs skip and say so too.
set -u
folder=$(realpath "$1")
shift
for package in "$@"; do
    command -v "$package" >/dev/null 2>&1 && continue
    if ! command -v apt-get >/dev/null 2>&1; then
        echo "note: no apt-get here; tests that need $package will be skipped" >&2
        continue
    fi
    work=$(mktemp -d)
    # apt's own sandbox user can't write to a private folder, nor to a /tmp that is root's alone.
    get() { (cd "$work" && apt-get -q -o APT::Sandbox::User=root "$@" >/dev/null 2>&1); }
    if ! get download "$package" && ! { [ "$(id -u)" = 0 ] && get update && get download "$package"; }; then
        echo "note: $package could not be downloaded; tests that need it will be skipped" >&2
    else
        dpkg -x "$work"/*.deb "$folder"
    fi
    rm -rf "$work"
done
