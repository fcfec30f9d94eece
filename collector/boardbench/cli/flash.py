"""``boardbench flash``: puts the agent onto a board, before its first boot or over SSH."""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from boardbench.cli.address import AGENT_PORT, Address, AddressType, CollectorType, ca_option
from boardbench.cli.collected import pairs
from boardbench.cli.errors import CliError, ExitCode, WrongUse

if TYPE_CHECKING:
    from boardbench.cli.arrival import Arrival
    from boardbench.cli.card import Card, Change
    from boardbench.cli.disk import Disk
    from boardbench.cli.first_boot import Order, Wifi

_COUNTRY = re.compile(r"[A-Z]{2}")
_SUITES = ("bookworm", "trixie")
_LABEL_CHARACTERS = 128  # more are refused by the agent, which a board without a keyboard tells nobody


@dataclass(frozen=True)
class _Settings:
    """What every kind of board is told."""

    collector: Address
    authority: bytes
    token: str
    labels: dict[str, str]
    listen: Address
    update_keys: bytes
    package: Path | None
    dry_run: bool
    wait: bool | None

    def order(self, package: Path, *, hostname: str = "", wifi: Wifi | None = None) -> Order:
        from boardbench.cli.first_boot import Order

        return Order(
            package=package.read_bytes(),
            collector=str(self.collector),
            token=self.token,
            listen=str(self.listen),
            labels=self.labels,
            hostname=hostname,
            wifi=wifi,
            update_keys=self.update_keys,
            authority=self.authority,
        )

    def arrival(self) -> Arrival | None:
        """What waits for the board, begun before the board can have reported; None when nobody waits.

        Raises Unreachable when it was asked for and the collector does not answer.
        """
        if self.dry_run or self.wait is False or (self.wait is None and not sys.stderr.isatty()):
            return None
        from boardbench.cli.arrival import Arrival
        from boardbench.cli.errors import Unreachable

        try:
            return Arrival(self.collector)
        except Unreachable as error:
            if self.wait:
                raise
            _note(f"{error}\nIt is not waited for the board; --no-wait leaves this out.")
            return None


