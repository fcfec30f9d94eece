"""What a flashed card holds, byte for byte, and what a shell, systemd's words and cloud-init say to it.

Disks are in test_flash_disk.py, Raspberry Pi Imager in test_flash_imager.py.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner, Result

from boardbench.cli import first_boot
from boardbench.cli.errors import CliError
from boardbench.cli.first_boot import Format, Order, Wifi, wifi_key
from boardbench.cli.flash import flash

GOLDEN = Path(__file__).parent / "golden" / "flash"
REPOSITORY = Path(__file__).resolve().parent.parent.parent
ORDER = Order(
    package=b"!<arch>\na package",
    collector="collector.lab:7342",
    token="bbt_token",
    labels={"lab": "zürich 🏔", 'odd "name"': "a\\b"},
    hostname="pi-01",
    wifi=Wifi("Café 'net'", wifi_key("Café 'net'", "geheimes Wort"), "CH"),
    update_keys=b"boardbench-ed25519 11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo= fleet\n",
    authority=b"-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n",
)
BOOKWORM = {
    "cmdline.txt": b"console=serial0,115200 console=tty1 root=PARTUUID=4e639091-02 rootwait\n",
    "config.txt": b"dtparam=audio=on\n",
    "issue.txt": b"Raspberry Pi reference 2025-05-13\nGenerated using pi-gen\n",
}
TRIXIE = BOOKWORM | {
    "issue.txt": b"Raspberry Pi reference 2025-12-04\nGenerated using pi-gen\n",
    "user-data": b"#cloud-config\n# Everything here is commented out.\n",
    "meta-data": b"# comment\ninstance_id: rpios-image\n",
    "network-config": b"# network:\n",
}


def planned(order: Order, form: Format, before: dict[str, bytes]) -> dict[str, bytes]:
    """The card after it was flashed."""
    plan = first_boot.plan(order, form, before.get)
    after = {path: data for path, data in before.items() if path not in (*plan.removed, *plan.stale)}
    return after | dict(plan.files)


@pytest.mark.parametrize(("form", "before"), [(Format.SYSTEMD, BOOKWORM), (Format.CLOUD_INIT, TRIXIE)])
def test_the_files_are_these(form: Format, before: dict[str, bytes]) -> None:
    after = planned(ORDER, form, before)
    changed = sorted(path for path in after if after[path] != before.get(path))
    shown = "".join(f"=== {path}\n{after[path].decode()}" for path in changed if path != first_boot.PACKAGE)
    golden = GOLDEN / f"{form.value}.txt"
    if os.environ.get("BOARDBENCH_WRITE_GOLDEN"):
        golden.write_text(shown)
    assert shown == golden.read_text()
    for path, data in after.items():
        if path != first_boot.PACKAGE:
            assert b"\r" not in data, path


@pytest.mark.parametrize(("form", "before"), [(Format.SYSTEMD, BOOKWORM), (Format.CLOUD_INIT, TRIXIE)])
def test_the_same_again_changes_nothing_and_another_order_everything_needed(
    form: Format, before: dict[str, bytes]
) -> None:
    once = planned(ORDER, form, before)
    assert planned(ORDER, form, once) == once
    other = Order(package=b"!<arch>\nnewer", collector="other:1")
    again = planned(other, form, once)
    assert again[first_boot.PACKAGE] == b"!<arch>\nnewer"
    assert not set(first_boot.MAYBE) & set(again) and set(first_boot.MAYBE) <= set(once)
    assert again[first_boot.SUMS].count(b"\n") == 1
    assert again["cmdline.txt"].count(b"systemd.run=") == (form is Format.SYSTEMD)
    assert again["cmdline.txt"].count(b"ds=nocloud") == (form is Format.CLOUD_INIT)
    if form is Format.CLOUD_INIT:
        # Another instance: cloud-init does it all again.
        assert again["meta-data"] != once["meta-data"]


def test_the_format_is_told_by_the_card() -> None:
    assert first_boot.detect(BOOKWORM.get) is Format.SYSTEMD
    assert first_boot.detect(TRIXIE.get) is Format.CLOUD_INIT
    assert first_boot.detect({"cmdline.txt": b"root=/dev/x ds=nocloud;i=1"}.get) is Format.CLOUD_INIT


def test_what_imager_put_there_runs_first() -> None:
    imager = BOOKWORM | {
        "firstrun.sh": b"#!/bin/bash\nset +e\nrm -f /boot/firstrun.sh\nexit 0\n",
        "cmdline.txt": b"root=/dev/mmcblk0p2 systemd.run=/boot/firstrun.sh systemd.run_success_action=reboot "
        b"systemd.unit=kernel-command-line.target\n",
    }
    once = planned(ORDER, Format.SYSTEMD, imager)
    assert once["boardbench/before/firstrun.sh"] == imager["firstrun.sh"]
    script = once["firstrun.sh"].decode()
    assert script.index("before/firstrun.sh") < script.index("install.sh")
    assert once["cmdline.txt"].count(b"systemd.run=") == 1
    assert planned(ORDER, Format.SYSTEMD, once) == once


def test_another_program_of_the_first_boot_is_not_taken_away() -> None:
    other = BOOKWORM | {"cmdline.txt": b"root=/dev/sda2 systemd.run=/boot/mine.sh\n"}
    with pytest.raises(CliError, match=r"systemd\.run=/boot/mine\.sh"):
        first_boot.plan(ORDER, Format.SYSTEMD, other.get)


def test_user_data_of_somebody_else_is_kept_beside_ours() -> None:
    theirs = b"#cloud-config\nssh_pwauth: true\nruncmd:\n  - [touch, /theirs]\n"
    order = Order(package=b"!<arch>\n", collector="c:1")
    once = planned(order, Format.CLOUD_INIT, TRIXIE | {"user-data": theirs})
    text = once["user-data"].decode()
    assert text.startswith("Content-Type: multipart/mixed; boundary=")
    assert theirs.decode().rstrip() in text
    assert text.count("install.sh") == 1
    assert planned(order, Format.CLOUD_INIT, once) == once
    script = planned(order, Format.CLOUD_INIT, TRIXIE | {"user-data": b"#!/bin/sh\ntouch /theirs\n"})
    assert b"text/x-shellscript" in script["user-data"]
    with pytest.raises(CliError, match="neither a cloud-config nor a script"):
        planned(order, Format.CLOUD_INIT, TRIXIE | {"user-data": b"something: else\n"})
    with pytest.raises(CliError, match="names a hostname already"):
        planned(ORDER, Format.CLOUD_INIT, TRIXIE | {"user-data": b"#cloud-config\nhostname: theirs\n"})


def test_what_was_written_on_windows_is_understood() -> None:
    """Notepad marks UTF-8, and ends lines its own way."""
    mark = b"\xef\xbb\xbf"
    theirs = mark + b"#cloud-config\r\nssh_pwauth: true\r\n"
    made = planned(ORDER, Format.CLOUD_INIT, TRIXIE | {"user-data": theirs})["user-data"]
    assert b'text/cloud-config; charset="utf-8"\n\n#cloud-config\nssh_pwauth: true\n' in made
    assert b"\r" not in made and mark not in made
    comments = TRIXIE | {"user-data": mark + b"#cloud-config\r\n# nothing\r\n"}
    assert planned(ORDER, Format.CLOUD_INIT, comments)["user-data"].startswith(b"#cloud-config\n# Written by")
    numbered = planned(ORDER, Format.CLOUD_INIT, TRIXIE | {"meta-data": mark + b"instance-id: a\r\nx: y\r\n"})
    assert numbered["meta-data"].endswith(b"\nx: y\n") and numbered["meta-data"].count(b"instance") == 1
    line = mark + BOOKWORM["cmdline.txt"].rstrip() + b"\r\n"
    after = planned(ORDER, Format.SYSTEMD, BOOKWORM | {"cmdline.txt": line})
    assert after == planned(ORDER, Format.SYSTEMD, BOOKWORM)


@pytest.mark.parametrize("text", [b"", b"console=tty1 quiet\n"])
def test_what_is_no_command_line_of_a_pi_is_refused(text: bytes) -> None:
    with pytest.raises(CliError, match="no boot partition"):
        first_boot.plan(ORDER, Format.SYSTEMD, (BOOKWORM | {"cmdline.txt": text}).get)


@pytest.mark.parametrize("name", ["-pi", "pi_1", "a" * 64, "pi;reboot", "pi\nx", "pi."])
def test_what_is_no_hostname_is_refused(name: str) -> None:
    with pytest.raises(CliError, match="no hostname"):
        first_boot.plan(Order(package=b"", collector="c:1", hostname=name), Format.SYSTEMD, BOOKWORM.get)


def test_the_key_of_a_network_is_that_of_the_standard() -> None:
    # IEEE 802.11i-2004, H.4.3, test case 1.
    assert wifi_key("IEEE", "password") == "f42c6fc52df0ebef9ebb4b90b38a5f902e83fe1b135a70e23aed762e9710a12e"
    with pytest.raises(ValueError, match="8 to 63"):
        wifi_key("IEEE", "short")


def test_the_boards_settings_are_what_was_asked_for(tmp_path: Path) -> None:
    from boardbench.agent.config import load

    path = tmp_path / "agent.toml"
    path.write_text(first_boot.settings(ORDER), encoding="utf-8")
    config = load(path, {})
    assert (config.listen, config.collector) == ("0.0.0.0:7341", "collector.lab:7342")
    assert config.collector_ca == "/etc/boardbench/collector-ca.pem"
    assert config.labels == ORDER.labels


@pytest.mark.parametrize("shell", ["dash", "bash"])
def test_shells_understand_the_scripts(shell: str, tmp_path: Path) -> None:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"there is no {shell} here")
    after = planned(ORDER, Format.SYSTEMD, BOOKWORM)
    for name in ("firstrun.sh", first_boot.INSTALL):
        script = tmp_path / "script.sh"
        script.write_bytes(after[name])
        done = subprocess.run([program, "-n", script], capture_output=True, check=False)
        assert done.returncode == 0, done.stderr


def test_cloud_init_takes_the_files(tmp_path: Path) -> None:
    places = [
        *REPOSITORY.glob(".cache/system/usr/lib/python3/dist-packages/cloudinit"),
        *REPOSITORY.glob(".cache/board/*/root/usr/lib/python3/dist-packages/cloudinit"),
    ]
    if not places:
        pytest.skip("cloud-init is not here: `make test` unpacks it where there is apt")
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(places[0].parent),
        "PYTHONWARNINGS": "ignore",
    }
    # Debian's modules are made for Debian's Python; another one may lack what they import.
    python = "/usr/bin/python3" if Path("/usr/bin/python3").exists() else sys.executable
    check = [python, "-c", "import cloudinit.cmd.main"]
    if (
        told := subprocess.run(check, env=environment, capture_output=True, text=True, check=False)
    ).returncode:
        pytest.skip(f"cloud-init does not run under {python}: {told.stderr.strip()[-200:]}")

    def schema(kind: str, data: bytes) -> subprocess.CompletedProcess[str]:
        file = tmp_path / kind
        file.write_bytes(data)
        return subprocess.run(
            [python, "-m", "cloudinit.cmd.main", "schema", "--config-file", file],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

    after = planned(ORDER, Format.CLOUD_INIT, TRIXIE)
    done = schema("user-data", after["user-data"])
    assert done.returncode == 0 and "Valid" in done.stdout, done.stdout + done.stderr
    # The judge is awake.
    assert schema("user-data", b"#cloud-config\nruncmd: 7\n").returncode != 0
    # Together with somebody else's, as cloud-init itself puts the parts together.
    theirs = b"#cloud-config\nssh_pwauth: true\nruncmd:\n  - [touch, /theirs]\n"
    order = Order(package=b"", collector="c:1")
    both = planned(order, Format.CLOUD_INIT, TRIXIE | {"user-data": theirs})["user-data"]
    (tmp_path / "both").write_bytes(both)
    done = subprocess.run(
        [python, "-c", _MERGE, tmp_path / "both"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "True"
    assert lines[1] == "['touch', '/theirs']"
    assert "install.sh" in lines[2]
    assert len(lines) == 3


# What cloud-init's own handler of cloud-config makes of several parts (cloudinit/handlers/cloud_config.py).
_MERGE = """
import sys, yaml
from cloudinit import helpers, user_data, util
from cloudinit.handlers.cloud_config import CloudConfigPartHandler
paths = helpers.Paths({"cloud_dir": "/nonexistent", "run_dir": "/nonexistent"})
message = user_data.UserDataProcessor(paths).process(open(sys.argv[1]).read())
made = CloudConfigPartHandler(paths)
for part in message.walk():
    if part.get_content_maintype() == "multipart":
        continue
    kind = part.get_content_type()
    if kind == "text/cloud-config":
        made.handle_part(None, kind, part.get_filename(), util.fully_decoded_payload(part), None, dict(part))
