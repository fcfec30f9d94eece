"""``boardbench flash``: puts the agent onto a board, before its first boot or over SSH."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from boardbench.cli.address import COLLECTOR_PORT, Address, AddressType
from boardbench.cli.errors import CliError, ExitCode, WrongUse

if TYPE_CHECKING:
    from boardbench.cli.boot_partition import BootPartition
    from boardbench.cli.first_boot import Format, Order, Wifi
    from boardbench.v1 import collector_pb2

_Command = TypeVar("_Command", bound=Callable[..., Any])

_PYTHONS = {"bookworm": "cp311", "trixie": "cp313"}
_WAIT_SECONDS = 900.0  # a first boot resizes the card, installs, and starts again; a slow card takes minutes
_LOOK_SECONDS = 2.0
_COUNTRY = re.compile(r"[A-Z]{2}")


def _settings_options(command: _Command) -> _Command:
    """Adds what every kind of board is told."""
    for option in reversed(
        (
            click.option(
                "--collector",
                envvar="BOARDBENCH_COLLECTOR",
                required=True,
                type=AddressType(COLLECTOR_PORT),
                help="The collector, as the board reaches it; port 7342 when none is given.",
            ),
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
                help="A label of the board. Repeatable.",
            ),
            click.option(
                "--listen",
                default="0.0.0.0:7341",
                show_default=True,
                help="Where the agent takes pushes; 127.0.0.1:7341: only from the board itself.",
            ),
            click.option(
                "--package",
                type=click.Path(path_type=Path, dir_okay=False, exists=True),
                help="The agent's .deb; else the one for the board in ./dist.",
            ),
            click.option("--dry-run", is_flag=True, help="Show what would be done, and do nothing."),
            click.option("--wait", is_flag=True, help="Wait until the board reports to the collector."),
        )
    ):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def flash() -> None:
    """Put the agent onto a board: on its card before the first boot, or over SSH."""


@flash.command()
@click.option(
    "--image",
    type=click.Path(path_type=Path, dir_okay=False),
    help="An image of Raspberry Pi OS, unpacked, or the card's own device (/dev/sdX).",
)
@click.option(
    "--boot",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="The boot partition of a written card, as this computer shows it.",
)
@click.option(
    "--os", "system", type=click.Choice(tuple(_PYTHONS)), help="Its system, where the card does not tell."
)
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
@click.option("--yes", is_flag=True, help="Write to a device without asking.")
@_settings_options
def pi(
    image: Path | None,
    boot: Path | None,
    system: str | None,
    form: str | None,
    hostname: str,
    wifi: str,
    wifi_country: str,
    wifi_password: str | None,
    yes: bool,
    collector: Address,
    token: str,
    labels: tuple[str, ...],
    listen: str,
    package: Path | None,
    dry_run: bool,
    wait: bool,
) -> ExitCode:
    """Prepare a Raspberry Pi's card: its first boot installs the agent and enrols it.

    Only the boot partition is written, so neither root nor a second tool is needed. Write the card with
    Raspberry Pi Imager first, or prepare the image and write that. The same command again changes nothing.
    """
    from boardbench.cli import first_boot

    if (image is None) == (boot is None):
        raise click.UsageError("give one of --image and --boot")
    network = _wifi(wifi, wifi_country, wifi_password)
    if image is not None:
        _check_device(image, yes=yes or dry_run)
    with _partition(image, boot, writable=not dry_run) as partition:

        def read(path: str) -> bytes | None:
            return partition.read(path) if partition.exists(path) else None

        asked = first_boot.Format(form) if form else first_boot.detect(read)
        suite = system or _suite(read, asked)
        order = first_boot.Order(
            package=_package(package, f"arm64_{_PYTHONS[suite]}").read_bytes(),
            collector=str(collector),
            token=token,
            listen=listen,
            labels=_labels(labels),
            hostname=hostname,
            wifi=network,
        )
        _put(partition, order, asked, dry_run=dry_run)
    if not dry_run:
        _note(f"ready for {suite}; put the card into the board and switch it on")
        if wait:
            return _wait(collector, hostname)
    return ExitCode.DONE


def _put(partition: BootPartition, order: Order, form: Format, *, dry_run: bool) -> None:
    """Writes what differs and reads it back."""
    from boardbench.cli import first_boot

    def read(path: str) -> bytes | None:
        return partition.read(path) if partition.exists(path) else None

    plan = first_boot.plan(order, form, read)
    changed = {path: data for path, data in plan.files.items() if read(path) != data}
    removed = [path for path in plan.removed if partition.exists(path)]
    # What tells of an install that was done belongs to what was there before.
    if not changed:
        removed = []
    needed = sum(len(data) for data in changed.values())
    # A file that is replaced is there twice for a moment.
    if needed + 65536 * len(changed) > partition.free_bytes:
        raise CliError(
            f"the boot partition has {partition.free_bytes / 2**20:.0f} MiB free and needs "
            f"{needed / 2**20:.0f} MiB: take away what is not needed there"
        )
    if not dry_run:
        # The program that the board runs at its start comes last: a card that was pulled out boots as before.
        last = "cmdline.txt"
        for path in sorted(changed, key=lambda path: (path == last, path)):
            partition.write(path, changed[path])
        for path in removed:
            partition.remove(path)
        for path, data in plan.files.items():
            if read(path) != data:
                raise CliError(f"{path} reads back as something else: the card is broken; take another one")
    for path, data in sorted(plan.files.items()):
        state = "as it is" if path not in changed else "would be written" if dry_run else "written"
        click.echo(f"{state:<17}{len(data):>11,}  {path}")
        if dry_run and path in changed:
            click.echo(_shown(data, secret=path in plan.secret))
    for path in removed:
        click.echo(f"{'would be removed' if dry_run else 'removed':<30}{path}")


def _shown(data: bytes, *, secret: bool) -> str:
    """A text file as it would be, without what nobody is to read over a shoulder."""
    if b"\0" in data[:4096] or data.startswith(b"!<arch>"):
        return "    (a package)"
    text = data.decode("utf-8", "replace")
    if secret:
        text = re.sub(r'("token": ")[^"]*', r"\1…", text)
        text = re.sub(r"\b[0-9a-f]{64}\b", "…", text)
    return "\n".join(f"    {line}" for line in text.splitlines())


@contextlib.contextmanager
def _partition(image: Path | None, boot: Path | None, *, writable: bool) -> Iterator[BootPartition]:
    from boardbench.cli import boot_partition

    if image is not None:
        with boot_partition.opened(image, writable=writable) as volume:
            yield volume
        return
    assert boot is not None
    for name in boot_partition.MARKS:
        if not (boot / name).is_file():
            raise WrongUse(
                f"{boot} is no boot partition of a Raspberry Pi's system: there is no {name} in it; name the "
                "folder that shows when the card is put in (bootfs)"
            )
    try:
        yield boot_partition.BootFolder(boot)
    except OSError as error:
        raise CliError(f"{boot}: {error.strerror or error}; is the card write protected, or gone?") from error


def _suite(read: Callable[[str], bytes | None], form: Format) -> str:
    """The system on the card: pi-gen writes the day that it was made on into issue.txt."""
    from boardbench.cli.first_boot import Format

    found = re.search(rb"(20\d\d-\d\d-\d\d)", read("issue.txt") or b"")
    if form is Format.CLOUD_INIT:
        # The first with cloud-init was a Trixie of 2025; no Bookworm ever had it.
        return "trixie"
    # Trixie came out on 2025-10-01. Later ones without cloud-init may be either.
    if found and b"2023-10-10" <= found.group(1) < b"2025-10-01":
        return "bookworm"
    raise WrongUse(
        "the card does not say which system it holds: give --os bookworm or --os trixie"
        + (f" (it was made on {found.group(1).decode()})" if found else "")
    )


def _package(given: Path | None, wanted: str) -> Path:
    """The agent's package for the board. Raises WrongUse."""
    if given is not None:
        if given.suffix != ".deb":
            raise WrongUse(f"{given} is no Debian package (.deb)")
        return given
    found = sorted(
        Path("dist").glob(f"boardbench-agent_*_{wanted}.deb"), key=lambda path: path.stat().st_mtime
    )
    if not found:
        target = wanted.replace("_", "-")
        raise WrongUse(
            f"there is no package for {target} in ./dist: name it with --package, or build it in the sources "
            f"with `python deploy/build_deb.py {target}`"
        )
    return found[-1]