def _labels(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    found = pairs(ctx, param, values)
    for text in (*found, *found.values()):
        _utf8("--label", text)
        if len(text) > _LABEL_CHARACTERS or not text.isprintable():
            raise click.BadParameter(
                f"{text!r} must be printable and at most {_LABEL_CHARACTERS} characters long", ctx, param
            )
    return found


def _with_settings(command: Callable[..., ExitCode]) -> Callable[..., ExitCode]:
    """Adds the options that every kind of board has; the command takes them as ``settings``."""

    @functools.wraps(command)
    def told(
        *,
        collector: Address,
        token: str,
        labels: dict[str, str],
        listen: Address,
        update_key: Path | None,
        package: Path | None,
        dry_run: bool,
        wait: bool | None,
        **rest: Any,
    ) -> ExitCode:
        keys = _update_keys(update_key) if update_key is not None else b""
        authority = _authority(collector.ca) if collector.ca is not None else b""
        if collector.is_loopback:
            _note(
                f"--collector {collector} is the board itself to a board: name the computer on which the "
                "collector runs by its address in the board's network"
            )
        settings = _Settings(collector, authority, token, labels, listen, keys, package, dry_run, wait)
        return command(settings=settings, **rest)

    for option in reversed(
        (
            click.option(
                "--collector",
                envvar="BOARDBENCH_COLLECTOR",
                required=True,
                type=CollectorType(),
                help="The collector, as the board reaches it; port 7342 when none is given, tls://HOST where "
                "it has a certificate.",
            ),
            ca_option,
            click.option(
                "--token",
                envvar="BOARDBENCH_TOKEN",
                default="",
                help="What `boardbench-collector token create` printed: enrols this one board.",
            ),
            click.option(
                "--label",
                "labels",
                multiple=True,
                metavar="NAME=VALUE",
                callback=_labels,
                help="A label of the board. Repeatable.",
            ),
            click.option(
                "--listen",
                type=AddressType(AGENT_PORT),
                default=f"0.0.0.0:{AGENT_PORT}",
                show_default=True,
                help="Where the agent takes pushes; 127.0.0.1: only from the board itself.",
            ),
            click.option(
                "--update-key",
                type=click.Path(path_type=Path, dir_okay=False, exists=True),
                metavar="FILE.pub",
                help="Whose signed releases the board takes: what `boardbench release keygen` made.",
            ),
            click.option(
                "--package",
                type=click.Path(path_type=Path, dir_okay=False, exists=True),
                help="The agent's .deb; else the one for the board in ./dist.",
            ),
            click.option("--dry-run", is_flag=True, help="Show what would be done, and do nothing."),
            click.option(
                "--wait/--no-wait",
                default=None,
                help="Wait until the board reports to the collector.  [default: at a terminal]",
            ),
        )
    ):
        told = option(told)
    return told


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def flash() -> None:
    """Put the agent onto a board: on its card before the first boot, or over SSH."""


@flash.command()
@click.option(
    "--image",
    type=click.Path(path_type=Path, dir_okay=False),
    help="An image of Raspberry Pi OS, unpacked.",
)
@click.option(
    "--boot",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="The boot partition of a written card, as this computer shows it.",
)
@click.option(
    "--device",
    # Who may not read it is told how to, and may see what it is.
    type=click.Path(path_type=Path, dir_okay=False, readable=False),
    metavar="DISK",
    help="The card's own disk (/dev/sdX): --image is written over it first, when given. Linux.",
)
@click.option("--os", "suite", type=click.Choice(_SUITES), help="Its system, where the card does not tell.")
@click.option(
    "--first-boot",
    "form",
    type=click.Choice(("systemd", "cloudinit")),
    help="How its system takes orders for its first boot, where the card does not tell.",
)
@click.option("--hostname", default="", help="Name of the board in the network.")
@click.option("--wifi", default="", metavar="SSID", help="Wireless network to join.")
@click.option("--wifi-country", default="", metavar="CC", help="Country whose radio rules hold, as CH.")
@click.option(
    "--wifi-password",
    envvar="BOARDBENCH_WIFI_PASSWORD",
    default=None,
    help="Asked for when not given; empty: an open network.",
)
@click.option(
    "--os-list",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the list that Raspberry Pi Imager shows the prepared image from (rpi-imager --repo).",
)
@click.option(
    "--yes",
    default="",
    metavar="DISK_ID",
    help="Write to --device without asking, when it is the disk with this id (--dry-run shows it).",
)
@_with_settings
def pi(
    image: Path | None,
    boot: Path | None,
    device: Path | None,
    suite: str | None,
    form: str | None,
    hostname: str,
    wifi: str,
    wifi_country: str,
    wifi_password: str | None,
    os_list: Path | None,
    yes: str,
    settings: _Settings,
) -> ExitCode:
    """Prepare a Raspberry Pi's card: its first boot installs the agent and enrols it.

    Only the boot partition is written, so neither root nor a second tool is needed: of a card that Raspberry
    Pi Imager has written (--boot), or of an image (--image), which is written then. With --image and --device
    the image is written here. The same command again changes nothing.
    """
    from boardbench.cli import card

    _check_places(image, boot, device, os_list, yes)
    network = _wifi(wifi, wifi_country, wifi_password)
    disk = None
    if device is not None:
        from boardbench.cli.disk import checked, may_be_written

        disk = checked(device)
    source = image or boot or device
    assert source is not None
    if not source.exists():
        raise WrongUse(f"there is no {source}")
    if source is image and not source.is_file():
        raise WrongUse(f"{source} is no file with an image; when it is a disk, name it with --device")
    # Everything that can be wrong is told before anything is written.
    if disk is not None and image is not None:
        from boardbench.cli.raw_write import image_bytes

        image_bytes(image, disk)
    with card.opened(source, writable=False) as partition:
        found = card.look(partition, suite, form)
        order = settings.order(_package(settings.package, found.package), hostname=hostname, wifi=network)
        change = card.compare(partition, order, found.form)
    arrival = settings.arrival()
    if disk is not None:
        if not settings.dry_run:
            may_be_written(disk.device)
        _confirm(disk, image, yes=yes, dry_run=settings.dry_run)
    if settings.dry_run:
        pass
    elif disk is not None:
        change = _write_disk(disk, image, order, found)
    else:
        with card.opened(source, writable=True) as partition:
            card.write(partition, change)
        with card.opened(source, writable=False) as partition:
            card.verify(partition, change)
    for line in card.lines(change, dry_run=settings.dry_run):
        click.echo(line)
    if settings.dry_run:
        return ExitCode.DONE
    _note(f"ready for {found.suite}")
    if image is not None and device is None:
        _tell_imager(image, os_list, found, hostname)
        if order.token:
            _note("for one card: its token enrols one board")
    _note("put the card into the board and switch it on")
    return arrival.wait(hostname) if arrival is not None else ExitCode.DONE


def _check_places(
    image: Path | None, boot: Path | None, device: Path | None, os_list: Path | None, yes: str
) -> None:
    if (boot is None) == (image is None and device is None):
        raise click.UsageError("give one of --image, --boot and --device, or --image with --device")
    if os_list is not None and (image is None or device is not None):
        raise click.UsageError(
            "--os-list is of an image that Raspberry Pi Imager will write: give --image alone"
        )
    if yes and device is None:
        raise click.UsageError("--yes says nothing without --device")
    if device is not None and sys.platform != "linux":
        raise click.UsageError(
            "--device works on Linux; here prepare the image with --image and write it with Raspberry Pi "
            "Imager, or write it first and prepare the card with --boot"
        )


def _confirm(disk: Disk, image: Path | None, *, yes: str, dry_run: bool) -> None:
    """Returns when the disk may be written. Raises WrongUse, Abort."""
    if yes and yes != disk.id:
        raise WrongUse(
            f"--yes {yes} is another disk than {disk.device}: that is {disk} with the id {disk.id}"
        )
    what = f"{image} would be written over" if image is not None else "the boot partition would be written of"
    if dry_run:
        _note(f"{what} {disk.device}: {disk}; in a script: --yes {disk.id}")
    elif yes:
        return
    elif image is None:
        click.confirm(f"Write to the boot partition of {disk.device}: {disk}?", abort=True, err=True)
    else:
        _note(f"Everything on {disk.device} is lost: {disk} (id {disk.id}).")
        name = disk.device.name
        if click.prompt(f"Type {name} to write over it", default="", show_default=False, err=True) != name:
            raise click.Abort


def _write_disk(disk: Disk, image: Path | None, order: Order, found: Card) -> Change:
    """The image over the whole disk, then what its first boot needs; all of it read back. Raises CliError."""
    try:
        return _write_open_disk(disk, image, order, found)
    except OSError as error:
        raise CliError(f"{disk.device}: {error.strerror or error}; is the card gone, or broken?") from error


def _write_open_disk(disk: Disk, image: Path | None, order: Order, found: Card) -> Change:
    from boardbench.cli import boot_partition, card, raw_write
    from boardbench.cli.disk import alone, forget, read_partitions, still_there

    # Kept open from the first byte to the last: a disk that is closed is looked at by the system, which
    # mounts what it finds there.
    with alone(disk.device) as target:
        still_there(disk)
        if image is not None:
            size = raw_write.image_bytes(image, disk)
            with image.open("rb") as source:
                for label, step in (("writing", raw_write.write), ("reading back", raw_write.verify)):
                    with click.progressbar(length=size, label=f"{label:<12}", file=sys.stderr) as bar:
                        step(source, target, bar.update)
            _note(f"{size:,} bytes written to {disk.device} and read back the same")
        with boot_partition.inside(target, disk.device) as partition:
            change = card.compare(partition, order, found.form)
            card.write(partition, change)
        target.flush()
        forget(target.fileno())
        with boot_partition.inside(target, disk.device) as partition:
            card.verify(partition, change)
        read_partitions(target.fileno())
    return change


def _tell_imager(image: Path, os_list: Path | None, found: Card, hostname: str) -> None:
    """How the prepared image comes onto a card."""
    import datetime

    from boardbench.cli import imager

    digest = ""
    if os_list is not None:
        digest = imager.sha256(image)
        released = found.released or f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}"
        listed = imager.os_list(
            image,
            digest,
            suite=found.suite,
            architecture=found.architecture,
            released=released,
            title=f"{hostname or image.stem} (boardbench)",
        )
        try:
            os_list.write_bytes(listed.encode())
        except OSError as error:
            raise WrongUse(f"{os_list}: can't be written: {error.strerror}") from error
    _note("to write it to a card, one of:")
    for line in imager.commands(image, digest, os_list, sys.platform):
        _note(f"  {line}")


