"""``boardbench release``: keys that only their owner reads, and packages that a board trusts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from boardbench.cli.errors import CliError, WrongUse
from boardbench.cli.release import release as command


def call(*arguments: object) -> str:
    done = CliRunner().invoke(
        command, [str(argument) for argument in arguments], standalone_mode=False, catch_exceptions=False
    )
    if done.exception is not None:
        raise done.exception
    return done.output


@pytest.fixture
def key(tmp_path: Path) -> Path:
    call("keygen", tmp_path / "key")
    return tmp_path / "key"


@pytest.fixture
def package(tmp_path: Path, release_packages: Any) -> Path:
    return Path(release_packages.build(tmp_path, "0.2.0", {"release.json": "{}"}))


def test_a_key_is_its_owners_and_is_never_overwritten(key: Path) -> None:
    public = key.with_name("key.pub")
    assert key.stat().st_mode & 0o777 == 0o600
    assert public.read_text().startswith("boardbench-ed25519 ")
    assert "PRIVATE" not in public.read_text()
    before = key.read_bytes()
    with pytest.raises(WrongUse, match="is there already"):
        call("keygen", key)
    assert key.read_bytes() == before


def test_what_is_signed_is_verified(key: Path, package: Path, tmp_path: Path) -> None:
    signed = Path(call("sign", package, "--key", key).strip())
    assert signed.name == "boardbench-agent_0.2.0_arm64_cp311.signed.deb"
    assert call("verify", signed, "--key", tmp_path / "key.pub") == "0.2.0+cp311 arm64\n"
    call("keygen", tmp_path / "other")
    with pytest.raises(CliError, match="nobody whose key is here"):
        call("verify", signed, "--key", tmp_path / "other.pub")
    with pytest.raises(CliError, match="not signed"):
        call("verify", package, "--key", tmp_path / "key.pub")
    with pytest.raises(WrongUse, match="signed already"):
        call("sign", signed, "--key", key)
    # The same twice: Ed25519 has no chance in it.
    again = Path(call("sign", package, "--key", key, "--out", tmp_path / "again.deb").strip())
    assert again.read_bytes() == signed.read_bytes()


def test_a_way_back_is_in_the_signature(key: Path, package: Path, tmp_path: Path) -> None:
    from boardbench.inspect import release

    call("sign", package, "--key", key, "--out", tmp_path / "back.deb", "--downgrade")
    with (tmp_path / "back.deb").open("rb") as file:
        assert release.verify(file, release.read_keys((tmp_path / "key.pub").read_text())).downgrade


def test_what_is_no_key_or_no_package_is_told(key: Path, package: Path, tmp_path: Path) -> None:
    with pytest.raises(WrongUse, match="is no key of"):
        call("sign", package, "--key", tmp_path / "key.pub")
    with pytest.raises(WrongUse, match="can't be read"):
        call("sign", package, "--key", tmp_path / "none")
    with pytest.raises(WrongUse, match="no Debian package"):
        call("sign", key, "--key", key)
    with pytest.raises(WrongUse, match="No such file"):
        call("sign", tmp_path / "none.deb", "--key", key)
