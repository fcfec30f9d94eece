"""Where a board or a collector listens, as people write it."""

from __future__ import annotations

import dataclasses
import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from boardbench.inspect import tls

AGENT_PORT = 7341
COLLECTOR_PORT = 7342
_HOST_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?")


@dataclass(frozen=True)
class Address:
    """A host (name, IPv4 or IPv6 literal without brackets) and a TCP port."""

    host: str
    port: int
    tls: bool = False
    """Whether it has a certificate to show."""
    ca: Path | None = None
    """File of the authority that the certificate must be of; None: any that this system trusts."""

    def __str__(self) -> str:
        """``host:port``, an IPv6 literal in brackets; ``tls://`` before it where it has a certificate."""
        return f"{tls.SCHEME if self.tls else ''}{self._place}"

    @property
    def _place(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def target(self) -> str:
        """The same for gRPC; a zone (``%eth0``) is escaped, since gRPC reads a URI."""
        return f"dns:///{self._place.replace('%', '%25')}"

    @property
    def is_loopback(self) -> bool:
        """Whether it is this machine."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def parse_address(text: str, default_port: int) -> Address:
    """The address that ``text`` (``HOST``, ``HOST:PORT``, ``[IPv6]:PORT`` or ``IPv6``) names.

    Raises ValueError, whose message says what is wrong with it.
    """
    stripped = text.strip()
    if "://" in stripped or "/" in stripped:
        raise ValueError(f"{text!r} is not HOST[:PORT]: leave out the scheme and the path")
    if "@" in stripped:
        raise ValueError(f"{text!r} is not HOST[:PORT]: boardbench needs no user name")
    host, port = _split(stripped, text)
    if not host:
        raise ValueError(f"{text!r} names no host: give HOST[:PORT]")
    if port is None:
        number = default_port
    elif port.isascii() and port.isdigit() and 1 <= int(port) <= 65535:
        number = int(port)
    else:
        raise ValueError(f"{port!r} in {text!r} is not a port: give a number from 1 to 65535")
    return Address(_host(host, text), number)


def _split(stripped: str, text: str) -> tuple[str, str | None]:
    if stripped.startswith("["):
        host, bracket, rest = stripped[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise ValueError(f"{text!r} is not an IPv6 address: give [ADDRESS] or [ADDRESS]:PORT")
        _ipv6(host, text)
        return host, rest[1:] if rest else None
    if stripped.count(":") > 1:
        return stripped, None
    host, colon, port = stripped.partition(":")
    return host, port if colon else None


def _host(host: str, text: str) -> str:
    if ":" in host:
        return _ipv6(host, text)
    if not host.isascii():
        try:
            host = host.encode("idna").decode("ascii")
        except UnicodeError as error:
            raise ValueError(f"{text!r} is not a host name: {error}") from None
    if not _HOST_NAME.fullmatch(host):
        raise ValueError(f"{text!r} is not a host name or IP address: give HOST[:PORT]")
    if host.replace(".", "").isdigit():
        try:
            return str(ipaddress.IPv4Address(host))
        except ValueError as error:
            raise ValueError(f"{text!r} is not an IP address: {error}") from None
    return host


def _ipv6(host: str, text: str) -> str:
    try:
        return str(ipaddress.IPv6Address(host))
    except ValueError:
        raise ValueError(
            f"{text!r} is not an IPv6 address: give [ADDRESS]:PORT, or HOST:PORT with one colon"
        ) from None


if TYPE_CHECKING:
    _AddressParameter = click.ParamType[Address]
else:
    _AddressParameter = click.ParamType  # generic only from click 8.2 on


class AddressType(_AddressParameter):
    """Reads ``HOST[:PORT]``; a wrong one is a usage error."""

    name = "HOST[:PORT]"

    def __init__(self, default_port: int) -> None:
        """``default_port`` is taken when none is written."""
        self.default_port = default_port

    def read(self, text: str, ctx: click.Context | None) -> Address:
        """The address. Raises ValueError."""
        del ctx
        return parse_address(text, self.default_port)

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Address:
        """The address; fails with a usage error."""
        if isinstance(value, Address):
            return value
        try:
            return self.read(str(value), ctx)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class CollectorType(AddressType):
    """Reads ``HOST[:PORT]`` or ``tls://HOST[:PORT]``; :func:`ca_option` makes the second of the first."""

    def __init__(self) -> None:
        super().__init__(COLLECTOR_PORT)

    def read(self, text: str, ctx: click.Context | None) -> Address:
        """The address. Raises ValueError."""
        secure, place = tls.split(text.strip())
        ca = ctx.meta.get(_CA) if ctx is not None else None
        address = parse_address(place, self.default_port)
        return dataclasses.replace(address, tls=secure or ca is not None, ca=ca)


_CA = "boardbench.ca"
_Command = TypeVar("_Command", bound=Callable[..., Any])


def ca_option(command: _Command) -> _Command:
    """Adds ``--ca``, which every :class:`CollectorType` of the command knows of."""

    def keep(ctx: click.Context, param: click.Parameter, path: Path | None) -> None:
        if path is None:
            return
        try:
            tls.read_authorities(path)
        except ValueError as error:
            raise click.BadParameter(str(error), ctx, param) from error
        ctx.meta[_CA] = path

    return click.option(
        "--ca",
        envvar="BOARDBENCH_CA",
        type=click.Path(path_type=Path, dir_okay=False),
        is_eager=True,
        expose_value=False,
        callback=keep,
        metavar="FILE",
        help="Certificate (PEM) of the authority that the collector's must be of; implies tls://.  "
        "[default: with tls://HOST any that this system trusts]",
    )(command)
