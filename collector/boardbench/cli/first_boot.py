"""What is put on a Raspberry Pi's boot partition so that its first boot installs the agent, keyboard or none.

Source: raspberrypi/rpi-imager, doc/os_customisation_formats.md. Bookworm, and Trixie until October 2025, run
a script that the kernel's command line names (systemd-run-generator(8)); later ones have cloud-init, which
takes its files from the boot partition (NoCloud). Everything here is bytes in and bytes out; nothing is
written.
"""

from __future__ import annotations

import enum
import hashlib
import json
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from boardbench.cli.errors import CliError

FOLDER = "boardbench"
PACKAGE = f"{FOLDER}/agent.deb"
SUMS = f"{FOLDER}/SHA256SUMS"
SETTINGS = f"{FOLDER}/agent.toml"
ENROLMENT = f"{FOLDER}/enrolment.json"
UPDATE_KEYS = f"{FOLDER}/update.pub"
AUTHORITY = f"{FOLDER}/collector-ca.pem"
INSTALL = f"{FOLDER}/install.sh"
LOG = f"{FOLDER}/install.log"
DONE = f"{FOLDER}/installed"
MAYBE = (ENROLMENT, UPDATE_KEYS, AUTHORITY)
"""Files of a bundle that not every order has, and that an earlier one may have left."""

_AUTHORITY_PLACE = "/etc/boardbench/collector-ca.pem"
_MARK = "# Written by `boardbench flash`."
_BEFORE = f"{FOLDER}/before"
_STARTED_ANEW = "reboots"
_RUN = "systemd.run=/boot/firmware/firstrun.sh"
_TARGET = "systemd.unit=kernel-command-line.target"
_HOSTNAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
_BOUNDARY = "===============boardbench=="


class Format(enum.Enum):
    """How a system takes orders for its first boot."""

    SYSTEMD = "systemd"
    CLOUD_INIT = "cloudinit"


@dataclass(frozen=True)
class Wifi:
    """A wireless network. ``key`` is the 64 digits that the password and the name make; empty: open."""

    name: str
    key: str
    country: str


@dataclass(frozen=True)
class Order:
    """What the board is to become."""

    package: bytes
    collector: str
    token: str = ""
    listen: str = "0.0.0.0:7341"
    labels: Mapping[str, str] = field(default_factory=dict)
    hostname: str = ""
    wifi: Wifi | None = None
    update_keys: bytes = b""
    """Public keys of those who may sign its releases, one a line; empty: what the board has stays."""
    authority: bytes = b""
    """Certificate (PEM) that the collector's must be of; empty: with TLS any that the board trusts."""


@dataclass(frozen=True)
class Plan:
    """Files to be written, by path, those that may not be there, and those whose content is secret."""

    files: Mapping[str, bytes]
    removed: tuple[str, ...]
    stale: tuple[str, ...]
    """What tells of an earlier install: removed when anything else changes."""
    secret: frozenset[str]


def wifi_key(name: str, password: str) -> str:
    """The key in 64 digits that WPA makes of name and password (IEEE 802.11i, H.4), so that the password
    itself is not on the card. Raises ValueError for a password that WPA does not allow.
    """
    if not 8 <= len(password.encode()) <= 63:
        raise ValueError("a Wi-Fi password has 8 to 63 characters")
    return hashlib.pbkdf2_hmac("sha1", password.encode(), name.encode(), 4096, 32).hex()


def detect(read: Callable[[str], bytes | None]) -> Format:
    """The format that a boot partition asks for."""
    if read("user-data") is not None or read("meta-data") is not None:
        return Format.CLOUD_INIT
    return Format.CLOUD_INIT if b"ds=nocloud" in (read("cmdline.txt") or b"") else Format.SYSTEMD


def plan(order: Order, form: Format, read: Callable[[str], bytes | None]) -> Plan:
    """What to write over what is there; the same again when it was written before. Raises CliError."""
    if order.hostname and not _HOSTNAME.fullmatch(order.hostname):
        raise CliError(f"{order.hostname!r} is no hostname: letters, digits and hyphens, at most 63")
    files = bundle(order)
    secret = {ENROLMENT}
    make = _systemd if form is Format.SYSTEMD else _cloud_init
    files.update(make(order, read, files))
    if order.wifi is not None:
        secret.add("firstrun.sh" if form is Format.SYSTEMD else "network-config")
    removed = tuple(path for path in MAYBE if path not in files)
    return Plan(files, removed, (LOG, DONE), frozenset(secret))


