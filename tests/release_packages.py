"""Signed packages as tests need them: with few files in them, from a key that the test has made."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from boardbench.inspect import release


@dataclass
class Signer:
    """A key pair of a test."""

    private: object = field(default_factory=lambda: _new_key())

    @property
    def public_line(self) -> str:
        import base64

        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

        raw = self.private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)  # type: ignore[attr-defined]
        return f"{release.KEY_WORD} {base64.b64encode(raw).decode()} test\n"

    def sign(self, package: Path, *, downgrade: bool = False) -> Path:
        with package.open("rb") as file:
            text = release.manifest_of(file, downgrade=downgrade).text()
        signature = self.private.sign(release.signed_bytes(text))  # type: ignore[attr-defined]
        signed = package.with_name(f"signed-{package.name}")
        signed.write_bytes(package.read_bytes() + release.seal(text, signature))
        return signed


def _new_key() -> object:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.generate()


def build(
    folder: Path,
    version: str,
    files: Mapping[str, str | Path],
    *,
    architecture: str = "arm64",
    tag: str = "cp311",
    modes: Mapping[str, int] | None = None,
) -> Path:
    """An unsigned package whose release holds these files; a Path as content is a link to there.

    ``modes``: of files that have other rights than they need, by their paths.
    """
    name = f"{version}+{tag}"
    control = (
        f"Package: boardbench-agent\nVersion: {name}\nArchitecture: {architecture}\nInstalled-Size: 1\n"
        "Description: a test's\n of several lines\n"
    )
    begin = f"./opt/boardbench/releases/{name}/"
    inside = {begin + path: content for path, content in files.items()}
    odd = {begin + path: mode for path, mode in (modes or {}).items()}
    whole = bytearray(b"!<arch>\n")
    for member, content in (
        ("debian-binary", b"2.0\n"),
        ("control.tar.xz", _tar({"./control": control})),
        ("data.tar.xz", _tar(inside, odd)),
    ):
        whole += f"{member:<16}{0:<12}{0:<6}{0:<6}{0o100644:<8o}{len(content):<10}`\n".encode()
        whole += content + b"\n" * (len(content) % 2)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"boardbench-agent_{version}_{architecture}_{tag}.deb"
    path.write_bytes(whole)
    return path


def _tar(files: Mapping[str, str | Path], modes: Mapping[str, int] | None = None) -> bytes:
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w:xz", format=tarfile.GNU_FORMAT) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            if isinstance(content, Path):
                entry.type, entry.linkname = tarfile.SYMTYPE, str(content)
                archive.addfile(entry)
                continue
            data = content.encode()
            entry.size = len(data)
            entry.mode = (modes or {}).get(name, 0o755 if "/bin/" in name else 0o644)
            archive.addfile(entry, io.BytesIO(data))
    return whole.getvalue()
