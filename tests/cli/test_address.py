"""Addresses as people write them."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from boardbench.cli.address import Address, CollectorType, ca_option, parse_address


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("raspberrypi.local", "raspberrypi.local", 7341),
        ("pi:1234", "pi", 1234),
        (" pi ", "pi", 7341),
        ("192.168.1.7", "192.168.1.7", 7341),
        ("192.168.1.7:80", "192.168.1.7", 80),
        ("::1", "::1", 7341),
        ("[::1]", "::1", 7341),
        ("[::1]:80", "::1", 80),
        ("fe80::1%eth0", "fe80::1%eth0", 7341),
        ("[2001:DB8::0:1]:65535", "2001:db8::1", 65535),
        ("my_board", "my_board", 7341),
        ("bücher.example", "xn--bcher-kva.example", 7341),
        ("pi.", "pi.", 7341),
    ],
)
def test_what_is_taken(text, host, port):
    assert parse_address(text, 7341) == Address(host, port)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "names no host"),
        (":7341", "names no host"),
        ("pi:", "is not a port"),
        ("pi:0", "is not a port"),
        ("pi:65536", "is not a port"),
        ("pi:７", "is not a port"),
        ("pi:-1", "is not a port"),
        ("pi:+1", "is not a port"),
        ("a b", "is not a host name"),
        ("-pi", "is not a host name"),
        ("http://pi", "leave out the scheme"),
        ("pi/path", "leave out the scheme"),
        ("user@pi", "needs no user name"),
        ("256.1.1.1", "is not an IP address"),
        ("1.2.3", "is not an IP address"),
        ("1:2:3", "is not an IPv6 address"),
        ("[::1", "is not an IPv6 address"),
        ("[::1]80", "is not an IPv6 address"),
        ("[1.2.3.4]:80", "is not an IPv6 address"),
        ("pi\x00", "is not a host name"),
        ("ü" * 80, "is not a host name"),
    ],
)
def test_what_is_not_taken_is_told(text, words):
    with pytest.raises(ValueError, match=words):
        parse_address(text, 7341)


@given(st.text())
def test_no_text_breaks_the_parser_and_what_it_takes_can_be_written_and_read_again(text):
    try:
        address = parse_address(text, 7341)
    except ValueError as error:
        assert str(error)
        return
    assert parse_address(str(address), 1) == address
    assert address.target.startswith("dns:///")


def test_a_zone_is_escaped_for_grpc():
    assert Address("fe80::1%eth0", 1).target == "dns:///[fe80::1%25eth0]:1"


@pytest.mark.parametrize(
    ("host", "expected"),
    [("localhost", True), ("127.0.0.9", True), ("::1", True), ("pi", False), ("10.0.0.1", False)],
)
def test_loopback_is_known(host, expected):
    assert Address(host, 1).is_loopback is expected


PEM = "-----BEGIN CERTIFICATE-----\nMA==\n-----END CERTIFICATE-----\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "lab:7342 no none"),
        (("--collector", "other:1"), "other:1 no none"),
        (("--collector", "tls://other"), "tls://other:7342 yes none"),
        (("--collector", "tls://[::1]:9"), "tls://[::1]:9 yes none"),
        (("--ca", "ca.pem"), "tls://lab:7342 yes ca.pem"),
        (("--collector", "tls://other:1", "--ca", "ca.pem"), "tls://other:1 yes ca.pem"),
        # In whatever order they are written.
        (("--ca", "ca.pem", "--collector", "other"), "tls://other:7342 yes ca.pem"),
    ],
)
@pytest.mark.parametrize("by_variable", [False, True])
def test_a_collector_with_a_certificate(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    told: str,
    by_variable: bool,
) -> None:
    @click.command()
    @click.option("--collector", envvar="BOARDBENCH_COLLECTOR", default="lab", type=CollectorType())
    @ca_option
    def show(collector: Address) -> None:
        click.echo(f"{collector} {'yes' if collector.tls else 'no'} {collector.ca or 'none'}")

    monkeypatch.chdir(tmp_path)
    (tmp_path / "ca.pem").write_text(PEM)
    environment = {}
    if by_variable:
        given = dict(zip(arguments[::2], arguments[1::2], strict=True))
        environment = {f"BOARDBENCH_{name[2:].upper()}": value for name, value in given.items()}
        arguments = ()
    answer = CliRunner().invoke(show, arguments, env=environment)
    assert (answer.exit_code, answer.output) == (0, f"{told}\n")


def test_what_is_no_authority_is_a_usage_error(tmp_path: Path) -> None:
    @click.command()
    @click.option("--collector", default="lab", type=CollectorType())
    @ca_option
    def show(collector: Address) -> None:
        del collector

    (tmp_path / "empty.pem").touch()
    for name, words in (("empty.pem", "holds no certificate in PEM"), ("none.pem", "can't be read")):
        answer = CliRunner().invoke(show, ["--ca", str(tmp_path / name)])
        assert (answer.exit_code, words in answer.output) == (2, True)


def test_a_board_has_no_certificate() -> None:
    with pytest.raises(ValueError, match="leave out the scheme"):
        parse_address("tls://board:7341", 7341)