config = made.cloud_buf
print(config["ssh_pwauth"])
for command in config["runcmd"]:
    print(command)
"""


# The command.


@pytest.fixture
def card(tmp_path: Path) -> Path:
    folder = tmp_path / "bootfs"
    folder.mkdir()
    for name, data in BOOKWORM.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def package(tmp_path: Path, release_packages: ModuleType) -> Path:
    return Path(release_packages.build(tmp_path, "0.1.0", {"release.json": "{}"}))


@pytest.fixture
def update_key(tmp_path: Path, release_packages: ModuleType) -> Path:
    path = tmp_path / "fleet-key.pub"
    path.write_text(release_packages.Signer().public_line)
    return path


def run(*arguments: object, code: int | None = 0, **environment: str) -> Result:
    answer = CliRunner().invoke(flash, [str(argument) for argument in arguments], env=environment)
    if code is not None:
        assert (answer.exit_code == code) or answer.return_value == code, answer.output
    return answer


def tree(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_dry_run_shows_every_file_and_no_secret_and_writes_none(
    card: Path, package: Path, update_key: Path
) -> None:
    before = tree(card)
    answer = run(
        "pi", "--boot", card, "--package", package, "--collector", "lab:1", "--token", "bbt_secret",
        "--wifi", "net", "--wifi-country", "CH", "--update-key", update_key, "--dry-run",
        BOARDBENCH_WIFI_PASSWORD="geheimes Wort",
    )  # fmt: skip
    assert tree(card) == before
    for name in (
        "firstrun.sh",
        "cmdline.txt",
        first_boot.PACKAGE,
        first_boot.ENROLMENT,
        first_boot.UPDATE_KEYS,
    ):
        assert name in answer.output
    assert update_key.read_text().strip() in answer.output
    for secret in ("bbt_secret", "geheimes", wifi_key("net", "geheimes Wort")):
        assert secret not in answer.output


def test_a_card_is_written_once(card: Path, package: Path) -> None:
    arguments = ("pi", "--boot", card, "--package", package, "--collector", "lab", "--token", "bbt_secret")
    answer = run(*arguments)
    assert "written" in answer.output and "ready for bookworm" in answer.output
    assert '"collector": "lab:7342"' in (card / first_boot.ENROLMENT).read_text()
    once = tree(card)
    stamps = {path: path.stat().st_mtime_ns for path in card.rglob("*")}
    answer = run(*arguments)
    assert "written" not in answer.output
    assert tree(card) == once
    assert {path: path.stat().st_mtime_ns for path in card.rglob("*")} == stamps
    # As after a first boot: the same again leaves it, another order begins anew.
    (card / first_boot.LOG).write_text("done")
    (card / first_boot.DONE).touch()
    run(*arguments)
    assert (card / first_boot.DONE).exists()
    run(*arguments, "--label", "a=b")
    assert not (card / first_boot.DONE).exists()


@pytest.mark.parametrize("before", [BOOKWORM, TRIXIE], ids=["systemd", "cloudinit"])
def test_the_key_for_updates_comes_onto_the_card_and_off_it(
    before: dict[str, bytes], tmp_path: Path, release_packages: ModuleType, update_key: Path
) -> None:
    card = tmp_path / "bootfs"
    card.mkdir()
    for name, data in before.items():
        (card / name).write_bytes(data)
    tag = "cp313" if before is TRIXIE else "cp311"
    package = release_packages.build(tmp_path, "0.1.0", {}, tag=tag)
    arguments = ("pi", "--boot", card, "--package", package, "--collector", "lab", "--token", "bbt_secret")
    # As an editor of Windows leaves it.
    update_key.write_bytes(b"\xef\xbb\xbf" + update_key.read_bytes().replace(b"\n", b"\r\n"))
    run(*arguments, "--update-key", update_key)
    keys = (card / first_boot.UPDATE_KEYS).read_bytes()
    assert keys == update_key.read_bytes().removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n")
    assert f"{hashlib.sha256(keys).hexdigest()}  update.pub" in (card / first_boot.SUMS).read_text()
    # Without it, and without the token: neither stays, though the rest is as it was.
    answer = run(*arguments[:-2])
    assert not (card / first_boot.UPDATE_KEYS).exists() and not (card / first_boot.ENROLMENT).exists()
    assert f"removed                       {first_boot.UPDATE_KEYS}" in answer.output
    assert "written" not in run(*arguments[:-2]).output


def test_what_is_no_key_for_updates_is_refused(card: Path, package: Path, tmp_path: Path) -> None:
    given = ("pi", "--boot", card, "--package", package, "--collector", "lab", "--update-key")
    file = tmp_path / "key"
    for content, words in {
        b"": "holds no key",
        b"# a comment\n": "holds no key",
        b"ssh-ed25519 AAAA\n": "line 1 is no public key",
        b"-----BEGIN PRIVATE KEY-----\nMC4\n": "the private half, which no board may ever have",
        b"\xff\xfe\0": "no public key",
    }.items():
        file.write_bytes(content)
        assert words in error_of(*given, file)
    assert tree(card).keys() == BOOKWORM.keys()


def test_the_collectors_authority_comes_onto_the_card(card: Path, package: Path, tmp_path: Path) -> None:
    authority = tmp_path / "lab-ca.pem"
    authority.write_bytes(ORDER.authority)
    given = ("pi", "--boot", card, "--package", package, "--token", "bbt_x", "--collector")
    run(*given, "lab", "--ca", authority)
    assert (card / first_boot.AUTHORITY).read_bytes() == ORDER.authority
    settings = (card / first_boot.SETTINGS).read_text()
    assert 'collector = "tls://lab:7342"\ncollector_ca = "/etc/boardbench/collector-ca.pem"\n' in settings
    assert '"collector": "tls://lab:7342"' in (card / first_boot.ENROLMENT).read_text()
    # One that the board's own system trusts.
    run(*given, "tls://collector.example:443")
    assert not (card / first_boot.AUTHORITY).exists()
    assert 'collector = "tls://collector.example:443"\n' in (card / first_boot.SETTINGS).read_text()
    authority.write_bytes(b"something else")
    assert "holds no certificate" in run(*given, "lab", "--ca", authority, code=2).output


def test_the_collectors_own_key_does_not_come_onto_a_card(card: Path, package: Path, tmp_path: Path) -> None:
    both = tmp_path / "collector.pem"
    both.write_bytes(ORDER.authority + b"-----BEGIN EC PRIVATE KEY-----\nMC4\n-----END EC PRIVATE KEY-----\n")
    given = ("pi", "--boot", card, "--package", package, "--collector", "lab", "--ca", both)
    assert f"{both} holds a private key, too, which no board may ever have" in error_of(*given)
    assert tree(card).keys() == BOOKWORM.keys()


def test_where_the_agent_listens_is_written_whole(card: Path, package: Path) -> None:
    """The agent takes no address without a port."""
    from boardbench.agent.config import load

    given = ("pi", "--boot", card, "--package", package, "--collector", "lab")
    for options, listen in {
        (): "0.0.0.0:7341",
        ("--listen", "127.0.0.1"): "127.0.0.1:7341",
        ("--listen", "::"): "[::]:7341",
        ("--listen", "[::1]:9"): "[::1]:9",
    }.items():
        run(*given, *options)
        assert load(card / first_boot.SETTINGS, {}).listen == listen


class FirstBoot:
    """install.sh as it is, but for where it looks for systemd, with programs in the place of root's own."""

    def __init__(self, folder: Path, order: Order) -> None:
        self.card = folder / "card"
        for path, data in first_boot.bundle(order).items():
            (self.card / path).parent.mkdir(parents=True, exist_ok=True)
            (self.card / path).write_bytes(data)
        (folder / "systemd").mkdir()
        script = self.card / first_boot.INSTALL
        script.write_text(script.read_text().replace("/run/systemd/system", str(folder / "systemd")))
        self._done = folder / "done"
        self._programs = folder / "programs"
        self._programs.mkdir()
        for name in ("dpkg", "install", "systemctl"):
            self.says(name, f'echo "{name} $* ${{BOARDBENCH_NO_START:+not started}}" >>"{self._done}"')
        self.says("mkdir", "exit 0")

    def says(self, name: str, text: str) -> None:
        (self._programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (self._programs / name).chmod(0o755)

    def run(self, *arguments: str) -> int:
        environment = {"PATH": f"{self._programs}:{os.environ['PATH']}"}
        command = ["sh", self.card / first_boot.INSTALL, *arguments]
        return subprocess.run(command, env=environment, check=False).returncode

    def log(self) -> str:
        return (self.card / first_boot.LOG).read_text()

    def done(self) -> list[str]:
        """What the programs were asked for."""
        return [line.rstrip() for line in self._done.read_text().splitlines()]


def test_the_first_boot_installs_what_it_is_to_trust(tmp_path: Path, update_key: Path) -> None:
    order = Order(
        package=b"!<arch>\n", collector="c:1", update_keys=update_key.read_bytes(), authority=ORDER.authority
    )
    boot = FirstBoot(tmp_path, order)
    assert boot.run() == 0, boot.log()
    for name in ("update.pub", "collector-ca.pem"):
        assert f"install -m 0644 {name} /etc/boardbench/{name}" in boot.done()
        assert f"{name}: OK" in boot.log()
    # A key that the card has damaged is none that a board trusts.
    (boot.card / first_boot.DONE).unlink()
    (boot.card / first_boot.UPDATE_KEYS).write_bytes(b"something else")
    assert boot.run() == 1
    assert "flash it again" in boot.log()


def test_the_first_boot_starts_the_agent_once_and_with_all_that_it_gets(tmp_path: Path) -> None:
    boot = FirstBoot(tmp_path, ORDER)
    assert boot.run() == 0, boot.log()
    done = boot.done()
    assert done[1] == "dpkg --force-confold -i agent.deb not started"
    assert done[-1] == "systemctl restart --no-block boardbench-agent.service"
    assert done[-2].endswith("enrolment.json /var/lib/boardbench/enrolment-pending.json")
    assert [line for line in done if "systemctl" in line] == done[-1:]
    assert not (boot.card / first_boot.ENROLMENT).exists()


def test_a_first_boot_that_starts_the_board_anew_does_not_start_the_agent(tmp_path: Path) -> None:
    """The script of the first format, whose end is a reboot; the second has none."""
    (word,) = (
        line.rpartition('" ')[2]
        for line in planned(ORDER, Format.SYSTEMD, BOOKWORM)["firstrun.sh"].decode().splitlines()
        if "install.sh" in line
    )
    boot = FirstBoot(tmp_path, ORDER)
    assert boot.run(word) == 0, boot.log()
    assert not [line for line in boot.done() if "systemctl" in line]
    assert b'/install.sh"' in planned(ORDER, Format.CLOUD_INIT, TRIXIE)["user-data"]


def test_an_agent_that_was_there_before_is_started_anew_also_when_its_files_are_not(tmp_path: Path) -> None:
    boot = FirstBoot(tmp_path, ORDER)
    boot.says("install", 'case "$*" in *update.pub*) echo "disk full"; exit 1;; esac')
    assert boot.run() == 1
    assert "disk full" in boot.log() and "\ndone" not in boot.log()
    assert boot.done()[-1] == "systemctl restart --no-block boardbench-agent.service"
    assert (boot.card / first_boot.ENROLMENT).exists() and not (boot.card / first_boot.DONE).exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "give one of --image, --boot and --device"),
        (("--image", "x", "--boot", "."), "give one of --image, --boot and --device"),
        (("--device", "x", "--boot", "."), "give one of --image, --boot and --device"),
        (("--boot", ".", "--os-list", "x"), "--os-list is of an image"),
        (("--image", "x", "--device", "y", "--os-list", "x"), "--os-list is of an image"),
        (("--boot", ".", "--yes", "x"), "--yes says nothing without --device"),
        (("--boot", ".", "--wifi-country", "CH"), "without --wifi"),
        (("--boot", ".", "--wifi", "net"), "--wifi-country"),
        (("--boot", ".", "--wifi", "net", "--wifi-country", "ch"), "--wifi-country"),
        (("--boot", ".", "--wifi", "n" * 33, "--wifi-country", "CH"), "no name of a network"),
        (("--boot", ".", "--wifi", "n", "--wifi-country", "CH", "--wifi-password", "short"), "8 to 63"),
        (("--boot", ".", "--label", "nothing", "--os", "bookworm"), "NAME=VALUE"),
        (("--boot", ".", "--label", "a=1", "--label", "a=2"), "'a' is given twice"),
        # With these the agent would not start.
        (("--boot", ".", "--label", f"a={'x' * 129}"), "at most 128 characters"),
        (("--boot", ".", "--label", "a=b\x07c"), "must be printable"),
        (("--boot", ".", "--listen", "everywhere:http"), "'http' in 'everywhere:http' is not a port"),
        # As Python has bytes that are not of the terminal's encoding.
        (("--boot", ".", "--label", "lab=Z\udcfcrich", "--os", "bookworm"), "is not UTF-8"),
        (("--boot", ".", "--wifi", "Caf\udce9", "--wifi-country", "CH"), "is not UTF-8"),
    ],
)
def test_wrong_use_is_told(card: Path, package: Path, arguments: tuple[str, ...], words: str) -> None:
    given = [str(card) if argument == "." else argument for argument in arguments]
    answer = run("pi", "--collector", "c", "--package", package, *given, code=2)
    assert words in answer.output
    assert tree(card).keys() == BOOKWORM.keys()


