"""Tells systemd that the service is up, so that what waits for it waits no longer (sd_notify(3))."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping


def notify(state: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether somebody waits to be told ``state`` ("READY=1", "STATUS=…") and was."""
    address = environment.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    # "@" stands for the NUL of Linux's abstract names (unix(7)).
    place = "\0" + address[1:] if address.startswith("@") else address
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as line:
            line.sendto(state.encode(), place)
    except OSError:
        # Whoever waited is gone; that is no reason not to work.
        return False
    return True