@flash.command()
@click.option("--host", metavar="[USER@]HOST", help="A Jetson that runs and takes SSH.")
@click.option(
    "--rootfs",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="The root file system that NVIDIA's flasher will write (Linux_for_Tegra/rootfs).",
)
@_with_settings
def jetson(host: str | None, rootfs: Path | None, settings: _Settings) -> ExitCode:
    """Install the agent on a Jetson: over SSH, or in the files that NVIDIA's own flasher writes."""
    if (host is None) == (rootfs is None):
        raise click.UsageError("give one of --host and --rootfs")
    if host is not None:
        return _over_ssh(host, settings)
    assert rootfs is not None
    from boardbench.cli import card, remote

    order = settings.order(_package(settings.package, f"arm64_{remote.python_of(rootfs)}"))
    arrival = settings.arrival()
    for line in card.lines(
        remote.put_into(rootfs, order, dry_run=settings.dry_run), dry_run=settings.dry_run
    ):
        click.echo(line)
    _note("now write the board with NVIDIA's own tool, in Linux_for_Tegra:")
    _note("  sudo ./tools/kernel_flash/l4t_initrd_flash.sh <board> <device>   (or flash.sh)")
    return arrival.wait() if arrival is not None else ExitCode.DONE


@flash.command()
@click.option("--host", required=True, metavar="[USER@]HOST", help="The board, which takes SSH.")
@_with_settings
def coral(host: str, settings: _Settings) -> ExitCode:
    """Install the agent over SSH on the computer that a Coral TPU is in, or on a Coral Dev Board.

    The Dev Board's own Mendel Linux has Python 3.7, which no engine supports any more: there the command
    says so and changes nothing. With a newer Debian on it, it works as on any board.
    """
    return _over_ssh(host, settings)


