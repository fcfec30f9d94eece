"""Signed packages: who has signed them is known, and what was changed is found."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pytest

from boardbench.inspect import ed25519, release
from boardbench.inspect.errors import InspectError, Malformed, UnknownFormat

# RFC 8032, 7.1: TEST 1, 2, 3 and SHA(abc).
RFC_8032 = (
    (
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46b"
        "d25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c"
        "387b2eaeb4302aeeb00d291612bb0c00",
    ),
    (
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc659"
        "4a7c15e9716ed28dc027beceea1ec40a",
    ),
)


@pytest.mark.parametrize(("key", "message", "signature"), RFC_8032)
def test_the_vectors_of_the_standard_hold(key: str, message: str, signature: str) -> None:
    raw = bytes.fromhex(signature)
    assert ed25519.is_valid(bytes.fromhex(key), bytes.fromhex(message), raw)
    assert not ed25519.is_valid(bytes.fromhex(key), bytes.fromhex(message) + b"x", raw)
    for place in (0, 31, 32, 63):
        changed = bytearray(raw)
        changed[place] ^= 1
        assert not ed25519.is_valid(bytes.fromhex(key), bytes.fromhex(message), bytes(changed))
    # The scalar is one of many that stand for it: a second signature of the same message is none (5.1.7).
    scalar = int.from_bytes(raw[32:], "little") + 2**252 + 27742317777372353535851937790883648493
    assert not ed25519.is_valid(
        bytes.fromhex(key), bytes.fromhex(message), raw[:32] + scalar.to_bytes(32, "little")
    )


def test_it_agrees_with_a_library_on_what_is_right_and_what_is_not(release_packages: Any) -> None:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    for number in range(20):
        signer = release_packages.Signer()
        public = signer.private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        message = bytes([number]) * number
        assert ed25519.is_valid(public, message, signer.private.sign(message))
        assert not ed25519.is_valid(public, message + b"!", signer.private.sign(message))
    assert not ed25519.is_valid(b"\xff" * 32, b"", b"\0" * 64)
    assert not ed25519.is_valid(b"", b"", b"")


def test_a_signature_that_is_right_but_for_its_sign_is_none() -> None:
    def encoded(scalar: int) -> bytes:
        x, y, z, _ = ed25519._times(scalar, ed25519._BASE)
        inverse = pow(z, ed25519._P - 2, ed25519._P)
        x, y = x * inverse % ed25519._P, y * inverse % ed25519._P
        return (y | (x & 1) << 255).to_bytes(32, "little")

    secret, once, message = 0x5EC7E7, 0x04CE, b"whatever"
    key, commitment = encoded(secret), encoded(once)
    digest = hashlib.sha512(commitment + key + message).digest()
    right = (once + int.from_bytes(digest, "little") * secret) % ed25519._L
    for scalar, valid in ((right, True), (ed25519._L - right, False)):
        signature = commitment + scalar.to_bytes(32, "little")
        assert ed25519.is_valid(key, message, signature) is valid


def test_a_point_has_one_encoding() -> None:
    # The neutral element, whose signature of anything is itself and 0.
    neutral, other = (1).to_bytes(32, "little"), (ed25519._P + 1).to_bytes(32, "little")
    assert ed25519.is_valid(neutral, b"whatever", neutral + bytes(32))
    assert not ed25519.is_valid(other, b"whatever", neutral + bytes(32))
    assert not ed25519.is_valid(neutral, b"whatever", other + bytes(32))


@pytest.fixture
def signer(release_packages: Any) -> Any:
    return release_packages.Signer()


@pytest.fixture
def package(release_packages: Any, tmp_path: Path) -> Path:
    return Path(release_packages.build(tmp_path, "0.2.0", {"release.json": "{}", "bin/x": "#!/bin/sh\n"}))


def keys(signer: Any) -> tuple[bytes, ...]:
    return release.read_keys(signer.public_line)


def test_what_was_signed_is_verified_and_read(signer: Any, package: Path) -> None:
    signed = signer.sign(package)
    with signed.open("rb") as file:
        manifest = release.verify(file, keys(signer))
        assert (manifest.version, manifest.release) == ("0.2.0", "0.2.0+cp311")
        assert (manifest.architecture, manifest.python) == ("arm64", "3.11")
        assert manifest.content_bytes == package.stat().st_size
        assert [entry.name.rpartition("/")[2] for entry, _ in release.content(file)] == ["release.json", "x"]
    # The package itself is as it was: dpkg passes over what is behind it.
    assert signed.read_bytes().startswith(package.read_bytes())


def test_nobody_elses_signature_counts(signer: Any, package: Path, release_packages: Any) -> None:
    with signer.sign(package).open("rb") as file, pytest.raises(release.Untrusted, match="nobody whose key"):
        release.verify(file, keys(release_packages.Signer()))
    with package.open("rb") as file, pytest.raises(release.Untrusted, match="not signed"):
        release.verify(file, keys(signer))
    with signer.sign(package).open("rb") as file, pytest.raises(release.Untrusted):
        release.verify(file, ())


def test_a_signature_of_the_same_text_for_something_else_is_none(signer: Any, package: Path) -> None:
    text = release.manifest_of(io.BytesIO(package.read_bytes())).text()
    other = package.read_bytes() + release.seal(text, signer.private.sign(text.encode()))
    with pytest.raises(release.Untrusted, match="nobody whose key"):
        release.verify(io.BytesIO(other), keys(signer))


def test_any_bit_that_changes_is_found(signer: Any, package: Path) -> None:
    whole = signer.sign(package).read_bytes()
    for place in range(0, len(whole), 7):
        changed = bytearray(whole)
        changed[place] ^= 1
        try:
            told = release.verify(io.BytesIO(bytes(changed)), keys(signer))
        except InspectError:
            continue
        # Where ar keeps times, owners and padding of the last member, nothing is said.
        assert place >= package.stat().st_size, f"byte {place} is not covered: {told}"
    for length in range(0, len(whole) - 1, 11):
        with pytest.raises(InspectError):
            release.verify(io.BytesIO(whole[:length]), keys(signer))


def test_what_is_behind_or_before_a_signature_is_not_taken(signer: Any, package: Path) -> None:
    whole = signer.sign(package).read_bytes()
    extra = b"data.tar        0           0     0     100644  2         `\nxx"
    with pytest.raises(release.Untrusted):
        release.verify(io.BytesIO(whole + extra), keys(signer))
    seal = whole[package.stat().st_size :]
    with pytest.raises(release.Untrusted, match="not what was signed"):
        release.verify(io.BytesIO(package.read_bytes() + extra + seal), keys(signer))


@pytest.mark.parametrize(
    "manifest",
    [
        "[" * 20_000,
        "",
        "7",
        "null",
        '{"version": "0.2.0", "note": "\ud800"}',
        '{"version": "9' + "9" * 5000 + '"}',
        '{"version": []}',
    ],
)
def test_a_seal_that_makes_no_sense_is_refused_as_such(signer: Any, package: Path, manifest: str) -> None:
    """On a board root reads it before anybody's signature is known."""
    known = json.loads(release.manifest_of(io.BytesIO(package.read_bytes())).text())
    with contextlib.suppress(ValueError, RecursionError):
        odd = json.loads(manifest)
        # As if it were one, but for what is odd about it.
        manifest = json.dumps(known | odd, ensure_ascii=False) if isinstance(odd, dict) else manifest
    whole = package.read_bytes() + release.seal(manifest, bytes(64))
    with pytest.raises(Malformed):
        release.verify(io.BytesIO(whole), keys(signer))
    with pytest.raises(Malformed):
        release.verify(io.BytesIO(package.read_bytes() + _member(b"[" * 20_000)), keys(signer))


