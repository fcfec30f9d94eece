"""The collector's own certificate, for both of its faces; read again when its files change."""

from __future__ import annotations

import asyncio
import calendar
import contextlib
import logging
import re
import ssl
import time
from pathlib import Path

import grpc

from boardbench.collector.errors import StartError

_log = logging.getLogger(__name__)

_LOOK_SECONDS = 2.0
"""How often the files are looked at: whoever renews a certificate tries it a moment later."""

_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)

_SEQUENCE, _INTEGER, _UTC_TIME, _GENERALIZED_TIME, _VERSION = 0x30, 0x02, 0x17, 0x18, 0xA0
"""Tags of DER, as in RFC 5280, section 4.1."""

_Stamp = tuple[tuple[int, int, int], ...]


class Certificate:
    """A certificate with its key. Belongs to the loop's thread."""

    def __init__(self, certificate: Path, key: Path) -> None:
        """Reads both. StartError says what is wrong with them."""
        self._certificate, self._key = certificate, key
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._complaint = ""
        try:
            self._stamp = self._files()
            self._read()
        except (OSError, ValueError) as error:
            raise StartError(self._told(error)) from error

    def _files(self) -> _Stamp:
        found = [path.stat() for path in (self._certificate, self._key)]
        return tuple((each.st_mtime_ns, each.st_size, each.st_ino) for each in found)

    def _read(self) -> None:
        """Takes over what is in the files; as it was when they do not belong together."""
        chain, key = self._certificate.read_bytes(), self._key.read_bytes()
        ends_at = _end(chain)
        # In a context of its own first: a key that does not fit leaves half a change behind.
        for context in (ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), self._context):
            context.load_cert_chain(self._certificate, self._key, password=_no_password)
        self._for_grpc = grpc.ssl_server_certificate_configuration([(key, chain)])
        self.ends_at = ends_at
        """Unix seconds; of a chain, when the first of it ends."""
        if ends_at <= time.time():
            _log.warning("the certificate %s has ended: nobody who checks it connects", self._certificate)

    def _told(self, error: Exception) -> str:
        if isinstance(error, ssl.SSLError):
            reason = (error.reason or str(error)).lower()
            if "mismatch" in reason:
                return f"{self._key} is not the key of the certificate {self._certificate}"
            return f"{self._certificate} and {self._key} are no certificate and key in PEM: {reason}"
        if isinstance(error, OSError):
            return f"can't read {error.filename}: {error.strerror}"
        return f"{self._certificate}, {self._key}: {error}"

    def refresh(self) -> None:
        """Takes over what is in the files when they have changed; what does not fit is told instead."""
        try:
            stamp = self._files()
            if stamp == self._stamp:
                return
            self._read()
            self._stamp = stamp
        except (OSError, ValueError) as error:
            complaint = self._told(error)
            # Of two files one is written first: in between they do not belong together.
            if complaint != self._complaint:
                _log.warning("%s; the certificate that was read before stays in use", complaint)
            self._complaint = complaint
            return
        self._complaint = ""
        ends = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(self.ends_at))
        _log.info("the certificate %s was read again; it ends on %s", self._certificate, ends)

    async def watch(self) -> None:
        """Looks at the files until cancelled."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            self.refresh()

    @property
    def for_http(self) -> ssl.SSLContext:
        """The context of a server; new connections use what was read last."""
        return self._context

    def for_grpc(self) -> grpc.ServerCredentials:
        """The credentials of a server; new connections use what was read last."""
        given = [self._for_grpc]

        def changed() -> grpc.ServerCertificateConfiguration | None:
            latest = self._for_grpc
            if given[0] is latest:
                return None
            given[0] = latest
            return latest

        # None means that nothing has changed, which the stubs do not know.
        return grpc.dynamic_ssl_server_credentials(self._for_grpc, changed)  # type: ignore[arg-type]


def _no_password() -> str:
    """Answers where OpenSSL would ask at the terminal."""
    raise ValueError("the key is locked by a passphrase: give one that is not (openssl pkey -in … -out …)")


def _end(chain: bytes) -> float:
    """Returns when the first of the certificates ends, in Unix seconds; ValueError when there is none."""
    ends = []
    for block in _PEM.findall(chain):
        with contextlib.suppress(IndexError):
            ends.append(_not_after(ssl.PEM_cert_to_DER_cert(block.decode("ascii"))))
    if not ends:
        raise ValueError("there is no certificate in PEM (-----BEGIN CERTIFICATE-----)")
    return min(ends)


def _not_after(der: bytes) -> float:
    """Returns the end of a certificate's validity: RFC 5280, section 4.1.2.5."""
    _, at, _ = _element(der, 0)
    _, at, _ = _element(der, at)
    tag, _, end = _element(der, at)
    if tag == _VERSION:
        at = end
    # Serial number, signature, issuer; then the validity, and in it its beginning.
    for wanted in (_INTEGER, _SEQUENCE, _SEQUENCE):
        at = _expect(der, at, wanted)[1]
    at = _expect(der, at, _SEQUENCE)[0]
    at = _element(der, at)[2]
    tag, at, end = _element(der, at)
    text = der[at:end].decode("ascii")
    if tag == _UTC_TIME:
        # Years from 1950 to 2049.
        text = ("19" if text[:2] >= "50" else "20") + text
    elif tag != _GENERALIZED_TIME:
        raise ValueError("the certificate says no end of its validity")
    return float(calendar.timegm(time.strptime(text, "%Y%m%d%H%M%SZ")))


def _expect(der: bytes, at: int, tag: int) -> tuple[int, int]:
    """Returns where the contents of the element begin and end."""
    found, begin, end = _element(der, at)
    if found != tag:
        raise ValueError("the certificate is none of X.509")
    return begin, end


def _element(der: bytes, at: int) -> tuple[int, int, int]:
    """Returns the tag of the element there, and where its contents begin and end."""
    tag, length, begin = der[at], der[at + 1], at + 2
    if length & 0x80:
        size = length & 0x7F
        length = int.from_bytes(der[begin : begin + size], "big")
        begin += size
    return tag, begin, begin + length