def bundle(order: Order) -> dict[str, bytes]:
    """The folder that INSTALL works in, the same for every kind of board."""
    files = {
        PACKAGE: order.package,
        SETTINGS: settings(order).encode(),
        INSTALL: _INSTALL.encode(),
    }
    if order.token:
        files[ENROLMENT] = _json({"collector": order.collector, "token": order.token})
    if order.update_keys:
        files[UPDATE_KEYS] = order.update_keys
    if order.authority:
        files[AUTHORITY] = order.authority
    summed = [path for path in (PACKAGE, UPDATE_KEYS, AUTHORITY) if path in files]
    files[SUMS] = "".join(
        f"{hashlib.sha256(files[path]).hexdigest()}  {path.removeprefix(f'{FOLDER}/')}\n" for path in summed
    ).encode()
    return files


def settings(order: Order) -> str:
    """What goes into /etc/boardbench/agent.d of the board."""
    lines = [_MARK, f"listen = {_quoted(order.listen)}", f"collector = {_quoted(order.collector)}"]
    if order.authority:
        lines.append(f"collector_ca = {_quoted(_AUTHORITY_PLACE)}")
    if order.labels:
        lines += ["", "[labels]"]
        lines += [f"{_quoted(name)} = {_quoted(value)}" for name, value in sorted(order.labels.items())]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A basic string of TOML and a double-quoted one of YAML; both know JSON's escapes, except of pairs."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _json(value: Mapping[str, str]) -> bytes:
    return (json.dumps(value) + "\n").encode()


# The first format: a script.


def _systemd(
    order: Order, read: Callable[[str], bytes | None], _files: Mapping[str, bytes]
) -> dict[str, bytes]:
    words = _command_line(read)
    files: dict[str, bytes] = {}
    before = _kept(read, "firstrun.sh")
    for word in words:
        if word.startswith("systemd.run=") and not word.endswith("/firstrun.sh"):
            raise CliError(
                f"cmdline.txt runs another program at the first boot ({word}); start the card once, or write "
                "its system anew, and flash again"
            )
    if before is not None:
        files[f"{_BEFORE}/firstrun.sh"] = before
    files["firstrun.sh"] = _first_run(order, before is not None).encode()
    rest = [word for word in words if not word.startswith("systemd.run") and word != _TARGET]
    # Not systemd.run_failure_action=reboot: a script that fails would run again, for ever.
    rest += [_RUN, "systemd.run_success_action=reboot", _TARGET]
    files["cmdline.txt"] = " ".join(rest).encode() + b"\n"
    return files


def _first_run(order: Order, before: bool) -> str:
    parts = [f"#!/bin/sh\n{_MARK} Runs once, as root, before the network is there.\nset +e\n", _FIND_BOOT]
    if before:
        parts.append(f'sh "$boot/{_BEFORE}/firstrun.sh"\n')
    if order.hostname:
        # Letters, digits and hyphens: nothing in it means anything to a shell or to sed.
        parts.append(
            f"echo {order.hostname} >/etc/hostname\n"
            f"sed -i 's/^127\\.0\\.1\\.1.*/127.0.1.1\\t{order.hostname}/' /etc/hosts\n"
        )
    if order.wifi is not None:
        parts.append(_wifi_script(order.wifi))
    parts.append(
        f'sh "$boot/{INSTALL}" {_STARTED_ANEW}\n'
        'rm -f "$boot/firstrun.sh"\n'
        "sed -i 's| systemd\\.run[^ ]*||g; s| systemd\\.unit=kernel-command-line\\.target||g' "
        '"$boot/cmdline.txt"\n'
        "sync\nexit 0\n"
    )
    return "".join(parts)


_FIND_BOOT = "boot=/boot/firmware\n[ -e $boot/cmdline.txt ] || boot=/boot\n"


