#!/bin/sh
# Makes the passwords that deploy/compose.yaml reads, where there are none yet. They are random, and stay out of git.
set -eu
umask 077
folder=$(dirname "$0")/secrets
mkdir -p "$folder"
random() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }
for name in postgres_password grafana_password; do
    [ -s "$folder/$name" ] || random >"$folder/$name"
done
# The users of the containers read them; the folder is for its owner alone.
chmod 700 "$folder"
chmod 644 "$folder"/*
echo "$folder: postgres_password, grafana_password (user admin)"
