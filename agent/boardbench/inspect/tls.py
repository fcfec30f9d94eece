"""Talking to a collector that has a certificate: whom to trust, and what gRPC's words for a failure mean.

Without Python's own ssl, which an agent that waits does not have in its memory: gRPC brings a TLS of its own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Optional, Tuple

SCHEME = "tls://"
"""What an address begins with where the collector has a certificate."""

_SYSTEM = (
    "/etc/ssl/certs/ca-certificates.crt",  # Debian, Ubuntu, Arch
    "/etc/pki/tls/certs/ca-bundle.crt",  # Fedora, Red Hat
    "/etc/ssl/cert.pem",  # Alpine, macOS
)
"""Where systems keep the authorities that they trust, as Go's crypto/x509 looks for them."""

_BEGIN = b"-----BEGIN CERTIFICATE-----"


def split(address: str) -> Tuple[bool, str]:
    """Whether the address asks for TLS, and what it is without that."""
    if address.startswith(SCHEME):
        return True, address[len(SCHEME) :]
    return False, address


def read_authorities(path: Path) -> bytes:
    """The certificates in the file, in PEM. ValueError says what is wrong with it."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror}") from error
    if _BEGIN not in content:
        raise ValueError(f"{path} holds no certificate in PEM ({_BEGIN.decode()})")
    return content


def system_authorities(environment: Mapping[str, str] = os.environ) -> Optional[bytes]:
    """Those that this system trusts, in PEM; None: it keeps none where they are known to be.

    SSL_CERT_FILE names another file, as it does for OpenSSL.
    """
    named = environment.get("SSL_CERT_FILE")
    for place in (named,) if named else _SYSTEM:
        try:
            return read_authorities(Path(place))
        except ValueError:
            continue
    return None


def advice(details: str, *, tls: bool, option: str) -> str:
    """What to do about a failure that gRPC tells in these words; empty when it is none of TLS.

    ``tls`` says whether it was tried; ``option`` is how the authority's certificate is given.
    """
    low = details.lower()
    if not tls:
        # A server that expects TLS hangs up on what it takes for noise.
        if "socket closed" in low or "connection reset" in low or "broken pipe" in low:
            return f"if the collector has a certificate, write {SCHEME}HOST:PORT"
        return ""
    if "certificate has expired" in low:
        return "its certificate has expired: renew it; the collector takes a new one without a restart"
    if "certificate is not yet valid" in low:
        return "its certificate is not valid yet: look at the clocks of both sides"
    if "certificate_verify_failed" in low:
        return f"its certificate is of an authority that is not trusted here: name that one's with {option}"
    if "hostname verification" in low or "is not in peer certificate" in low:
        return "its certificate is for other names: use one of these, or have one made for this name"
    if "wrong_version_number" in low or "http_request" in low:
        return f"it does not speak TLS: leave {SCHEME} and {option} out, or start it with --tls-cert"
    if "handshake" in low:
        return "no encrypted connection came about: is there a collector with a certificate on this port?"
    return ""
