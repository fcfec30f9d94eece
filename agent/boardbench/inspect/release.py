"""A release of the agent as one signed file: a Debian package with one more member at its end.

    debian-binary, control.tar.xz, data.tar.xz      the package, as it was built
    _boardbench                                     {"manifest": "…", "signature": "…"}, JSON

dpkg passes over members behind the data whose names begin with "_" (deb(5)), so that the signed file
installs like the one that was not. The manifest is JSON, too, kept as the text that was signed: it names the
version and the SHA-256 of all that lies before the member. The signature is Ed25519 over a line that says
what it is about, and the manifest.

Also on a board as root, by a program of the system's own Python: standard library only. What is heavy of that
is loaded when a package is read, because the agent of a board that waits has this module in its memory.
"""

from __future__ import annotations

import binascii
import io
import json
import re
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, BinaryIO, Dict, Iterable, Iterator, List, Optional, Tuple

from boardbench.inspect import ed25519
from boardbench.inspect.errors import Malformed, UnknownFormat

MEMBER = "_boardbench"
KEY_WORD = "boardbench-ed25519"
"""What a line with a public key begins with."""

if TYPE_CHECKING:
    import tarfile

_MAGIC = b"!<arch>\n"
_HEADER_BYTES = 60
_DOMAIN = b"boardbench release 1\n"
_BLOCK_BYTES = 1 << 20
_MAX_SEAL_BYTES = 64 * 1024
_MAX_CONTROL_BYTES = 8 * 1024 * 1024
_RELEASE = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+~_-]{0,99}")
_VERSION = re.compile(r"(\d+(?:\.\d+){0,5})(?:\.?(a|b|rc|dev|post)(\d+))?")
_SUFFIXES = {"dev": -4, "a": -3, "b": -2, "rc": -1, "": 0, "post": 1}


class Untrusted(Malformed):
    """The package is not signed, or by nobody who is trusted, or is not what was signed."""


@dataclass(frozen=True)
class Manifest:
    """What was signed."""

    version: str
    release: str
    """Name of the folder that it lives in: "0.2.0+cp311"."""
    architecture: str
    """Debian's name: "arm64"."""
    content_bytes: int
    """Of the package without the signature."""
    content_sha256: str
    installed_bytes: int
    downgrade: bool = False
    """Whether boards with a later version take it, too."""

    @property
    def python(self) -> str:
        """Version of Python that it needs: "3.11"; empty when the name does not tell."""
        found = re.search(r"\+cp(\d)(\d+)$", self.release)
        return f"{found[1]}.{found[2]}" if found else ""

    def text(self) -> str:
        """What is signed: JSON with its names in order."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))


def signed_bytes(text: str) -> bytes:
    """What the signature is over; so that no signature of something else is one of a release."""
    return _DOMAIN + text.encode()


def seal(text: str, signature: bytes) -> bytes:
    """The member that is put behind a package, header and padding included."""
    content = json.dumps(
        {"manifest": text, "signature": binascii.b2a_base64(signature, newline=False).decode()}
    ).encode()
    content += b"\n" * (len(content) % 2)
    return f"{MEMBER:<16}{0:<12}{0:<6}{0:<6}{0o100644:<8o}{len(content):<10}`\n".encode() + content


def manifest_of(file: BinaryIO, *, downgrade: bool = False) -> Manifest:
    """The manifest for a package that was not signed yet; UnknownFormat, Malformed when it can't have one."""
    size, control = 0, b""
    for name, start, length in _members(file):
        if name == MEMBER:
            raise Malformed("the package is signed already")
        size = start + length + length % 2
        if name.startswith("control.tar"):
            if length > _MAX_CONTROL_BYTES:
                raise Malformed(f"{name} has {length:,} bytes")
            file.seek(start)
            control = file.read(length)
    told = _control(control)
    if told.get("Package") != "boardbench-agent":
        raise UnknownFormat("this is no package of boardbench-agent")
    try:
        manifest = Manifest(
            version=told["Version"].partition("+")[0],
            release=told["Version"],
            architecture=told["Architecture"],
            content_bytes=size,
            content_sha256=_sha256(file, size),
            installed_bytes=int(told.get("Installed-Size", "0")) * 1024,
            downgrade=downgrade,
        )
        _check(manifest)
    except (KeyError, ValueError) as error:
        raise Malformed(f"the package's control file can't be used: {error}") from error
    return manifest


def read(file: BinaryIO) -> Manifest:
    """What a signed package says of itself. Nothing is verified; Untrusted when it is not signed."""
    return _read(file)[0]


def verify(file: BinaryIO, keys: Iterable[bytes]) -> Manifest:
    """The manifest of a package that one of the keys has signed and that is what was signed.

    Raises Untrusted, UnknownFormat, Malformed.
    """
    manifest, text, signature, start = _read(file)
    if not any(ed25519.is_valid(key, signed_bytes(text), signature) for key in keys):
        raise Untrusted(
            f"release {manifest.release} is signed by nobody whose key is here: sign it with the key whose "
            "public half the board has"
        )
    if start != manifest.content_bytes or _sha256(file, start) != manifest.content_sha256:
        raise Untrusted(f"release {manifest.release} is not what was signed: it was changed or damaged")
    return manifest


def read_keys(text: str) -> Tuple[bytes, ...]:
    """Public keys, one a line, as ``boardbench release keygen`` writes them. Raises Malformed."""
    keys: List[bytes] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        try:
            if words[0] != KEY_WORD or len(words) < 2:
                raise ValueError
            key = _bytes(words[1])
            if len(key) != ed25519.KEY_BYTES:
                raise ValueError
        except (ValueError, binascii.Error):
            raise Malformed(f"line {number} is no public key: {KEY_WORD} and 44 characters") from None
        keys.append(key)
    return tuple(keys)