def _member(content: bytes) -> bytes:
    """A last member with that content in the place of a seal."""
    return f"{release.MEMBER:<16}{0:<12}{0:<6}{0:<6}{0o100644:<8o}{len(content):<10}`\n".encode() + content


def test_what_is_no_release_is_not_signed(
    tmp_path: Path, signer: Any, package: Path, release_packages: Any
) -> None:
    with pytest.raises(UnknownFormat):
        release.manifest_of(io.BytesIO(b"no package"))
    with signer.sign(package).open("rb") as file, pytest.raises(Malformed, match="signed already"):
        release.manifest_of(file)
    odd = release_packages.build(tmp_path / "odd", "1.0-2", {"release.json": "{}"})
    with odd.open("rb") as file, pytest.raises(Malformed, match=r"'1[.]0-2' is no version"):
        release.manifest_of(file)


def test_versions_are_compared_by_their_numbers() -> None:
    rising = [
        "0.9",
        "0.10.dev1",
        "0.10a1",
        "0.10b1",
        "0.10rc1",
        "0.10rc2",
        "0.10",
        "0.10.post1",
        "0.10.1",
        "1.0",
    ]
    assert sorted(set(rising), key=release.order) == rising
    assert release.order("1.0") == release.order("1.0.0")
    for text in ("", "x", "1..2", "1.0-2", "1.0+local"):
        with pytest.raises(ValueError):
            release.order(text)


def test_keys_are_lines(signer: Any) -> None:
    assert len(release.read_keys(f"# ours\n\n{signer.public_line}{signer.public_line}")) == 2
    for text in ("ssh-ed25519 AAAA", release.KEY_WORD, f"{release.KEY_WORD} AAAA", f"{release.KEY_WORD} ??"):
        with pytest.raises(Malformed, match="line 1"):
            release.read_keys(text)