def _wifi_script(wifi: Wifi) -> str:
    """NetworkManager's own file (nm-settings-keyfile(5)), and the country that opens the radio."""
    security = f"\n[wifi-security]\nkey-mgmt=wpa-psk\npsk={wifi.key}\n" if wifi.key else ""
    # As a list of bytes a name may hold anything.
    name = "".join(f"{byte};" for byte in wifi.name.encode())
    return (
        "connections=/etc/NetworkManager/system-connections\n"
        "mkdir -p $connections\n"
        "(umask 077; cat >$connections/boardbench-wifi.nmconnection) <<'END'\n"
        "[connection]\nid=boardbench-wifi\ntype=wifi\nautoconnect=true\n\n"
        f"[wifi]\nmode=infrastructure\nssid={name}\n{security}\n"
        "[ipv4]\nmethod=auto\n\n[ipv6]\nmethod=auto\nEND\n"
        f"raspi-config nonint do_wifi_country {shlex.quote(wifi.country)} || true\n"
        "rfkill unblock wifi || true\n"
    )


# The second format: cloud-init.


def _cloud_init(
    order: Order, read: Callable[[str], bytes | None], files: Mapping[str, bytes]
) -> dict[str, bytes]:
    made: dict[str, bytes] = {}
    before = _kept(read, "user-data")
    ours = _user_data(order)
    if before is not None and _is_active(before):
        made[f"{_BEFORE}/user-data"] = before
        made["user-data"] = _both(before, ours, order).encode()
    else:
        made["user-data"] = ours.encode()
    if order.wifi is not None:
        network = _kept(read, "network-config")
        if network is not None and _is_active(network):
            made[f"{_BEFORE}/network-config"] = network
        made["network-config"] = _network(order.wifi).encode()
    digest = hashlib.sha256()
    for path, data in sorted({**files, **made}.items()):
        digest.update(f"{path} {hashlib.sha256(data).hexdigest()}\n".encode())
    # A new one whenever something is different: cloud-init then takes the board as one that never booted.
    instance = f"boardbench-{digest.hexdigest()[:16]}"
    kept = [
        line
        for line in _text(read("meta-data") or b"").splitlines()
        if not re.match(r"\s*instance[-_]id\s*:", line)
    ]
    made["meta-data"] = ("\n".join([f"instance-id: {instance}", *kept]) + "\n").encode()
    words = [word for word in _command_line(read) if not word.startswith("ds=nocloud")]
    # Without it, what cloud-init kept counts as another board's at every boot.
    made["cmdline.txt"] = " ".join([*words, f"ds=nocloud;i={instance}"]).encode() + b"\n"
    return made


def _user_data(order: Order) -> str:
    lines = ["#cloud-config", _MARK]
    if order.hostname:
        lines += [f"hostname: {_quoted(order.hostname)}", "manage_etc_hosts: true"]
    # cloud-init may come before the partition is mounted (canonical/cloud-init#6614).
    command = (
        f"mountpoint -q /boot/firmware || mount /boot/firmware || true; exec sh /boot/firmware/{INSTALL}"
    )
    lines += ["runcmd:", f"  - [sh, -c, {_quoted(command)}]"]
    return "\n".join(lines) + "\n"


def _network(wifi: Wifi) -> str:
    point = f"{{password: {_quoted(wifi.key)}}}" if wifi.key else "{}"
    return (
        f"{_MARK}\n"
        "network:\n"
        "  version: 2\n"
        "  ethernets:\n"
        "    eth0:\n"
        "      dhcp4: true\n"
        "      optional: true\n"
        "  wifis:\n"
        "    wlan0:\n"
        "      dhcp4: true\n"
        "      optional: true\n"
        f"      regulatory-domain: {_quoted(wifi.country)}\n"
        "      access-points:\n"
        f"        {_quoted(wifi.name)}: {point}\n"
    )


def _both(before: bytes, ours: str, order: Order) -> str:
    """What was there and ours, one behind the other, as cloud-init takes several (MIME multipart)."""
    text = _text(before)
    if text.startswith("#!"):
        kind = "text/x-shellscript"
    elif text.startswith("#cloud-config\n"):
        kind = "text/cloud-config"
    else:
        raise CliError(
            "user-data on the card is neither a cloud-config nor a script, and boardbench can't add to it: "
            "take it away, or write the system anew, and flash again"
        )
    if order.hostname and re.search(r"^hostname\s*:", text, re.MULTILINE):
        raise CliError("user-data on the card names a hostname already: leave --hostname out")
    return (
        f'Content-Type: multipart/mixed; boundary="{_BOUNDARY}"\n'
        "MIME-Version: 1.0\n"
        f"X-Boardbench: {_MARK}\n\n"
        f'--{_BOUNDARY}\nContent-Type: {kind}; charset="utf-8"\n\n{text.rstrip()}\n'
        f'--{_BOUNDARY}\nContent-Type: text/cloud-config; charset="utf-8"\n'
        # Lists of commands are put behind each other instead of one in the place of the other.
        "Merge-Type: list(append)+dict(no_replace,recurse_list)+str()\n\n"
        f"{ours}--{_BOUNDARY}--\n"
    )