def error_of(*arguments: object, **environment: str) -> str:
    answer = run(*arguments, code=None, **environment)
    assert isinstance(answer.exception, CliError), answer.output
    return str(answer.exception)


def test_what_can_not_be_flashed_is_told(
    card: Path, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("--collector", "c", "--package", package)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "there is no cmdline.txt in it" in error_of("pi", "--boot", empty, *given)
    assert "there is no " in error_of("pi", "--image", tmp_path / "none.img", *given)
    # As the raw disks of macOS, which are no block devices either.
    assert "is no file with an image" in error_of("pi", "--image", os.devnull, *given)
    (card / "issue.txt").write_bytes(b"Raspberry Pi reference 2025-11-24\n")
    assert "give --os" in error_of("pi", "--boot", card, *given)
    monkeypatch.chdir(tmp_path)
    assert "build_deb.py arm64-cp313" in error_of("pi", "--boot", card, "--os", "trixie", "--collector", "c")
    (tmp_path / "agent.zip").touch()
    assert "is no package of the agent: this is no Debian package" in error_of(
        "pi", "--boot", card, "--os", "trixie", "--collector", "c", "--package", tmp_path / "agent.zip"
    )
    assert "is for arm64, cp311, and the board needs arm64, cp313" in error_of(
        "pi", "--boot", card, "--os", "trixie", *given
    )


def test_a_collector_that_no_board_can_reach_is_told(card: Path, package: Path) -> None:
    given = ("pi", "--boot", card, "--package", package)
    for address in ("localhost", "127.0.0.1:7342", "[::1]:7342"):
        assert "is the board itself to a board" in run(*given, "--collector", address).output
    assert "is the board itself" not in run(*given, "--collector", "192.168.1.10").output


def test_a_package_in_dist_is_found(card: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dist").mkdir()
    for name in ("boardbench-agent_0.1.0_arm64_cp311.deb", "boardbench-agent_0.1.0_arm64_cp313.deb"):
        (tmp_path / "dist" / name).write_bytes(f"!<arch>\n{name}".encode())
    run("pi", "--boot", card, "--collector", "c", "--os", "trixie")
    assert (card / first_boot.PACKAGE).read_bytes().endswith(b"cp313.deb")


def test_a_card_of_32_bits_gets_the_package_of_32_bits(
    card: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (card / "kernel8.img").touch()
    assert "arm64-cp311" in error_of("pi", "--boot", card, "--collector", "c")
    (card / "kernel7.img").touch()
    assert "armhf-cp311" in error_of("pi", "--boot", card, "--collector", "c")


def test_a_signed_package_is_one(card: Path, package: Path, release_packages: ModuleType) -> None:
    signed = release_packages.Signer().sign(package)
    run("pi", "--boot", card, "--package", signed, "--collector", "c")
    assert (card / first_boot.PACKAGE).read_bytes() == signed.read_bytes()


# Over SSH: the user's own ssh is another program here, which runs the commands in a folder.


@pytest.fixture
def ssh(tmp_path: Path) -> Path:
    """An ``ssh`` that runs what it is given here, among programs that stand for the board's."""
    board = tmp_path / "board"
    board.mkdir()
    programs = {
        "ssh": f'#!/bin/sh\nshift 3\nPATH="{board}:$PATH" exec sh -c "$*"\n',
        "dpkg": '#!/bin/sh\n[ "$1" = --print-architecture ] && { echo ${ARCHITECTURE:-arm64}; exit; }\n'
        f'cp agent.deb "{board}/installed.deb"; echo "dpkg $*"\n',
        "python3": "#!/bin/sh\necho ${PYTHON:-3.10}\n",
        "uname": "#!/bin/sh\necho the-board\n",
        "id": "#!/bin/sh\necho 1000\n",
        "sudo": f'#!/bin/sh\n[ -n "$NO_SUDO" ] && {{ echo "sudo: a password is required" >&2; exit 1; }}\n'
        f'shift; export PATH="{board}:$PATH"; exec "$@"\n',
        "mkdir": "#!/bin/sh\nexit 0\n",
        "install": f'#!/bin/sh\nfor a; do last=$a; done; echo "$last" >>"{board}/installed"; exit 0\n',
        "systemctl": "#!/bin/sh\nexit 0\n",
    }
    for name, text in programs.items():
        (board / name).write_text(text)
        (board / name).chmod(0o755)
    return board


@pytest.fixture
def jammy(tmp_path: Path, release_packages: ModuleType) -> Path:
    """The package for JetPack 6."""
    return Path(release_packages.build(tmp_path, "0.1.0", {}, tag="cp310"))


@pytest.mark.parametrize("kind", ["jetson", "coral"])
def test_a_board_over_ssh(kind: str, ssh: Path, jammy: Path, update_key: Path) -> None:
    arguments = (
        kind, "--host", "me@jetson", "--package", jammy, "--collector", "lab", "--token", "bbt_secret",
        "--update-key", update_key,
    )  # fmt: skip
    answer = run(*arguments, "--dry-run", BOARDBENCH_SSH=str(ssh / "ssh"))
    assert not (ssh / "installed").exists()
    for words in ("agent.toml", "enrolment.json", "update.pub", update_key.read_text().strip()):
        assert words in answer.output
    assert "bbt_secret" not in answer.output
    answer = run(*arguments, BOARDBENCH_SSH=str(ssh / "ssh"))
    package = jammy
    assert (ssh / "installed.deb").read_bytes() == package.read_bytes()
    installed = (ssh / "installed").read_text().split()
    assert installed == [
        "/etc/boardbench/agent.d/50-flash.toml",
        "/etc/boardbench/update.pub",
        "/var/lib/boardbench/enrolment-pending.json",
    ]
    assert "agent.deb: OK" in answer.output
    assert "bbt_secret" not in answer.output


def test_what_a_board_over_ssh_lacks_is_told(ssh: Path, jammy: Path, package: Path) -> None:
    given = ("--host", "me@board", "--package", jammy, "--collector", "lab")
    program = str(ssh / "ssh")
    assert "with Python 3.7; the agent needs 3.10 to 3.13" in error_of(
        "coral", *given, BOARDBENCH_SSH=program, PYTHON="3.7"
    )
    assert "no package for that" in error_of("coral", *given, BOARDBENCH_SSH=program, ARCHITECTURE="riscv64")
    wrong = ("--host", "me@board", "--package", package, "--collector", "lab")
    assert "the board needs arm64, cp310" in error_of("coral", *wrong, BOARDBENCH_SSH=program)
    assert "sudo asks for a password" in error_of("jetson", *given, BOARDBENCH_SSH=program, NO_SUDO="1")
    assert "install OpenSSH" in error_of("jetson", *given, BOARDBENCH_SSH="no-such-ssh")
    assert "can't be reached over SSH" in error_of("jetson", *given, BOARDBENCH_SSH="sh -c 'exit 255'")
    for host in ("-oProxyCommand=x", "a b", "x;y"):
        assert "no [USER@]HOST" in error_of("jetson", "--host", host, *given[2:], BOARDBENCH_SSH=program)


def test_a_jetsons_files_before_they_are_written(tmp_path: Path, jammy: Path, update_key: Path) -> None:
    package = jammy
    rootfs = tmp_path / "rootfs"
    (rootfs / "usr/bin").mkdir(parents=True)
    given = (
        "jetson",
        "--rootfs",
        rootfs,
        "--package",
        package,
        "--collector",
        "lab",
        "--token",
        "bbt_secret",
        "--update-key",
        update_key,
    )
    assert "has none of Python" in error_of(*given)
    (rootfs / "usr/bin/python3.10").touch()
    answer = run(*given, "--dry-run")
    assert not (rootfs / "opt").exists()
    assert update_key.read_text().strip() in answer.output and "bbt_secret" not in answer.output
    answer = run(*given)
    assert "l4t_initrd_flash.sh" in answer.output
    install = rootfs / "opt/boardbench-install"
    assert (install / "agent.deb").read_bytes() == package.read_bytes()
    assert (install / "enrolment.json").stat().st_mode & 0o777 == 0o600
    link = rootfs / "etc/systemd/system/multi-user.target.wants/boardbench-install.service"
    assert link.readlink() == Path("/etc/systemd/system/boardbench-install.service")
    assert (install / "update.pub").read_bytes() == update_key.read_bytes()
    # As after a first boot in an emulator, say: the next one installs anew, without what is not given.
    (install / "installed").touch()
    run(*given[:-4])
    assert sorted(path.name for path in install.iterdir()) == [
        "SHA256SUMS", "agent.deb", "agent.toml", "install.sh",
    ]  # fmt: skip
    # A link that leads out of it is not followed.
    shutil.rmtree(install)
    outside = tmp_path / "outside"
    outside.mkdir()
    install.symlink_to(outside)
    assert "leads out of" in error_of(*given)
    assert not list(outside.iterdir())
    install.unlink()
    link.unlink()
    link.parent.rmdir()
    link.parent.symlink_to(outside)
    assert "leads out of" in error_of(*given)
    assert not list(outside.iterdir())