def _over_ssh(host: str, settings: _Settings) -> ExitCode:
    from boardbench.cli import card, remote

    program = os.environ.get("BOARDBENCH_SSH", "ssh")
    target = remote.ask(program, host)
    _note(f"{host}: {target.system}, {target.architecture}, Python {target.python}")
    chosen = _package(settings.package, f"{target.architecture}_{target.tag}")
    order = settings.order(chosen)
    if settings.dry_run:
        click.echo(f"would install {chosen.name} on {host}, by way of these files:")
        for line in card.lines(remote.change(order), dry_run=True):
            click.echo(line)
        return ExitCode.DONE
    arrival = settings.arrival()
    click.echo(remote.install(program, host, order))
    return arrival.wait(target.hostname, known=True) if arrival is not None else ExitCode.DONE


def _update_keys(file: Path) -> bytes:
    """Public keys as they go onto the board. Raises WrongUse."""
    from boardbench.inspect.errors import InspectError
    from boardbench.inspect.release import read_keys

    text = file.read_bytes().decode("utf-8-sig", "replace")
    if "PRIVATE KEY" in text:
        raise WrongUse(
            f"{file} is the private half, which no board may ever have: name the other one, KEY.pub"
        )
    try:
        found = read_keys(text)
    except InspectError as error:
        raise WrongUse(f"{file}: {error}: name what `boardbench release keygen` made, KEY.pub") from error
    if not found:
        raise WrongUse(f"{file} holds no key: name what `boardbench release keygen` made, KEY.pub")
    # As the agent reads it, whatever editor was at it.
    return ("\n".join(text.splitlines()) + "\n").encode()


def _authority(file: Path) -> bytes:
    """The certificate as it goes onto the board. Raises WrongUse."""
    content = file.read_bytes()
    if b"PRIVATE KEY" in content:
        raise WrongUse(f"{file} holds a private key, too, which no board may ever have: leave it out")
    return content


def _package(given: Path | None, wanted: str) -> Path:
    """The agent's package for the board. Raises WrongUse."""
    if given is None:
        found = sorted(
            Path("dist").glob(f"boardbench-agent_*_{wanted}.deb"), key=lambda path: path.stat().st_mtime
        )
        if not found:
            target = wanted.replace("_", "-")
            raise WrongUse(
                f"there is no package for {target} in ./dist: name it with --package, or build it in the "
                f"sources with `python deploy/build_deb.py {target}`"
            )
        return found[-1]
    from boardbench.inspect import release
    from boardbench.inspect.errors import InspectError

    try:
        with given.open("rb") as file:
            try:
                told = release.read(file)
            except release.Untrusted:
                told = release.manifest_of(file)
    except InspectError as error:
        raise WrongUse(f"{given} is no package of the agent: {error}") from error
    except OSError as error:
        raise WrongUse(f"{given}: {error.strerror}") from error
    has = f"{told.architecture}_cp{told.python.replace('.', '')}"
    if has != wanted:
        raise WrongUse(
            f"{given} is for {has.replace('_', ', ')}, and the board needs {wanted.replace('_', ', ')}: "
            "dpkg would refuse it there"
        )
    return given


def _wifi(name: str, country: str, password: str | None) -> Wifi | None:
    from boardbench.cli.first_boot import Wifi, wifi_key

    if not name:
        if country or password:
            raise click.UsageError("--wifi-country and --wifi-password say nothing without --wifi")
        return None
    if not 1 <= len(_utf8("--wifi", name)) <= 32:
        raise click.UsageError(f"--wifi: {name!r} is no name of a network (1 to 32 bytes)")
    if not _COUNTRY.fullmatch(country):
        raise click.UsageError(
            "--wifi needs --wifi-country with two capital letters: the radio stays off without"
        )
    if password is None:
        password = click.prompt(
            f"Password of {name}", hide_input=True, default="", show_default=False, err=True
        )
    try:
        return Wifi(name, wifi_key(name, password) if password else "", country)
    except ValueError as error:
        raise click.UsageError(f"--wifi-password: {error}") from None


def _utf8(option: str, text: str) -> bytes:
    """What is written of it. Raises UsageError for what the terminal's encoding has garbled."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise click.UsageError(f"{option}: {text!r} is not UTF-8; is the terminal's locale?") from None


def _note(text: str) -> None:
    """For a person; the standard output is a list of files."""
    click.echo(text, err=True)