def order(version: str) -> Tuple[Tuple[int, ...], int, int]:
    """What versions are compared by. Raises ValueError for what is none: "0.2.0", "1.0rc1", "1.0.dev3"."""
    found = _VERSION.fullmatch(version)
    if found is None:
        raise ValueError(f"{version!r} is no version, as 0.2.0 or 1.0rc1")
    numbers = tuple(int(part) for part in found[1].split("."))
    while len(numbers) > 1 and not numbers[-1]:
        numbers = numbers[:-1]
    return numbers, _SUFFIXES[found[2] or ""], int(found[3] or 0)


def content(file: BinaryIO) -> Iterator[Tuple[tarfile.TarInfo, Optional[BinaryIO]]]:
    """What the package installs, in its order, each to be read before the next. Raises Malformed."""
    import lzma
    import tarfile

    for name, start, length in _members(file):
        if name.startswith("data.tar"):
            try:
                with tarfile.open(fileobj=_Part(file, start, length), mode="r|*") as archive:
                    for entry in archive:
                        yield entry, archive.extractfile(entry) if entry.isreg() else None  # type: ignore[misc]
            except (tarfile.TarError, lzma.LZMAError, EOFError, OSError) as error:
                raise Malformed(f"the package can't be unpacked: {error}") from error
            return
    raise Malformed("the package has no data")


def _read(file: BinaryIO) -> Tuple[Manifest, str, bytes, int]:
    members = list(_members(file))
    if not members or members[-1][0] != MEMBER:
        raise Untrusted("the package is not signed: sign it with `boardbench release sign`")
    _, start, length = members[-1]
    if length > _MAX_SEAL_BYTES:
        raise Malformed(f"its signature has {length:,} bytes")
    file.seek(start)
    try:
        told = json.loads(file.read(length))
        text, signature = told["manifest"], _bytes(told["signature"])
        values = json.loads(text)
        known = {field.name for field in fields(Manifest)}
        manifest = Manifest(**{name: value for name, value in values.items() if name in known})
        _check(manifest)
        # JSON can name characters that no text can have.
        signed_bytes(text)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Malformed(f"its signature can't be read: {error}") from error
    return manifest, text, signature, start - _HEADER_BYTES


def _check(manifest: Manifest) -> None:
    """Raises Malformed, ValueError for what no release is called."""
    texts = (manifest.version, manifest.release, manifest.architecture, manifest.content_sha256)
    if not all(isinstance(text, str) for text in texts) or not isinstance(manifest.downgrade, bool):
        raise Malformed("its manifest holds something else than what belongs there")
    for number in (manifest.content_bytes, manifest.installed_bytes):
        if not isinstance(number, int) or number < 0:
            raise Malformed("its manifest holds something else than what belongs there")
    order(manifest.version)
    if not _RELEASE.fullmatch(manifest.release):
        raise Malformed(f"{manifest.release[:100]!r} can't be the name of a release")


def _members(file: BinaryIO) -> Iterator[Tuple[str, int, int]]:
    """Name, start and length of each member (ar(5))."""
    file.seek(0, io.SEEK_END)
    end = file.tell()
    file.seek(0)
    if file.read(len(_MAGIC)) != _MAGIC:
        raise UnknownFormat("this is no Debian package")
    at = len(_MAGIC)
    while at < end:
        file.seek(at)
        header = file.read(_HEADER_BYTES)
        digits = header[48:58].strip()
        if len(header) < _HEADER_BYTES or header[58:] != b"`\n" or not digits.isdigit():
            raise Malformed("the package is damaged, or not whole")
        length = int(digits)
        at += _HEADER_BYTES
        if at + length > end:
            raise Malformed("the package is not whole")
        yield header[:16].decode("latin-1").rstrip(" /"), at, length
        at += length + length % 2


def _bytes(text: str) -> bytes:
    """What base64 stands for. Raises ValueError for what is none."""
    if not re.fullmatch(r"[0-9A-Za-z+/]*={0,2}", text):
        raise ValueError("it is no base64")
    return binascii.a2b_base64(text)


def _control(archive: bytes) -> Dict[str, str]:
    import lzma
    import tarfile

    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:*") as opened:
            found = opened.extractfile("./control")
            text = found.read().decode() if found is not None else ""
    except (tarfile.TarError, lzma.LZMAError, KeyError, EOFError, OSError, UnicodeDecodeError) as error:
        raise Malformed(f"the package's control file can't be read: {error}") from error
    pairs = (line.partition(": ") for line in text.splitlines() if not line.startswith(" "))
    return {name: value for name, _, value in pairs}


def _sha256(file: BinaryIO, length: int) -> str:
    import hashlib

    digest = hashlib.sha256()
    file.seek(0)
    while length:
        block = file.read(min(length, _BLOCK_BYTES))
        if not block:
            raise Malformed("the package is not whole")
        digest.update(block)
        length -= len(block)
    return digest.hexdigest()


class _Part(io.RawIOBase):
    """A stretch of a file, as a file to be read through."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file = file
        self._left = length
        file.seek(start)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        """The next bytes; empty at the end of the stretch."""
        wanted = self._left if size is None or size < 0 else min(size, self._left)
        data = self._file.read(wanted)
        self._left -= len(data)
        return data