def _wifi(name: str, country: str, password: str | None) -> Wifi | None:
    from boardbench.cli.first_boot import Wifi, wifi_key

    if not name:
        if country or password:
            raise click.UsageError("--wifi-country and --wifi-password say nothing without --wifi")
        return None
    if not 1 <= len(name.encode()) <= 32:
        raise click.UsageError(f"--wifi: {name!r} is no name of a network (1 to 32 bytes)")
    if not _COUNTRY.fullmatch(country):
        raise click.UsageError(
            "--wifi needs --wifi-country with two capital letters: the radio stays off without"
        )
    if password is None:
        password = click.prompt(f"Password of {name}", hide_input=True, default="", show_default=False)
    try:
        return Wifi(name, wifi_key(name, password) if password else "", country)
    except ValueError as error:
        raise click.UsageError(f"--wifi-password: {error}") from None


def _labels(texts: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise click.UsageError(f"--label: {text!r} is not NAME=VALUE")
        found[name.strip()] = value
    return found


def _check_device(image: Path, *, yes: bool) -> None:
    """Returns when the image is a file, or a disk that may be written. Raises WrongUse."""
    if not image.exists():
        raise WrongUse(f"there is no {image}")
    if image.is_block_device():
        from boardbench.cli.disk import describe

        disk = describe(image)
        if disk.used:
            raise WrongUse(f"{image} ({disk.name}) is in use: {disk.used}; unmount it, or name the right one")
        if not yes:
            click.confirm(f"Write to the boot partition of {image}: {disk.name}?", abort=True, err=True)


def _wait(collector: Address, hostname: str = "") -> ExitCode:
    """Waits until a board reports that had not, or that has been away."""
    import time

    from boardbench.cli.client import CollectorClient

    with CollectorClient(collector) as client:
        before = {device.board.device_id: _seen(device) for device in client.devices()}
        _note(f"waiting for the board to report to {collector} (Ctrl-C ends the wait, and nothing else)")
        deadline = time.monotonic() + _WAIT_SECONDS
        while time.monotonic() < deadline:
            for device in client.devices():
                board = device.board
                # A board that was there all the time is not the one that is switched on now.
                new = board.device_id not in before or (not before[board.device_id] and device.up)
                if new and device.up and hostname in ("", board.hostname):
                    click.echo(f"{board.device_id} reports: {board.model or board.hostname}, {board.os}")
                    return ExitCode.DONE
            time.sleep(_LOOK_SECONDS)
    raise CliError(
        f"no board has reported within {_WAIT_SECONDS / 60:.0f} minutes. Look whether: it has power and a "
        "network (a cable, or --wifi with the right password); boardbench/install.log on the card's boot "
        f'partition ends with "done"; the board reaches {collector} (is that this computer\'s address in the '
        "board's network, and does the collector listen there?); the token was not used before"
    )


def _note(text: str) -> None:
    """For a person; the standard output is a list of files."""
    click.echo(text, err=True)


def _seen(device: collector_pb2.Device) -> bool:
    return device.up


@flash.command()
@click.option("--host", metavar="[USER@]HOST", help="A Jetson that runs and takes SSH.")
@click.option(
    "--rootfs",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="The root file system that NVIDIA's flasher will write (Linux_for_Tegra/rootfs).",
)
@_settings_options
def jetson(
    host: str | None,
    rootfs: Path | None,
    collector: Address,
    token: str,
    labels: tuple[str, ...],
    listen: str,
    package: Path | None,
    dry_run: bool,
    wait: bool,
) -> ExitCode:
    """Install the agent on a Jetson: over SSH, or in the files that NVIDIA's own flasher writes."""
    if (host is None) == (rootfs is None):
        raise click.UsageError("give one of --host and --rootfs")
    make = _order_maker(collector, token, listen, labels)
    if host is not None:
        _over_ssh(host, package, make, dry_run=dry_run)
    else:
        assert rootfs is not None
        from boardbench.cli import remote

        found = remote.python_of(rootfs)
        order = make(_package(package, f"arm64_{found}").read_bytes())
        for line in remote.put_into(rootfs, order, dry_run=dry_run):
            click.echo(line)
        _note("now write the board with NVIDIA's own tool, in Linux_for_Tegra:")
        _note("  sudo ./tools/kernel_flash/l4t_initrd_flash.sh <board> <device>   (or flash.sh)")
    return _wait(collector) if wait and not dry_run else ExitCode.DONE


@flash.command()
@click.option("--host", required=True, metavar="[USER@]HOST", help="The board, which takes SSH.")
@_settings_options
def coral(
    host: str,
    collector: Address,
    token: str,
    labels: tuple[str, ...],
    listen: str,
    package: Path | None,
    dry_run: bool,
    wait: bool,
) -> ExitCode:
    """Install the agent over SSH on the computer that a Coral TPU is in, or on a Coral Dev Board.

    The Dev Board's own Mendel Linux has Python 3.7, which no engine supports any more: there the command
    says so and changes nothing. With a newer Debian on it, it works as on any board.
    """
    _over_ssh(host, package, _order_maker(collector, token, listen, labels), dry_run=dry_run)
    return _wait(collector) if wait and not dry_run else ExitCode.DONE


def _order_maker(
    collector: Address, token: str, listen: str, labels: tuple[str, ...]
) -> Callable[[bytes], Order]:
    from boardbench.cli.first_boot import Order

    given = _labels(labels)
    return lambda package: Order(
        package=package, collector=str(collector), token=token, listen=listen, labels=given
    )


def _over_ssh(host: str, package: Path | None, make: Callable[[bytes], Order], *, dry_run: bool) -> None:
    from boardbench.cli import remote

    program = os.environ.get("BOARDBENCH_SSH", "ssh")
    target = remote.ask(program, host)
    _note(f"{host}: {target.system}, {target.architecture}, Python {target.python}")
    chosen = _package(package, f"{target.architecture}_{target.tag}")
    order = make(chosen.read_bytes())
    if dry_run:
        click.echo(f"would install {chosen.name} on {host}, with these settings:")
        from boardbench.cli.first_boot import settings

        click.echo(_shown(settings(order).encode(), secret=False))
        return
    click.echo(remote.install(program, host, order))
