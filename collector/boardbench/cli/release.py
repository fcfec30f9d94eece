"""``boardbench release``: keys, and signatures of the agent's packages."""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from boardbench.cli.errors import CliError, ExitCode, WrongUse

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_file = click.Path(path_type=Path, dir_okay=False)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def release() -> None:
    """Make keys, and sign releases of the agent for boards."""


@release.command()
@click.argument("key", type=_file)
def keygen(key: Path) -> ExitCode:
    """Make a key: KEY, which only you may read, and KEY.pub for boards.

    KEY.pub belongs into /etc/boardbench/update.pub of each board. Whoever has KEY can bring any program onto
    them: keep it where no other program runs.
    """
    _library()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
        PublicFormat,
    )

    from boardbench.inspect.release import KEY_WORD

    made = Ed25519PrivateKey.generate()
    public = key.with_name(key.name + ".pub")
    raw = made.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    private = made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    line = f"{KEY_WORD} {base64.b64encode(raw).decode()} {key.name}\n"
    for path, content, mode in ((key, private, 0o600), (public, line.encode(), 0o644)):
        try:
            # A key that is there may be the one that a fleet trusts.
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        except FileExistsError:
            raise WrongUse(f"{path} is there already: choose another name, or remove it") from None
        except OSError as error:
            raise WrongUse(f"{path} can't be written: {error.strerror}") from error
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
    click.echo(public)
    return ExitCode.DONE


@release.command()
@click.argument("package", type=_file)
@click.option("--key", type=_file, required=True, help="What `boardbench release keygen` made.")
@click.option("--out", type=_file, help="Where to write it.  [default: beside it, as NAME.signed.deb]")
@click.option("--downgrade", is_flag=True, help="Boards with a later version take it, too.")
def sign(package: Path, key: Path, out: Path | None, downgrade: bool) -> ExitCode:
    """Sign a package of the agent; what comes out still installs with dpkg. Prints its name."""
    private = _private(key)
    from boardbench.inspect import release as signed
    from boardbench.inspect.errors import InspectError

    out = out or package.with_name(f"{package.name.removesuffix('.deb')}.signed.deb")
    try:
        with package.open("rb") as file:
            text = signed.manifest_of(file, downgrade=downgrade).text()
            file.seek(0)
            content = file.read()
        fresh = out.with_name(out.name + ".part")
        fresh.write_bytes(content + signed.seal(text, private.sign(signed.signed_bytes(text))))
        fresh.replace(out)
    except OSError as error:
        raise WrongUse(f"{error.filename or package}: {error.strerror}") from error
    except InspectError as error:
        raise WrongUse(f"{package}: {error}") from error
    click.echo(out)
    return ExitCode.DONE


@release.command()
@click.argument("package", type=_file)
@click.option("--key", type=_file, required=True, help="The public key, KEY.pub.")
def verify(package: Path, key: Path) -> ExitCode:
    """Say whether a board with this public key would trust the package."""
    from boardbench.inspect import release as signed
    from boardbench.inspect.errors import InspectError

    try:
        keys = signed.read_keys(key.read_text())
        with package.open("rb") as file:
            manifest = signed.verify(file, keys)
    except (OSError, UnicodeDecodeError) as error:
        raise WrongUse(f"{package} and {key} can't both be read: {error}") from error
    except InspectError as error:
        raise CliError(f"{package}: {error}") from error
    click.echo(f"{manifest.release} {manifest.architecture}")
    return ExitCode.DONE


def _private(path: Path) -> Ed25519PrivateKey:
    _library()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        found = load_pem_private_key(path.read_bytes(), None)
    except OSError as error:
        raise WrongUse(f"{path} can't be read: {error.strerror}") from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise WrongUse(f"{path} is no key of `boardbench release keygen`: {error}") from error
    if not isinstance(found, Ed25519PrivateKey):
        raise WrongUse(f"{path} is no Ed25519 key")
    return found


def _library() -> None:
    """Raises CliError where it is not installed."""
    from importlib.util import find_spec

    if find_spec("cryptography") is None:
        raise CliError("this needs the library cryptography: pip install 'boardbench[release]'")
