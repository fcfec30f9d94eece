#!/bin/sh
# Prints the first Python >= 3.10 that runs; nothing when there is none. The engines have wheels for
# 3.10 to 3.14, so a newer one is tried last.
for name in python3.13 python3.12 python3.11 python3.14 python3.10 python3 python; do
    path=$(command -v "$name" 2>/dev/null) || continue
    # A version manager's shim can be there and refuse to run.
    if "$path" -c 'import sys, venv; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
        "$path" -c 'import sys; print(sys.executable)'
        exit 0
    fi
done