def _is_active(data: bytes) -> bool:
    """Whether it says anything beside comments."""
    text = _text(data)
    return text.startswith("#!") or any(
        line.strip() and not line.lstrip().startswith("#") for line in text.splitlines()
    )


def _text(data: bytes) -> str:
    """What somebody has written, on Windows perhaps: without its mark of UTF-8 and its line ends, which a
    shell and cloud-init stumble over.
    """
    return data.decode("utf-8-sig", "replace").replace("\r\n", "\n")


# What was there.


def _kept(read: Callable[[str], bytes | None], path: str) -> bytes | None:
    """What somebody else has put there, also when ours stands in its place by now; None for nothing."""
    found = read(path)
    if found is not None and _MARK.encode() not in found:
        return found
    return read(f"{_BEFORE}/{path}") if found is not None else None


def _command_line(read: Callable[[str], bytes | None]) -> list[str]:
    data = read("cmdline.txt")
    if data is None:
        raise CliError("there is no cmdline.txt: this is no boot partition of a Raspberry Pi")
    words = _text(data).split()
    if not any(word.startswith("root=") for word in words):
        raise CliError(
            "cmdline.txt names no root=: this is no boot partition of a Raspberry Pi, or it is damaged"
        )
    return words


_INSTALL = f"""\
#!/bin/sh
{_MARK} Installs the agent; runs once, as root, at the first boot.
# What it did stands in install.log beside it, to be read with the card in any computer.
# Its argument "{_STARTED_ANEW}": the board starts anew behind it, and the agent with the board.
here=$(cd "$(dirname "$0")" && pwd)
state=/var/lib/boardbench
behind=$1
[ -e "$here/installed" ] && exit 0

hand_over() {{
    if [ -f update.pub ]; then
        install -m 0644 update.pub /etc/boardbench/update.pub || return 1
    fi
    if [ -f collector-ca.pem ]; then
        install -m 0644 collector-ca.pem {_AUTHORITY_PLACE} || return 1
    fi
    if [ -f enrolment.json ]; then
        install -m 0600 -o boardbench -g boardbench enrolment.json "$state/enrolment-pending.json" || return 1
        sync
        # The token is on the card no longer than it must be.
        # Over itself, since what is written anew lies elsewhere and leaves the old bytes where they are.
        dd if=/dev/zero of=enrolment.json bs=1 "count=$(wc -c <enrolment.json)" conv=notrunc 2>/dev/null
        sync
        rm -f enrolment.json
    fi
}}

install_agent() {{
    echo "began at $(date -u +%Y-%m-%dT%H:%M:%SZ), $(cut -d' ' -f1 /proc/uptime) s after the start"
    cd "$here" || return 1
    if ! sha256sum -c SHA256SUMS; then
        echo "what is on the card is damaged: flash it again"
        return 1
    fi
    mkdir -p /etc/boardbench/agent.d
    install -m 0644 agent.toml /etc/boardbench/agent.d/50-flash.toml || return 1
    # The package does not start the agent, which has no token yet: it is started once, below.
    if ! BOARDBENCH_NO_START=1 DEBIAN_FRONTEND=noninteractive dpkg --force-confold -i agent.deb; then
        echo "dpkg refused the package: what it wrote above says why (a package for another system?)"
        return 1
    fi
    hand_over
    code=$?
    # Also when something of that went wrong: its program is another one now.
    if [ "$behind" != "{_STARTED_ANEW}" ] && [ -d /run/systemd/system ]; then
        systemctl restart --no-block boardbench-agent.service
    fi
    [ $code = 0 ] || return $code
    echo "done $(cut -d' ' -f1 /proc/uptime) s after the start"
    : >installed
}}

install_agent >"$here/install.log" 2>&1
code=$?
sync
exit $code
"""
